"""Loops over the values of activations that neither numpy nor torch does in one pass: `_kernels.c`, compiled.

An installation compiles it where there is a C compiler. Without it these functions return None or False, and the caller
does the same with numpy or torch, several times as slowly. They release the GIL.
"""

from __future__ import annotations

import ctypes
import importlib.util
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


def _load() -> ctypes.CDLL | None:
    found = importlib.util.find_spec("fmextract.common._kernels")
    if found is None or found.origin is None:
        return None
    try:
        library = ctypes.CDLL(found.origin)
        moments, places, planes = library.fmextract_moments, library.fmextract_places, library.fmextract_planes
    except (OSError, AttributeError):  # built on another kind of machine, or of another version
        return None
    moments.argtypes = (_POINTER, ctypes.c_int, *[_INT] * 6, _POINTER, _FLOAT, *[_POINTER] * 6)
    places.argtypes = (_POINTER, ctypes.c_int, *[_INT] * 3, *[_POINTER] * 3)
    planes.argtypes = (_POINTER, *[_INT] * 6, _POINTER, _INT)
    moments.restype = places.restype = planes.restype = None
    return library


_library = _load()


def are_there() -> bool:
    """Return whether they were compiled, here and of this version."""
    return _library is not None


@dataclass(frozen=True, slots=True)
class Moments:
    """Of values x (images, channels, positions), in float64: sums of x - shift and highest values (images, channels);
    sums of (x - shift)^2, lowest values, and how many are 0 and near 0 (channels,).
    """

    sums: Array
    peaks: Array
    squares: Array
    low: Array
    zeros: Array
    near: Array


def moments(x: Array, shift: Array | None, near_zero: float | None) -> Moments | None:
    """Sum x (images, channels, positions), float32, or uint16 for the bit patterns of bfloat16.

    `shift` is float64 (channels,), None for zeros; values of at most `near_zero` either side of zero are near it. None
    where x holds anything else than finite numbers, is of another type, or has neither the positions nor the channels
    side by side in memory.
    """
    if _library is None or x.dtype not in (np.float32, np.uint16) or not all(x.shape):
        return None
    images, channels, positions = x.shape
    steps = [step // x.itemsize for step in x.strides]
    if positions == 1:
        steps[2] = 1
    if 1 not in steps[1:]:
        return None
    room = np.zeros((2, images + 2, channels))
    sums, peaks = room[:, 2:]
    (squares, low), (zeros, near) = room[:, :2]
    peaks[:], low[:] = -np.inf, np.inf
    found = Moments(sums, peaks, squares, low, zeros, near)
    shifts = None if shift is None else np.ascontiguousarray(shift, np.float64)
    _library.fmextract_moments(
        x.ctypes.data,
        x.dtype == np.uint16,
        *x.shape,
        *steps,
        None if shifts is None else shifts.ctypes.data,
        -1.0 if near_zero is None else near_zero,
        *(part.ctypes.data for part in (sums, peaks, squares, low, zeros, near)),
    )
    return found if np.isfinite(sums).all() else None


def places(x: Array, images: Array, channels: Array, values: Array) -> Array | None:
    """Return the first position, int64 (n,), at which x[images[i], channels[i]] is values[i], float64 (n,); else 0.

    x as for `moments`, in any layout.
    """
    if _library is None or x.dtype not in (np.float32, np.uint16):
        return None
    steps = [step // x.itemsize for step in x.strides]
    starts = np.ascontiguousarray(images * steps[0] + channels * steps[1], np.int64)
    wanted, found = np.ascontiguousarray(values, np.float64), np.empty(len(starts), np.int64)
    _library.fmextract_places(
        *(x.ctypes.data, x.dtype == np.uint16, x.shape[2], steps[2], len(starts), starts.ctypes.data),
        *(wanted.ctypes.data, found.ctypes.data),
    )
    return found


def byte_planes(x: Array, planes: Array) -> bool:
    """Write the bytes of x (images, positions, channels), channels side by side in memory, to `planes`, uint8
    (itemsize, values): first bytes first, in the order images, channels, positions. Returns whether it was done.
    """
    if _library is None:
        return False
    images, positions, channels = x.shape
    fit = planes.dtype == np.uint8 and planes.shape == (x.itemsize, x.size) and planes.strides[1] == 1
    if not fit or (channels > 1 and x.strides[2] != x.itemsize):
        raise ValueError(f"expected channels side by side, and planes of them, got {x.shape} and {planes.shape}")
    _library.fmextract_planes(
        *(x.ctypes.data, images, channels, positions, x.itemsize, *x.strides[:2], planes.ctypes.data),
        planes.strides[0],
    )
    return True
