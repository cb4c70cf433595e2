"""Open image files on disk: a folder, or files named one by one. No torch.

Every row has a key that is unique and never shortened. Bytes of a file name that are not UTF-8, and NUL, show as
`\\xHH`.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fmextract.errors import SampleError, SourceError
from fmextract.inputs.contents import labels_digest, stamps
from fmextract.records import FileStamp, Label, Status

# Formats that Pillow registers but decodes only with a handler of the user's or a foreign program (Ghostscript for
# EPS: no program is started on a stranger's file), or writes only.
NOT_DECODED = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF"})

MAX_FILE_BYTES = 1 << 30
"""Larger files are refused unread: an image of Image.MAX_IMAGE_PIXELS pixels has at most 0.7 GB, uncompressed."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a source is to be opened; `key` and `label` say where its keys and labels come from, see `given`."""

    limit: int | None = None
    allow_outside: bool = False
    key: Any = None
    label: Any = None
    hidden: bool = False


class Names:
    """Many file names as one run of bytes and their ends: the name itself and 8 bytes, where a str takes 50 more."""

    def __init__(self, names: Iterable[bytes] = ()) -> None:
        self._blob = bytearray()
        self._ends = array("Q", [0])
        for name in names:
            self.append(name)

    def append(self, name: bytes) -> None:
        self._blob += name
        self._ends.append(len(self._blob))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, row: int) -> bytes:
        if not 0 <= row < len(self):
            raise IndexError(f"expected a row from 0 to {len(self) - 1}, got {row}")
        return bytes(self._blob[self._ends[row] : self._ends[row + 1]])

    def digest(self) -> str:
        """Return BLAKE2b (128 bits) of the names and where each ends."""
        ends = self._ends if sys.byteorder == "little" else array("Q", self._ends)
        if ends is not self._ends:
            ends.byteswap()
        return hashlib.blake2b(ends.tobytes() + self._blob, digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class FileSource:
    """Image files on disk. `load` returns a file's bytes.

    `paths` are relative to `root`; `keys` is the same object where a file's path is its key. `columns` are what a
    manifest says of its rows besides; `is_folder`: all the images of one folder, found there.
    """

    name: str
    root: bytes
    paths: Names
    keys: Names
    labels: Sequence[Label] | None = None
    columns: Mapping[str, Sequence[Label]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    is_folder: bool = False

    @classmethod
    def of_paths(
        cls, paths: Iterable[str | os.PathLike[str]], name: str, labels: Sequence[Label] | None = None
    ) -> FileSource:
        """Return a source of single files, relative to the working directory; the key is the path as it was given."""
        held = Names(map(os.fsencode, paths))
        return cls(name, os.fsencode(Path.cwd()), held, held, labels)

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, row: int) -> str:
        return shown_name(self.keys[row])

    def label(self, row: int) -> Label:
        return None if self.labels is None else self.labels[row]

    def load(self, row: int) -> FileBytes:
        """Return the whole file. Raises SampleError(Status.UNREADABLE) unless it is a readable regular file."""
        return read_file(os.path.join(self.root, self.paths[row]))  # noqa: PTH118  bytes: pathlib knows only str

    def fingerprint(self) -> Mapping[str, Any]:
        """Return count, digests of the keys, of the labels, and of every file's size and time. Reads no file."""
        stamped = stamps(os.path.join(self.root, path) for path in self._each_path())  # noqa: PTH118
        return {"count": len(self), "keys": self.keys.digest(), **stamped, **labels_digest(self.labels, self.columns)}

    def _each_path(self) -> Iterator[bytes]:
        return (self.paths[row] for row in range(len(self)))


def shown_name(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace").replace("\0", "\\x00")


@dataclass(frozen=True, slots=True)
class OnDisk:
    """The file of a row, for another process to read."""

    path: bytes

    def read(self) -> FileBytes:
        """Return what `load` gives. Raises as that does."""
        return read_file(self.path)


class FileBytes(bytes):
    """The bytes of a file, marked as such: a row was made of one file."""

    def stamp(self) -> FileStamp:
        import xxhash  # here, so that opening a source needs no more than it did

        return FileStamp(len(self), xxhash.xxh3_128_hexdigest(self))


def stamp_of(loaded: Any) -> FileStamp:
    """Return the size and digest of a file that a source loaded; of anything else, that it is no file."""
    return loaded.stamp() if isinstance(loaded, FileBytes) else FileStamp()


def read_file(path: bytes) -> FileBytes:
    try:
        # O_NONBLOCK: opening a FIFO without a writer would block for ever; for a regular file it means nothing.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb", buffering=0) as file:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise SampleError(Status.UNREADABLE, "not a regular file")
            if status.st_size > MAX_FILE_BYTES:
                raise SampleError(Status.UNREADABLE, f"{status.st_size} bytes, more than the {MAX_FILE_BYTES} allowed")
            return FileBytes(file.readall())
    except OSError as error:
        raise SampleError(Status.UNREADABLE, error.strerror or type(error).__name__) from error


def image_extensions() -> frozenset[bytes]:
    """Return the file name extensions of every format that Pillow decodes by itself: lower case, with the dot.

    Looked up for every source: a plug-in for another format may be registered at any time.
    """
    from PIL import Image

    return frozenset(
        extension.encode() for extension, kind in Image.registered_extensions().items() if kind not in NOT_DECODED
    )


def refuse_duplicates(keys: Iterable[str]) -> None:
    seen: dict[str, int] = {}
    for row, key in enumerate(keys):
        first = seen.setdefault(key, row)
        if first != row:
            raise SourceError(f"rows {first} and {row} have the same key {key!r}: keys must differ")
