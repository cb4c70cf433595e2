"""Run some stored rows again and compare: do this program, model and machine still give what lies in the file?"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fmextract import engine, index, prepare, reader
from fmextract.config import FailureBudget
from fmextract.errors import OutputError
from fmextract.progress import Quiet
from fmextract.records import Progress, Status

TOLERANCE: Mapping[str, float] = {"float64": 1e-8, "float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""Relative L2 distance of a row, by the type it was computed in, that other kernels or batch sizes explain."""
TF32_TOLERANCE = 1e-2


@dataclass(frozen=True, slots=True)
class Difference:
    """A stored row that came out otherwise. `error` is the relative L2 distance; without a `layer` it is its status."""

    layer: str
    row: int
    key: str
    error: float
    tolerated: bool
    message: str


def differences(
    work: engine.Work, stored: reader.Activations, first: int, rows: Sequence[int], scratch: Path | None = None
) -> list[Difference]:
    """Run the batches that hold the global `rows` again and compare these rows with `stored`, which begins at `first`.

    In batches of the plan, as they were: so on the same machine nothing at all may differ. `scratch` is a new directory
    for what comes out meanwhile, the system's place for temporary files if None.
    """
    size = work.plan.batch_size
    found: list[Difference] = []
    for start in sorted({row // size * size for row in rows}):
        batch = range(start, min(start + size, work.plan.rows))
        with _run_again(work, batch, scratch) as again:
            for row in sorted(set(rows) & set(batch)):
                found += _compared(stored, row - first, again, row - start, row, work.plan.precision)
    return found


@contextmanager
def _run_again(work: engine.Work, batch: range, scratch: Path | None) -> Iterator[reader.Activations]:
    """A batch of rows through the whole pipeline, into a file that lives as long as the block."""
    patient = replace(work, budget=FailureBudget(count=len(batch), share=None))
    place = scratch or Path(tempfile.mkdtemp(prefix="fmextract-"))
    place.mkdir(exist_ok=True)
    try:
        engine.run_shards(patient, place, [batch], Quiet(), engine.Tally())
        (shard,) = place.glob("*.h5")
        with reader.open(shard) as again:
            yield again
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _compared(
    stored: reader.Activations, at: int, again: reader.Activations, at_again: int, row: int, precision: str
) -> Iterator[Difference]:
    key = str(stored.keys[at])
    was, now = Status(stored.status[at]), Status(again.status[at_again])
    if key != again.keys[at_again]:
        yield Difference("", row, key, float("inf"), False, f"the source now has {again.keys[at_again]!r} there")
    elif was != now:
        said = again.messages[at_again] or "it is fine"
        yield Difference("", row, key, float("inf"), False, f"its status was {was.name}, and is {now.name}: {said}")
    elif was == Status.OK:
        for name in stored.layers:
            error = relative_error(stored[name][at], again[name][at_again])
            most = TF32_TOLERANCE if precision == "tf32" else TOLERANCE.get(stored[name].compute_dtype, 0.0)
            if error:
                yield Difference(name, row, key, error, error <= most, f"differs by {error:.2g} (relative L2)")


def relative_error(stored: np.ndarray, again: np.ndarray) -> float:
    """|again - stored| / |stored|; 0 only for the same bits or values, infinite where NaN are elsewhere."""
    if np.array_equal(stored, again, equal_nan=stored.dtype.kind == "f"):
        return 0.0
    a, b = (values.astype(np.float64) for values in (stored, again))
    if not np.array_equal(np.isfinite(a), np.isfinite(b)):
        return float("inf")
    a, b = a[np.isfinite(a)], b[np.isfinite(b)]
    scale = float(np.linalg.norm(a))
    return float(np.linalg.norm(b - a)) / scale if scale else float("inf")


def check_resume(work: engine.Work, directory: Path, records: Sequence[index.ShardRecord], progress: Progress) -> None:
    """Run one stored batch again before a run goes on, so that changed code, library or machine is noticed.

    What rounding explains is told. Raises OutputError for more, since the rest would not go with what is there.
    """
    plan = work.plan
    # A shard that memory forced into smaller batches differs in its last bits anyway.
    record = next((r for r in reversed(records) if r.batch_size == plan.batch_size), records[-1])
    with reader.open(directory / record.name) as stored:
        good = np.flatnonzero(stored.status == Status.OK)
        first = record.start + int(good[0] if len(good) else 0)
        start = first // plan.batch_size * plan.batch_size
        rows = range(start, min(start + plan.batch_size, record.stop))
        found = differences(work, stored, record.start, rows, index.temporary_name(directory / "again"))
    if not found:
        return
    worst = max(found, key=lambda difference: difference.error)
    where = f"layer {worst.layer!r} of {worst.key!r} (row {worst.row})" if worst.layer else f"{worst.key!r}"
    told = f"{where} {worst.message}{_changed_versions(plan.versions)}"
    if any(not difference.tolerated for difference in found):
        raise OutputError(
            f"{directory}: what is stored cannot be made again: {told}. The rest would not go with it."
            " Resume with the code, libraries and images it was begun with, or start anew with --overwrite."
        )
    progress.note(f"the stored rows come out a little otherwise now, as rounding explains: {told}")


def _changed_versions(then: Mapping[str, str]) -> str:
    now = prepare.versions()
    changed = [f"{name} {then[name]} then, {now.get(name)} now" for name in then if now.get(name) != then[name]]
    return f"; {', '.join(changed)}" if changed else ""
