"""What each precision costs, layer by layer, on the demo's trained network: a table and a figure for the docs.

    python -m benchmarks.precision_by_depth [--images 32] [--figure docs/images/precision.png]

Relative L2 error of every convolution's output against fp32 on the same photos: |a - b| / |b| over all values.
fp16 is measured too, though no run would take it on a CPU: what it does to the values is the same everywhere.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

SELECTORS = ("type:Conv2d",)


def errors(images: int) -> tuple[list[str], dict[str, list[float]]]:
    """(layers in the order of execution, the errors of each precision)."""
    from fmextract.capture import hooks, probe, resolve, survey
    from fmextract.common.sample_photos import make_photos
    from fmextract.inputs import decoding, preprocessing
    from fmextract.inputs.sources import open_source
    from fmextract.model import loading, precision, run_mode
    from fmextract.records import Preprocess

    loaded = loading.load_model("fmextract.demo:model")
    assert isinstance(loaded.preprocess, Preprocess)
    with tempfile.TemporaryDirectory() as scratch:
        source = open_source(make_photos(Path(scratch), images))
        pixels = torch.stack([decoding.decode(source.load(row), loaded.preprocess).pixels for row in range(images)])
    inputs = preprocessing.normalise(pixels, loaded.preprocess)
    cpu, shape = torch.device("cpu"), tuple(inputs.shape[1:])
    captured = {}
    with run_mode.RunMode(loaded.module, cpu), precision.numerics("fp32", cpu):
        seen = survey.survey(loaded.module, loaded.forward, inputs[:2])
        probed, _ = probe.probe(loaded.module, loaded.forward, resolve.resolve(SELECTORS, seen), shape, cpu)
    for name in ("fp32", "bf16", "fp16"):
        with (
            run_mode.RunMode(loaded.module, cpu, name),
            precision.numerics(name, cpu),
            hooks.tapped(loaded.module, probed) as capture,
        ):
            captured[name] = [tensor.double() for tensor in capture.forward(loaded.forward, inputs)]
    exact = captured.pop("fp32")
    found = {
        name: [float((a - b).norm() / b.norm()) for a, b in zip(tensors, exact, strict=True)]
        for name, tensors in captured.items()
    }
    return [p.tap.name for p in probed], found


def draw(found: dict[str, list[float]], out: Path) -> None:
    """The errors by depth, on a logarithmic scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained", dpi=110)
    axes = figure.subplots()
    for (name, values), colour in zip(found.items(), ("#b5367a", "#1f78b4"), strict=True):
        axes.plot(range(len(values)), np.array(values) * 100, "o-", markersize=3, linewidth=1, label=name, color=colour)
    axes.axhline(2, linewidth=0.8, linestyle="--", color="#777777")
    label = "--max-error: the median over the wanted layers"
    axes.annotate(label, (len(values) - 1, 1.55), fontsize=8, color="#555555", horizontalalignment="right")
    axes.set(xlabel="convolution, in the order of execution", ylabel="relative error, %", yscale="log")
    axes.set_title("EfficientNet-Lite0, trained: what a precision costs by depth", fontsize=10)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--figure", type=Path, default=Path("docs/images/precision.png"))
    options = parser.parse_args()
    layers, found = errors(options.images)
    print("| convolution | " + " | ".join(found) + " |\n|---|" + "--:|" * len(found))
    for i in sorted({*range(0, len(layers), 6), len(layers) - 1}):
        print(f"| {i}: `{layers[i]}` | " + " | ".join(f"{values[i]:.2%}" for values in found.values()) + " |")
    print("| median of all | " + " | ".join(f"{np.median(values):.2%}" for values in found.values()) + " |")
    draw(found, options.figure)


if __name__ == "__main__":
    main()
