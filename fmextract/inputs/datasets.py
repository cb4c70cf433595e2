"""Datasets and sequences of Python: what their items, keys and labels are. No torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fmextract.errors import SampleError, SourceError
from fmextract.inputs.files import FileSource, Names, Options, read_file, refuse_duplicates, shown_name
from fmextract.records import Status


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
        return read_file(os.fsencode(image)) if isinstance(image, (str, os.PathLike)) else image

    def fingerprint(self) -> Mapping[str, Any]:
        """Count, digest of the keys, type of the Dataset. What its items hold is not looked at."""
        keys = Names(key.encode("utf-8", "backslashreplace") for key in self.keys)
        kind = f"{type(self.data).__module__}.{type(self.data).__qualname__}"
        return {"count": len(self), "keys": keys.digest(), "dataset": kind}


def open_python(data: Any, name: str, options: Options) -> FileSource | DatasetSource:
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
    refuse_duplicates(keys)
    return DatasetSource(name, data, keys[:rows], labels)


def _keys_and_labels(data: Any, count: int) -> tuple[list[str], Sequence[Any] | None]:
    samples = getattr(data, "samples", None)
    if isinstance(samples, list) and hasattr(data, "root"):  # torchvision's ImageFolder and DatasetFolder
        keys = [os.fsencode(os.path.relpath(path, data.root)) for path, _ in samples]
        return [shown_name(key) for key in keys], [label for _, label in samples]
    labels = _column(data, "targets", "labels")
    if labels is not None and len(labels) != count:
        labels = None  # a name that means something else here
    ids = _column(data, "ids", "keys")
    if ids is not None:
        return [shown_name(str(key).encode("utf-8", "backslashreplace")) for key in ids], labels
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
