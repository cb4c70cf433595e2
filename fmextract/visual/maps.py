"""Draw a photo beside the feature maps that a network made of it, layer by layer."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image

from fmextract.common.folders import local_name
from fmextract.common.text import count, seen, shape
from fmextract.errors import ConfigError
from fmextract.reading.select import select_layers
from fmextract.visual import canvas
from fmextract.visual.canvas import Array, Style, safe, short, styled
from fmextract.visual.photos import as_seen, check_traceable, load_photo
from fmextract.visual.places import Grid, Maps, pick_channels, read_maps

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

    from fmextract.reading.activations import Activations
    from fmextract.reading.layer import Layer

PANEL = 3.2
"""Inches of one panel's side."""
SCALES = ("each", "shared")
MOST_STRIPS = 4
"""Room for so many tokens that are no patches: all of the usual networks'."""


@dataclass(frozen=True, slots=True)
class MapPicture:
    """One layer of one image as it was drawn: the numbers of its channels, their maps (n, y, x), and their ranges."""

    picture: Path
    layer: str
    key: str
    channels: tuple[int, ...]
    values: Array = field(repr=False)
    ranges: tuple[tuple[float, float], ...]

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON, without the values."""
        return {
            "picture": str(self.picture),
            "layer": self.layer,
            "key": self.key,
            "shape": list(self.values.shape[1:]),
            "channels": [
                {"channel": number, "low": low, "high": high}
                for number, (low, high) in zip(self.channels, self.ranges, strict=True)
            ],
        }


@styled
def show_maps(
    acts: Activations,
    image: str,
    out: str | os.PathLike[str],
    *,
    layers: Sequence[str] = (),
    images: str | os.PathLike[str] | None = None,
    count: int = 16,
    order: str = "strongest",
    channels: Sequence[int] = (),
    scale: str = "each",
    overlay: bool = False,
    format: str | None = None,
    style: Style = canvas.PLAIN,
) -> list[MapPicture]:
    """Draw the maps of the image with the key `image`: one picture per layer into the folder `out`, as `format` (png).

    `layers` are names or selectors, every layer with maps if none. Of each the first `count` channels are shown, those
    that vary most over this photo (`order` first or strongest), or the `channels` given. `scale`: each map has its own
    range, or all of a picture a shared one. `overlay` puts the maps on the photo, each cell where it looks. The photo
    is looked for where the run found it, or in `images`. Tokens are shown on their patch grid, the class token and
    registers apart. Where `out` ends in .png, .pdf or .svg, all layers go into this one picture.

    Raises ConfigError for an unknown image, layer or channel and for a photo that is not there, MissingExtra without
    matplotlib.
    """
    if scale not in SCALES:
        raise ConfigError(f"unknown scale {scale!r}: expected {' or '.join(SCALES)}")
    if overlay:
        check_traceable(acts)
    target = Path(out)
    in_one, kind = _format(target, format)
    row = acts.row(image)
    names = select_layers(acts, layers, with_maps=True)
    shown = [_choose(acts, name, row, count, order, channels, scale) for name in names]
    photo = load_photo(acts, row, images)
    if in_one:
        _draw_overview(acts, shown, as_seen(photo, acts.preprocess), image, target, overlay=overlay)
        return [one.picture(target, image) for one in shown]
    seen = as_seen(photo, acts.preprocess)
    made = []
    for number, one in enumerate(shown):
        path = target / canvas.file_name(number, one.layer.name, kind)
        canvas.save(_draw_one(one, seen, image, scale, overlay), path)
        made.append(one.picture(path, image))
    return made


def _format(target: Path, wanted: str | None) -> tuple[bool, str]:
    """Return whether all layers go into one picture, named `target`, and the format of each. Raises ConfigError."""
    kinds = [suffix.removeprefix(".") for suffix in canvas.FORMATS]
    if wanted is not None and wanted not in kinds:
        raise ConfigError(f"unknown format {wanted!r}: expected {', '.join(kinds)}")
    own = target.suffix.lower().removeprefix(".")
    if own in kinds and wanted not in (None, own):
        raise ConfigError(f"{target} is one picture, whose name says its format: --format {wanted} is for a folder")
    return own in kinds, own if own in kinds else wanted or "png"


@styled
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
    style: Style = canvas.PLAIN,
) -> Path:
    """Write one picture to `out` (.png, .pdf, .svg): a row's photo as the network saw it, then one panel per layer.

    A panel shows the `channels` maps that vary most over this photo, in the order of their numbers, each scaled to
    its own range: dark is its lowest value, bright its highest. Returns the path.

    Raises ConfigError for a layer without maps, MissingExtra without matplotlib.
    """
    shown = [_choose(acts, name, row, channels, "strongest", (), "each") for name in layers]
    seen = as_seen(photo, acts.preprocess)
    return _draw_overview(acts, shown, seen, str(acts.keys[row]), Path(out), columns=columns, title=title)


@dataclass(frozen=True, slots=True)
class _Shown:
    """What is drawn of one layer."""

    layer: Layer
    maps: Maps
    channels: list[int]
    ranges: list[tuple[float, float]]

    @property
    def values(self) -> Array:
        return self.maps.values[self.channels]

    def picture(self, path: Path, key: str) -> MapPicture:
        return MapPicture(path, self.layer.name, key, tuple(self.channels), self.values, tuple(self.ranges))

    def tiles(self, photo: PIL.Image.Image | None) -> list[Array]:
        """Return each map as pixels; over the photo where there is one."""
        plain = zip(self.values, self.ranges, strict=True)
        if photo is None:
            return [canvas.paint(values, *ends) for values, ends in plain]
        return [_laid_over(photo, self.maps.grid, values, ends) for values, ends in plain]


def _choose(
    acts: Activations, name: str, row: int, count: int, order: str, channels: Sequence[int], scale: str
) -> _Shown:
    layer = acts[name]
    maps = read_maps(acts, layer, row)
    numbers = pick_channels(maps, count, order, channels, name)
    together = canvas.value_range(maps.values[numbers])
    ranges = [together if scale == "shared" else canvas.value_range(maps.values[i]) for i in numbers]
    return _Shown(layer, maps, numbers, ranges)


def _laid_over(photo: PIL.Image.Image, grid: Grid, values: Array, ends: tuple[float, float]) -> Array:
    """Return a map on the photo, each cell where it looks: the stronger, the less of the photo shows through."""
    size = canvas.cell_like((photo.height, photo.width))
    low, high = ends
    strength = np.clip((grid.over_input(np.nan_to_num(values, nan=low), size) - low) / ((high - low) or 1), 0, 1)
    grey = np.asarray(photo.convert("L").convert("RGB").resize((size[1], size[0])), np.float64)
    opacity = 0.15 + 0.6 * strength[..., None]
    mixed: Array = np.rint(grey * (1 - opacity) + canvas.paint(strength, 0, 1) * opacity).astype(np.uint8)
    return mixed


def describe_field(layer: Layer) -> str:
    """Return `64×56×56 · sees 91×91 px`, with the effective field where it is known."""
    words = [*layer.numbers, shape(layer.shape[1:])]
    field = layer.field
    if field is not None:
        words.append(f"sees {seen(field)}")
    if (side := layer.attrs.get("erf_size")) is not None:
        words.append(f"uses {float(np.max(side)):.0f} px")
    return "  ·  ".join(words)


# ---------------------------------------------------------------------------------------------------- one layer


def _draw_one(shown: _Shown, photo: PIL.Image.Image, key: str, scale: str, overlay: bool) -> Figure:
    figure = canvas.figure(11.2, 5.9)
    canvas.heading(figure, shown.layer.name, describe_field(shown.layer), (0.34, 10.7, 0.325))
    axis = figure.add_axes((0.03, 0.15, 0.40, 0.75), anchor="NW")
    axis.imshow(np.asarray(photo), interpolation="lanczos")
    axis.set_axis_off()
    words = f"{short(local_name(key), 40)}   {photo.height}×{photo.width}"
    figure.text(0.03, 0.115, words, color=canvas.theme().faint, size=9.5)
    if holes := int(np.isnan(shown.values).sum()):
        words = f"{count(holes, 'value')} not finite, {'as if lowest' if overlay else 'left blank'}"
        figure.text(0.915, 0.012, words, color=canvas.theme().faint, size=8.5, ha="right")
    grid = figure.add_axes((0.455, 0.03, 0.46, 0.87), anchor="NW")
    columns = math.ceil(math.sqrt(len(shown.channels)))
    cell = canvas.cell_like((photo.height, photo.width))
    names = [str(number) for number in shown.channels]
    canvas.show_tiles(grid, shown.tiles(photo if overlay else None), names, columns, cell)
    low, high = shown.ranges[0]
    label = "each map" if scale == "each" else "value"
    canvas.colour_bar(figure.add_axes((0.928, 0.06, 0.012, 0.78)), low, high, label, words=scale == "each")
    for i, (name, values) in enumerate(shown.maps.apart[:MOST_STRIPS]):
        _draw_apart(figure, (0.09, 0.082 - 0.02 * i, 0.34, 0.015), name, values[shown.channels])
    return figure


def _draw_apart(figure: Figure, box: tuple[float, float, float, float], name: str, values: Array) -> None:
    """Draw a token that is no patch: its values in the channels shown, from dark to bright."""
    axis = figure.add_axes(box)
    axis.imshow(canvas.paint(values[None], *canvas.value_range(values)), aspect="auto", interpolation="none")
    axis.set_axis_off()
    figure.text(box[0] - 0.005, box[1] + box[3] / 2, name, color=canvas.theme().faint, size=8, ha="right", va="center")


# ------------------------------------------------------------------------------------------- all layers in one


def _draw_overview(
    acts: Activations,
    shown: Sequence[_Shown],
    photo: PIL.Image.Image,
    key: str,
    out: Path,
    *,
    columns: int = 4,
    title: str = "",
    overlay: bool = False,
) -> Path:
    panels_wanted = len(shown) + 1
    if columns > 2 and panels_wanted % columns and panels_wanted % (columns - 1) == 0:
        columns -= 1  # so that no place stays empty
    rows, columns = math.ceil(panels_wanted / columns), min(columns, panels_wanted)
    figure = canvas.figure(PANEL * columns, PANEL * rows + (0.5 if title else 0))
    top, *panels = _panels(figure, rows, columns, bool(title))
    _caption(top, local_name(key), (), f"input {photo.height}×{photo.width}")
    axis = _picture_axis(top)
    axis.imshow(np.asarray(photo), interpolation="lanczos")
    for panel, one in zip(panels, shown, strict=False):
        _caption(panel, one.layer.name, one.layer.numbers, shape(one.layer.shape[1:]))
        side = math.ceil(math.sqrt(len(one.channels)))
        cell = canvas.cell_like((photo.height, photo.width))
        names = [str(number) for number in one.channels]
        canvas.show_tiles(_picture_axis(panel), one.tiles(photo if overlay else None), names, side, cell)
    if title:
        place = 1 - 0.28 / figure.get_figheight()
        figure.text(0.5, place, safe(title), color=canvas.theme().ink, size=13, ha="center", va="center")
    return canvas.save(figure, out)


def _panels(figure: Figure, rows: int, columns: int, titled: bool) -> list[SubFigure]:
    ratio = [0.5 / PANEL] if titled else []
    grid = figure.add_gridspec(rows + len(ratio), columns, height_ratios=ratio + [1.0] * rows, wspace=0, hspace=0,
                               left=0, right=1, top=1, bottom=0)  # fmt: skip
    panels = [figure.add_subfigure(grid[row + len(ratio), column]) for row in range(rows) for column in range(columns)]
    for panel in panels:
        panel.set_facecolor(canvas.theme().background)
    return panels


def _picture_axis(panel: SubFigure) -> Any:
    axis = panel.add_axes((0.05, 0.02, 0.9, 0.85), anchor="NW")
    axis.set_axis_off()
    return axis


def _caption(panel: SubFigure, name: str, numbers: Sequence[str], detail: str) -> None:
    """Write it at the same place in every panel, so that the grids below line up; the numbers on their own line."""
    title = panel.text(0.05, 0.966, short(name, 20), color=canvas.theme().ink, size=10, weight="bold", va="center")
    panel.text(0.05, 0.9, "  ".join(numbers), color=canvas.theme().faint, size=8.5, va="center")
    small = panel.text(0.95, 0.966, detail, color=canvas.theme().faint, size=8.5, va="center", ha="right")
    room = 0.87 * panel.bbox.width - small.get_window_extent().width
    title.set_fontsize(min(10.0, 10 * room / max(1.0, title.get_window_extent().width)))
