"""How alike two representations of the same images are, whatever their axes: linear CKA, with bounded memory. No torch.

S. Kornblith, M. Norouzi, H. Lee and G. Hinton, "Similarity of Neural Network Representations Revisited", ICML 2019.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fmextract.errors import ConfigError

Array: TypeAlias = npt.NDArray[Any]

WIDEST = 2048
"""Features for which the covariances are kept, three matrices of at most 32 MiB each."""
BATCH_BYTES = 128 << 20
FEWEST = 4
"""Rows of which the unbiased estimate can be made at all."""


class LinearCKA:
    """Linear CKA of two representations, a batch of rows at a time; one value in 0..1.

    Up to WIDEST features a side it is exact, from the covariances, in one pass over any number of rows. Wider ones are
    compared by the similarities of rows within each batch: exact where there is one batch, else the ratio of unbiased
    estimates averaged over the batches (T. Nguyen, M. Raghu and S. Kornblith, "Do Wide and Deep Networks Learn the Same
    Things?", ICLR 2021), which is better the larger the batches are, and may come out a little outside 0..1.
    """

    def __init__(self, features_a: int, features_b: int) -> None:
        self._narrow = max(features_a, features_b) <= WIDEST
        self._rows = 0
        if self._narrow:
            sizes = (features_a, features_b)
            self._means = [np.zeros(n) for n in sizes]
            self._products = {(i, j): np.zeros((sizes[i], sizes[j])) for i, j in ((0, 0), (0, 1), (1, 1))}
        self._batches = 0
        self._biased = self._unbiased = np.zeros(3)

    def update(self, a: Array, b: Array) -> None:
        """Add rows: (n, features…) each, row i of both from the same image. Rows that are not finite are left out."""
        x, y = (np.asarray(rows, np.float64).reshape(len(rows), -1) for rows in (a, b))
        good = np.isfinite(x).all(1) & np.isfinite(y).all(1)
        x, y = x[good], y[good]
        if not len(x):
            return
        if self._narrow:
            self._add_products((x, y))
        else:
            x, y = x - x.mean(0), y - y.mean(0)
            similar = x @ x.T, y @ y.T
            self._biased = _hsic(similar, _biased)
            if len(x) >= FEWEST:
                self._unbiased = self._unbiased + _hsic(similar, _unbiased)
            self._batches += 1
        self._rows += len(x)

    def _add_products(self, rows: tuple[Array, Array]) -> None:
        """Centred products, merged as in `moments`: nothing cancels where the mean is far from zero."""
        n, added = self._rows, len(rows[0])
        means = [one.mean(0) for one in rows]
        gaps = [mean - before for mean, before in zip(means, self._means, strict=True)]
        centred = [one - mean for one, mean in zip(rows, means, strict=True)]
        for (i, j), product in self._products.items():
            product += centred[i].T @ centred[j] + np.outer(gaps[i], gaps[j]) * (n * added / (n + added))
        for before, gap in zip(self._means, gaps, strict=True):
            before += gap * (added / (n + added))

    def result(self) -> float:
        """NaN where a side does not vary, or there are too few rows."""
        if self._narrow:
            aa, ab, bb = (float((self._products[pair] ** 2).sum()) for pair in ((0, 0), (0, 1), (1, 1)))
        else:
            ab, aa, bb = self._biased if self._batches <= 1 else self._unbiased
        return float(ab / math.sqrt(aa * bb)) if aa > 0 and bb > 0 else math.nan


def _hsic(similar: tuple[Array, Array], estimate: Any) -> Array:
    """The estimate for (a, b), (a, a) and (b, b)."""
    a, b = similar
    return np.array([estimate(a, b), estimate(a, a), estimate(b, b)])


def _biased(k: Array, m: Array) -> float:
    return float((k * m).sum())


def _unbiased(k: Array, m: Array) -> float:
    """L. Song et al., "Feature Selection via Dependence Maximization", JMLR 2012, equation 5."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    apart = k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * float(k.sum(0) @ m.sum(0))
    return float(((k * m).sum() + apart) / (n * (n - 3)))


def linear_cka(a: Any, b: Any) -> float:
    """Linear CKA of two representations of the same images: arrays (n, features…), or layers of files.

    Row i of both must be the same image; `compare` matches rows by key. Read batch by batch, see `LinearCKA`. Raises
    ConfigError for unlike numbers of rows.
    """
    if len(a) != len(b):
        raise ConfigError(f"expected as many rows on both sides, got {len(a)} and {len(b)}")
    sizes = [math.prod(one.shape[1:]) for one in (a, b)]
    cka = LinearCKA(*sizes)
    for start, stop in batches(len(a), 8 * sum(sizes)):
        cka.update(np.asarray(a[start:stop]), np.asarray(b[start:stop]))
    return cka.result()


def batches(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of batches of nearly the same size, each within BATCH_BYTES if FEWEST rows are."""
    most = max(FEWEST, min(1024, BATCH_BYTES // max(1, row_bytes)))
    count = max(1, rows // most if rows % most == 0 else rows // most + 1)
    for i in range(count if rows else 0):
        yield rows * i // count, rows * (i + 1) // count
