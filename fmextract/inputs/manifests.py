"""Read manifests: files and tables that name one image per row, with a key, a label and other columns. No torch."""

from __future__ import annotations

import csv
import json
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from fmextract.errors import SourceError
from fmextract.inputs.files import FileSource, Names, Options, shown_name
from fmextract.inputs.given import FOLDER
from fmextract.inputs.items import named
from fmextract.inputs.labels import NotALabel, as_column, read_cells
from fmextract.records import Label

Row: TypeAlias = tuple[str, Mapping[str, Any]]
"""Where a row stands, for messages, and its cells by the names of their columns."""


def open_manifest(manifest: Path, options: Options) -> FileSource:
    """Open a manifest with a column `path` and, if wanted, `key` and `label`. Paths are relative to its folder.

    The key is the path (`./` and `//` taken out) where there is no `key`. Other columns are kept under their own names.
    """
    written = manifest.suffix.lower() != ".jsonl"
    columns = _Columns(options, options.allow_outside, read_cells if written else as_column)
    for where, cells in _rows(manifest):
        columns.add(where, cells)
        if len(columns.keys) == options.limit:
            break
    if not columns.keys:
        raise SourceError(f"{manifest} names no images")
    return columns.source(str(manifest), os.fsencode(manifest.absolute().parent))


def open_table(table: Mapping[str, Sequence[Any]], path: str, name: str, options: Options) -> FileSource:
    """Open columns in memory as a manifest; their column `path` names files relative to the working directory."""
    columns = _Columns(options, True, as_column, path)
    count = len(table[path])
    for row in range(min(count, options.limit or count)):
        columns.add(f"{name}, row {row}", {column: values[row] for column, values in table.items()})
    return columns.source(name, os.fsencode(Path.cwd()))


@dataclass(frozen=True, slots=True)
class _Roles:
    """Which columns name the file, the key and the label; the others are kept as they are."""

    path: str
    key: str | None
    label: str | None
    more: tuple[str, ...]


class _Columns:
    """The rows of a manifest as columns."""

    def __init__(
        self,
        options: Options,
        allow_outside: bool,
        read: Callable[[Sequence[Any]], list[Label] | None],
        table: str | None = None,
    ) -> None:
        """Begin with no rows. `read` makes a column's values of its cells; `table` is a table's column of paths."""
        self._options, self._outside, self._read = options, allow_outside, read
        self._path, self._numbers = table or "path", table is not None
        self.paths, self.keys = Names(), Names()
        self._labels: list[Any] = []
        self._more: dict[str, list[Any]] = {}
        self._seen: dict[str, str] = {}
        self._roles: dict[tuple[str, ...], _Roles] = {}

    def add(self, where: str, cells: Mapping[str, Any]) -> None:
        """Add one row. Raises SourceError that says where."""
        names = tuple(cells)
        roles = self._roles.get(names) or self._roles.setdefault(names, self._roles_of(where, names))
        path = _checked_path(_text(cells[roles.path], where), where, self._outside)
        key = cells[roles.key] if roles.key is not None else None
        name = path if key is None else _encode(self._key(key, where), where)
        if self._options.key is None or roles.key is not None:
            place = where.rpartition(", ")[2]
            first = self._seen.setdefault(shown_name(name), place)
            if first is not place:
                raise SourceError(
                    f"{where}: the key {shown_name(name)!r} stands in {first} already. "
                    "Keys must differ: give the rows a `key` column, or drop one"
                )
        for title in roles.more:
            column = self._more.setdefault(title, [])
            column += [None] * (len(self.keys) - len(column))
            column.append(cells[title])
        self._labels.append(None if roles.label is None else cells[roles.label])
        self.paths.append(path)
        self.keys.append(name)

    def _roles_of(self, where: str, names: Sequence[str]) -> _Roles:
        key, label = self._options.key, self._options.label
        paths = [self._path] if self._path in names else named(names, ("path",))
        if not paths:
            raise SourceError(f"{where}: expected a column named `path`, found {', '.join(names) or 'nothing'}")
        keys = [key] if isinstance(key, str) else named(names, ("key",))
        chosen = isinstance(label, str) and (label != FOLDER or label in names)
        labels = [label] if chosen else named(names, ("label", "labels"))
        for option, columns in (("--key", keys), ("--label", labels)):
            if columns and columns[0] not in names:
                raise SourceError(f"{where}: {option} {columns[0]!r} is no column; there are {', '.join(names)}")
        taken = [paths[0], *keys[:1], *labels[:1]]
        more = tuple(name for name in names if name not in taken)
        return _Roles(paths[0], keys[0] if keys else None, labels[0] if labels else None, more)

    def _key(self, key: Any, where: str) -> str:
        if isinstance(key, str) or (self._numbers and hasattr(key, "__index__") and not isinstance(key, bool)):
            return str(key)
        raise SourceError(f"{where}: expected a text `key`, got {key!r}")

    def source(self, name: str, root: bytes) -> FileSource:
        """Raise SourceError for labels that cannot be stored."""
        count, notes = len(self.keys), list[str]()
        same = all(self.paths[row] == self.keys[row] for row in range(count))
        more: dict[str, list[Label]] = {}
        for column, cells in self._more.items():
            try:
                values = self._read([*cells, *[None] * (count - len(cells))])
            except NotALabel as error:
                notes.append(f"{name}: the column {column!r} is not stored: it holds a value {error}")
                continue
            more[column] = values if values is not None else [None] * count
        try:
            labels = self._read(self._labels)
        except NotALabel as error:
            raise SourceError(
                f"{name}: a label is a value {error}: expected numbers, text, or lists of them"
            ) from error
        keys = self.paths if same else self.keys
        return FileSource(name, root, self.paths, keys, labels, columns=more, notes=notes)


def _text(path: Any, where: str) -> str:
    if isinstance(path, (str, os.PathLike)):
        return os.fsdecode(path)
    raise SourceError(f"{where}: expected a file's path, got {path!r}")


def _rows(manifest: Path) -> Iterator[Row]:
    try:
        # utf-8-sig drops a byte order mark; surrogateescape keeps file names that are not UTF-8.
        with manifest.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
            yield from MANIFESTS[manifest.suffix.lower()](str(manifest), lines)
    except OSError as error:
        raise SourceError(f"cannot read the manifest {manifest}: {error.strerror}") from error


def _csv_rows(name: str, lines: Iterable[str]) -> Iterator[Row]:
    lines, line = iter(lines), 1
    try:
        mark, titles = _header(next(lines, ""))
        header = [title.strip() for title in titles]
        if not named(header, ("path",)):
            raise SourceError(f"{name}, line 1: expected a column named `path`, found {', '.join(header) or 'nothing'}")
        if twice := [title for title in header if header.count(title) > 1]:
            raise SourceError(f"{name}, line 1: two columns are named {twice[0]!r}")
        # Who writes `path, label` writes `a.jpg, cat` too.
        reader = csv.reader(lines, strict=True, delimiter=mark, skipinitialspace=header != titles)
        line = 2
        for cells in reader:
            if cells:
                if len(cells) != len(header):
                    raise SourceError(f"{name}, line {line}: expected {len(header)} cells, got {len(cells)}")
                yield f"{name}, line {line}", dict(zip(header, cells, strict=True))
            line = reader.line_num + 2
    except csv.Error as error:
        raise SourceError(f"{name}, line {line}: {error}") from error


def _header(line: str) -> tuple[str, list[str]]:
    """Return the separator of the cells, a comma unless `path` is found with another one, and the titles."""
    cells = {mark: next(csv.reader([line], delimiter=mark), []) for mark in ",;\t"}
    return next(((mark, titles) for mark, titles in cells.items() if named(titles, ("path",))), (",", cells[","]))


def _jsonl_rows(name: str, lines: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{where}: not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get((named(list(row), ("path",)) or [""])[0]), str):
            raise SourceError(f"{where}: expected an object with a text `path`, got {line.strip()[:80]}")
        yield where, row


def _txt_rows(name: str, lines: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        path = line.rstrip("\r\n")
        if path:
            yield f"{name}, line {number}", {"path": path}


MANIFESTS: dict[str, Callable[[str, Iterable[str]], Iterator[Row]]] = {
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".jsonl": _jsonl_rows,
    ".txt": _txt_rows,
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
