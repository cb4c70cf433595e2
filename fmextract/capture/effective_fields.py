"""Effective receptive fields: how much of what a cell could see it does use.

The field of a deep layer is larger than the image, while nearly all of the gradient of a cell with respect to the image
lies in a small part in the middle of it (Luo, Li, Urtasun and Zemel, "Understanding the Effective Receptive Field in
Deep Convolutional Neural Networks", NeurIPS 2016). As there, a gradient is put on the centre of the map; here it is
random normal for each channel, so that the square of the result is in expectation the sum of the squares of all
channels, and none cancels another.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fmextract.capture.hooks import tapped
from fmextract.capture.receptive_fields import Reduced
from fmextract.capture.taps import Event, Forward, Probed, Reduce
from fmextract.errors import CaptureError
from fmextract.records import Field

SHARE = 0.9  # of the squared gradient, inside the square


def effective_sizes(
    model: nn.Module,
    forward: Forward,
    probed: Sequence[Probed],
    fields: Sequence[Field | None],
    inputs: torch.Tensor,
    share: float = SHARE,
    reductions: Sequence[Reduced | None] | None = None,
    stop: Event | None = None,
    seconds: float = math.inf,
    tell: Callable[[str], None] = lambda why: None,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> list[float | None]:
    """For each tap, the side in pixels of the centred square that holds `share` of a cell's squared gradient.

    The square is centred on the cell in the middle of the map; squared gradients are averaged over `inputs` (n,
    channel, y, x), the model's inputs in float32: two are enough. `fields`, `reductions` as in `trace_fields`. Takes
    one forward pass an image and one backward pass a tap and image; no image after the first is begun that would
    go on for longer than `seconds` from the call. None for a tap without axes y and x, and where the
    model has no gradient (quantised layers, a forward under `no_grad`, values overwritten that the gradient needs). An
    image that the model fails on is passed over, and `tell` gets to know why; `step` gets to know how many of the
    backward passes are done. The model is as before on every way out.
    """
    kept = [
        reduced or (_whole, tap.axes) for tap, reduced in zip(probed, reductions or [None] * len(probed), strict=True)
    ]
    spatial = [i for i, (_, axes) in enumerate(kept) if {"y", "x"} <= set(axes)]
    cells: dict[int, tuple[int, int]] = {}
    energies: dict[int, NDArray[np.float64]] = {}
    sizes: list[float | None] = [None] * len(probed)
    if not spatial:
        return sizes
    objectives = [_objective(*kept[i], functools.partial(cells.__setitem__, i)) for i in spatial]
    with _frozen(model), tapped(model, [probed[i] for i in spatial], objectives, stop) as capture:
        started = time.perf_counter()
        for done, image in enumerate(inputs.detach().split(1)):
            if done and (time.perf_counter() - started) * (done + 1) / done > seconds:
                break
            leaf = image.clone().requires_grad_()
            with torch.enable_grad():
                # The model gets a copy, which it may write to: a leaf may not be.
                try:
                    values = capture.forward(forward, leaf.clone())
                except CaptureError:
                    raise
                except Exception as error:  # autograd refuses an operation in place, or the model this image
                    tell(f"{type(error).__name__}: {error}")
                    continue
            for position, (i, value) in enumerate(zip(spatial, values, strict=True)):
                step(done * len(spatial) + position, len(inputs) * len(spatial))
                energy = _energy(value, leaf)
                if energy is not None:
                    energies[i] = energies.get(i, 0) + energy
    for i, energy in energies.items():
        sizes[i] = _square(energy, _centre(cells[i], fields[i], energy.shape), share)
    return sizes


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Parameters that ask for no gradient, as long as the block lasts: only that of the image is wanted."""
    wanted = [p for p in model.parameters() if p.requires_grad and not nn.parameter.is_lazy(p)]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def _whole(rows: torch.Tensor) -> torch.Tensor:
    return rows


def _objective(reduce: Reduce, axes: Sequence[str], tell: Callable[[tuple[int, int]], None]) -> Reduce:
    """The rows (1, …) of a tap to the sum of the centre cell's values with random factors: a scalar.

    It is taken in the hook: the tensor may be overwritten a moment later. `tell` gets the (y, x) size of the map.
    """

    def take(rows: torch.Tensor) -> torch.Tensor:
        reduced = reduce(rows)
        length = dict(zip(axes, reduced.shape[1:], strict=True))
        tell((length["y"], length["x"]))
        centre = tuple(length[role] // 2 if role in ("y", "x") else slice(None) for role in axes)
        values = reduced[(slice(None), *centre)]
        generator = torch.Generator().manual_seed(0)
        factors = torch.randn(values.shape, generator=generator).to(values.device, values.dtype)
        return (values * factors).sum()

    return take


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


def _centre(cells: tuple[int, int], field: Field | None, size: Sequence[int]) -> tuple[float, float]:
    """Where the middle one of (y, x) `cells` stands in an image of `size`; without a field, in proportion."""
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
