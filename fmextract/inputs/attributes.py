"""Take names and labels that a Dataset keeps as attributes where they fit its items exactly, else say so. No torch.

Other people's attributes of the same name may mean something else. What is taken has one entry for each item, of the
right kind, and, where it names items, none twice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fmextract.inputs.files import shown_name
from fmextract.inputs.items import is_path
from fmextract.inputs.tables import listed

__all__ = ["Kept", "kept_by"]

_FILES = ("samples", "imgs", "files", "paths", "image_paths", "filenames")
_NAMES = ("ids", "keys")
_LABELS = ("targets", "labels")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Kept:
    """What a Dataset keeps for each of its items: a key, the path of its file, a label. None: it keeps none."""

    keys: list[str] | None = None
    paths: list[bytes] | None = None
    labels: Sequence[Any] | None = None
    classes: tuple[str, ...] = ()
    """What the labels, which count from 0, are called."""


def kept_by(data: Any, count: int, say: Say) -> Kept:
    """Return what a Dataset with `count` items keeps; `say` reports attributes that look right and do not fit."""
    if _is_torchs(data, "Subset"):
        return _of_subset(data, count, say)
    if _is_torchs(data, "ConcatDataset"):
        return _of_parts(data, count, say)
    files = _files_of(data, count, say)
    labels = _labels_of(data, count)
    if files is None:
        return Kept(_names_of(data, count, say), None, labels, _classes_of(data, labels))
    labels = files.labels if labels is None else labels
    return Kept(files.keys, files.paths, labels, _classes_of(data, labels))


def _is_torchs(data: Any, name: str) -> bool:
    return any(kind.__name__ == name and kind.__module__.startswith("torch.utils.data") for kind in type(data).__mro__)


def _of_subset(data: Any, count: int, say: Say) -> Kept:
    rows = [int(row) for row in data.indices]
    whole = kept_by(data.dataset, len(data.dataset), say)
    if len(rows) != count:
        return Kept()

    def part(column: Sequence[Any] | None) -> list[Any] | None:
        return None if column is None else [column[row] for row in rows]

    keys = part(whole.keys)
    if keys is not None and len(set(keys)) != len(keys):
        say("the Subset has some items more than once: its rows are numbered (key= gives them names)")
        return Kept(None, None, part(whole.labels), whole.classes)
    return Kept(keys, part(whole.paths), part(whole.labels), whole.classes)


def _of_parts(data: Any, count: int, say: Say) -> Kept:
    parts = [kept_by(part, len(part), say) for part in data.datasets]

    def joined(columns: list[Any]) -> list[Any] | None:
        if any(column is None for column in columns):
            return None
        made = [value for column in columns for value in column]
        return made if len(made) == count else None

    keys, paths = joined([part.keys for part in parts]), joined([part.paths for part in parts])
    labels = joined([part.labels for part in parts])
    if keys is not None and len(set(keys)) != len(keys):
        keys = _below_common_folder(paths) if paths is not None else None
        if keys is None:
            say("the parts of the ConcatDataset name some items alike: its rows are numbered (key= gives them names)")
    alike = {part.classes for part in parts}
    return Kept(keys, paths, labels, parts[0].classes if len(alike) == 1 else ())


def _below_common_folder(paths: Sequence[bytes]) -> list[str] | None:
    whole = [os.path.abspath(path) for path in paths]  # noqa: PTH100  bytes: pathlib knows only str
    above = os.path.commonpath(whole)
    keys = [shown_name(os.path.relpath(path, above)) for path in whole]
    return keys if len(set(keys)) == len(keys) else None


def _files_of(data: Any, count: int, say: Say) -> Kept | None:
    """Return the files of torchvision's folders (`samples` of (path, label), and `root`), or of a list of paths."""
    for name in _FILES:
        column = _column(data, name)
        if column is None:
            continue
        pairs = all(isinstance(entry, (tuple, list)) and len(entry) == 2 and is_path(entry[0]) for entry in column)
        if len(column) == count and (pairs or all(map(is_path, column))):
            paths = [os.fsencode(entry[0] if pairs else entry) for entry in column]
            keys = [shown_name(path) for path in _below_root(paths, getattr(data, "root", None))]
            if len(set(keys)) == count:
                return Kept(keys, paths, [entry[1] for entry in column] if pairs else None)
        if name == "samples":
            say(_does_not_fit(data, name, "a path, or (path, label), that no other has"))
    return None


def _below_root(paths: list[bytes], root: Any) -> list[bytes]:
    """Return the paths relative to `root` where all of them lie below it, else as they are."""
    if not is_path(root):
        return paths
    made = [os.path.relpath(path, os.fsencode(root)) for path in paths]
    return paths if any(path.split(b"/")[0] == b".." for path in made) else made


def _names_of(data: Any, count: int, say: Say) -> list[str] | None:
    for name in _NAMES:
        column = _column(data, name)
        if column is None:
            continue
        if len(column) == count and _are_names(column):
            keys = [shown_name(str(key).encode("utf-8", "backslashreplace")) for key in column]
            if len(set(keys)) == count:
                return keys
        say(_does_not_fit(data, name, "a text or a whole number that no other has"))
    return None


def _are_names(column: Iterable[Any]) -> bool:
    return all(isinstance(key, str) or (hasattr(key, "__index__") and not isinstance(key, bool)) for key in column)


def _labels_of(data: Any, count: int) -> Sequence[Any] | None:
    for name in _LABELS:
        column = _column(data, name)
        if column is not None and len(column) == count:
            return column
    return None


def _classes_of(data: Any, labels: Sequence[Any] | None) -> tuple[str, ...]:
    """Return `classes`, if they are different texts and each label is the number of one, or None."""
    classes = _column(data, "classes")
    if labels is None or classes is None or not all(isinstance(one, str) for one in classes):
        return ()
    if getattr(data, "target_transform", None) is not None:
        return ()  # its items have other labels
    if type(getattr(data, "transforms", None)).__name__ not in ("NoneType", "StandardTransform"):
        return ()  # and so they may have
    numbers = [label for label in listed(labels) if label is not None]
    fit = all(type(label) is int and 0 <= label < len(classes) for label in numbers)
    return tuple(map(str, classes)) if fit and numbers and len(set(classes)) == len(classes) else ()


def _column(data: Any, name: str) -> Sequence[Any] | None:
    """Return an attribute that is a sequence; methods (as `dict.keys`), text and mappings are none."""
    try:
        column: Any = listed(getattr(data, name, None))
    except Exception:  # a user's property may raise anything, and then names no item
        return None
    if isinstance(column, (str, bytes, dict)) or not (hasattr(column, "__getitem__") and hasattr(column, "__len__")):
        return None
    found: Sequence[Any] = column
    return found


def _does_not_fit(data: Any, name: str, wanted: str) -> str:
    return (
        f"{type(data).__name__}.{name} does not give each item {wanted}: it is not taken for the names of the images "
        "(key= gives them names)"
    )
