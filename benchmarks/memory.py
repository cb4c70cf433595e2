"""Memory, open files, threads and temporary files of a run must not grow with the number of images.

    python benchmarks/memory.py [--few 2000] [--many 20000] [--out DIR]

Two runs of the same model in processes of their own, over few and over many small images, several shards each; the
peak of the resident memory is the kernel's (VmHWM), the others are counted ten times a second. Prints JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIDE = 32


def child(photos: Path, out: Path) -> None:
    """One run; its figures go to stdout."""
    import torch
    from torch import nn

    from fmextract.common.progress import Quiet
    from fmextract.config import Config
    from fmextract.run.extract import run

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
    config = Config.of(
        layers=["1", "3"],
        preprocess=f"size={SIDE},crop={SIDE},mean=0.5,std=0.5",
        precision="fp32",
        batch_size=32,
        shard_size="16MiB",
        num_workers=2,
        device="cpu",
    )
    most: dict[str, int] = {}
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(out, most, over), daemon=True)
    watcher.start()
    result = run(photos, model, out, config, Quiet())
    over.set()
    watcher.join()
    shards = len(list(out.glob("shard-*.h5")))
    made: dict[str, Any] = {"images": result.images, "seconds": result.seconds, "shards": shards, "peak_mib": _peak()}
    print(json.dumps(made | most))


def _watch(out: Path, most: dict[str, int], over: threading.Event) -> None:
    """The greatest numbers of open files, threads and temporary files, ten times a second."""
    counts: dict[str, Callable[[], int]] = {
        "open_files": lambda: len(list(Path("/proc/self/fd").iterdir())),
        "threads": threading.active_count,
        "temporary_files": lambda: len(list(out.glob(".*"))),
    }
    while not over.wait(0.1):
        for name, count in counts.items():
            most[name] = max(most.get(name, 0), count())


def _peak() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return round(int(line.split()[1]) / 1024, 1)
    return 0.0


def make_photos(folder: Path, count: int) -> Path:
    """`count` small JPEGs; a hundred different ones."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    rng = np.random.default_rng(0)
    contents = []
    for _ in range(100):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(file, "JPEG")
        contents.append(file.getvalue())
    for number in range(count):
        (folder / f"{number:06}.jpg").write_bytes(contents[number % 100])
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--few", type=int, default=2000)
    parser.add_argument("--many", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=None, help="where to write; a temporary directory if not given")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return
    with tempfile.TemporaryDirectory(dir=options.out) as place:
        figures = []
        for count in (options.few, options.many):
            photos = make_photos(Path(place) / f"photos{count}", count)
            command = [sys.executable, __file__, "--child", str(photos), str(Path(place) / f"out{count}")]
            started = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            figures.append(json.loads(done.stdout) | {"wall_seconds": round(time.perf_counter() - started, 1)})
    few, many = figures
    ratio = many["peak_mib"] / few["peak_mib"] if few["peak_mib"] else None
    print(json.dumps({"few": few, "many": many, "peak_ratio": ratio and round(ratio, 3)}, indent=2))


if __name__ == "__main__":
    main()
