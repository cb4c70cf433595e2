"""How unlike the images of a layer are, pair by pair, without all its maps in memory. No torch.

N. Kriegeskorte, M. Mur and P. Bandettini, "Representational similarity analysis", Frontiers in Systems Neuroscience
2008. Names and definitions are those of rsatoolbox (`rsatoolbox.rdm.calc_rdm`), which has no cosine distance between
patterns: that one is scipy's (`scipy.spatial.distance.cosine`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from fmextract.reading.indexing import Rows
    from fmextract.reading.layer import Layer

Array: TypeAlias = npt.NDArray[Any]

METRICS = {"euclidean-squared": "squared euclidean", "correlation": "correlation", "cosine": "cosine"}
"""What each is called, and the `dissimilarity_measure` that rsatoolbox writes beside it.

    euclidean-squared   |x - y|² / values of an image      correlation   1 - r(x, y)      cosine   1 - x·y / |x||y|
"""
LEFT_BYTES = 512 << 20
RIGHT_BYTES = 64 << 20
"""Rows as float64 that are held on either side of the pairs. Each row is read once for every left block up to its own:
so the left one is large."""


def dissimilarities(layer: Layer, rows: Rows, metric: str) -> Iterator[Array]:
    """Yield the pairs of `rows` (n) in the order of scipy's `squareform`, float64, in parts that follow one another.

    n (n - 1) / 2 values in all. NaN where a row holds a value that is not finite, or, for correlation and cosine, where
    it does not vary or is zero. Memory: about twice LEFT_BYTES and twice RIGHT_BYTES, if two rows are less.
    """
    count, values = len(rows), math.prod(layer.shape[1:])
    for start, stop in _blocks(0, count, LEFT_BYTES // (8 * max(values, count))):
        left = _patterns(layer[rows[start:stop]], metric)
        panel = np.empty((stop - start, count - start))
        panel[:, : stop - start] = _apart(left, left, metric)
        for begin, end in _blocks(stop, count, RIGHT_BYTES // (8 * values)):
            panel[:, begin - start : end - start] = _apart(left, _patterns(layer[rows[begin:end]], metric), metric)
        yield np.concatenate([line[i + 1 :] for i, line in enumerate(panel)])


def _blocks(first: int, last: int, size: int) -> Iterator[tuple[int, int]]:
    size = max(1, size)
    return ((start, min(start + size, last)) for start in range(first, last, size))


def _patterns(maps: Array, metric: str) -> Array:
    """Return (n, values) float64 as the metric compares them: centred for correlation, length 1 if not Euclidean."""
    x = maps.reshape(len(maps), -1).astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        if metric == "correlation":
            x -= x.mean(1, keepdims=True)
        if metric != "euclidean-squared":
            x /= np.sqrt(np.einsum("ij,ij->i", x, x))[:, None]
    return x


def _apart(x: Array, y: Array, metric: str) -> Array:
    """Return (n, m) dissimilarities of the rows of two blocks; what rounding makes a little less than 0 is 0."""
    with np.errstate(invalid="ignore", over="ignore"):
        apart: Array = x @ y.T
        if metric == "euclidean-squared":
            apart *= -2
            apart += np.einsum("ij,ij->i", x, x)[:, None]
            apart += np.einsum("ij,ij->i", y, y)
            apart /= x.shape[1]
        else:
            np.subtract(1, apart, out=apart)
    return np.maximum(apart, 0, out=apart)
