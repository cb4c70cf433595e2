"""A photo beside the feature maps that a network made of it, layer by layer."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import PIL.Image

from fmextract.errors import ConfigError, MissingExtra
from fmextract.text import printable, shape

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

    from fmextract.reader import Activations, Layer

Array = npt.NDArray[Any]

BACKGROUND = "#16161d"
INK = "#e8e6e3"
FAINT = "#9a98a0"
COLOURS = "magma"
PANEL = 3.2
"""Inches of one panel's side."""
CELL, GAP = 112, 5
"""Pixels of one map's side in the mosaic of a layer, and between two of them."""


def draw_maps(
    acts: Activations,
    row: int,
    layers: Sequence[str],
    photo: PIL.Image.Image,
    out: str | os.PathLike[str],
    *,
    channels: int = 16,
    columns: int = 4,
    title: str = "",
) -> Path:
    """Write a picture to `out` (.png, .pdf, .svg): the photo of a row as the network saw it, then a panel a layer.

    A panel shows the `channels` maps that vary most over this photo, in the order of their numbers, each scaled to
    its own range: black is its lowest value, white its highest. Layers need the axes y and x. Returns the path.

    Raises ConfigError for a layer without those axes, MissingExtra without matplotlib.
    """
    maps = [(acts[name], _strongest(acts, name, row, channels)) for name in layers]
    rows = math.ceil((len(maps) + 1) / columns)
    figure = _figure(PANEL * min(columns, len(maps) + 1), PANEL * rows + (0.5 if title else 0))
    top, *panels = _panels(figure, rows, min(columns, len(maps) + 1), bool(title))
    _draw_photo(top, as_seen(photo, acts.preprocess), str(acts.keys[row]))
    for panel, (layer, (numbers, values)) in zip(panels, maps, strict=False):
        _draw_layer(panel, layer, numbers, values)
    if title:
        figure.text(0.5, 1 - 0.28 / figure.get_figheight(), title, color=INK, size=13, ha="center", va="center")
    figure.savefig(out, dpi=150, facecolor=BACKGROUND)
    return Path(out)


def as_seen(photo: PIL.Image.Image, preprocess: Mapping[str, Any]) -> PIL.Image.Image:
    """The part of a photo that became the network's input: resized and cut as the file's `preprocess` says."""
    photo = photo.convert("RGB")
    resize, crop = preprocess.get("resize"), preprocess.get("crop")
    if isinstance(resize, int):
        scale = resize / min(photo.size)
        photo = photo.resize((round(photo.width * scale), round(photo.height * scale)))
    elif resize:
        photo = photo.resize((resize[1], resize[0]))
    if not crop:
        return photo
    left, top = round((photo.width - crop[1]) / 2), round((photo.height - crop[0]) / 2)
    return photo.crop((left, top, left + crop[1], top + crop[0]))


def _strongest(acts: Activations, name: str, row: int, count: int) -> tuple[list[int], Array]:
    """The numbers of the channels that vary most within the maps of a row, ascending, and those maps."""
    axes = acts[name].axes[1:]
    if set(axes) != {"channel", "y", "x"}:
        maps = ", ".join(layer for layer in acts.layers if {"channel", "y", "x"} == set(acts[layer].axes[1:]))
        raise ConfigError(
            f"{name} has the axes ({', '.join(axes)}): no maps to draw. Layers with maps: {maps or 'none'}"
        )
    values = np.array(acts[name][row], dtype=np.float32).transpose([axes.index(axis) for axis in ("channel", "y", "x")])
    values[~np.isfinite(values)] = np.nan  # drawn as holes
    spread = np.nan_to_num(values).std(axis=(1, 2))
    numbers = sorted(np.argsort(-spread, kind="stable")[:count].tolist())
    return numbers, values[numbers]


def _figure(width: float, height: float) -> Figure:
    """A figure without pyplot: no window, no global state, safe in a thread."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("matplotlib", "look", "drawing pictures") from error
    figure = Figure(figsize=(width, height), facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    return figure


def _panels(figure: Figure, rows: int, columns: int, titled: bool) -> list[SubFigure]:
    ratio = [0.5 / PANEL] if titled else []
    grid = figure.add_gridspec(rows + len(ratio), columns, height_ratios=ratio + [1.0] * rows, wspace=0, hspace=0,
                               left=0, right=1, top=1, bottom=0)  # fmt: skip
    panels = [figure.add_subfigure(grid[row + len(ratio), column]) for row in range(rows) for column in range(columns)]
    for panel in panels:
        panel.set_facecolor(BACKGROUND)
    return panels


def _caption(panel: SubFigure, name: str, detail: str) -> None:
    """The same place in every panel, so that the grids below line up."""
    panel.text(0.05, 0.955, name, color=INK, size=10.5, weight="bold", va="center")
    panel.text(0.95, 0.955, detail, color=FAINT, size=8.5, va="center", ha="right")


def _draw_photo(panel: SubFigure, photo: PIL.Image.Image, key: str) -> None:
    _caption(panel, _short(key), f"input {photo.height}×{photo.width}")
    axis = panel.add_axes((0.05, 0.03, 0.9, 0.88))
    axis.imshow(np.asarray(photo), interpolation="lanczos")
    axis.set_axis_off()


def _draw_layer(panel: SubFigure, layer: Layer, numbers: Sequence[int], values: Array) -> None:
    from matplotlib.patheffects import withStroke

    _caption(panel, _short(layer.name), shape(layer.shape[1:]))
    axis = panel.add_axes((0.05, 0.03, 0.9, 0.88))
    side = math.ceil(math.sqrt(len(numbers)))
    axis.imshow(_mosaic(values, side))
    axis.set_axis_off()
    outlined = [withStroke(linewidth=1, foreground="black")]
    for i, number in enumerate(numbers):
        line, column = divmod(i, side)
        x, y = column * (CELL + GAP) + 5, (line + 1) * (CELL + GAP) - GAP - 6
        axis.text(x, y, str(number), color="white", size=4.5, path_effects=outlined)


def _mosaic(values: Array, side: int) -> PIL.Image.Image:
    """The maps as cells of one picture, each scaled to its own range: far quicker than a plot for each of them."""
    import matplotlib

    colours = matplotlib.colormaps[COLOURS].with_extremes(bad=BACKGROUND)
    lines = math.ceil(len(values) / side)
    size = side * (CELL + GAP) - GAP, lines * (CELL + GAP) - GAP
    picture = PIL.Image.new("RGB", size, BACKGROUND)
    for i, one in enumerate(values):
        low, high = _range(one)
        painted = colours((one - low) / ((high - low) or 1), bytes=True)[..., :3]
        line, column = divmod(i, side)
        cell = PIL.Image.fromarray(np.ascontiguousarray(painted)).resize((CELL, CELL), PIL.Image.Resampling.NEAREST)
        picture.paste(cell, (column * (CELL + GAP), line * (CELL + GAP)))
    return picture


def _range(values: Array) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def _short(name: str, most: int = 24) -> str:
    name = printable(name)
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-most // 2 :]}"
