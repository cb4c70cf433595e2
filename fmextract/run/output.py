"""What `-o` names: where the shards of a run are, whether it is begun or done, and how it becomes one output."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from fmextract.config import check_out, is_single_file
from fmextract.errors import FormatError, OutputError, OutputLost
from fmextract.pipeline.watch import left_behind
from fmextract.planning import PLAN_FORMAT, Plan
from fmextract.reading import activations
from fmextract.records import Progress
from fmextract.run import same_run
from fmextract.run.packing import check_ours, pack_parts
from fmextract.run.same_run import Asked
from fmextract.storage import digest, durable
from fmextract.storage.durable import writing
from fmextract.storage.lock import NAME as LOCK
from fmextract.storage.lock import Lock
from fmextract.storage.shards import (
    INDEX,
    PLAN,
    ShardRecord,
    file_sha256,
    fold_index,
    load_index,
    load_records,
    shard_name,
    write_sealed,
)

CHECKS = 4  # shards whose checksums are computed at once


class Earlier(NamedTuple):
    """What is there of a run: the plan that it follows and goes on by, or all of it, or neither."""

    plan: Plan | None
    is_complete: bool = False


class Output:
    """A file (`name.h5`, its shards meanwhile in `name.h5.partial/`) or a directory of shards. A context manager.

    Inside the block the output is this process's alone. `records` are the shards that were there before and are kept,
    `crashed_at` the rows that were being decoded when the run before ended without a word.
    """

    def __init__(self, target: Path, progress: Progress, *, overwrite: bool = False, break_lock: bool = False) -> None:
        self._target, self._progress = target, progress
        self._overwrite, self._break_lock = overwrite, break_lock
        self._single = is_single_file(target)
        self.directory = target.with_name(target.name + ".partial") if self._single else target
        self.records: list[ShardRecord] = []
        self.crashed_at: list[int] = []
        self._lock = Lock(self.directory)
        self._made: list[Path] = []  # directories that were not there before, the deepest first

    def __enter__(self) -> Output:
        """Raises OutputError where the place holds something else, or another run is at work there."""
        with writing(self.directory):
            self._check_place()
        # Looking at a finished output needs no lock: the place may well be read-only.
        if self._overwrite or not self._is_finished() or (self._single and self.directory.exists()):
            self._make_directory()
            self._acquire()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._lock.release()
        with contextlib.suppress(OSError):  # one of them holds something, or was never made
            for path in self._made or [self.directory] * self._single:
                path.rmdir()

    def begin(self, asked: Asked) -> Earlier:
        """What is there of the run that is asked for; what is taken up is made ready to go on.

        Raises OutputError, naming each field and photo that differs, where another run was begun or finished there.
        """
        if self._single and self._is_finished() and not self._overwrite:
            self._compare_finished(asked)
            return Earlier(None, is_complete=True)
        if self._continues(asked):
            plan = self._earlier()
            return Earlier(None, is_complete=True) if plan is None else Earlier(self._with_ignored(plan, asked))
        same_run.check_ignored(asked)
        return Earlier(None)

    def make_again(self, rows: Sequence[int], asked: Asked) -> Plan | None:
        """The plan to follow where these rows of a finished output are to be had after all; None: there is none yet.

        Of a directory the shards that hold them are made again. A single file is made anew, and stays until then.
        """
        self._make_directory()
        self._acquire()
        if self._single:
            return self._earlier() if self._continues(asked) else None
        with writing(self.directory):
            (self.directory / INDEX).unlink()
        self.records = load_records(self.directory, self._tell_damaged)
        self.drop(rows)
        return Plan.load(self.directory / PLAN)

    def publish_plan(self, plan: Plan) -> None:
        """Write down what will be done, before it is."""
        with writing(self.directory):
            write_sealed(self.directory / PLAN, plan.as_json())

    def drop(self, rows: Sequence[int]) -> None:
        """Shards that hold one of these rows are not kept: they are made again."""
        self.records = [record for record in self.records if not any(row in record.rows for row in rows)]

    def _with_ignored(self, earlier: Plan, asked: Asked) -> Plan:
        """The plan, whose history says what differs and was ignored."""
        ignored = same_run.listed(same_run.ignored(earlier.identity, asked))
        history = str(earlier.info["history"])
        if not ignored or ignored in history:
            return earlier
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        info = earlier.info.copy()
        info["history"] = f"{history}\n{now} taken up, ignoring what differs: {ignored}"
        plan = replace(earlier, info=info)
        write_sealed(self.directory / PLAN, plan.as_json())
        return plan

    def _continues(self, asked: Asked) -> bool:
        """Whether an earlier run is there and is taken up; one that is not is removed. Raises OutputError."""
        if not (self.directory / PLAN).exists():
            return False
        try:
            earlier = Plan.load(self.directory / PLAN)
        except FormatError as error:
            self._give_up_plan(error)
            return False
        damaged: list[str] = []
        records = self._records_of(earlier, damaged.append)
        stored = [self.directory / record.name for record in records]
        complete = not self._single and self._is_finished()
        changed = same_run.changed(earlier.identity, asked, stored, self._progress.note, finished=complete)
        holds_rows = damaged or any(record.failed < len(record.rows) for record in records)
        if changed and not self._overwrite and holds_rows:
            raise OutputError(
                f"{self._target} was begun otherwise ({same_run.listed(changed)})."
                " The same arguments resume it, --overwrite starts anew, --ignore FIELD passes over one of these."
            )
        if not changed and self._takes_up(earlier, records):
            return True
        self._remove(_shards_of(earlier))
        return False

    def _give_up_plan(self, error: FormatError) -> None:
        """Remove what was begun by a plan that cannot be read, with --overwrite. Raises FormatError without."""
        if not self._overwrite:
            raise FormatError(
                f"{error}. Without it nobody knows what the shards beside it are of: --overwrite begins anew, -o names"
                " another"
            ) from error
        records = load_records(self.directory)
        if not (self._single or records or self._says_plan()):
            raise FormatError(f"{error}. Nothing beside it says whose it is: remove {self.directory} yourself")
        self._remove([record.name for record in records])

    def _says_plan(self) -> bool:
        """Whether plan.json says that it is ours, for all that is wrong with it."""
        with contextlib.suppress(FormatError, OutputError):
            said = durable.read_json(self.directory / PLAN)
            return isinstance(said, dict) and said.get("format") == PLAN_FORMAT
        return False

    def _earlier(self) -> Plan | None:
        """The plan of the run that is taken up; None where it is complete."""
        earlier = Plan.load(self.directory / PLAN)
        return None if self._is_complete() else self._resume(earlier)

    def is_one_shard(self, plan: Plan) -> bool:
        """Whether the only shard becomes the output by its new name."""
        return self._single and len(plan.shards) == 1

    def fold(self, plan: Plan) -> None:
        """All shards are there: write the index, or make the one file of them. Raises OutputLost, NoSpace."""
        with resumable():
            if not self._single:
                fold_index(self.directory, plan.as_json())
                return
            shards = [self.directory / shard_name(i) for i in range(len(plan.shards))]
            if self.is_one_shard(plan):
                durable.publish(shards[0], self._target)
            else:
                pack_parts(shards, self._target, self.directory)
            self._remove(_shards_of(plan))

    # ---- what is there

    def _check_place(self) -> None:
        target = self._target
        check_out(target)
        if self._single:
            if target.is_dir():
                raise OutputError(f"{target} is a directory; -o name.h5 must be a file")
            if target.exists():
                check_ours(target)
            _check_directory(self.directory)
        elif target.exists() and not target.is_dir():
            raise OutputError(f"{target} is a file; name a directory, or a file ending in .h5")
        else:
            _check_directory(target)

    def _is_finished(self) -> bool:
        return self._target.exists() if self._single else (self.directory / INDEX).exists()

    def _compare_finished(self, asked: Asked) -> None:
        with activations.open(self._target) as acts:
            config = acts.config
        changed = same_run.changed(
            config.get("identity", {}), asked, [self._target], self._progress.note, finished=True
        )
        if changed:
            raise OutputError(
                f"{self._target} is finished, and was made otherwise ({same_run.listed(changed)})."
                " --overwrite replaces it, -o names another, --ignore FIELD passes over one of these."
            )
        if (self.directory / PLAN).exists():  # the run was ended between publishing and tidying up
            try:
                earlier = Plan.load(self.directory / PLAN)
            except FormatError as error:
                self._progress.note(f"left beside the finished {self._target}: {error}")
                return
            if earlier.run_id == config.get("run_id"):
                self._remove(_shards_of(earlier))
            else:
                self._progress.note(f"{self.directory} holds another, unfinished run")

    def _takes_up(self, earlier: Plan, records: Sequence[ShardRecord]) -> bool:
        """Whether the run with the same identity is taken up. One begun with --overwrite is, by the same command, but
        not where rows failed in it."""
        if not self._overwrite:
            return True
        unfinished = self._single or not self._is_finished()  # a single file may be the old one
        return unfinished and bool(earlier.config.get("overwrite")) and not any(record.failed for record in records)

    def _records_of(self, plan: Plan, tell: Callable[[str], None]) -> list[ShardRecord]:
        """The shards of a plan that are there. `tell` is told of records that are damaged."""
        planned = {shard_name(i): rows for i, rows in enumerate(plan.shards)}
        records = load_records(self.directory, tell)
        return [record for record in records if planned.get(record.name) == record.rows]

    def _tell_damaged(self, error: str) -> None:
        self._progress.note(f"{error}: the rows of this shard are extracted again")

    def _is_complete(self) -> bool:
        """Whether a directory has its index and every file of it."""
        if self._single or not self._is_finished():
            return False
        try:
            load_index(self.directory)
        except FormatError as error:
            self._progress.note(f"{error}: its rows are extracted again")
            self._acquire()
            with writing(self.directory):
                (self.directory / INDEX).unlink()
            return False
        return True

    def _acquire(self) -> None:
        """The output for this process alone, if it is not so already."""
        if self._lock.is_held:
            return
        dead = self._lock.acquire(break_lock=self._break_lock)
        if dead is not None:
            self._progress.note(f"taking {self._target} over from {dead}, which ended without finishing it")

    def _resume(self, earlier: Plan) -> Plan:
        """Keep the shards that are whole; remove what a run that died left unfinished."""
        self.crashed_at = left_behind(self.directory)
        with writing(self.directory):
            self._remove_temporaries()
        there = self._records_of(earlier, self._tell_damaged)
        with ThreadPoolExecutor(CHECKS) as pool:
            unchanged = pool.map(lambda record: _is_unchanged(self.directory / record.name, record), there)
            for record, same in zip(there, unchanged, strict=True):
                if same:
                    self.records.append(record)
                else:
                    self._progress.note(f"{record.name} has changed since it was written; its rows are extracted again")
        self._progress.note(f"resuming {self._target}: {len(self.records)} of {len(earlier.shards)} shards are there")
        return earlier

    # ---- what is changed

    def _make_directory(self) -> None:
        with writing(self.directory):
            missing = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
            self._made = self._made or missing
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in missing:
                durable.fsync(path.parent)

    def _remove_temporaries(self) -> None:
        for path in self.directory.iterdir():
            if durable.is_temporary(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _remove(self, names: Iterable[str]) -> None:
        """Remove shards that a plan or their records list, and nothing else: the index first, since without it nothing
        is whole, the plan last, since it says what there is to remove."""
        with writing(self.directory):
            (self.directory / INDEX).unlink(missing_ok=True)
            for name in names:
                (self.directory / name).with_suffix(".json").unlink(missing_ok=True)
                (self.directory / name).unlink(missing_ok=True)
            self._remove_temporaries()
            (self.directory / PLAN).unlink(missing_ok=True)
            durable.fsync(self.directory)


def _shards_of(plan: Plan) -> list[str]:
    return [shard_name(i) for i in range(len(plan.shards))]


def finished_shards(target: Path) -> int:
    """How many shards of a run into `target` are recorded as whole."""
    directory = target.with_name(target.name + ".partial") if is_single_file(target) else target
    return sum(1 for _ in directory.glob("shard-*.json"))


def _is_unchanged(shard: Path, record: ShardRecord) -> bool:
    if record.sha256:
        return file_sha256(shard) == record.sha256
    try:
        return digest.content_digest(shard) == record.content_digest
    except (FormatError, OutputError):
        return False


def _check_directory(directory: Path) -> None:
    """An output of ours, the beginning of one, or nothing at all."""
    if not directory.exists() or (directory / PLAN).exists():
        return
    foreign = [path.name for path in directory.iterdir() if path.name != LOCK and not durable.is_temporary(path.name)]
    if foreign:
        raise OutputError(
            f"{directory} holds something that fmextract did not write ({foreign[0]}); name another directory"
        )


@contextlib.contextmanager
def resumable() -> Iterator[None]:
    """Within a run that could write when it began, an output that cannot be written is one that was lost."""
    try:
        yield
    except OutputError as error:
        raise OutputLost(f"{error}. What is done is kept; the same command resumes once that is mended.") from error
