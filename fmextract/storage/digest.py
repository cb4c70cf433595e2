"""Compute `content_digest`: BLAKE2b over everything that a reader of a file sees, in a canonical order.

HDF5's own checksums do not see flipped bits in strings and attributes.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from fmextract.errors import FormatError
from fmextract.records import LayerSpec
from fmextract.storage import objects, schema
from fmextract.storage.codecs import Stored, fill_value
from fmextract.storage.contents import LayerContents, open_shard, read_chunk, read_values, spec_of
from fmextract.storage.layout import COLUMN_CHUNK, chunk_grid
from fmextract.storage.objects import Values
from fmextract.storage.validation import Node, reading, top_node, walk

_NOT_CONTENT = ("content_digest", "throughput")
"""Root attributes that say nothing of what is stored: two runs that store the same values differ in speed."""


def chunk_digest(payload: Stored) -> bytes:
    """Return XXH3 (128 bits) of one stored chunk.

    It shows damage, not forgery, and takes no time: BLAKE2b of the same bytes would be a fifth of the work of the
    encoder (docs/measurements). The SHA-256 of a shard of a directory stands in its record.
    """
    import xxhash  # here, so that reading a file needs nothing but numpy and h5py

    return xxhash.xxh3_128_digest(payload)


# -------------------------------------------------------------------------------------------------- the content digest


def content_digest(path: Path) -> str:
    """Return the BLAKE2b, in hex, of everything a reader of the file sees: what `ShardWriter.finish` returned for it.

    It covers, in the order of creation: the path of every object; its attributes by name, with type, shape and value;
    of every dataset the type, shape, greatest shape, chunk shape, filters, fill value and the path of the scale on
    each axis; the digest of every stored chunk of the activations, and the values of every other dataset. It does not
    cover where in the file things lie, the root attributes `content_digest` and `throughput`, nor the object references
    that scales are made of: they enter as the scales' paths.
    """
    with open_shard(path) as file, reading(file):
        return digest_of_open(file, {})


def digest_of_open(file: h5py.File, written: Mapping[str, Layer]) -> str:
    """Compute it. `written` are layers, by path, that this process has just written: they are not read again."""
    hasher = hashlib.blake2b(digest_size=32)
    nodes = list(walk(file, top_node(file), set(), written))
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
class Layer:
    """A layer as it stands in a file, as data: written to the file, and taken into the digest, from here.

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
        """Create all but the activations, which are there, and attach scales. Returns its datasets, by path."""
        group = h5py.h5g.open(file.id, self.path.encode())
        objects.add_attributes(group, self.attrs)
        there = {f"{self.path}/activation": h5py.h5d.open(group, b"activation")}
        there |= {f"{self.path}/{one.name}": objects.create(group, one) for one in self.scales}
        if self.stats is not None:
            inside = objects.create_group(group, "stats")
            there |= {f"{self.path}/stats/{one.name}": objects.create(inside, one) for one in self.stats}
        return there

    def attached(self) -> Iterator[tuple[str, Sequence[str]]]:
        """Yield the path of each dataset, and those of the scales of its axes."""
        yield f"{self.path}/activation", self._axes()
        yield from ((f"{self.path}/stats/{one.name}", one.scales) for one in self.stats or () if one.scales)

    def contents(self) -> LayerContents:
        """Return what `_layer_contents` finds in the file, without reading it."""
        attrs = schema.as_read(objects.attribute_values(self.attrs), schema.LAYER)
        spec = self.spec
        shape, dtype = (self.rows, *spec.shape), np.dtype(spec.dtype).name
        return LayerContents(spec_of(spec.name, shape, dtype, tuple(spec.chunk), tuple(spec.axes), attrs), attrs)

    def _axes(self) -> list[str]:
        return ["/sample", *(f"{self.path}/{axis}" for axis in self.spec.axes)]

    def put(self, hasher: Any) -> None:
        """Put into a digest what `digest_of_open` would read of the file."""
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


def _attribute_parts(node: Node, name: bytes) -> list[str | bytes]:
    stored = h5py.h5a.open(node.id, name)
    dtype, memory = _known_type(stored.get_type().encode())  # before anything is read of another type
    shape = stored.shape
    if shape is None or stored.get_storage_size() > schema.MOST_ATTRIBUTE:
        raise FormatError(f"the attribute {name.decode()} of {node.path} has no value that fmextract would write")
    value = np.zeros(shape, dtype)
    stored.read(value, mtype=memory)
    return objects.array_parts(value)


@functools.lru_cache(maxsize=256)
def _known_type(encoded: bytes) -> tuple[np.dtype[Any], h5py.h5t.TypeID]:
    """Return the type that HDF5 encodes so in memory, numpy's and HDF5's. Raises FormatError for one not of ours."""
    dtype = h5py.h5t.decode(encoded).dtype
    objects.type_name(dtype)
    return dtype, h5py.h5t.py_create(dtype)


def _description(node: Node, paths: Mapping[int, str], where: str) -> list[str | bytes]:
    dataset = node.id
    dtype, _ = _known_type(dataset.get_type().encode())
    shape, plist = dataset.shape, dataset.get_create_plist()
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


def _put_values(hasher: Any, node: Node) -> None:
    shape, dtype = node.id.shape, node.id.dtype
    if not shape:
        raise FormatError(f"{node.path} has no axes, which fmextract does not write")
    if dtype.kind in "iuf" and shape[0] <= COLUMN_CHUNK:
        hasher.update(read_values(node.id).reshape(-1).view(np.uint8))
        return
    dataset = h5py.Dataset(node.id)
    for at in range(0, shape[0], COLUMN_CHUNK):
        part = dataset[at : at + COLUMN_CHUNK]
        if dtype.kind in "iuf":
            hasher.update(part.tobytes())
        else:
            _put(hasher, *part.reshape(-1).tolist())
