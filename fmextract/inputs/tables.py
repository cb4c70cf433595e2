"""Take tables and columns of pandas, polars, pyarrow and numpy, by position. Imports none of them."""

from __future__ import annotations

import os
from typing import Any

__all__ = ["columns_of", "listed", "made_by"]


def made_by(data: Any, library: str) -> bool:
    """Return whether the type of `data`, or one that it is derived from, is that library's."""
    return any(kind.__module__.partition(".")[0] == library for kind in type(data).__mro__)


def columns_of(data: Any) -> dict[str, list[Any]] | None:
    """Return the columns of a DataFrame or of an arrow Table, in the order of its rows; None for what is no table."""
    if made_by(data, "pandas") and hasattr(data, "columns"):  # by position: its own [] goes by the labels of rows
        return {str(name): data.iloc[:, at].tolist() for at, name in enumerate(data.columns)}
    if made_by(data, "polars") and hasattr(data, "columns") and hasattr(data, "to_dict"):
        return dict(data.to_dict(as_series=False))
    if made_by(data, "pyarrow") and hasattr(data, "to_pydict"):
        return {str(name): values for name, values in data.to_pydict().items()}
    return None


def listed(data: Any) -> Any:
    """Return a Series, an Index, an arrow array, an array of text or objects as a list; all else as it is."""
    if made_by(data, "pandas") and hasattr(data, "tolist") and not hasattr(data, "columns"):
        return data.tolist()
    if made_by(data, "polars") and hasattr(data, "to_list"):
        return data.to_list()
    if made_by(data, "pyarrow") and hasattr(data, "to_pylist") and not hasattr(data, "to_pydict"):
        return data.to_pylist()
    if getattr(getattr(data, "dtype", None), "kind", "-") in "USO" and len(data.shape) == 1:
        return [os.fsdecode(value) if isinstance(value, bytes) else value for value in data.tolist()]
    return data
