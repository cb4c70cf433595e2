"""Take arrays of other libraries than numpy and torch: zarr, xarray, dask, h5py and the like. No torch.

An array has a shape and a type, and gives its parts by number. One on a disk is read row by row, when a row is asked
for. Imports none of the libraries.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fmextract.inputs.tables import made_by

__all__ = ["as_memory", "as_numpy", "is_array", "members", "places", "rows_of"]

_CONTAINERS = ("h5py", "zarr", "xarray", "numpy")


def is_array(data: Any) -> bool:
    """Return whether it is an array of images, or one, of a library that is neither numpy nor torch."""
    if isinstance(data, (np.ndarray, np.generic)) or made_by(data, "torch"):
        return False
    if not (hasattr(data, "shape") and hasattr(data, "dtype") and hasattr(data, "__getitem__")):
        return False
    return hasattr(data, "__array__") and len(_shape(data)) >= 2


def rows_of(data: Any) -> int | None:
    """Return the length of its first axis, where it is an array, also of one that has no `len`."""
    return _shape(data)[0] if is_array(data) else None


def as_numpy(value: Any) -> Any:
    """Return an array as numpy's, read where it lies elsewhere; all else as it is."""
    return np.asarray(value) if is_array(value) else value


def as_memory(data: Any) -> Any:
    """Return the memory that an array of xarray's lies in, without a copy; all else as it is."""
    in_memory = made_by(data, "xarray") and is_array(data) and getattr(data, "_in_memory", False)
    return data.values if in_memory else data


def places(array: Any) -> frozenset[str]:
    """Return the file or the folder that an array lies in, where it says so."""
    store = getattr(array, "store", None)
    said = [
        getattr(getattr(array, "file", None), "filename", None),  # h5py's
        getattr(store, "root", None) or getattr(store, "path", None),  # zarr's
        (getattr(array, "encoding", None) or {}).get("source"),  # xarray's
    ]
    return frozenset(str(one) for one in said if isinstance(one, (str, Path)))


def members(data: Any) -> list[str] | None:
    """Return the names in a file or group of arrays; None for what is none."""
    if hasattr(data, "dtype") or not hasattr(data, "keys") or not any(made_by(data, kind) for kind in _CONTAINERS):
        return None
    return list(map(str, data))


def _shape(array: Any) -> tuple[int, ...]:
    try:
        return tuple(int(length) for length in array.shape)
    except (TypeError, ValueError):  # an axis of unknown length
        return ()
