"""Draw a comparison of two outputs: the error of each layer, and how alike they stay."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fmextract.common.text import count
from fmextract.comparison import Comparison
from fmextract.visual import canvas
from fmextract.visual.canvas import Array, Style, cut, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@styled
def draw_comparison(found: Comparison, out: str | os.PathLike[str], *, style: Style = canvas.PLAIN) -> Path:
    """Draw what `compare` found into `out` (.png, .pdf, .svg); returns the path. Raises MissingExtra, OutputError."""
    rows = found.layers
    places = np.arange(len(rows))
    width = max(7.5, min(22.0, 2.2 + 0.42 * len(rows)))
    panel, between = 1.8, 0.8
    ticks = [canvas.tick_name(row.layer) for row in rows]
    names = canvas.room_for_names(ticks)
    height = 0.95 + 2 * panel + between + names
    figure = canvas.figure(width, height)
    left, wide = 0.95 / width, 1 - 1.2 / width
    title = f"{cut(Path(found.b).name, 30)} against {cut(Path(found.a).name, 30)}"
    canvas.heading(figure, title, count(found.images, "image"), (0.95, width - 0.25, 0.25))
    place = (left, (names + panel + between) / height, wide, panel / height)
    upper = canvas.plot_axis(figure, place, "Relative L2 error", "share, %")
    median, most = (100 * np.array([getattr(row, name) for row in rows]) for name in ("median_error", "max_error"))
    upper.plot(places, most, "o", color=canvas.theme().accent, markersize=5, label="worst image")
    upper.plot(places, median, "-o", color=canvas.theme().orange, markersize=4, label="median image")
    _scale_errors(upper, np.concatenate([median, most]))
    upper.set_xticks([])
    lower = canvas.plot_axis(figure, (left, names / height, wide, panel / height), "How alike they stay", "similarity")
    lower.plot(places, [row.cosine for row in rows], "-o", color=canvas.theme().blue, markersize=4, label="cosine")
    cka = np.array([row.cka for row in rows])
    label = "linear CKA" if np.isfinite(cka).any() else "linear CKA: of one image there is none"
    lower.plot(places, cka, "-o", color=canvas.theme().green, markersize=4, label=label)
    lower.margins(y=0.15)
    lower.ticklabel_format(axis="y", useOffset=False)
    canvas.name_layers(lower, ticks)
    upper.set_xlim(lower.get_xlim())
    canvas.legend(upper)
    canvas.legend(lower)
    return canvas.save(figure, out)


def _scale_errors(axis: Axes, errors: Array) -> None:
    """Scale the axis by decades if the errors span some, else evenly, with at least two marks."""
    above = errors[np.isfinite(errors) & (errors > 0)]
    if above.size and above.max() >= 10 * above.min():
        from matplotlib.ticker import LogLocator

        axis.set_yscale("log", nonpositive="mask")
        axis.set_ylim(above.min() / 1.6, above.max() * 1.6)
        close = above.max() < 1000 * above.min()
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if close else (1.0,), numticks=12))
        axis.minorticks_off()
    elif above.size:
        axis.margins(y=0.2)
    else:
        axis.set_ylim(-0.05, 1)
    axis.yaxis.set_major_formatter("{x:g}")
