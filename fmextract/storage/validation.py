"""Check a file before it is trusted: layout, chunks and heaps, before libhdf5 is asked for values."""

from __future__ import annotations

import contextlib
import math
import os
import struct
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import h5py

from fmextract.errors import DamagedError, FmextractError, FormatError
from fmextract.records import FORMAT, FORMAT_VERSION
from fmextract.storage import schema
from fmextract.storage.codecs import filters_flaw, most_stored
from fmextract.storage.layout import INFLATION, MAX_CHUNK_BYTES, chunk_grid

HEAP = b"GCOL\x01\0\0\0"


EDGE = 8 * 2**20
"""Bytes looked at from both ends. The writers put strings before the first and after the last chunk of activations; in
a larger file only a heap put elsewhere on purpose, or one of 10^5 keys, is not seen."""


_SIZE = struct.Struct("<Q")


_OBJECT = struct.Struct("<HHIQ")


def check_heaps(fd: int, path: Path) -> None:
    """Raise DamagedError where a global heap in the open file would make libhdf5 walk for ever."""
    nbytes = os.fstat(fd).st_size
    for start in {0, max(0, nbytes - EDGE)}:
        window = os.pread(fd, EDGE, start)
        at = window.find(HEAP)
        while at >= 0:
            if not _walkable(window, at):
                raise DamagedError(f"{path} is damaged: the strings at byte {start + at} are broken")
            at = window.find(HEAP, at + 1)


def _walkable(window: bytes, heap: int) -> bool:
    """Return whether every object ends where the next one can begin. What lies outside the window is not looked at."""
    at, limit = heap + len(HEAP) + _SIZE.size, len(window) - _OBJECT.size
    if at > len(window):
        return True
    end = heap + _SIZE.unpack_from(window, heap + len(HEAP))[0]
    last = min(end - _OBJECT.size, limit)
    unpack, header = _OBJECT.unpack_from, _OBJECT.size  # looked up once: a file of 10^5 keys has as many objects
    while at <= last:
        index, _, _, size = unpack(window, at)
        # Object 0 is the free space, and its size counts its own header.
        step = size if index == 0 else header + -(-size // 8) * 8
        if not header <= step <= end - at:
            return False
        at += step
    return True


_CHUNK_RECORD_BYTES = 24
"""The fewest bytes that a chunk takes in an HDF5 index: so a small file cannot claim a huge shape."""
_TEXT_BYTES = 16
"""Bytes that a text of variable length takes in a dataset: its length, and its place in a heap."""


@contextlib.contextmanager
def reading(file: h5py.File | Path, place: str | Callable[[], str] = "") -> Iterator[None]:
    """Turn whatever libraries raise on damaged bytes, which may be anything, into DamagedError."""
    try:
        yield
    except FmextractError:
        raise
    except Exception as error:
        # libhdf5, h5py and codecs raise OSError, RuntimeError, KeyError, ValueError, TypeError, … for a broken file.
        name = file if isinstance(file, Path) else file.filename
        said = place if isinstance(place, str) else place()
        where = f"{name}: {said}" if said else name
        raise DamagedError(f"{where} is damaged: {str(error) or type(error).__name__}") from error


def sound(file: h5py.File, top: Node, seen: set[int], closed: Container[str] = ()) -> Iterator[Node]:
    """Yield what `_walk` finds, each dataset checked."""
    name, size, based = file.filename, file.id.get_filesize(), file.userblock_size > 0
    node = top
    with reading(file, lambda: node.path):
        for node in walk(file, top, seen, closed):
            if node.is_dataset and (based or not _is_plain(node.id)):
                _validate_dataset(name, node, size)
            yield node


def validate_version(file: h5py.File) -> None:
    name, root = file.filename, root_group(file)
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


def root_group(file: h5py.File) -> h5py.h5g.GroupID:
    return h5py.h5o.open(file.id, b"/")


def top_node(file: h5py.File) -> Node:
    root = root_group(file)
    return Node("/", root, h5py.h5o.get_info(root).addr)


class Node(NamedTuple):
    """An object of a file, by its identifier alone: with many objects h5py's wrappers would take most of the time."""

    path: str
    id: h5py.h5g.GroupID | h5py.h5d.DatasetID
    address: int

    @property
    def is_dataset(self) -> bool:
        return isinstance(self.id, h5py.h5d.DatasetID)


def walk(file: h5py.File, top: Node, seen: set[int], closed: Container[str] = ()) -> Iterator[Node]:
    """Yield every object at and below `top`, groups in the order of creation. Follows hard links only.

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
            stack.extend(reversed(list(children(file, node))))


def children(file: h5py.File, group: Node) -> Iterator[Node]:
    """Yield what lies in a group, in the order of creation. Raises FormatError for links that are not hard."""
    prefix = group.path.rstrip("/")
    for name, kind, address in _links(group.id):
        path = f"{prefix}/{name.decode('utf-8', 'surrogateescape')}"
        if kind != h5py.h5l.TYPE_HARD:
            raise FormatError(f"{file.filename}: {path} is a link, which fmextract does not write")
        child = h5py.h5o.open(group.id, name)
        if not isinstance(child, h5py.h5g.GroupID | h5py.h5d.DatasetID):
            raise FormatError(f"{file.filename}: {path} is not a dataset or group of its own")
        yield Node(path, child, address)


def _links(group: h5py.h5g.GroupID) -> list[tuple[bytes, int, Any]]:
    """Return (name, type, address of the object) of each link, in the order of creation if kept, else by name."""
    links: list[tuple[bytes, int, Any]] = []
    kept = group.get_create_plist().get_link_creation_order() & h5py.h5p.CRT_ORDER_TRACKED
    order = h5py.h5.INDEX_CRT_ORDER if kept else h5py.h5.INDEX_NAME
    group.links.iterate(lambda name, link: links.append((name, link.type, link.u)), info=True, idx_type=order)
    return links


def _is_plain(data: h5py.h5d.DatasetID) -> bool:
    """Return whether a dataset is as nearly all are: numbers or texts, in one piece in the file, all of them there.

    `_validate_dataset` would find nothing wrong; its creation properties, which are slow to get, need not be read. Only
    what lies in the file itself, in one piece, has an offset (in a file without a user block).
    """
    if data.get_offset() is None:
        return False
    kind, shape = data.get_type(), data.shape
    return (
        shape is not None
        and schema.is_storable(kind.encode())
        and math.prod(shape) * kind.get_size() == data.get_storage_size()
    )


def _validate_dataset(file: str, node: Node, file_size: int) -> None:
    where = f"{file}: {node.path}"
    plist, shape, dtype = node.id.get_create_plist(), node.id.shape, node.id.dtype
    layout = plist.get_layout()
    if layout not in (h5py.h5d.CHUNKED, h5py.h5d.CONTIGUOUS, h5py.h5d.COMPACT) or plist.get_external_count():
        raise FormatError(f"{where} keeps its values outside the file, which fmextract does not write")
    if shape is None or not schema.is_storable(node.id.get_type().encode()):
        raise FormatError(f"{where} has values of type {dtype}, which fmextract does not write")
    if layout == h5py.h5d.CHUNKED:
        _validate_chunks(where, node, plist, file_size)
    elif math.prod(shape) * _stored_bytes(node.id) != node.id.get_storage_size():
        raise DamagedError(f"{where} has the shape {shape}, but not the bytes for it")


def _validate_chunks(where: str, node: Node, plist: h5py.h5p.PropDCID, file_size: int) -> None:
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
    if node.id.get_storage_size() > count * most_stored(math.prod(chunks) * _stored_bytes(node.id)):
        raise DamagedError(f"{where} has chunks that hold more than its values")


def _stored_bytes(data: h5py.h5d.DatasetID) -> int:
    """Return how many bytes a value takes in the file; the type of texts tells the size of a pointer."""
    return _TEXT_BYTES if data.dtype.kind == "O" else data.get_type().get_size()
