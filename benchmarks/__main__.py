"""`python -m benchmarks`: how long `fmextract extract` takes, end to end, on JPEGs made for it. Prints JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 500, 375
LIBRARIES = ("fmextract", "torch", "torchvision", "numpy", "h5py", "isal", "simplejpeg")


def make_photos(folder: Path, count: int) -> int:
    """`count` JPEGs with structure at every scale, as photos have, about 40 KB each; returns their bytes together."""
    random = np.random.default_rng(0)
    for number in range(count):
        pixels = np.zeros((HEIGHT, WIDTH, 3), np.float32)
        for cells in (2, 4, 8, 16, 32, 64, 128):
            grain = random.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
            pixels += np.asarray(Image.fromarray(grain).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float32)
        Image.fromarray((pixels / 7).astype(np.uint8)).save(folder / f"{number:05}.jpg", quality=90)
    return sum(file.stat().st_size for file in folder.iterdir())


def extract(photos: Path, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One run of the command line in a process of its own: its result, and `wall_seconds` of the whole process."""
    command = [sys.executable, "-m", "fmextract", "extract", str(photos), "-m", options.model, "-w", "random:0"]
    command += [word for layer in options.layer for word in ("-l", layer)]
    command += ["-o", str(out), "--precision", options.precision, "--overwrite", "--json"]
    started = time.perf_counter()
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    wall = time.perf_counter() - started
    return {**json.loads(ended.stdout), "wall_seconds": round(wall, 3)}


def machine() -> Mapping[str, Any]:
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in LIBRARIES},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("-n", "--images", type=int, default=256, help="images of 500 x 375 pixels (default: 256)")
    parser.add_argument("-m", "--model", default="resnet18", help="built with random weights (default: resnet18)")
    parser.add_argument("-l", "--layer", action="append", help="selector, repeatable (default: 'layer*')")
    parser.add_argument("--precision", default="fp32", help="as in extract (default: fp32)")
    parser.add_argument("--repeat", type=int, default=3, help="runs, of which the median counts (default: 3)")
    options = parser.parse_args()
    options.layer = options.layer or ["layer*"]
    with tempfile.TemporaryDirectory() as temporary:
        photos = Path(temporary, "photos")
        photos.mkdir()
        size = make_photos(photos, options.images)
        runs = [extract(photos, Path(temporary, "acts.h5"), options) for _ in range(options.repeat)]
    measured = ("seconds", "wall_seconds", "images_per_second")
    told = ("device", "precision", "batch_size", "bytes_raw", "bytes_stored", "limiting_stage", "stages")
    report = {
        "benchmark": "extract, end to end",
        "config": {**vars(options), "bytes_jpeg": size},
        "median": {name: statistics.median(run[name] for run in runs) for name in measured},
        "runs": [{name: run[name] for name in measured} for run in runs],
        "last": {name: runs[-1][name] for name in told},
        "machine": machine(),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
