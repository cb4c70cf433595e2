"""Image files on disk: a folder, or files named one by one. No torch.

Every row has a key that is unique and never shortened. Bytes of a file name that are not UTF-8, and NUL, show as
`\\xHH`.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import posixpath
import stat
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmextract.errors import SampleError, SourceError
from fmextract.records import FileStamp, Status

# Formats that Pillow registers but decodes only with a handler of the user's or a foreign program (Ghostscript for
# EPS: no program is started on a stranger's file), or writes only.
NOT_DECODED = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF"})

MAX_FILE_BYTES = 1 << 30
"""Larger files are refused unread: an image of Image.MAX_IMAGE_PIXELS pixels has at most 0.7 GB, uncompressed."""


@dataclass(frozen=True, slots=True)
class Options:
    limit: int | None
    allow_outside: bool


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
        """BLAKE2b (128 bits) of the names and where each ends."""
        ends = self._ends if sys.byteorder == "little" else array("Q", self._ends)
        if ends is not self._ends:
            ends.byteswap()
        return hashlib.blake2b(ends.tobytes() + self._blob, digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class FileSource:
    """Image files on disk. `load` returns a file's bytes.

    `paths` are relative to `root`; `keys` is the same object where a file's path is its key.
    """

    name: str
    root: bytes
    paths: Names
    keys: Names
    labels: Sequence[int | str | None] | None = None

    @classmethod
    def of_paths(cls, paths: Iterable[str | os.PathLike[str]], name: str) -> FileSource:
        """Files named one by one, relative to the working directory; the key is the path as it was given."""
        names = [os.fsencode(path) for path in paths]
        refuse_duplicates(shown_name(path) for path in names)
        held = Names(names)
        return cls(name, os.fsencode(Path.cwd()), held, held)

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, row: int) -> str:
        return shown_name(self.keys[row])

    def label(self, row: int) -> int | str | None:
        return None if self.labels is None else self.labels[row]

    def load(self, row: int) -> FileBytes:
        """The whole file. Raises SampleError(Status.UNREADABLE) for anything that is not a readable regular file."""
        return read_file(os.path.join(self.root, self.paths[row]))  # noqa: PTH118  bytes: pathlib knows only str

    def fingerprint(self) -> Mapping[str, Any]:
        """Count, digest of the keys, digest of every file's size (-1 where there is none). Reads no file."""
        sizes = array("q", (_size(os.path.join(self.root, path)) for path in self._each_path()))  # noqa: PTH118
        if sys.byteorder != "little":
            sizes.byteswap()
        digest = hashlib.blake2b(sizes.tobytes(), digest_size=16).hexdigest()
        return {"count": len(self), "keys": self.keys.digest(), "sizes": digest}

    def _each_path(self) -> Iterator[bytes]:
        return (self.paths[row] for row in range(len(self)))


def shown_name(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace").replace("\0", "\\x00")


def _size(path: bytes) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116
    except OSError:
        return -1


@dataclass(frozen=True, slots=True)
class OnDisk:
    """The file of a row, for another process to read."""

    path: bytes

    def read(self) -> FileBytes:
        """What `load` gives. Raises as that does."""
        return read_file(self.path)


class FileBytes(bytes):
    """All that is in a file: so is known, wherever it comes from, that a row was made of one."""

    def stamp(self) -> FileStamp:
        import xxhash  # here, so that opening a source needs no more than it did

        return FileStamp(len(self), xxhash.xxh3_128_hexdigest(self))


def stamp_of(loaded: Any) -> FileStamp:
    """Of what a source loaded: the size and digest of a file; of anything else, that it is none."""
    return loaded.stamp() if isinstance(loaded, FileBytes) else FileStamp()


def read_file(path: bytes) -> FileBytes:
    try:
        # O_NONBLOCK: opening a FIFO that nobody writes to would block for ever; for a regular file it means nothing.
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


@functools.cache
def image_extensions() -> frozenset[bytes]:
    """The file name extensions of every format that Pillow decodes by itself: lower case, with the dot."""
    from PIL import Image

    return frozenset(
        extension.encode() for extension, kind in Image.registered_extensions().items() if kind not in NOT_DECODED
    )


def open_folder(folder: Path, options: Options) -> FileSource:
    others: list[int] = [0]
    names = Names()
    for path in _walk(os.fsencode(folder), others):
        names.append(path)
        if len(names) == options.limit:
            break
    if not names:
        looked_for = " ".join(sorted(extension.decode() for extension in image_extensions()))
        raise SourceError(
            f"no images in {str(folder)!r} or the folders below it, but {others[0]} other files. "
            f"Looked for the extensions {looked_for}"
        )
    return FileSource(str(folder), os.fsencode(folder.absolute()), names, names)


@dataclass(frozen=True, slots=True)
class _Directory:
    """A directory being walked: what is left of it, and who it is, to see when a link leads back up."""

    prefix: bytes
    identity: tuple[int, int]
    entries: Iterator[tuple[bytes, bool]]


def _walk(root: bytes, others: list[int]) -> Iterator[bytes]:
    """Relative paths of the images below `root`, in the order of their keys, found directory by directory.

    `others[0]` counts the files passed over. Links to directories are followed, but never to one that is being walked.
    """
    extensions = image_extensions()
    open_directories = [_enter(root, b"")]
    while open_directories:
        here = open_directories[-1]
        entry = next(here.entries, None)
        if entry is None:
            open_directories.pop()
            continue
        name, is_directory = entry
        if is_directory:
            below = _enter(root, here.prefix + name + b"/")
            if below.identity not in (directory.identity for directory in open_directories):
                open_directories.append(below)
        elif posixpath.splitext(name)[1].lower() in extensions:
            yield here.prefix + name
        else:
            others[0] += 1


def _enter(root: bytes, prefix: bytes) -> _Directory:
    path = os.path.join(root, prefix)  # noqa: PTH118
    try:
        with os.scandir(path) as scan:
            entries = [(entry.name, _is_directory(entry)) for entry in scan]
        status = os.stat(path)  # noqa: PTH116
    except OSError as error:
        raise SourceError(f"cannot list the folder {shown_name(path)!r}: {error.strerror}") from error
    # A directory sorts as the prefix it is ("a/" comes after "a.jpg"), so that the walk yields whole paths in order.
    shown = sorted((shown_name(name) + "/" * is_directory, name, is_directory) for name, is_directory in entries)
    for (one, *_), (other, *_) in itertools.pairwise(shown):
        if one == other:
            raise SourceError(f"two files in {shown_name(path)!r} would have the same key {one!r}: rename one of them")
    return _Directory(prefix, (status.st_dev, status.st_ino), iter([(name, is_dir) for _, name, is_dir in shown]))


def _is_directory(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself: a row that fails, if it has an image's name
        return False


def refuse_duplicates(keys: Iterable[str]) -> None:
    seen: dict[str, int] = {}
    for row, key in enumerate(keys):
        first = seen.setdefault(key, row)
        if first != row:
            raise SourceError(f"rows {first} and {row} have the same key {key!r}: keys must differ")
