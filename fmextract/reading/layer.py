"""One layer of an output as numpy sees it: shape, indexing, statistics, strongest images."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fmextract.reading.activations import Activations


import numpy as np
import numpy.typing as npt

from fmextract.common.boxes import cell_box
from fmextract.common.text import byte_count
from fmextract.errors import ConfigError, DamagedError, FormatError
from fmextract.reading.chunks import SEEK_BYTES
from fmextract.reading.files import File, Stored
from fmextract.reading.indexing import (
    Array,
    AxisIndex,
    Part,
    Rows,
    Selection,
    batched,
    count,
    crossing,
    cut,
    per_axis,
    selection_of,
    stretches,
)
from fmextract.reading.parallel import in_parallel
from fmextract.records import Field
from fmextract.storage import codecs, layer_stats
from fmextract.storage.validation import reading

DATASET_BYTES = 256 * 2**20
"""The same for a torch Dataset, which is read in any order, again and again; and how much of it is held as a whole."""


ALONE_BYTES = 2**20
"""Bytes that are copied from the page cache before a thread of the pool has begun."""


FEW = 4
"""Of the values of a chunk at most one in so many: these alone are picked when the chunk is met for the first time."""


class NotInMemory(ConfigError):
    """A reduction of a layer, which is no array in memory; the message says what to use."""


class UnknownStatistic(ConfigError, AttributeError):
    """A statistic that a layer does not have; the message names those that it has."""


@dataclass(frozen=True, slots=True)
class Top:
    """One of the strongest images of a channel.

    `y` and `x` are the cell in the feature map, None for a layer without them. `box` is what that cell sees of the
    network's input, in its pixels and clipped to it: (left, top, right, bottom), as PIL's `crop` takes it; None where
    the receptive field is not defined.
    """

    row: int
    key: str
    value: float
    y: int | None
    x: int | None
    box: tuple[float, float, float, float] | None


class Stats:
    """Statistics of a layer: one attribute per name in `names`, each an array (channels,) or (channels, k)."""

    def __init__(self, layer: str, values: Mapping[str, Array]) -> None:
        self._layer = layer
        self._values = dict(values)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._values)

    def __getattr__(self, name: str) -> Array:
        try:
            return self.__dict__["_values"][name]  # type: ignore[no-any-return]
        except KeyError:
            have = ", ".join(self.__dict__.get("_values", ()))
            raise UnknownStatistic(
                f"no statistic {name!r} for {self.__dict__.get('_layer')}; there are: {have}"
            ) from None

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._values]

    def __repr__(self) -> str:
        return f"<Stats of {self._layer}: {', '.join(self.names)}>"


class Layer:
    """One layer as an array of shape (N, …) that is read when indexed.

    Indexing is numpy's: integers, slices with any step, Ellipsis, lists, integer arrays and boolean masks on any axis
    (several arrays are paired, as in numpy). The result is a new array. Only the chunks that hold something wanted are
    read. `len` counts rows and iteration reads them one by one, failed ones included. A notebook shows a strip of maps.
    Raises IndexError and TypeError like numpy, DamagedError where the stored bytes are broken.
    """

    def __init__(self, acts: Activations, name: str) -> None:
        self.acts = acts
        """The output that it is a layer of."""
        self.name = name
        first = acts.files[0].stored(name)
        self.spec = first.spec
        self.attrs: Mapping[str, Any] = first.attrs
        self.shape: tuple[int, ...] = (acts.num_rows, *first.spec.shape)
        self.axes: tuple[str, ...] = ("sample", *first.spec.axes)
        self.chunks = first.spec.chunk
        self.dtype = np.dtype(first.spec.dtype)
        self.codec = first.codec
        self._alike = first.alike
        self.chunk_bytes = math.prod(self.chunks) * self.dtype.itemsize
        self._as_it_is = first.codec == "none" and self.chunks[1:] == self.shape[1:]
        self._last = -2  # the chunk along the rows that was read last
        for start in acts.files.starts:
            if start % self.chunks[0]:
                raise FormatError(
                    f"{acts.path}: a file starts at row {start}, within a chunk of {self.chunks[0]} rows of {name}"
                )

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all values, not compressed."""
        return self.size * self.dtype.itemsize

    @property
    def module(self) -> str:
        """The path of the module in the model."""
        return self.spec.module

    @property
    def module_type(self) -> str:
        return self.spec.module_type

    @property
    def numbers(self) -> tuple[str, ...]:
        """The selectors by number that mean its module, as `conv#52` and `trunk#48`; none where the file has none."""
        return tuple(str(self.attrs.get("number", "")).split())

    @property
    def compute_dtype(self) -> str:
        """The type in the forward pass (torch's name)."""
        return self.spec.compute_dtype

    @property
    def field(self) -> Field | None:
        """The receptive field, None where it is not defined."""
        return self.spec.field

    def __reduce__(self) -> tuple[Any, ...]:
        return operator.getitem, (self.acts, self.name)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Array]:
        return (self[row] for row in range(len(self)))

    def __contains__(self, value: object) -> bool:
        name = f"acts[{self.name!r}]"
        raise NotInMemory(
            f"{name} is read from its file when indexed, and `in` would read all of it. Of one image: value in "
            f"{name}[row]. Which rows there are: acts.rows()"
        )

    def _not_in_memory(self, *args: Any, **options: Any) -> Any:
        """What `numpy.mean(layer)` calls: it would read all of it at once, with failed rows, which are NaN."""
        name = f"acts[{self.name!r}]"
        raise NotInMemory(
            f"{name} is read from its file when indexed, and has no reductions of its own. Over all images that did "
            f"not fail, by channel: {name}.stats.mean (or std, min, max, …). Part by part: for rows, values in "
            f"{name}.batches(). Of everything at once, {byte_count(self.nbytes)}: {name}[acts.rows()].mean()"
        )

    mean = std = var = sum = min = max = prod = any = all = argmin = argmax = _not_in_memory

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError("a layer is read from its file: it cannot become an array without a copy")
        values: Array = self[...]
        return values if dtype is None else values.astype(dtype, copy=False)

    def __getitem__(self, key: Any) -> Any:
        key = self._as_stretch(key)
        if self._as_it_is and isinstance(key, slice) and key.step in (None, 1):
            return self._stretch(range(*key.indices(len(self))))
        if self._as_it_is and type(key) is int and 0 <= key < len(self):
            return self._stretch(range(key, key + 1))[0]
        axes, place = per_axis(key, self.shape)
        arrays = [axis for axis, one in enumerate(axes) if isinstance(one, np.ndarray)]
        if len(arrays) > 1:
            return self._paired(axes, place)
        block = self._block([selection_of(one) for one in axes])
        if not arrays:
            return block[tuple(0 if isinstance(one, int) else slice(None) for one in axes)]
        (axis,) = arrays
        dropped = tuple(a for a, one in enumerate(axes) if isinstance(one, int))
        block = np.moveaxis(block.squeeze(dropped), axis - sum(a < axis for a in dropped), place)
        shape = axes[axis].shape  # type: ignore[union-attr]
        return block.reshape(block.shape[:place] + shape + block.shape[place + 1 :])

    def _as_stretch(self, key: Any) -> Any:
        """Rows that follow each other, as most batches are, as a slice: of pooled features the index costs the most."""
        if key is Ellipsis:
            return slice(None)
        if not (isinstance(key, np.ndarray) and key.ndim == 1 and key.dtype.kind == "i" and len(key)):
            return key
        first, last = int(key[0]), int(key[-1])
        follows = first >= 0 and last < len(self) and last - first == len(key) - 1 and bool((key[1:] > key[:-1]).all())
        return slice(first, last + 1) if follows else key

    def batches(self, size: int = 256, include_failed: bool = False) -> Iterator[tuple[Rows, Array]]:
        """Yield (rows int64 (n), maps (n, …)) in the order of the rows, n = `size` except for the last.

        Rows with a status other than 0 are left out unless asked for. Memory is one batch and a few chunks.
        """
        for rows in batched(self.acts.rows(include_failed), size):
            first, last = int(rows[0]), int(rows[-1])
            yield rows, self[first : last + 1] if last - first == len(rows) - 1 else self[rows]

    @functools.cached_property
    def stats(self) -> Stats:
        """Statistics per channel over the rows with status 0; ConfigError where the layer has none."""
        merged = _merged_stats(self)
        if not merged:
            raise ConfigError(f"{self.acts.path}: no statistics for {self.name}: its channel axis is not known")
        return Stats(f"{self.name} of {self.acts.path}", merged)

    @functools.cached_property
    def effective_dimension(self) -> layer_stats.EffectiveDimension | None:
        """In how many directions the images differ (see `storage.layer_stats`); None where that was not kept.

        Read from the layer's attributes; in a directory, computed of its shards' covariances.
        """
        known = layer_stats.EffectiveDimension.of_attrs(self.attrs)
        if known is not None:
            return known
        with reading(self.acts.path):
            return layer_stats.effective_dimension(_merged_stats(self, covariance=True))

    def top(self, channel: int, k: int = 9) -> list[Top]:
        """Return the `k` images with the highest values in a channel, strongest first: as many as were kept (--top-k).

        Raises IndexError for a channel that the layer does not have, ConfigError where nothing was kept.
        """
        stats = self.stats
        if "top_value" not in stats.names:
            raise ConfigError(f"{self.acts.path}: no strongest images were kept for {self.name} (extract with --top-k)")
        channels = len(stats.top_value)
        if not -channels <= channel < channels:
            raise IndexError(f"channel {channel} is out of bounds for {self.name} with {channels} channels")
        value, sample, y, x = (getattr(stats, f"top_{part}")[channel][:k] for part in ("value", "sample", "y", "x"))
        first = self.acts.first_row
        return [
            self._one_top(int(s) - first, float(v), int(b), int(a))
            for v, s, b, a in zip(value, sample, y, x, strict=True)
            if s >= 0
        ]

    def info(self) -> dict[str, Any]:
        """A summary as plain data."""
        return self.described(sum(file.stored(self.name).nbytes for file in self.acts.files))

    def described(self, stored: int) -> dict[str, Any]:
        return {
            "name": self.name,
            "module": self.module,
            "module_type": self.module_type,
            "shape": list(self.shape),
            "axes": list(self.axes),
            "dtype": self.dtype.name,
            "compute_dtype": self.compute_dtype,
            "chunk": list(self.chunks),
            "codec": self.codec,
            "bytes_raw": self.nbytes,
            "bytes_stored": stored,
            "ratio": self.nbytes / stored if stored else None,
        }

    def __repr__(self) -> str:
        return f"<Layer {self.name!r}: {self.summary()}>"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from fmextract.reading.html import of_layer

        return of_layer(self)

    def summary(self) -> str:
        return f"{self.dtype.name} {self.shape} ({', '.join(self.axes)})"

    def _one_top(self, row: int, value: float, y: int, x: int) -> Top:
        if not 0 <= row < len(self):
            raise DamagedError(f"{self.acts.path}: the statistics of {self.name} name row {row} of {len(self)}")
        key = str(self.acts.keys[row])
        if y < 0 or x < 0:
            return Top(row, key, value, None, None, None)
        box = _seen(self.field, (y, x), self.acts.input_size) if self.field else None
        return Top(row, key, value, y, x, box)

    def _stretch(self, rows: range) -> Array:
        """Rows that follow each other of a layer that is stored as it is: read straight to where they belong."""
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        images = self.chunks[0]
        chunks = range(rows.start // images, -(-rows.stop // images)) if rows else range(0)

        def read(chunk: int) -> None:
            first = chunk * images
            begin, end = max(rows.start, first), min(rows.stop, first + images)
            room = out[begin - rows.start : end - rows.start]
            with self._chunk_at((chunk, *(0,) * (self.ndim - 1))) as (file, stored, place):
                file.read_rows(stored, place, [range(begin - first, end - first)], room)

        in_parallel(read, chunks, len(chunks), min(self.acts.threads, 1 + out.nbytes // ALONE_BYTES))
        return out

    def _block(self, selections: Sequence[Selection]) -> Array:
        """Return the values at the crossing of one selection per axis, in their order: a new array."""
        out = np.empty(tuple(len(one) for one in selections), self.dtype)
        parts = [cut(one, chunk) for one, chunk in zip(selections, self.chunks, strict=True)]
        number = math.prod(map(len, parts))
        ahead = self._ahead(parts, number)
        work = functools.partial(self._fill, out)
        in_parallel(work, itertools.chain(itertools.product(*parts), ahead), number + len(ahead), self.acts.threads)
        return out

    def _ahead(self, parts: Sequence[Sequence[Part]], number: int) -> list[tuple[Part, ...]]:
        """The next chunks along the rows as parts of which nothing is wanted yet, for threads that have nothing to do.

        Where reading goes in order and comes to a chunk that must be decoded: so small batches are decoded in parallel.
        """
        idle = self.acts.threads - number
        if idle <= 0 or not number or self.codec in (None, "none"):
            return []
        first, last = parts[0][0].chunk, parts[0][-1].chunk
        in_order, self._last = first - self._last in (0, 1), last
        wanted = itertools.product(*([part.chunk for part in one] for one in parts))
        if not in_order or all((self.name, coords) in self.acts.recent for coords in wanted):
            return []
        room = self.acts.recent.nbytes // (2 * self.chunk_bytes)
        rows = min(idle, room) // math.prod(map(len, parts[1:]))
        stop = min(last + 1 + rows, -(-len(self) // self.chunks[0]))
        nothing = slice(0, 0, 1)
        return list(itertools.product((Part(i, nothing, nothing) for i in range(last + 1, stop)), *parts[1:]))

    def _fill(self, out: Array, parts: tuple[Part, ...]) -> None:
        """Read what is wanted of one chunk, and put it where it belongs in `out`."""
        coords, theres, heres = zip(*parts, strict=True)
        there = crossing(theres, out.shape)
        kept = self.acts.recent.get((self.name, coords))
        if kept is None and all(map(_is_whole, heres, self.chunks)) and all(isinstance(one, slice) for one in there):
            room = out[there]
            if room.flags.c_contiguous:
                with self._chunk_at(coords) as (file, stored, place):
                    file.read(stored, place, room)
                return
        out[there] = self._part(coords, heres, kept)

    def _part(self, coords: tuple[int, ...], heres: tuple[slice | Rows, ...], kept: Array | bytes | None) -> Array:
        """What is wanted of a chunk, from what is `kept` of it: never write to it.

        Where a few values are wanted of a chunk that is met for the first time, they are picked of what its compressor
        gave, and that is kept; else all its values are joined, and kept.
        """
        key, at = (self.name, coords), crossing(heres, self.chunks)
        if kept is None:
            counts = [count(here, n) for here, n in zip(heres, self.chunks, strict=True)]
            with self._chunk_at(coords) as (file, stored, place):
                if stored.codec == "none" and counts[1:] == list(self.chunks[1:]):
                    rows = stretches(heres[0], self.chunks[0])
                    if len(rows) * SEEK_BYTES <= self.chunk_bytes:
                        part = np.empty((counts[0], *self.chunks[1:]), self.dtype)
                        file.read_rows(stored, place, rows, part)
                        return part
                kept = file.unpack(stored, place)
            if isinstance(kept, bytes) and 0 < FEW * math.prod(counts) <= math.prod(self.chunks):
                self.acts.recent.put(key, kept)
                return self._pick(kept, at)
        if isinstance(kept, bytes):
            kept = self._pick(kept, ())
            self.acts.recent.put(key, kept)
        return kept[at]  # type: ignore[no-any-return]

    def _pick(self, unpacked: bytes, at: tuple[Any, ...]) -> Array:
        return codecs.pick(unpacked, codec=self.codec or "none", dtype=self.dtype.name, shape=self.chunks, at=at)

    @contextlib.contextmanager
    def _chunk_at(self, coords: tuple[int, ...]) -> Iterator[tuple[File, Stored, tuple[int, ...]]]:
        """The file with the chunk at `coords` of the grid over all files, and its place there; damage gets its rows."""
        row = coords[0] * self.chunks[0]
        file = self.acts.files.holding(row)
        stored = file.stored(self.name)
        if stored.alike != self._alike:
            raise FormatError(
                f"{file.path}: layer {self.name} has another shape, type or codec here than in the first shard"
            )
        try:
            yield file, stored, (coords[0] - file.rows.start // self.chunks[0], *coords[1:])
        except DamagedError as error:
            last = min(row + self.chunks[0], file.rows.stop) - 1
            raise DamagedError(f"{file.path}: layer {self.name}, rows {row} to {last}: {error}") from error

    def _paired(self, axes: Sequence[AxisIndex], place: int) -> Array:
        """Several index arrays: paired like numpy's, one chunk along the first of their axes at a time."""
        fixed = [axis for axis, one in enumerate(axes) if not isinstance(one, range)]
        free = [axis for axis, one in enumerate(axes) if isinstance(one, range)]
        try:
            points = np.broadcast_arrays(*(axes[axis] for axis in fixed))
        except ValueError:
            shapes = " ".join(str(np.shape(axes[axis])) for axis in fixed)
            raise IndexError(f"shape mismatch: indexing arrays could not be broadcast together: {shapes}") from None
        shape = points[0].shape
        flat = [np.ascontiguousarray(one).reshape(-1).astype(np.int64) for one in points]
        out = np.empty((len(flat[0]), *(len(axes[axis]) for axis in free)), self.dtype)  # type: ignore[arg-type]
        number = flat[0] // self.chunks[fixed[0]]
        order = np.argsort(number, kind="stable")
        for group in np.split(order, np.flatnonzero(np.diff(number[order])) + 1):
            selections: list[Selection] = [selection_of(one) for one in axes]
            places = []
            for axis, one in zip(fixed, flat, strict=True):
                selections[axis], at = np.unique(one[group], return_inverse=True)
                places.append(at)
            block = np.moveaxis(self._block(selections), fixed, range(len(fixed)))
            out[group] = block[tuple(places)]
        out = out.reshape(shape + out.shape[1:])
        return np.moveaxis(out, range(len(shape)), range(place, place + len(shape)))


def _is_whole(here: slice | Rows, size: int) -> bool:
    return isinstance(here, slice) and here == slice(0, size, 1)


def _merged_stats(layer: Layer, covariance: bool = False) -> dict[str, Array]:
    """Return the statistics of a layer over all rows, empty where there are none.

    Those of several shards are joined one by one, in their order.
    """
    merged: dict[str, Array] = {}
    for file in layer.acts.files:
        part = file.stats(layer.name, covariance)
        if not part:
            return {}
        merged = layer_stats.join(merged, part, f"{file.path}: the statistics of {layer.name}")
    return merged


def _seen(field: Field, cell: tuple[int, int], size: tuple[int, int] | None) -> tuple[float, float, float, float]:
    """Return (left, top, right, bottom) of what a cell sees of the input, clipped to its (height, width) if known."""
    top, left, bottom, right = cell_box(field, cell, size)
    return left, top, right, bottom
