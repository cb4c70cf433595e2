"""A few images of the source as the model takes them, for what is measured before a run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fmextract.errors import SampleError
from fmextract.inputs import preprocessing
from fmextract.inputs.reading import Reader
from fmextract.records import Preprocess

FEW = 2
"""Images up to which any of the source will do, where they should be unlike each other."""


@dataclass(frozen=True, slots=True)
class Sampler:
    """Images spread over a source of `rows`. Those that fail, or are of another shape than the first, are passed over.

    `input_shape` is that of one input of the model; `ready`: images are inputs as they come, and not normalised.
    """

    reader: Reader
    rows: int
    preprocess: preprocessing.Preprocessing | None
    input_shape: tuple[int, ...]
    ready: bool
    device: torch.device

    def sample(self, n: int) -> tuple[torch.Tensor, float]:
        """(`n` images as inputs of the model, seconds that decoding one took on one core).

        Where fewer can be read than are asked for, they are repeated.
        """
        pixels, seconds = self._pixels(n)
        if not pixels:
            pixels = [torch.zeros(self.input_shape, dtype=torch.float32 if self.ready else torch.uint8)]
        return self._inputs([pixels[i % len(pixels)] for i in range(n)]), seconds

    def unlike(self, n: int) -> torch.Tensor:
        """Up to `n` images as inputs of the model; those that are most unlike, where many are asked for."""
        pixels, _ = self._pixels(n if n <= FEW else 4 * n)
        if not pixels:
            return torch.empty((0, *self.input_shape), device=self.device)
        return _most_unlike(self._inputs(pixels), n)

    def _pixels(self, n: int) -> tuple[list[torch.Tensor], float]:
        """(the pixels of up to `n` images that can be read, seconds that decoding one took)."""
        pixels: list[torch.Tensor] = []
        tried, started = 0, time.perf_counter()
        for row in _spread(self.rows, 4 * n):
            if len(pixels) == n:
                break
            tried += 1
            try:
                image = self.reader.image(row)
            except SampleError:
                continue
            if image.pixels.shape == self.input_shape:
                pixels.append(image.pixels)
        return pixels, (time.perf_counter() - started) / max(1, tried)

    def _inputs(self, pixels: Sequence[torch.Tensor]) -> torch.Tensor:
        batch = torch.stack(list(pixels)).to(self.device)
        if self.ready:
            return batch
        assert isinstance(self.preprocess, Preprocess)
        return preprocessing.normalise(batch, self.preprocess)


def _most_unlike(batch: torch.Tensor, n: int) -> torch.Tensor:
    """`n` of a batch: the first, and each time the one that is farthest from all that were taken."""
    flat = batch.flatten(1).double()
    taken = [0]
    away = (flat - flat[0]).norm(dim=1)
    while len(taken) < min(n, len(batch)):
        taken.append(int(away.argmax()))
        away = torch.minimum(away, (flat - flat[taken[-1]]).norm(dim=1))
    return batch[taken]


def _spread(rows: int, tries: int) -> list[int]:
    """Up to `tries` different rows, the first quarter of them spread evenly, as are the others between."""
    step = max(1, rows * 4 // tries)
    order = [start + offset for offset in range(0, step, max(1, step // 4)) for start in range(0, rows, step)]
    return [row for row in dict.fromkeys(order) if row < rows][:tries]
