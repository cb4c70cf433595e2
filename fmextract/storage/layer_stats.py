"""Name the statistics of a layer in `stats/`, and merge those of several shards. No torch.

Counts add up; means, squared deviations and covariances are merged by the pairwise update of T. F. Chan, G. H. Golub
and R. J. LeVeque, "Algorithms for computing the sample variance", The American Statistician 37 (1983), so that nothing
but float64 rounding depends on how the rows were split.

The effective dimension of a layer is the participation ratio (sum λ)² / sum λ² of the eigenvalues λ of the covariance
over images of each image's channel means (P. Gao et al., "A theory of multineuronal dimensionality, dynamics and
measurement", bioRxiv 214262, 2017; E. Elmoznino, M. F. Bonner, "High-performing neural network models of visual cortex
benefit from high latent dimensionality", PLOS Computational Biology 20, 2024). It is (tr C)² / tr C², so that no
eigenvalue is ever computed.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from fmextract.errors import DamagedError

Array: TypeAlias = npt.NDArray[Any]
Stats: TypeAlias = Mapping[str, Array]

MOMENTS = ("count", "mean", "std", "min", "max", "zero_fraction", "nonfinite")
NEAR_ZERO = "near_zero_fraction"
NEAR_ZERO_SHARE = 0.01
"""Of the root mean square of a layer's values: what is not above it counts as near zero."""
COUNTED = ("count", "zero_fraction", "nonfinite")
"""What the summary of a run is made of."""
TOP = ("top_value", "top_sample", "top_y", "top_x")
COVARIANCE = ("covariance", "covariance_mean", "covariance_count")
"""(components, components), (components,) and (components,): over the images whose values are all finite, of each
image's vector of channel means. A component is a channel; for more than MOST_COMPONENTS channels see `folding`."""
MOST_COMPONENTS = 1024
"""8 MiB of covariance in float64."""


class Totals(NamedTuple):
    """Of a layer: bytes on the disk, finite values of images without an error, zeros among them, values not finite.

    `values` and `zeros` are 0 where the channel axis is not known.
    """

    nbytes: int = 0
    values: float = 0.0
    zeros: float = 0.0
    nonfinite: int = 0

    def plus(self, other: Totals) -> Totals:
        return Totals(
            self.nbytes + other.nbytes,
            self.values + other.values,
            self.zeros + other.zeros,
            self.nonfinite + other.nonfinite,
        )

    @classmethod
    def of(cls, nbytes: int, stats: Stats) -> Totals:
        """Of a layer with statistics, of which those in COUNTED are needed."""
        count = np.asarray(stats["count"], np.float64)
        zeros = float(np.nansum(stats["zero_fraction"] * count))  # NaN in a channel without values
        return cls(nbytes, float(count.sum()), zeros, int(np.sum(stats["nonfinite"])))


def merge(parts: Sequence[Stats]) -> dict[str, Array]:
    """Return the statistics of all rows, from those of disjoint sets of rows, in any order.

    A part holds MOMENTS, each (channels,), and TOP, each (channels, k), or no TOP at all. Where k differs the smallest
    counts: beyond it a part may have dropped a stronger entry. NEAR_ZERO and COVARIANCE are there where every part has
    them: files of earlier versions have neither. Raises ValueError for no parts, or unlike parts.
    """
    if not parts:
        raise ValueError("there are no statistics to merge")
    if len({(len(part["count"]), "top_value" in part) for part in parts}) > 1:
        shapes = [{name: part[name].shape for name in ("count", "top_value") if name in part} for part in parts]
        raise ValueError(f"expected parts with the same channels, all or none of them with a top, got {shapes}")
    names = [name for name in (*MOMENTS, NEAR_ZERO) if all(name in part for part in parts)]
    merged = functools.reduce(_merge_moments, parts[1:], {name: parts[0][name] for name in names})
    return merged | _merge_top(parts) | _merge_covariance(parts)


def _merge_moments(a: Stats, b: Stats) -> dict[str, Array]:
    count = a["count"] + b["count"]
    n = np.maximum(count, 1)
    # A part without values has NaN for its mean: it must add nothing, and two of them give NaN again.
    mean_a, mean_b = (np.where(part["count"] > 0, part["mean"], 0.0) for part in (a, b))
    deviation_a, deviation_b = (np.where(part["count"] > 0, part["count"] * part["std"] ** 2, 0.0) for part in (a, b))
    gap = np.where((a["count"] > 0) & (b["count"] > 0), mean_b - mean_a, 0.0)
    share_b = b["count"] / n
    mean = np.where(a["count"] > 0, mean_a + gap * share_b, mean_b)
    deviation = deviation_a + deviation_b + gap**2 * a["count"] * share_b
    empty = count == 0

    def share(name: str) -> Array:
        return np.where(empty, np.nan, (_counted(a, name) + _counted(b, name)) / n)

    merged = {
        "count": count,
        "mean": np.where(empty, np.nan, mean),
        "std": np.where(empty, np.nan, np.sqrt(deviation / n)),
        "min": np.fmin(a["min"], b["min"]),
        "max": np.fmax(a["max"], b["max"]),
        "zero_fraction": share("zero_fraction"),
        "nonfinite": a["nonfinite"] + b["nonfinite"],
    }
    return merged | ({NEAR_ZERO: share(NEAR_ZERO)} if NEAR_ZERO in a else {})


def _counted(part: Stats, share: str) -> Array:
    """Return how many values a share is: a whole number, which the stored share gives back exactly."""
    counted: Array = np.rint(np.where(part["count"] > 0, part[share], 0.0) * part["count"])
    return counted


def _merge_top(parts: Sequence[Stats]) -> dict[str, Array]:
    if "top_value" not in parts[0]:
        return {}
    k = min(part["top_value"].shape[1] for part in parts)
    together = {name: np.concatenate([part[name] for part in parts], axis=1) for name in TOP}
    # Higher value first (NaN, an empty place, sorts last), then lower row; a row has one entry per channel.
    order = np.lexsort((together["top_sample"], -together["top_value"]), axis=1)[:, :k]
    return {name: np.take_along_axis(values, order, axis=1) for name, values in together.items()}


def _merge_covariance(parts: Sequence[Stats]) -> dict[str, Array]:
    if not all("covariance" in part for part in parts):
        return {}
    return functools.reduce(_join_covariance, parts[1:], {name: parts[0][name] for name in COVARIANCE})


def _join_covariance(a: Stats, b: Stats) -> dict[str, Array]:
    count_a, count_b = a["covariance_count"], b["covariance_count"]
    if not count_a.all() or not count_b.all():  # one of them is of no image, and has NaN
        return {name: (b if count_b.all() else a)[name] for name in COVARIANCE}
    share_b = count_b / (count_a + count_b)
    share_a, gap = 1 - share_b, b["covariance_mean"] - a["covariance_mean"]
    return {
        "covariance": share_a * a["covariance"] + share_b * b["covariance"] + np.outer(share_a * gap, share_b * gap),
        "covariance_mean": a["covariance_mean"] + share_b * gap,
        "covariance_count": count_a + count_b,
    }


# ------------------------------------------------------------------------------------------------ effective dimension


@dataclass(frozen=True, slots=True)
class EffectiveDimension:
    """Compute the participation ratio of a layer over `rows` images: from 1 to `rows` - 1, NaN for fewer than 2 images.

    `estimated`: of more than MOST_COMPONENTS channels, by `folding`. NaN too where no image differs from the others.
    """

    value: float
    rows: int
    estimated: bool

    def as_attrs(self) -> dict[str, Any]:
        """Return it as attributes of the layer; `of_attrs` is the inverse."""
        made = {"effective_dimension": np.float64(self.value), "effective_dimension_rows": np.int64(self.rows)}
        return made | ({"effective_dimension_estimated": True} if self.estimated else {})

    @classmethod
    def of_attrs(cls, attrs: Mapping[str, Any]) -> EffectiveDimension | None:
        """Return it from attributes of a layer; None where they are missing."""
        if "effective_dimension" not in attrs:
            return None
        estimated = "effective_dimension_estimated" in attrs
        return cls(float(attrs["effective_dimension"]), int(attrs["effective_dimension_rows"]), estimated)


def effective_dimension(stats: Stats) -> EffectiveDimension | None:
    """Return that of statistics with COVARIANCE; None without."""
    if "covariance" not in stats:
        return None
    covariance, rows, channels = stats["covariance"], int(stats["covariance_count"][0]), len(stats["count"])
    estimated = channels > len(covariance)
    of_squares, squared = float((covariance**2).sum()), float(np.trace(covariance)) ** 2
    if estimated:
        of_squares, squared = _unfolded(of_squares, squared, float((np.diag(covariance) ** 2).sum()), channels)
    return EffectiveDimension(squared / of_squares if rows > 1 and of_squares > 0 else np.nan, rows, estimated)


def join(before: Stats | None, part: dict[str, Array], where: str) -> dict[str, Array]:
    """Return the statistics of the rows so far and of one more part; the part itself where there are none yet.

    Raises DamagedError that says `where` the part does not fit.
    """
    try:
        return merge([before, part]) if before else part
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise DamagedError(f"{where} do not fit those of other shards: {error}") from error


def settled(stats: Stats) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return the statistics of all rows of a run, as (what goes into `stats/`, attributes of the layer).

    The covariance is there to be merged: what is left of it is the effective dimension.
    """
    dimension = effective_dimension(stats)
    kept = {name: values for name, values in stats.items() if name not in COVARIANCE}
    return kept, dimension.as_attrs() if dimension else {}


def folding(channels: int) -> tuple[Array, Array]:
    """Return (order int64, signs float64), each (channels,), that fold more channels than MOST_COMPONENTS to so many.

    Component j is the sum of signs[i] times channel order[i] over all i ≡ j: a count sketch (M. Charikar, K. Chen,
    M. Farach-Colton, "Finding frequent items in data streams", ICALP 2002) whose components hold equally many channels,
    to one. Always the same for a number of channels: numpy's RandomState is frozen.
    """
    random = np.random.RandomState(0)
    return random.permutation(channels).astype(np.int64), random.choice([-1.0, 1.0], channels)


def _unfolded(of_squares: float, squared: float, of_diagonal: float, channels: int) -> tuple[float, float]:
    """Return (tr C², (tr C)²) from tr S², (tr S)² and the sum of squares of the diagonal of a folded covariance S.

    Each estimate is unbiased. Two channels share a component with probability p. In the mean over the signs, terms
    with channels in equal pairs alone are left; so with D, the sum of squares of the diagonal of C, the three are in
    the mean tr C² (1 + p) + (tr C)² p - 2 D p,  tr C² 2p + (tr C)² - 2 D p,  and  tr C² 2p + (tr C)² p + D (1 - 3 p).
    Of a covariance of rank 1 the ratio is exactly 1, whatever the folding. The ratio's standard deviation over
    foldings is below 0.5 % for white and for very few dimensions, and some 2 to 4 % between: no more than that of a
    Gaussian projection, which takes a matrix (tests/pipeline/test_running_stats.py).
    """
    few, more = divmod(channels, MOST_COMPONENTS)
    p = (more * (few + 1) * few + (MOST_COMPONENTS - more) * few * (few - 1)) / (channels * (channels - 1))
    means = np.array([[1 + p, p, -2 * p], [2 * p, 1, -2 * p], [2 * p, p, 1 - 3 * p]])
    made = np.linalg.solve(means, [of_squares, squared, of_diagonal])
    return float(made[0]), float(made[1])
