"""Draw the images that drive a channel hardest, and the part of each that did it, from what the run recorded."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image

from fmextract.common.boxes import Box, photo_box
from fmextract.common.folders import local_name
from fmextract.common.text import count
from fmextract.errors import ConfigError
from fmextract.reading.select import has_maps
from fmextract.visual import canvas
from fmextract.visual.canvas import Style, short, styled
from fmextract.visual.photos import Listing, as_seen, load_photo
from fmextract.visual.places import Grid, Region, grid_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fmextract.reading.activations import Activations
    from fmextract.reading.layer import Layer

ACROSS = 5
"""Images side by side in one picture."""
KINDS = {
    "effective": "box: 90 % of what the cell uses",
    "theoretical": "box: all that the cell can see",
    "cell": "box: the cell's own part of the image",
}


@dataclass(frozen=True, slots=True)
class Example:
    """One of the strongest images of a channel.

    `cell` is (y, x) in the map, None where there is none (features, a class token). `region` is what the cell looks at,
    in pixels of the network's input, `photo_box` (y0, x0, y1, x1) that part of the photo.
    """

    channel: int
    row: int
    key: str
    value: float
    cell: tuple[int, int] | None
    region: Region | None
    photo_box: Box | None

    def as_json(self) -> dict[str, Any]:
        region = self.region
        return {
            "channel": self.channel,
            "row": self.row,
            "key": self.key,
            "value": self.value,
            "cell": self.cell,
            "box": region and region.box,
            "box_kind": region and region.kind,
            "theoretical_box": region and region.theoretical,
            "photo_box": self.photo_box,
        }


def strongest(acts: Activations, layer: str, channel: int, k: int = 9) -> list[Example]:
    """Return the `k` images with the highest values in a channel, strongest first: as many as the run kept (--top-k).

    Over all shards, from what the run recorded. Raises ConfigError for an unknown layer or channel.
    """
    one = acts[layer]
    try:
        found = one.top(channel, k)
    except IndexError as error:
        raise ConfigError(str(error)) from None
    grid = _grid(acts, one)
    places = zip(one.stats.top_y[channel].tolist(), one.stats.top_x[channel].tolist(), strict=True)
    made = []
    for top, (y, x) in zip(found, places, strict=False):
        cell = _cell(grid, y, x)
        region = grid.region(cell) if grid is not None and cell is not None else None
        size = int(acts.heights[top.row]), int(acts.widths[top.row])
        part = photo_box(region.box, acts.preprocess, size) if region is not None else None
        made.append(Example(channel, top.row, top.key, top.value, cell, region, part))
    return made


def _cell(grid: Grid | None, y: int, x: int) -> tuple[int, int] | None:
    if grid is not None and y >= 0:
        return grid.cell(y, x)
    return (y, x) if y >= 0 and x >= 0 else None


def _grid(acts: Activations, layer: Layer) -> Grid | None:
    """Return the cells that recorded positions stand for: also of a layer that keeps the positions and not the maps."""
    if has_maps(layer):
        return grid_of(acts, layer)
    size = acts.input_size
    if layer.field is None or size is None:
        return None
    return Grid((1, 1), size, 0, layer.field, layer.attrs.get("erf_size"))


@styled
def show_top(
    acts: Activations,
    layer: str,
    channels: Sequence[int],
    out: str | os.PathLike[str],
    *,
    k: int = 9,
    images: str | os.PathLike[str] | None = None,
    style: Style = canvas.PLAIN,
) -> list[Example]:
    """Draw the `k` strongest images of each of `channels` into `out` (.png, .pdf, .svg), with what drove them.

    Above each photo as the network saw it, a box around what the cell looks at: its effective receptive field where
    the file has it, the theoretical one dashed where that is smaller than the image; below it that part of the photo.
    The photos are looked for where the run found them, or in `images`. Returns what is drawn.

    Raises ConfigError for an unknown layer or channel and for a photo that is not there, MissingExtra.
    """
    if not channels:
        raise ConfigError("name at least one channel: --channel N")
    if k < 1:
        raise ConfigError(f"expected at least 1 image a channel, got {k}")
    rows = [strongest(acts, layer, channel, k) for channel in channels]
    lines = [(line, first) for examples in rows for line, first in _lines(examples)]
    if not lines:
        which = ", ".join(map(str, channels))
        raise ConfigError(f"no image has a finite value in {layer}, channel {which}")
    across = max(len(line) for line, _ in lines)
    paired = any(one.photo_box for one in lines[0][0])
    side, above, heading = 2.3, 0.95, 0.32 if len(rows) > 1 else 0.0
    tall = side * (2 if paired else 1) + 0.62
    width, height = max(6.5, side * across + 0.3), above + tall * len(lines) + heading * len(rows)
    figure = canvas.figure(width, height)
    which = f"channel {channels[0]}" if len(channels) == 1 else count(len(channels), "channel")
    canvas.heading(figure, f"{acts[layer].name}  ·  {which}", "  ·  ".join(acts[layer].numbers))
    figure.text(0.15 / width, 1 - 0.68 / height, _legend(lines[0][0]), color=canvas.theme().faint, size=9, va="center")
    down, listing = above, Listing(acts, images)
    for line, is_first in lines:
        if heading and is_first:
            words = f"channel {line[0].channel}"
            place = 0.15 / width, 1 - (down + 0.1) / height
            figure.text(*place, words, color=canvas.theme().ink, size=11, weight="bold", va="center")
            down += heading
        for j, example in enumerate(line):
            left, top = (0.15 + side * j) / width, 1 - (down + 0.42) / height
            photo = load_photo(acts, example.row, images, listing)
            box = (left, top - (side - 0.1) / height, (side - 0.12) / width, (side - 0.1) / height)
            axis = figure.add_axes(box, anchor="N")
            # Where the box cannot be traced back to the photo, it cannot be drawn on it either.
            draw_region(axis, as_seen(photo, acts.preprocess), example.region if example.photo_box else None)
            figure.text(
                left, top + 0.28 / height, f"{example.value:.3g}", color=canvas.theme().accent, size=10, va="center"
            )
            end = left + (side - 0.12) / width
            detail = short(local_name(example.key), 22)
            figure.text(end, top + 0.28 / height, detail, color=canvas.theme().faint, size=8.5, va="center", ha="right")
            if example.photo_box is not None:
                lower = figure.add_axes((box[0], box[1] - side / height, *box[2:]), anchor="N")
                lower.imshow(np.asarray(cropped(photo, example.photo_box)), interpolation="lanczos")
                lower.set_axis_off()
        down += tall
    canvas.save(figure, out)
    return [example for examples in rows for example in examples]


def _lines(examples: list[Example]) -> list[tuple[list[Example], bool]]:
    """Yield lines of nearly the same length, at most ACROSS images each, and whether each is a channel's first."""
    lines = max(1, math.ceil(len(examples) / ACROSS))
    across = max(1, math.ceil(len(examples) / lines))
    return [(examples[i : i + across], i == 0) for i in range(0, len(examples), across)]


def _legend(examples: Sequence[Example]) -> str:
    words = ["value, key"]
    region = next((one.region for one in examples if one.region), None)
    if region is not None:
        words.append(KINDS[region.kind])
        words += ["dashed: all that it can see"] if region.theoretical else []
        words += ["what it uses: extract with --effective-fields always"] if region.kind == "theoretical" else []
    return "   ·   ".join(words)


def draw_region(axis: Axes, photo: PIL.Image.Image, region: Region | None, colour: str = "") -> None:
    """Draw a photo as the network saw it, with the boxes of a region."""
    axis.imshow(np.asarray(photo), interpolation="lanczos", extent=(0, photo.width, photo.height, 0))
    axis.set_axis_off()
    if region is not None:
        outline(axis, region.box, colour or canvas.theme().box)
        if region.theoretical is not None:
            outline(axis, region.theoretical, colour or canvas.theme().box, dashed=True)
    axis.set_xlim(0, photo.width)
    axis.set_ylim(photo.height, 0)


def outline(axis: Axes, box: Box, colour: str, dashed: bool = False, halo: str = "black") -> None:
    """Draw a box with an edge of another colour around its line, so that it shows on any photo."""
    from matplotlib.patches import Rectangle

    y0, x0, y1, x1 = box
    for edge, width in ((halo, 3.2), (colour, 1.6)):
        style = "--" if dashed else "-"
        axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=edge, lw=width, ls=style))


def cropped(photo: PIL.Image.Image, box: Box) -> PIL.Image.Image:
    """Return the part of a photo within `box`, at least one pixel of it."""
    y0, x0, y1, x1 = box
    left, top = min(math.floor(x0), photo.width - 1), min(math.floor(y0), photo.height - 1)
    return photo.crop((left, top, max(left + 1, math.ceil(x1)), max(top + 1, math.ceil(y1))))


def top_picture(out: str | os.PathLike[str], examples: Sequence[Example]) -> dict[str, Any]:
    """Return what `show top --json` prints."""
    return {"picture": str(Path(out)), "examples": [one.as_json() for one in examples]}
