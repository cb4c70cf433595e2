"""Open sources of images: a folder, a manifest, a Dataset. Random access by row; no torch.

A source hands out encoded bytes (files) or what a Dataset returns; `decoding.decode` makes pixels of either. Every
row has a key that is unique and never shortened. Bytes of a file name that are not UTF-8, and NUL, show as `\\xHH`.
"""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmextract.common.imports import import_object, importing_for
from fmextract.errors import ConfigError, SourceError
from fmextract.inputs.datasets import files_named, open_python
from fmextract.inputs.files import FileSource, OnDisk, Options
from fmextract.inputs.folders import Passed, image_among, open_folder
from fmextract.inputs.given import with_given
from fmextract.inputs.kinds import kind_of
from fmextract.inputs.manifests import MANIFESTS, open_manifest
from fmextract.records import Label, Source

__all__ = ["columns_of", "folder_of", "is_code", "notes_of", "on_disk", "open_source", "unlimited"]


def open_source(
    source: Any,
    *,
    limit: int | None = None,
    allow_outside: bool = False,
    key: Any = None,
    label: Any = None,
    hidden: bool = False,
) -> Source:
    """Open what a user names as the source of images, as a Source of its first `limit` rows.

    A folder (recursive, with `hidden` also what is hidden in it), a manifest (.csv, .tsv, .jsonl, .txt), one image
    file, a pattern of files, `module:callable` or `path/file.py:callable` that gives a Dataset; a map-style Dataset or
    sequence of images, arrays or paths, a table with a column of paths, or a Source. `allow_outside` lets a manifest
    name files that are not below its own folder. `key` and `label` are columns, lists or functions, see `given`.

    Raises SourceError where there is nothing to read, ConfigError for options that mean nothing here.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit must be 1 or more, got {limit}")
    options = Options(limit, allow_outside, key, label, hidden)
    if isinstance(source, (str, os.PathLike)):
        return _open_text(os.fspath(source), options)
    return _open_object(source, type(source).__name__, options)


def _open_object(source: Any, name: str, options: Options) -> Source:
    if not isinstance(source, Source):
        return open_python(source, name, options)
    if options.key is not None or options.label is not None:
        raise ConfigError(
            f"{name} is a Source, which has keys and labels of its own: key= and label= mean nothing here"
        )
    return _first(source, options.limit)


def _open_text(text: str, options: Options) -> Source:
    path = Path(text)
    opener = OPENERS.get(path.suffix.lower())
    if path.is_dir():
        return with_given(open_folder(path, options), options)
    if opener is not None and (path.exists() or not (":" in text or _is_pattern(text))):
        return with_given(opener(path, options), options)
    if path.exists():
        return _open_file(text, options)
    if _is_address(text):
        raise SourceError(f"{text!r} is an address: images are read from files. Download them, and give their folder")
    if _is_pattern(text):
        return _open_pattern(text, options)
    if is_code(text):
        found = import_object(text, SourceError, "the source")
        needs_call = isinstance(found, type) or (callable(found) and not hasattr(found, "__getitem__"))
        with importing_for(text):
            made = _call(found, text) if needs_call else found
        return _open_object(made, text, options)
    raise SourceError(f"no such file or folder: {text!r}. {_SOURCES}")


_SOURCES = (
    f"A source is a folder of images, a manifest ({', '.join(MANIFESTS)}) with a `path` column, or "
    "module:callable giving a Dataset"
)


def _open_file(text: str, options: Options) -> Source:
    """Open one image file. For another file raises SourceError that says what it is and what to give instead."""
    passed = Passed()
    if image_among(os.fsencode(text), passed):
        return files_named([text], text, options)
    kind, instead = kind_of(os.fsencode(text))
    raise SourceError(f"{text!r} is {kind}. {instead or _SOURCES}")


def _is_address(text: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def _is_pattern(text: str) -> bool:
    return glob.has_magic(text)


def _matched(pattern: str, hidden: bool) -> list[str]:
    """Return the names that a pattern matches, as they were given, sorted."""
    if not hidden:
        return sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
    if sys.version_info < (3, 11):
        raise SourceError(
            f"{pattern!r}: a pattern that matches hidden files needs Python 3.11. Give the folder instead."
        )
    return sorted(glob.glob(pattern, recursive=True, include_hidden=True))  # noqa: PTH207


def _open_pattern(pattern: str, options: Options) -> Source:
    """Return the images among the files that a pattern matches, in the order of their names."""
    passed = Passed()
    matched = _matched(pattern, options.hidden)
    files = [name for name in matched if not Path(name).is_dir()]
    images = [name for name in files if image_among(os.fsencode(name), passed)][: options.limit]
    if not images:
        if not matched:
            raise SourceError(f"no such file or folder, and no file that it matches: {pattern!r}. {_SOURCES}")
        folders = f"{len(matched) - len(files)} folders" if len(matched) > len(files) else ""
        found = " and ".join(filter(None, [folders, str(passed)]))
        raise SourceError(f"{pattern!r} matches no images, but {found}. {_SOURCES}")
    source = files_named(images, pattern, options)
    source.notes.extend([f"{pattern}: passed over {passed}"] * bool(passed) + passed.recognised_note(pattern))
    return source


def is_code(text: str) -> bool:
    """Return whether a text names code that gives a Dataset."""
    return ":" in text and not (Path(text).exists() or _is_address(text) or _is_pattern(text))


def _call(factory: Callable[[], Any], text: str) -> Any:
    try:
        return factory()
    except Exception as error:
        raise SourceError(f"{text} raised {type(error).__name__}: {error}") from error


def _first(source: Source, limit: int | None) -> Source:
    return source if limit is None or limit >= len(source) else _First(source, limit)


@dataclass(frozen=True, slots=True)
class _First:
    """The first `count` rows of a source."""

    source: Source
    count: int

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def notes(self) -> Sequence[str]:
        return notes_of(self.source)

    @property
    def columns(self) -> Mapping[str, Sequence[Label]]:
        return columns_of(self.source)

    def __len__(self) -> int:
        return self.count

    def key(self, row: int) -> str:
        return self.source.key(row)

    def label(self, row: int) -> Label:
        return self.source.label(row)

    def load(self, row: int) -> Any:
        return self.source.load(row)

    def fingerprint(self) -> Mapping[str, Any]:
        return {**self.source.fingerprint(), "limit": self.count}


def notes_of(source: Source) -> Sequence[str]:
    """Return what is worth reading of what a source took and passed over; more may come as its rows are loaded."""
    found = getattr(source, "notes", ())
    return [str(note) for note in found] if isinstance(found, (list, tuple)) else []


def unlimited(source: Source) -> Source:
    """Return the source itself, where only its first rows are taken. Rows are the same."""
    return unlimited(source.source) if isinstance(source, _First) else source


def columns_of(source: Source) -> Mapping[str, Sequence[Label]]:
    """Return what a source brings along for each row besides keys and labels, by name."""
    found: Mapping[str, Sequence[Label]] = getattr(source, "columns", {})
    return found


def on_disk(source: Source, row: int) -> OnDisk | None:
    """Return the file that `source.load(row)` reads, if its name is a JPEG's; None for anything else."""
    source = unlimited(source)
    if not isinstance(source, FileSource):
        return None
    path = os.path.join(source.root, source.paths[row])  # noqa: PTH118  as in `load`
    return OnDisk(path) if path.lower().endswith((b".jpg", b".jpeg")) else None


def folder_of(source: Source) -> bytes | None:
    """Return the absolute folder that a source's paths are relative to; None where there is no such folder."""
    if isinstance(source, _First):
        return folder_of(source.source)
    return source.root if isinstance(source, FileSource) else None


OPENERS: dict[str, Callable[[Path, Options], FileSource]] = dict.fromkeys(MANIFESTS, open_manifest)
"""What opens a file, by its extension. Tar shards belong here."""
