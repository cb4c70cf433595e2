"""Measure and draw what depth does: how sparse, wide, alive and high-dimensional each layer is. Reads no maps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fmextract.common.folders import local_name
from fmextract.errors import ConfigError
from fmextract.reading.select import select_layers
from fmextract.storage.layer_stats import NEAR_ZERO
from fmextract.visual import canvas
from fmextract.visual.canvas import Style, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fmextract.reading.activations import Activations


@dataclass(frozen=True, slots=True)
class LayerDepth:
    """The statistics of a layer over all images and positions, finite values only.

    `zeros` is the share of exact zeros, `near_zeros` that of values of at most `near_zero_below` either side of zero,
    zeros among them; `mean`, `std`, `min` and `max` are of all values together; `dead` counts the channels that are
    never active (never other than zero) in the whole data set, `constant` those that hold one and the same other value
    everywhere. NaN where a layer has no finite value.

    `effective_dimension` (see `storage.layer_stats`) is over `effective_dimension_rows` images, and at most one less;
    `effective_dimension_estimated` for more than 1,024 channels. NaN where images do not differ. What files of earlier
    versions do not hold is None.
    """

    layer: str
    type: str
    channels: int
    values: int
    zeros: float
    near_zeros: float | None
    near_zero_below: float | None
    mean: float
    std: float
    min: float
    max: float
    dead: int
    constant: int
    nonfinite: int
    effective_dimension: float | None
    effective_dimension_rows: int | None
    effective_dimension_estimated: bool | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_depth(acts: Activations, layers: Sequence[str] = ()) -> list[LayerDepth]:
    """Return one entry per layer in the order of execution; layers without a channel axis have no statistics.

    `layers` are names or selectors, all if none. Raises ConfigError where no layer has statistics.
    """
    names = [name for name in select_layers(acts, layers or acts.layers) if acts[name].spec.channel_axis is not None]
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

    def overall(values: npt.NDArray[Any]) -> float:
        return float(weight @ np.where(count > 0, values, 0.0))

    mean, std = (np.where(count > 0, values, 0.0) for values in (stats.mean, stats.std))
    dimension = layer.effective_dimension
    centre = float(weight @ mean)
    constant = (count > 0) & (stats.min == stats.max)
    dead = constant & (stats.max == 0)
    return LayerDepth(
        layer=name,
        type=layer.module_type,
        channels=len(count),
        values=int(total),
        zeros=overall(stats.zero_fraction),
        near_zeros=overall(stats.near_zero_fraction) if NEAR_ZERO in stats.names else None,
        near_zero_below=layer.spec.near_zero_below,
        mean=centre,
        # The law of total variance: within the channels, and between their means.
        std=float(np.sqrt(weight @ (std**2 + (mean - centre) ** 2))),
        min=float(np.fmin.reduce(stats.min)),
        max=float(np.fmax.reduce(stats.max)),
        dead=int(dead.sum()),
        constant=int(constant.sum() - dead.sum()),
        nonfinite=int(stats.nonfinite.sum()),
        effective_dimension=None if dimension is None else dimension.value,
        effective_dimension_rows=None if dimension is None else dimension.rows,
        effective_dimension_estimated=None if dimension is None else dimension.estimated,
    )


@styled
def show_depth(
    acts: Activations,
    out: str | os.PathLike[str],
    *,
    layers: Sequence[str] = (),
    title: str = "",
    style: Style = canvas.PLAIN,
) -> tuple[Path, list[LayerDepth]]:
    """Draw `depth` into `out` (.png, .pdf, .svg): zeros and dead channels, effective dimension, mean and spread.

    Raises ConfigError, MissingExtra without matplotlib.
    """
    rows = measure_depth(acts, layers)
    width = max(7.5, min(22.0, 2.2 + 0.42 * len(rows)))
    panel, between = 1.84, 0.74
    ticks = [canvas.tick_name(row.layer, acts[row.layer].numbers) for row in rows]
    names = canvas.room_for_names(ticks)
    height = 0.85 + 3 * panel + 2 * between + names
    figure = canvas.figure(width, height)
    left, wide = 0.85 / width, 1 - 1.1 / width
    canvas.heading(figure, title or local_name(acts.attrs.get("model", "")), "", (0.85, width - 0.25, 0.25))
    bottoms = [names + i * (panel + between) for i in (2, 1, 0)]
    boxes = [(left, bottom / height, wide, panel / height) for bottom in bottoms]
    upper = canvas.plot_axis(figure, boxes[0], "Zeros and dead channels", "share, %")
    middle = canvas.plot_axis(figure, boxes[1], "Effective dimension", "dimensions")
    lower = canvas.plot_axis(figure, boxes[2], "Mean and spread of the values", "value")
    _draw_zeros(upper, rows)
    _draw_dimension(middle, rows)
    _draw_values(lower, rows)
    canvas.name_layers(lower, ticks)
    for axis in (upper, middle):
        axis.set_xticks([])
        axis.set_xlim(lower.get_xlim())
    return canvas.save(figure, out), rows


def _draw_zeros(axis: Axes, rows: Sequence[LayerDepth]) -> None:
    places, zeros = range(len(rows)), [100 * row.zeros for row in rows]
    axis.bar(places, zeros, 0.62, color=canvas.theme().blue, label="zeros")
    if any(row.near_zeros is not None for row in rows):
        near = [100 * (row.near_zeros or row.zeros) - exact for row, exact in zip(rows, zeros, strict=True)]
        axis.bar(places, near, 0.62, bottom=zeros, color=canvas.theme().pale, label="near zeros")
    dead = [100 * row.dead / row.channels for row in rows]
    axis.plot(places, dead, "o", color=canvas.theme().accent, markersize=5, clip_on=False, label="dead channels")
    axis.set_ylim(0, 100)
    canvas.legend(axis)


def _draw_dimension(axis: Axes, rows: Sequence[LayerDepth]) -> None:
    found = np.array([np.nan if row.effective_dimension is None else row.effective_dimension for row in rows])
    if not np.isfinite(found).any():
        kept = any(row.effective_dimension is not None for row in rows)
        words = "none: it takes several images that differ" if kept else "not kept by this run"
        axis.text(0.5, 0.5, words, transform=axis.transAxes, color=canvas.theme().faint, ha="center")
        axis.set_yticks([])
        return
    axis.plot(range(len(rows)), found, "-o", color=canvas.theme().green, markersize=4, label="participation ratio")
    # So few images or channels cannot give more: near these marks the dimension says little of the network.
    most = np.array([min(row.channels, (row.effective_dimension_rows or 1) - 1) for row in rows])
    top = 1.2 * np.nanmax(found)
    most = np.where(np.isfinite(found), most, np.nan)
    if np.nanmin(most) <= top:
        axis.plot(range(len(rows)), most, "_", color=canvas.theme().faint, markersize=9, label="no more is possible")
    axis.set_ylim(0, top)
    canvas.legend(axis)


def _draw_values(axis: Axes, rows: Sequence[LayerDepth]) -> None:
    places = np.arange(len(rows))
    mean, std = (np.array([getattr(row, name) for row in rows]) for name in ("mean", "std"))
    axis.fill_between(places, mean - std, mean + std, color=canvas.theme().purple, alpha=0.35, lw=0, label="± one std")
    axis.plot(places, mean, "-o", color=canvas.theme().orange, markersize=4, label="mean")
    canvas.legend(axis)
