"""Take the keys and labels that the caller gives for the rows of a source: `key=` and `label=`. No torch."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from fmextract.errors import ConfigError, SourceError
from fmextract.inputs.files import FileSource, Names, Options, refuse_duplicates, shown_name
from fmextract.inputs.labels import NotALabel, as_column
from fmextract.inputs.tables import listed
from fmextract.records import Label

__all__ = ["FOLDER", "function_of", "given_keys", "given_labels", "with_given"]

FOLDER = "folder"
"""`label="folder"`: the folder that an image lies in is its label."""


def with_given(source: FileSource, options: Options) -> FileSource:
    """Return the files with the keys and labels that the caller gives; what opened them saw to the names of columns."""
    count = len(source)
    keys = given_keys(options, count, source.key)
    if keys is not None:
        source = dataclasses.replace(source, keys=Names(key.encode() for key in keys))
    if options.label == FOLDER and source.labels is None:
        return dataclasses.replace(source, labels=_folders(source))
    labels = given_labels(options, count, source.key)
    return source if labels is None else dataclasses.replace(source, labels=labels)


def given_keys(options: Options, count: int, item: Callable[[int], Any] | None = None) -> list[str] | None:
    """Return a key for each row, by `options.key`: a list, or a function of the row, or of the row and `item(row)`."""
    values = _values(options.key, "key", count, options.limit, item)
    if values is None:
        return None
    if bad := [value for value in values if not isinstance(value, str) and not hasattr(value, "__index__")]:
        raise ConfigError(f"key= gives {bad[0]!r}: expected a text or a whole number for each row")
    keys = [shown_name(str(value).encode("utf-8", "backslashreplace")) for value in values]
    refuse_duplicates(keys)
    return keys


def given_labels(options: Options, count: int, item: Callable[[int], Any] | None = None) -> list[Label] | None:
    """Return a label for each row, by `options.label`, as `given_keys` does a key."""
    values = _values(options.label, "label", count, options.limit, item)
    if values is None:
        return None
    try:
        return as_column(values) or [None] * count
    except NotALabel as error:
        raise ConfigError(f"label= gives a value {error}: expected numbers, text, or lists of them") from error


def function_of(option: Any, name: str) -> int:
    """Return how many arguments a function takes: 1, the row, or 2, the row and its item; 0 for what is no function."""
    if not callable(option):
        return 0
    try:
        parameters = inspect.signature(option).parameters.values()
    except ValueError:  # a function in C
        return 1
    needed = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty for p in parameters)
    if needed not in (1, 2):
        raise ConfigError(f"{name}= takes a function of the row, or of the row and its item, not of {needed} arguments")
    return needed


def _values(
    option: Any, name: str, count: int, limit: int | None, item: Callable[[int], Any] | None
) -> Sequence[Any] | None:
    if option is None or isinstance(option, str):
        return None
    arguments = function_of(option, name)
    if arguments == 2 and item is None:
        raise ConfigError(f"{name}= is asked before the images are read: give a function of the row alone, or a list")
    if arguments:
        try:
            return [option(row) if arguments == 1 or item is None else option(row, item(row)) for row in range(count)]
        except Exception as error:  # the caller's function may raise anything
            raise ConfigError(f"the function given as {name}= raised {type(error).__name__}: {error}") from error
    values = listed(option)
    if not (hasattr(values, "__getitem__") and hasattr(values, "__len__")) or isinstance(values, (bytes, dict)):
        raise ConfigError(f"{name}= takes a list, a function or the name of a column, not {type(option).__name__}")
    if len(values) != count and not (limit is not None and len(values) > count):
        raise SourceError(f"{name}= has {len(values)} entries for {count} images: give one for each, in their order")
    return [values[row] for row in range(count)]


def _folders(source: FileSource) -> list[Label]:
    """Return the folder of each image: within a folder the first one below it, as in ImageFolder; else its own."""
    parts = [source.paths[row].split(b"/")[:-1] for row in range(len(source))]
    at = 0 if source.is_folder else -1
    return [shown_name(folders[at]) if folders and folders[at] else None for folders in parts]
