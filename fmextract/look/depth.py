"""What depth does: how sparse, how wide and how alive each layer is. From the run's statistics; reads no maps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fmextract.errors import ConfigError
from fmextract.look import canvas
from fmextract.look.canvas import safe
from fmextract.look.select import select_layers

if TYPE_CHECKING:
    from fmextract.reader import Activations


@dataclass(frozen=True, slots=True)
class LayerDepth:
    """The statistics of a layer over all images and positions, finite values only.

    `zeros` is the share of exact zeros, `mean`, `std`, `min` and `max` are of all values together; `dead` counts the
    channels that are never active (never other than zero) in the whole data set, `constant` those that hold one and
    the same other value everywhere. NaN where a layer has no finite value.
    """

    layer: str
    type: str
    channels: int
    values: int
    zeros: float
    mean: float
    std: float
    min: float
    max: float
    dead: int
    constant: int
    nonfinite: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def depth(acts: Activations, layers: Sequence[str] = ()) -> list[LayerDepth]:
    """One entry a layer in the order of execution; layers without a channel axis have no statistics and are left out.

    `layers` are names or selectors, all if none. Raises ConfigError where no layer has statistics.
    """
    names = [name for name in select_layers(acts, layers or ["**"]) if acts[name].spec.channel_axis is not None]
    if not names:
        raise ConfigError(f"{acts.path}: no statistics: none of these layers has a known channel axis")
    return [_one(acts, name) for name in names]


def _one(acts: Activations, name: str) -> LayerDepth:
    layer = acts[name]
    stats = layer.stats
    count = stats.count.astype(np.float64)
    total = count.sum()
    # A channel without values has NaN for its moments, and no weight.
    weight = count / total if total else np.full_like(count, np.nan)
    zeros, mean, std = (np.where(count > 0, values, 0.0) for values in (stats.zero_fraction, stats.mean, stats.std))
    centre = float(weight @ mean)
    constant = (count > 0) & (stats.min == stats.max)
    dead = constant & (stats.max == 0)
    return LayerDepth(
        layer=name,
        type=layer.module_type,
        channels=len(count),
        values=int(total),
        zeros=float(weight @ zeros),
        mean=centre,
        # The law of total variance: within the channels, and between their means.
        std=float(np.sqrt(weight @ (std**2 + (mean - centre) ** 2))),
        min=float(np.fmin.reduce(stats.min)),
        max=float(np.fmax.reduce(stats.max)),
        dead=int(dead.sum()),
        constant=int(constant.sum() - dead.sum()),
        nonfinite=int(stats.nonfinite.sum()),
    )


def show_depth(
    acts: Activations, out: str | os.PathLike[str], *, layers: Sequence[str] = (), title: str = ""
) -> tuple[Path, list[LayerDepth]]:
    """Draw `depth` into `out` (.png, .pdf, .svg): zeros and dead channels above, mean and spread below.

    Raises ConfigError, MissingExtra without matplotlib.
    """
    rows = depth(acts, layers)
    places = np.arange(len(rows))
    width = max(7.5, min(22.0, 2.2 + 0.42 * len(rows)))
    figure = canvas.figure(width, 6.6)
    left, wide = 0.85 / width, 1 - 1.1 / width
    figure.text(left, 0.955, safe(title or acts.attrs.get("model", "")), color=canvas.INK, size=13, weight="bold")
    upper = canvas.plot_axis(figure, (left, 0.6, wide, 0.27), "Zeros, and channels that are never active", "share, %")
    upper.bar(places, [100 * row.zeros for row in rows], 0.62, color="#4cc9f0", label="zeros")
    dead = [100 * row.dead / row.channels for row in rows]
    upper.plot(places, dead, "o", color=canvas.ACCENT, markersize=5, label="dead channels")
    upper.set_ylim(0, 100)
    upper.set_xticks([])
    canvas.legend(upper)
    lower = canvas.plot_axis(figure, (left, 0.2, wide, 0.27), "Mean and spread of the values", "value")
    mean, std = (np.array([getattr(row, name) for row in rows]) for name in ("mean", "std"))
    lower.fill_between(places, mean - std, mean + std, color="#b5367a", alpha=0.35, lw=0, label="± one std")
    lower.plot(places, mean, "-o", color="#fc8961", markersize=4, label="mean")
    canvas.name_layers(lower, [row.layer for row in rows])
    upper.set_xlim(lower.get_xlim())
    canvas.legend(lower)
    return canvas.save(figure, out), rows
