"""What a reader must keep to: numpy's indexing over one file or many, every bit, and no failed rows in batches."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fmextract.testing.outputs import make_file, make_shards
from fmextract.testing.promises import attempt, broken, in_threads, keeps

Array = npt.NDArray[Any]

ROWS = 22
FAILED = (3, 20)
SHAPES = {"maps": (6, 4, 3), "z/y": (7,), "tokens": (5, 6), "50%": (3, 2, 2), "double": (4,)}
TYPES = {"maps": "float32", "z/y": "float32", "tokens": "float16", "50%": "int16", "double": "float64"}
CHUNKS = {"maps": (1, 4, 4, 3), "z/y": (4, 7), "tokens": (2, 5, 6), "50%": (4, 3, 2, 2), "double": (4, 4)}
"""Those of `maps` are split along the channels, those of others hold several images."""


def check_reader(opened: Callable[[Path], Any], codecs: tuple[str, ...] = ("gzip", "none")) -> None:
    """Check that what `opened` returns reads outputs as `fmextract.open` does.

    It is given paths of files and of directories of shards, whose values are known. What it returns must have
    `layers` (names, in their order), `keys`, `status`, `row(key)` and, by `[name]`, layers with `shape`, `dtype`,
    numpy's indexing, `len` and `batches(size)`.

    Args:
        opened: opens the output at a path.
        codecs: the codecs that it must read; zstd and lz4 need their extras.

    Raises:
        AssertionError: which promise it breaks, and where.

    >>> import fmextract
    >>> check_reader(fmextract.open)
    """
    arrays = _arrays()
    status = [int(row in FAILED) for row in range(ROWS)]
    with tempfile.TemporaryDirectory() as folder:
        for codec in codecs:
            place = Path(folder) / codec
            make_file(place.with_suffix(".h5"), arrays, chunk=CHUNKS, codec=codec, status=status)
            make_shards(place, arrays, (8, 12), chunk=CHUNKS, codec=codec, status=status)
            _check_output(opened, place.with_suffix(".h5"), f"one {codec} file", arrays, range(ROWS))
            _check_output(opened, place, f"a directory of {codec} shards", arrays, range(ROWS))
            part = {name: values[8:12] for name, values in arrays.items()}
            _check_output(opened, place / "shard-00001.h5", f"one {codec} shard alone", part, range(8, 12))


def _arrays() -> dict[str, Array]:
    """Values of every kind: random bits, so NaN payloads, infinities, subnormals and negative zeros."""
    dice, arrays = np.random.default_rng(0), {}
    for name, shape in SHAPES.items():
        kind = np.dtype(TYPES[name])
        values = dice.integers(0, 256, ROWS * int(np.prod(shape)) * kind.itemsize, np.uint8).view(kind)
        arrays[name] = values.reshape(ROWS, *shape)
        arrays[name][0].flat[:2] = (0, 1) if kind.kind == "i" else (-0.0, np.inf)
        arrays[name][list(FAILED)] = 0 if kind.kind == "i" else np.nan
    return arrays


def _check_output(opened: Callable[[Path], Any], path: Path, what: str, arrays: dict[str, Array], rows: range) -> None:
    acts = attempt(lambda: opened(path), f"{what} must open")
    names = list(acts.layers)
    keeps(names == list(arrays), f"{what}: layers must have their names, in the order they ran", f"they are {names}")
    keys = [f"img/{row:05}.jpg" for row in rows]
    keeps(list(acts.keys) == keys, f"{what}: keys must be those of the rows, in their order", f"{list(acts.keys)[:3]}…")
    status = [int(row in FAILED) for row in rows]
    keeps(np.asarray(acts.status).tolist() == status, f"{what}: the status must be that of each row", "it is another")
    found = acts.row(keys[-1])
    keeps(found == len(rows) - 1, f"{what}: row(key) must count from the first row that it reads", f"it gave {found}")
    for name, values in arrays.items():
        layer = attempt(partial(acts.__getitem__, name), f"{what}: each layer must be found by its name")
        _check_layer(layer, values, f"{what}, layer {name}")
        _check_batches(layer, values, status, f"{what}, layer {name}")


def _check_layer(layer: Any, values: Array, where: str) -> None:
    for attribute, expected in (("shape", values.shape), ("dtype", values.dtype)):
        told = getattr(layer, attribute)
        keeps(told == expected, f"{where}: the {attribute} must be {expected}", f"it is {told}")
    keeps(len(layer) == len(values), f"{where}: len must count rows", f"it gave {len(layer)}")
    for key in _keys(values):
        _same(
            attempt(partial(layer.__getitem__, key), f"{where}[{key!r}] must be read"), values[key], f"{where}[{key!r}]"
        )
    for key in (len(values), -len(values) - 1):
        try:
            layer[key]
        except IndexError:
            continue
        broken(f"{where}[{key}] must be an IndexError", "it gave values")
    mine = layer[0]
    mine[...] = 0
    _same(layer[0], values[0], f"{where}[0] after somebody wrote into the array that was read before")
    tasks = list(range(len(values))) * 4
    for row, made in zip(tasks, in_threads(lambda row: layer[row], tasks), strict=True):
        _same(made, values[row], f"{where}[{row}] read by several threads at once")


def _keys(values: Array) -> Iterator[Any]:
    rows = len(values)
    yield from (..., 0, -1, rows - 1, slice(1, 3), slice(None, None, -1), slice(-3, None, 2), slice(2, 2))
    yield from ([rows - 1, 0, 0], np.array([], np.int64), np.arange(rows) % 3 == 0, np.arange(rows)[::-1])
    if values.ndim > 1:
        yield from ((0, values.shape[1] - 1), (slice(0, rows, 2), -1), (slice(None), [values.shape[1] - 1, 0]))
        yield (..., 0)


def _same(made: Any, expected: Array, what: str) -> None:
    """Bit by bit: NaN payloads and negative zeros, too."""
    keeps(isinstance(made, (np.ndarray, np.generic)), f"{what} must be numpy's", f"it is a {type(made).__name__}")
    keeps(made.dtype == expected.dtype, f"{what} must be {expected.dtype}", f"it is {made.dtype}")
    keeps(made.shape == expected.shape, f"{what} must have the shape {expected.shape}", f"it has {made.shape}")
    word = f"u{expected.itemsize}"
    other = np.ascontiguousarray(made).view(word) != np.ascontiguousarray(expected).view(word)
    if other.any():
        at = tuple(int(i) for i in np.argwhere(other.reshape(expected.shape))[0])
        mine, theirs = np.asarray(made)[at], expected[at]
        said = f"at {at} {mine} (0x{int(mine.view(word)):x}) instead of {theirs} (0x{int(theirs.view(word)):x})"
        broken(f"{what} must be the stored values, bit by bit", said)


def _check_batches(layer: Any, values: Array, status: list[int], where: str) -> None:
    good = [row for row, failed in enumerate(status) if not failed]
    seen: list[int] = []
    for rows, batch in attempt(lambda: list(layer.batches(5)), f"{where}: batches(5) must be read"):
        _same(batch, values[np.asarray(rows)], f"{where}: the batch of the rows {list(rows)}")
        keeps(len(rows) <= 5, f"{where}: batches(5) must hold 5 rows at most", f"one has {len(rows)}")
        seen += np.asarray(rows).tolist()
    keeps(seen == good, f"{where}: batches must give the rows that did not fail, in order", f"they gave {seen}")
