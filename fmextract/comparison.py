"""Where two runs over the same images begin to differ: two precisions, checkpoints, ways of storing. No torch."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fmextract.errors import ConfigError
from fmextract.reader import Activations, Layer
from fmextract.similarity import LinearCKA, batches

Rows: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LayerComparison:
    """One layer of `b` against `a`, over the values that are finite in both.

    `error` is the relative L2 error of all images together, |b - a| / |a|; `median_error` and `max_error` are of the
    images' own. `cosine` is that of all values as one vector, `cka` linear CKA between the images' activations.
    `worst` holds (key, relative L2 error) of the images that differ most; `nonfinite` counts the values that are
    finite in one only.
    """

    layer: str
    shape: tuple[int, ...]
    error: float
    median_error: float
    max_error: float
    cosine: float
    cka: float
    nonfinite: int
    worst: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two outputs. `images` are those compared, by key; the others, failed in one of them or not there, are counted.

    `only_a`, `only_b` are layers that the other does not have; `unlike` those whose shapes differ.
    """

    a: str
    b: str
    images: int
    images_only_a: int
    images_only_b: int
    failed: int
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    unlike: tuple[str, ...]
    layers: tuple[LayerComparison, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(a: Activations, b: Activations, layers: Sequence[str] = (), *, worst: int = 3) -> Comparison:
    """Compare the activations in `b` with those in `a`, layer by layer, rows matched by key and layers by name.

    `layers` are names, all that both have if none. Each layer is read once, in batches; `worst` images are named for
    each. Raises ConfigError where they have no image, or no layer of the same shape, in common.
    """
    shared, unlike = _shared_layers(a, b, layers)
    rows_a, rows_b, failed = _shared_rows(a, b)
    common = len(rows_a) + failed
    return Comparison(
        a=str(a.path),
        b=str(b.path),
        images=len(rows_a),
        images_only_a=len(a) - common,
        images_only_b=len(b) - common,
        failed=failed,
        only_a=tuple(name for name in a.layers if name not in b),
        only_b=tuple(name for name in b.layers if name not in a),
        unlike=tuple(unlike),
        layers=tuple(_compared(a[name], b[name], rows_a, rows_b, a.keys, worst) for name in shared),
    )


def _shared_layers(a: Activations, b: Activations, wanted: Sequence[str]) -> tuple[list[str], list[str]]:
    for name in wanted:
        a[name], b[name]  # raises for a name that one of them does not have, with the closest
    names = [name for name in a.layers if name in b and (not wanted or name in wanted)]
    unlike = [name for name in names if a[name].shape[1:] != b[name].shape[1:]]
    shared = [name for name in names if name not in unlike]
    if not shared:
        why = f"the shapes of {_some(unlike)} differ" if unlike else f"{_some(a.layers)}; {_some(b.layers)}"
        raise ConfigError(f"{a.path} and {b.path} have no layer in common: {why}")
    return shared, unlike


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6:,} more" if len(names) > 6 else "")


def _shared_rows(a: Activations, b: Activations) -> tuple[Rows, Rows, int]:
    """Rows of the images that both have and neither failed on, in the order of `a`; and how many one failed on."""
    row_of = {str(key): row for row, key in enumerate(b.keys)}
    pairs = np.array([(row, row_of[key]) for row, key in enumerate(map(str, a.keys)) if key in row_of], np.int64)
    if not len(pairs):
        raise ConfigError(f"{a.path} and {b.path} have no image in common: {a.keys[0]!r} …, {b.keys[0]!r} …")
    good = (a.status[pairs[:, 0]] == 0) & (b.status[pairs[:, 1]] == 0)
    if not good.any():
        raise ConfigError(f"{a.path} and {b.path}: every image that both have failed in one of them")
    return pairs[good, 0], pairs[good, 1], int((~good).sum())


def _compared(a: Layer, b: Layer, rows_a: Rows, rows_b: Rows, keys: Any, count: int) -> LayerComparison:
    values = math.prod(a.shape[1:])
    cka = LinearCKA(values, values)
    sums = np.zeros(4)  # |b - a|², |a|², |b|², a·b
    errors = np.empty(len(rows_a))
    nonfinite = 0
    for start, stop in batches(len(rows_a), 4 * 8 * values):
        x, y = (
            np.asarray(layer[rows[start:stop]], np.float64).reshape(stop - start, -1)
            for layer, rows in ((a, rows_a), (b, rows_b))
        )
        cka.update(x, y)
        finite = np.isfinite(x) & np.isfinite(y)
        nonfinite += int((np.isfinite(x) != np.isfinite(y)).sum())
        x, y = np.where(finite, x, 0.0), np.where(finite, y, 0.0)
        apart, size = ((y - x) ** 2).sum(1), (x**2).sum(1)
        sums += apart.sum(), size.sum(), (y**2).sum(), (x * y).sum()
        errors[start:stop] = _relative(apart, size)
    worst = heapq.nlargest(count, zip(errors.tolist(), (str(keys[row]) for row in rows_a), strict=True))
    both = math.sqrt(sums[1] * sums[2])
    return LayerComparison(
        layer=a.name,
        shape=a.shape[1:],
        error=float(_relative(sums[:1], sums[1:2])[0]),
        median_error=float(np.median(errors)),
        max_error=float(errors.max()),
        cosine=float(sums[3] / both) if both else math.nan,
        cka=cka.result(),
        nonfinite=nonfinite,
        worst=tuple((key, error) for error, key in worst),
    )


def _relative(apart: npt.NDArray[np.float64], size: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """|b - a| / |a| from their squares: 0 where both are 0, infinite where only a is."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(apart > 0, np.sqrt(apart / size), 0.0)
