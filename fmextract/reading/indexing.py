"""Index an array that lies in chunks as numpy does: which chunks are wanted, and what of each goes where.

An index becomes one entry per axis (`per_axis`), each axis is cut by the chunks it touches (`cut`), and the crossing of
those cuts are the chunks to read. Pure arithmetic: nothing here reads anything.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from fmextract.errors import ConfigError

Places: TypeAlias = npt.NDArray[np.int64]


AxisIndex: TypeAlias = "int | range | Places"
"""An int ≥ 0 (the axis goes), a range, or an array of integers ≥ 0."""


Selection: TypeAlias = "range | Places"


def per_axis(key: Any, shape: tuple[int, ...]) -> tuple[list[AxisIndex], int]:
    """Return one entry per axis, and the place of the axes of index arrays in numpy's result (0 without arrays).

    Raises IndexError and TypeError like numpy.
    """
    items = [_index_item(one) for one in (key if isinstance(key, tuple) else (key,))]
    ellipses = [i for i, one in enumerate(items) if one is Ellipsis]
    if len(ellipses) > 1:
        raise IndexError("an index can only have a single ellipsis ('...')")
    used = sum(one.ndim if _is_mask(one) else 1 for one in items if one is not Ellipsis)
    if used > len(shape):
        raise IndexError(f"too many indices: the layer is {len(shape)}-dimensional, but {used} were indexed")
    at = ellipses[0] if ellipses else len(items)
    items[at : at + 1] = [slice(None)] * (len(shape) - used)
    gap = sum(one.ndim if _is_mask(one) else 1 for one in items[:at]) if ellipses and used == len(shape) else None
    axes: list[AxisIndex] = []
    for one in items:
        axis = len(axes)
        if isinstance(one, slice):
            axes.append(range(*one.indices(shape[axis])))
        elif isinstance(one, int):
            if not -shape[axis] <= one < shape[axis]:
                raise IndexError(f"index {one} is out of bounds for axis {axis} with size {shape[axis]}")
            axes.append(one % shape[axis])
        elif _is_mask(one):
            for i, (have, want) in enumerate(zip(one.shape, shape[axis:], strict=False)):
                if have != want:
                    raise IndexError(
                        f"boolean index did not match indexed array along axis {axis + i}; "
                        f"size of axis is {want} but size of corresponding boolean axis is {have}"
                    )
            axes.extend(one.nonzero())
        else:
            axes.append(_in_bounds(one, axis, shape[axis]))
    return axes, _place_of_arrays(axes, gap)


def _index_item(one: Any) -> Any:
    """Return a slice, Ellipsis, int, int64 array or boolean array with an axis. Raises IndexError for all else."""
    if isinstance(one, slice) or one is Ellipsis:
        return one
    if isinstance(one, (int, np.integer)) and not isinstance(one, bool):
        return int(one)
    if one is None:
        raise IndexError("a layer takes no new axes: index the array that comes out")
    array = np.asarray(one)
    if array.size == 0 and not isinstance(one, np.ndarray):
        array = array.astype(np.int64)  # an empty list is an empty list of rows
    if array.ndim == 0 and array.dtype.kind in "iu":
        return int(array)
    if array.ndim == 0 or array.dtype.kind not in "iub":
        raise IndexError(
            "only integers, slices (`:`), ellipsis (`...`) and integer or boolean arrays are valid indices, "
            f"got {one!r:.80}"
        )
    return array if array.dtype.kind == "b" else array.astype(np.int64)


def _is_mask(one: Any) -> bool:
    return isinstance(one, np.ndarray) and one.dtype.kind == "b"


def _in_bounds(index: Places, axis: int, size: int) -> Places:
    """Return negative indices counted from the end."""
    bad = (index < -size) | (index >= size)
    if bad.any():
        raise IndexError(f"index {index[bad].flat[0]} is out of bounds for axis {axis} with size {size}")
    return np.where(index < 0, index + size, index)


def selection_of(one: AxisIndex) -> Selection:
    if isinstance(one, int):
        return range(one, one + 1)
    return one if isinstance(one, range) else one.reshape(-1)


def _place_of_arrays(axes: Sequence[AxisIndex], gap: int | None) -> int:
    """Ask numpy, with an array of two values per axis. `gap` is where an Ellipsis for no axis at all parts arrays."""
    if not any(isinstance(one, np.ndarray) for one in axes):
        return 0
    key: list[Any] = [
        slice(None) if isinstance(one, range) else 0 if isinstance(one, int) else np.zeros((1,) * one.ndim, int)
        for one in axes
    ]
    if gap is not None:
        key.insert(gap, Ellipsis)
    place: int = np.empty((2,) * len(axes), bool)[tuple(key)].shape.index(1)
    return place


class Part(NamedTuple):
    """What of a selection on one axis falls into one chunk: from `here` in the chunk to `there` in the result."""

    chunk: int
    there: slice | Places
    here: slice | Places


def cut(selection: Selection, chunk: int) -> list[Part]:
    """Return a selection on one axis, cut by the chunks that it touches, in the order of the chunks."""
    if len(selection) == 0:
        return []
    if isinstance(selection, range):
        number = selection[0] // chunk
        if number == selection[-1] // chunk:  # most axes of most reads: nothing to search
            start, end = selection[0] - number * chunk, selection[-1] - number * chunk
            stop = end + 1 if selection.step > 0 else end - 1
            here = slice(start, stop if stop >= 0 else None, selection.step if len(selection) > 1 else 1)
            if len(selection) == 1:
                here = slice(start, start + 1, 1)
            return [Part(number, slice(0, len(selection), 1), here)]
        selection = np.arange(selection.start, selection.stop, selection.step)
    numbers = selection // chunk
    order = np.arange(len(selection))
    if (numbers[1:] < numbers[:-1]).any():
        order = np.argsort(numbers, kind="stable")
        numbers = numbers[order]
    cuts = np.flatnonzero(np.diff(numbers)) + 1
    parts = []
    for start, stop in itertools.pairwise([0, *cuts.tolist(), len(order)]):
        there, number = order[start:stop], int(numbers[start])
        parts.append(Part(number, _as_slice(there), _as_slice(selection[there] - number * chunk)))
    return parts


def _as_slice(places: Places) -> slice | Places:
    """Return the slice of the same places where there is one: numpy copies slices many times faster."""
    start = int(places[0])
    if len(places) == 1:
        return slice(start, start + 1, 1)
    step = int(places[1]) - start
    if step == 0 or (np.diff(places) != step).any():
        return places
    stop = start + step * len(places)
    return slice(start, stop if stop >= 0 else None, step)


def crossing(places: Sequence[slice | Places], shape: Sequence[int]) -> tuple[Any, ...]:
    """Return an index for the crossing of one selection per axis; numpy would pair two arrays."""
    if sum(isinstance(one, np.ndarray) for one in places) < 2:
        return tuple(places)
    return np.ix_(*(np.arange(n)[one] for one, n in zip(places, shape, strict=True)))


def stretches(places: slice | Places, size: int) -> list[range]:
    """Return the places of a selection in a chunk of `size`, in their order, as ranges of neighbours that ascend."""
    if isinstance(places, slice):
        one = range(*places.indices(size))
        return [one] if one.step == 1 else [range(place, place + 1) for place in one]
    cuts = np.flatnonzero(np.diff(places) != 1) + 1
    return [range(int(part[0]), int(part[-1]) + 1) for part in np.split(places, cuts)]


def count(places: slice | Places, size: int) -> int:
    """Return how many places of a chunk of `size` a selection has."""
    return len(range(*places.indices(size))) if isinstance(places, slice) else len(places)


Array: TypeAlias = npt.NDArray[Any]


Rows: TypeAlias = npt.NDArray[np.int64]


def batched(rows: Rows, size: int) -> Iterator[Rows]:
    if size < 1:
        raise ConfigError(f"expected a batch size of at least 1, got {size}")
    return (rows[start : start + size] for start in range(0, len(rows), size))
