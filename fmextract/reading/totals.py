"""Merge the statistics and counts of several shards into those of one output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fmextract.reading import activations
from fmextract.storage.layer_stats import join, settled

COUNTED = ("clipped", "nonfinite")
"""Attributes of a layer that count the values of a shard; an output's are their sums."""


def merged(
    shards: Sequence[Path], layers: Sequence[str] | None = None
) -> tuple[dict[str, dict[str, np.ndarray[Any, Any]]], dict[str, dict[str, Any]], dict[str, int]]:
    """Return the statistics and counts of all shards, and the batch sizes that memory forced.

    Reads one shard at a time. `layers`: None for all.
    """
    stats: dict[str, dict[str, np.ndarray[Any, Any]]] = {}
    attrs: dict[str, dict[str, Any]] = {}
    counts: Counter[tuple[str, str]] = Counter()
    smaller: dict[str, int] = {}
    for path in shards:
        with activations.open(path) as acts:
            smaller |= acts.files[0].contents.said.get("smaller_batches", {})
            for name in acts.layers if layers is None else layers:
                layer = acts[name]
                counts.update({(name, key): int(layer.attrs[key]) for key in COUNTED if key in layer.attrs})
                if part := acts.files[0].stats(name, covariance=True):
                    stats[name] = join(stats.get(name), part, f"{path}: the statistics of {name}")
                if len(shards) == 1 and (known := layer.effective_dimension):
                    attrs[name] = known.as_attrs()
    for name, found in stats.items():
        stats[name], more = settled(found)
        attrs.setdefault(name, {}).update(more)
    for (name, key), count in counts.items():
        attrs.setdefault(name, {})[key] = np.int64(count)
    return stats, attrs, smaller
