"""Run some stored rows again and compare: do this program, model and machine still give what lies in the file?"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch

from fmextract.common.progress import Quiet
from fmextract.common.relative_error import relative_error
from fmextract.config import FailureBudget
from fmextract.errors import FormatError, OutputError, SampleError
from fmextract.pipeline import pipeline
from fmextract.pipeline.work import Tally, Work
from fmextract.planning import Plan, RunInfo
from fmextract.reading import activations
from fmextract.records import Label, Progress, Status
from fmextract.run import provenance
from fmextract.storage import codecs, durable, shards

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
    work: Work,
    stored: activations.Activations,
    first: int,
    rows: Sequence[int],
    scratch: Path | None = None,
    labels: bool = False,
) -> list[Difference]:
    """Run the batches that hold the global `rows` again and compare these rows with `stored`, which begins at `first`.

    In batches of the plan, as they were: so on the same machine nothing at all may differ. `scratch` is a new directory
    for what comes out meanwhile, the system's place for temporary files if None. `labels`: these are compared too.
    """
    size = work.plan.batch_size
    said = stored.listed(None) if labels else None
    differing: list[Difference] = []
    for start in sorted({row // size * size for row in rows}):
        batch = range(start, min(start + size, work.plan.rows))
        with _run_again(work, batch, scratch) as again:
            said_again = again.listed(None) or [None] * len(batch)
            for row in sorted(set(rows) & set(batch)):
                if said is not None and _is_other(said[row - first], said_again[row - start]):
                    message = f"had the label {said[row - first]!r}, and has {said_again[row - start]!r} now"
                    differing.append(Difference("", row, str(stored.keys[row - first]), float("inf"), False, message))
                differing += _compared(stored, row - first, again, row - start, row, work.plan.precision)
    return differing


@contextmanager
def _run_again(work: Work, batch: range, scratch: Path | None) -> Iterator[activations.Activations]:
    """A batch of rows through the whole pipeline, into a file that lives as long as the block."""
    patient = replace(work, budget=FailureBudget(count=len(batch), share=None))
    place = scratch or Path(tempfile.mkdtemp(prefix="fmextract-"))
    place.mkdir(exist_ok=True)
    try:
        pipeline.run_shards(patient, place, [batch], Quiet(), Tally())
        (shard,) = place.glob("*.h5")
        with activations.open(shard) as again:
            yield again
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _compared(
    stored: activations.Activations, at: int, again: activations.Activations, at_again: int, row: int, precision: str
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
            error = distance(stored[name][at], again[name][at_again])
            most = TF32_TOLERANCE if precision == "tf32" else TOLERANCE.get(stored[name].compute_dtype, 0.0)
            if error:
                yield Difference(name, row, key, error, error <= most, f"differs by {error:.2g} (relative L2)")


def _is_other(label: Label, now: Label) -> bool:
    return label != now and not (label != label and now != now)  # NaN is no other than NaN


def distance(stored: np.ndarray, again: np.ndarray) -> float:
    """Return |again - stored| / |stored|; 0 only for the same values, infinite where NaN or infinities are others."""
    if np.array_equal(stored, again, equal_nan=stored.dtype.kind == "f"):
        return 0.0
    then, now = (torch.from_numpy(np.asarray(values, np.float64)) for values in (stored, again))
    same = then == now
    if not bool((same | (then.isfinite() & now.isfinite()) | (then.isnan() & now.isnan())).all()):
        return math.inf
    return relative_error(now, then) or math.inf


def check_resume(work: Work, directory: Path, records: Sequence[shards.ShardRecord], progress: Progress) -> None:
    """Run one stored batch again before a run goes on, so that changed code, library or machine is noticed.

    What rounding explains is told. Raises OutputError for more, since the rest would not go with what is there.
    """
    # A shard that memory forced into smaller batches differs in its last bits anyway.
    usual = [r for r in records if r.batch_size == work.plan.batch_size] or list(records)
    record = next((r for r in reversed(usual) if r.failed < len(r.rows)), usual[-1])
    with activations.open(directory / record.name) as stored:
        good = np.flatnonzero(stored.status == Status.OK)[:1]
        differing = _batches_again(work, stored, good, durable.temporary_name(directory / "again"))
    _judge(
        differing,
        work.plan,
        directory,
        "The rest would not go with it. Resume with the code, libraries and images it was begun with, or start anew"
        " with --overwrite.",
        progress,
    )


def check_finished(work: Work, stored: activations.Activations, rows: int, progress: Progress) -> None:
    """Run the batches of `rows` stored rows again, the first, the last and others evenly between, before an output is
    called complete. As `check_resume`."""
    good = np.flatnonzero(stored.status == Status.OK)
    at = np.linspace(0, len(good) - 1, min(rows, len(good))).round().astype(int)
    differing = _batches_again(work, stored, good[at])
    _judge(
        differing,
        work.plan,
        stored.path,
        "It is complete, but not what the same run gives now: --overwrite replaces it, -o names another, and"
        " --no-recheck takes it as it is.",
        progress,
    )


def _batches_again(
    work: Work, stored: activations.Activations, at: np.ndarray, scratch: Path | None = None
) -> list[Difference]:
    """What differs in the batches of the plan that hold these rows of `stored`, as far as it has them."""
    first, size = stored.first_row, work.plan.batch_size
    starts = {(first + int(row)) // size * size for row in at}
    there = range(first, first + stored.num_rows)
    rows = [row for start in sorted(starts) for row in range(start, start + size) if row in there]
    good = [row for row in rows if stored.status[row - first] == Status.OK]
    return differences(work, stored, first, good, scratch, labels=True)


def _judge(differing: Sequence[Difference], plan: Plan, place: Path, advice: str, progress: Progress) -> None:
    """Tell what rounding explains. Raises OutputError for what it does not."""
    if not differing:
        return
    worst = max(differing, key=lambda difference: difference.error)
    named = f"layer {worst.layer!r} of {worst.key!r} (row {worst.row})" if worst.layer else f"{worst.key!r}"
    told = f"{named} {worst.message}{_changed_versions(plan.versions)}"
    if any(not difference.tolerated for difference in differing):
        raise OutputError(f"{place}: what is stored cannot be made again: {told}. {advice}")
    progress.note(f"the stored rows come out a little otherwise now, as rounding explains: {told}")


# ------------------------------------------------------------------------------------------------ rows that failed


def recovered(work: Work, stored: activations.Activations) -> list[int]:
    """Of the rows that failed, and that `stored` holds, those that would not fail now, as global numbers."""
    first = stored.first_row
    status = stored.status
    failed = [(first + int(at), Status(status[at])) for at in np.flatnonzero(status != Status.OK)]
    fine = [row for row, what in failed if what != Status.FORWARD_FAILED and _is_decoded(work, row)]
    in_forward = [row for row, what in failed if what == Status.FORWARD_FAILED]
    size = work.plan.batch_size
    for start in sorted({row // size * size for row in in_forward}):
        batch = range(start, min(start + size, work.plan.rows))
        with _run_again(work, batch, None) as again:
            fine += [row for row in in_forward if row in batch and again.status[row - start] == Status.OK]
    return sorted(fine)


def _is_decoded(work: Work, row: int) -> bool:
    """Whether a row is an input of the model now."""
    try:
        image = work.reader.image(row)
    except SampleError:
        return False
    return image.ready == work.ready and tuple(image.pixels.shape) == tuple(work.input_shape)


# ------------------------------------------------------------------------------------------------------- the plan


def plan_of(acts: activations.Activations, device: str) -> Plan:
    """The plan that an output was made by, from what the output says. Raises FormatError where it does not say."""
    try:
        named = acts.config["identity"]["layers"]
        if named != list(acts.layers):
            raise FormatError(f"{acts.path} holds other layers than the run that it is of: images cannot be run again")
        return _plan_of(acts, device)
    except KeyError as error:
        raise FormatError(f"{acts.path}: fmextract_config does not say {error}: images cannot be run again") from error


def _plan_of(acts: activations.Activations, device: str) -> Plan:
    config, attrs = acts.config, acts.attrs
    options = config["options"]
    info = {name: attrs.get(name) for name in ("title", "source", "history", "model", "weights_sha256", "created")}
    info |= {name: config.get(name) for name in ("weights", "origin", "input_dtype")}
    return Plan(
        run_id=str(config.get("run_id", "")),
        rows=acts.first_row + acts.num_rows,
        # Every layer is copied in its hook: what was overwritten for some image alone, and was stored so, differs then.
        layers=tuple(replace(acts[name].spec, copied=True) for name in acts.layers),
        precision=str(attrs["precision"]),
        memory_format=config["memory_format"],
        batch_size=config["batch_size"],
        device=device,
        threads=1,
        forward_threads=config["forward_threads"],
        codec=options["codec"],
        level=codecs.codec_named(options["codec"]).checked_level(options["level"]),
        dtype=options["dtype"],
        keep_bits=options["keep_bits"],
        clip=options["clip"],
        top_k=options["top_k"],
        shard_rows=acts.num_rows,
        identity=config["identity"],
        config=options,
        info=cast("RunInfo", {**info, "preprocess": acts.preprocess}),
        versions=acts.versions,
        fused=tuple((conv, norm) for conv, norm in config.get("fused", ())),
        pooling=bool(config.get("pooling")),
        prepacked=bool(config.get("prepacked")),
    )


def _changed_versions(then: Mapping[str, str]) -> str:
    now = provenance.versions(then)
    changed = [f"{name} {then[name]} then, {now.get(name)} now" for name in then if now.get(name) != then[name]]
    return f"; {', '.join(changed)}" if changed else ""
