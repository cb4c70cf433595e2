"""The memory that a plan announces against what the run then takes, above a process with its model: ResNet-50.

python -m benchmarks.announced_memory [--images 96]
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

CASES = (("fp32", "contiguous"), ("fp32", "channels_last"), ("bf16", "channels_last"))


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one(precision: str, memory_format: str, images: int) -> str:
    """In a process of its own: a row of the table, in MiB."""
    from benchmarks.contenders import Ours
    from benchmarks.peers import CASES as NETWORKS
    from fmextract.common.progress import Quiet
    from fmextract.common.sample_photos import make_photos
    from fmextract.config import Config
    from fmextract.planning import Plan
    from fmextract.run import extract
    from fmextract.storage import durable, shards

    case = NETWORKS["maps"]
    model = case.network()
    with tempfile.TemporaryDirectory() as scratch:
        photos, out = make_photos(Path(scratch) / "photos", images), Path(scratch) / "out"
        formats = {"precision": precision, "memory_format": memory_format}
        config = Config.of(layers=list(case.layers), preprocess=Ours.preprocess, **formats)
        before = _peak()
        extract.run(photos, model, out, config, Quiet())
        plan = Plan.from_json(durable.read_json(out / shards.PLAN))
    return f"| {precision}, {memory_format} | {plan.estimate.bytes_peak / 2**20:.0f} | {_peak() - before:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        precision, memory_format = options.one
        print(one(precision, memory_format, options.images))
        return
    print("| ResNet-50, layer1 to layer4, avgpool | announced, MiB | taken, MiB |\n|---|--:|--:|")
    for case in CASES:
        command = [sys.executable, "-m", "benchmarks.announced_memory", "--images", str(options.images), "--one", *case]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
