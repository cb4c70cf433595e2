"""What a notebook shows of an output, a table of its layers, and of a layer, a strip of maps.

Bounded in time and size, whatever there is: so many layers, so many files looked into, so many bytes decoded. What
cannot be read is told in words: showing a thing never raises.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fmextract.common.boxes import patch_grid
from fmextract.common.text import ELLIPSIS, byte_count, printable, shape
from fmextract.common.text import count as plural
from fmextract.errors import FmextractError
from fmextract.reading.files import FILES_OPEN
from fmextract.reading.indexing import Array

if TYPE_CHECKING:
    from fmextract.reading.activations import Activations
    from fmextract.reading.layer import Layer

MOST_LAYERS = 60
"""Lines of a table: of more layers the first and the last are shown."""
MOST_LOOKS = 2_000
"""Layers of files that are opened, all their layers each, to count what is stored."""
MOST_FILES, MOST_ROWS = 8, 100_000
"""Files that are looked through for an image that did not fail; rows of one whose keys are read for that image's."""
MOST_TEXT = 120
"""Letters of a name or a key."""
STRIP_BYTES = 16 << 20
"""Of chunks that are decoded for a strip of maps."""
MAPS, TILE, GAP = 8, 96, 4
"""Maps in a strip; pixels of the longer side of one, and between two of them."""


def of_output(acts: Activations) -> str:
    """A table of the layers of an output."""
    if acts.closed:
        return _paragraph(repr(acts))
    try:
        with acts.held():
            return _output(acts)
    except FmextractError as error:
        return _paragraph(repr(acts), str(error))


def of_layer(layer: Layer) -> str:
    """What a layer is, and some of its maps of the first image that did not fail."""
    parts = [f"Layer {_cut(layer.name)}", f"{_cut(layer.module_type)} {_cut(layer.module)}", layer.dtype.name]
    parts.append(" × ".join(f"{size:,} {axis}" for size, axis in zip(layer.shape, layer.axes, strict=True)))
    try:
        with layer.acts.held():
            if _is_quick(layer.acts):
                parts.append(f"{byte_count(_stored(layer))} stored of {byte_count(layer.nbytes)}")
            below = _strip(layer)
    except FmextractError as error:
        below = _paragraph(str(error))
    return _paragraph(*parts) + below


# --------------------------------------------------------------------------------------------------------------- words


def _output(acts: Activations) -> str:
    names, quick = acts.layers, _is_quick(acts)
    shown: Sequence[str | None] = names
    if len(names) > MOST_LAYERS:
        shown = [*names[: MOST_LAYERS // 2], None, *names[-MOST_LAYERS // 2 :]]
    lines = [_line(acts, name, quick) if name is not None else [ELLIPSIS] for name in shown]
    if len(names) > MOST_LAYERS:
        lines.append([f"{len(names) - MOST_LAYERS:,} more: acts.layers"])
    head = ("layer", "type", "shape", "dtype", *(("stored",) if quick else ()))
    about = [str(acts.path), plural(acts.num_rows, "image"), plural(len(acts), "layer")]
    about += [_cut(str(acts.attrs[name])) for name in ("model", "precision") if name in acts.attrs]
    return _paragraph(*about) + _table(head, lines)


def _is_quick(acts: Activations) -> bool:
    """Whether all files can be looked into while somebody waits. Of one file, only the layers that are shown are."""
    files = len(acts.files)
    return files == 1 or (files <= FILES_OPEN and files * len(acts) <= MOST_LOOKS)


def _line(acts: Activations, name: str, counted: bool) -> list[str]:
    """The cells of a layer; of one that cannot be read, why."""
    try:
        layer = acts[name]
        cells = [_cut(name), _cut(layer.module_type), shape(layer.shape), layer.dtype.name]
        return [*cells, byte_count(_stored(layer))] if counted else cells
    except FmextractError as error:
        return [_cut(name), str(error)]


def _stored(layer: Layer) -> int:
    return sum(file.stored(layer.name).nbytes for file in layer.acts.files)


def _cut(text: str) -> str:
    text = text if len(text) <= MOST_TEXT else text[: MOST_TEXT // 2] + ELLIPSIS + text[-MOST_TEXT // 2 :]
    return printable(text)


def _escaped(text: str) -> str:
    return html.escape(printable(text))


def _paragraph(*parts: str) -> str:
    first, *others = parts
    return f"<p><b>{_escaped(first)}</b>{''.join(f' · {_escaped(part)}' for part in others)}</p>"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A line with fewer cells than the head has fills the rest of it with its last one."""
    rows = ["".join(f"<th style='text-align:left'>{_escaped(name)}</th>" for name in head)]
    for cells in lines:
        spans = [1] * (len(cells) - 1) + [len(head) - len(cells) + 1]
        tags = (f"<td style='text-align:left' colspan='{span}'>" for span in spans)
        rows.append("".join(f"{tag}{_escaped(cell)}</td>" for tag, cell in zip(tags, cells, strict=True)))
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


# --------------------------------------------------------------------------------------------------------------- maps


@dataclass(frozen=True, slots=True)
class _Maps:
    """Some maps of one image: (n, y, x), the numbers of their channels, and how these were chosen."""

    values: Array
    channels: list[int]
    chosen: str


def _strip(layer: Layer) -> str:
    found = _first_good(layer.acts)
    if found is None:
        return _paragraph("No maps: of the images that were looked at, every one failed.")
    row, key = found
    maps = _read(layer, row)
    if isinstance(maps, str):
        return _paragraph(maps)
    said = f"{key}, {maps.chosen}: {', '.join(map(str, maps.channels))}; each from its lowest value to its highest"
    data = base64.b64encode(_png([_tile(one) for one in maps.values])).decode("ascii")
    return f"<img alt='{_escaped(said)}' src='data:image/png;base64,{data}'><p>{_escaped(said)}</p>"


def _first_good(acts: Activations) -> tuple[int, str] | None:
    """The row of the first image that did not fail, and its key."""
    for number in range(min(len(acts.files), MOST_FILES)):
        file = acts.files[number]
        good = np.flatnonzero(file.column("status") == 0)
        if len(good):
            row = file.rows.start + int(good[0])
            return row, _cut(str(file.column("key")[good[0]])) if len(file.rows) <= MOST_ROWS else f"row {row:,}"
    return None


def _read(layer: Layer, row: int) -> _Maps | str:
    """Some maps of an image; where there are none, or they are too large to be read for this, a sentence about it."""
    axes = layer.axes[1:]
    grid = None
    if set(axes) == {"token", "feature"} and layer.acts.input_size is not None:
        grid = patch_grid(layer.shape[1 + axes.index("token")], layer.acts.input_size)
    if grid is None and set(axes) != {"channel", "y", "x"}:
        return f"No maps: its axes are {', '.join(axes)}."
    axis = axes.index("feature" if grid else "channel")
    number = layer.shape[1 + axis]
    channels = list(range(number))
    chosen = "the channels that vary most"
    if _cost(layer, axis, channels) > STRIP_BYTES:
        channels, chosen = _spread(number, MAPS), "channels"
        while channels and _cost(layer, axis, channels) > STRIP_BYTES:
            channels = _spread(number, len(channels) - 1)
    if not channels:
        return f"One image takes {byte_count(layer.nbytes / len(layer))}: draw its maps with fmextract show maps."
    index: list[slice | list[int]] = [slice(row, row + 1), *(slice(None) for _ in axes)]
    if len(channels) < number:
        index[1 + axis] = channels
    values = np.moveaxis(layer[tuple(index)][0], axis, 0)
    if grid:
        values = values[:, grid[1] :].reshape(-1, *grid[0])
    elif axes.index("y") > axes.index("x"):
        values = values.swapaxes(1, 2)
    kept = _strongest(values)
    return _Maps(values[kept], [channels[i] for i in kept], chosen)


def _cost(layer: Layer, axis: int, channels: Sequence[int]) -> int:
    """Bytes of the chunks that hold these channels of one image."""
    grid = [-(-size // chunk) for size, chunk in zip(layer.shape[1:], layer.chunks[1:], strict=True)]
    grid[axis] = len({channel // layer.chunks[1 + axis] for channel in channels})
    return math.prod(grid) * layer.chunk_bytes


def _spread(number: int, most: int) -> list[int]:
    """Up to `most` of `number` channels, at equal distances."""
    return [i * number // most for i in range(most)] if number > most else list(range(number))


def _strongest(values: Array) -> list[int]:
    """The maps that vary most within, in the order of their numbers."""
    with np.errstate(all="ignore"):
        spread = np.nan_to_num(np.where(np.isfinite(values), values, 0).std(axis=(1, 2), dtype=np.float64))
    return sorted(np.argsort(-spread, kind="stable")[:MAPS].tolist())


def _tile(values: Array) -> Array:
    """One map (y, x) as grey and opacity, uint8 (height, width, 2); what is not finite is left out."""
    scale = TILE / max(values.shape)
    height, width = (max(1, round(size * scale)) for size in values.shape)
    down, across = (np.arange(n) * size // n for n, size in zip((height, width), values.shape, strict=True))
    finite = np.isfinite(values)
    low, high = (float(f(values[finite])) if finite.any() else 0.0 for f in (np.min, np.max))
    seen = np.where(finite, values, low)[np.ix_(down, across)].astype(np.float64)
    with np.errstate(all="ignore"):
        # Halved: from -1e308 to 1e308 is more than a float64 holds.
        grey = (seen / 2 - low / 2) / (high / 2 - low / 2) if high > low else np.zeros_like(seen)
    grey = np.clip(np.nan_to_num(grey), 0, 1)
    return np.stack([np.rint(grey * 255), finite[np.ix_(down, across)] * 255.0], axis=2).astype(np.uint8)


def _png(tiles: Sequence[Array]) -> bytes:
    """The tiles side by side."""
    from PIL import Image

    width = sum(tile.shape[1] for tile in tiles) + GAP * (len(tiles) - 1)
    strip = np.zeros((max(tile.shape[0] for tile in tiles), width, 2), np.uint8)
    at = 0
    for tile in tiles:
        strip[: tile.shape[0], at : at + tile.shape[1]] = tile
        at += tile.shape[1] + GAP
    file = io.BytesIO()
    Image.fromarray(strip).save(file, "PNG")
    return file.getvalue()
