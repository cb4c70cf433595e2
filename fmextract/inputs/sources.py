"""Where images come from: a folder, a manifest, a Dataset. Random access by row, safe from several threads; no torch.

A source hands out encoded bytes (files) or whatever a Dataset returns; `images.decode` makes pixels of either. Every
row has a key that is unique and never shortened. Bytes of a file name that are not UTF-8, and NUL, show as `\\xHH`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmextract.common.imports import import_object
from fmextract.errors import ConfigError, SourceError
from fmextract.inputs.datasets import open_python
from fmextract.inputs.files import FileSource, OnDisk, Options, open_folder
from fmextract.inputs.manifests import MANIFESTS, open_manifest
from fmextract.records import Source

__all__ = ["folder_of", "on_disk", "open_source"]


def open_source(source: Any, *, limit: int | None = None, allow_outside: bool = False) -> Source:
    """Whatever a user names as the source of images, as a Source of its first `limit` rows.

    A folder (recursive), a manifest (.csv, .jsonl, .txt), one image file, `module:callable` or `path/file.py:callable`
    that gives a Dataset, a map-style Dataset or sequence of images, arrays or paths, or a Source. `allow_outside` lets
    a manifest name files that are not below its own folder.

    Raises SourceError where there is nothing to read, ConfigError for a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit must be 1 or more, got {limit}")
    options = Options(limit, allow_outside)
    if isinstance(source, (str, os.PathLike)):
        return _open_text(os.fspath(source), options)
    if isinstance(source, Source):
        return _first(source, limit)
    return open_python(source, type(source).__name__, options)


def _open_text(text: str, options: Options) -> Source:
    path = Path(text)
    opener = OPENERS.get(path.suffix.lower())
    if path.is_dir():
        return open_folder(path, options)
    if opener is not None and (path.exists() or ":" not in text):
        return opener(path, options)
    if path.exists():
        return FileSource.of_paths([text], name=text)
    if ":" in text:
        found = import_object(text, SourceError, "the source")
        needs_call = callable(found) and not hasattr(found, "__getitem__")
        made = _call(found, text) if needs_call else found
        return _first(made, options.limit) if isinstance(made, Source) else open_python(made, text, options)
    raise SourceError(
        f"no such file or folder: {text!r}. A source is a folder of images, a manifest "
        f"({', '.join(MANIFESTS)}) with a `path` column, or module:callable giving a Dataset"
    )


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


def on_disk(source: Source, row: int) -> OnDisk | None:
    """The file that `source.load(row)` reads, if it is called a JPEG; None for whatever else a source may load."""
    if isinstance(source, _First):
        return on_disk(source.source, row)
    if not isinstance(source, FileSource):
        return None
    path = os.path.join(source.root, source.paths[row])  # noqa: PTH118  as in `load`
    return OnDisk(path) if path.lower().endswith((b".jpg", b".jpeg")) else None


def folder_of(source: Source) -> bytes | None:
    """The absolute folder that the files of a source have their paths from; None where there is no such folder."""
    if isinstance(source, _First):
        return folder_of(source.source)
    return source.root if isinstance(source, FileSource) else None


OPENERS: dict[str, Callable[[Path, Options], Source]] = dict.fromkeys(MANIFESTS, open_manifest)
"""By the extension of a file: what opens it. Tar shards have their place here."""
