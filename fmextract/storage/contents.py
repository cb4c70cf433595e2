"""Read what a file holds as typed values, after checking its structure."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from fmextract.errors import DamagedError, FormatError, OutputError
from fmextract.records import Field, FileInfo, FileStamp, Label, LayerSpec, SampleTable
from fmextract.storage import schema
from fmextract.storage.codecs import Array
from fmextract.storage.columns import Form, decode_column
from fmextract.storage.layout import FIELD_FLAGS, escape_name, unescape_name
from fmextract.storage.validation import Node, children, reading, root_group, sound, top_node, validate_version

# ------------------------------------------------------------------------------------------------------------- reading


def open_file(path: Path) -> h5py.File:
    """Open a file without a lock, since locks fail on network file systems, and nobody changes a finished file."""
    try:
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        if "locking flag" not in str(error):
            raise
        return h5py.File(path, "r")  # this process has it open with locks: libhdf5 wants all openings alike


def open_shard(path: Path) -> h5py.File:
    """Open a file for reading and `validate` it. Raises FormatError; OutputError where there is no file."""
    path = Path(path)
    if not path.is_file():
        raise OutputError(f"there is no file {path}")
    try:
        file = open_file(path)
    except OSError as error:
        raise FormatError(f"{path} is not an HDF5 file, or its beginning is damaged") from error
    try:
        validate(file)
    except BaseException:
        file.close()
        raise
    return file


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


def validate(file: h5py.File) -> Contents:
    """Return what stands in a file. Raises FormatError unless it is of our format and version, and safe to read.

    Safe: nothing in it points outside (external or soft links, external storage, virtual datasets), no object is
    reached twice, every chunk is of bounded size, the file has room for the shapes, and everything except the values
    of datasets is what `storage.schema` says. Damaged structures raise DamagedError.
    """
    with reading(file):
        validate_version(file)
        seen: set[int] = set()
        nodes = {node.path: node for node in sound(file, top_node(file), seen, {"/layers"})}
        return contents_of(file, nodes, partial(_found_layers, file, seen))


_WITHIN_LAYER = 3
"""Slashes in the path of what lies in the group of a layer. What lies deeper, its statistics, is read on demand."""


def contents_of(
    file: h5py.File, nodes: Mapping[str, Node], layers_in: Callable[[Node, int, int | None], list[LayerContents]]
) -> Contents:
    """Return what a file holds, checked. What lies beside its layers, by path in `nodes`, is sound.

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


def _found_layers(file: h5py.File, seen: set[int], group: Node, sample: int, rows: int | None) -> list[LayerContents]:
    """Return the layers in a group, checked. `seen` are the addresses of what lies beside them.

    One after the other, so that libhdf5 still has at hand what it found when it is asked again.
    """
    layers = []
    for layer in children(file, group):
        below = [node for node in sound(file, layer, seen) if node.path.count("/") <= _WITHIN_LAYER]
        with reading(file, layer.path):
            layers.append(_layer_contents(file.filename, layer, below[1:], sample, rows))
    return layers


def _brought_by(file: str, columns: Mapping[str, Node], rows: int | None) -> Iterator[tuple[str | None, Brought]]:
    """Yield the labels, and the datasets that say that they are a `column`."""
    for name, node in columns.items():
        if name in schema.COLUMNS and name != "label":
            continue
        attrs, _ = schema.attributes(node.id, schema.BROUGHT_ATTRIBUTES, f"{file}: /{name}")
        if name == "label" or "column" in attrs:
            _check_column(file, name, node, schema.BROUGHT, rows)
            yield None if name == "label" else attrs["column"], Brought(name, _form(node, attrs))


def _form(node: Node, attrs: Mapping[str, Any]) -> Form:
    shape, is_text = node.id.shape, h5py.check_string_dtype(node.id.dtype) is not None
    kind = attrs.get("encoding", "text") if is_text else "int" if node.id.dtype.kind == "i" else "float"
    length = shape[1] if len(shape) > 1 else None
    return Form(kind, length, attrs.get("_FillValue", -1), "_FillValue" in attrs)


def _check_column(file: str, name: str, column: Node | None, kind: schema.Column, rows: int | None) -> None:
    shape = column.id.shape if column is not None else ()
    if column is None or shape[:1] != (rows,) or len(shape) > kind.axes or 0 in shape:
        raise FormatError(f"{file}: expected /{name} with one value per row")
    has = "text" if h5py.check_string_dtype(column.id.dtype) else column.id.dtype.name
    if has not in kind.types or (has == "text" and len(shape) > 1):
        raise FormatError(f"{file}: expected /{name} of {' or '.join(kind.types)}, got {has}")


def row_range(file: h5py.File) -> range:
    """Return the global rows that the file holds. Raises FormatError where /sample does not count up by one."""
    sample = file["sample"]
    start, last = int(sample[0]), int(sample[-1])
    if last - start + 1 != len(sample):
        raise FormatError(
            f"{file.filename}: expected {len(sample)} rows that follow one another, got {start} to {last}"
        )
    return range(start, last + 1)


def read_info(file: h5py.File) -> FileInfo:
    """Return the root attributes of a file."""
    with reading(file):
        return info_of(*schema.attributes(root_group(file), schema.ROOT, file.filename))


def info_of(attrs: Mapping[str, Any], said: Mapping[str, Any]) -> FileInfo:
    """Return the root attributes that were read, and the values of those that hold JSON."""
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
    """Return a text attribute of any HDF5 file. Raises OSError, RuntimeError, KeyError or ValueError if it is none."""
    with open_file(path) as file:
        return schema.text(schema.attribute(h5py.h5o.open(file.id, group.encode()), name.encode()))


def read_layer(group: h5py.Group) -> LayerSpec:
    """Return the LayerSpec that a layer's group was written from."""
    file, path = group.file, group.name
    with reading(file):
        node = Node(path, group.id, 0)
        sample = h5py.h5o.get_info(file["sample"].id).addr
        return _layer_contents(file.filename, node, list(children(file, node)), sample, None).spec


def _layer_contents(file: str, group: Node, children: Sequence[Node], sample: int, rows: int | None) -> LayerContents:
    """Return a layer, from its group and what lies in it. Raises DamagedError for what no layer of ours is.

    `sample` is the address of the scale of the rows, `rows` their number, None where that was checked.
    """
    where, escaped = f"{file}: {group.path}", group.path.rpartition("/")[2]
    own = {node.path.rpartition("/")[2]: node for node in children}
    if group.is_dataset or "activation" not in own:
        raise FormatError(f"{where}: expected activation, chunked, with one value per row")
    name = unescape_name(escaped)
    name.encode()  # UnicodeEncodeError, which is a ValueError, where it is no text
    if escape_name(name) != escaped:
        raise DamagedError(f"{where}: no layer can have this name")
    shape, dtype, chunk = _activation(where, own["activation"], rows)
    attrs, _ = schema.attributes(group.id, schema.LAYER, where)
    for together in schema.TOGETHER:
        if 0 < sum(one in attrs for one in together) < len(together):
            raise DamagedError(f"{where}: expected the attributes {', '.join(together)}, or none of them")
    return LayerContents(spec_of(name, shape, dtype, chunk, _axes(where, own, sample), attrs), attrs)


def spec_of(
    name: str,
    shape: Sequence[int],
    dtype: str,
    chunk: tuple[int, ...],
    axes: tuple[str, ...],
    attrs: Mapping[str, Any],
) -> LayerSpec:
    """Return a layer as it was written: `shape` is that of its activations, `attrs` are its attributes, checked."""
    field = None
    if "rf_size" in attrs:
        size, stride, offset = (tuple(attrs[f"rf_{part}"].tolist()) for part in ("size", "stride", "offset"))
        flags = {field: attrs.get(f"rf_{flag}", False) for flag, field in FIELD_FLAGS.items()}
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
        number_from_end=attrs.get("number_from_end", ""),
        classes=tuple(attrs.get("classes", "").split()),
        further_paths=tuple(schema.load(attrs.get("further_paths", "[]"))),
    )


def _activation(where: str, data: Node, rows: int | None) -> tuple[tuple[int, ...], str, tuple[int, ...]]:
    """Return shape, type and chunk of the activations of a layer."""
    if not data.is_dataset:
        raise FormatError(f"{where}/activation is no dataset")
    shape, plist = data.id.shape, data.id.get_create_plist()
    if not shape or (rows is not None and shape[0] != rows) or plist.get_layout() != h5py.h5d.CHUNKED:
        raise FormatError(f"{where}: expected activation, chunked, with one value per row")
    dtype = data.id.dtype.name
    if dtype not in schema.ACTIVATION or 0 in shape:
        raise FormatError(f"{where}/activation has values of type {dtype}, shape {shape}")
    return shape, dtype, plist.get_chunk()


def _axes(where: str, own: Mapping[str, Node], sample: int) -> tuple[str, ...]:
    """Return the names of the axes behind the first: those of their scales, which lie in the layer's own group."""
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
    """Return the columns of a file, or of a part of its rows; what is missing among labels is None."""
    with reading(file):
        brought = {title: _read_brought(file, one, part) for title, one in brought_in(file).items()}
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


def brought_in(file: h5py.File) -> dict[str | None, Brought]:
    nodes = {node.path[1:]: node for node in children(file, top_node(file)) if node.is_dataset}
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
    """Return the values of the datasets of a group that are no scales, by name: of all, or `only` of some.

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
            values[name] = read_values(data)
    return values


def read_values(data: h5py.h5d.DatasetID) -> Array:
    """Return all of a dataset, without what h5py wraps around it."""
    dtype, shape = data.dtype, data.shape
    if shape is None or dtype.kind not in "iuf":
        return np.asarray(h5py.Dataset(data)[()])
    values = np.empty(shape, dtype)
    if values.size:
        data.read(h5py.h5s.ALL, h5py.h5s.ALL, values)
    return values


def read_chunk(dataset: h5py.Dataset, chunk_index: Sequence[int]) -> tuple[int, bytes]:
    """Return the filter mask and the stored bytes of one chunk. Raises DamagedError for one that was never written."""
    offset = tuple(i * size for i, size in zip(chunk_index, dataset.chunks, strict=True))
    with reading(dataset.file):
        if dataset.id.get_chunk_info_by_coord(offset).byte_offset is None:
            raise DamagedError(f"{dataset.file.filename}: {dataset.name} has no chunk {tuple(chunk_index)}")
        mask, payload = dataset.id.read_direct_chunk(offset)
    return mask, bytes(payload)
