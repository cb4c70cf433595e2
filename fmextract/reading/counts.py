"""Sum counts and seconds over the shards of an output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

COUNTED = ("count", "zero_fraction", "nonfinite")
"""Statistics that the summary of a run is made of."""


def total_throughput(files: Iterable[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """Return the sum of the `throughput` of some files; None where none has it."""
    images, seconds, busy = 0, 0.0, Counter[str]()
    for said in files:
        if said is not None:
            images, seconds = images + said["images"], seconds + said["seconds"]
            busy.update(said["busy_seconds"])
    if not images:
        return None
    rounded = {stage: round(spent, 3) for stage, spent in busy.items()}
    return {"images": images, "seconds": round(seconds, 3), "busy_seconds": rounded}


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
