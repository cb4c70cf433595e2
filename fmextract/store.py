"""One HDF5 file: the activations of a range of rows, and everything a reader needs to make sense of them.

This is the only module that writes HDF5. Chunks arrive compressed (`codecs.encode`) and are put into the file as they
are, past libhdf5's filters and its global lock; what lies in the file is plain HDF5 and valid netCDF-4. The layout is
described in docs/reference/format.md. One thread at a time may use a ShardWriter.

    ShardWriter      chunks → file                   content_digest   file → one number for all that a reader sees
    pack             files → one file, undecoded     validate         is this file ours, and safe to read?
    open_shard       path → validated h5py.File      read_*           file → the nouns of `records`
                                                     `validate` gives `Contents`: what it checked on the way
    write_rdms       dissimilarities → a file of rsatoolbox's
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import h5py
import numpy as np

from fmextract.codecs import (
    CODECS,
    MOST_CHUNK_BYTES,
    Array,
    Codec,
    Stored,
    codec_named,
    encode,
    fill_value,
    filters_flaw,
    most_stored,
)
from fmextract.errors import DamagedError, FmextractError, FormatError, LayerError, NoSpace, OutputError
from fmextract.moments import COVARIANCE
from fmextract.records import (
    FORMAT,
    FORMAT_VERSION,
    STATUS_MEANINGS,
    Field,
    FileInfo,
    FileStamp,
    Label,
    LayerSpec,
    SampleTable,
    Status,
)
from fmextract.storage import objects, schema
from fmextract.storage.columns import Form, common_form, decode_column, encode_column, form_of, stored_names
from fmextract.storage.objects import Values

Forms: TypeAlias = Mapping[str | None, Form | None]
"""Of the columns that a source brought along, by their names; None is the labels'. A form of None: it has no value."""
Stats: TypeAlias = Mapping[str, Mapping[str, Any]]
"""By layer, by statistic: an array whose first axis is the channel."""

MAX_LAYERS = 4000
"""One dimension scale can be attached to about 4,085 datasets, and /sample is the scale of every layer."""
MAX_NAME = 255
"""Bytes in a name that netCDF-C can open (measured: 256 fail)."""
MAX_CHUNK_BYTES = MOST_CHUNK_BYTES
COLUMN_CHUNK = 4096
_CHUNK_RECORD_BYTES = 24
"""What one chunk takes at the least in an HDF5 index: so a small file cannot claim a huge shape."""
_LIBVER = ("earliest", "v110")
INFLATION = 1100
"""No deflate stream grows by more (1032): a file that claims more values than this times its size is damaged."""
_NOT_CONTENT = ("content_digest", "throughput")
"""Root attributes that say nothing of what is stored: two runs that store the same differ in their speed."""


# ---------------------------------------------------------------------------------------------------- names and errors


def escape_name(name: str) -> str:
    """The group name of a layer: `/` would nest, so it becomes %2F, and % itself %25."""
    return name.replace("%", "%25").replace("/", "%2F")


def unescape_name(name: str) -> str:
    """The inverse of `escape_name`."""
    return name.replace("%2F", "/").replace("%25", "%")


def disk_error(path: Path, error: BaseException) -> FmextractError:
    """What an error of the operating system or of libhdf5 while writing `path` means to the user."""
    code = getattr(error, "errno", None)
    if code is None and (stated := re.search(r"errno = (\d+)", str(error))):
        code = int(stated[1])
    if code in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(
            f"{path.parent} is full: {path.name} was not finished. Make room and run the same command again."
        )
    reason = os.strerror(code) if code else str(error)
    return OutputError(f"cannot write {path}: {reason}")


def chunk_digest(payload: Stored) -> bytes:
    """XXH3 (128 bits) of one stored chunk.

    It tells damage, not forgery, and takes no time: BLAKE2b of the same bytes would be a fifth of the work of the
    encoder (docs/measurements). The SHA-256 of a shard of a directory stands in its record.
    """
    import xxhash  # here, so that reading a file needs nothing but numpy and h5py

    return xxhash.xxh3_128_digest(payload)


# ------------------------------------------------------------------------------------------------------------- writing


class ShardWriter:
    """Writes one file. `write_chunk` for every chunk of every layer, then `finish`; `abort` at any time.

    `path` is a temporary name: publishing it is `index.publish`. Any error leaves no file.
    """

    def __init__(
        self,
        path: Path,
        rows: range,
        layers: Sequence[LayerSpec],
        info: FileInfo,
        codec: str,
        level: int | None,
    ) -> None:
        """Create `path` for the global row numbers `rows` (at least one). Raises LayerError, NoSpace, OutputError."""
        if not len(rows) or rows.step != 1:
            raise ValueError(f"expected a range of at least one row with step 1, got {rows}")
        _check_layers(layers)
        chosen = codec_named(codec)
        level = chosen.checked_level(level)
        self._pipeline = (chosen, level)
        self.path = Path(path)
        self.rows = rows
        self.layers = tuple(layers)
        self._grids = [chunk_grid((len(rows), *spec.shape), spec.chunk) for spec in layers]
        self._digests: list[dict[tuple[int, ...], bytes]] = [{} for _ in layers]
        self._file: h5py.File | None = None
        self._disk: _SteadyFile | None = None
        with self._whole_or_nothing():
            self._disk = _SteadyFile(self.path)
            self._file = h5py.File(self._disk, "w", libver=_LIBVER, track_order=True)
            objects.set_attributes(self._file.id, _root_attrs(info))
            _create_sample_scale(self._file, rows)
            group = self._file.create_group("layers", track_order=True)
            self._activations = [_create_layer(group, spec, len(rows), chosen, level) for spec in layers]
            self._check_disk()

    @classmethod
    def reopened(cls, left: Unfinished) -> ShardWriter:
        """Goes on where another left, with all chunks written. Raises NoSpace, OutputError."""
        self = cls.__new__(cls)
        self.path, self.rows, self.layers = left.path, left.rows, left.layers
        self._grids = [chunk_grid((len(left.rows), *spec.shape), spec.chunk) for spec in left.layers]
        self._digests, self._activations = list(left.digests), []
        self._pipeline = (codec_named(left.codec), left.level)
        self._file = self._disk = None
        with self._whole_or_nothing():
            self._disk = _SteadyFile(self.path, "r+b")
            self._file = h5py.File(self._disk, "r+", libver=_LIBVER)
        return self

    def write_chunk(self, layer: int, chunk_index: tuple[int, ...], payload: Stored, digest: bytes) -> None:
        """Put an encoded chunk in its place. `chunk_index` counts chunks; `digest` is `chunk_digest(payload)`."""
        spec, grid, done = self.layers[layer], self._grids[layer], self._digests[layer]
        if len(chunk_index) != len(grid) or not all(0 <= i < n for i, n in zip(chunk_index, grid, strict=True)):
            raise ValueError(f"{spec.name}: expected a chunk index within {grid}, got {chunk_index}")
        if chunk_index in done:
            raise ValueError(f"{spec.name}: chunk {chunk_index} is written twice")
        with self._whole_or_nothing():
            offset = tuple(i * size for i, size in zip(chunk_index, spec.chunk, strict=True))
            self._activations[layer].write_direct_chunk(offset, payload)
            self._check_disk()
        done[chunk_index] = digest

    def finish(
        self,
        samples: SampleTable,
        stats: Stats | None = None,
        layer_attrs: Mapping[str, Mapping[str, Any]] | None = None,
        root_attrs: Mapping[str, Any] | None = None,
        durable: bool = True,
    ) -> str:
        """Write what stands beside the activations, close, make durable. Returns the content digest, in hex.

        `stats` and `layer_attrs` are by the layer's name; `root_attrs` is what only the end of a shard knows of it.
        `durable` False leaves the last to whoever gives the file its name (`index.publish`).
        Raises ValueError where a chunk is missing, or the columns do not fit the rows.
        """
        if len(samples) != len(self.rows) or samples.start != self.rows.start:
            raise ValueError(f"expected columns for rows {self.rows}, got {len(samples)} from {samples.start}")
        with self._whole_or_nothing():
            objects.set_attributes(self._open_file().id, root_attrs or {})
        return self._finish([samples], _forms_of(samples), stats, layer_attrs, durable)

    def _finish(
        self,
        tables: Iterable[SampleTable],
        forms: Forms,
        stats: Stats | None,
        layer_attrs: Mapping[str, Mapping[str, Any]] | None,
        durable: bool = True,
    ) -> str:
        with self._whole_or_nothing():
            file = self._open_file()
            for spec, grid, done in zip(self.layers, self._grids, self._digests, strict=True):
                if len(done) != math.prod(grid):
                    raise ValueError(
                        f"{spec.name}: {math.prod(grid) - len(done)} of {math.prod(grid)} chunks are missing"
                    )
            written = self._write_layers(file, stats or {}, layer_attrs or {})
            _write_columns(file, len(self.rows), tables, forms)
            digest = _content_digest(file, written)
            file.attrs["content_digest"] = digest
            contents = _contents_of_own(file, written)
            self._activations.clear()
            file.close()
            self._file = None
            self._check_disk()
            assert self._disk is not None
            self._disk.close()
            self._disk = None
            if durable:
                _fsync(self.path)
            _last_written[:] = [(file_identity(self.path.stat()), contents)]
        return digest

    def _write_layers(
        self, file: h5py.File, stats: Stats, layer_attrs: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, _Layer]:
        """What stands beside the activations of each layer; gives what is there now, by path."""
        names = {spec.name for spec in self.layers}
        if unknown := [name for name in (*stats, *layer_attrs) if name not in names]:
            raise ValueError(f"expected statistics and attributes of the layers of this file, got {unknown[0]!r}")
        codec, level = self._pipeline
        written: dict[str, _Layer] = {}
        on_samples: dict[str, objects.Entries] = {"/sample": []}
        samples = {"/sample": file["sample"].id}
        for spec, digests in zip(self.layers, self._digests, strict=True):
            path = f"/layers/{escape_name(spec.name)}"
            own = {name: value for name, value in layer_attrs.get(spec.name, {}).items() if value is not None}
            beside = list(_statistics(path, spec, stats[spec.name])) if spec.name in stats else None
            attrs, filters = {**_layer_attrs(spec), **own}, codec.filters(np.dtype(spec.dtype).itemsize, level)
            layer = _Layer(path, spec, len(self.rows), filters, attrs, _scales(spec), beside, digests)
            # Layer by layer: so that no more are open at a time than those of one.
            objects.attach_scales(file, layer.attached(), samples | layer.write(file), on_samples)
            written[path] = layer
        objects.write_references(file, on_samples)
        return written

    def leave(self) -> Unfinished:
        """Close the file, with its chunks, for `Unfinished.finish`, perhaps in another process. `abort` removes it."""
        with self._whole_or_nothing():
            self._activations.clear()
            self._open_file().close()
            self._check_disk()
            assert self._disk is not None
            self._disk.close()
        self._file = None
        codec, level = self._pipeline
        return Unfinished(self.path, self.rows, self.layers, self._digests, codec.name, level)

    def chunk_digests(self) -> dict[str, str]:
        """By layer: the first 16 hex digits of the digest of every chunk, one after the other in C order."""
        return {
            spec.name: "".join(done[place].hex()[:16] for place in np.ndindex(grid))
            for spec, grid, done in zip(self.layers, self._grids, self._digests, strict=True)
        }

    def abort(self) -> None:
        """Close and remove the file, if it is not finished. May be called again."""
        file, self._file = self._file, None
        disk, self._disk = self._disk, None
        if disk is None:
            return
        disk.drop()
        with contextlib.suppress(OSError):  # the disk may have become read-only: what went wrong first is told
            self.path.unlink(missing_ok=True)
        self._activations = []
        with contextlib.suppress(Exception):
            if file is not None:
                file.close()
        disk.close()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.abort()

    def _check_disk(self) -> None:
        if self._disk is not None:
            self._disk.check()

    def _open_file(self) -> h5py.File:
        if self._file is None:
            raise ValueError(f"{self.path} is closed")
        return self._file

    @contextlib.contextmanager
    def _whole_or_nothing(self) -> Iterator[None]:
        """Turn errors of the disk into ours; after any error there is no file."""
        try:
            yield
        except BaseException as error:
            cause: BaseException = error
            if isinstance(error, Exception) and self._disk is not None:
                cause = self._disk.error or error  # what libhdf5 says of a file that is not all there means little
            self.abort()
            if isinstance(cause, OSError | RuntimeError):
                raise disk_error(self.path, cause) from error
            raise


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A file that holds its chunks and lacks what stands beside them; nothing has it open."""

    path: Path
    rows: range
    layers: tuple[LayerSpec, ...]
    digests: Sequence[dict[tuple[int, ...], bytes]]
    codec: str
    level: int

    def finish(
        self,
        samples: SampleTable,
        stats: Stats | None = None,
        layer_attrs: Mapping[str, Mapping[str, Any]] | None = None,
        root_attrs: Mapping[str, Any] | None = None,
    ) -> str:
        """What `ShardWriter.finish` does, but for making it durable. Raises as that does, and leaves no file then."""
        with ShardWriter.reopened(self) as writer:
            return writer.finish(samples, stats, layer_attrs, root_attrs, durable=False)


class _SteadyFile:
    """A file as h5py takes one, in which writing never fails: the first error is kept, and what follows is dropped.

    libhdf5 writes when it closes an object, where an error cannot be raised; and once that has failed, as on a full
    disk, it goes on with freed memory and crashes the process (measured, HDF5 2.0). So it is not told.
    """

    def __init__(self, path: Path, mode: str = "w+b") -> None:
        self._raw = path.open(mode, buffering=0)
        self._at = 0  # kept here, since each call to the system gives the interpreter's lock away and waits for it
        self.error: OSError | None = None
        self._dropping = False

    def write(self, data: memoryview) -> int:
        view = memoryview(data)
        done = 0
        try:
            while not self._dropping and done < len(view):
                done += os.pwrite(self._raw.fileno(), view[done:], self._at + done)
        except OSError as error:
            self.error, self._dropping = error, True
        self._at += len(view)
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        if not self._dropping:
            try:
                return self._raw.truncate(self._at if size is None else size)
            except OSError as error:
                self.error, self._dropping = error, True
        return size or 0

    def read(self, size: int = -1) -> bytes:
        rest = max(0, os.fstat(self._raw.fileno()).st_size - self._at)
        data = os.pread(self._raw.fileno(), size if size >= 0 else rest, self._at)
        self._at += len(data)
        return data

    def readinto(self, buffer: memoryview) -> int:
        count = os.preadv(self._raw.fileno(), [buffer], self._at)
        self._at += count
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at}
        self._at = offset + (start[whence] if whence in start else os.fstat(self._raw.fileno()).st_size)
        return self._at

    def tell(self) -> int:
        return self._at

    def flush(self) -> None: ...

    def check(self) -> None:
        """Raises the OSError that stopped the writing, if one did."""
        if self.error is not None:
            raise self.error

    def drop(self) -> None:
        """Nothing that comes from now on is written."""
        self._dropping = True

    def close(self) -> None:
        self._raw.close()


def chunk_grid(shape: Sequence[int], chunk: Sequence[int]) -> tuple[int, ...]:
    """How many chunks there are along each axis."""
    return tuple(-(-size // step) for size, step in zip(shape, chunk, strict=True))


def _check_layers(layers: Sequence[LayerSpec]) -> None:
    if len(layers) > MAX_LAYERS:
        raise LayerError(f"one file holds at most {MAX_LAYERS} layers, got {len(layers)}; select fewer, or run twice")
    names: set[str] = set()
    for spec in layers:
        group = escape_name(spec.name)
        if not group or group in (".", "..") or "\0" in group:
            raise LayerError(f"{spec.name!r} cannot be the name of a layer in a file")
        if len(group.encode()) > MAX_NAME:
            raise LayerError(f"the layer name {spec.name!r} is longer than the {MAX_NAME} bytes that netCDF allows")
        if group in names:
            raise LayerError(f"the layer {spec.name!r} is there twice")
        names.add(group)
        reserved = {"sample", "activation", "stats"}.intersection(spec.axes)
        if reserved or len(set(spec.axes)) != len(spec.axes):
            raise LayerError(f"{spec.name}: expected axes with different names other than sample, got {spec.axes}")
        if (
            any(not 0 < part <= size for part, size in zip(spec.chunk[1:], spec.shape, strict=True))
            or spec.chunk[0] < 1
        ):
            raise LayerError(f"{spec.name}: expected a chunk within the shape {spec.shape}, got {spec.chunk}")
        if np.dtype(spec.dtype).kind not in "fiu":
            raise LayerError(f"{spec.name}: values of type {spec.dtype} cannot be stored")
        if math.prod(spec.chunk) * np.dtype(spec.dtype).itemsize > MAX_CHUNK_BYTES:
            raise LayerError(f"{spec.name}: a chunk {spec.chunk} of {spec.dtype} is larger than 1 GiB")


def _root_attrs(info: FileInfo) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "Conventions": "CF-1.11",
        "title": info.title,
        "source": info.source,
        "history": info.history,
        "fmextract_config": info.config,
        "model": info.model,
        "weights_sha256": info.weights_sha256,
        "preprocess": info.preprocess,
        "precision": info.precision,
        "versions": info.versions,
        "created": info.created,
        **info.extra,
    }


_FIELD_FLAGS = {"bound": "bound", "whole": "whole", "global": "has_global"}
"""What an attribute `rf_…` says of a field by being there, and the name of it in `records.Field`."""


def _layer_attrs(spec: LayerSpec) -> dict[str, Any]:
    attrs = {
        "module": spec.module,
        "module_type": spec.module_type,
        "call": spec.call,
        "calls": spec.calls,
        "number": spec.number or None,
        "tap": spec.tap,
        "member": spec.member or None,
        "reducer": spec.reducer or None,
        "compute_dtype": spec.compute_dtype,
        "mantissa": spec.mantissa,
        "copied": spec.copied,
        "rel_error": spec.rel_error,
    }
    if spec.field is not None:
        attrs |= {f"rf_{name}": getattr(spec.field, name) for name in ("size", "stride", "offset")}
        attrs |= {f"rf_{flag}": getattr(spec.field, name) or None for flag, name in _FIELD_FLAGS.items()}
    attrs["erf_size"] = spec.erf_size
    attrs["near_zero_below"] = spec.near_zero_below
    return attrs


def _create_dataset(
    group: h5py.h5g.GroupID,
    name: str,
    shape: tuple[int, ...],
    dtype: Any,
    chunk: tuple[int, ...],
    filters: Sequence[tuple[int, tuple[int, ...]]],
) -> h5py.h5d.DatasetID:
    """A chunked dataset with an unlimited first axis. Low level, since a filter need not be installed to be named."""
    plist = objects.creation()
    plist.set_chunk(chunk)
    if h5py.check_string_dtype(np.dtype(dtype)) is None:
        plist.set_fill_value(np.asarray(fill_value(dtype)))
    for number, options in filters:
        plist.set_filter(number, h5py.h5z.FLAG_OPTIONAL, options)
    space = h5py.h5s.create_simple(shape, (h5py.h5s.UNLIMITED, *shape[1:]))
    return h5py.h5d.create(group, name.encode(), objects.kind_of(np.dtype(dtype))[0], space, plist)


def _create_column(file: h5py.File, name: str, rows: int, dtype: Any, each: tuple[int, ...] = ()) -> h5py.Dataset:
    """One value a row, or values of the shape `each`."""
    kind = np.dtype(dtype)
    # netCDF knows no filters on strings of variable length.
    filters = () if h5py.check_string_dtype(kind) else CODECS["gzip"].filters(kind.itemsize)
    together = max(1, min(rows, COLUMN_CHUNK // math.prod(each)))
    column = h5py.Dataset(_create_dataset(file.id, name, (rows, *each), kind, (together, *each), filters))
    if name != "sample":
        column.dims[0].attach_scale(file["sample"])
    return column


def _create_sample_scale(file: h5py.File, rows: range) -> None:
    scale = _create_column(file, "sample", len(rows), np.int64)
    for at in range(0, len(rows), 1 << 20):
        part = rows[at : at + (1 << 20)]
        scale[at : at + len(part)] = np.arange(part.start, part.stop, dtype=np.int64)
    scale.make_scale("sample")
    scale.attrs["long_name"] = "row number in the whole source"


def _create_layer(group: h5py.Group, spec: LayerSpec, rows: int, codec: Codec, level: int) -> h5py.h5d.DatasetID:
    """The group of a layer with its activations."""
    layer = objects.create_group(group.id, escape_name(spec.name))
    filters = codec.filters(np.dtype(spec.dtype).itemsize, level)
    return _create_dataset(layer, "activation", (rows, *spec.shape), spec.dtype, spec.chunk, filters)


def _scales(spec: LayerSpec) -> list[Values]:
    """Of the axes behind the first."""
    made = []
    for role, size in zip(spec.axes, spec.shape, strict=True):
        values, attrs = coordinate(spec.field, role, size)
        made.append(Values(role, values, attrs=attrs))
    return made


def coordinate(field: Field | None, role: str, size: int) -> tuple[Array, dict[str, str]]:
    """The values along an axis: the centre of each cell's receptive field for y and x, else the index."""
    if role not in ("y", "x"):
        return np.arange(size, dtype=np.int32), {}
    index = np.arange(size, dtype=np.float64)
    if field is None:
        return index, {"long_name": "index"}
    along = ("y", "x").index(role)
    centres = field.offset[along] + index * field.stride[along]
    return centres, {"long_name": "centre of the receptive field", "units": "pixel"}


def _forms_of(samples: SampleTable) -> Forms:
    """Of the columns that the source brought along."""
    return {name: form_of(values) for name, values in _brought(samples)}


def _brought(samples: SampleTable) -> Iterator[tuple[str | None, Sequence[Label] | None]]:
    """The labels, whose name is None, and the other columns by their names."""
    yield None, samples.labels
    yield from samples.columns.items()


def _write_columns(file: h5py.File, rows: int, tables: Iterable[SampleTable], forms: Forms) -> None:
    columns = {
        name: _create_column(file, name, rows, dtype)
        for name, dtype in (
            ("key", objects.TEXT),
            ("status", np.uint8),
            ("message", objects.TEXT),
            ("height", np.int32),
            ("width", np.int32),
            ("file_size", np.int64),
            ("file_digest", objects.TEXT),
        )
    }
    objects.set_attributes(columns["key"].id, {"long_name": "path or name of the image in its source"})
    flags = np.arange(len(STATUS_MEANINGS), dtype=np.uint8)
    objects.set_attributes(columns["status"].id, {"flag_values": flags, "flag_meanings": " ".join(STATUS_MEANINGS)})
    for name in ("height", "width"):
        objects.set_attributes(columns[name].id, {"long_name": f"{name} of the original image", "units": "pixel"})
    sizes, digests = columns["file_size"].id, columns["file_digest"].id
    objects.set_attributes(sizes, {"long_name": "size of the file that the row was made of", "units": "byte"})
    objects.set_attributes(digests, {"long_name": "XXH3 (128 bits) of the file that the row was made of"})
    brought = _create_brought(file, rows, forms)
    at = 0
    for table in tables:
        part = slice(at, at + len(table))
        columns["key"][part] = [objects.text(key) for key in table.keys]
        columns["status"][part] = table.status
        columns["message"][part] = [objects.text(message) for message in table.message]
        columns["height"][part] = table.height
        columns["width"][part] = table.width
        columns["file_size"][part] = [stamp.size for stamp in table.files]
        columns["file_digest"][part] = [stamp.digest for stamp in table.files]
        for title, (column, form) in brought.items():
            values = table.labels if title is None else table.columns.get(title)
            stored = encode_column([None] * len(table) if values is None else values, form)
            column[part] = list(map(objects.text, stored)) if isinstance(stored, list) else stored
        at = part.stop
    if at != rows:
        raise ValueError(f"expected columns of {rows} rows, got {at}")


def _create_brought(file: h5py.File, rows: int, forms: Forms) -> dict[str | None, tuple[h5py.Dataset, Form]]:
    """The datasets of the columns that the source brought along, by their names; None is the labels'."""
    names = stored_names(name for name in forms if name is not None)
    made: dict[str | None, tuple[h5py.Dataset, Form]] = {}
    for title, form in forms.items():
        if form is None:
            continue
        name = "label" if title is None else names[title]
        kind = objects.TEXT if form.dtype is None else form.dtype
        column = _create_column(file, name, rows, kind, () if form.length is None else (form.length,))
        if form.length is not None:
            index = objects.create(file.id, Values(f"{name}_index", np.arange(form.length, dtype=np.int32)))
            h5py.h5ds.attach_scale(column.id, index, 1)
        # Labels are -1 for none unless one of them is -1; every reader that knows netCDF sees gaps in other columns.
        marks = form.kind == "int" and (form.missing != -1 or (form.gaps and title is not None))
        attrs = {"column": title, "encoding": "json" if form.kind == "json" else None}
        objects.set_attributes(column.id, {**attrs, "_FillValue": np.int64(form.missing) if marks else None})
        made[title] = column, form
    return made


def _statistics(layer: str, spec: LayerSpec, arrays: Mapping[str, Any]) -> Iterator[Values]:
    """`stats/`: one dataset a statistic, over the channels, or over the channels and a second axis.

    The second axis of `top_…` is `k`, that of any other statistic is its own `<name>_bin`. Of the covariance the first
    axis is not the channel, but the `component`. `layer` is the path of the layer's group.
    """
    if spec.channel_axis is None:
        raise ValueError(f"{spec.name}: no statistics by channel where the axes have no known roles")
    lengths = {f"{layer}/{spec.axes[spec.channel_axis]}": spec.shape[spec.channel_axis]}
    (channel,) = lengths
    for name, values in arrays.items():
        array = np.asarray(values)
        array = array.astype(np.uint8) if array.dtype == bool else array
        seconds = "k" if name.startswith("top_") else f"{name}_bin"
        scales = [f"{layer}/stats/component" if name in COVARIANCE else channel, f"{layer}/stats/{seconds}"]
        scales = scales[: max(1, array.ndim)]
        new = {path: size for path, size in zip(scales, array.shape, strict=False) if path not in lengths}
        lengths |= new
        if array.ndim not in (1, 2) or array.dtype.kind not in "iuf" or "/" in name or lengths[scales[0]] != len(array):
            expected = f"{name} of {lengths[scales[0]]} channels"
            raise ValueError(f"{spec.name}: expected {expected}, got {array.dtype} {array.shape}")
        if lengths[scales[-1]] != array.shape[-1]:
            raise ValueError(f"{spec.name}: expected {lengths[scales[-1]]} entries in {name}, got {array.shape[1]}")
        made = [Values(path.rpartition("/")[2], np.arange(size, dtype=np.int32)) for path, size in new.items()]
        first = [scale for scale in made if scale.name == "component"]
        yield from (*first, Values(name, array, tuple(scales)), *(scale for scale in made if scale not in first))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------- other forms


def write_rdms(
    path: Path,
    layers: Mapping[str, Iterable[Array]],
    pairs: int,
    measure: str,
    descriptors: Mapping[str, str],
    patterns: Mapping[str, Array | Sequence[str]],
) -> None:
    """Dissimilarity matrices as rsatoolbox's `RDMs.save` lays them out, and its `load_rdm` reads them.

    `layers` gives, by name, the `pairs` values of one matrix in parts, float64; `patterns` one entry an image. `path`
    is a temporary name. Texts are attributes: in datasets rsatoolbox would take them for ASCII. Raises NoSpace,
    OutputError.
    """
    try:
        disk = _SteadyFile(path)
    except OSError as error:
        raise disk_error(path, error) from error
    file = h5py.File(disk, "w", libver=_LIBVER, track_order=True)
    try:
        objects.set_attributes(file.id, {"dissimilarity_measure": measure})
        groups = {
            "descriptors": descriptors,
            "rdm_descriptors": {"layer": list(layers)},
            "pattern_descriptors": patterns,
        }
        for name, entries in groups.items():
            group = file.create_group(name, track_order=True)
            for key, value in entries.items():
                if isinstance(value, np.ndarray):
                    group.create_dataset(key, data=value)
                else:
                    texts = objects.text(value) if isinstance(value, str) else [objects.text(text) for text in value]
                    group.attrs.create(key, texts, dtype=objects.TEXT)
        data = file.create_dataset("dissimilarities", (len(layers), pairs), np.float64)
        for matrix, parts in enumerate(layers.values()):
            at = 0
            for part in parts:
                data[matrix, at : at + len(part)] = part
                at += len(part)
                disk.check()
            if at != pairs:
                raise ValueError(f"expected {pairs} pairs, got {at}")
        file.close()
        disk.check()
        _fsync(path)
    except BaseException:
        disk.drop()
        with contextlib.suppress(Exception):
            file.close()
        if disk.error is not None:
            raise disk_error(path, disk.error) from disk.error
        raise
    finally:
        disk.close()


# ------------------------------------------------------------------------------------------------------------- reading


def open_shard(path: Path) -> h5py.File:
    """Open a file for reading and `validate` it. Raises FormatError; OutputError where there is no file."""
    path = Path(path)
    if not path.is_file():
        raise OutputError(f"there is no file {path}")
    try:
        file = h5py.File(path, "r", locking=False)
    except OSError as error:
        raise FormatError(f"{path} is not an HDF5 file, or its beginning is damaged") from error
    try:
        validate(file)
    except BaseException:
        file.close()
        raise
    return file


@contextlib.contextmanager
def _reading(file: h5py.File, place: str | Callable[[], str] = "") -> Iterator[None]:
    """What libhdf5 raises on damaged bytes, in many types, becomes DamagedError."""
    try:
        yield
    except FmextractError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError, AttributeError) as error:
        said = place if isinstance(place, str) else place()
        where = f"{file.filename}: {said}" if said else file.filename
        raise DamagedError(f"{where} is damaged: {str(error) or type(error).__name__}") from error


class LayerContents(NamedTuple):
    """What a file says of a layer: as it was written, and all attributes by name, those of later versions too."""

    spec: LayerSpec
    attrs: Mapping[str, Any]


class Brought(NamedTuple):
    """A column that the source brought along: the name of its dataset, and its form."""

    name: str
    form: Form


@dataclass(frozen=True, slots=True)
class Contents:
    """What `validate` found in a file: all that is not the values of datasets.

    `attrs` are the root attributes; `said` is what those of them mean that hold JSON. `columns` are the names of the
    datasets beside the layers, `brought` those that the source brought along, by the source's names for them (None is
    the labels'); `layers` are the layers by name in the order of execution.
    """

    rows: int
    attrs: Mapping[str, Any]
    said: Mapping[str, Any]
    columns: frozenset[str]
    brought: Mapping[str | None, Brought]
    layers: Mapping[str, LayerContents]


_last_written: list[tuple[tuple[int, ...], Contents]] = []
"""What the file is that this process finished last, and what it put there: at most one."""


def file_identity(have: os.stat_result) -> tuple[int, ...]:
    """What changes when the content of a path does."""
    return have.st_dev, have.st_ino, have.st_size, have.st_mtime_ns


def take_written(identity: tuple[int, ...]) -> Contents | None:
    """What `validate` would find in the file that this process finished last, once; None where it is another file."""
    known = dict(_last_written)
    _last_written.clear()
    return known.get(identity)


def validate(file: h5py.File) -> Contents:
    """Raise FormatError unless the file is of our format and version, and safe to read: then, what stands in it.

    Safe: nothing in it points outside (external or soft links, external storage, virtual datasets), no object is
    reached twice, every chunk is of bounded size, the shapes are ones that the file has room for, and everything that
    is read of it, but for the values of datasets, is what `storage.schema` says. Damaged structures are DamagedError.
    """
    with _reading(file):
        _validate_version(file)
        seen: set[int] = set()
        nodes = {node.path: node for node in _sound(file, _top(file), seen, {"/layers"})}
        return _contents(file, nodes, partial(_found_layers, file, seen))


def _sound(file: h5py.File, top: _Node, seen: set[int], closed: Container[str] = ()) -> Iterator[_Node]:
    """What `_walk` finds, each dataset checked."""
    name, size, based = file.filename, file.id.get_filesize(), file.userblock_size > 0
    node = top
    with _reading(file, lambda: node.path):
        for node in _walk(file, top, seen, closed):
            if node.is_dataset and (based or not _is_plain(node.id)):
                _validate_dataset(name, node, size)
            yield node


def _validate_version(file: h5py.File) -> None:
    name, root = file.filename, _root(file)
    said = {}
    for attribute in ("format", "format_version"):
        with contextlib.suppress(schema.Wrong, KeyError):
            said[attribute] = schema.attribute(root, attribute.encode())
    if said.get("format") != FORMAT:
        raise FormatError(f"{name} was not written by fmextract: it has no attribute format={FORMAT!r}")
    version = said.get("format_version")
    if type(version) is not int or version < 1:
        raise FormatError(f"{name} has no valid format_version: {version!r}")
    if version > FORMAT_VERSION:
        raise FormatError(
            f"{name} has format version {version}, and this fmextract knows versions up to {FORMAT_VERSION}: "
            "upgrade fmextract to read it"
        )


def _root(file: h5py.File) -> h5py.h5g.GroupID:
    return h5py.h5o.open(file.id, b"/")


def _top(file: h5py.File) -> _Node:
    root = _root(file)
    return _Node("/", root, h5py.h5o.get_info(root).addr)


class _Node(NamedTuple):
    """An object of a file. By its identifier alone: what h5py wraps around it is most of the time where there are
    many."""

    path: str
    id: h5py.h5g.GroupID | h5py.h5d.DatasetID
    address: int

    @property
    def is_dataset(self) -> bool:
        return isinstance(self.id, h5py.h5d.DatasetID)


def _walk(file: h5py.File, top: _Node, seen: set[int], closed: Container[str] = ()) -> Iterator[_Node]:
    """Every object at and below `top`, groups in the order of creation. Follows hard links only.

    What lies in a group whose path is among `closed` is left out. Raises FormatError where the address of an object is
    among those `seen`, and adds it to them.
    """
    stack = [top]
    while stack:
        node = stack.pop()
        if node.address in seen:
            raise FormatError(f"{file.filename}: {node.path} is not a dataset or group of its own")
        seen.add(node.address)
        yield node
        if not node.is_dataset and node.path not in closed:
            stack.extend(reversed(list(_children(file, node))))


def _children(file: h5py.File, group: _Node) -> Iterator[_Node]:
    """What lies in a group, in the order of creation. Raises FormatError for links that are not hard."""
    prefix = group.path.rstrip("/")
    for name, kind, address in _links(group.id):
        path = f"{prefix}/{name.decode('utf-8', 'surrogateescape')}"
        if kind != h5py.h5l.TYPE_HARD:
            raise FormatError(f"{file.filename}: {path} is a link, which fmextract does not write")
        child = h5py.h5o.open(group.id, name)
        if not isinstance(child, h5py.h5g.GroupID | h5py.h5d.DatasetID):
            raise FormatError(f"{file.filename}: {path} is not a dataset or group of its own")
        yield _Node(path, child, address)


def _links(group: h5py.h5g.GroupID) -> list[tuple[bytes, int, Any]]:
    """(name, type, address of the object) of each link: in the order of creation where that is kept, else by name."""
    links: list[tuple[bytes, int, Any]] = []
    kept = group.get_create_plist().get_link_creation_order() & h5py.h5p.CRT_ORDER_TRACKED
    order = h5py.h5.INDEX_CRT_ORDER if kept else h5py.h5.INDEX_NAME
    group.links.iterate(lambda name, link: links.append((name, link.type, link.u)), info=True, idx_type=order)
    return links


def _is_plain(data: h5py.h5d.DatasetID) -> bool:
    """Whether a dataset is what nearly all are: numbers or texts, one after the other in the file, all of them there.

    Then `_validate_dataset` has nothing to say, and its creation properties, which are slow to get, need not be asked.
    Only what lies in the file itself, in one piece, has an offset (in a file without a user block).
    """
    if data.get_offset() is None:
        return False
    kind, shape = data.get_type(), data.shape
    return (
        shape is not None
        and schema.is_storable(kind.encode())
        and math.prod(shape) * kind.get_size() == data.get_storage_size()
    )


def _validate_dataset(file: str, node: _Node, file_size: int) -> None:
    where = f"{file}: {node.path}"
    plist, shape, dtype = node.id.get_create_plist(), node.id.shape, node.id.dtype
    layout = plist.get_layout()
    if layout not in (h5py.h5d.CHUNKED, h5py.h5d.CONTIGUOUS, h5py.h5d.COMPACT) or plist.get_external_count():
        raise FormatError(f"{where} keeps its values outside the file, which fmextract does not write")
    if shape is None or not schema.is_storable(node.id.get_type().encode()):
        raise FormatError(f"{where} has values of type {dtype}, which fmextract does not write")
    if layout == h5py.h5d.CHUNKED:
        _validate_chunks(where, node, plist, file_size)
    elif math.prod(shape) * node.id.get_type().get_size() != node.id.get_storage_size():
        raise DamagedError(f"{where} has the shape {shape}, but not the bytes for it")


def _validate_chunks(where: str, node: _Node, plist: h5py.h5p.PropDCID, file_size: int) -> None:
    chunks, shape, dtype = plist.get_chunk(), node.id.shape, node.id.dtype
    nbytes, count = math.prod(chunks) * dtype.itemsize, math.prod(chunk_grid(shape, chunks))
    if nbytes > MAX_CHUNK_BYTES:
        raise FormatError(f"{where} has chunks {chunks} of {dtype}, larger than 1 GiB")
    if flaw := filters_flaw(plist, dtype.itemsize):
        raise FormatError(f"{where} has {flaw}, which fmextract does not write")
    if count > file_size // _CHUNK_RECORD_BYTES:
        raise DamagedError(f"{where} has the shape {shape}, more than the file has chunks for")
    if node.path.endswith("/activation"):  # each of its chunks is looked at before it is read
        return
    if math.prod(shape) * dtype.itemsize > INFLATION * file_size:
        raise DamagedError(f"{where} claims {math.prod(shape)} values in a file of {file_size} bytes")
    if node.id.get_storage_size() > count * most_stored(nbytes):
        raise DamagedError(f"{where} has chunks that hold more than its values")


_WITHIN_LAYER = 3
"""Slashes in the path of what lies in the group of a layer. What lies deeper, its statistics, is read on demand."""


def _contents_of_own(file: h5py.File, written: Mapping[str, _Layer]) -> Contents:
    """The same of a file that this process has just written: its layers are not read again."""
    nodes = {node.path: node for node in _walk(file, _top(file), set(), {"/layers"})}
    return _contents(file, nodes, lambda *_: [layer.contents() for layer in written.values()])


def _contents(
    file: h5py.File, nodes: Mapping[str, _Node], layers_in: Callable[[_Node, int, int | None], list[LayerContents]]
) -> Contents:
    """What a file holds, checked. What lies beside its layers, by path in `nodes`, is sound.

    `layers_in` gives its layers, of their group, the address of the scale of the rows, and the number of rows.
    """
    name = file.filename
    attrs, said = schema.attributes(nodes["/"].id, schema.ROOT, name)
    if "/layers" not in nodes or nodes["/layers"].is_dataset:
        raise FormatError(f"{name} has no group /layers")
    columns = {path[1:]: node for path, node in nodes.items() if path.count("/") == 1 and node.is_dataset}
    rows = math.prod(columns["sample"].id.shape) if "sample" in columns else None
    if rows == 0:
        raise FormatError(f"{name} holds no rows, which fmextract does not write")
    for column, kind in schema.COLUMNS.items():
        if column in columns or kind.required:
            _check_column(name, column, columns.get(column), kind, rows)
    layers = layers_in(nodes["/layers"], columns["sample"].address, rows)
    brought = dict(_brought_by(name, columns, rows))
    return Contents(rows or 0, attrs, said, frozenset(columns), brought, {layer.spec.name: layer for layer in layers})


def _found_layers(file: h5py.File, seen: set[int], group: _Node, sample: int, rows: int | None) -> list[LayerContents]:
    """The layers in a group, checked. `seen` are the addresses of what lies beside them.

    One after the other, so that libhdf5 still has at hand what it found when it is asked again.
    """
    layers = []
    for layer in _children(file, group):
        below = [node for node in _sound(file, layer, seen) if node.path.count("/") <= _WITHIN_LAYER]
        with _reading(file, layer.path):
            layers.append(_layer_contents(file.filename, layer, below[1:], sample, rows))
    return layers


def _brought_by(file: str, columns: Mapping[str, _Node], rows: int | None) -> Iterator[tuple[str | None, Brought]]:
    """The label, and what says of itself that it is a `column`."""
    for name, node in columns.items():
        if name in schema.COLUMNS and name != "label":
            continue
        attrs, _ = schema.attributes(node.id, schema.BROUGHT_ATTRIBUTES, f"{file}: /{name}")
        if name == "label" or "column" in attrs:
            _check_column(file, name, node, schema.BROUGHT, rows)
            yield None if name == "label" else attrs["column"], Brought(name, _form(node, attrs))


def _form(node: _Node, attrs: Mapping[str, Any]) -> Form:
    shape, is_text = node.id.shape, h5py.check_string_dtype(node.id.dtype) is not None
    kind = attrs.get("encoding", "text") if is_text else "int" if node.id.dtype.kind == "i" else "float"
    length = shape[1] if len(shape) > 1 else None
    return Form(kind, length, attrs.get("_FillValue", -1), "_FillValue" in attrs)


def _check_column(file: str, name: str, column: _Node | None, kind: schema.Column, rows: int | None) -> None:
    shape = column.id.shape if column is not None else ()
    if column is None or shape[:1] != (rows,) or len(shape) > kind.axes or 0 in shape:
        raise FormatError(f"{file}: expected /{name} with one value a row")
    has = "text" if h5py.check_string_dtype(column.id.dtype) else column.id.dtype.name
    if has not in kind.types or (has == "text" and len(shape) > 1):
        raise FormatError(f"{file}: expected /{name} of {' or '.join(kind.types)}, got {has}")


def row_range(file: h5py.File) -> range:
    """The global rows that the file holds. Raises FormatError where /sample does not count up by one."""
    sample = file["sample"]
    start, last = int(sample[0]), int(sample[-1])
    if last - start + 1 != len(sample):
        raise FormatError(
            f"{file.filename}: expected {len(sample)} rows that follow one another, got {start} to {last}"
        )
    return range(start, last + 1)


def read_info(file: h5py.File) -> FileInfo:
    """The root attributes of a file."""
    with _reading(file):
        return info_of(*schema.attributes(_root(file), schema.ROOT, file.filename))


def info_of(attrs: Mapping[str, Any], said: Mapping[str, Any]) -> FileInfo:
    """The same, of attributes that were read, and of what those of them mean that hold JSON."""
    names = ("title", "source", "history", "model", "weights_sha256", "precision", "created")
    loaded = {"fmextract_config", "preprocess", "versions"}
    fixed = {*names, *loaded, "format", "format_version", "Conventions", "content_digest"}
    return FileInfo(
        **{name: attrs[name] for name in names},
        config=said["fmextract_config"],
        preprocess=said["preprocess"],
        versions=said["versions"],
        extra={name: value for name, value in attrs.items() if name not in fixed},
    )


def read_text(path: Path, group: str, name: str) -> str:
    """An attribute of an HDF5 file that may be anybody's. Raises OSError, RuntimeError, KeyError or ValueError where
    there is no such text."""
    with h5py.File(path, "r", locking=False) as file:
        return schema.text(schema.attribute(h5py.h5o.open(file.id, group.encode()), name.encode()))


def read_layer(group: h5py.Group) -> LayerSpec:
    """The LayerSpec that a layer's group was written from."""
    file, path = group.file, group.name
    with _reading(file):
        node = _Node(path, group.id, 0)
        sample = h5py.h5o.get_info(file["sample"].id).addr
        return _layer_contents(file.filename, node, list(_children(file, node)), sample, None).spec


def _layer_contents(file: str, group: _Node, children: Sequence[_Node], sample: int, rows: int | None) -> LayerContents:
    """A layer, from its group and what lies in it. Raises DamagedError for what no layer of ours is.

    `sample` is the address of the scale of the rows, `rows` their number, None where that was checked.
    """
    where, escaped = f"{file}: {group.path}", group.path.rpartition("/")[2]
    own = {node.path.rpartition("/")[2]: node for node in children}
    if group.is_dataset or "activation" not in own:
        raise FormatError(f"{where}: expected activation, chunked, with one value a row")
    name = unescape_name(escaped)
    name.encode()  # UnicodeEncodeError, which is a ValueError, where it is no text
    if escape_name(name) != escaped:
        raise DamagedError(f"{where}: no layer can have this name")
    shape, dtype, chunk = _activation(where, own["activation"], rows)
    attrs, _ = schema.attributes(group.id, schema.LAYER, where)
    for together in schema.TOGETHER:
        if 0 < sum(one in attrs for one in together) < len(together):
            raise DamagedError(f"{where}: expected the attributes {', '.join(together)}, or none of them")
    return LayerContents(_spec(name, shape, dtype, chunk, _axes(where, own, sample), attrs), attrs)


def _spec(
    name: str,
    shape: Sequence[int],
    dtype: str,
    chunk: tuple[int, ...],
    axes: tuple[str, ...],
    attrs: Mapping[str, Any],
) -> LayerSpec:
    """A layer as it was written: `shape` is that of its activations, `attrs` are its attributes, checked."""
    field = None
    if "rf_size" in attrs:
        size, stride, offset = (tuple(attrs[f"rf_{part}"].tolist()) for part in ("size", "stride", "offset"))
        flags = {field: attrs.get(f"rf_{flag}", False) for flag, field in _FIELD_FLAGS.items()}
        field = Field(size, stride, offset, **flags)
    return LayerSpec(
        name=name,
        module=attrs["module"],
        module_type=attrs["module_type"],
        call=attrs["call"],
        calls=attrs["calls"],
        tap=attrs["tap"],
        member=attrs.get("member", ""),
        reducer=attrs.get("reducer", ""),
        shape=tuple(shape[1:]),
        axes=axes,
        dtype=dtype,
        compute_dtype=attrs["compute_dtype"],
        chunk=chunk,
        mantissa=attrs.get("mantissa"),
        copied=attrs["copied"],
        rel_error=attrs.get("rel_error"),
        field=field,
        erf_size=attrs.get("erf_size"),
        near_zero_below=attrs.get("near_zero_below"),
        number=attrs.get("number", ""),
    )


def _activation(where: str, data: _Node, rows: int | None) -> tuple[tuple[int, ...], str, tuple[int, ...]]:
    """Shape, type and chunk of the activations of a layer."""
    if not data.is_dataset:
        raise FormatError(f"{where}/activation is no dataset")
    shape, plist = data.id.shape, data.id.get_create_plist()
    if not shape or (rows is not None and shape[0] != rows) or plist.get_layout() != h5py.h5d.CHUNKED:
        raise FormatError(f"{where}: expected activation, chunked, with one value a row")
    dtype = data.id.dtype.name
    if dtype not in schema.ACTIVATION or 0 in shape:
        raise FormatError(f"{where}/activation has values of type {dtype}, shape {shape}")
    return shape, dtype, plist.get_chunk()


def _axes(where: str, own: Mapping[str, _Node], sample: int) -> tuple[str, ...]:
    """The names of the axes behind the first: of the scales attached to them, which lie in the layer's own group."""
    data, names = own["activation"].id, {node.address: name for name, node in own.items()}
    first, *others = schema.scales(data, f"{where}/activation")
    if first != [sample]:
        raise DamagedError(f"{where}/activation: its first axis is not /sample")
    axes: list[str] = []
    for size, attached in zip(data.shape[1:], others, strict=True):
        name = names.get(attached[0], "") if len(attached) == 1 else ""
        if name in ("", "activation", *axes) or own[name].id.shape != (size,):
            raise DamagedError(f"{where}/activation: expected one scale of its own on every axis")
        name.encode()
        axes.append(name)
    return tuple(axes)


def read_samples(file: h5py.File, part: slice = slice(None)) -> SampleTable:
    """The columns of a file, or of a part of its rows; what is missing among labels is None."""
    with _reading(file):
        brought = {title: _read_brought(file, one, part) for title, one in _brought_in(file).items()}
        return SampleTable(
            start=row_range(file).start + (part.start or 0),
            keys=_texts(file["key"], part),
            labels=brought.pop(None, None),
            status=file["status"][part].tolist(),
            message=_texts(file["message"], part),
            height=file["height"][part].tolist(),
            width=file["width"][part].tolist(),
            files=_read_stamps(file, part),
            columns={title: values for title, values in brought.items() if title is not None},
        )


def _brought_in(file: h5py.File) -> dict[str | None, Brought]:
    nodes = {node.path[1:]: node for node in _children(file, _top(file)) if node.is_dataset}
    return dict(_brought_by(file.filename, nodes, len(file["sample"])))


def _read_brought(file: h5py.File, brought: Brought, part: slice) -> list[Label]:
    column = file[brought.name]
    stored = column[part] if brought.form.is_numeric else np.array(_texts(column, part), object)
    return decode_column(stored, brought.form, f"{file.filename}: /{brought.name}")


def _read_stamps(file: h5py.File, part: slice) -> list[FileStamp]:
    if "file_size" not in file or "file_digest" not in file:
        return [FileStamp()] * len(file["status"][part])
    return list(map(FileStamp, file["file_size"][part].tolist(), _texts(file["file_digest"], part)))


def _texts(column: h5py.Dataset, part: slice) -> list[str]:
    return [text.decode("utf-8", "replace") for text in column[part]]


def read_statistics(
    file: h5py.File, path: str, left_out: Container[str] = (), only: Iterable[str] | None = None
) -> dict[str, Array]:
    """The values of the datasets of a group that are no scales, by name: of all, or `only` of some.

    Of a group that is not there, none.
    """
    values: dict[str, Array] = {}
    above, _, last = path.rpartition("/")
    holder = h5py.h5o.open(file.id, above.encode())
    if last.encode() not in holder:
        return values
    group = h5py.h5o.open(holder, last.encode())
    if not isinstance(group, h5py.h5g.GroupID):
        raise FormatError(f"{file.filename}: {path} is no group")
    wanted = list(group) if only is None else [name.encode() for name in only if name.encode() in group]
    for encoded in wanted:
        name = encoded.decode("utf-8", "surrogateescape")
        if name in left_out:
            continue
        data = h5py.h5o.open(group, encoded)
        if isinstance(data, h5py.h5d.DatasetID) and not schema.is_scale(data):
            values[name] = _read_values(data)
    return values


def _read_values(data: h5py.h5d.DatasetID) -> Array:
    """All of a dataset, without what h5py wraps around it."""
    dtype, shape = data.dtype, data.shape
    if shape is None or dtype.kind not in "iuf":
        return np.asarray(h5py.Dataset(data)[()])
    values = np.empty(shape, dtype)
    if values.size:
        data.read(h5py.h5s.ALL, h5py.h5s.ALL, values)
    return values


def read_chunk(dataset: h5py.Dataset, chunk_index: Sequence[int]) -> tuple[int, bytes]:
    """The filter mask and the stored bytes of one chunk. Raises DamagedError where the chunk was never written."""
    offset = tuple(i * size for i, size in zip(chunk_index, dataset.chunks, strict=True))
    with _reading(dataset.file):
        if dataset.id.get_chunk_info_by_coord(offset).byte_offset is None:
            raise DamagedError(f"{dataset.file.filename}: {dataset.name} has no chunk {tuple(chunk_index)}")
        mask, payload = dataset.id.read_direct_chunk(offset)
    return mask, bytes(payload)


# -------------------------------------------------------------------------------------------------- the content digest


def content_digest(path: Path) -> str:
    """BLAKE2b, in hex, over everything a reader of the file sees; what `ShardWriter.finish` returned for it.

    It covers, in the order of creation: the path of every object; its attributes by name, with type, shape and value;
    of every dataset the type, shape, greatest shape, chunk shape, filters, fill value and the path of the scale on
    each axis; the digest of every stored chunk of the activations, and the values of every other dataset. It does not
    cover where in the file things lie, the root attributes `content_digest` and `throughput`, nor the object references
    that scales are made of: they enter as the scales' paths.
    """
    with open_shard(path) as file, _reading(file):
        return _content_digest(file, {})


def _content_digest(file: h5py.File, written: Mapping[str, _Layer]) -> str:
    """`written` are layers, by path, that this process has just written: what they hold is not read again."""
    hasher = hashlib.blake2b(digest_size=32)
    nodes = list(_walk(file, _top(file), set(), written))
    paths = {node.address: node.path for node in nodes}
    for node in nodes:
        path = node.path
        if path in written:
            written[path].put(hasher)
            continue
        _put(hasher, "dataset" if node.is_dataset else "group", path)
        for encoded in schema.attribute_names(node.id):
            name = encoded.decode("utf-8", "surrogateescape")
            if not (path == "/" and name in _NOT_CONTENT):
                _put(hasher, "attribute", name, *_attribute_parts(node, encoded))
        if node.is_dataset:
            _put(hasher, *_description(node, paths, f"{file.filename}: {path}"))
            if path.startswith("/layers/") and path.endswith("/activation"):
                _put_chunks(hasher, h5py.Dataset(node.id))
            else:
                _put_values(hasher, node)
    return hasher.hexdigest()


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer as it stands in a file, as data: it is written from here, and the digest made of the same.

    `filters` are those of the activations, `digests` those of their chunks, `scales` those of their axes behind the
    first; `stats` None: there is no such group.
    """

    path: str
    spec: LayerSpec
    rows: int
    filters: Sequence[tuple[int, tuple[int, ...]]]
    attrs: Mapping[str, Any]
    scales: Sequence[Values]
    stats: Sequence[Values] | None
    digests: Mapping[tuple[int, ...], bytes]

    def write(self, file: h5py.File) -> dict[str, h5py.h5d.DatasetID]:
        """All but the activations, which are there, and what scales are attached to. Gives its datasets, by path."""
        group = h5py.h5g.open(file.id, self.path.encode())
        objects.add_attributes(group, self.attrs)
        there = {f"{self.path}/activation": h5py.h5d.open(group, b"activation")}
        there |= {f"{self.path}/{one.name}": objects.create(group, one) for one in self.scales}
        if self.stats is not None:
            inside = objects.create_group(group, "stats")
            there |= {f"{self.path}/stats/{one.name}": objects.create(inside, one) for one in self.stats}
        return there

    def attached(self) -> Iterator[tuple[str, Sequence[str]]]:
        """The path of each dataset, and those of the scales of its axes."""
        yield f"{self.path}/activation", self._axes()
        yield from ((f"{self.path}/stats/{one.name}", one.scales) for one in self.stats or () if one.scales)

    def contents(self) -> LayerContents:
        """What `_layer_contents` finds in the file, without reading it."""
        attrs = schema.as_read(objects.attribute_values(self.attrs), schema.LAYER)
        spec = self.spec
        shape, dtype = (self.rows, *spec.shape), np.dtype(spec.dtype).name
        return LayerContents(_spec(spec.name, shape, dtype, tuple(spec.chunk), tuple(spec.axes), attrs), attrs)

    def _axes(self) -> list[str]:
        return ["/sample", *(f"{self.path}/{axis}" for axis in self.spec.axes)]

    def put(self, hasher: Any) -> None:
        """What `_content_digest` takes in of the file, without reading it."""
        framed = objects.framed
        attributes = [framed(*parts) for parts in objects.attributes_parts(self.attrs)]
        scales = [self._dataset(f"{self.path}/{scale.name}", scale) for scale in self.scales]
        pieces = [framed("group", self.path), *attributes, *self._activation(), *scales]
        if self.stats is not None:
            pieces.append(framed("group", f"{self.path}/stats"))
            pieces += [self._dataset(f"{self.path}/stats/{one.name}", one) for one in self.stats]
        hasher.update(b"".join(pieces))

    def _activation(self) -> Iterator[bytes]:
        dtype, shape = np.dtype(self.spec.dtype), tuple(self.spec.shape)
        filters = [(number, h5py.h5z.FLAG_OPTIONAL, tuple(options)) for number, options in self.filters]
        scales = [[path] for path in self._axes()]
        said = objects.dataset_parts(
            *(dtype, (self.rows, *shape), (None, *shape), tuple(self.spec.chunk), filters),
            *(np.asarray(fill_value(dtype), dtype).tobytes(), scales),
        )
        yield objects.framed("dataset", f"{self.path}/activation", *said)
        for index in np.ndindex(chunk_grid((self.rows, *shape), self.spec.chunk)):
            yield _chunk_said(index, 0, self.digests[index])

    def _dataset(self, path: str, made: Values) -> bytes:
        return objects.framed("dataset", path) + objects.values_framed(made) + made.values.tobytes()


def _put(hasher: Any, *parts: str | bytes) -> None:
    hasher.update(objects.framed(*parts))


def _attribute_parts(node: _Node, name: bytes) -> list[str | bytes]:
    stored = h5py.h5a.open(node.id, name)
    dtype, shape = stored.dtype, stored.shape
    objects.type_name(dtype)  # before anything is read of another type
    if shape is None or stored.get_storage_size() > schema.MOST_ATTRIBUTE:
        raise FormatError(f"the attribute {name.decode()} of {node.path} has no value that fmextract would write")
    value = np.zeros(shape, dtype)
    stored.read(value, mtype=h5py.h5t.py_create(dtype))
    return objects.array_parts(value)


def _description(node: _Node, paths: Mapping[int, str], where: str) -> list[str | bytes]:
    dataset = node.id
    plist, dtype, shape = dataset.get_create_plist(), dataset.dtype, dataset.shape
    most = dataset.get_space().get_simple_extent_dims(True)
    greatest = tuple(None if size == h5py.h5s.UNLIMITED else size for size in most)
    chunk = plist.get_chunk() if plist.get_layout() == h5py.h5d.CHUNKED else None
    filters = [plist.get_filter(i)[:3] for i in range(plist.get_nfilters())]
    fill = np.zeros((), dtype)
    if dtype.kind in "iuf":
        plist.get_fill_value(fill)
    scales = [] if schema.is_scale(dataset) else schema.scales(dataset, where)
    named = [[paths[address] for address in attached] for attached in scales]
    known = fill.tobytes() if dtype.kind in "iuf" else b""
    return objects.dataset_parts(dtype, shape, greatest, chunk, filters, known, named)


def _put_chunks(hasher: Any, dataset: h5py.Dataset) -> None:
    for index in np.ndindex(chunk_grid(dataset.shape, dataset.chunks)):
        mask, payload = read_chunk(dataset, index)
        hasher.update(_chunk_said(index, mask, chunk_digest(payload)))


def _chunk_said(index: tuple[int, ...], mask: int, digest: bytes) -> bytes:
    return np.array([*index, mask], "<i8").tobytes() + digest


def _put_values(hasher: Any, node: _Node) -> None:
    shape, dtype = node.id.shape, node.id.dtype
    if not shape:
        raise FormatError(f"{node.path} has no axes, which fmextract does not write")
    if dtype.kind in "iuf" and shape[0] <= COLUMN_CHUNK:
        hasher.update(_read_values(node.id).reshape(-1).view(np.uint8))
        return
    dataset = h5py.Dataset(node.id)
    for at in range(0, shape[0], COLUMN_CHUNK):
        part = dataset[at : at + COLUMN_CHUNK]
        if dtype.kind in "iuf":
            hasher.update(part.tobytes())
        else:
            _put(hasher, *part.reshape(-1).tolist())


# ------------------------------------------------------------------------------------------------------------- packing


def pack(
    parts: Sequence[Path | range],
    out: Path,
    *,
    info: FileInfo | None = None,
    stats: Stats | None = None,
    layer_attrs: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """Merge files whose rows follow one another into `out`, a temporary name. Returns the content digest.

    Chunks are copied as they are, without decoding. A range among the parts stands for rows that are left out: they
    keep their places as failed rows without a key. `info` defaults to that of the first file; statistics are those
    given, none by default. Raises FormatError where the parts do not belong together, DamagedError for a broken one.
    """
    files = [part for part in parts if not isinstance(part, range)]
    if not files:
        raise ValueError("expected at least one file to pack")
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(open_shard(files[0]))
        layout = _layout(first)
        ranges, forms = [], list[Forms]()
        for part in parts:
            if isinstance(part, range):
                ranges.append(part)
                continue
            with open_shard(part) as file:
                _check_same_run(first, file, layout)
                ranges.append(row_range(file))
                forms.append({title: one.form for title, one in _brought_in(file).items()})
        _check_ranges(parts, ranges, layout[0])
        rows = range(ranges[0].start, ranges[-1].stop)
        specs, codec, level = layout
        writer = stack.enter_context(ShardWriter(out, rows, specs, info or read_info(first), codec, level))
        for part, span in zip(parts, ranges, strict=True):
            if isinstance(part, range):
                _fill_chunks(writer, span.start - rows.start, len(span), codec, level)
            else:
                with open_shard(part) as file:
                    _copy_chunks(file, writer, span.start - rows.start)
        return writer._finish(_tables(parts), _common_forms(forms), stats, layer_attrs)


def _layout(file: h5py.File) -> tuple[list[LayerSpec], str, int]:
    """The layers of a file in order, and the codec with its level that they share."""
    specs = [read_layer(group) for group in file["layers"].values()]
    pipelines = set()
    for group in file["layers"].values():
        data = group["activation"]
        plist = data.id.get_create_plist()
        pipeline = [plist.get_filter(i) for i in range(plist.get_nfilters())]
        pipelines.add((data.dtype.itemsize, tuple((stage[0], tuple(stage[2])) for stage in pipeline)))
    for codec in CODECS.values():
        for level in codec.levels:
            if all(pipeline == codec.filters(itemsize, level) for itemsize, pipeline in pipelines):
                return specs, codec.name, level
    raise FormatError(f"{file.filename} has filters that fmextract does not write")


def _check_same_run(first: h5py.File, file: h5py.File, layout: tuple[list[LayerSpec], str, int]) -> None:
    if _layout(file) != layout:
        raise FormatError(f"{file.filename} has other layers, chunks or filters than {first.filename}")
    for name in ("fmextract_config", "model", "weights_sha256", "preprocess", "precision"):
        if file.attrs.get(name) != first.attrs.get(name):
            raise FormatError(f"{file.filename} was made with another {name} than {first.filename}")


def _check_ranges(parts: Sequence[Path | range], ranges: Sequence[range], specs: Sequence[LayerSpec]) -> None:
    for path, (before, span) in zip(parts[1:], pairwise(ranges), strict=True):
        if span.start != before.stop:
            raise FormatError(
                f"{path} starts at row {span.start}, expected {before.stop}: the parts must follow one another"
            )
        for spec in specs:
            if (span.start - ranges[0].start) % spec.chunk[0]:
                raise FormatError(f"{path} starts at row {span.start}, in the middle of a chunk of {spec.name}")


def _copy_chunks(file: h5py.File, writer: ShardWriter, rows_before: int) -> None:
    for layer, spec in enumerate(writer.layers):
        data = file["layers"][escape_name(spec.name)]["activation"]
        shift = rows_before // spec.chunk[0]
        for index in np.ndindex(chunk_grid(data.shape, data.chunks)):
            mask, payload = read_chunk(data, index)
            if mask:
                raise FormatError(
                    f"{file.filename}: chunk {index} of {spec.name} skips a filter; fmextract writes none such"
                )
            writer.write_chunk(layer, (index[0] + shift, *index[1:]), payload, chunk_digest(payload))


def _fill_chunks(writer: ShardWriter, rows_before: int, rows: int, codec: str, level: int) -> None:
    for layer, spec in enumerate(writer.layers):
        full = np.full(spec.chunk, fill_value(spec.dtype), spec.dtype)
        payload = encode([full], codec=codec, level=level, dtype=spec.dtype, values=full.size)
        digest, shift = chunk_digest(payload), rows_before // spec.chunk[0]
        for index in np.ndindex(chunk_grid((rows, *spec.shape), spec.chunk)):
            writer.write_chunk(layer, (index[0] + shift, *index[1:]), payload, digest)


def _tables(parts: Sequence[Path | range]) -> Iterator[SampleTable]:
    for part in parts:
        if not isinstance(part, range):
            with open_shard(part) as file:
                yield read_samples(file)
            continue
        for at in range(part.start, part.stop, COLUMN_CHUNK):
            table = SampleTable.empty(at, [""] * min(COLUMN_CHUNK, part.stop - at), None)
            table.status = [Status.UNREADABLE] * len(table)
            table.message = ["left out when the shards were packed: this row's shard was missing"] * len(table)
            yield table


def _common_forms(forms: Sequence[Forms]) -> Forms:
    titles = dict.fromkeys(title for one in forms for title in one)
    return {title: common_form(one.get(title) for one in forms) for title in titles}
