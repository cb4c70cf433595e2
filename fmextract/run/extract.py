"""One run, from what was asked for to a finished output: prepare, plan, extract, fold.

prepare: open the source, build the model, survey and probe it        → Prepared
plan:    resolve every `auto`, chunks, shards                         → plan.json
extract: the shards that are not there yet                            → shard-*.h5
fold:    one file, or the directory with its index
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fmextract.capture import hooks
from fmextract.common import strict_json
from fmextract.common.devices import is_out_of_memory
from fmextract.common.progress import Quiet
from fmextract.config import Config, check_out
from fmextract.errors import TooManyFailures
from fmextract.inputs import device_jpegs
from fmextract.inputs.sources import notes_of
from fmextract.model import precision
from fmextract.pipeline import pipeline
from fmextract.pipeline.work import Tally, Work, check_budget
from fmextract.pipeline.workers import Jpegs, Workers, hired
from fmextract.planning import Plan
from fmextract.reading import activations
from fmextract.records import Progress, Result
from fmextract.run import estimate, given_plan, recheck, same_run
from fmextract.run.identity import identity
from fmextract.run.make_plan import plan_for
from fmextract.run.output import Output, resumable
from fmextract.run.prepare import Prepared, copied_as_planned, lent, prepare, reduce_functions
from fmextract.run.provenance import file_info
from fmextract.run.same_run import Asked
from fmextract.run.summary import _result, nonfinite_notes
from fmextract.storage import shards

RECHECKED, RECHECKED_IN_DOUBT = 2, 512
"""Stored rows that are run again, each with its batch, before an output is called complete."""


__all__ = ["extract", "make_plan", "run"]


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
        target = Path(out).expanduser()
        return (
            plan_for(prepared, target, progress)
            if given is None
            else given_plan.followed(given, prepared, target, identity(prepared))
        )


def extract(
    source: Any,
    model: Any,
    out: Any,
    *,
    layers: Sequence[str] | str = (),
    progress: Progress | None = None,
    plan: Saved | None = None,
    **options: Any,
) -> activations.Activations:
    """Run `source` through `model` and store the activations of `layers` in `out`; gives what `open(out)` gives.

    `source`: a folder, a manifest, a map-style Dataset or a sequence of images. `model`: a name (`resnet50`), or an
    `nn.Module`, which is left exactly as it was. `out`: `name.h5` or a directory of shards. Options are those of the
    command line (`batch_size=`, `precision=`, `keep_bits=` …; see `Config`). `plan`: one that `plan` made for the same
    arguments, or a file that it was saved to: the run does what it says, and measures nothing.

    Raises ConfigError and its kin for what cannot be done, RunStopped for a run that ended early and can be resumed.
    Failed images are no exception: they are rows with a status.
    """
    config = Config.of(layers=layers, **options)
    return _done(source, model, out, config, progress or _default_progress(), plan=plan)[1]


def _default_progress() -> Progress:
    from fmextract.common.progress import TerminalProgress

    return TerminalProgress()


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
    tally = Tally()
    resumed = 0
    with (
        Output(target, progress, overwrite=config.overwrite, break_lock=config.break_lock) as output,
        prepare(source, model, config, progress) as prepared,
    ):
        asked = Asked(strict_json.plain(identity(prepared)), prepared.source, config.ignore, config.recheck)
        if given is not None:
            given_plan.check(given, prepared, asked.identity)
        new_plan = partial(_affordable, prepared, target, progress, given, asked.identity, command)
        made = output.begin(asked, new_plan)
        _check_followed(given, made, target)
        if made is None:
            again = _look_again(prepared, asked, target, progress)
            made = output.make_again(again, asked, new_plan) if again else None
        if made is not None:
            if output.taken_up:
                same_run.check_seed(made.identity, asked, target)
                given_plan.check_taken_up(made, prepared, same_run.ignoring(made.identity, asked), target)
            _tell_crash(prepared, output, progress)
            resumed = _extract(prepared, made, output, progress, tally)
            _check_failures(made, output.directory, tally, config)
            output.fold(made)
    acts = activations.just_written(target)
    try:
        result = _result(acts, target, tally, time.perf_counter() - started, resumed if made is not None else None)
    except BaseException:
        acts.close()
        raise
    late = [note for note in notes_of(prepared.source) if note not in prepared.notes]
    for note in (*late, *nonfinite_notes(result.layers, tally)):
        progress.note(note)
    return replace(result, notes=(*result.notes, *late)), acts


def _look_again(prepared: Prepared, asked: Asked, target: Path, progress: Progress) -> list[int]:
    """Rows of a complete output that failed and would not fail now. Raises OutputError where it is not what this run
    gives."""
    config = prepared.config
    with activations.open(target) as acts:
        failed = bool(acts.status.any()) and not config.keep_failures
        if not config.recheck and not failed:
            progress.note(f"{target} is complete already")
            return []
        with working(prepared, recheck.plan_of(acts, str(prepared.device))) as work:
            if config.recheck:
                earlier = acts.config["identity"]
                in_doubt = same_run.files_in_doubt(earlier, asked, [target]) or same_run.seed_in_doubt(earlier, asked)
                recheck.check_finished(work, acts, RECHECKED_IN_DOUBT if in_doubt else RECHECKED, progress)
            again = recheck.recovered(work, acts) if failed else []
            if again:
                same_run.check_seed(acts.config["identity"], asked, target)
    _tell_recovered(again, prepared, progress)
    if not again:
        progress.note(f"{target} is complete already")
    return again


def _tell_recovered(rows: Sequence[int], prepared: Prepared, progress: Progress) -> None:
    if rows:
        keys = ", ".join(repr(prepared.source.key(row)) for row in rows[:5])
        more = f" and {len(rows) - 5:,} more" if len(rows) > 5 else ""
        progress.note(f"what failed before is there now, and is extracted: {keys}{more}")


def _affordable(
    prepared: Prepared,
    target: Path,
    progress: Progress,
    given: Plan | None,
    asked: Mapping[str, Any],
    command: str | None,
) -> Plan:
    """A new plan, or the `given` one. Raises NoSpace where the disk cannot hold what it will write."""
    if given is None:
        made = plan_for(prepared, target, progress, asked, command)
    else:
        made = given_plan.followed(given, prepared, target, asked, command)
    estimate.check_space(made.estimate.bytes_needed, made.estimate.bytes_free, target)
    return made


def _check_followed(given: Plan | None, made: Plan | None, target: Path) -> None:
    """Raises OutputError where a run is taken up, or complete, that does something else than the `given` plan says."""
    if given is None:
        return
    if made is None:
        given_plan.check_finished(given, target)
    else:
        given_plan.check_begun(given, made, target)


def _tell_crash(prepared: Prepared, output: Output, progress: Progress) -> None:
    if output.crashed_at:
        keys = ", ".join(repr(prepared.source.key(row)) for row in output.crashed_at[:5] if row < len(prepared.source))
        progress.note(
            f"the run before ended without a word while these were being decoded: {keys}. If it does so again, one of"
            " them crashes the decoder, and has to be taken out of the source."
        )


def _count_earlier(tally: Tally, records: Sequence[shards.ShardRecord]) -> None:
    tally.records = list(records)
    tally.failed = sum(record.failed for record in records)
    tally.seen = sum(len(record.rows) for record in records)


def _check_failures(made: Plan, directory: Path, tally: Tally, config: Config) -> None:
    """Nothing is called done where every image failed, whatever the budget; nor where an earlier run had a larger one.

    Raises TooManyFailures.
    """
    if tally.failed < made.rows:
        check_budget(config.max_failures, tally)
        return
    key, message = tally.failures[0] if tally.failures else _first_failure(directory / shards.shard_name(0))
    raise TooManyFailures(f"every one of the {made.rows} images failed. The first: {key!r}: {message}")


def _first_failure(shard: Path) -> tuple[str, str]:
    with activations.open(shard) as acts:
        return str(acts.keys[0]), str(acts.messages[0])


def _extract(prepared: Prepared, made: Plan, output: Output, progress: Progress, tally: Tally) -> int:
    """The shards that are not there yet, or hold rows that failed and would not fail now; gives the rows of the others.

    Raises OutputError where what is there cannot be made again.
    """
    with (
        hired(made.threads, prepared.config.worker_kind, made.estimate.seconds, progress.note) as workers,
        working(prepared, made, workers, checksums=not output.is_one_shard(made)) as work,
    ):
        if output.records and prepared.config.recheck:
            recheck.check_resume(work, output.directory, output.records, progress)
        if not prepared.config.keep_failures:
            _tell_recovered(again := _recovered(work, output), prepared, progress)
            output.drop(again)
        _count_earlier(tally, output.records)
        done = {record.start: len(record.rows) for record in output.records}
        todo = [part for part in made.shards if part.start not in done]
        if not todo:
            return made.rows
        progress.start(made.rows, sum(done.values()))
        try:
            with resumable():
                pipeline.run_shards(work, output.directory, todo, progress, tally)
        finally:
            progress.finish()
    return sum(done.values())


def _recovered(work: Work, output: Output) -> list[int]:
    """Rows of earlier shards that failed and would not fail now."""
    found: list[int] = []
    for record in (record for record in output.records if record.failed):
        with activations.open(output.directory / record.name) as stored:
            found += recheck.recovered(work, stored)
    return found


@contextmanager
def working(prepared: Prepared, made: Plan, workers: Workers | None = None, checksums: bool = True) -> Iterator[Work]:
    """The model on its device, in the plan's precision, hooked: everything that the engine needs."""
    where = torch.device(made.device)
    with (
        _threads(made.forward_threads),
        _seeded(prepared.config.seed),
        lent(prepared, made) as module,
        hooks.tapped(
            module,
            copied_as_planned(prepared, made),
            reduce_functions(prepared),
            prepared.stop,
            prepared.capture_kind,
            asking=True,
        ) as capture,
    ):
        if prepared.config.compile:
            _compile(prepared, made, capture)
        yield Work(
            plan=made,
            info=file_info(made),
            source=prepared.source,
            reader=prepared.reader,
            preprocess=prepared.loaded.preprocess,
            jpegs=jpegs(prepared, workers),
            workers=workers,
            input_shape=prepared.input_shape,
            ready=prepared.ready,
            model=module,
            forward=prepared.forward,
            capture=capture,
            captured=prepared.captured,
            device=where,
            budget=prepared.config.max_failures,
            checksums=checksums,
        )


def jpegs(prepared: Prepared, workers: Workers | None) -> device_jpegs.DeviceJpegs | Jpegs | None:
    """What decodes plain JPEGs elsewhere than in the threads of a run; None: nothing does."""
    if prepared.config.jpeg_decoder == "device":
        return device_jpegs.DeviceJpegs(prepared.device)
    return workers.jpegs(prepared.config.exif) if workers is not None else None


def _compile(prepared: Prepared, made: Plan, capture: hooks.Capture) -> None:
    """Before the first image is read: else a minute of compiling counts as a first batch that hangs.

    Raises ConfigError for what cannot be compiled. Where memory does not suffice, the engine takes smaller batches.
    """
    batch = torch.zeros((made.batch_size, *prepared.input_shape), dtype=torch.float32, device=prepared.device)
    with precision.numerics(made.precision, prepared.device):
        try:
            capture.forward(prepared.forward, precision.to_memory_format(batch, made.memory_format))
        except Exception as error:
            if not is_out_of_memory(error):
                raise


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """What is random in a model's forward begins from `seed`; the caller's own random state is as before afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Forward passes run on `count` threads: another number would change the last bits of a resumed run."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
