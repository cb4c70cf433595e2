"""Describe a Dataset or a sequence by facts: the content of what lies in memory, else its code and attributes."""

from __future__ import annotations

import os
import sys
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

import numpy as np

from fmextract.common.facts import Facts, Told, attributes_of, changing, is_library, settled
from fmextract.inputs.arrays import as_memory, is_array, places
from fmextract.inputs.named_files import Stamp, facts_of_files, stamps_of

__all__ = ["Before", "contents_at_first", "fingerprint_of", "labels_digest", "stamps"]

_ENTRIES = ("__getitem__", "__getitems__", "__len__", "__call__", "__getattr__")
MOST_PARTS = 64
"""So many parts of what lies in memory are described one by one."""
_FOLDERS = frozenset({"root", "samples", "imgs", "targets", "classes", "class_to_idx"})
"""Attributes of torchvision's folder Datasets that list their files, which keys, labels, sizes and times describe."""


@dataclass(frozen=True, slots=True)
class Before:
    """What a Dataset held before it was used, and the sizes and times of the files that it names."""

    told: Told = field(default_factory=Told)
    files: Mapping[str, Stamp] = field(default_factory=dict)


def contents_at_first(data: Any, pick: Callable[[int, Any], Any] | None = None) -> Before:
    """Collect the facts of a Dataset before it was used, and of the function that takes the labels out of its items.

    What lies in memory is left out: it is looked at once.
    """
    data = as_memory(data)
    told = _joined(Told() if _is_plain(data) else _of_dataset(data), _of_picker(pick))
    return Before(told, stamps_of(told.paths))


def _of_picker(pick: Callable[[int, Any], Any] | None) -> Told:
    facts = Facts()
    if pick is not None:
        facts.value("label=", pick)
    return facts.told()


def _joined(one: Told, other: Told) -> Told:
    return Told(
        {**one.facts, **other.facts},
        one.packages | other.packages,
        (*one.unknown, *other.unknown),
        one.paths | other.paths,
    )


def _of_dataset(data: Any) -> Told:
    """Collect the facts of a user's Dataset, as far as it can be described."""
    parts = _parts(data)
    facts = Facts({id(part): f"part {number}" for number, part in enumerate(parts)})
    groups: dict[type, list[tuple[str, Mapping[str, Any]]]] = {}
    packages, files_of_arrays = set(), set[str]()
    for number, part in enumerate(parts):
        if is_array(part) and is_library(type(part).__module__):
            facts.value(f"part {number}", [type(part).__qualname__, list(map(int, part.shape)), str(part.dtype)])
            packages.add(type(part).__module__.partition(".")[0])
            files_of_arrays |= (files := places(part))
            if not files:
                facts.cannot_tell("the values of an array", part)
            continue
        kept = attributes_of(part)
        if kept is None:
            facts.cannot_tell(type(part).__qualname__, part)
            kept = {}
        if is_library(type(part).__module__):
            packages.add(type(part).__module__.partition(".")[0])
        files = _FOLDERS if {"samples", "root"} <= kept.keys() else frozenset()
        held = {name: value for name, value in kept.items() if name not in files}
        groups.setdefault(type(part), []).append((str(number), held))
    facts.objects(groups, _ENTRIES)
    told = facts.told()
    return replace(told, packages=told.packages | packages, paths=told.paths | files_of_arrays)


def fingerprint_of(
    data: Any, rows: int, before: Before, pick: Callable[[int, Any], Any] | None = None
) -> dict[str, Any]:
    """Return what a source says of `data` and `pick`, as JSON; what is other than `before` says nothing."""
    data = as_memory(data)
    now = _of_picker(pick) if _is_plain(data) else _joined(_of_dataset(data), _of_picker(pick))
    now = replace(now, facts=settled(before.told.facts, now.facts))
    if _is_plain(data):
        now = _joined(replace(_of_memory(data, rows), paths=frozenset()), now)
    return {
        "code": dict(now.facts),
        "packages": sorted(now.packages),
        "not_covered": [*now.unknown, *changing(now.facts)],
        **facts_of_files(now.paths, before.files),
    }


def _of_memory(data: Any, rows: int) -> Told:
    """Collect the facts of what lies in memory: row by row, or in parts, so that a message can say which."""
    facts = Facts()
    if type(data).__module__.partition(".")[0] in ("pandas", "datasets"):
        facts.value("content", facts.digest("content", _first(data, rows)))
        return facts.told()
    facts.value("content", [type(data).__qualname__, str(getattr(data, "dtype", ""))])
    step = -(-rows // MOST_PARTS)
    for first in range(0, rows, step):
        last = min(first + step, rows) - 1
        name = f"row {first}" if first == last else f"rows {first} to {last}"
        facts.value(name, facts.digest("content", data[first : last + 1]))
    return facts.told()


def stamps(paths: Iterable[bytes]) -> dict[str, str]:
    """Return digests of the sizes and of the times of files (-1 where there is none). Reads no file."""
    sizes, times = array("q"), array("q")
    for path in paths:
        try:
            status = os.stat(path)  # noqa: PTH116  bytes: pathlib knows only str
            sizes.append(status.st_size)
            times.append(status.st_mtime_ns)
        except OSError:
            sizes.append(-1)
            times.append(-1)
    return {"sizes": _digest(sizes), "times": _digest(times)}


def labels_digest(labels: Sequence[Any] | None, columns: Mapping[str, Sequence[Any]] | None = None) -> dict[str, str]:
    """Return a digest of the labels that a source lists, and of its other columns."""
    if labels is None and not columns:
        return {}
    listed = {name: list(column) for name, column in (columns or {}).items()}
    return {"labels": Facts().digest("labels", [None if labels is None else list(labels), listed])}


def _digest(numbers: array[int]) -> str:
    if sys.byteorder != "little":
        numbers.byteswap()
    return blake2b(numbers.tobytes(), digest_size=16).hexdigest()


def _is_plain(data: Any) -> bool:
    """Return whether the items of `data` are all that there is to it."""
    torch = sys.modules.get("torch")
    tensor = torch is not None and isinstance(data, torch.Tensor)
    kind = type(data).__module__.partition(".")[0]
    return type(data) in (list, tuple) or isinstance(data, np.ndarray) or tensor or kind in ("pandas", "datasets")


def _first(data: Any, rows: int) -> Any:
    if rows >= len(data) or type(data).__module__.startswith("datasets"):
        return data
    return data.iloc[:rows] if hasattr(data, "iloc") else data[:rows]


def _parts(data: Any) -> list[Any]:
    """Return a Dataset and those that it is made of, as torch's Subset and ConcatDataset are."""
    found, seen = [data], {id(data)}
    for part in found:
        held = attributes_of(part) or {}
        inner = [held.get("dataset"), *(held.get("datasets") or ())]
        for one in inner:
            if one is not None and hasattr(type(one), "__getitem__") and not _is_plain(one) and id(one) not in seen:
                seen.add(id(one))
                found.append(one)
    return found
