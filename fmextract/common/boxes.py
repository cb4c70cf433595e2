"""Convert a cell of a feature map to a box in the network's input, and that to one in the photo. Needs no torch.

A box is (y0, x0, y1, x1) in pixels, edges included: pixel p covers the interval from p to p + 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fmextract.records import Field

Box = tuple[float, float, float, float]
Span = tuple[int, int, int]
SMALLEST_PATCH, MOST_APART = 4, 16
"""Pixels of a patch's side, and how many tokens may stand before the patches (class token, registers)."""


def cell_box(field: Field, cell: tuple[int, int], input_size: tuple[int, int] | None = None) -> Box:
    """Return the box of the network's input that `cell` (y, x) sees, clipped to `input_size` (height, width) if known.

    A cell in the padding around the image may see nothing of it: its box is then empty, on the image's edge.
    """
    if field.whole:
        height, width = input_size or field.size
        return 0.0, 0.0, float(height), float(width)
    edges = []
    for axis in (0, 1):
        centre = field.offset[axis] + cell[axis] * field.stride[axis]
        low, high = centre - field.size[axis] / 2, centre + field.size[axis] / 2
        if input_size is not None:
            low, high = (min(max(edge, 0.0), float(input_size[axis])) for edge in (low, high))
        edges.append((low, high))
    (y0, y1), (x0, x1) = edges
    return y0, x0, y1, x1


def photo_box(box: Box, preprocess: Mapping[str, Any], size: tuple[int, int]) -> Box | None:
    """Return the part of a photo of `size` (height, width) that `box`, in the network's input, came from.

    `preprocess` is the recorded preprocessing (the file's attribute of this name, or the fields of a Preprocess): the
    resize and the centre crop are undone, and what the crop added around a small photo is cut off. None where the
    preprocessing is the user's own and cannot be undone, and where the file does not know the photo's size.
    """
    if preprocess.get("kind", "standard") != "standard" or min(size) < 1:
        return None
    resized = resized_size(*size, _size(preprocess.get("resize")))
    crop = _size(preprocess.get("crop"))
    made = []
    for axis in (0, 1):
        wanted = crop[axis] if isinstance(crop, tuple) else resized[axis]
        start, _, padding = crop_span(resized[axis], wanted)
        scale = size[axis] / resized[axis]
        edges = ((box[axis + end] + start - padding) * scale for end in (0, 2))
        made.append(tuple(min(max(edge, 0.0), float(size[axis])) for edge in edges))
    (y0, y1), (x0, x1) = made
    return y0, x0, y1, x1


def _size(value: Any) -> int | tuple[int, int] | None:
    return (int(value[0]), int(value[1])) if isinstance(value, (list, tuple)) else value


def resized_size(height: int, width: int, resize: int | tuple[int, int] | None) -> tuple[int, int]:
    """Return (height, width) after torchvision's resize: `resize` is the shorter side, the longer is rounded down."""
    if resize is None:
        return height, width
    if isinstance(resize, tuple):
        return resize
    longer = int(resize * max(height, width) / min(height, width))
    return (resize, longer) if height <= width else (longer, resize)


def crop_span(resized: int, crop: int) -> Span:
    """Return a centre crop along one axis: first and last + 1 of the resized pixels, and the padding before them."""
    if crop > resized:
        return 0, resized, (crop - resized) // 2
    start = round((resized - crop) / 2)
    return start, start + crop, 0


def patch_grid(tokens: int, size: tuple[int, int] | None) -> tuple[tuple[int, int], int] | None:
    """Return ((rows, columns), tokens before the patches), the fewest of these that make a grid of square patches.

    Without the input's `size` the grid is taken to be square. None where there is no such grid.
    """
    height, width = size or (1024, 1024)
    grids = {
        (height // side) * (width // side): (height // side, width // side)
        for side in range(SMALLEST_PATCH, min(height, width) + 1)
    }
    return next(((grids[tokens - n], n) for n in range(MOST_APART + 1) if tokens - n in grids and tokens - n > 1), None)
