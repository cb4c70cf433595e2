"""Open and check the HDF5 files behind an output once, and read them chunk by chunk."""

from __future__ import annotations

import bisect
import contextlib
import functools
import hashlib
import math
import os
import stat
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt

from fmextract.errors import ConfigError, DamagedError, FormatError
from fmextract.reading.indexing import Array
from fmextract.records import FileInfo, Label, LayerSpec
from fmextract.storage import codecs, contents, layer_stats, layout, schema, writer
from fmextract.storage.columns import decode_column
from fmextract.storage.digest import digest_of_open
from fmextract.storage.layer_stats import COUNTED, Totals
from fmextract.storage.shards import INDEX, PLAN, load_index, load_records, read_sealed
from fmextract.storage.validation import check_heaps, reading

SIGNATURE = b"\x89HDF\r\n\x1a\n"


FILES_OPEN = 32
"""Open shards: each costs one file descriptor and 20 bytes per chunk."""


# ----------------------------------------------------------------------------------------------------------- the files


@dataclass(frozen=True)
class Stored:
    """One layer in one file: where its chunks lie. `codec` None leaves a chunk to libhdf5."""

    spec: LayerSpec
    attrs: Mapping[str, Any]
    codec: str | None
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    masks: npt.NDArray[np.uint32]
    """Filters that were not applied to a chunk, by bit."""

    @property
    def nbytes(self) -> int:
        return int(self.sizes.sum())

    @functools.cached_property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk's values."""
        return math.prod(self.spec.chunk) * np.dtype(self.spec.dtype).itemsize

    @functools.cached_property
    def alike(self) -> tuple[Any, ...]:
        """What all shards of an output have in common."""
        return self.spec.shape, self.spec.dtype, self.spec.chunk, self.codec


class Part(NamedTuple):
    """One file of an output: its rows (all that are there, if None), and its content's digest as the index knows it.

    `own`: this process has just written the file, and trusts what it knows of it.
    """

    path: Path
    rows: range | None = None
    digest: str | None = None
    own: bool = False


class File:
    """One open .h5 file: a descriptor, its names and root attributes, and the layers used so far.

    `rows` are its rows among all that are open. HDF5 itself is open only inside `hdf5()`.
    """

    def __init__(self, part: Part) -> None:
        path, rows, digest, own = part
        self.path = path
        self._lock = threading.Lock()
        self._opening = threading.RLock()
        self._opened: h5py.File | None = None
        self._users = 0
        self._stored: dict[str, Stored] = {}
        self.fd = _descriptor(path)
        weakref.finalize(self, os.close, self.fd)
        self._identity = _identity(self.fd)
        self.nbytes = os.fstat(self.fd).st_size
        check_heaps(self.fd, path)
        with self.hdf5() as file:
            known = writer.take_written(self._identity) if own else None
            self.contents = known.contents if known else contents.validate(file)
            self._totals = known.totals if known else {}
            self.start = int(file["sample"][0])
        if not 0 <= self.start <= schema.LARGEST:
            raise DamagedError(f"{path}: /sample begins at row {self.start}")
        if digest is not None and self.contents.attrs.get("content_digest", digest) != digest:
            raise FormatError(
                f"{path} is another shard than {INDEX} lists, or was replaced since: open the output again,"
                " or verify it"
            )
        count = self.contents.rows
        self.rows = range(count) if rows is None else rows
        if len(self.rows) != count:
            raise FormatError(f"{path} has {count} rows where rows {self.rows.start} to {self.rows.stop - 1} belong")

    @contextlib.contextmanager
    def hdf5(self) -> Iterator[h5py.File]:
        """Open the file in HDF5 for the block. All errors within come out as a FormatError or DamagedError.

        A block within a block uses the same opening: one around many reads opens the file once.
        """
        with reading(self.path):
            with self._opening:
                if self._opened is None:
                    self._opened = self._open_hdf5()
                file = self._opened
                self._users += 1
            try:
                yield file
            finally:
                with self._opening:
                    self._users -= 1
                    if not self._users:
                        self._opened = None
                        file.close()

    def _open_hdf5(self) -> h5py.File:
        file = contents.open_file(self.path)
        if _identity(file.id.get_vfd_handle()) != self._identity:
            file.close()
            raise FormatError(f"{self.path} was replaced or changed since it was opened: open it again")
        return file

    def column(self, name: str) -> Array:
        """Return a column with one entry per row; strings as objects."""
        with self.hdf5() as file:
            dataset = file[name]
            if dataset.chunks is not None:
                self._complete(dataset.id, dataset.shape, dataset.chunks, name)
            strings = h5py.check_string_dtype(dataset.dtype) is not None
            values: Array = np.asarray(dataset.asstr()[:] if strings else dataset[:])
        if name == "sample" and not np.array_equal(values, np.arange(self.start, self.start + len(values))):
            raise DamagedError(f"{self.path}: /sample does not count its rows")
        return values

    def brought(self, name: str | None) -> list[Label]:
        """Return a column that the source brought along; None where there is no value, or no such column."""
        found = self.contents.brought.get(name)
        if found is None:
            return [None] * len(self.rows)
        return decode_column(self.column(found.name), found.form, f"{self.path}: /{found.name}")

    def totals(self, layer: str) -> Totals:
        """Return the counts of a layer. Raises DamagedError where its statistics are missing."""
        if layer in self._totals:
            return self._totals[layer]
        stored = self.stored(layer)
        if stored.spec.channel_axis is None:
            return Totals(stored.nbytes, nonfinite=int(stored.attrs.get("nonfinite", 0)))
        stats = self.stats(layer, only=COUNTED)
        if missing := [name for name in COUNTED if name not in stats]:
            raise DamagedError(f"{self.path}: layer {layer} has no statistics {', '.join(missing)}")
        return Totals.of(stored.nbytes, stats)

    def stats(self, layer: str, covariance: bool = False, only: Iterable[str] | None = None) -> dict[str, Array]:
        """Return the statistics of a layer by name, empty where it has none; its covariance, megabytes, only on demand.

        With `only` the others are not read.
        """
        with self.hdf5() as file:
            path, spec = f"/layers/{layout.escape_name(layer)}/stats", self.contents.layers[layer].spec
            if spec.channel_axis is None:
                return {}
            left_out = () if covariance else layer_stats.COVARIANCE
            channels, values = spec.shape[spec.channel_axis], contents.read_statistics(file, path, left_out, only)
            return schema.statistics(values, channels, f"{self.path}: {path}")

    def coordinates(self, layer: str) -> dict[str, Array]:
        """Return the values of the scales along the axes of a layer, by the axis."""
        with self.hdf5() as file:
            group = file["layers"][layout.escape_name(layer)]
            return {axis: np.asarray(group[axis][()]) for axis in self.contents.layers[layer].spec.axes}

    def content_digest(self) -> str:
        """Return the digest of all that is in the file now, which it stores as `content_digest`."""
        with self.hdf5() as file:
            return digest_of_open(file, {})

    def info(self) -> FileInfo:
        """Return the root attributes as they were written."""
        return contents.info_of(self.contents.attrs, self.contents.said)

    def stored(self, layer: str) -> Stored:
        """Return where the chunks of a layer lie; looked up once."""
        with self._lock:
            if layer not in self._stored:
                with self.hdf5() as file:
                    self._stored[layer] = self._look_up(file, layer)
            return self._stored[layer]

    def read(self, stored: Stored, place: tuple[int, ...], out: Array) -> None:
        """Decode one chunk into `out`, C-contiguous. Raises DamagedError (without saying where), MissingExtra."""
        if stored.codec is None or stored.masks[place]:
            out[...] = self._through_hdf5(stored, place)
        elif stored.codec == "none":
            self._read_at(out, stored, place)
        else:
            payload = self._payload(stored, place)
            with reading(self.path):
                codecs.decode(payload, codec=stored.codec, dtype=stored.spec.dtype, values=out.size, out=out)

    def unpack(self, stored: Stored, place: tuple[int, ...]) -> bytes | Array:
        """Return a chunk as `codecs.unpack` gives it, or its values if libhdf5 must read it. Raises as `read` does."""
        if stored.codec is None or stored.masks[place]:
            return self._through_hdf5(stored, place)
        payload = self._payload(stored, place)
        with reading(self.path):
            return codecs.unpack(payload, codec=stored.codec, nbytes=stored.chunk_bytes)

    def read_rows(self, stored: Stored, place: tuple[int, ...], rows: Sequence[range], out: Array) -> None:
        """Read stretches of rows of an uncompressed chunk, in order. Raises as `read` does."""
        one, at = stored.chunk_bytes // stored.spec.chunk[0], 0
        for some in rows:
            self._read_at(out[at : at + len(some)], stored, place, some.start * one)
            at += len(some)

    def _read_at(self, out: Array, stored: Stored, place: tuple[int, ...], start: int = 0) -> None:
        """Fill `out` with the bytes from `start` on of an uncompressed chunk."""
        size = int(stored.sizes[place])
        if size != stored.chunk_bytes:
            raise DamagedError(f"a chunk of {stored.chunk_bytes} bytes has {size}")
        there = os.preadv(self.fd, [out.data], int(stored.offsets[place]) + start)
        if there != out.nbytes:
            raise DamagedError(f"the file ends within a chunk: {there} of {out.nbytes} bytes are there")

    def _payload(self, stored: Stored, place: tuple[int, ...]) -> bytes:
        """Return the bytes of a chunk as they are in the file."""
        size = int(stored.sizes[place])
        payload = os.pread(self.fd, size, int(stored.offsets[place]))
        if len(payload) != size:
            raise DamagedError(f"the file ends within a chunk: {len(payload)} of {size} bytes are there")
        return payload

    def _through_hdf5(self, stored: Stored, place: tuple[int, ...]) -> Array:
        """Return a chunk with foreign filters, by libhdf5; what lies beyond the last row is not defined."""
        if stored.sizes[place] > codecs.most_stored(stored.chunk_bytes):
            raise DamagedError(f"a chunk of {stored.chunk_bytes} bytes has {stored.sizes[place]}")
        region = tuple(slice(i * n, (i + 1) * n) for i, n in zip(place, stored.spec.chunk, strict=True))
        with self.hdf5() as file:
            values = file["layers"][layout.escape_name(stored.spec.name)]["activation"][region]
        out = np.empty(stored.spec.chunk, stored.spec.dtype)
        out[tuple(map(slice, values.shape))] = values
        return out

    def _look_up(self, file: h5py.File, layer: str) -> Stored:
        # Not by `file[…]`: with many layers h5py's own questions would take most of the time.
        dataset = h5py.h5d.open(file.id, f"/layers/{layout.escape_name(layer)}/activation".encode())
        spec, attrs = self.contents.layers[layer]
        plist, kind = dataset.get_create_plist(), dataset.dtype
        grid = self._complete(dataset, dataset.shape, plist.get_chunk(), f"layer {layer}")
        offsets, sizes, masks = np.zeros(grid, np.int64), np.full(grid, -1, np.int64), np.zeros(grid, np.uint32)

        def note(chunk: Any) -> None:
            place = tuple(i // n for i, n in zip(chunk.chunk_offset, spec.chunk, strict=True))
            offsets[place], sizes[place], masks[place] = chunk.byte_offset, chunk.size, chunk.filter_mask

        dataset.chunk_iter(note)
        if sizes.min() < 0 or offsets.min() < 0 or (offsets + sizes).max() > self.nbytes:
            raise DamagedError(f"{self.path}: layer {layer} has chunks that lie outside the file")
        codec = codecs.filters_to_codec(plist, kind.itemsize) if kind.isnative else None
        return Stored(spec, attrs, codec, offsets, sizes, masks)

    def _complete(
        self, dataset: h5py.h5d.DatasetID, shape: tuple[int, ...], chunk: tuple[int, ...], name: str
    ) -> tuple[int, ...]:
        """Return the grid of chunks of a dataset. Raises DamagedError for a missing one: HDF5 gives fill values."""
        grid = layout.chunk_grid(shape, chunk)
        there = dataset.get_num_chunks()
        if there != math.prod(grid):
            raise DamagedError(f"{self.path}: {name} has {there} of {math.prod(grid)} chunks")
        return grid


class Files:
    """The files of an output in the order of their rows; a bounded number of them is open at a time."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = list(parts)
        self._open: OrderedDict[int, File] = OrderedDict()
        self._lock = threading.Lock()
        self.closed = False
        if len(self._parts) == 1:
            self._parts = [self._parts[0]._replace(rows=self[0].rows)]
        self.starts = [part.rows.start for part in self._parts if part.rows is not None]
        self.rows = max((part.rows.stop for part in self._parts if part.rows is not None), default=0)

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, number: int) -> File:
        with self._lock:
            if self.closed:
                raise ConfigError(f"{self._parts[0].path} was closed: open it again")
            if number not in self._open:
                self._open[number] = File(self._parts[number])
            self._open.move_to_end(number)
            if len(self._open) > FILES_OPEN:
                self._open.popitem(last=False)  # closed when the last thread that reads from it has dropped it
            return self._open[number]

    def __iter__(self) -> Iterator[File]:
        return (self[number] for number in range(len(self)))

    def holding(self, row: int) -> File:
        """Return the file that holds a row."""
        return self[bisect.bisect_right(self.starts, row) - 1]

    def content(self) -> str:
        """Return the digests that tell this output from another one at its path. Raises ConfigError if it is closed."""
        first = self[0].contents.attrs.get("content_digest")
        return hashlib.sha256(repr([first, *(part.digest for part in self._parts)]).encode()).hexdigest()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        with self[0].hdf5() if len(self) == 1 else contextlib.nullcontext():
            yield

    def close(self) -> None:
        with self._lock:
            self.closed = True
            self._open.clear()


def _descriptor(path: Path) -> int:
    """Return an open descriptor of a file that starts like HDF5. Raises FormatError."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise FormatError(f"{path} is not a regular file")
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        partial = path.with_name(path.name + ".partial")
        if (partial / PLAN).exists():
            raise _in_progress(partial, path) from None
        raise FormatError(f"no such file or directory: {path}") from None
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read: {error}") from error
    if os.pread(fd, len(SIGNATURE), 0) != SIGNATURE:
        os.close(fd)
        raise FormatError(f"{path} is not an HDF5 file")
    return fd


def _identity(fd: int) -> tuple[int, ...]:
    """Return what changes when the content of a path does."""
    return writer.file_identity(os.fstat(fd))


def listed_shards(folder: Path) -> list[Part]:
    """Return the shards of a finished directory. Raises FormatError for one that is not finished, or not ours."""
    if not (folder / INDEX).exists() and (folder / PLAN).exists():
        raise _in_progress(folder, folder)
    records = load_index(folder)
    if not records:
        raise FormatError(f"{folder}: index.json lists no shards")
    return [Part(folder / record.name, record.rows, record.content_digest) for record in records]


def _in_progress(folder: Path, output: Path) -> FormatError:
    """Return the words for a run in progress, or one that was ended: how many rows are stored, not only shards."""
    with reading(folder):
        records = load_records(folder)
        shards = [range(*ends) for ends in read_sealed(folder / PLAN)["shards"]]
        rows, total = sum(len(record.rows) for record in records), sum(map(len, shards))
        failed = sum(record.failed for record in records)
    said = f"{rows:,} of {total:,} images are stored" + (f", {failed:,} of them failed" if failed else "")
    return FormatError(
        f"{output} is a run in progress: {said} ({len(records)} of {len(shards)} shards). "
        "The same extract command resumes it"
    )
