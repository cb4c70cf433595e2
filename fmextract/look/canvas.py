"""What all pictures share: a figure without pyplot, colours, text that is safe to print, and how they are saved."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import PIL.Image

from fmextract.errors import MissingExtra, OutputError
from fmextract.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]

BACKGROUND = "#16161d"
INK = "#e8e6e3"
FAINT = "#9a98a0"
ACCENT = "#ffd166"
COLOURS = "magma"
"""From dark, low, to bright, high; equal steps of the value look like equal steps."""
GREYS = "gray"
CELL, GAP = 112, 5
"""Pixels of one tile's side in a mosaic, and between two of them."""
MOST_NAMES = 45
"""Names of layers that can be read side by side."""
FORMATS = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp")


def figure(width: float, height: float) -> Figure:
    """A figure of so many inches without pyplot: no window, no global state, safe in a thread."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("matplotlib", "look", "drawing pictures") from error
    made = Figure(figsize=(width, height), facecolor=BACKGROUND)
    FigureCanvasAgg(made)
    return made


def save(made: Figure, out: str | os.PathLike[str], dpi: int = 150) -> Path:
    """Write a figure; the suffix of `out` says in which format. Raises OutputError."""
    path = Path(out)
    if path.suffix.lower() not in FORMATS:
        raise OutputError(f"{path}: a picture's name ends in one of {', '.join(FORMATS)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():  # a key may hold letters that the font has not: it shows a box for each
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            made.savefig(path, dpi=dpi, facecolor=BACKGROUND)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def file_name(number: int, name: str) -> str:
    """A file for the picture of a layer: sorted like the layers, with no letter that a file system refuses."""
    plain = "".join(c if c.isalnum() or c in "._-#=" else "_" for c in name)
    return f"{number:02d}_{plain[:100]}.png"


def safe(text: object) -> str:
    """`text` on one line, and no part of it taken for a formula."""
    return printable(text).replace("$", r"\$")


def short(text: object, most: int = 24) -> str:
    """`safe`, cut in the middle to `most` letters."""
    name = printable(text)
    return safe(name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-(most // 2) :]}")


def value_range(values: Array) -> tuple[float, float]:
    """Lowest and highest finite value, (0, 0) where there is none."""
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def paint(values: Array, low: float, high: float, colours: str = COLOURS) -> Array:
    """Values (y, x) as pixels uint8 (y, x, 3), `low` to `high` from dark to bright; holes where they are not finite."""
    import matplotlib

    table = matplotlib.colormaps[colours].with_extremes(bad=BACKGROUND)
    scaled = np.ma.masked_invalid((np.asarray(values, np.float64) - low) / ((high - low) or 1))
    return np.ascontiguousarray(table(scaled, bytes=True)[..., :3])


def mosaic(tiles: Sequence[Array], columns: int, cell: tuple[int, int] = (CELL, CELL), gap: int = GAP) -> Array:
    """Tiles uint8 (y, x, 3) as the cells of one picture: far quicker than a plot for each of them.

    `cell` is (height, width) of each in pixels; tiles are enlarged without smoothing, so that a value stays a square.
    """
    lines = math.ceil(len(tiles) / columns)
    height, width = cell
    size = columns * (width + gap) - gap, lines * (height + gap) - gap
    picture = PIL.Image.new("RGB", size, BACKGROUND)
    for i, tile in enumerate(tiles):
        line, column = divmod(i, columns)
        enlarged = PIL.Image.fromarray(tile).resize((width, height), PIL.Image.Resampling.NEAREST)
        picture.paste(enlarged, (column * (width + gap), line * (height + gap)))
    return np.asarray(picture)


def cell_like(size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a tile with the proportions of `size`, the longer side CELL."""
    scale = CELL / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def show_tiles(
    axis: Axes, tiles: Sequence[Array], names: Sequence[str], columns: int, cell: tuple[int, int] = (CELL, CELL)
) -> None:
    """A mosaic on an axis, each tile with its name in a corner."""
    from matplotlib.patheffects import withStroke

    axis.imshow(mosaic(tiles, columns, cell), interpolation="none")
    axis.set_axis_off()
    outlined = [withStroke(linewidth=1.2, foreground="black")]
    root: Any = axis.get_figure(root=True)
    inches = axis.get_position().width * root.get_figwidth() / columns
    for i, name in enumerate(names):
        line, column = divmod(i, columns)
        x, y = column * (cell[1] + GAP) + 5, (line + 1) * (cell[0] + GAP) - GAP - 6
        axis.text(x, y, safe(name), color="white", size=min(9.0, 3 + 4 * inches), path_effects=outlined)


def colour_bar(axis: Axes, low: float, high: float, label: str, colours: str = COLOURS, words: bool = False) -> None:
    """A bar on an axis of its own that says what dark and bright mean; `words`: each tile has its own range."""
    axis.imshow(np.linspace(1, 0, 256)[:, None], cmap=colours, aspect="auto", extent=(0, 1, 0, 1))
    middle = [] if low < 0 < high else [(0.5, "")]
    if low < 0 < high:
        middle = [(-low / (high - low), "0")]
    ends = [(0.0, "lowest" if words else f"{low:.3g}"), (1.0, "highest" if words else f"{high:.3g}")]
    marks = ends + [mark for mark in middle if mark[1] and not words]
    axis.set_yticks([at for at, _ in marks], [text for _, text in marks], color=FAINT, size=8)
    axis.set_xticks([])
    axis.yaxis.tick_right()
    axis.tick_params(length=2, color=FAINT)
    axis.set_title(safe(label), color=FAINT, size=8, pad=6, loc="left")
    for side in axis.spines.values():
        side.set_visible(False)


def plot_axis(made: Figure, box: tuple[float, float, float, float], title: str, ylabel: str = "") -> Axes:
    """An axis for curves on the dark background: no frame, faint lines."""
    axis: Axes = made.add_axes(box, facecolor=BACKGROUND)
    axis.set_title(safe(title), color=INK, size=11, loc="left", weight="bold")
    axis.set_ylabel(ylabel, color=FAINT, size=9)
    axis.grid(axis="y", color="#33333d", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=FAINT, labelsize=8.5, length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    return axis


def name_layers(axis: Axes, layers: Sequence[str]) -> None:
    """Layers along the lower edge of a plot; of many, every second or third is named."""
    every = -(-len(layers) // MOST_NAMES)
    names = [short(layer, 18) for layer in layers[::every]]
    slant: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    axis.set_xticks(range(0, len(layers), every), names, **(slant if len(layers) <= 24 else {"rotation": 90}))
    axis.set_xlim(-0.6, len(layers) - 0.4)


def legend(axis: Axes) -> None:
    """Above the plot at its right, beside the title: on no curve."""
    place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "ncols": 3, "borderaxespad": 0.2}
    axis.legend(frameon=False, fontsize=8.5, labelcolor=FAINT, **place)
