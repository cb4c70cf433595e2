"""Open Datasets and sequences of Python: their items, keys and labels. No torch."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fmextract.common.beside import plain_name
from fmextract.errors import SampleError, SourceError
from fmextract.inputs.arrays import as_numpy, members, rows_of
from fmextract.inputs.attributes import kept_by
from fmextract.inputs.contents import Before, contents_at_first, fingerprint_of, labels_digest, stamps
from fmextract.inputs.files import FileSource, Names, OnDisk, Options, refuse_duplicates
from fmextract.inputs.given import FOLDER, function_of, given_keys, given_labels, with_given
from fmextract.inputs.items import IMAGE_NAMES, PATH_NAMES, Item, UnclearItem, is_pair, is_path, named, split
from fmextract.inputs.labels import NotALabel, as_column, as_label
from fmextract.inputs.manifests import open_table
from fmextract.inputs.tables import columns_of, listed, made_by
from fmextract.records import Label, Status


@dataclass(frozen=True, slots=True)
class DatasetSource:
    """A map-style Dataset or a sequence; see `items` for what an item is.

    A label comes with its item, at no cost once the row has been loaded; `labels` are those that the Dataset lists
    beside its items, for rows that fail, or whose item has none. `pick` takes the label out of (row, item) instead.
    `given`: the caller's labels replace those of the items.
    """

    name: str
    data: Any
    keys: Sequence[str]
    labels: Sequence[Any] | None
    pick: Callable[[int, Any], Any] | None = None
    given: bool = False
    notes: list[str] = field(default_factory=list)
    seen: dict[int, Label] = field(default_factory=dict, repr=False)
    looked_at: set[str] = field(default_factory=set, repr=False)
    before: Before = field(default_factory=Before, repr=False)
    """What `data` held, and `pick`, when they were given."""
    paths: Sequence[bytes] | None = field(default=None, repr=False)
    """The files of its items, where `data` lists them."""
    classes: tuple[str, ...] = ()
    """What the labels that `data` lists are called."""

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, row: int) -> str:
        return self.keys[row]

    def label(self, row: int) -> Label:
        if self.labels is None and row not in self.seen:
            with contextlib.suppress(SampleError):  # a failed row has no label
                self.load(row)
        label = self.seen.pop(row, None)
        return label if label is not None else self._listed_label(row)

    def _listed_label(self, row: int) -> Label:
        """Return what the Dataset lists beside its items, unless the first item showed that this is something else."""
        if self.labels is None or "other labels" in self.looked_at:
            return None
        return self._as_label(row, self.labels[row])

    def label_names(self) -> tuple[str, ...]:
        """Return what the labels 0, 1, … are called, where the items have those that are listed."""
        return () if "other labels" in self.looked_at else self.classes

    def learnt(self, row: int) -> tuple[Label, Sequence[str], frozenset[str]]:
        """Return what loading a row showed beside its image, for `learn` of this source or of its original."""
        return self.seen.pop(row, None), tuple(self.notes), frozenset(self.looked_at)

    def learn(self, row: int, learnt: tuple[Label, Sequence[str], frozenset[str]]) -> None:
        """Take what loading a row elsewhere showed, as if it had been loaded here."""
        self.seen[row], notes, looked_at = learnt
        self.notes.extend(note for note in notes if note not in self.notes)
        self.looked_at.update(looked_at)

    def load(self, row: int) -> Any:
        """Return the image of an item. Raises SampleError(Status.UNREADABLE) with what `__getitem__` raised.

        Raises SourceError if no image can be found in the very first item.
        """
        image = self.fetch(row)
        return image.read() if isinstance(image, OnDisk) else image

    def fetch(self, row: int) -> Any:
        """Return what `load` does, or, where the item is a path, the file that any thread or process may read."""
        if not 0 <= row < len(self):
            raise IndexError(f"expected a row from 0 to {len(self) - 1}, got {row}")
        self.seen[row] = None
        try:
            item = self.data[row]
        except Exception as error:  # a Dataset may raise anything, and that is one row's failure
            raise SampleError(Status.UNREADABLE, f"{type(error).__name__}: {error}") from error
        try:
            parts = self._split(row, item)
        except UnclearItem as error:
            if "items" not in self.looked_at:
                raise SourceError(f"{self.name}: {error}") from error
            raise
        if not self.given:
            self.seen[row] = self._as_label(row, parts.label if self.pick is None else self._picked(row, item))
        if "items" not in self.looked_at:
            self.looked_at.add("items")
            self._look_at(row, parts.rest)
        return OnDisk(os.fsencode(parts.image)) if is_path(parts.image) else parts.image

    def _split(self, row: int, item: Any) -> Item:
        """Return the parts of an item, whose image is read where it is an array that lies elsewhere."""
        parts = split(item)
        try:
            return dataclasses.replace(parts, image=as_numpy(parts.image))
        except Exception as error:  # it is read only now, and may raise anything, which is one row's failure
            raise SampleError(Status.UNREADABLE, f"{type(error).__name__}: {error}") from error

    def _picked(self, row: int, item: Any) -> Any:
        assert self.pick is not None
        try:
            return self.pick(row, item)
        except Exception as error:  # the caller's function may raise anything
            raise SourceError(
                f"{self.name}: label= raised {type(error).__name__}: {error}, for the item of row {row}"
            ) from error

    def _look_at(self, row: int, rest: Sequence[str]) -> None:
        """Look at the first item: report what of it is not taken; see whether the Dataset's list has its label."""
        if self.given:
            return
        if rest and self.pick is None:
            self.notes.append(f"{self.name}: of each item the image and the label are taken, not {', '.join(rest[:8])}")
        if self.seen[row] is not None and self.labels is not None and self._listed_label(row) != self.seen[row]:
            self.looked_at.add("other labels")

    def _as_label(self, row: int, value: Any) -> Label:
        try:
            return as_label(value)
        except NotALabel as error:
            if "labels" not in self.looked_at:
                self.looked_at.add("labels")
                self.notes.append(
                    f"{self.name}: labels that are no numbers, text or short lists of them are not stored. The first:"
                    f" row {row}, {error} (label= can take a part of it)"
                )
            return None

    def fingerprint(self) -> Mapping[str, Any]:
        """Return count, digests of the keys and labels, type and content of the Dataset; its files' sizes and times."""
        keys = Names(key.encode("utf-8", "backslashreplace") for key in self.keys)
        kind = f"{plain_name(type(self.data).__module__)}.{type(self.data).__qualname__}"
        told = fingerprint_of(self.data, len(self), self.before, self.pick)
        files = {} if self.paths is None else stamps(self.paths)
        listed = labels_digest(self.labels)
        return {"count": len(self), "keys": keys.digest(), "dataset": kind, **told, **files, **listed}


def open_python(data: Any, name: str, options: Options) -> FileSource | DatasetSource:
    """Open what holds images or paths by position. Raises SourceError, before anything is read, for all else."""
    table = columns_of(data)
    if table is not None:
        return _of_table(table, name, options)
    values = listed(data)
    count = _count(values, name)
    rows = min(count, options.limit or count)
    if isinstance(values, Sequence) and _may_be_files(values):
        files = _of_files([values[row] for row in range(rows)], name, options)
        if files is not None:
            return files
    return _of_dataset(values, name, count, rows, options)


def _may_be_files(values: Sequence[Any]) -> bool:
    """Return whether to look at all items before the run; a user's sequence may load an image for each."""
    if type(values) in (list, tuple):
        return True
    try:
        first = values[0]
    except Exception:  # its row will report the error
        return False
    return is_path(first) or is_pair(first)


def files_named(paths: Sequence[Any], name: str, options: Options, labels: Sequence[Label] | None = None) -> FileSource:
    """Return a source of single files, with the caller's keys and labels. Raises SourceError for a file given twice."""
    for option, value in (("key", options.key), ("label", options.label)):
        if isinstance(value, str) and not (option == "label" and value == FOLDER):
            raise SourceError(f"--{option} {value!r} names a column of a manifest or a table; {name} has none")
    source = FileSource.of_paths(paths, name, labels)
    if options.key is None:
        refuse_duplicates(map(source.key, range(len(source))))
    return with_given(source, options)


def _of_files(values: Sequence[Any], name: str, options: Options) -> FileSource | None:
    """Return a source of paths, or (path, label) pairs, known before anything is read; None for anything else."""
    if all(map(is_path, values)):
        return files_named(values, name, options)
    if is_path(values[0]):
        missing = next((row for row, value in enumerate(values) if _is_missing(value)), None)
        if missing is not None:
            raise SourceError(f"{name}: row {missing} has no path, but {values[missing]!r}: leave such rows out")
    if not all(is_pair(value) for value in values):
        return None
    try:
        labels = as_column([label for _, label in values])
    except NotALabel:
        return None
    return files_named([path for path, _ in values], name, options, labels)


def _is_missing(value: Any) -> bool:
    return value is None or isinstance(value, float) or type(value).__name__ in ("NAType", "NaTType")


def _of_table(table: dict[str, list[Any]], name: str, options: Options) -> FileSource | DatasetSource:
    if not table or not len(next(iter(table.values()))):
        raise SourceError(f"{name} is empty")
    image = _image_column(table, name)
    if all(map(is_path, table[image])):
        return with_given(open_table(table, image, name, options), options)
    if isinstance(options.key, str) and options.key not in table:
        raise SourceError(f"{name}: --key {options.key!r} is no column; there are {', '.join(table)}")
    keys = (
        [options.key] if isinstance(options.key, str) else named(list(table), ("key",)) if options.key is None else []
    )
    rows = [dict(zip(table, cells, strict=True)) for cells in zip(*table.values(), strict=True)]
    if keys:
        options = dataclasses.replace(options, key=table[keys[0]])
    return _of_dataset(rows, name, len(rows), min(len(rows), options.limit or len(rows)), options)


def _image_column(table: Mapping[str, Sequence[Any]], name: str) -> str:
    """Return the column of paths, or of images. Raises SourceError where there is none, or several may be it."""
    called = named(list(table), ("path",)) or named(list(table), (*IMAGE_NAMES, *PATH_NAMES))
    if len(called) == 1:
        return str(called[0])
    wanted = "expected a column `path` of files, or `image` of images"
    if called:
        raise SourceError(f"{name}: {' and '.join(map(repr, called))} may each be the images: {wanted}")
    raise SourceError(f"{name}: {wanted}, found {', '.join(map(repr, table))}")


def _of_dataset(data: Any, name: str, count: int, rows: int, options: Options) -> DatasetSource:
    if isinstance(options.key, str):
        raise SourceError(
            f"{name}: --key {options.key!r} names a column of a manifest or a table. The keys of a Dataset are "
            "given as a list, or as a function of the row (key=)"
        )
    notes: list[str] = []
    kept = kept_by(data, count, notes.append)
    keys = given_keys(options, rows) or (kept.keys[:rows] if kept.keys is not None else _numbers(count)[:rows])
    pick = _picker(options)
    before = contents_at_first(data, pick)
    paths = kept.paths[:rows] if kept.paths is not None else None
    if pick is not None:
        return DatasetSource(name, data, keys, None, pick, notes=notes, before=before, paths=paths)
    given = given_labels(options, rows)
    labels = kept.labels if given is None else given
    return DatasetSource(
        name,
        data,
        keys,
        labels,
        None,
        given is not None,
        notes,
        before=before,
        paths=paths,
        classes=() if given is not None else kept.classes,
    )


def _part(name: str, row: int, item: Any) -> Any:
    """Return a part of an item that is a dict; a function of the module, so that pickle can send it."""
    return item[name]


def _numbers(count: int) -> list[str]:
    width = max(6, len(str(count - 1)))
    return [f"{row:0{width}d}" for row in range(count)]


def _picker(options: Options) -> Callable[[int, Any], Any] | None:
    """Return what takes a label out of (row, item): a name of a part of the items, or the caller's function of both."""
    label = options.label
    if isinstance(label, str):
        return functools.partial(_part, label)
    picker: Callable[[int, Any], Any] | None = label if function_of(label, "label") == 2 else None
    return picker


def _count(data: Any, name: str) -> int:
    """Return how many items there are. Raises SourceError for what cannot be asked for a row by its number."""
    kind = type(data).__name__
    if made_by(data, "torch") and hasattr(data, "batch_sampler"):
        raise SourceError(
            f"{name}: a {kind} gives batches, in an order of its own. Give its Dataset (loader.dataset), whose rows "
            "keep their order: batches are made here (--batch-size)"
        )
    names = members(data)
    if names is not None:
        raise SourceError(
            f"{name}: a {kind} holds arrays by name. Give one of them:"
            f" {', '.join(f'data[{one!r}]' for one in names[:8]) or 'it has none'}"
        )
    try:
        rows = rows_of(data)
        count = None if isinstance(data, (bytes, str, Mapping, set, frozenset)) else len(data) if rows is None else rows
    except (TypeError, NotImplementedError):
        count = None
    if count is None or not hasattr(data, "__getitem__") or _is_iterable_only(data):
        raise SourceError(
            f"{name}: expected a map-style Dataset or a sequence of images (with __len__ and __getitem__), got {kind}. "
            f"{_instead_of(data)}"
        )
    if count == 0:
        raise SourceError(f"{name} is empty")
    return count


def _is_iterable_only(data: Any) -> bool:
    """Return whether it can only be iterated over: an IterableDataset inherits a __getitem__ that raises."""
    return any(base.__name__ == "IterableDataset" for base in type(data).__mro__)


def _instead_of(data: Any) -> str:
    if made_by(data, "datasets") and isinstance(data, Mapping):
        return f"Give one of its parts: {', '.join(map(repr, data))}"
    if isinstance(data, Mapping):
        return "Of a dict of images give list(d.values()), and its names as key=list(d)"
    if isinstance(data, (set, frozenset)):
        return "A set has no order: give sorted(…)"
    if isinstance(data, Iterable) and not isinstance(data, (bytes, str)):
        return (
            "Rows are read by number, some more than once, and a run may be resumed: what can be read once only, in "
            "order, cannot be asked for that. Give list(…) where it fits into memory, or a Dataset"
        )
    return "An image is an array, a tensor, a PIL image, encoded bytes or a path: give a list of them"
