"""Choose how to show the values of an image in a layer: as maps beside one another, or as one line of numbers."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import PIL.Image

from fmextract.common.boxes import patch_grid
from fmextract.reading.layer import Layer

Array: TypeAlias = npt.NDArray[Any]

SIDE = 64
"""Cells of a map's longer side in the page; larger maps are averaged over squares."""
VECTOR = 2048
"""Numbers of a layer without maps."""


@dataclass(slots=True)
class View:
    """`kind`: maps (channel, y, x) · tokens (patches on their grid, `prefix` others apart) · planes (axes not known) ·
    vector (`count` numbers, one map of one line).

    `height` and `width` are those of the stored map; the drawn one is smaller by `pool`.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    height: int
    width: int
    prefix: int = 0
    shown: list[int] | None = field(default=None)

    @property
    def pool(self) -> int:
        return 1 if self.kind == "vector" else max(1, math.ceil(max(self.height, self.width) / SIDE))

    @property
    def drawn_size(self) -> tuple[int, int]:
        return math.ceil(self.height / self.pool), math.ceil(self.width / self.pool)

    @property
    def bytes_a_map(self) -> float:
        """Bytes in the page, about: a compressed byte per cell as base64, its range, and the tokens apart."""
        height, width = self.drawn_size
        return 8.0 if self.kind == "vector" else height * width * 1.15 + 24 + 9 * self.prefix

    @property
    def shown_count(self) -> int:
        return self.count if self.shown is None else len(self.shown)

    def fit(self, most: int) -> int:
        """Return how many are shown if each layer shows `most` maps."""
        return min(self.count, VECTOR if self.kind == "vector" else most)

    def choose(self, numbers: Sequence[int]) -> None:
        """Show these maps, or these numbers of a vector."""
        self.shown = None if len(numbers) == self.count else list(numbers)

    def maps(self, values: Array) -> tuple[Array, Array]:
        """Return (maps, height, width) of one image, and (maps, prefix) of what stands apart."""
        none = np.empty((self.count, 0))
        if self.kind == "maps":
            return values.transpose([self.axes.index(axis) for axis in ("channel", "y", "x")]), none
        if self.kind == "tokens":
            by_feature = values.transpose([self.axes.index(axis) for axis in ("feature", "token")])
            patches = by_feature[:, self.prefix :].reshape(self.count, self.height, self.width)
            return patches, by_feature[:, : self.prefix]
        return values.reshape(self.count, self.height, self.width), none

    def as_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "count": self.count,
            "cells": [self.height, self.width],
            "drawn": self.drawn_size,
            "pool": self.pool,
            "prefix": self.prefix,
            "shown": self.shown,
        }


def view_of(layer: Layer, input_size: tuple[int, int] | None) -> View:
    """Return the view that a layer's axes ask for."""
    axes, sizes = layer.axes[1:], dict(zip(layer.axes[1:], layer.shape[1:], strict=True))
    shape = layer.shape[1:]
    if math.prod(shape) == max(shape, default=1):  # a map of one cell is a number
        return View("vector", axes, math.prod(shape), 1, 1)
    if set(axes) == {"channel", "y", "x"}:
        return View("maps", axes, sizes["channel"], sizes["y"], sizes["x"])
    if set(axes) == {"token", "feature"} and (found := patch_grid(sizes["token"], input_size)):
        (height, width), apart = found
        return View("tokens", axes, sizes["feature"], height, width, prefix=apart)
    return View("planes", axes, math.prod(shape[:-2]), shape[-2], shape[-1])


def drawn(view: View, values: Array) -> dict[str, Any]:
    """Return the shown maps of one image: an 8-bit PNG of all of them in a grid, and the range of each.

    Level 0 is a value that is not finite; levels 1 to 255 go evenly from the lowest to the highest of the map,
    which are NaN where none is finite.
    """
    if view.kind == "vector":
        line = values.reshape(-1)
        return {"values": line if view.shown is None else line[view.shown]}
    maps, apart = view.maps(values)
    if view.shown is not None:
        maps, apart = maps[view.shown], apart[view.shown]
    maps = _pooled(np.asarray(maps, np.float64), view.pool)
    finite = np.isfinite(maps)
    low, high = (
        np.where(finite.any((1, 2)), pick(np.where(finite, maps, empty), axis=(1, 2)), np.nan)
        for pick, empty in ((np.min, np.inf), (np.max, -np.inf))
    )
    scale = np.where(high > low, high - low, 1.0)[:, None, None]
    steps = np.where(finite, maps - low[:, None, None], 0.0) / scale
    levels = np.where(finite, 1 + np.rint(254 * steps), 0)
    made: dict[str, Any] = {"png": _sprite(levels.astype(np.uint8)), "low": low, "high": high}
    return {**made, "apart": apart} if view.prefix else made


def _pooled(maps: Array, pool: int) -> Array:
    """Return the mean over squares of `pool` cells, of those that are finite; NaN where none is."""
    if pool == 1:
        return maps
    count, height, width = maps.shape
    tall, wide = math.ceil(height / pool), math.ceil(width / pool)
    room = np.full((count, tall * pool, wide * pool), np.nan)
    room[:, :height, :width] = maps
    squares = room.reshape(count, tall, pool, wide, pool)
    finite = np.isfinite(squares)
    total = np.where(finite, squares, 0.0).sum((2, 4))
    many = finite.sum((2, 4))
    return np.where(many > 0, total / np.maximum(many, 1), np.nan)


def _sprite(levels: Array) -> str:
    """Return the maps in rows of sprite_columns(), nearly a square, since no browser draws a picture of any length."""
    count, height, width = levels.shape
    columns = sprite_columns(count, height, width)
    lines = math.ceil(count / columns)
    grid = np.zeros((lines * columns, height, width), np.uint8)
    grid[:count] = levels
    picture = grid.reshape(lines, columns, height, width).swapaxes(1, 2).reshape(lines * height, columns * width)
    held = io.BytesIO()
    PIL.Image.fromarray(picture).save(held, "PNG", compress_level=9)
    return base64.b64encode(held.getvalue()).decode("ascii")


def sprite_columns(count: int, height: int, width: int) -> int:
    """Return how many maps stand beside one another in a sprite; page.js counts the same way."""
    return max(1, min(count, math.ceil(math.sqrt(count * height / width))))
