"""One run, from what was asked for to a finished output: prepare, plan, extract, fold.

prepare: open the source, build the model, inspect it                 → Prepared
plan:    take one up, or resolve every `auto`, chunks, shards         → plan.json
extract: the shards that are not there yet                            → shard-*.h5
fold:    one file, or the directory with its index
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from fmextract.common import strict_json
from fmextract.common.progress import Quiet
from fmextract.common.text import count
from fmextract.config import Config, check_out
from fmextract.errors import TooManyFailures
from fmextract.inputs.sources import notes_of
from fmextract.pipeline import pipeline
from fmextract.pipeline.work import Tally, Work, check_budget
from fmextract.pipeline.workers import hired
from fmextract.planning import Identity, Plan
from fmextract.reading import activations
from fmextract.records import Progress, Result
from fmextract.run import estimate, given_plan, like, recheck, same_run, summary
from fmextract.run.identity import identity
from fmextract.run.make_plan import plan_for
from fmextract.run.output import Output, resumable
from fmextract.run.prepare import Prepared, prepare
from fmextract.run.same_run import Asked
from fmextract.run.working import working
from fmextract.storage import shards

RECHECKED, RECHECKED_IN_DOUBT = 2, 512
"""Stored rows that are run again, each with its batch, before an output is called complete."""


log = logging.getLogger(__name__)

__all__ = ["extracted", "make_plan", "run"]

Saved = Plan | str | os.PathLike[str]
"""A plan, or where one was saved."""


def make_plan(
    source: Any, model: Any, out: Any, config: Config, progress: Progress | None = None, *, plan: Saved | None = None
) -> Plan:
    """What `run` with the same arguments would do. Writes nothing; `Plan.save` does, for `extract(…, plan=…)`."""
    given = given_plan.loaded(plan)
    progress = progress or Quiet()
    check_out(Path(out).expanduser())
    with prepare(source, model, config, progress) as prepared:
        target, known = Path(out).expanduser(), _identity(prepared, progress)
        return (
            plan_for(prepared, target, progress)
            if given is None
            else given_plan.followed(given, prepared, target, known)
        )


def _identity(prepared: Prepared, progress: Progress) -> Identity:
    """The identity of the run, as JSON. Notes what is not as in the run that it is to be like."""
    found = cast("Identity", strict_json.plain(identity(prepared)))
    for line in like.other_code(found):
        progress.note(line)
    return found


def extracted(
    source: Any, model: Any, out: Any, config: Config, progress: Progress, *, plan: Saved | None = None
) -> activations.Activations:
    """Do what `fm.extract` does, and leave the output open. Raises as it does."""
    return _done(source, model, out, config, progress, plan=plan)[1]


def run(
    source: Any,
    model: Any,
    out: Any,
    config: Config,
    progress: Progress,
    *,
    plan: Saved | None = None,
    command: str | None = None,
) -> Result:
    """Do what `fmextract extract` does; `command` is the line that asked for it. Raises as `extract`."""
    result, acts = _done(source, model, out, config, progress, plan=plan, command=command)
    acts.close()
    return result


def _done(
    source: Any,
    model: Any,
    out: Any,
    config: Config,
    progress: Progress,
    *,
    plan: Saved | None = None,
    command: str | None = None,
) -> tuple[Result, activations.Activations]:
    """What was done, and the output, opened: of many layers that takes long, since everything in it is checked."""
    started = time.perf_counter()
    target, given = Path(out).expanduser(), given_plan.loaded(plan)
    tally, resumed = Tally(), None
    with (
        Output(target, progress, overwrite=config.overwrite, break_lock=config.break_lock) as output,
        prepare(source, model, config, progress) as prepared,
    ):
        asked = Asked(_identity(prepared, progress), prepared.source, config.ignore, config.recheck)
        run = _Run(prepared, asked, given, target, progress, command)
        to_follow = _plan(run, output)
        if to_follow is not None:
            log.info("%r, batch size %d, %s", to_follow, to_follow.batch_size, count(len(to_follow.shards), "shard"))
            resumed = _extract(run, to_follow, output, tally)
            output.fold(to_follow)
    return _finished(run, tally, time.perf_counter() - started, resumed)


@dataclass(frozen=True, slots=True)
class _Run:
    """What a run is prepared for, what is asked of it, and where it goes. `given`: the plan that it is to follow."""

    prepared: Prepared
    asked: Asked
    given: Plan | None
    target: Path
    progress: Progress
    command: str | None


# ------------------------------------------------------------------------------------------------ plan


def _plan(run: _Run, output: Output) -> Plan | None:
    """The plan to follow: that of a run begun earlier, the one that is given, or a new one, which is published.

    None: the output is complete, and is what this run gives.
    """
    earlier = output.begin(run.asked)
    plan = earlier.plan
    if earlier.is_complete:
        if run.given is not None:
            given_plan.check_finished(run.given, run.target)
        rows = _look_again(run)
        if not rows:
            return None
        plan = output.make_again(rows, run.asked)
    elif run.given is not None and plan is not None:
        given_plan.check_begun(run.given, plan, run.target)
    if plan is not None:
        same_run.check_seed(plan.identity, run.asked, run.target)
        given_plan.check_taken_up(plan, run.prepared, same_run.ignoring(plan.identity, run.asked), run.target)
        return plan
    plan = _new_plan(run)
    output.publish_plan(plan)
    return plan


def _new_plan(run: _Run) -> Plan:
    """A new plan, or the given one. Raises NoSpace where the disk cannot hold what it will write."""
    prepared, target, asked = run.prepared, run.target, run.asked.identity
    if run.given is None:
        plan = plan_for(prepared, target, run.progress, asked, run.command)
    else:
        plan = given_plan.followed(run.given, prepared, target, asked, run.command)
    estimate.check_space(plan.estimate.bytes_needed, plan.estimate.bytes_free, target)
    return plan


def _look_again(run: _Run) -> list[int]:
    """Rows of a complete output that failed and would not fail now. Raises OutputError where it is not what this run
    gives."""
    prepared, asked, target = run.prepared, run.asked, run.target
    with activations.open(target) as acts:
        failed = bool(acts.status.any()) and not prepared.config.keep_failures
        if not asked.recheck and not failed:
            run.progress.note(f"{target} is complete already")
            return []
        with working(prepared, recheck.plan_of(acts, str(prepared.device))) as work:
            if asked.recheck:
                earlier = acts.config["identity"]
                in_doubt = same_run.files_in_doubt(earlier, asked, [target]) or same_run.seed_in_doubt(earlier, asked)
                recheck.check_finished(work, acts, RECHECKED_IN_DOUBT if in_doubt else RECHECKED, run.progress)
            again = recheck.recovered(work, acts) if failed else []
            if again:
                same_run.check_seed(acts.config["identity"], asked, target)
    _tell_recovered(again, run)
    if not again:
        run.progress.note(f"{target} is complete already")
    return again


def _tell_recovered(rows: Sequence[int], run: _Run) -> None:
    if rows:
        keys = ", ".join(repr(run.prepared.source.key(row)) for row in rows[:5])
        more = f" and {len(rows) - 5:,} more" if len(rows) > 5 else ""
        run.progress.note(f"what failed before is there now, and is extracted: {keys}{more}")


# --------------------------------------------------------------------------------------------- extract


def _extract(run: _Run, plan: Plan, output: Output, tally: Tally) -> int:
    """The shards that are not there yet, or hold rows that failed and would not fail now; gives the rows of the others.

    Raises OutputError where what is there cannot be made again, TooManyFailures.
    """
    prepared, progress = run.prepared, run.progress
    _tell_crash(run, output)
    with (
        hired(plan.threads, prepared.config.worker_kind, plan.estimate.seconds, progress.note) as workers,
        working(prepared, plan, workers, checksums=not output.is_one_shard(plan)) as work,
    ):
        _check_earlier(run, work, output)
        _count_earlier(tally, output.records)
        done = {record.start: len(record.rows) for record in output.records}
        todo = [part for part in plan.shards if part.start not in done]
        if todo:
            progress.start(plan.rows, sum(done.values()))
            try:
                with resumable():
                    pipeline.run_shards(work, output.directory, todo, progress, tally)
            finally:
                progress.finish()
    _check_failures(plan, output.directory, tally, prepared.config)
    return sum(done.values()) if todo else plan.rows


def _tell_crash(run: _Run, output: Output) -> None:
    if output.crashed_at:
        source = run.prepared.source
        keys = ", ".join(repr(source.key(row)) for row in output.crashed_at[:5] if row < len(source))
        run.progress.note(
            f"the run before ended without a word while these were being decoded: {keys}. If it does so again, one of"
            " them crashes the decoder, and has to be taken out of the source."
        )


def _check_earlier(run: _Run, work: Work, output: Output) -> None:
    """Run some of the rows again that are there, and let those go that failed and would not fail now."""
    config = run.prepared.config
    if output.records and config.recheck:
        recheck.check_resume(work, output.directory, output.records, run.progress)
    if not config.keep_failures:
        again: list[int] = []
        for record in (record for record in output.records if record.failed):
            with activations.open(output.directory / record.name) as stored:
                again += recheck.recovered(work, stored)
        _tell_recovered(again, run)
        output.drop(again)


def _count_earlier(tally: Tally, records: Sequence[shards.ShardRecord]) -> None:
    tally.records = list(records)
    tally.failed = sum(record.failed for record in records)
    tally.seen = sum(len(record.rows) for record in records)


def _check_failures(plan: Plan, directory: Path, tally: Tally, config: Config) -> None:
    """Nothing is called done where every image failed, whatever the budget; nor where an earlier run had a larger one.

    Raises TooManyFailures.
    """
    if tally.failed < plan.rows:
        check_budget(config.max_failures, tally)
        return
    key, message = tally.failures[0] if tally.failures else _first_failure(directory / shards.shard_name(0))
    raise TooManyFailures(f"every one of the {plan.rows} images failed. The first: {key!r}: {message}")


def _first_failure(shard: Path) -> tuple[str, str]:
    with activations.open(shard) as acts:
        return str(acts.keys[0]), str(acts.messages[0])


# ---------------------------------------------------------------------------------------------- result


def _finished(run: _Run, tally: Tally, seconds: float, resumed: int | None) -> tuple[Result, activations.Activations]:
    """(what was done, the output). `resumed`: rows that were there before, None where all were."""
    acts = activations.just_written(run.target)
    try:
        result = summary.result(acts, run.target, tally, seconds, resumed)
    except BaseException:
        acts.close()
        raise
    prepared = run.prepared
    late = [note for note in notes_of(prepared.source) if note not in prepared.notes]
    for note in (*late, *summary.nonfinite_notes(result.layers, tally)):
        run.progress.note(note)
    return replace(result, notes=(*result.notes, *late)), acts
