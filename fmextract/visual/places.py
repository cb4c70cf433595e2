"""Place the cells of a layer in the network's input: maps as (channel, y, x), tokens on their patch grid, regions.

Needs no torch and no matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fmextract.common.boxes import Box, cell_box, patch_grid
from fmextract.errors import ConfigError
from fmextract.reading.select import has_maps
from fmextract.records import Field

if TYPE_CHECKING:
    from fmextract.reading.activations import Activations
    from fmextract.reading.layer import Layer

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Region:
    """What one cell looks at, in pixels of the input: `box` (y0, x0, y1, x1), and where it comes from.

    `kind`: `effective`, the square with 90 % of the squared gradient; else `theoretical`, the receptive field, where
    it is smaller than the input; else `cell`, only the cell's own part of the grid. `theoretical` is the receptive
    field where it is smaller than the input and is not the box already.
    """

    box: Box
    kind: str
    theoretical: Box | None


@dataclass(frozen=True, slots=True)
class Grid:
    """The cells of a layer over the network's input.

    `cells` is (rows, columns); `size` the input's (height, width); `apart` how many tokens stand before those of the
    patches, 0 for maps. `field` and `effective` (a side in pixels) are None where the file does not have them.
    """

    cells: tuple[int, int]
    size: tuple[int, int]
    apart: int
    field: Field | None
    effective: float | None

    @property
    def placed(self) -> Field:
        """The field; without one the cells are spread evenly over the input."""
        if self.field is not None:
            return self.field
        steps = self.size[0] / self.cells[0], self.size[1] / self.cells[1]
        return Field(size=steps, stride=steps, offset=(steps[0] / 2, steps[1] / 2))

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """(left, right, bottom, top) of the map in pixels of the input, as `imshow` takes it."""
        (oy, ox), (sy, sx), (rows, columns) = self.placed.offset, self.placed.stride, self.cells
        return ox - sx / 2, ox + (columns - 0.5) * sx, oy + (rows - 0.5) * sy, oy - sy / 2

    def cell(self, y: int, x: int) -> tuple[int, int] | None:
        """Return the cell of a recorded position (for tokens: the token, -1); None for a token that is no patch."""
        if x >= 0:
            return y, x
        return divmod(y - self.apart, self.cells[1]) if y >= self.apart else None

    def region(self, cell: tuple[int, int]) -> Region:
        """Return what a cell (y, x) looks at."""
        placed = self.placed
        seen = cell_box(placed, cell, self.size)
        # By the field itself, not by what the image's edge leaves of it: so all cells of a layer are alike.
        fits = all(have <= room for have, room in zip(placed.size, self.size, strict=True))
        smaller = self.field is not None and not placed.whole and fits
        if self.effective is not None:
            side = float(self.effective)
            box = cell_box(replace(placed, size=(side, side), whole=False), cell, self.size)
            return Region(box, "effective", seen if smaller and _area(seen) > _area(box) else None)
        if smaller:
            return Region(seen, "theoretical", None)
        return Region(cell_box(replace(placed, size=placed.stride, whole=False), cell, self.size), "cell", None)

    def over_input(self, values: Array, size: tuple[int, int] | None = None) -> Array:
        """Spread maps (…, y, x) over the whole input: (…, height, width), or as many pixels as `size` says.

        Each value stands at the centre of its cell; between centres it is interpolated, beyond the outermost constant.
        """
        height, width = size or self.size
        down = _weights(self.placed, 0, self.cells[0], self.size[0], height)
        across = _weights(self.placed, 1, self.cells[1], self.size[1], width)
        spread: Array = down @ values @ across.T
        return spread


def _weights(field: Field, axis: int, cells: int, length: int, pixels: int) -> Array:
    """Return (pixels, cells): how much of each cell's value a pixel gets along one axis."""
    at = (np.arange(pixels) + 0.5) * length / pixels
    position = np.clip((at - field.offset[axis]) / field.stride[axis], 0, cells - 1)
    weights: Array = np.maximum(0.0, 1 - np.abs(position[:, None] - np.arange(cells)))
    return weights


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


@dataclass(frozen=True, slots=True)
class Maps:
    """The maps of one image in one layer: `values` float32 (channel, y, x), what is not finite as NaN.

    `apart` holds (name, values (channel,)) of the tokens that are no patches.
    """

    grid: Grid
    values: Array
    apart: tuple[tuple[str, Array], ...] = ()


def grid_of(acts: Activations, layer: Layer) -> Grid:
    """Return the cells of a layer over the input. Raises ConfigError for a layer without maps; it names those with."""
    axes = layer.axes[1:]
    size = acts.input_size
    side = layer.attrs.get("erf_size")
    effective = None if side is None else float(np.max(side))
    if set(axes) == {"channel", "y", "x"}:
        cells = layer.shape[1 + axes.index("y")], layer.shape[1 + axes.index("x")]
        return Grid(cells, size or cells, 0, layer.field, effective)
    if set(axes) == {"token", "feature"}:
        tokens = layer.shape[1 + axes.index("token")]
        found = patch_grid(tokens, size)
        if found is None:
            raise ConfigError(f"{layer.name}: {tokens} tokens are no grid of patches over an input of {size}")
        return Grid(found[0], size or found[0], found[1], None, effective)
    maps = ", ".join(name for name in acts.layers if has_maps(acts[name]))
    raise ConfigError(
        f"{layer.name} has the axes ({', '.join(axes)}): no maps to draw. Layers with maps: {maps or 'none'}"
    )


def read_maps(acts: Activations, layer: Layer, row: int) -> Maps:
    """Return the maps of one image. Raises ConfigError for a layer without maps and for a row that failed."""
    grid = grid_of(acts, layer)
    if acts.status[row]:
        raise ConfigError(f"{str(acts.keys[row])!r} has no activations: {acts.messages[row]}")
    values = np.array(layer[row], dtype=np.float32)
    values[~np.isfinite(values)] = np.nan
    axes = layer.axes[1:]
    if "token" in axes:
        values = np.moveaxis(values, axes.index("feature"), 0)
        names = [f"register {i}" if i else "cls" for i in range(grid.apart)]
        apart = tuple((name, values[:, i]) for i, name in enumerate(names))
        return Maps(grid, values[:, grid.apart :].reshape(-1, *grid.cells), apart)
    return Maps(grid, values.transpose([axes.index(axis) for axis in ("channel", "y", "x")]))


def pick_channels(maps: Maps, count: int, order: str, chosen: Sequence[int], layer: str) -> list[int]:
    """Return the channels to show: `chosen`; else the `first`, or those that vary most within (`strongest`).

    Ascending, except `chosen`. Raises ConfigError for an unknown channel or order.
    """
    channels = len(maps.values)
    if chosen:
        for number in chosen:
            if not 0 <= number < channels:
                raise ConfigError(f"{layer} has the channels 0 to {channels - 1}, and no channel {number}")
        return list(chosen)
    if count < 1:
        raise ConfigError(f"expected at least 1 channel to show, got {count}")
    if order == "first":
        return list(range(min(count, channels)))
    if order != "strongest":
        raise ConfigError(f"unknown order {order!r}: expected first or strongest")
    spread = np.nan_to_num(maps.values).std(axis=(1, 2))
    return sorted(np.argsort(-spread, kind="stable")[:count].tolist())
