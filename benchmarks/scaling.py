"""What a run costs as it grows, and what it does not have to pay: figures that should be near 1.

    python -m benchmarks.scaling [--only images,layers,start,tiny,stop,reduce] [--turns 3] [--json]

- images: seconds an image over 20,000 images of 32 x 32 against 2,000, ResNet-18 with full maps of four layers.
- layers: seconds a byte with 50 convolutions of a ResNet-50 at once, against four of them.
- start: a command with precision and batch size given, until its first batch is about to be decoded, against a process
  that imports torch and torchvision and builds the same network.
- tiny: rate at 32 x 32 pixels and batches of 512, against the bare model and the bare decoder one after the other.
- stop: `-l layer2` of a ResNet-50, against a run of a network that was cut after layer2.
- reduce: `=mean` of all 16 blocks of a ResNet-50, against the bare model on inputs that are ready.

Rates of runs are from the first image to the published files, without the start. Contenders take turns; medians of the
ratios of each turn. Networks have random weights; images are crops of the demo's photos, as JPEGs, in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from fmextract.planning import Plan
    from fmextract.run.prepare import Prepared

FEW, MANY = 2000, 20_000
LAYERS = ["layer1", "layer2", "layer3", "layer4"]
CONVOLUTIONS = 50
FOUR = (5, 18, 31, 44)  # of those: spread over the network
COMMAND = ["-m", "resnet50", "-w", "random:0", "-l", "layer?", "--precision", "fp32", "--batch-size", "8"]


@dataclass(frozen=True, slots=True)
class Figure:
    """`ratio` of what is measured to what it is compared with: seconds, so that less is better."""

    name: str
    what: str
    ratio: float
    at_most: float
    turns: tuple[float, ...]
    seconds: dict[str, float]


def _figure(name: str, what: str, at_most: float, turns: Sequence[dict[str, float]]) -> Figure:
    """Of turns that each give the seconds (an image, a byte …) of two contenders, the second the yardstick."""
    ours, yardstick = list(turns[0])[:2]
    ratios = [turn[ours] / turn[yardstick] for turn in turns]
    medians = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
    return Figure(name, what, statistics.median(ratios), at_most, tuple(ratios), medians)


# -------------------------------------------------------------------------------------------- material


class Photos:
    """`count` images in memory, cycling through a few different JPEGs."""

    def __init__(self, files: Sequence[bytes], count: int) -> None:
        self.files, self.labels = files, range(count)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> bytes:
        return self.files[row % len(self.files)]


def _photos(count: int, width: int, height: int, different: int = 100) -> Photos:
    from fmextract.common.sample_photos import make_photos

    with tempfile.TemporaryDirectory() as scratch:
        made = make_photos(Path(scratch) / "photos", min(count, different), width, height)
        return Photos([file.read_bytes() for file in sorted(made.iterdir())], count)


def _network(name: str) -> nn.Module:
    import torch
    import torchvision

    torch.manual_seed(0)
    network: nn.Module = torchvision.models.get_model(name, weights=None)
    return network.eval()


def _preprocess(size: int) -> str:
    return f"size={size},crop={size},mean=0.485/0.456/0.406,std=0.229/0.224/0.225,interpolation=bilinear"


@contextmanager
def _run(photos: Photos, network: nn.Module, layers: Sequence[str], size: int, batch: int) -> Iterator[Run]:
    """A run that is prepared and planned, fp32, ready to be timed again and again."""
    from fmextract.common.progress import Quiet
    from fmextract.config import Config
    from fmextract.run.make_plan import plan_for
    from fmextract.run.prepare import prepare

    config = Config.of(
        layers=list(layers), precision="fp32", memory_format="contiguous", batch_size=batch, device="cpu",
        preprocess=_preprocess(size),
    )  # fmt: skip
    with prepare(photos, network, config, Quiet()) as prepared, tempfile.TemporaryDirectory() as scratch:
        yield Run(prepared, plan_for(prepared, Path(scratch) / "run", Quiet()))


@dataclass(frozen=True, slots=True)
class Run:
    prepared: Prepared
    plan: Plan

    def seconds(self) -> float:
        """From the first image to the published files."""
        from fmextract.benchmark import _end_to_end

        with tempfile.TemporaryDirectory() as scratch:
            return _end_to_end(self.prepared, self.plan, None, Path(scratch) / "run")[0]

    @property
    def raw_bytes(self) -> int:
        return self.plan.estimate.bytes_raw


def _bare_forward(network: nn.Module, batch: Any, images: int) -> float:
    """Seconds of the model alone, without hooks, over `images` images that are on the device already."""
    import torch

    with torch.no_grad():
        started = time.perf_counter()
        for _ in range(0, images, len(batch)):
            network(batch)
        return time.perf_counter() - started


def _inputs(run: Run) -> Any:
    """One batch of the run's images as inputs of the model."""
    import torch

    from fmextract.inputs import decoding, preprocessing
    from fmextract.records import Preprocess

    source, preprocess = run.prepared.source, run.prepared.loaded.preprocess
    assert isinstance(preprocess, Preprocess)
    pixels = [decoding.decode(source.load(row), preprocess).pixels for row in range(run.plan.batch_size)]
    return preprocessing.normalise(torch.stack(pixels), preprocess)


# ------------------------------------------------------------------------------------------ the figures


def images(turns: int) -> Figure:
    few, many = _photos(FEW, 32, 32), _photos(MANY, 32, 32)
    with ExitStack() as stack:
        runs = {
            n: stack.enter_context(_run(p, _network("resnet18"), LAYERS, 32, 64)) for n, p in ((MANY, many), (FEW, few))
        }
        measured = [{f"{n} images": run.seconds() / n for n, run in runs.items()} for _ in range(turns)]
    return _figure("images", "seconds an image, 20,000 against 2,000", 1.05, measured)


def layers(turns: int) -> Figure:
    photos, count, network = _photos(16, 500, 375), 16, _network("resnet50")
    chosen = {"50 layers": [f"conv#{i}" for i in range(CONVOLUTIONS)], "4 layers": [f"conv#{i}" for i in FOUR]}
    measured = []
    with ExitStack() as stack:
        runs = {name: stack.enter_context(_run(photos, network, taps, 224, 8)) for name, taps in chosen.items()}
        batch = _inputs(runs["4 layers"])
        for _ in range(turns):
            turn = {name: run.seconds() for name, run in runs.items()}
            bare = _bare_forward(network, batch, count)
            above = {f"{name}, a byte beside the model": (turn[name] - bare) / runs[name].raw_bytes for name in turn}
            measured.append(above | {f"{name}, a byte": turn[name] / runs[name].raw_bytes for name in turn})
    return _figure("layers", "seconds a byte that the bare model does not take, 50 layers against 4", 1.0, measured)


def start(turns: int) -> Figure:
    with tempfile.TemporaryDirectory() as scratch:
        from fmextract.common.sample_photos import make_photos

        photos = make_photos(Path(scratch) / "photos", 64)
        measured = []
        for turn in range(2 * turns):
            command = _until_ready("command", str(photos), str(Path(scratch) / f"out{turn}"))
            measured.append({"command": command, "import and build": _until_ready("build")})
    return _figure("start", "until the first batch, against importing torch and building the model", 1.5, measured)


def _until_ready(*arguments: str) -> float:
    """Seconds from starting a process until it says that it is ready."""
    command = [sys.executable, "-m", "benchmarks.scaling", "--child", *arguments]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        took = time.perf_counter() - started
    if line.strip() != "ready" or process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {line}")
    return took


def _child(what: str, arguments: Sequence[str]) -> None:
    """One of the two processes of `start`."""
    if what == "build":
        _network("resnet50")
        _ready()
    from fmextract.cli import app

    with app.importing():  # as the command itself would
        from fmextract.pipeline import pipeline
    pipeline.run_shards = lambda *args: _ready()
    photos, out = arguments
    raise SystemExit(app.main(["extract", photos, *COMMAND, "-o", out, "--device", "cpu"]))


def _ready() -> None:
    print("ready", file=sys.__stdout__, flush=True)  # a command keeps what others print away from its own output
    os._exit(0)


def tiny(turns: int) -> Figure:
    count, batch = 8192, 512
    network = _network("resnet18")
    with _run(_photos(count, 32, 32), network, LAYERS, 32, batch) as run:
        inputs = _inputs(run)
        measured = []
        for _ in range(turns):
            ours = run.seconds()
            forward, decode = _bare_forward(network, inputs, count), _bare_decode(run, count)
            turn = {"run": ours, "bare": forward + decode, "bare model": forward, "bare decoder": decode}
            measured.append({name: seconds / count for name, seconds in turn.items()})
    return _figure("tiny", "32 x 32, batch 512: a run against bare model and decoder", 2.0, measured)


def _bare_decode(run: Run, count: int) -> float:
    """Seconds of libjpeg-turbo alone, on all threads of the run."""
    from fmextract import benchmark

    data = [run.prepared.source.load(row) for row in range(count)]
    parts = [data[i :: run.plan.threads] for i in range(run.plan.threads)]

    def decode(part: Sequence[bytes]) -> None:
        for item in part:
            benchmark._bare_decode(item)

    with benchmark._threads(run.plan) as run_all:
        started = time.perf_counter()
        run_all([partial(decode, part) for part in parts])
        return time.perf_counter() - started


def stop(turns: int) -> Figure:
    from torch import nn

    network, photos = _network("resnet50"), _photos(192, 500, 375)
    children = list(network.named_children())
    at = [name for name, _ in children].index("layer2")
    cut = nn.Sequential(OrderedDict(children[: at + 1]))
    with _run(photos, network, ["layer2"], 224, 8) as whole, _run(photos, cut, ["layer2"], 224, 8) as short:
        measured = [{"whole": whole.seconds(), "cut": short.seconds()} for _ in range(turns)]
    return _figure("stop", "-l layer2 against a network cut after layer2", 1.05, measured)


def reduce(turns: int) -> Figure:
    network, count = _network("resnet50"), 512
    with _run(_photos(count, 500, 375), network, ["layer?.*=mean"], 224, 8) as run:
        assert len(run.plan.layers) == 16, run.plan.layers
        inputs = _inputs(run)
        measured = [{"run": run.seconds(), "bare": _bare_forward(network, inputs, count)} for _ in range(turns)]
    return _figure("reduce", "=mean of all blocks against the bare model", 1.1, measured)


FIGURES: dict[str, Callable[[int], Figure]] = {
    figure.__name__: figure for figure in (images, layers, start, tiny, stop, reduce)
}


def _table(figures: Sequence[Figure]) -> str:
    lines = ["| | ratio | at most | turns |", "|---|--:|--:|---|"]
    for figure in figures:
        turns = ", ".join(f"{ratio:.2f}" for ratio in sorted(figure.turns))
        lines.append(f"| {figure.name}: {figure.what} | **{figure.ratio:.2f}** | {figure.at_most:.2f} | {turns} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="comma-separated: " + ", ".join(FIGURES))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child(options.child[0], options.child[1:])
        return
    from fmextract.common.machine import machine

    figures = []
    for name in options.only.split(",") if options.only else FIGURES:
        figures.append(FIGURES[name](options.turns))
        print(f"{name}: {figures[-1]}", file=sys.stderr)
    if options.json:
        print(json.dumps({"figures": [asdict(figure) for figure in figures], "machine": machine()}, indent=2))
    else:
        print(_table(figures))


if __name__ == "__main__":
    main()
