"""Turn what a Dataset, a table or a manifest gives as a label into plain Python. No torch."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fmextract.records import Label

__all__ = ["NotALabel", "as_column", "as_label", "read_cells"]

MOST_VALUES = 4096
"""Most values in one label: a mask or an embedding is no label of an image."""


class NotALabel(Exception):
    """What was given as a label, as a person would call it."""


def as_label(value: Any) -> Label:
    """Return a label as plain Python: numbers and text as they are, arrays and tensors as lists, mappings by text keys.

    An array or tensor of one value is that value. Raises NotALabel for anything else: images, more than MOST_VALUES.
    """
    label: Label = _plain(value, [MOST_VALUES])
    return label


def _plain(value: Any, room: list[int]) -> Any:
    """Return it as plain Python; `room` holds how many more values there may be."""
    room[0] -= 1
    if room[0] < 0:
        raise NotALabel(f"more than {MOST_VALUES:,} values")
    if value is None or type(value).__name__ in ("NAType", "NaTType"):  # what pandas writes where there is nothing
        return None
    if isinstance(value, str):
        return str.__str__(value)  # a kind of text of the user's own is unknown to another process
    if isinstance(value, (bool, int)):
        return int(value)
    if isinstance(value, (bytes, bytearray)):
        return bytes(value).decode("utf-8", "backslashreplace")
    if hasattr(value, "tolist") and hasattr(value, "shape"):  # arrays, tensors, and the scalars of numpy
        return _of_array(value, room)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(part, room) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part, room) for part in value]
    if hasattr(value, "isoformat"):  # dates
        return str(value.isoformat())
    if hasattr(value, "__index__"):
        return int(value.__index__())
    raise NotALabel(f"of type {type(value).__name__}")


def _of_array(value: Any, room: list[int]) -> Any:
    shape = tuple(value.shape)
    if len(shape) > 2 or math.prod(shape) > room[0] + 1:
        raise NotALabel(f"{type(value).__name__} of shape {shape}")
    try:
        listed = value.tolist()
    except (TypeError, ValueError, RuntimeError) as error:  # a sparse tensor, one on no device
        raise NotALabel(f"{type(value).__name__} of shape {shape} ({error})") from error
    if shape == (1,):
        listed = listed[0]
    if isinstance(listed, complex) or type(listed) is type(value):
        raise NotALabel(f"of type {type(value).__name__}")
    return _plain(listed, room)


def as_column(values: Sequence[Any]) -> list[Label] | None:
    """Return one label for each of `values`, None where there is none. NaN among values that are not numbers is none.

    Raises NotALabel.
    """
    made = [as_label(value) for value in values]
    given = [label for label in made if label is not None and not _is_nan(label)]
    if not given:
        return None
    if not all(isinstance(label, (int, float)) for label in given):  # what pandas makes of an empty cell
        made = [None if _is_nan(label) else label for label in made]
    return made


def _is_nan(label: Label) -> bool:
    return isinstance(label, float) and math.isnan(label)


_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")
_NUMBER = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_MISSING = frozenset({"", "nan", "NaN", "NA"})


def read_cells(cells: Sequence[str | None]) -> list[Label] | None:
    """Return a column of text: as integers if each cell reads as one, else as numbers if each does, else as it stands.

    Cells that differ stay different: "07" and "1_000" are text, and so is a column that has both "1.1" and "1.10".
    An empty cell is None, and so are NaN and NA in a column of numbers; a column of empty cells is None itself.
    """
    given = {cell for cell in cells if cell}
    if not given:
        return None
    bare = {cell: cell.strip() for cell in given}
    written = {cell: text for cell, text in bare.items() if text not in _MISSING}
    for pattern, kind in ((_INTEGER, int), (_NUMBER, float)):
        if written and all(map(pattern.fullmatch, written.values())):
            read: dict[str, Label] = {cell: kind(text) for cell, text in written.items()}
            if len(set(map(str, read.values()))) == len(set(written.values())):
                return [read.get(cell) if cell else None for cell in cells]
    return [cell or None for cell in cells]
