"""Show where in an image a layer looks: its strongest channels with the region of each, and the heat of all of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fmextract.common.boxes import Box, photo_box
from fmextract.common.folders import local_name
from fmextract.errors import ConfigError
from fmextract.visual import canvas
from fmextract.visual.canvas import Array, Style, cut, styled
from fmextract.visual.photos import as_seen, check_traceable, load_photo
from fmextract.visual.places import Region, read_maps
from fmextract.visual.top import KINDS, cropped, draw_region, outline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fmextract.reading.activations import Activations


@dataclass(frozen=True, slots=True)
class Peak:
    """A channel that is strong in an image. `strength`: its highest value, in standard deviations of the channel over
    the whole data set above its mean; `value`: that highest value, at the cell (y, x)."""

    channel: int
    strength: float
    value: float
    cell: tuple[int, int]
    region: Region
    photo_box: Box | None


@dataclass(frozen=True, slots=True)
class Where:
    """Where a layer looks in one image.

    `heat` (y, x) is the sum over the channels of the activations' absolute values, `hottest` the region of its highest
    cell, `spread` the heat over the whole input, (height, width).
    """

    layer: str
    key: str
    peaks: tuple[Peak, ...]
    heat: Array = field(repr=False)
    cell: tuple[int, int]
    hottest: Region
    hottest_in_photo: Box | None
    spread: Array = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON, without the maps."""
        return {
            "layer": self.layer,
            "key": self.key,
            "cell": self.cell,
            "box": self.hottest.box,
            "box_kind": self.hottest.kind,
            "photo_box": self.hottest_in_photo,
            "channels": [
                {
                    "channel": peak.channel,
                    "strength": peak.strength,
                    "value": peak.value,
                    "cell": peak.cell,
                    "box": peak.region.box,
                    "photo_box": peak.photo_box,
                }
                for peak in self.peaks
            ],
        }


def localize(acts: Activations, image: str, layer: str, k: int = 5) -> Where:
    """Return the `k` strongest channels of the image with this key in a layer, and where all channels are strongest.

    A channel is as strong as its highest value is unusual: measured in the channel's own standard deviations over the
    data set, since a channel that is always high says nothing of this image. One without any finite value does not
    count. Raises ConfigError.
    """
    row, one = acts.row(image), acts[layer]
    if k < 1:
        raise ConfigError(f"expected at least 1 channel, got {k}")
    maps = read_maps(acts, one, row)
    values, grid = np.nan_to_num(maps.values.astype(np.float64)), maps.grid
    size = int(acts.heights[row]), int(acts.widths[row])
    flat = np.nan_to_num(maps.values, nan=-np.inf).reshape(len(values), -1)
    places, highest = flat.argmax(1), flat.max(1).astype(np.float64)
    spread = np.where(one.stats.std > 0, one.stats.std, np.inf)
    strength = np.nan_to_num((highest - one.stats.mean) / spread, nan=-np.inf, posinf=-np.inf, neginf=-np.inf)
    peaks = []
    ranked = np.argsort(-strength, kind="stable")
    for channel in ranked[np.isfinite(highest[ranked])][:k].tolist():
        cell = divmod(int(places[channel]), grid.cells[1])
        region = grid.region(cell)
        part = photo_box(region.box, acts.preprocess, size)
        peaks.append(Peak(channel, float(strength[channel]), float(highest[channel]), cell, region, part))
    heat = np.abs(values).sum(0)
    cell = divmod(int(heat.argmax()), grid.cells[1])
    hottest = grid.region(cell)
    part = photo_box(hottest.box, acts.preprocess, size)
    return Where(one.name, image, tuple(peaks), heat, cell, hottest, part, grid.over_input(heat))


@styled
def show_where(
    acts: Activations,
    image: str,
    layer: str,
    out: str | os.PathLike[str],
    *,
    k: int = 5,
    images: str | os.PathLike[str] | None = None,
    style: Style = canvas.PLAIN,
) -> Where:
    """Draw `where` into `out` (.png, .pdf, .svg): the strongest channels' regions, crops, the heat over the photo.

    The photo is looked for where the run found it, or in `images`. Raises ConfigError, MissingExtra.
    """
    check_traceable(acts)
    found = localize(acts, image, layer, k)
    photo = load_photo(acts, acts.row(image), images)
    seen = as_seen(photo, acts.preprocess)
    side, crops = 4.4, len(found.peaks)
    width, height = 2 * side + 0.45, side + 1.35 + (2 * side + 0.15) / max(crops, 4) + 0.35
    figure = canvas.figure(width, height)
    canvas.heading(figure, found.layer, "  ·  ".join((*acts[layer].numbers, cut(local_name(image), 40))))
    bottom = (height - 1.0 - side) / height
    left = figure.add_axes((0.15 / width, bottom, side / width, side / height), anchor="N")
    draw_region(left, seen, None)
    _mark_peaks(left, found.peaks, seen.height)
    right = figure.add_axes(((0.3 + side) / width, bottom, side / width, side / height), anchor="N")
    draw_region(right, seen.convert("L").convert("RGB"), None)
    extent = (0, seen.width, seen.height, 0)
    flat = float(np.ptp(found.spread)) <= 1e-6 * float(np.abs(found.spread).max())
    right.imshow(found.spread, cmap=canvas.colour_map(), alpha=0.6, extent=extent, interpolation="bilinear")
    if not flat:
        outline(right, found.hottest.box, "white")
    above = 1 - 0.82 / height
    kind = KINDS[found.hottest.kind]
    figure.text(
        0.15 / width, above, f"strongest channels   ·   {kind}", color=canvas.theme().faint, size=9, va="center"
    )
    words = "sum of all channels" + (": the same everywhere" if flat else ", and its peak")
    figure.text((0.3 + side) / width, above, words, color=canvas.theme().faint, size=9, va="center")
    each = (2 * side + 0.15) / max(crops, 4)
    for i, (peak, colour) in enumerate(zip(found.peaks, _colours(crops), strict=True)):
        place = ((0.15 + each * i) / width, 0.1 / height, (each - 0.1) / width, (each - 0.1) / height)
        axis = figure.add_axes(place, anchor="N")
        part = cropped(photo, peak.photo_box) if peak.photo_box else cropped(seen, peak.region.box)
        axis.imshow(np.asarray(part), interpolation="lanczos")
        axis.set_axis_off()
        words = f"{peak.channel}   {peak.strength:+.1f} σ"
        axis.set_title(words, color=colour, size=9, loc="left", pad=4)
    canvas.save(figure, out)
    return found


def _colours(count: int) -> list[str]:
    """Return a colour for each of so many peaks; beyond the palette they repeat."""
    palette = canvas.theme().palette
    return [palette[i % len(palette)] for i in range(count)]


def _mark_peaks(axis: Axes, peaks: Sequence[Peak], height: int) -> None:
    """Draw the box of each peak, its number in it: those of one cell below each other, upwards at the lower edge."""
    halo = canvas.theme().halo
    mark = {"boxstyle": "round,pad=0.15", "facecolor": halo, "edgecolor": "none", "alpha": 0.7}
    step = 15 * height / 224
    for i, (peak, colour) in enumerate(zip(peaks, _colours(len(peaks)), strict=True)):
        outline(axis, peak.region.box, colour, halo=halo)
        y0, x0, *_ = peak.region.box
        together, before = (sum(one.cell == peak.cell for one in some) for some in (peaks, peaks[:i]))
        top = max(0.0, min(y0, height - step * together)) + step * before
        axis.text(x0 + 2, top + 2, str(peak.channel), color=colour, size=8, va="top", bbox=mark)


def where_picture(out: str | os.PathLike[str], found: Where) -> dict[str, Any]:
    """Return what `show where --json` prints."""
    return {"picture": str(Path(out)), **found.as_json()}
