"""Statistics of a layer as they lie in `stats/`: their names, and how those of several shards become one. No torch.

Counts add up; means and squared deviations are merged by the pairwise update of T. F. Chan, G. H. Golub and
R. J. LeVeque, "Algorithms for computing the sample variance", The American Statistician 37 (1983), so that nothing but
float64 rounding depends on how the rows were split.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
Stats: TypeAlias = Mapping[str, Array]

MOMENTS = ("count", "mean", "std", "min", "max", "zero_fraction", "nonfinite")
TOP = ("top_value", "top_sample", "top_y", "top_x")


def merge(parts: Sequence[Stats]) -> dict[str, Array]:
    """The statistics of all rows, from those of disjoint sets of rows, in any order.

    A part holds MOMENTS, each (channels,), and TOP, each (channels, k), or no TOP at all. Where k differs the smallest
    counts: beyond it a part may have dropped a stronger entry. Raises ValueError for no parts, or unlike parts.
    """
    if not parts:
        raise ValueError("there are no statistics to merge")
    if len({(len(part["count"]), "top_value" in part) for part in parts}) > 1:
        shapes = [{name: part[name].shape for name in ("count", "top_value") if name in part} for part in parts]
        raise ValueError(f"expected parts with the same channels, all or none of them with a top, got {shapes}")
    return functools.reduce(_merge_moments, parts[1:], {n: parts[0][n] for n in MOMENTS}) | _merge_top(parts)


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
    zeros = _zeros(a) + _zeros(b)
    empty = count == 0
    return {
        "count": count,
        "mean": np.where(empty, np.nan, mean),
        "std": np.where(empty, np.nan, np.sqrt(deviation / n)),
        "min": np.fmin(a["min"], b["min"]),
        "max": np.fmax(a["max"], b["max"]),
        "zero_fraction": np.where(empty, np.nan, zeros / n),
        "nonfinite": a["nonfinite"] + b["nonfinite"],
    }


def _zeros(part: Stats) -> Array:
    """How many values were zero: a whole number, which the stored share gives back exactly."""
    zeros: Array = np.rint(np.where(part["count"] > 0, part["zero_fraction"], 0.0) * part["count"])
    return zeros


def _merge_top(parts: Sequence[Stats]) -> dict[str, Array]:
    if "top_value" not in parts[0]:
        return {}
    k = min(part["top_value"].shape[1] for part in parts)
    together = {name: np.concatenate([part[name] for part in parts], axis=1) for name in TOP}
    # Higher value first (NaN, an empty place, sorts last), then lower row; a row has one entry a channel.
    order = np.lexsort((together["top_sample"], -together["top_value"]), axis=1)[:, :k]
    return {name: np.take_along_axis(values, order, axis=1) for name, values in together.items()}
