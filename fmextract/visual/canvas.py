"""Provide what all pictures share: a figure without pyplot, colours, text that is safe to print, and how to save."""

from __future__ import annotations

import contextlib
import difflib
import functools
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import PIL.Image

from fmextract.common.text import printable
from fmextract.errors import ConfigError, MissingExtra, OutputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

Array = npt.NDArray[Any]

GREYS = "gray"
CELL, GAP = 112, 5
"""Pixels of one tile's side in a mosaic, and between two of them."""
MOST_NAMES = 45
"""Names of layers that fit side by side."""
SLANTED = 24
"""With more than these, names are written slanting."""
SMALLEST_NAMED = 0.25
"""Inches of a tile's side, below which its number would cover it."""
FONTS = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans JP", "Noto Sans SC", "Noto Sans TC", "Noto Sans KR",
    "Droid Sans Fallback", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "IPAexGothic", "Hiragino Sans", "PingFang SC",
    "Apple SD Gothic Neo", "Yu Gothic", "Meiryo", "Microsoft YaHei", "Malgun Gothic", "Arial Unicode MS",
    "Noto Sans Devanagari", "Noto Sans Thai", "Nirmala UI", "Leelawadee UI",
)  # fmt: skip
"""Fonts with letters that matplotlib's own, DejaVu Sans, lacks: those that are installed are used for them."""
FORMATS = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True, slots=True)
class Theme:
    """The colours of a picture. `box` is that of boxes on photos, `palette` of things that stand side by side.

    `halo` stands out from all of the palette.
    """

    background: str
    ink: str
    faint: str
    line: str
    accent: str
    blue: str
    pale: str
    orange: str
    green: str
    purple: str
    palette: tuple[str, ...]
    halo: str
    box: str = "#ffd166"


THEMES = {
    "dark": Theme(
        background="#16161d",
        ink="#e8e6e3",
        faint="#9a98a0",
        line="#33333d",
        accent="#ffd166",
        blue="#4cc9f0",
        pale="#3f7f9e",
        orange="#fc8961",
        green="#5ec962",
        purple="#b5367a",
        palette=("#ffd166", "#5ec962", "#4cc9f0", "#f72585", "#ff8c42", "#b8a1ff", "#f1f5f9", "#06d6a0"),
        halo="black",
    ),
    "light": Theme(
        background="#ffffff",
        ink="#17171c",
        faint="#5d5b66",
        line="#dedee4",
        accent="#a65500",
        blue="#0072b2",
        pale="#8cc3e0",
        orange="#c8442d",
        green="#1f8a3b",
        purple="#b5367a",
        palette=("#a65500", "#1f8a3b", "#0072b2", "#c2185b", "#d9541e", "#6a4fc9", "#44484f", "#00806a"),
        halo="white",
    ),
}


@dataclass(frozen=True, slots=True)
class Style:
    """How a picture is drawn: on a dark or a light ground, with so many pixels per inch, in which colours.

    `cmap` is the name of one of matplotlib's colour maps for values; without it magma for maps, in which equal steps
    of the value look like equal steps, and grey for kernels. Raises ConfigError for what there is not.
    """

    theme: str = "dark"
    dpi: int = 150
    cmap: str | None = None

    def __post_init__(self) -> None:
        if self.theme not in THEMES:
            raise ConfigError(f"--theme {self.theme!r}: expected {' or '.join(THEMES)}")
        if not 10 <= self.dpi <= 2400:
            raise ConfigError(f"--dpi {self.dpi}: expected 10 to 2400 pixels an inch")
        if self.cmap is not None:
            _check_colour_map(self.cmap)


def _check_colour_map(name: str) -> None:
    colormaps = _matplotlib().colormaps
    if name not in colormaps:
        close = difflib.get_close_matches(name, list(colormaps), n=3) or ["magma", "viridis", "gray"]
        raise ConfigError(f"--cmap {name!r}: matplotlib has no such colour map; the closest: {', '.join(close)}")


PLAIN = Style()
_style: ContextVar[Style] = ContextVar("style", default=PLAIN)
_Draws = TypeVar("_Draws", bound=Callable[..., Any])


def styled(draw: _Draws) -> _Draws:
    """Wrap a function that draws: its keyword `style` holds for all that it draws."""

    @functools.wraps(draw)
    def drawn(*args: Any, **named: Any) -> Any:
        before = _style.set(named.get("style", PLAIN))
        try:
            with _letters():
                return draw(*args, **named)
        finally:
            _style.reset(before)

    return drawn  # type: ignore[return-value]


@contextlib.contextmanager
def _letters() -> Iterator[None]:
    """Set fonts for all that measures or draws text: keys may hold any letter; one without a font shows as a box."""
    settings = {
        "font.family": ["DejaVu Sans", *_installed_fonts()],
        # Letters in a PDF are those of a font, not drawings of them: publishers want that.
        "pdf.fonttype": 42,
    }
    finding = logging.getLogger("matplotlib.font_manager")  # which reports every font that has no bold letters
    level = finding.level
    finding.setLevel(logging.ERROR)
    try:
        with _matplotlib().rc_context(settings), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            yield
    finally:
        finding.setLevel(level)


@functools.cache
def _installed_fonts() -> tuple[str, ...]:
    from matplotlib.font_manager import fontManager

    there = {font.name for font in fontManager.ttflist}
    return tuple(name for name in FONTS if name in there)


def theme() -> Theme:
    """Return the colours of the picture that is being drawn."""
    return THEMES[_style.get().theme]


def colour_map(otherwise: str = "magma") -> str:
    """Return the name of the colour map for values that was asked for."""
    return _style.get().cmap or otherwise


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtra("matplotlib", "look", "drawing pictures") from error
    return matplotlib


def figure(width: float, height: float) -> Figure:
    """Create a figure of so many inches without pyplot: no window, no global state, safe in a thread."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("matplotlib", "look", "drawing pictures") from error
    made = Figure(figsize=(width, height), facecolor=theme().background)
    FigureCanvasAgg(made)
    return made


def check_name(out: str | os.PathLike[str]) -> Path:
    """Return the name of a picture. Raises OutputError for a suffix that is no format, MissingExtra."""
    path = Path(out)
    _matplotlib()
    if path.suffix.lower() not in FORMATS:
        raise OutputError(f"{path}: a picture's name ends in one of {', '.join(FORMATS)}")
    return path


def save(made: Figure, out: str | os.PathLike[str]) -> Path:
    """Write a figure; the suffix of `out` says in which format. Raises OutputError."""
    path = check_name(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _letters():
            made.savefig(path, dpi=_style.get().dpi, facecolor=theme().background)
    except (FileExistsError, NotADirectoryError) as error:
        raise OutputError(f"cannot write {path}: {path.parent} is not a folder, or lies in a file") from error
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def file_name(number: int, name: str, kind: str = "png") -> str:
    """Return a file for the picture of a layer: sorted like the layers, with no letter that a file system refuses."""
    plain = "".join(c if c.isalnum() or c in "._-#=" else "_" for c in name)
    return f"{number:02d}_{plain[:100]}.{kind}"


def safe(text: object) -> str:
    """Return `text` on one line, without formulas."""
    return printable(text).replace("$", r"\$")


def cut(text: object, most: int) -> str:
    """Return `text` on one line, cut in the middle to `most` letters."""
    name = printable(text)
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-(most // 2) :]}"


def short(text: object, most: int = 24) -> str:
    """Return `safe(text)`, cut in the middle to `most` letters."""
    return safe(cut(text, most))


def value_range(values: Array) -> tuple[float, float]:
    """Return the lowest and highest finite value, (0, 0) where there is none."""
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def paint(values: Array, low: float, high: float, colours: str = "magma") -> Array:
    """Paint values (y, x) as pixels uint8 (y, x, 3), `low` to `high` from dark to bright, with holes where not finite.

    `colours` where the style names none.
    """
    table = _matplotlib().colormaps[colour_map(colours)].with_extremes(bad=theme().background)
    scaled = np.ma.masked_invalid((np.asarray(values, np.float64) - low) / ((high - low) or 1))
    return np.ascontiguousarray(table(scaled, bytes=True)[..., :3])


def mosaic(tiles: Sequence[Array], columns: int, cell: tuple[int, int] = (CELL, CELL), gap: int = GAP) -> Array:
    """Put tiles uint8 (y, x, 3) together as the cells of one picture: far quicker than a plot for each of them.

    `cell` is (height, width) of each in pixels; tiles are enlarged without smoothing, so that a value stays a square.
    """
    lines = math.ceil(len(tiles) / columns)
    height, width = cell
    size = columns * (width + gap) - gap, lines * (height + gap) - gap
    picture = PIL.Image.new("RGB", size, theme().background)
    for i, tile in enumerate(tiles):
        line, column = divmod(i, columns)
        enlarged = PIL.Image.fromarray(tile).resize((width, height), PIL.Image.Resampling.NEAREST)
        picture.paste(enlarged, (column * (width + gap), line * (height + gap)))
    return np.asarray(picture)


def cell_like(size: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of a tile with the proportions of `size`, the longer side CELL."""
    scale = CELL / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def show_tiles(
    axis: Axes, tiles: Sequence[Array], names: Sequence[str], columns: int, cell: tuple[int, int] = (CELL, CELL)
) -> None:
    """Show a mosaic on an axis, each tile with its name in a corner if the tile is large enough."""
    from matplotlib.patheffects import withStroke

    axis.imshow(mosaic(tiles, columns, cell), interpolation="none")
    axis.set_axis_off()
    outlined = [withStroke(linewidth=1.2, foreground="black")]
    root: Any = axis.get_figure(root=True)
    inches = axis.get_window_extent().width / root.dpi / columns
    for i, name in enumerate(names if inches >= SMALLEST_NAMED else ()):
        line, column = divmod(i, columns)
        x, y = column * (cell[1] + GAP) + 5, (line + 1) * (cell[0] + GAP) - GAP - 6
        axis.text(x, y, safe(name), color="white", size=min(9.0, 3 + 9 * inches), path_effects=outlined)


def colour_bar(axis: Axes, low: float, high: float, label: str, colours: str = "magma", words: bool = False) -> None:
    """Draw a bar on an axis of its own that says what dark and bright mean; `words`: each tile has its own range."""
    axis.imshow(np.linspace(1, 0, 256)[:, None], cmap=colour_map(colours), aspect="auto", extent=(0, 1, 0, 1))
    middle = [] if low < 0 < high else [(0.5, "")]
    if low < 0 < high:
        middle = [(-low / (high - low), "0")]
    ends = [(0.0, "lowest" if words else f"{low:.3g}"), (1.0, "highest" if words else f"{high:.3g}")]
    marks = ends + [mark for mark in middle if mark[1] and not words]
    axis.set_yticks([at for at, _ in marks], [text for _, text in marks], color=theme().faint, size=8)
    axis.set_xticks([])
    axis.yaxis.tick_right()
    axis.tick_params(length=2, color=theme().faint)
    axis.set_title(safe(label), color=theme().faint, size=8, pad=6, loc="left")
    for side in axis.spines.values():
        side.set_color(theme().line)


def heading(made: Figure, title: str, detail: str, place: tuple[float, float, float] | None = None) -> None:
    """Write what a picture shows, and at the right, fainter, a remark. The two never run into each other.

    `place` is the left end, the right end and the distance from above, in inches. A title that is too long is made
    smaller, and then cut in its middle.
    """
    width, height = made.get_size_inches()
    left, right, above = place or (0.15, width - 0.15, 0.35)
    line: dict[str, Any] = {"y": 1 - above / height, "va": "center"}
    small = made.text(x=right / width, s=safe(detail), color=theme().faint, size=10, ha="right", **line)
    room = right - left - (_inches(small) + 0.2 if detail else 0)
    large = made.text(x=left / width, s=safe(title), color=theme().ink, size=14, weight="bold", **line)
    if _inches(large) > room:
        large.set_fontsize(max(10.0, 14 * room / _inches(large)))
    letters = len(title)
    while _inches(large) > room and letters > 8:
        letters -= 1
        large.set_text(short(title, letters))


def _inches(text: Text) -> float:
    """Return the width of a figure's text."""
    root: Any = text.get_figure(root=True)
    return float(text.get_window_extent().width) / float(root.dpi)


def plot_axis(made: Figure, box: tuple[float, float, float, float], title: str, ylabel: str = "") -> Axes:
    """Add an axis for curves: no frame, faint lines."""
    axis: Axes = made.add_axes(box, facecolor=theme().background)
    axis.set_title(safe(title), color=theme().ink, size=11, loc="left", weight="bold")
    axis.set_ylabel(ylabel, color=theme().faint, size=9)
    axis.grid(axis="y", color=theme().line, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=theme().faint, labelsize=8.5, length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    return axis


def room_for_names(names: Sequence[str]) -> float:
    """Return the inches that `name_layers` takes below a plot."""
    letters = max((len(line) for name in names for line in name.splitlines()), default=0)
    return 0.25 + 0.075 * letters * (0.7 if len(names) <= SLANTED else 1.0)


def tick_name(layer: str, numbers: Sequence[str] = ()) -> str:
    """Return the name of a layer for below a plot, its numbers in a second line."""
    return "\n".join([short(layer, 24), *([" ".join(numbers)] if numbers else [])])


def name_layers(axis: Axes, layers: Sequence[str]) -> None:
    """Write the `tick_name` of each layer along the lower edge of a plot; of many layers, every second or third."""
    every = -(-len(layers) // MOST_NAMES)
    names = layers[::every]
    slant: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    axis.set_xticks(range(0, len(layers), every), names, **(slant if len(layers) <= SLANTED else {"rotation": 90}))
    axis.set_xlim(-0.6, len(layers) - 0.4)


def legend(axis: Axes) -> None:
    """Put the legend above the plot at its right, beside the title, where it covers no curve."""
    place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "ncols": 3, "borderaxespad": 0.2}
    axis.legend(frameon=False, fontsize=8.5, labelcolor=theme().faint, **place)
