"""Write one HDF5 file: the activations of a range of rows, and everything a reader needs to make sense of them.

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
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import h5py
import numpy as np

from fmextract.records import STATUS_MEANINGS, FileInfo, Label, LayerSpec, SampleTable
from fmextract.storage import objects
from fmextract.storage.codecs import CODECS, Array, Codec, Stored, codec_named, fill_value
from fmextract.storage.columns import Form, encode_column, form_of, stored_names
from fmextract.storage.contents import Contents, contents_of
from fmextract.storage.digest import Layer, digest_of_open
from fmextract.storage.durable import SteadyFile, disk_error, fsync
from fmextract.storage.layer_stats import COUNTED, COVARIANCE, Totals
from fmextract.storage.layout import (
    COLUMN_CHUNK,
    LIBVER,
    Stats,
    _layer_attrs,
    _root_attrs,
    _scales,
    check_layers,
    chunk_grid,
    escape_name,
)
from fmextract.storage.objects import Values
from fmextract.storage.validation import top_node, walk

Forms: TypeAlias = Mapping[str | None, Form | None]
"""The forms of a source's columns, by their names; the labels' name is None. A form of None: it has no value."""


# ------------------------------------------------------------------------------------------------------------- writing


class ShardWriter:
    """Writes one file. `write_chunk` for every chunk of every layer, then `finish`; `abort` at any time.

    `path` is a temporary name, which `durable.publish` replaces by the final one. Any error leaves no file.
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
        check_layers(layers)
        chosen = codec_named(codec)
        level = chosen.checked_level(level)
        self._pipeline = (chosen, level)
        self.path = Path(path)
        self.rows = rows
        self.layers = tuple(layers)
        self._grids = [chunk_grid((len(rows), *spec.shape), spec.chunk) for spec in layers]
        self._digests: list[dict[tuple[int, ...], bytes]] = [{} for _ in layers]
        self._nbytes = [0] * len(self.layers)
        self._file: h5py.File | None = None
        self._disk: SteadyFile | None = None
        with self._whole_or_nothing():
            self._disk = SteadyFile(self.path)
            self._file = h5py.File(self._disk, "w", libver=LIBVER, track_order=True)
            objects.set_attributes(self._file.id, _root_attrs(info))
            _create_sample_scale(self._file, rows)
            group = self._file.create_group("layers", track_order=True)
            self._activations = [_create_layer(group, spec, len(rows), chosen, level) for spec in layers]
            self._check_disk()

    @classmethod
    def reopened(cls, left: Unfinished) -> ShardWriter:
        """Go on where another writer left, with all chunks written. Raises NoSpace, OutputError."""
        self = cls.__new__(cls)
        self.path, self.rows, self.layers = left.path, left.rows, left.layers
        self._grids = [chunk_grid((len(left.rows), *spec.shape), spec.chunk) for spec in left.layers]
        self._digests, self._activations = list(left.digests), []
        self._nbytes = list(left.nbytes)
        self._pipeline = (codec_named(left.codec), left.level)
        self._file = self._disk = None
        with self._whole_or_nothing():
            self._disk = SteadyFile(self.path, "r+b")
            self._file = h5py.File(self._disk, "r+", libver=LIBVER)
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
        self._nbytes[layer] += memoryview(payload).nbytes

    def finish(
        self,
        samples: SampleTable,
        stats: Stats | None = None,
        layer_attrs: Mapping[str, Mapping[str, Any]] | None = None,
        root_attrs: Mapping[str, Any] | None = None,
        durable: bool = True,
    ) -> str:
        """Write what stands beside the activations, close, make durable. Returns the content digest, in hex.

        `stats` and `layer_attrs` are by the layer's name; `root_attrs` is what is known only at the end of a shard.
        `durable` False leaves the last step to `durable.publish`.
        Raises ValueError where a chunk is missing, or the columns do not fit the rows.
        """
        if len(samples) != len(self.rows) or samples.start != self.rows.start:
            raise ValueError(f"expected columns for rows {self.rows}, got {len(samples)} from {samples.start}")
        with self._whole_or_nothing():
            objects.set_attributes(self._open_file().id, root_attrs or {})
        return self.finish_parts([samples], _forms_of(samples), stats, layer_attrs, durable)

    def finish_parts(
        self,
        tables: Iterable[SampleTable],
        forms: Forms,
        stats: Stats | None,
        layer_attrs: Mapping[str, Mapping[str, Any]] | None,
        durable: bool = True,
    ) -> str:
        """Finish as `finish` does, with columns that come a table at a time, in the forms that all of them share."""
        with self._whole_or_nothing():
            file = self._open_file()
            for spec, grid, done in zip(self.layers, self._grids, self._digests, strict=True):
                if len(done) != math.prod(grid):
                    raise ValueError(
                        f"{spec.name}: {math.prod(grid) - len(done)} of {math.prod(grid)} chunks are missing"
                    )
            written = self._write_layers(file, stats or {}, layer_attrs or {})
            _write_columns(file, len(self.rows), tables, forms)
            digest = digest_of_open(file, written)
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
                fsync(self.path)
            totals = self._totals(stats or {}, layer_attrs or {})
            _last_written[:] = [(file_identity(self.path.stat()), Written(contents, totals))]
        return digest

    def _write_layers(
        self, file: h5py.File, stats: Stats, layer_attrs: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Layer]:
        """Write what stands beside the activations of each layer; return what is there now, by path."""
        names = {spec.name for spec in self.layers}
        if unknown := [name for name in (*stats, *layer_attrs) if name not in names]:
            raise ValueError(f"expected statistics and attributes of the layers of this file, got {unknown[0]!r}")
        codec, level = self._pipeline
        written: dict[str, Layer] = {}
        on_samples: dict[str, objects.Entries] = {"/sample": []}
        samples = {"/sample": file["sample"].id}
        for spec, digests in zip(self.layers, self._digests, strict=True):
            path = f"/layers/{escape_name(spec.name)}"
            own = {name: value for name, value in layer_attrs.get(spec.name, {}).items() if value is not None}
            beside = list(_statistics(path, spec, stats[spec.name])) if spec.name in stats else None
            attrs, filters = {**_layer_attrs(spec), **own}, codec.filters(np.dtype(spec.dtype).itemsize, level)
            layer = Layer(path, spec, len(self.rows), filters, attrs, _scales(spec), beside, digests)
            # Layer by layer: so that no more are open at a time than those of one.
            objects.attach_scales(file, layer.attached(), samples | layer.write(file), on_samples)
            written[path] = layer
        objects.write_references(file, on_samples)
        return written

    def _totals(self, stats: Stats, layer_attrs: Mapping[str, Mapping[str, Any]]) -> dict[str, Totals]:
        """Of the layers of which enough is known."""
        totals: dict[str, Totals] = {}
        for spec, nbytes in zip(self.layers, self._nbytes, strict=True):
            if spec.channel_axis is None:
                found = layer_attrs.get(spec.name, {}).get("nonfinite", 0)
                totals[spec.name] = Totals(nbytes, nonfinite=int(found))
            elif set(COUNTED) <= stats.get(spec.name, {}).keys():
                totals[spec.name] = Totals.of(nbytes, stats[spec.name])
        return totals

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
        return Unfinished(self.path, self.rows, self.layers, self._digests, self._nbytes, codec.name, level)

    def chunk_digests(self) -> dict[str, str]:
        """Return, by layer, the first 16 hex digits of the digest of every chunk, one after the other in C order."""
        return {
            spec.name: "".join(done[place].hex()[:16] for place in np.ndindex(grid))
            for spec, grid, done in zip(self.layers, self._grids, self._digests, strict=True)
        }

    def abort(self) -> None:
        """Close and remove the file, unless it is finished. May be called again."""
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
    """A closed file that holds its chunks and lacks what stands beside them."""

    path: Path
    rows: range
    layers: tuple[LayerSpec, ...]
    digests: Sequence[dict[tuple[int, ...], bytes]]
    nbytes: Sequence[int]
    codec: str
    level: int

    def finish(
        self,
        samples: SampleTable,
        stats: Stats | None = None,
        layer_attrs: Mapping[str, Mapping[str, Any]] | None = None,
        root_attrs: Mapping[str, Any] | None = None,
    ) -> str:
        """Do what `ShardWriter.finish` does, except make it durable. Raises as that does, and then leaves no file."""
        with ShardWriter.reopened(self) as writer:
            return writer.finish(samples, stats, layer_attrs, root_attrs, durable=False)


def _create_dataset(
    group: h5py.h5g.GroupID,
    name: str,
    shape: tuple[int, ...],
    dtype: Any,
    chunk: tuple[int, ...],
    filters: Sequence[tuple[int, tuple[int, ...]]],
) -> h5py.h5d.DatasetID:
    """Create a chunked dataset with an unlimited first axis; at low level, where a filter need not be installed."""
    plist = objects.creation()
    plist.set_chunk(chunk)
    if h5py.check_string_dtype(np.dtype(dtype)) is None:
        plist.set_fill_value(np.asarray(fill_value(dtype)))
    for number, options in filters:
        plist.set_filter(number, h5py.h5z.FLAG_OPTIONAL, options)
    space = h5py.h5s.create_simple(shape, (h5py.h5s.UNLIMITED, *shape[1:]))
    return h5py.h5d.create(group, name.encode(), objects.kind_of(np.dtype(dtype))[0], space, plist)


def _create_column(file: h5py.File, name: str, rows: int, dtype: Any, each: tuple[int, ...] = ()) -> h5py.Dataset:
    """Create a column: one value per row, or values of the shape `each`."""
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
    """Create the group of a layer with its activations."""
    layer = objects.create_group(group.id, escape_name(spec.name))
    filters = codec.filters(np.dtype(spec.dtype).itemsize, level)
    return _create_dataset(layer, "activation", (rows, *spec.shape), spec.dtype, spec.chunk, filters)


def _forms_of(samples: SampleTable) -> Forms:
    """Return the forms of the columns that the source brought along."""
    return {name: form_of(values) for name, values in _brought(samples)}


def _brought(samples: SampleTable) -> Iterator[tuple[str | None, Sequence[Label] | None]]:
    """Yield the labels, whose name is None, and the other columns by their names."""
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
    """Create the datasets of the columns that the source brought along, by their names; the labels' name is None."""
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
    """Yield `stats/`: one dataset per statistic, over the channels, or over the channels and a second axis.

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


# ---------------------------------------------------------------------------------------------------------- other forms


def write_rdms(
    path: Path,
    layers: Mapping[str, Iterable[Array]],
    pairs: int,
    measure: str,
    descriptors: Mapping[str, str],
    patterns: Mapping[str, Array | Sequence[str]],
) -> None:
    """Write dissimilarity matrices as rsatoolbox's `RDMs.save` lays them out and its `load_rdm` reads them.

    `layers` gives, by name, the `pairs` values of one matrix in parts, float64; `patterns` one entry per image. `path`
    is a temporary name. Texts are attributes: in datasets rsatoolbox would take them for ASCII. Raises NoSpace,
    OutputError.
    """
    try:
        disk = SteadyFile(path)
    except OSError as error:
        raise disk_error(path, error) from error
    file = h5py.File(disk, "w", libver=LIBVER, track_order=True)
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
        fsync(path)
    except BaseException:
        disk.drop()
        with contextlib.suppress(Exception):
            file.close()
        if disk.error is not None:
            raise disk_error(path, disk.error) from disk.error
        raise
    finally:
        disk.close()


class Written(NamedTuple):
    """What this process has put into a file: its contents, and what there is to count of its layers, by name."""

    contents: Contents
    totals: Mapping[str, Totals]


_last_written: list[tuple[tuple[int, ...], Written]] = []
"""The file that this process finished last, and what it wrote there: at most one."""


def file_identity(have: os.stat_result) -> tuple[int, ...]:
    """Return what changes when the content of a path does."""
    return have.st_dev, have.st_ino, have.st_size, have.st_mtime_ns


def take_written(identity: tuple[int, ...]) -> Written | None:
    """Return, once, what stands in the file that this process finished last; None for another file."""
    known = dict(_last_written)
    _last_written.clear()
    return known.get(identity)


def _contents_of_own(file: h5py.File, written: Mapping[str, Layer]) -> Contents:
    """Return the same for a file that this process has just written: its layers are not read again."""
    nodes = {node.path: node for node in walk(file, top_node(file), set(), {"/layers"})}
    return contents_of(file, nodes, lambda *_: [layer.contents() for layer in written.values()])
