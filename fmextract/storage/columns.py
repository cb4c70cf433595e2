"""Give the columns of a source, labels and others, the form that they take in a file. Values only, no HDF5.

A column is int64 where each value is a whole number, float64 where each is a number, with a second axis where each is
a list of as many of them; else text, or, where lists are ragged or hold other things, text that is JSON.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fmextract.common import strict_json
from fmextract.errors import DamagedError
from fmextract.records import Label
from fmextract.storage import schema

__all__ = ["Form", "as_array", "common_form", "decode_column", "encode_column", "form_of", "stored_names"]

Array: TypeAlias = npt.NDArray[Any]

LOWEST = -(2**63)
"""Stands for no value where -1 is one."""
RESERVED = frozenset({*schema.COLUMNS, "layers", "stats", "label_index"})
_NAME_BYTES = 200


@dataclass(frozen=True, slots=True)
class Form:
    """The form of a column. `kind` is int, float, text or json; `length` is that of the second axis, None without one.

    `missing` stands for no value in a column of integers. (In others it is NaN, or an empty text.)
    """

    kind: str
    length: int | None = None
    missing: int = -1
    gaps: bool = False

    @property
    def is_numeric(self) -> bool:
        return self.kind in ("int", "float")

    @property
    def dtype(self) -> npt.DTypeLike | None:
        """On the disk; None for text."""
        return {"int": np.int64, "float": np.float64}.get(self.kind)


def form_of(values: Sequence[Label] | None) -> Form | None:
    """Return the form of a column that holds these values; None where none of them is one."""
    given = [value for value in values or () if value is not None]
    if not given:
        return None
    gaps = len(given) < len(values or ())
    lists = [value for value in given if isinstance(value, (list, tuple))]
    if not lists:
        return _scalars(given, gaps)
    lengths = {len(value) for value in lists}
    if len(lists) == len(given) and len(lengths) == 1 and 0 not in lengths:
        form = _scalars([one for value in lists for one in value], gaps)
        if form.is_numeric:
            return Form(form.kind, len(lists[0]), form.missing, gaps)
    return Form("json", gaps=gaps)


def _scalars(values: Sequence[Any], gaps: bool) -> Form:
    if all(map(_is_whole, values)):
        return Form("int", missing=LOWEST if -1 in values else -1, gaps=gaps)
    if all((_is_whole(value) and abs(value) <= 2**53) or isinstance(value, float) for value in values):
        return Form("float", gaps=gaps)
    plain = all(isinstance(value, (str, int, float, np.integer)) for value in values)
    return Form("text" if plain else "json", gaps=gaps)


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and LOWEST < int(value) < 2**63


def common_form(forms: Iterable[Form | None]) -> Form | None:
    """Return the form that holds the values of columns of these forms."""
    there = [form for form in forms if form is not None]
    if not there:
        return None
    kinds, lengths = {form.kind for form in there}, {form.length for form in there}
    missing = min(form.missing for form in there)
    gaps = any(form.gaps for form in there)
    if kinds <= {"int", "float"} and len(lengths) == 1:
        return Form("int" if kinds == {"int"} else "float", there[0].length, missing, gaps)
    return Form("text" if lengths == {None} and "json" not in kinds else "json", gaps=gaps)


def encode_column(values: Sequence[Label], form: Form) -> Array | list[str]:
    """Return the values as they are stored: an array of numbers, or texts."""
    if form.kind == "text":
        return ["" if value is None else str(value) for value in values]
    if form.kind == "json":
        return ["" if value is None else strict_json.dumps(value) for value in values]
    nothing: Any = form.missing if form.kind == "int" else math.nan
    if form.length is not None:
        nothing = [nothing] * form.length
    made = np.array([nothing if value is None else value for value in values], form.dtype)
    return made.reshape(len(values), *([] if form.length is None else [form.length]))


def decode_column(stored: Array, form: Form, where: str) -> list[Label]:
    """Return the values of a stored column, None where there is none. Raises DamagedError for broken JSON."""
    if form.kind == "json":
        return [_loaded(text, where) if text else None for text in stored]
    if form.kind == "text":
        return [text or None for text in stored]
    values: list[Label] = stored.tolist()
    if form.kind == "int":
        nothing = form.missing
        none = (stored == nothing).reshape(len(stored), -1).all(axis=1)
    else:
        none = np.isnan(stored).reshape(len(stored), -1).all(axis=1)
    for row in np.flatnonzero(none):
        values[row] = None
    return values


def _loaded(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{where}: a value is not JSON ({error})") from error


def as_array(values: Sequence[Label], form: Form, *, whole: bool = False) -> Array:
    """Return a column for people: numbers, NaN where there is none; text, else empty; the objects that JSON held.

    `whole`: -1 where there is none among integers, unless one of them is -1.
    """
    if form.kind == "json":
        made = np.empty(len(values), object)
        made[:] = values
        return made
    if form.kind == "int" and None in values and not (whole and form.missing == -1):
        form = Form("float", form.length)
    return np.asarray(encode_column(values, form), object if form.kind == "text" else None)


def stored_names(columns: Iterable[str]) -> dict[str, str]:
    """Return the names of a source's columns in a file: their own, or `column_NAME` where that is taken."""
    made: dict[str, str] = {}
    taken = set(RESERVED)
    for column in columns:
        name = re.sub(r"[/\x00-\x1f]", "_", column.strip()).strip(".")
        if not name or name in taken or name != column or len(name.encode()) > _NAME_BYTES:
            name = f"column_{name.encode()[:_NAME_BYTES].decode(errors='ignore')}"
        number = 2
        while name in taken:
            name, number = f"{name.removesuffix(f'_{number - 1}')}_{number}", number + 1
        taken |= {name, f"{name}_index"}
        made[column] = name
    return made
