"""Sum counts and seconds over the shards of an output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any


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
