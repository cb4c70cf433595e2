"""A small run over real files, for the tests of what is drawn from one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

import fmextract
from fmextract.records import Preprocess

SIZE = 32
LAYERS = ["conv#0", "relu", "conv#-1", "fc"]


class Tiny(nn.Module):
    """Two convolutions, the first of them over colours, and a linear layer. Channel 1 of `relu` is dead."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 6, 5, stride=2, padding=2)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.fc = nn.Linear(8, 5)
        with torch.no_grad():
            self.conv1.weight[1] = 0
            self.conv1.bias[1] = -1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv2(self.relu(self.conv1(x))).mean((2, 3)))


class Tokens(nn.Module):
    """Patches of 8 pixels and a class token before them, as (token, feature)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 4, 8, stride=8)
        self.norm = nn.LayerNorm(4)
        self.cls = nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return self.norm(torch.cat([self.cls.expand(len(x), -1, -1), tokens], 1))


PREPROCESS = Preprocess(resize=36, crop=(SIZE, SIZE))


def write_photos(folder: Path, count: int = 6) -> Path:
    """Noise with a bright square that stands somewhere else in each; names that try what a file name may hold."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for i in range(count):
        pixels = random.integers(0, 60, (48, 64, 3), dtype=np.uint8)
        pixels[4 * i : 4 * i + 12, 20 + 3 * i : 32 + 3 * i] = 250
        name = "odd $x$ \u202e\n name.png" if i == 0 else f"{i}.png"
        Image.fromarray(pixels).save(folder / name)
    return folder


def small_run(photos: Path, out: Path, model: nn.Module | None = None, **options: Any) -> fmextract.Activations:
    fixed: dict[str, Any] = {
        "precision": "fp32",
        "batch_size": 2,
        "device": "cpu",
        "preprocess": PREPROCESS,
        "top_k": 4,
    }
    return fmextract.extract(str(photos), model or Tiny(), out, **({"layers": LAYERS} | fixed | options))
