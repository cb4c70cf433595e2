"""What a source must keep to: the same rows in the same order, each time it is opened, in any thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from fmextract.common import strict_json
from fmextract.errors import SampleError
from fmextract.records import Source, Status
from fmextract.testing.promises import attempt, broken, in_threads, keeps, unless

MOST_ROWS = 200
"""Rows that are loaded: evenly spread where there are more. Keys are asked of all."""


def check_source(opened: Callable[[], Source]) -> None:
    """Check that a source has fixed rows: keys, labels and images are the same each time, and one key is one row.

    At most 200 rows are loaded, in both directions. A source that says `thread_safe = True` is also loaded from
    several threads at once.

    Args:
        opened: opens the source; it is called twice, as a run that is resumed opens it again.

    Raises:
        AssertionError: which promise it breaks, and at which row.

    >>> import numpy as np
    >>> class Noise:
    ...     name = "noise"
    ...     def __len__(self): return 3
    ...     def key(self, row): return f"noise/{row}"
    ...     def label(self, row): return row
    ...     def load(self, row): return np.random.default_rng(row).integers(0, 256, (8, 8, 3), np.uint8)
    ...     def fingerprint(self): return {"count": 3, "seed": 0}
    >>> check_source(Noise)
    """
    source = attempt(opened, "a source must open")
    missing = [part for part in ("name", "__len__", "key", "label", "load", "fingerprint") if not hasattr(source, part)]
    keeps(not missing, "a source must have name, __len__, key, label, load and fingerprint", f"it lacks {missing}")
    name: Any = attempt(lambda: source.name, "a source must have a name")
    keeps(isinstance(name, str) and bool(name), "a source's name must be a text", f"it is {name!r}")
    notes = getattr(source, "notes", [])
    lines = isinstance(notes, Sequence) and all(isinstance(line, str) for line in notes)
    keeps(lines and not isinstance(notes, str), "the notes of a source must be a list of texts", f"they are {notes!r}")

    print_before = _fingerprint(source)
    keys = _keys(source)
    rows = np.unique(np.linspace(0, len(keys) - 1, min(len(keys), MOST_ROWS)).astype(int)).tolist() if keys else []
    labels = [_label(source, row) for row in rows]
    images = [_image(source, row) for row in rows]
    _check_again(source, keys, rows, labels, images, "asked again, from the last row to the first")
    keeps(
        _fingerprint(source) == print_before, "the fingerprint must not depend on what was loaded", "loading changed it"
    )
    other = attempt(opened, "a source must open again")
    keeps(_fingerprint(other) == print_before, "the fingerprint must be the same when opened again", "it is another")
    _check_again(other, keys, rows, labels, images, "opened again")
    if getattr(source, "thread_safe", False):
        promise = "a source that says thread_safe must give the same images to several threads at once"
        places = [place for place in range(len(rows)) for _ in range(4)]
        together = attempt(lambda: in_threads(lambda place: _image(source, rows[place]), places), promise)
        for place, image in zip(places, together, strict=True):
            keeps(image == images[place], promise, f"row {rows[place]}, {keys[rows[place]]!r}, was another")


def _keys(source: Source) -> list[str]:
    count = attempt(lambda: len(source), "a source must tell how many rows it has")
    keys: list[Any] = [attempt(partial(source.key, row), f"row {row} must have a key") for row in range(count)]
    seen: dict[str, int] = {}
    for row, key in enumerate(keys):
        keeps(isinstance(key, str) and key != "", "keys must be texts that are not empty", f"row {row} has {key!r}")
        if key in seen:
            broken("each row must have a key of its own", f"the rows {seen[key]} and {row} both have {key!r}")
        seen[key] = row
    keeps(len(source) == count, "the number of rows must stay the same", f"first {count}, then {len(source)}")
    return keys


def _label(source: Source, row: int) -> str:
    label = attempt(lambda: source.label(row), f"row {row} must have a label, or None")
    return _json(label, f"the label of row {row} must be what JSON can hold")


def _fingerprint(source: Source) -> str:
    told = attempt(source.fingerprint, "a source must have a fingerprint")
    keeps(isinstance(told, Mapping), "the fingerprint must be a mapping", f"it is a {type(told).__name__}")
    return _json(told, "the fingerprint must be what JSON can hold")


def _json(value: Any, promise: str) -> str:
    return attempt(lambda: strict_json.dumps(value, sort_keys=True), promise)


def _image(source: Source, row: int) -> tuple[str, str, bytes]:
    """What tells an image from another one: its kind, shape and bytes; of one that cannot be had, its status."""
    promise = f"row {row}: an image that cannot be had must be a SampleError"
    found = unless(SampleError, lambda: source.load(row), promise)
    if isinstance(found, SampleError):
        known = found.status in (Status.UNREADABLE, Status.UNDECODABLE)
        keeps(known, f"row {row}: the status of an image that cannot be had", f"{found.status} is another")
        return "failed", str(found.status), b""
    if isinstance(found, (bytes, bytearray, memoryview)):
        return "file", "", bytes(found)
    pixels = attempt(lambda: np.asarray(found), f"row {row}: an image is bytes, an array, a tensor or a PIL image")
    keeps(
        pixels.dtype != object and pixels.ndim in (2, 3),
        "an image must be its encoded bytes, an array, a tensor or a PIL image",
        f"row {row} gave a {type(found).__name__}",
    )
    return type(found).__name__, f"{pixels.dtype} {pixels.shape}", pixels.tobytes()


def _check_again(
    source: Source, keys: list[str], rows: list[int], labels: list[str], images: list[Any], how: str
) -> None:
    """The same, but in the other direction."""
    keeps(len(source) == len(keys), f"the number of rows must stay the same, {how}", f"{len(source)}, not {len(keys)}")
    for row in reversed(range(len(keys))):
        key = source.key(row)
        keeps(key == keys[row], f"rows must keep their order, {how}", f"row {row} was {keys[row]!r}, and is {key!r}")
    for row, label, image in reversed(list(zip(rows, labels, images, strict=True))):
        keeps(_image(source, row) == image, f"a row must be the same image, {how}", f"row {row}, {keys[row]!r}, is not")
        keeps(_label(source, row) == label, f"a row must keep its label, {how}", f"row {row}, {keys[row]!r}, has not")
