"""A comparison of two outputs as a picture: the error of each layer, and how alike they stay."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from fmextract.comparison import Comparison
from fmextract.look import canvas
from fmextract.look.canvas import short


def draw_comparison(found: Comparison, out: str | os.PathLike[str]) -> Path:
    """Draw what `compare` found into `out` (.png, .pdf, .svg); returns the path. Raises MissingExtra, OutputError."""
    rows = found.layers
    places = np.arange(len(rows))
    width = max(7.5, min(22.0, 2.2 + 0.42 * len(rows)))
    figure = canvas.figure(width, 6.6)
    left, wide = 0.95 / width, 1 - 1.2 / width
    title = f"{short(Path(found.b).name, 30)} against {short(Path(found.a).name, 30)}"
    figure.text(left, 0.955, title, color=canvas.INK, size=13, weight="bold")
    words = f"{found.images:,} images"
    figure.text(1 - 0.25 / width, 0.955, words, color=canvas.FAINT, size=10, ha="right")
    upper = canvas.plot_axis(figure, (left, 0.6, wide, 0.27), "Relative L2 error", "share, %")
    median, most = (100 * np.array([getattr(row, name) for row in rows]) for name in ("median_error", "max_error"))
    upper.plot(places, most, "o", color=canvas.ACCENT, markersize=5, label="worst image")
    upper.plot(places, median, "-o", color="#fc8961", markersize=4, label="median image")
    if (median > 0).any():
        upper.set_yscale("log")
        upper.yaxis.set_major_formatter("{x:g}")
        upper.minorticks_off()
    upper.set_xticks([])
    lower = canvas.plot_axis(figure, (left, 0.2, wide, 0.27), "How alike they stay", "similarity")
    lower.plot(places, [row.cosine for row in rows], "-o", color="#4cc9f0", markersize=4, label="cosine")
    lower.plot(places, [row.cka for row in rows], "-o", color="#5ec962", markersize=4, label="linear CKA")
    lower.margins(y=0.15)
    lower.ticklabel_format(axis="y", useOffset=False)
    canvas.name_layers(lower, [row.layer for row in rows])
    upper.set_xlim(lower.get_xlim())
    canvas.legend(upper)
    canvas.legend(lower)
    return canvas.save(figure, out)
