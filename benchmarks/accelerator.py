"""fmextract on an accelerator: each stage, their limit, whole runs, and beside them the script that a user writes.

    python -m benchmarks.accelerator [--images 4096] [--script 256] [--only maps-bf16,pooled] [--json FILE]

ResNet-50 with random weights over photographic JPEGs of 500 x 375 pixels (extra `demo`): 256 of them, each under
several names. The script is torchvision's `create_feature_extractor` with the network on the device, a DataLoader with
a worker a core and pinned memory, and h5py with gzip; its rate is that of fewer photos, since it takes long.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import Script, Task
from fmextract import benchmark
from fmextract.common.machine import machine
from fmextract.common.progress import Quiet
from fmextract.common.sample_photos import make_photos
from fmextract.common.system import cores
from fmextract.config import Config

DISTINCT = 256
STAGES = tuple(f"layer{i}" for i in (1, 2, 3, 4))
MAPS = (*STAGES, "avgpool")
POOLED = (*(f"{layer}=mean" for layer in STAGES), "avgpool")
CASES: dict[str, dict[str, Any]] = {
    "maps-bf16": {"layers": MAPS, "precision": "bf16"},
    "maps-fp32": {"layers": MAPS, "precision": "fp32"},
    "maps-lz4": {"layers": MAPS, "precision": "bf16", "codec": "lz4"},
    "maps-threads": {"layers": MAPS, "precision": "bf16", "worker_kind": "threads"},
    "pooled": {"layers": POOLED, "precision": "bf16"},
    "pooled-threads": {"layers": POOLED, "precision": "bf16", "worker_kind": "threads"},
    "pooled-device": {"layers": POOLED, "precision": "bf16", "jpeg_decoder": "device"},
}


def photos(folder: Path, count: int) -> Path:
    """`count` names of `DISTINCT` photos."""
    make_photos(folder, min(count, DISTINCT))
    made = sorted(folder.iterdir())
    for i in range(DISTINCT, count):
        os.link(made[i % DISTINCT], folder / f"{i:05}.jpg")
    return folder


def script(folder: Path, count: int, device: str, work: Path) -> float:
    """Images a second of the usual script."""
    import torchvision

    some = work / "some"
    some.mkdir()
    for path in sorted(folder.iterdir())[:count]:
        os.link(path, some / path.name)
    (work / "script").mkdir()
    torch.manual_seed(0)
    model = torchvision.models.resnet50(weights=None).eval().to(device)
    started = time.perf_counter()
    Script().run(Task(model, some, work / "script", MAPS, batch=64, device=device, workers=cores()))
    return count / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--script", type=int, default=256, help="photos for the script; 0: without it")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(CASES), help=", ".join(CASES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    found: dict[str, Any] = {"machine": machine()}
    print(found["machine"], flush=True)
    with tempfile.TemporaryDirectory(dir=options.work) as scratch:
        folder = photos(Path(scratch) / "photos", options.images)
        for name in options.only:
            config = Config.of(weights="random:0", device=options.device, **CASES[name])
            made = benchmark.bench(folder, "resnet50", config, Quiet(), repeats=options.repeats)
            found[name] = asdict(made)
            print(f"\n== {name}\n{made}\nruns {[round(rate) for rate in made.runs]}", flush=True)
            if options.json:
                options.json.write_text(json.dumps(found, indent=1, default=str))
        if options.script:
            where = "cuda" if options.device == "auto" else options.device
            found["script"] = script(folder, options.script, where, Path(scratch))
            print(f"\n== script\n{found['script']:.1f} images/s", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1, default=str))


if __name__ == "__main__":
    main()
