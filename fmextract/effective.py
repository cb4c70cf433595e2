"""Effective receptive fields: how much of what a cell could see it does use.

The field of a deep layer is larger than the image, while nearly all of the gradient of a cell with respect to the image
lies in a small part in the middle of it (Luo, Li, Urtasun and Zemel, "Understanding the Effective Receptive Field in
Deep Convolutional Neural Networks", NeurIPS 2016). As there, a gradient is put on the centre of the map; here it is
random normal for each channel, so that the square of the result is in expectation the sum of the squares of all
channels, and none cancels another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fmextract.records import Field
from fmextract.taps import Event, Forward, Probed, Reduce, tapped

SHARE = 0.9  # of the squared gradient, inside the square


def effective_sizes(
    model: nn.Module,
    forward: Forward,
    probed: Sequence[Probed],
    fields: Sequence[Field | None],
    inputs: torch.Tensor,
    share: float = SHARE,
    stop: Event | None = None,
) -> list[float | None]:
    """For each tap, the side in pixels of the centred square that holds `share` of a cell's squared gradient.

    The square is centred on the cell in the middle of the map, the gradients are averaged over `inputs` (n, channel, y,
    x), the model's inputs in float32; one pass a few images at most is enough. One forward pass an image, one backward
    pass a tap and image. None for a tap without axes y and x, and where the model has no gradient (quantised layers,
    a forward under `no_grad`, parts overwritten that the gradient needs). The model is as before on every way out.
    """
    energies: dict[int, NDArray[np.float64]] = {}
    spatial = [i for i, tap in enumerate(probed) if {"y", "x"} <= set(tap.axes)]
    if not spatial:
        return [None] * len(probed)
    with _frozen(model), tapped(model, [probed[i] for i in spatial], _objectives(probed, spatial), stop) as capture:
        for image in inputs.detach().split(1):
            leaf = image.clone().requires_grad_()
            with torch.enable_grad():
                # The model gets a copy, which it may write to: a leaf may not be.
                try:
                    objectives = capture.forward(forward, leaf.clone())
                except RuntimeError:  # an in-place operation that autograd does not allow
                    return [None] * len(probed)
            for i, objective in zip(spatial, objectives, strict=True):
                energy = _energy(objective, leaf)
                if energy is not None:
                    energies[i] = energies.get(i, 0) + energy
    return [
        _square(energies[i], _centre(probed[i], field, energies[i].shape), share) if i in energies else None
        for i, field in enumerate(fields)
    ]


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Parameters that ask for no gradient, as long as the block lasts: only that of the image is wanted."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def _objectives(probed: Sequence[Probed], taps: Sequence[int]) -> list[Reduce]:
    """For each tap, its rows (1, …) to the sum of the centre cell's values with random factors: a scalar.

    It is taken in the hook: the tensor may be overwritten a moment later.
    """

    def objective(tap: Probed) -> Reduce:
        centre = tuple(
            n // 2 if role in ("y", "x") else slice(None) for n, role in zip(tap.shape, tap.axes, strict=True)
        )

        def take(rows: torch.Tensor) -> torch.Tensor:
            values = rows[(slice(None), *centre)]
            generator = torch.Generator().manual_seed(0)
            factors = torch.randn(values.shape, generator=generator).to(values.device, values.dtype)
            return (values * factors).sum()

        return take

    return [objective(probed[i]) for i in taps]


def _energy(objective: torch.Tensor, leaf: torch.Tensor) -> NDArray[np.float64] | None:
    """The squared gradient (y, x) of `objective`, summed over colours; None where there is none."""
    if not objective.requires_grad:
        return None
    try:
        found: Sequence[torch.Tensor | None] = torch.autograd.grad(
            objective, leaf, retain_graph=True, allow_unused=True
        )
    except RuntimeError:  # a value that the gradient needs was overwritten
        return None
    if found[0] is None:
        return None
    energy = found[0][0].double().square().sum(0).cpu().numpy()
    return energy if np.isfinite(energy).all() and energy.any() else None


def _centre(tap: Probed, field: Field | None, size: Sequence[int]) -> tuple[float, float]:
    """Where the middle cell of a map stands in the image; without a field, in proportion."""
    cells = [tap.shape[tap.axes.index(role)] for role in ("y", "x")]
    if field is None:
        y, x = ((n // 2 + 0.5) * length / n for n, length in zip(cells, size, strict=True))
    else:
        y, x = (o + n // 2 * s for n, o, s in zip(cells, field.offset, field.stride, strict=True))
    return y, x


def _square(energy: NDArray[np.float64], centre: tuple[float, float], share: float) -> float:
    """The side of the smallest square around `centre` whose pixels hold `share` of `energy` (y, x)."""
    y, x = (np.abs(np.arange(n) + 0.5 - c) for n, c in zip(energy.shape, centre, strict=True))
    distance = np.maximum(y[:, None], x[None, :]).ravel()
    order = np.argsort(distance, kind="stable")
    within = np.cumsum(energy.ravel()[order])
    last = order[np.searchsorted(within, share * within[-1])]
    return float(2 * distance[last] + 1)
