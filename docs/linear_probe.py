"""What does each depth of a network know? A linear probe on stored activations, layer by layer.

    python docs/linear_probe.py [--crops 2400] [--epochs 40] [--out probe]

A minute on two CPU cores; photos and the trained network come out of the packages of the extra `demo`, and nothing is
downloaded. Grey crops of a dozen photos are turned, cropped, darkened and made noisy at random. Then one linear layer
on the mean activations of each stage of EfficientNet-Lite0 is asked three questions: which photo is this crop from,
how light is it, how noisy is it? A photo is cut into 3 x 3 tiles, and crops from the tiles on the diagonal are for
testing only: no pixel is in both sets, so an answer must hold for parts of a photo that were never seen.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fmextract as fm
from fmextract.common.sample_photos import copy_photos

LAYERS = ("bn1=mean", "blocks.*=mean", "bn2=mean", "classifier")
SIDE = 128
LIGHT = (0.4, 0.6, 0.8, 1.0)
NOISE = (0, 4, 8, 16)
COLOURS = {"photo": "#b5367a", "noise": "#1f78b4", "light": "#e08214"}


class Crops(Dataset[PIL.Image.Image]):
    """`count` crops, the same ones for the same seed. `answers` are the right classes, one array a question."""

    def __init__(self, folder: Path, count: int, seed: int = 0) -> None:
        self.photos = [np.asarray(PIL.Image.open(path).convert("L")) for path in sorted(copy_photos(folder).iterdir())]
        self.seed = seed
        random = np.random.default_rng(seed)
        classes = {"photo": len(self.photos), "noise": len(NOISE), "light": len(LIGHT)}
        self.answers = {question: random.integers(0, n, count) for question, n in classes.items()}
        self.tile = random.integers(0, 9, count)
        self.testing = np.isin(self.tile, (0, 4, 8))

    def __len__(self) -> int:
        return len(self.tile)

    def __getitem__(self, row: int) -> PIL.Image.Image:
        photo, noise, light = (int(answers[row]) for answers in self.answers.values())
        random = np.random.default_rng((self.seed, row))
        tile = np.array_split(np.array_split(self.photos[photo], 3)[self.tile[row] // 3], 3, axis=1)[self.tile[row] % 3]
        side = int(min(tile.shape) * random.uniform(0.6, 1))
        y, x = (int(random.integers(0, size - side + 1)) for size in tile.shape)
        crop = PIL.Image.fromarray(tile[y : y + side, x : x + side]).resize((SIDE, SIDE), PIL.Image.Resampling.BICUBIC)
        pixels = np.rot90(np.asarray(crop, float), random.integers(4)) * LIGHT[light] * random.uniform(0.9, 1.1)
        pixels = pixels + NOISE[noise] * random.normal(size=pixels.shape)
        return PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGB")


def probe(acts: fm.Activations, layer: str, crops: Crops, epochs: int) -> dict[str, float]:
    """{question: share of right answers on the crops for testing} of one linear layer on the values of `layer`.

    The questions have weights of their own, so that one training answers all as three would.
    """
    training, testing = acts.dataset(layer, rows=~crops.testing), acts.dataset(layer, rows=crops.testing)
    answers = {question: torch.from_numpy(classes) for question, classes in crops.answers.items()}
    classes = [int(one.max()) + 1 for one in answers.values()]

    torch.manual_seed(0)
    features = acts[layer].shape[1]
    model = nn.Sequential(nn.BatchNorm1d(features, affine=False), nn.Linear(features, sum(classes)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=1e-3)
    batches = training.batches(128, shuffle=True, drop_last=len(training) > 128)
    loader = DataLoader(training, sampler=batches, batch_size=None)  # whole batches, as they are read
    for _ in range(epochs):
        for rows, values in loader:
            scores = model(values).split(classes, dim=1)
            loss = sum(nn.functional.cross_entropy(s, a[rows]) for s, a in zip(scores, answers.values(), strict=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    model.eval()
    rows, values = testing[range(len(testing))]
    with torch.no_grad():
        scores = model(values).split(classes, dim=1)
    right = (s.argmax(1) == a[rows] for s, a in zip(scores, answers.values(), strict=True))
    return {question: float(one.float().mean()) for question, one in zip(answers, right, strict=True)}


def draw(accuracy: dict[str, dict[str, float]], crops: Crops, out: Path) -> None:
    """Examples of the crops above a curve for each question, with its best layer marked and chance dotted."""
    figure = Figure(figsize=(8, 4.6), dpi=110, layout="constrained")
    examples, axes = figure.subfigures(2, height_ratios=(1, 3.2))
    for place, row in zip(examples.subplots(1, 8), range(8), strict=True):
        place.imshow(crops[row])
        place.set_axis_off()
    axes = axes.subplots()
    for question, colour in COLOURS.items():
        values = np.array([by_question[question] for by_question in accuracy.values()]) * 100
        best = int(values.argmax())
        axes.plot(values, "o-", color=colour, markersize=4, linewidth=1.5)
        axes.plot(best, values[best], "o", color=colour, markersize=9)
        axes.axhline(100 / (crops.answers[question].max() + 1), color=colour, linewidth=0.8, linestyle=":")
        axes.annotate(f"{question}?", (len(values) - 0.8, values[-1]), color=colour, verticalalignment="center")
    axes.set(ylabel="right answers, %", ylim=(0, 102), xlim=(-0.3, len(values) + 0.2))
    axes.set_xticks(range(len(values)), [name.removesuffix("=mean") for name in accuracy], rotation=30, fontsize=8)
    axes.set_title("What a linear reader learns from each depth of EfficientNet-Lite0 (dotted: chance)", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out)


def run(out: Path, count: int = 2400, epochs: int = 40) -> dict[str, dict[str, float]]:
    """Extract, probe every layer, draw; gives {layer: {question: share of right answers}}."""
    crops = Crops(out / "photos", count)
    acts = fm.extract(
        crops, "fmextract.demo:model", out / "acts.h5", layers=LAYERS, precision="fp32", overwrite=True,
        preprocess=f"size={SIDE},crop={SIDE},mean={127 / 255},std={128 / 255}",
    )  # fmt: skip
    print(f"{(~crops.testing).sum()} crops to learn from, {crops.testing.sum()} to be asked about")
    print(f"{'layer':14} {'features':>8}" + "".join(f"{question + '?':>8}" for question in crops.answers))
    accuracy = {}
    for layer in acts.layers:
        accuracy[layer] = probe(acts, layer, crops, epochs)
        shares = "".join(f"{share:8.0%}" for share in accuracy[layer].values())
        print(f"{layer:14} {acts[layer].shape[1]:8}{shares}", flush=True)
    print(f"{'by chance':14} {'':8}" + "".join(f"{1 / (one.max() + 1):8.0%}" for one in crops.answers.values()))
    draw(accuracy, crops, out / "linear_probe.png")
    return accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crops", type=int, default=2400)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("probe"))
    options = parser.parse_args()
    run(options.out, options.crops, options.epochs)
    print(f"the curves: {options.out / 'linear_probe.png'}")


if __name__ == "__main__":
    main()
