"""Find the images of a folder, and say what of it is passed over. No torch."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fmextract.errors import SourceError
from fmextract.inputs.files import FileSource, Names, Options, image_extensions, shown_name
from fmextract.inputs.given import FOLDER
from fmextract.inputs.kinds import extension, is_image, is_surely_none, needs_decoder

__all__ = ["Passed", "image_among", "is_hidden", "open_folder"]

_NOT_THE_USERS = frozenset(
    {b"@eaDir", b"__MACOSX", b"Thumbs.db", b"desktop.ini", b"$RECYCLE.BIN", b"System Volume Information", b"lost+found"}
)
"""Names of what computers put beside photos: previews, copies, what was deleted."""


def open_folder(folder: Path, options: Options) -> FileSource:
    """Return the images below `folder`. Raises SourceError where there is none, or a folder cannot be listed."""
    passed = Passed()
    names = Names()
    for path in _walk(os.fsencode(folder), options.hidden, passed):
        names.append(path)
        if len(names) == options.limit:
            break
    if not names:
        where = f"no images in {str(folder)!r} or the folders below it"
        if not passed:
            raise SourceError(f"{where}: there are no files at all")
        raise SourceError(
            f"{where}, but {passed}. Images are known by their extension (.jpg, .png, .webp and"
            f" {len(image_extensions()) - 3} others), or by the first bytes of files that have no known one"
        )
    notes = [f"{folder}: passed over {passed}"] * bool(passed) + passed.recognised_note(str(folder))
    if options.label is None:
        notes += _class_folders(names)
    return FileSource(str(folder), os.fsencode(folder.absolute()), names, names, notes=notes, is_folder=True)


def _class_folders(names: Names) -> list[str]:
    """Return what to say where each image lies in one of several folders, whose names may be meant as labels."""
    parts = (names[row].split(b"/") for row in range(len(names)))
    folders = {part[0] if len(part) > 1 else None for part in parts}
    if None in folders or len(folders) < 2:
        return []
    return [f"the {len(folders)} folders that the images lie in are not stored as labels: --label {FOLDER} takes them"]


def is_hidden(name: bytes) -> bool:
    return name.startswith(b".") or name in _NOT_THE_USERS


class Passed:
    """Counts what was passed over, by reason, and what was taken though its name is not an image's."""

    def __init__(self) -> None:
        self._hidden: list[bytes] = []
        self._hidden_count = self._links = 0
        self._photos: Counter[str] = Counter()
        self._others: Counter[str] = Counter()
        self.recognised = 0

    def hidden(self, path: bytes) -> None:
        self._hidden_count += 1
        if len(self._hidden) < 3:
            self._hidden.append(path)

    def link(self) -> None:
        """Count a link to a folder above, or to one that is being walked."""
        self._links += 1

    def photo(self, kind: str) -> None:
        """Count a photo in a format that is not decoded here."""
        self._photos[kind] += 1

    def other(self, path: bytes) -> None:
        self._others[shown_name(extension(path)) or "without extension"] += 1

    def __bool__(self) -> bool:
        return bool(self._hidden_count or self._links or self._photos or self._others)

    def __str__(self) -> str:
        said = []
        if self._hidden_count:
            names = ", ".join(map(shown_name, self._hidden)) + (", …" if self._hidden_count > len(self._hidden) else "")
            plural = "s or folders" if self._hidden_count > 1 else " or folder"
            said.append(f"{self._hidden_count} hidden file{plural} ({names}; --hidden takes them)")
        if self._links:
            said.append(f"{self._links} link{'s' * (self._links > 1)} to a folder above")
        said += [
            f"{count} {kind} file{'s' * (count > 1)}, which {'are' if count > 1 else 'is'} not decoded here"
            for kind, count in self._photos.most_common()
        ]
        if self._others:
            count = sum(self._others.values())
            kinds = ", ".join(f"{kind} {n}" for kind, n in self._others.most_common(6))
            more = ", …" if len(self._others) > 6 else ""
            said.append(f"{count} other file{'s' * (count > 1)} ({kinds}{more})")
        return ", ".join(said)

    def recognised_note(self, where: str) -> list[str]:
        if not self.recognised:
            return []
        return [f"{where}: {self.recognised} images without an image's extension were recognised by their first bytes"]


def image_among(path: bytes, passed: Passed) -> bool:
    """Return whether a file is an image to be taken; `passed` counts it where it is not."""
    return _is_wanted(path, image_extensions(), passed)


def _is_wanted(path: bytes, extensions: frozenset[bytes], passed: Passed) -> bool:
    # `._a.jpg` beside a.jpg holds what macOS could not keep elsewhere.
    if extension(path) in extensions and not (os.path.basename(path).startswith(b"._") and not is_image(path)):  # noqa: PTH119
        return True
    if not is_surely_none(path) and is_image(path):
        passed.recognised += 1
        return True
    if kind := needs_decoder(path):
        passed.photo(kind)
    else:
        passed.other(path)
    return False


@dataclass(frozen=True, slots=True)
class _Directory:
    """A directory being walked: what is left of it, and its identity, to see when a link leads back up."""

    prefix: bytes
    identity: tuple[int, int]
    entries: Iterator[tuple[bytes, bool]]


def _walk(root: bytes, hidden: bool, passed: Passed) -> Iterator[bytes]:
    """Yield the relative paths of the images below `root`, in the order of their keys, found directory by directory.

    `passed` counts what is passed over. Links to directories are followed, but never to one that is being walked, nor
    to one above the root, which would bring in its neighbours.
    """
    extensions = image_extensions()
    open_directories = [_enter(root, b"")]
    above = {(status.st_dev, status.st_ino) for status in map(os.stat, Path(os.fsdecode(root)).resolve().parents)}
    while open_directories:
        here = open_directories[-1]
        entry = next(here.entries, None)
        if entry is None:
            open_directories.pop()
            continue
        name, is_directory = entry
        path = here.prefix + name
        if not hidden and is_hidden(name):
            passed.hidden(path + b"/" * is_directory)
        elif is_directory:
            below = _enter(root, path + b"/")
            if below.identity not in above | {directory.identity for directory in open_directories}:
                open_directories.append(below)
            else:
                passed.link()
        elif _is_wanted(os.path.join(root, path), extensions, passed):  # noqa: PTH118
            yield path


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
