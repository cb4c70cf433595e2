"""What `-o` names: where the shards of a run are, whether it is begun or done, and how it becomes one output."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fmextract import resume
from fmextract.common.folders import base_of, moved
from fmextract.config import check_out, is_single_file
from fmextract.errors import ConfigError, FormatError, OutputError, OutputLost
from fmextract.pipeline.watch import left_behind
from fmextract.planning import PLAN_FORMAT, Plan
from fmextract.reading import activations, counts
from fmextract.reading.totals import merged
from fmextract.records import Progress
from fmextract.resume import Asked
from fmextract.storage import contents, digest, durable, merging
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
    remove_dead,
    shard_name,
    write_sealed,
)

CHECKS = 4  # shards whose checksums are computed at once


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
        self.taken_up = False  # the plan was there before
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

    def begin(self, asked: Asked, make_plan: Callable[[], Plan]) -> Plan | None:
        """The plan to follow: that of a run begun earlier, else a new one, published. None: the output is complete.

        Raises OutputError, naming each field and photo that differs, where another run was begun or finished there.
        """
        if self._single and self._is_finished() and not self._overwrite:
            self._compare_finished(asked)
            return None
        if self._continues(asked):
            earlier = self._earlier()
            return None if earlier is None else self._with_ignored(earlier, asked)
        resume.check_ignored(asked)
        return self._anew(make_plan)

    def make_again(self, rows: Sequence[int], asked: Asked, make_plan: Callable[[], Plan]) -> Plan:
        """The plan to follow where these rows of a finished output are to be had after all.

        Of a directory the shards that hold them are made again. A single file is made anew, and stays until then.
        """
        self._make_directory()
        self._acquire()
        if self._single:
            earlier = self._earlier() if self._continues(asked) else None
            return earlier or self._anew(make_plan)
        with writing(self.directory):
            (self.directory / INDEX).unlink()
        self.records, self.taken_up = load_records(self.directory, self._tell_damaged), True
        self.drop(rows)
        return Plan.load(self.directory / PLAN)

    def drop(self, rows: Sequence[int]) -> None:
        """Shards that hold one of these rows are not kept: they are made again."""
        self.records = [record for record in self.records if not any(row in record.rows for row in rows)]

    def _with_ignored(self, earlier: Plan, asked: Asked) -> Plan:
        """The plan, whose history says what differs and was ignored."""
        ignored = resume.listed(resume.ignored(earlier.identity, asked))
        history = str(earlier.info["history"])
        if not ignored or ignored in history:
            return earlier
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        info = {**earlier.info, "history": f"{history}\n{now} taken up, ignoring what differs: {ignored}"}
        plan = replace(earlier, info=info)
        write_sealed(self.directory / PLAN, plan.as_json())
        return plan

    def _anew(self, make_plan: Callable[[], Plan]) -> Plan:
        made = make_plan()
        with writing(self.directory):
            write_sealed(self.directory / PLAN, made.as_json())
        return made

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
        changed = resume.changed(earlier.identity, asked, stored, self._progress.note, finished=complete)
        holds_rows = damaged or any(record.failed < len(record.rows) for record in records)
        if changed and not self._overwrite and holds_rows:
            raise OutputError(
                f"{self._target} was begun otherwise ({resume.listed(changed)})."
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

    def is_one_shard(self, made: Plan) -> bool:
        """Whether the only shard becomes the output by its new name."""
        return self._single and len(made.shards) == 1

    def fold(self, made: Plan) -> None:
        """All shards are there: write the index, or make the one file of them. Raises OutputLost, NoSpace."""
        with resumable():
            if not self._single:
                fold_index(self.directory, made.as_json())
                return
            shards = [self.directory / shard_name(i) for i in range(len(made.shards))]
            if self.is_one_shard(made):
                durable.publish(shards[0], self._target)
            else:
                _pack(shards, self._target, self.directory)
            self._remove(_shards_of(made))

    # ---- what is there

    def _check_place(self) -> None:
        target = self._target
        check_out(target)
        if self._single:
            if target.is_dir():
                raise OutputError(f"{target} is a directory; -o name.h5 must be a file")
            if target.exists():
                _check_ours(target)
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
        changed = resume.changed(config.get("identity", {}), asked, [self._target], self._progress.note, finished=True)
        if changed:
            raise OutputError(
                f"{self._target} is finished, and was made otherwise ({resume.listed(changed)})."
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
        self.crashed_at, self.taken_up = left_behind(self.directory), True
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


def _check_ours(target: Path) -> None:
    """Only a file that says it is ours, and can be read, may be compared with or replaced."""
    try:
        with activations.open(target):
            pass
    except FormatError as error:
        raise OutputError(f"{target} exists and is no output of fmextract, or a broken one: {error}") from error


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


# ------------------------------------------------------------------------------------------------------------- packing


def pack(directory: Path, out: Path, *, leave_out: Sequence[range] = (), overwrite: bool = False) -> None:
    """Make one file of a directory of shards, copying chunks as they are.

    A run that is not finished, or has lost shards, is refused unless `leave_out` names exactly the rows that are
    missing: they are in the file as failed rows. Raises FormatError, DamagedError, OutputError, NoSpace.
    """
    if not directory.is_dir():
        raise OutputError(f"{directory} is not a directory of shards")
    if not is_single_file(out):
        raise OutputError(f"{out}: expected the name of a file, as name.h5")
    if out.exists():
        _check_ours(out)
        if not overwrite:
            raise OutputError(f"{out} exists; --overwrite replaces it, -o names another")
    parts = _parts(directory, leave_out)
    with writing(out):
        remove_dead(out, directories=False)
        _pack(parts, out, out.parent)


def row_ranges(texts: Iterable[str]) -> list[range]:
    """`8-15` → the rows 8 to 15. Raises ConfigError."""
    made = []
    for text in texts:
        first, dash, last = text.partition("-")
        if not dash or not first.isdecimal() or not last.isdecimal() or int(last) < int(first):
            raise ConfigError(f"--leave-out {text!r}: expected the first and the last row, as 4096-8191")
        made.append(range(int(first), int(last) + 1))
    return made


def _parts(directory: Path, leave_out: Sequence[range]) -> list[Path | range]:
    """The shards of a directory, and the rows that are left out, in the order of their rows."""
    if not leave_out:
        return [directory / record.name for record in load_index(directory)]
    plan = Plan.load(directory / PLAN)
    there = {record.name for record in load_records(directory)}
    parts: list[Path | range] = []
    for i, rows in enumerate(plan.shards):
        name = shard_name(i)
        parts.append(directory / name if name in there else rows)
    missing = _joined(part for part in parts if isinstance(part, range))
    if _joined(leave_out) != missing or len(missing) == 0 or not there:
        raise OutputError(f"{directory}: told to leave out {_said(_joined(leave_out))}; missing are {_said(missing)}")
    return parts


def _joined(ranges: Iterable[range]) -> list[range]:
    """The same rows as few ranges, in order."""
    made: list[range] = []
    for part in sorted(ranges, key=lambda rows: rows.start):
        if made and part.start <= made[-1].stop:
            made[-1] = range(made[-1].start, max(made[-1].stop, part.stop))
        elif len(part):
            made.append(part)
    return made


def _said(ranges: Sequence[range]) -> str:
    return ", ".join(f"{rows.start}-{rows.stop - 1}" for rows in ranges) or "no rows"


def _pack(parts: Sequence[Path | range], target: Path, scratch: Path) -> None:
    """One file of all parts, published under its name at once. `scratch` is a directory beside or below it."""
    shards = [part for part in parts if isinstance(part, Path)]
    temporary = durable.temporary_name(scratch / target.name)
    stats, attrs, smaller = merged(shards)
    with contents.open_shard(shards[0]) as first:
        info = contents.read_info(first)
    left_out = _joined(part for part in parts if isinstance(part, range))
    extra = {
        **{name: value for name, value in info.extra.items() if name not in ("smaller_batches", "throughput")},
        **_images(shards[0], target),
        "throughput": _throughput(shards),
        **({"smaller_batches": smaller} if smaller else {}),
        **({"left_out": _said(left_out)} if left_out else {}),
    }
    info = replace(info, extra=extra, history=_history(shards))
    try:
        merging.pack(parts, temporary, info=info, stats=stats, layer_attrs=attrs)
        durable.publish(temporary, target)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _images(shard: Path, target: Path) -> dict[str, Any]:
    with activations.open(shard) as acts:
        return images_from(acts, target.parent)


def images_from(acts: activations.Activations, to: Path) -> dict[str, Any]:
    """The attribute `images` of a file in the folder `to` that is made of `acts`; nothing where that has none."""
    return {"images": moved(acts.images, base_of(acts.path), to)} if acts.images else {}


def _history(shards: Sequence[Path]) -> str:
    """That of the last shard, which also says how the run was taken up."""
    with contents.open_shard(shards[-1]) as last:
        return contents.read_info(last).history


def _throughput(shards: Sequence[Path]) -> Mapping[str, Any] | None:
    """That of all shards together."""
    with contextlib.ExitStack() as stack:
        opened = (stack.enter_context(activations.open(path)) for path in shards)
        return counts.total_throughput(acts._files[0].contents.said.get("throughput") for acts in opened)
