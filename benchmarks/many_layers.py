"""What a layer costs beside its values: a tiny model of very many layers over a few images.

    python benchmarks/many_layers.py [LAYERS] [IMAGES]

Prints the seconds of a whole run and the milliseconds a layer. The values are nothing here (4 channels of 4 x 4): what
is left is probing, statistics, metadata and HDF5.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import fmextract as fm


class Many(nn.Module):
    """Alternately a convolution of single pixels and a rectifier."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.ReLU() if i % 2 else nn.Conv2d(4, 4, 1) for i in range(layers)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` is (b, 4, 4, 4)."""
        y: torch.Tensor = self.layers(x)
        return y


def seconds(layers: int, images: int) -> tuple[float, float]:
    """(seconds of a run, seconds on the processor)."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(4, 4, 4, generator=generator) for _ in range(images)]
    with tempfile.TemporaryDirectory() as folder:
        wall, busy = time.perf_counter(), time.process_time()
        fm.extract(inputs, Many(layers).eval(), Path(folder) / "out.h5", layers=["layers.*"], preprocess="none")
        return time.perf_counter() - wall, time.process_time() - busy


def main() -> None:
    layers, images = (int(argument) for argument in (*sys.argv[1:], *("1600", "20")[len(sys.argv) - 1 :]))
    seconds(2, 2)  # what is imported and warmed up once is no matter of layers
    wall, busy = seconds(layers, images)
    print(f"{layers} layers, {images} images: {wall:.1f} s, {busy:.1f} s on the processor,", end=" ")
    print(f"{1000 * busy / layers:.1f} ms a layer")


if __name__ == "__main__":
    main()
