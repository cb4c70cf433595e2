"""Manifests: files that name images, one a row, with a key and a label where they have one. No torch."""

from __future__ import annotations

import csv
import json
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmextract.errors import SourceError
from fmextract.inputs.files import FileSource, Names, Options, shown_name


@dataclass(frozen=True, slots=True)
class _Entry:
    """One row of a manifest, and the line it began on."""

    line: int
    path: str
    key: str | None = None
    label: int | str | None = None


def open_manifest(manifest: Path, options: Options) -> FileSource:
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
        first = seen.setdefault(shown_name(key), entry.line)
        if first != entry.line:
            raise SourceError(
                f"{where}: the key {shown_name(key)!r} stands in line {first} already. "
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
