"""Write small HDF5 objects by the thousand with few calls, and put them into the digest without reading them again.

A layer is about fifteen small datasets and as many attributes; for many layers these are the work, not the activations.
Here types, spaces and property lists are made once and shared, nothing is wrapped in h5py's classes, and the scales of
all datasets are attached at once, at the end: `H5DSattach_scale` would write the whole list of what a scale is attached
to each time one is added. Datasets that are open are not looked up by their paths.

    Values      a dataset of fixed shape, as data            set_attributes   name → value, of an object
    create      Values → dataset                             attach_scales    dataset → its scales, for many
    create_group    a group in it                            add_attributes   the same, of one that has none yet
    *_parts     what the digest takes in of an attribute or of Values: `digest` reads the same from a file
    framed      parts as the bytes that the digest takes in
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import h5py
import numpy as np
import numpy.typing as npt

from fmextract.common import strict_json
from fmextract.errors import FormatError

Array: TypeAlias = npt.NDArray[Any]
Node: TypeAlias = "h5py.h5g.GroupID | h5py.h5d.DatasetID"
Parts: TypeAlias = "list[str | bytes]"
"""What the digest takes in, in order."""

TEXT = h5py.string_dtype("utf-8")
_ENTRY = np.dtype(
    {"names": ["dataset", "dimension"], "formats": [np.uint64, np.uint32], "offsets": [0, 8], "itemsize": 16}
)
"""Of a `REFERENCE_LIST`, as libhdf5 lays it out. In memory a reference to an object is the number where it lies."""
_SEQUENCE = np.dtype([("length", np.uintp), ("values", np.uintp)])
"""What a value of variable length is in memory."""
_COMPACT = 64
"""Up to so many attributes of a group lie in its header. By default more than 8 bring a heap and two trees of their
own, which are slow to write and to read, and take 1 KiB per layer."""
Entries: TypeAlias = "list[tuple[int, int]]"
"""Of a scale: each dataset that it is attached to, and the axis."""
Kind: TypeAlias = tuple[h5py.h5t.TypeID, h5py.h5t.TypeID]
"""A type in the file, and in memory."""


class Values(NamedTuple):
    """A dataset of fixed shape. `scales` are the paths of those on its axes; without them it is a scale itself."""

    name: str
    values: Array
    scales: tuple[str, ...] = ()
    attrs: Mapping[str, Any] = {}


# ------------------------------------------------------------------------------------------------------------- writing


def _made(dtype: np.dtype[Any]) -> Kind:
    return h5py.h5t.py_create(dtype, logical=True), h5py.h5t.py_create(dtype)


_number = functools.cache(_made)  # of numbers alone: numpy calls texts and references equal
_TEXT = _made(TEXT)
_LIST_TYPE = h5py.h5t.vlen_create(h5py.h5t.STD_REF_OBJ)
_ENTRY_TYPE = h5py.h5t.create(h5py.h5t.COMPOUND, _ENTRY.itemsize)
_ENTRY_TYPE.insert(b"dataset", 0, h5py.h5t.STD_REF_OBJ)
_ENTRY_TYPE.insert(b"dimension", 8, h5py.h5t.NATIVE_UINT32)


def kind_of(dtype: np.dtype[Any]) -> Kind:
    return _TEXT if dtype.hasobject else _number(dtype)


@functools.cache
def _creation() -> h5py.h5p.PropDCID:
    return creation()


def creation() -> h5py.h5p.PropDCID:
    """Return the properties that all datasets share."""
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_obj_track_times(False)
    # More than 64 kB of scale references need attributes in a tree of their own, which tracking their order brings.
    plist.set_attr_creation_order(h5py.h5p.CRT_ORDER_TRACKED | h5py.h5p.CRT_ORDER_INDEXED)
    return plist


@functools.cache
def _group_creation() -> h5py.h5p.PropGCID:
    """Return the properties of h5py's `create_group(…, track_order=True)`."""
    plist, order = h5py.h5p.create(h5py.h5p.GROUP_CREATE), h5py.h5p.CRT_ORDER_TRACKED | h5py.h5p.CRT_ORDER_INDEXED
    plist.set_link_creation_order(order)
    plist.set_attr_creation_order(order)
    plist.set_obj_track_times(False)
    plist.set_attr_phase_change(_COMPACT, _COMPACT // 2)
    return plist


@functools.cache
def _utf8() -> h5py.h5p.PropLCID:
    plist = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    plist.set_char_encoding(h5py.h5t.CSET_UTF8)
    return plist


def create_group(group: h5py.h5g.GroupID, name: str) -> h5py.h5g.GroupID:
    """Create an empty group that keeps the order in which things are put into it."""
    return h5py.h5g.create(group, name.encode(), None if name.isascii() else _utf8(), _group_creation())


@functools.lru_cache(1024)
def _space(shape: tuple[int, ...]) -> h5py.h5s.SpaceID:
    return h5py.h5s.create_simple(shape) if shape else h5py.h5s.create(h5py.h5s.SCALAR)


def create(group: h5py.h5g.GroupID, made: Values) -> h5py.h5d.DatasetID:
    """Create the dataset: a scale where it has none itself; `attach_scales` attaches those of others."""
    kind, memory = kind_of(made.values.dtype)
    name, values = made.name.encode(), np.ascontiguousarray(made.values)
    data = h5py.h5d.create(group, name, kind, _space(values.shape), _creation())
    data.write(h5py.h5s.ALL, h5py.h5s.ALL, values, memory)
    if not made.scales:
        for attribute in _scale_attributes(name):
            _write_attribute(data, *attribute)
    add_attributes(data, made.attrs)
    return data


@functools.lru_cache(1024)
def _scale_attributes(name: bytes) -> tuple[tuple[bytes, Array, Kind], ...]:
    """Return name, value and type of what `H5DSset_scale` writes, which looks through all attributes first."""
    said = {b"CLASS": b"DIMENSION_SCALE", b"NAME": name}
    return tuple(
        (one, np.array(value, f"S{len(value) + 1}"), _fixed_text(len(value) + 1)) for one, value in said.items()
    )


@functools.cache
def _fixed_text(size: int) -> Kind:
    """Return the type of a C text, which ends at NUL."""
    kind = h5py.h5t.C_S1.copy()
    kind.set_size(size)
    kind.set_strpad(h5py.h5t.STR_NULLTERM)
    return kind, kind


def add_attributes(node: Node, attrs: Mapping[str, Any]) -> None:
    """Do what `set_attributes` does, where no attribute has any of the names yet."""
    for name, value in attrs.items():
        if value is not None:
            array = _attribute(value)
            _write_attribute(node, name.encode(), array, kind_of(array.dtype))


def set_attributes(node: Node, attrs: Mapping[str, Any]) -> None:
    """Write attributes of types that every netCDF-4 reader knows, over those of the same names; leave out None."""
    for name, value in attrs.items():
        if value is None:
            continue
        array, encoded = _attribute(value), name.encode()
        if h5py.h5a.exists(node, encoded):
            h5py.h5a.delete(node, encoded)
        _write_attribute(node, encoded, array, kind_of(array.dtype))


def _write_attribute(node: Node, name: bytes, array: Array, kind: Kind) -> None:
    h5py.h5a.create(node, name, kind[0], _space(array.shape)).write(array, mtype=kind[1])


def _attribute(value: Any) -> Array:
    if isinstance(value, Mapping):
        value = strict_json.dumps(value, sort_keys=True, ensure_ascii=False)
    if isinstance(value, str):
        return np.array(text(value), TEXT)
    if isinstance(value, bool | np.bool_):
        return np.array(value, np.uint8)  # HDF5 has no booleans, and h5py's stand-in, an enumeration, is not netCDF
    array = np.asarray(value)
    if array.dtype.kind not in "iuf" or array.dtype.itemsize > 8:
        raise ValueError(f"expected a text, a number, a mapping or an array of numbers as attribute, got {value!r}")
    return np.ascontiguousarray(array).reshape(array.shape)


def text(said: str) -> str:
    """Return what HDF5 can hold of a text: it ends at NUL, and is UTF-8."""
    said = said.replace("\0", "\\x00")
    return said.encode("utf-8", "backslashreplace").decode()


def attach_scales(
    file: h5py.File,
    datasets: Iterable[tuple[str, Sequence[str]]],
    opened: Mapping[str, h5py.h5d.DatasetID] = MappingProxyType({}),
    later: Mapping[str, Entries] = MappingProxyType({}),
) -> None:
    """Attach scales to the axes of datasets. For each: its path and those of its scales, all still unattached.

    `opened` are those that need not be looked up, by their paths. What the scales in `later` are attached to is put
    there, for `write_references` once it is all known.
    """
    nodes, addresses = dict(opened), dict[str, int]()
    used = dict[str, Entries]()

    def address(path: str) -> int:
        if path not in addresses:
            if path not in nodes:
                nodes[path] = h5py.h5d.open(file.id, path.encode())
            addresses[path] = h5py.h5o.get_info(nodes[path]).addr
        return addresses[path]

    lists: dict[tuple[str, ...], tuple[Array, Array]] = {}  # nearly all datasets of a layer have the same scales
    for path, scales in datasets:
        own, alike = address(path), tuple(scales)
        if alike not in lists:
            held = np.array([address(scale) for scale in scales], np.uint64)
            start = held.__array_interface__["data"][0]  # what `held.ctypes.data` says, at once
            pointers = np.array([(1, start + i * held.itemsize) for i in range(len(scales))], _SEQUENCE)
            lists[alike] = pointers, held  # kept, since it is pointed to
        for axis, scale in enumerate(scales):
            (later[scale] if scale in later else used.setdefault(scale, [])).append((own, axis))
        _write_attribute(nodes[path], b"DIMENSION_LIST", lists[alike][0], (_LIST_TYPE, _LIST_TYPE))
    for path, entries in used.items():
        _write_references(nodes[path], entries)


def write_references(file: h5py.File, later: Mapping[str, Entries]) -> None:
    """Write what `attach_scales` left for later."""
    for path, entries in later.items():
        _write_references(h5py.h5d.open(file.id, path.encode()), entries)


def _write_references(scale: h5py.h5d.DatasetID, entries: Entries) -> None:
    values = np.zeros(len(entries), _ENTRY)
    values["dataset"], values["dimension"] = zip(*entries, strict=True)
    _write_attribute(scale, b"REFERENCE_LIST", values, (_ENTRY_TYPE, _ENTRY_TYPE))


# ---------------------------------------------------------------------------------------------------------- the digest


def framed(*parts: str | bytes) -> bytes:
    """Return the parts as one, so that no other sequence of parts gives the same: each after its length."""
    encoded = [part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part for part in parts]
    return b"".join([piece for data in encoded for piece in (len(data).to_bytes(8, "little"), data)])


def type_name(dtype: np.dtype[Any]) -> str:
    if dtype.kind in "iuf":
        return dtype.str
    if said := h5py.check_string_dtype(dtype):
        return f"text:{said.encoding}:{said.length}"
    raise FormatError(f"values of type {dtype}, which fmextract does not write")


def array_parts(value: Array) -> Parts:
    """Return type, shape and value of an attribute."""
    kind, shape = type_name(value.dtype), str(value.shape)
    if value.dtype.kind in "iuf":
        return [kind, shape, value.tobytes()]
    return [kind, shape, *value.astype(object).reshape(-1).tolist()]


def attribute_values(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `schema.attributes` reads of attributes that `set_attributes` wrote: texts, numbers, arrays."""
    arrays = {name: _attribute(attrs[name]) for name in sorted(attrs) if attrs[name] is not None}
    return {name: array if array.shape else array.item() for name, array in arrays.items()}


def attributes_parts(attrs: Mapping[str, Any]) -> Iterator[Parts]:
    """Yield what the digest takes in of attributes that `set_attributes` wrote."""
    for name in sorted(name for name, value in attrs.items() if value is not None):
        yield ["attribute", name, *array_parts(_attribute(attrs[name]))]


def dataset_parts(
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    greatest: tuple[int | None, ...],
    chunk: tuple[int, ...] | None,
    filters: Sequence[tuple[int, int, tuple[int, ...]]],
    fill: bytes,
    scales: Sequence[Sequence[str]],
) -> Parts:
    """Describe a dataset, except its values; `scales` are the paths of the scales on each axis."""
    named = [part for axis, paths in enumerate(scales) for part in (f"axis {axis}", *paths)]
    return [type_name(dtype), str((shape, greatest, chunk, list(filters))), fill, *named]


def values_framed(made: Values) -> bytes:
    """Return the attributes and the description of a dataset, framed; its values follow as they are in memory."""
    scale = b"" if made.scales else _scale_framed(made.name)
    attrs = b"".join([framed(*parts) for parts in attributes_parts(made.attrs)])
    named = [part for axis, path in enumerate(made.scales) for part in (f"axis {axis}", path)]
    return scale + attrs + _described(made.values.dtype, made.values.shape) + framed(*named)


@functools.lru_cache(1024)
def _scale_framed(name: str) -> bytes:
    """Return the attributes that make a dataset a scale."""
    fixed = {"CLASS": b"DIMENSION_SCALE", "NAME": name.encode()}
    values = {attr: np.array(said, f"S{len(said) + 1}") for attr, said in fixed.items()}
    return b"".join(framed("attribute", attr, *array_parts(value)) for attr, value in values.items())


@functools.lru_cache(1024)
def _described(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """Describe a dataset of fixed shape, except its scales."""
    return framed(*dataset_parts(dtype, shape, shape, None, (), bytes(dtype.itemsize), ()))
