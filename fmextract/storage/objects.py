"""Small HDF5 objects by the thousand: written with few calls, and said to the digest without reading them again.

A layer is about fifteen small datasets and as many attributes, so that of many layers these are the work, not the
activations. Here types, spaces and property lists are made once and shared, nothing is wrapped in h5py's classes, and
the scales of all datasets are attached at the end, at once: `H5DSattach_scale` writes the whole list of what a scale
is attached to for every one that is added.

    Values      a dataset of fixed shape, as data            set_attributes   name → value, of an object
    create      Values → dataset                             attach_scales    dataset → its scales, for many
    *_parts     what the digest takes in of an attribute or of Values: `store` says the same of what it reads
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import h5py
import numpy as np
import numpy.typing as npt

from fmextract.common import strict_json
from fmextract.errors import FormatError

Array: TypeAlias = npt.NDArray[Any]
Node: TypeAlias = "h5py.h5g.GroupID | h5py.h5d.DatasetID"
Parts: TypeAlias = "list[str | bytes]"
"""What the digest takes in, one after the other."""

TEXT = h5py.string_dtype("utf-8")
_REFERENCE = h5py.ref_dtype
_LIST = h5py.vlen_dtype(_REFERENCE)
_ENTRY = np.dtype(
    {"names": ["dataset", "dimension"], "formats": [_REFERENCE, np.uint32], "offsets": [0, 8], "itemsize": 16}
)
"""Of a `REFERENCE_LIST`, as libhdf5 lays it out."""
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
_TEXT, _LISTS, _ENTRIES = _made(TEXT), _made(_LIST), _made(_ENTRY)


def _kind(dtype: np.dtype[Any]) -> Kind:
    return _TEXT if dtype.hasobject else _number(dtype)


@functools.cache
def _creation() -> h5py.h5p.PropDCID:
    return creation()


def creation() -> h5py.h5p.PropDCID:
    """What all datasets have in common."""
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_obj_track_times(False)
    # More than 64 kB of scale references need attributes in a tree of their own, which tracking their order brings.
    plist.set_attr_creation_order(h5py.h5p.CRT_ORDER_TRACKED | h5py.h5p.CRT_ORDER_INDEXED)
    return plist


def _space(shape: tuple[int, ...]) -> h5py.h5s.SpaceID:
    return h5py.h5s.create_simple(shape) if shape else h5py.h5s.create(h5py.h5s.SCALAR)


def create(group: h5py.h5g.GroupID, made: Values) -> h5py.h5d.DatasetID:
    """The dataset, a scale where it has none itself; those of others are attached by `attach_scales`."""
    kind, memory = _kind(made.values.dtype)
    name, values = made.name.encode(), np.ascontiguousarray(made.values)
    data = h5py.h5d.create(group, name, kind, _space(values.shape), _creation())
    data.write(h5py.h5s.ALL, h5py.h5s.ALL, values, memory)
    if not made.scales:
        h5py.h5ds.set_scale(data, name)
    set_attributes(data, made.attrs)
    return data


def set_attributes(node: Node, attrs: Mapping[str, Any]) -> None:
    """Write attributes of types that every netCDF-4 reader knows, over those of the same names; None is left out."""
    for name, value in attrs.items():
        if value is None:
            continue
        array, encoded = _attribute(value), name.encode()
        if h5py.h5a.exists(node, encoded):
            h5py.h5a.delete(node, encoded)
        _write_attribute(node, encoded, array, _kind(array.dtype))


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
    """HDF5 ends a string at NUL, and holds only what UTF-8 can say."""
    said = said.replace("\0", "\\x00")
    return said.encode("utf-8", "backslashreplace").decode()


def attach_scales(file: h5py.File, datasets: Iterable[tuple[str, Sequence[str]]]) -> None:
    """Attach scales to the axes of datasets: of each its path, and the paths of the scales, which have nothing yet."""
    references: dict[str, h5py.h5r.Reference] = {}
    used: dict[str, list[tuple[h5py.h5r.Reference, int]]] = {}

    def reference(path: str) -> h5py.h5r.Reference:
        if path not in references:
            references[path] = h5py.h5r.create(file.id, path.encode(), h5py.h5r.OBJECT)
        return references[path]

    for path, scales in datasets:
        lists, own = np.empty(len(scales), _LIST), reference(path)
        for axis, scale in enumerate(scales):
            lists[axis] = np.array([reference(scale)], _REFERENCE)
            used.setdefault(scale, []).append((own, axis))
        _write_attribute(h5py.h5d.open(file.id, path.encode()), b"DIMENSION_LIST", lists, _LISTS)
    for path, entries in used.items():
        _write_attribute(h5py.h5d.open(file.id, path.encode()), b"REFERENCE_LIST", np.array(entries, _ENTRY), _ENTRIES)


# ---------------------------------------------------------------------------------------------------------- the digest


def type_name(dtype: np.dtype[Any]) -> str:
    if dtype.kind in "iuf":
        return dtype.str
    if said := h5py.check_string_dtype(dtype):
        return f"text:{said.encoding}:{said.length}"
    raise FormatError(f"values of type {dtype}, which fmextract does not write")


def array_parts(value: Array) -> Parts:
    """Type, shape and value of an attribute."""
    kind, shape = type_name(value.dtype), str(value.shape)
    if value.dtype.kind in "iuf":
        return [kind, shape, value.tobytes()]
    return [kind, shape, *value.astype(object).reshape(-1).tolist()]


def attributes_parts(attrs: Mapping[str, Any]) -> Iterator[Parts]:
    """Of attributes that `set_attributes` wrote."""
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
    """What there is to say of a dataset beside its values; the `scales` are the paths of those on each axis."""
    named = [part for axis, paths in enumerate(scales) for part in (f"axis {axis}", *paths)]
    return [type_name(dtype), str((shape, greatest, chunk, list(filters))), fill, *named]


def values_parts(made: Values) -> Iterator[Parts]:
    """The attributes and the description of a dataset; its values follow as they are in memory."""
    attrs = dict(made.attrs)
    if not made.scales:
        fixed = {"CLASS": b"DIMENSION_SCALE", "NAME": made.name.encode()}
        yield from (
            ["attribute", name, *array_parts(np.array(said, f"S{len(said) + 1}"))] for name, said in fixed.items()
        )
    yield from attributes_parts(attrs)
    dtype, shape = made.values.dtype, made.values.shape
    yield dataset_parts(dtype, shape, shape, None, (), bytes(dtype.itemsize), [[path] for path in made.scales])
