"""Where two runs over the same images begin to differ: two precisions, checkpoints, ways of storing. No torch."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fmextract.common import text
from fmextract.errors import ConfigError
from fmextract.reading.activations import Activations
from fmextract.reading.layer import Layer

Rows: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LayerComparison:
    """One layer of `b` against `a`, over the values that are finite in both.

    Attributes:
        layer: Its name.
        shape: Of one image.
        error: Relative L2 error of all images together, |b - a| / |a|.
        median_error: The median of the images' own.
        max_error: The largest of the images' own.
        cosine: That of all values as one vector.
        cka: Linear CKA between the images' activations.
        nonfinite: Values that are finite in one only.
        worst: (key, relative L2 error) of the images that differ most.
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


@dataclass(frozen=True, slots=True, repr=False)
class Comparison(text.Tabled):
    """Two outputs, layer by layer.

    Attributes:
        a: The path of what counts as right.
        b: The path of what is compared with it.
        images: How many are compared, by key.
        images_only_a: Images that `b` does not have.
        images_only_b: Images that `a` does not have.
        failed: Images that failed in one of them.
        only_a: Layers that `b` does not have.
        only_b: Layers that `a` does not have.
        unlike: Layers whose shapes differ.
        layers: The comparison of each layer.
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

    def table(self, width: int | None = None) -> str:
        """Return the layers, and what was left out, as `fmextract compare` shows it."""
        head = [f"{text.count(self.images, 'image')} of {text.printable(self.b)} against {text.printable(self.a)}"]
        left = [
            (self.images_only_a + self.images_only_b, "images in one only"),
            (self.failed, "images failed in one"),
            (", ".join((*self.only_a, *self.only_b)), "are layers of one only"),
            (", ".join(self.unlike), "have other shapes"),
        ]
        head += [text.printable(f"left out: {what} {why}") for what, why in left if what]
        rows = [
            (
                row.layer,
                text.shape(row.shape),
                text.share(row.error),
                text.share(row.median_error),
                text.share(row.max_error),
                f"{row.cosine:.6f}",
                f"{row.cka:.6f}",
                row.nonfinite or "",
                row.worst[0][0] if row.worst else "",
            )
            for row in self.layers
        ]
        columns = ("layer", "shape", "error", "median", "worst", "cosine", "CKA", "not finite in one", "worst image")
        return "\n".join([*head, "", text.table(columns, rows, right=columns[2:8], width=width)])

    def __repr__(self) -> str:
        what = f"{text.count(len(self.layers), 'layer')}, {text.count(self.images, 'image')}"
        return f"<Comparison: {text.printable(self.b)} against {text.printable(self.a)}, {what}>"


def compare(a: Activations, b: Activations, layers: Sequence[str] = (), *, worst: int = 3) -> Comparison:
    """Compare the activations in `b` with those in `a`, layer by layer, rows matched by key and layers by name.

    `layers` are names or selectors, all that both have if none. Each layer is read once, in batches; `worst` images are
    named for each. Raises ConfigError where they have no image, or no layer of the same shape, in common.
    """
    shared, unlike = _shared_layers(a, b, layers)
    rows_a, rows_b, failed = _shared_rows(a, b)
    common = len(rows_a) + failed
    return Comparison(
        a=str(a.path),
        b=str(b.path),
        images=len(rows_a),
        images_only_a=a.num_rows - common,
        images_only_b=b.num_rows - common,
        failed=failed,
        only_a=tuple(name for name in a.layers if name not in b),
        only_b=tuple(name for name in b.layers if name not in a),
        unlike=tuple(unlike),
        layers=tuple(_compared(a[name], b[name], rows_a, rows_b, a.keys, worst) for name in shared),
    )


def _shared_layers(a: Activations, b: Activations, wanted: Sequence[str]) -> tuple[list[str], list[str]]:
    for selector in wanted:
        if not set(in_a := a.select(selector)) & set(in_b := b.select(selector)):
            raise ConfigError(f"{selector} is {_some(in_a)} in {a.path}, and {_some(in_b)} in {b.path}: name layers")
    asked = set(a.select(*wanted)) & set(b.select(*wanted)) if wanted else set(a.layers)
    names = [name for name in a.layers if name in b and name in asked]
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
    """Return linear CKA of two representations of the same images.

    As S. Kornblith et al. define it ("Similarity of Neural Network Representations Revisited", ICML 2019); wide
    representations of many images are read batch by batch and estimated (see `LinearCKA`).

    Args:
        a: An array (image, feature…), or a layer of an output.
        b: The same for the other network; row i of both must be the same image (`compare` matches them by key).

    Returns:
        0 to 1; NaN where a side does not vary.

    Raises:
        ConfigError: For unlike numbers of rows.

    Examples:
        >>> x = np.random.default_rng(0).standard_normal((50, 8))
        >>> round(fm.linear_cka(x, 3 * x), 6)  # a scale does not matter
        1.0
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
