"""What `fmextract plan` foretells against what the run then does: bytes on disk and seconds, on several networks.

    python -m benchmarks.plan_accuracy [--images 256] [--json FILE]

The photos are the demo's, cropped at many scales. Seconds are those of the images, without the start.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CASES = {
    "resnet50": ("random:0", ["layer*"], "fp32"),
    "mobilenet_v3_large": ("random:0", ["features.*"], "fp32"),
    "vit_b_16": ("random:0", ["encoder.layers.*"], "bf16"),
    "fmextract.demo:model": ("default", ["blocks.*"], "auto"),
}


class Clock:
    """A Progress that takes the time between the first image and the last."""

    def __init__(self) -> None:
        self.started = self.seconds = 0.0

    def note(self, text: str) -> None:
        print(f"  {text}", file=sys.stderr)

    def step(self, what: str, done: int, total: int) -> None:
        """Nothing to show."""

    def start(self, total: int, done: int) -> None:
        self.started = time.perf_counter()

    def advance(self, images: int, failed: int) -> None:
        """Nothing to show."""

    def finish(self) -> None:
        self.seconds = time.perf_counter() - self.started


def case(name: str, photos: Path, folder: Path) -> dict[str, Any]:
    """Plan and run one network; the foretold and the real figures, and their ratios."""
    from fmextract.config import Config
    from fmextract.run.extract import make_plan, run
    from fmextract.storage.shards import PLAN

    weights, layers, precision = CASES[name]
    config = Config.of(layers=layers, weights=weights, precision=precision)
    plan = make_plan(photos, name, folder / "planned", config)
    clock = Clock()
    result = run(photos, name, folder / "out", config, clock)
    assert (folder / "out" / PLAN).exists()
    return {
        "bytes_planned": plan.estimate.bytes_stored,
        "bytes_real": result.bytes_stored,
        "bytes_ratio": plan.estimate.bytes_stored / result.bytes_stored,
        "seconds_planned": plan.estimate.seconds,
        "seconds_real": clock.seconds,
        "seconds_ratio": plan.estimate.seconds / clock.seconds,
        "images": result.images,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--only", default=",".join(CASES))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from fmextract.common.machine import machine
    from fmextract.common.sample_photos import make_photos

    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        photos = make_photos(Path(scratch) / "photos", options.images)
        for name in options.only.split(","):
            with tempfile.TemporaryDirectory() as folder:
                found[name] = case(name, photos, Path(folder))
    print("| network | bytes planned / real | seconds planned / real |\n|---|--:|--:|")
    for name, row in found.items():
        print(
            f"| {name} | {row['bytes_planned'] / 1e6:.0f} / {row['bytes_real'] / 1e6:.0f} MB = {row['bytes_ratio']:.2f}"
            f" | {row['seconds_planned']:.1f} / {row['seconds_real']:.1f} s = {row['seconds_ratio']:.2f} |"
        )
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "cases": found}, indent=2))


if __name__ == "__main__":
    main()
