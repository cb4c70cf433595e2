"""Where images come from: a folder, a manifest, a Dataset. Random access by row, safe from several threads; no torch.

A source hands out encoded bytes (files) or whatever a Dataset returns; `images.decode` makes pixels of either. Every
row has a key that is unique and never shortened. Bytes of a file name that are not UTF-8, and NUL, show as `\\xHH`.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import importlib
import importlib.util
import itertools
import json
import os
import posixpath
import stat
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fmextract.errors import ConfigError, SampleError, SourceError
from fmextract.records import Source, Status

__all__ = ["NOT_DECODED", "DatasetSource", "FileSource", "image_extensions", "import_object", "open_source"]

# Formats that Pillow registers but decodes only with a handler of the user's or a foreign program (Ghostscript for
# EPS: no program is started on a stranger's file), or writes only.
NOT_DECODED = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF"})

MAX_FILE_BYTES = 1 << 30
"""Larger files are refused unread: an image of Image.MAX_IMAGE_PIXELS pixels has at most 0.7 GB, uncompressed."""


def open_source(source: Any, *, limit: int | None = None, allow_outside: bool = False) -> Source:
    """Whatever a user names as the source of images, as a Source of its first `limit` rows.

    A folder (recursive), a manifest (.csv, .jsonl, .txt), one image file, `module:callable` or `path/file.py:callable`
    that gives a Dataset, a map-style Dataset or sequence of images, arrays or paths, or a Source. `allow_outside` lets
    a manifest name files that are not below its own folder.

    Raises SourceError where there is nothing to read, ConfigError for a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit must be 1 or more, got {limit}")
    options = _Options(limit, allow_outside)
    if isinstance(source, (str, os.PathLike)):
        return _open_text(os.fspath(source), options)
    if isinstance(source, Source):
        return source if limit is None or limit >= len(source) else _First(source, limit)
    return _open_python(source, type(source).__name__, options)


@dataclass(frozen=True, slots=True)
class _Options:
    limit: int | None
    allow_outside: bool


def _open_text(text: str, options: _Options) -> Source:
    path = Path(text)
    opener = OPENERS.get(path.suffix.lower())
    if path.is_dir():
        return _open_folder(path, options)
    if opener is not None and (path.exists() or ":" not in text):
        return opener(path, options)
    if path.exists():
        return FileSource.of_paths([text], name=text)
    if ":" in text:
        found = import_object(text, SourceError, "the source")
        needs_call = callable(found) and not hasattr(found, "__getitem__")
        return _open_python(_call(found, text) if needs_call else found, text, options)
    raise SourceError(
        f"no such file or folder: {text!r}. A source is a folder of images, a manifest "
        f"({', '.join(MANIFESTS)}) with a `path` column, or module:callable giving a Dataset"
    )


def _call(factory: Callable[[], Any], text: str) -> Any:
    try:
        return factory()
    except Exception as error:
        raise SourceError(f"{text} raised {type(error).__name__}: {error}") from error


# ------------------------------------------------------------------------------------------------------- files


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
        _refuse_duplicates(_text(path) for path in names)
        held = Names(names)
        return cls(name, os.fsencode(Path.cwd()), held, held)

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, row: int) -> str:
        return _text(self.keys[row])

    def label(self, row: int) -> int | str | None:
        return None if self.labels is None else self.labels[row]

    def load(self, row: int) -> bytes:
        """The whole file. Raises SampleError(Status.UNREADABLE) for anything that is not a readable regular file."""
        return _read(os.path.join(self.root, self.paths[row]))  # noqa: PTH118  bytes: pathlib knows only str

    def fingerprint(self) -> Mapping[str, Any]:
        """Count, digest of the keys, digest of every file's size (-1 where there is none). Reads no file."""
        sizes = array("q", (_size(os.path.join(self.root, path)) for path in self._each_path()))  # noqa: PTH118
        if sys.byteorder != "little":
            sizes.byteswap()
        digest = hashlib.blake2b(sizes.tobytes(), digest_size=16).hexdigest()
        return {"count": len(self), "keys": self.keys.digest(), "sizes": digest}

    def _each_path(self) -> Iterator[bytes]:
        return (self.paths[row] for row in range(len(self)))


def _text(name: bytes) -> str:
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

    def read(self) -> bytes:
        """What `load` gives. Raises as that does."""
        return _read(self.path)


def on_disk(source: Source, row: int) -> OnDisk | None:
    """The file that `source.load(row)` reads, if it is called a JPEG; None for whatever else a source may load."""
    if isinstance(source, _First):
        return on_disk(source.source, row)
    if not isinstance(source, FileSource):
        return None
    path = os.path.join(source.root, source.paths[row])  # noqa: PTH118  as in `load`
    return OnDisk(path) if path.lower().endswith((b".jpg", b".jpeg")) else None


def _read(path: bytes) -> bytes:
    try:
        # O_NONBLOCK: opening a FIFO that nobody writes to would block for ever; for a regular file it means nothing.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb", buffering=0) as file:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise SampleError(Status.UNREADABLE, "not a regular file")
            if status.st_size > MAX_FILE_BYTES:
                raise SampleError(Status.UNREADABLE, f"{status.st_size} bytes, more than the {MAX_FILE_BYTES} allowed")
            return file.readall()
    except OSError as error:
        raise SampleError(Status.UNREADABLE, error.strerror or type(error).__name__) from error


@functools.cache
def image_extensions() -> frozenset[bytes]:
    """The file name extensions of every format that Pillow decodes by itself: lower case, with the dot."""
    from PIL import Image

    return frozenset(
        extension.encode() for extension, kind in Image.registered_extensions().items() if kind not in NOT_DECODED
    )


def _open_folder(folder: Path, options: _Options) -> FileSource:
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
        raise SourceError(f"cannot list the folder {_text(path)!r}: {error.strerror}") from error
    # A directory sorts as the prefix it is ("a/" comes after "a.jpg"), so that the walk yields whole paths in order.
    shown = sorted((_text(name) + "/" * is_directory, name, is_directory) for name, is_directory in entries)
    for (one, *_), (other, *_) in itertools.pairwise(shown):
        if one == other:
            raise SourceError(f"two files in {_text(path)!r} would have the same key {one!r}: rename one of them")
    return _Directory(prefix, (status.st_dev, status.st_ino), iter([(name, is_dir) for _, name, is_dir in shown]))


def _is_directory(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself: a row that fails, if it has an image's name
        return False


# --------------------------------------------------------------------------------------------------- manifests


@dataclass(frozen=True, slots=True)
class _Entry:
    """One row of a manifest, and the line it began on."""

    line: int
    path: str
    key: str | None = None
    label: int | str | None = None


def _open_manifest(manifest: Path, options: _Options) -> FileSource:
    """A manifest with a column `path` and, if wanted, `key` and `label`. Paths are relative to the manifest's folder.

    The key is the path (`./` and `//` taken out) where there is no `key`. Labels are integers where all of them are.
    """
    paths, keys = Names(), Names()
    labels: list[int | str | None] = []
    seen: dict[str, int] = {}
    for entry in _entries(manifest):
        where = f"{manifest}, line {entry.line}"
        path = _checked_path(entry.path, where, options.allow_outside)
        key = path if entry.key is None else _encode(entry.key, where)
        first = seen.setdefault(_text(key), entry.line)
        if first != entry.line:
            raise SourceError(
                f"{where}: the key {_text(key)!r} stands in line {first} already. "
                "Keys must differ: give the rows a `key` column, or drop one"
            )
        paths.append(path)
        keys.append(key)
        labels.append(entry.label)
        if len(keys) == options.limit:
            break
    if not keys:
        raise SourceError(f"{manifest} names no images")
    same = all(paths[row] == keys[row] for row in range(len(keys)))
    root = os.fsencode(manifest.absolute().parent)
    return FileSource(str(manifest), root, paths, paths if same else keys, _same_type(labels))


def _entries(manifest: Path) -> Iterator[_Entry]:
    try:
        # utf-8-sig drops a byte order mark; surrogateescape keeps file names that are not UTF-8.
        with manifest.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
            yield from MANIFESTS[manifest.suffix.lower()](str(manifest), lines)
    except OSError as error:
        raise SourceError(f"cannot read the manifest {manifest}: {error.strerror}") from error


def _csv_entries(name: str, lines: Iterable[str]) -> Iterator[_Entry]:
    reader = csv.reader(lines, strict=True)
    try:
        header = next(reader, [])
        if "path" not in header:
            raise SourceError(f"{name}, line 1: expected a column named `path`, found {', '.join(header) or 'nothing'}")
        line = reader.line_num + 1
        for cells in reader:
            if cells:
                if len(cells) != len(header):
                    raise SourceError(f"{name}, line {line}: expected {len(header)} cells, got {len(cells)}")
                row = dict(zip(header, cells, strict=True))
                yield _Entry(line, row["path"], row.get("key"), row.get("label") or None)
            line = reader.line_num + 1
    except csv.Error as error:
        raise SourceError(f"{name}, line {reader.line_num}: {error}") from error


def _jsonl_entries(name: str, lines: Iterable[str]) -> Iterator[_Entry]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{where}: not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("path"), str):
            raise SourceError(f"{where}: expected an object with a text `path`, got {line.strip()[:80]}")
        key, label = row.get("key"), row.get("label")
        if not isinstance(key, (str, type(None))) or not isinstance(label, (int, str, type(None))):
            raise SourceError(f"{where}: expected a text `key` and a text or integer `label`, got {line.strip()[:80]}")
        yield _Entry(number, row["path"], key, label)


def _txt_entries(name: str, lines: Iterable[str]) -> Iterator[_Entry]:
    for number, line in enumerate(lines, 1):
        path = line.rstrip("\r\n")
        if path:
            yield _Entry(number, path)


MANIFESTS: dict[str, Callable[[str, Iterable[str]], Iterator[_Entry]]] = {
    ".csv": _csv_entries,
    ".jsonl": _jsonl_entries,
    ".txt": _txt_entries,
}

OPENERS: dict[str, Callable[[Path, _Options], Source]] = dict.fromkeys(MANIFESTS, _open_manifest)
"""By the extension of a file: what opens it. Tar shards have their place here."""


def _checked_path(path: str, where: str, allow_outside: bool) -> bytes:
    encoded = _encode(path, where)
    if not encoded or b"\0" in encoded:
        raise SourceError(f"{where}: expected a file's path, got {path!r} (is the manifest UTF-8?)")
    clean = posixpath.normpath(encoded)
    if not allow_outside and (clean.startswith(b"/") or clean.split(b"/")[0] == b".."):
        raise SourceError(
            f"{where}: {path!r} leads out of the manifest's folder. Paths are relative to it; "
            "if this is meant, allow it with --allow-outside (allow_outside=True)"
        )
    return clean


def _encode(text: str, where: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise SourceError(f"{where}: {text!r} holds half a character ({error.reason})") from error


def _same_type(labels: Sequence[Any]) -> list[int | str | None] | None:
    """All integers, where every label reads as one, or all text; None where there is no label at all."""
    given = {label for label in labels if label is not None}
    if not given:
        return None
    kind: Callable[[Any], int | str] = int if all(_reads_as_integer(label) for label in given) else str
    made = {label: kind(label) for label in given}
    return [made.get(label) for label in labels]


def _reads_as_integer(label: Any) -> bool:
    """True for 7 and "7", not for "07" or "1_000": those would not come back as they were."""
    try:
        return str(int(label)) == str(label)
    except ValueError:
        return False


# ------------------------------------------------------------------------------------------------------ Python


@dataclass(frozen=True, slots=True)
class DatasetSource:
    """A map-style Dataset or a sequence. An item is an image, (image, label …) or a dict with `image` and `label`.

    An image is encoded bytes, a path, a PIL image, an array or a tensor. `labels` are those that the Dataset lists
    (`targets`, `labels`, or ImageFolder's `samples`); where it lists none, `label` is taken from the item, and is free
    of charge once the row has been loaded.
    """

    name: str
    data: Any
    keys: Sequence[str]
    labels: Sequence[Any] | None
    seen: dict[int, Any] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, row: int) -> str:
        return self.keys[row]

    def label(self, row: int) -> int | str | None:
        if self.labels is not None:
            return _plain_label(self.labels[row])
        if row not in self.seen:
            with contextlib.suppress(SampleError):  # a failed row has no label
                self.load(row)
        return _plain_label(self.seen.pop(row, None))

    def load(self, row: int) -> Any:
        """The image of an item. Raises SampleError(Status.UNREADABLE) with what `__getitem__` raised."""
        if not 0 <= row < len(self):
            raise IndexError(f"expected a row from 0 to {len(self) - 1}, got {row}")
        try:
            image, label = _split(self.data[row])
        except Exception as error:  # a Dataset may raise anything, and that is one row's failure
            self.seen[row] = None
            raise SampleError(Status.UNREADABLE, f"{type(error).__name__}: {error}") from error
        if self.labels is None:
            self.seen[row] = label
        return _read(os.fsencode(image)) if isinstance(image, (str, os.PathLike)) else image

    def fingerprint(self) -> Mapping[str, Any]:
        """Count, digest of the keys, type of the Dataset. What its items hold is not looked at."""
        keys = Names(key.encode("utf-8", "backslashreplace") for key in self.keys)
        kind = f"{type(self.data).__module__}.{type(self.data).__qualname__}"
        return {"count": len(self), "keys": keys.digest(), "dataset": kind}


@dataclass(frozen=True, slots=True)
class _First:
    """The first `count` rows of a source."""

    source: Source
    count: int

    @property
    def name(self) -> str:
        return self.source.name

    def __len__(self) -> int:
        return self.count

    def key(self, row: int) -> str:
        return self.source.key(row)

    def label(self, row: int) -> int | str | None:
        return self.source.label(row)

    def load(self, row: int) -> Any:
        return self.source.load(row)

    def fingerprint(self) -> Mapping[str, Any]:
        return {**self.source.fingerprint(), "limit": self.count}


def _open_python(data: Any, name: str, options: _Options) -> Source:
    if isinstance(data, Source):
        return open_source(data, limit=options.limit)
    try:
        count = len(data)
    except TypeError:
        count = None
    if count is None or not hasattr(data, "__getitem__") or isinstance(data, (Mapping, bytes)):
        raise SourceError(
            f"{name}: expected a map-style Dataset or a sequence of images (with __len__ and __getitem__), "
            f"got {type(data).__name__}"
        )
    if count == 0:
        raise SourceError(f"{name} is empty")
    rows = min(count, options.limit or count)
    if isinstance(data, (list, tuple)) and all(isinstance(item, (str, os.PathLike)) for item in data):
        return FileSource.of_paths(data[:rows], name)
    keys, labels = _keys_and_labels(data, count)
    if len(keys) != count or (labels is not None and len(labels) != count):
        raise SourceError(f"{name}: expected {count} keys and labels, one an item, got {len(keys)} keys")
    _refuse_duplicates(keys)
    return DatasetSource(name, data, keys[:rows], labels)


def _keys_and_labels(data: Any, count: int) -> tuple[list[str], Sequence[Any] | None]:
    samples = getattr(data, "samples", None)
    if isinstance(samples, list) and hasattr(data, "root"):  # torchvision's ImageFolder and DatasetFolder
        keys = [os.fsencode(os.path.relpath(path, data.root)) for path, _ in samples]
        return [_text(key) for key in keys], [label for _, label in samples]
    labels = _column(data, "targets", "labels")
    if labels is not None and len(labels) != count:
        labels = None  # a name that means something else here
    ids = _column(data, "ids", "keys")
    if ids is not None:
        return [_text(str(key).encode("utf-8", "backslashreplace")) for key in ids], labels
    width = max(6, len(str(count - 1)))
    return [f"{row:0{width}d}" for row in range(count)], labels


def _column(data: Any, *names: str) -> Sequence[Any] | None:
    """The first attribute of these names that is a sequence; methods (as `dict.keys`) are not."""
    found = (getattr(data, name, None) for name in names)
    return next((column for column in found if hasattr(column, "__getitem__") and hasattr(column, "__len__")), None)


def _split(item: Any) -> tuple[Any, Any]:
    """The image and the label (None where there is none) of a Dataset's item."""
    if isinstance(item, Mapping):
        return item["image"], item.get("label")
    if isinstance(item, (tuple, list)):
        return item[0], item[1] if len(item) > 1 else None
    return item, None


def _plain_label(label: Any) -> int | str | None:
    """Integers (those of numpy and torch too) and text; anything else, a mask or boxes, is no label of an image."""
    if isinstance(label, str):
        return str.__str__(label)  # a kind of text of the user's own is unknown to another process
    try:
        return int(label.__index__())
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None


def _refuse_duplicates(keys: Iterable[str]) -> None:
    seen: dict[str, int] = {}
    for row, key in enumerate(keys):
        first = seen.setdefault(key, row)
        if first != row:
            raise SourceError(f"rows {first} and {row} have the same key {key!r}: keys must differ")


# ------------------------------------------------------------------------------------------------------ import


def import_object(text: str, error: type[ConfigError], purpose: str) -> Any:
    """What `module:name` or `path/file.py:name` names; `name` may have dots. `purpose` begins the error's message.

    A module is looked for where Python does, and in the working directory.
    """
    place, _, name = text.rpartition(":")
    if not place or not name:
        raise error(f"{purpose}: expected module:name or path/file.py:name, got {text!r}")
    try:
        module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
        return functools.reduce(getattr, name.split("."), module)
    except FileNotFoundError as missing:
        raise error(f"{purpose}: there is no file {place!r}") from missing
    except AttributeError as missing:
        raise error(f"{purpose}: {place!r} has no {name!r} ({missing})") from missing
    except Exception as cause:  # the module is the user's: it may raise anything while it is imported
        raise error(f"{purpose}: importing {place!r} raised {type(cause).__name__}: {cause}") from cause


def _import_module(name: str) -> Any:
    here = str(Path.cwd())
    if here in sys.path or "" in sys.path:
        return importlib.import_module(name)
    sys.path.append(here)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(here)


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses and pickles look their module up
    spec.loader.exec_module(module)
    return module
