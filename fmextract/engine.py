"""The staged pipeline: from rows of a source to published shards.

    decode (threads) → forward (the caller's thread) → cut into chunks (a thread) → encode (threads) → write (a thread)
    → publish (a thread)

Every queue is bounded, rows keep their order, and the first error of any stage ends all of them. What a shard holds
depends on the plan and the images alone, not on the number of threads.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fmextract import chunks
from fmextract.capture import blame
from fmextract.capture.hooks import Capture
from fmextract.capture.taps import Forward
from fmextract.channel import Channel, Closed
from fmextract.common.allocator import give_back_freed_memory
from fmextract.common.devices import TOO_SMALL, is_out_of_memory, lost
from fmextract.config import FailureBudget
from fmextract.device import Download, Transfers, transfers_for
from fmextract.errors import CaptureError, ConfigError, DeviceLost, SampleError, TooManyFailures
from fmextract.inputs import decoding, device_jpegs, preprocessing
from fmextract.inputs.reading import Reader, content, stamp
from fmextract.inputs.sources import columns_of, on_disk
from fmextract.model.precision import numerics, to_memory_format
from fmextract.planning import Plan
from fmextract.pool import Pool
from fmextract.records import FileInfo, FileStamp, LayerSpec, Preprocess, Progress, SampleTable, Source, Status
from fmextract.stats import RunningStats
from fmextract.storage import durable, layout
from fmextract.storage.layer_stats import settled
from fmextract.storage.shards import ShardRecord, file_sha256, record_shard, shard_name
from fmextract.storage.writer import ShardWriter
from fmextract.watch import InFlight, Watch
from fmextract.workers import Jpegs, Workers

FIRST = 5  # keys that are named where something is wrong with them
DEPTH = 2  # batches of activations of an accelerator on the host: one being encoded, one arriving
HANGING = 10.0  # seconds that the end of a run waits for threads in foreign code; then it leaves them behind
ROWS_A_TASK = 8
ROWS_A_DEVICE_TASK = 8, 32  # of JPEGs that are decoded on the device, which does several at once: at least, at most
CHUNKS_A_TASK = 4  # at most; of small maps the hand-over of a chunk costs a tenth of the encoding
CHUNKS_A_PROCESS = 8  # at most, where a task goes to another process
GIVING_BACK = 0.5, 5.0  # seconds between two times that a CPU's freed memory goes back to the system: first, at most


@dataclass(frozen=True, slots=True)
class Captured:
    """What a tap hands over, after a reducer in the hook: the shape and axes of one image.

    Statistics are of this. `finish` makes what is stored of it where that is less (`=top` stores each map's maximum).
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    finish: Callable[[torch.Tensor], torch.Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """What the pipeline needs beside the plan: things that cannot be written down in one."""

    plan: Plan
    info: FileInfo
    source: Source
    reader: Reader
    preprocess: preprocessing.Preprocessing | None
    jpegs: device_jpegs.DeviceJpegs | Jpegs | None  # what decodes plain JPEGs elsewhere; None: the threads here do
    workers: Workers | None  # processes that encode; None: the threads here do
    input_shape: tuple[int, ...]
    ready: bool  # the images are the model's inputs already: float, not to be normalised
    model: nn.Module
    forward: Forward
    capture: Capture
    captured: Sequence[Captured]  # one a layer
    device: torch.device
    budget: FailureBudget
    checksums: bool  # whether a shard is recorded with the SHA-256 of its file


@dataclass(slots=True)
class Tally:
    """What a run counts as it goes: busy seconds of each stage (summed over its threads), failures, shards."""

    busy: dict[str, float] = field(default_factory=dict)
    threads: dict[str, int] = field(default_factory=dict)
    failures: list[tuple[str, str]] = field(default_factory=list)
    failed: int = 0
    seen: int = 0
    smallest_batch: int = 0
    nonfinite: dict[str, list[str]] = field(default_factory=dict)  # the first keys of each layer that has such values
    records: list[ShardRecord] = field(default_factory=list)
    moves: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, stage: str, seconds: float) -> None:
        with self._lock:
            self.busy[stage] = self.busy.get(stage, 0.0) + seconds
            self.moves += 1


def check_budget(budget: FailureBudget, tally: Tally) -> None:
    """Raises TooManyFailures where more images failed than the budget allows."""
    if budget.exceeded(tally.failed, tally.seen):
        first = "The first of this run: {!r}: {}. ".format(*tally.failures[0]) if tally.failures else ""
        raise TooManyFailures(
            f"{tally.failed} of {tally.seen} images failed, more than --max-failures {budget} allows. {first}"
            "The same command resumes; --max-failures sets another budget."
        )


def run_shards(work: Work, directory: Path, shards: Sequence[range], progress: Progress, tally: Tally) -> None:
    """Extract the rows of `shards` and publish each as a file in `directory`, in order.

    Raises TooManyFailures, NoSpace, DeviceLost, CaptureError, or what else went wrong; published shards stay, the
    shard in flight leaves no file. No thread of it is alive afterwards, unless it hangs in foreign code. Notes on what
    is being waited for, when nothing has moved for long, come from a thread of their own.
    """
    pipeline = _Pipeline(work, directory, tally)
    watch = Watch(lambda: tally.moves, pipeline.waits_for, progress.note)
    try:
        with numerics(work.plan.precision, work.device):
            for shard in shards:
                pipeline.extract(shard, shards, progress)
        pipeline.finish()
    except BaseException as error:
        pipeline.abort()
        cause = error
        if isinstance(error, Closed) and pipeline.failure is not None:
            cause = pipeline.failure  # a stage failed and closed the queues: its error is the one to tell
        if (told := lost(cause)) is not None:
            raise told from cause
        if cause is not error:
            raise cause from None
        raise
    finally:
        watch.stop()
        pipeline.close()


class Nonfinite:
    """Counts NaN and infinite values where no axis is known as the channel, so that nothing else can be counted."""

    def __init__(self) -> None:
        self._counts: list[torch.Tensor] = []
        self._valid: list[bool] = []
        self._rows: list[int] = []

    def update(self, rows: torch.Tensor, first_row: int, valid: Sequence[bool]) -> None:
        """`rows` (B, …) are the rows from `first_row` on; those not `valid` are left out. No wait for a device."""
        if not rows.is_floating_point():
            return
        self._counts.append((~rows.isfinite()).reshape(len(rows), -1).sum(1))
        self._valid += valid
        self._rows += range(first_row, first_row + len(rows))

    def _per_row(self) -> np.ndarray[Any, Any]:
        counts = torch.cat(self._counts).cpu().numpy() if self._counts else np.zeros(0, np.int64)
        return np.where(self._valid, counts, 0)

    def result(self) -> int:
        return int(self._per_row().sum())

    def nonfinite_rows(self) -> list[int]:
        """The first rows with such values."""
        return [self._rows[i] for i in np.flatnonzero(self._per_row())[:FIRST]]


# ---------------------------------------------------------------------------------------------- decode


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What became of a row: the size of its image, the file that was read, and why it failed, if it did."""

    height: int
    width: int
    file: FileStamp
    error: SampleError | None = None


@dataclass(slots=True)
class _Decoding:
    """A batch on its way: `outcomes` are those of `rows`, a few in each."""

    rows: range
    buffer: torch.Tensor
    outcomes: list[Future[list[_Outcome]]]


class _Decoder:
    """Decodes rows into batch buffers on a pool of threads, before they are needed.

    Where the source bears it these threads read the rows as well. Else the caller's thread does, or waits for the
    processes that do, one batch ahead: while a device computes, or the codec works on the batch before.
    """

    def __init__(self, work: Work, pool: Pool, moves: Transfers, in_flight: InFlight, tally: Tally) -> None:
        self._work, self._pool, self._moves, self._in_flight, self._tally = work, pool, moves, in_flight, tally
        self._shape = (work.plan.batch_size, *work.input_shape)
        self._ahead: deque[_Decoding] = deque()
        self._to_come: Iterator[range] = iter(())
        self._serial = work.reader.serial
        self._read: Iterator[Any] = iter(())
        self._under_way: deque[Future[Any]] = deque()  # what was read by this thread, and may not be decoded yet

    def start(self, shards: Sequence[range]) -> None:
        """The batches to decode: those of the shards in order, none crossing a shard."""
        size = self._work.plan.batch_size
        self._to_come = (
            range(a, min(a + size, shard.stop)) for shard in shards for a in range(shard.start, shard.stop, size)
        )
        if self._serial:
            self._read = self._work.reader.ahead(chain.from_iterable(shards))
            self._schedule_next()
        self.go_on()

    def go_on(self) -> None:
        """Start decoding the batches that should be under way now."""
        while not self._serial and len(self._ahead) < self._moves.ahead and self._schedule_next():
            pass

    def take(self) -> _Decoding:
        """The next batch, finished or not."""
        if self._serial:
            self._schedule_next()
        return self._ahead.popleft()

    def _schedule_next(self) -> bool:
        """Whether there was another batch."""
        rows = next(self._to_come, None)
        if rows is not None:
            self._ahead.append(self._schedule(rows))
        return rows is not None

    def _schedule(self, rows: range) -> _Decoding:
        buffer = self._moves.input_buffer(self._shape, torch.float32 if self._work.ready else torch.uint8)
        buffer[len(rows) :].zero_()  # a short batch is padded with black images
        # Several rows a task: of tiny images the hand-over would cost as much as the decoding.
        step = rows_a_task(len(rows), self._work.plan.threads, self._work.jpegs)
        tasks = [rows[at : at + step] for at in range(0, len(rows), step)]
        return _Decoding(rows, buffer, [self._submit(task, buffer[task.start - rows.start :]) for task in tasks])

    def _submit(self, rows: range, into: torch.Tensor) -> Future[list[_Outcome]]:
        if not self._serial:
            return self._pool.submit(self._load_and_decode, rows, into)
        if len(self._under_way) > 2 * self._work.plan.threads:  # or what was read would gather here
            wait([self._under_way.popleft()])
        task = self._pool.submit(self._decode_all, rows, into, [self._read_next(row) for row in rows])
        self._under_way.append(task)
        return task

    def _read_next(self, row: int) -> Any:
        """What the user's code gives for `row`."""
        started = time.perf_counter()
        self._in_flight.begin(row)
        try:
            return next(self._read)
        finally:
            self._in_flight.end()
            self._tally.add("read", time.perf_counter() - started)

    # ---- the threads of the pool

    def _load_and_decode(self, rows: range, into: torch.Tensor) -> list[_Outcome]:
        if self._work.jpegs is None or self._work.ready:
            return [self._decode(row, into[i], self._loaded(row)) for i, row in enumerate(rows)]
        return self._decode_all(rows, into, [self._loaded(row) for row in rows])

    def _decode_all(self, rows: range, into: torch.Tensor, loaded: Sequence[Any]) -> list[_Outcome]:
        decoded: Sequence[decoding.Decoded | None] = [None] * len(rows)
        if self._work.jpegs is not None and not self._work.ready:
            started = time.perf_counter()
            self._in_flight.begin(*rows)
            try:
                if not isinstance(self._work.jpegs, Jpegs):  # those processes read files themselves
                    loaded = [_in_memory(item) for item in loaded]
                decoded = self._work.jpegs.decode(loaded, self._work.preprocess, into)
            finally:
                self._in_flight.end()
                self._tally.add("decode", time.perf_counter() - started)
        return [
            _Outcome(*made) if made is not None else self._decode(row, into[i], loaded[i])
            for i, (row, made) in enumerate(zip(rows, decoded, strict=True))
        ]

    def _loaded(self, row: int) -> Any:
        """The file, for a process that reads it; else what is in it, or the SampleError that loading it raised."""
        if isinstance(self._work.jpegs, Jpegs) and (file := on_disk(self._work.source, row)) is not None:
            return file
        started = time.perf_counter()
        self._in_flight.begin(row)
        try:
            return self._work.reader.load(row)
        except SampleError as error:
            return error
        finally:
            self._in_flight.end()
            self._tally.add("decode", time.perf_counter() - started)

    def _decode(self, row: int, into: torch.Tensor, loaded: Any) -> _Outcome:
        started, file = time.perf_counter(), FileStamp()
        self._in_flight.begin(row)
        try:
            data = content(loaded)
            file = stamp(data)
            image = self._work.reader.decode(data)
            if image.ready != self._work.ready or image.pixels.shape != into.shape:
                raise SampleError(
                    Status.UNDECODABLE,
                    f"gives an input of {tuple(image.pixels.shape)}, expected {tuple(into.shape)} as the first image",
                )
            np.copyto(into.numpy(), image.pixels.numpy())  # of tiny images torch's copy costs more than decoding
            return _Outcome(image.height, image.width, file)
        except SampleError as error:
            into.zero_()  # a failed row keeps its place as a black image
            return _Outcome(0, 0, file, error)
        finally:
            self._in_flight.end()
            self._tally.add("decode", time.perf_counter() - started)


def _in_memory(item: Any) -> Any:
    """What a row holds, read where it is a file, or the SampleError that says why it cannot be had."""
    try:
        return content(item)
    except SampleError as error:
        return error


# ------------------------------------------------------------------------------------------------ write


@dataclass(slots=True)
class _Captured:
    """The activations of some rows of a batch, on their way to the host."""

    download: Download
    failed: list[bool]


@dataclass(slots=True)
class _ShardEnd:
    """All rows of a shard have been captured: what stands beside its activations."""

    rows: range
    samples: SampleTable
    stats: Mapping[str, Mapping[str, np.ndarray[Any, Any]]]
    layer_attrs: Mapping[str, Mapping[str, Any]]
    batch_size: int


@dataclass(slots=True)
class _Pending:
    """Some chunks and, once they are encoded, what is stored of each."""

    cut: Sequence[chunks.Chunk]
    encoded: Future[list[chunks.Encoded]]


@dataclass(slots=True)
class _Finished:
    """A shard that is written and closed under its temporary name.

    `digests` are that of its content and its SHA-256 or "", once it is durable.
    """

    path: Path
    rows: range
    statuses: Sequence[int]
    digests: Callable[[], tuple[str, str]]
    batch_size: int
    chunk_digests: Mapping[str, str]


class _Publisher:
    """Makes shards durable, names and records them, in order, while the next one is written.

    That is waiting for the disk, and for a checksum over all of it: nothing that HDF5 or the encoders should wait for.
    """

    def __init__(self, work: Work, directory: Path, tally: Tally) -> None:
        self._work, self._directory, self._tally = work, directory, tally

    def publish(self, shard: _Finished) -> None:
        started = time.perf_counter()
        final = self._directory / shard_name(shard.rows.start // self._work.plan.shard_rows)
        content_digest, sha256 = shard.digests()
        durable.publish(shard.path, final)
        record = record_shard(
            final,
            rows=shard.rows,
            statuses=shard.statuses,
            content_digest=content_digest,
            batch_size=shard.batch_size,
            extra={"chunks": shard.chunk_digests},
            sha256=sha256,
        )
        self._tally.records.append(record)
        self._tally.add("publish", time.perf_counter() - started)


class _Writer:
    """The one thread that owns HDF5: opens, fills and finishes one shard after the other."""

    def __init__(
        self,
        work: Work,
        directory: Path,
        shards: Iterator[range],
        tally: Tally,
        pool: Pool,
        finished: Callable[[_Finished], None],
    ) -> None:
        self._work, self._directory, self._shards, self._tally, self._pool = work, directory, shards, tally, pool
        self._finished = finished
        self._open: ShardWriter | None = None
        self._paths: list[Path] = []
        self._overflowed: dict[str, int] = {}
        self._since, self._busy = time.perf_counter(), dict[str, float]()
        self.now = "encode"

    def write(self, item: _Pending | _ShardEnd) -> None:
        if isinstance(item, _ShardEnd):
            self.now = "write"
            started = time.perf_counter()
            done = self._finish(item)
            self._tally.add("write", time.perf_counter() - started)
            self._finished(done)
        else:
            encoded = item.encoded.result()
            self.now = "write"
            started = time.perf_counter()
            writer = self._current()
            for chunk, made in zip(item.cut, encoded, strict=True):
                self._count_overflow(chunk.layer, made.overflowed)
                writer.write_chunk(chunk.layer, chunk.at, made.payload, made.digest)
            self._tally.add("write", time.perf_counter() - started)
        self.now = "encode"

    def _current(self) -> ShardWriter:
        if self._open is None:
            rows = next(self._shards)
            plan = self._work.plan
            path = durable.temporary_name(self._directory / shard_name(rows.start // plan.shard_rows))
            self._open = ShardWriter(path, rows, plan.layers, self._work.info, plan.codec, plan.level)
            self._paths.append(path)
        return self._open

    def _count_overflow(self, layer: int, count: int) -> None:
        if not count:
            return
        name = self._work.plan.layers[layer].name
        if not self._work.plan.clip:
            raise ConfigError(
                f"layer {name!r} has values beyond ±{chunks.FLOAT16_MAX:.0f}, which float16 cannot hold. Use --store"
                " float32, or --clip to store the largest float16 instead (how many were clipped stands in the file)."
            )
        self._overflowed[name] = self._overflowed.get(name, 0) + count

    def _finish(self, end: _ShardEnd) -> _Finished:
        writer = self._current()
        attrs = {name: dict(values) for name, values in end.layer_attrs.items()}
        for name, count in self._overflowed.items():
            attrs.setdefault(name, {})["clipped"] = np.int64(count)
        smaller = {f"{end.rows.start}-{end.rows.stop - 1}": end.batch_size}
        root: dict[str, Any] = {"throughput": self._throughput(len(end.rows))}
        if end.batch_size < self._work.plan.batch_size:
            root["smaller_batches"] = smaller
        digests = self._closed(writer, end.samples, end.stats, attrs, root)
        self._open, self._overflowed = None, {}
        return _Finished(writer.path, end.rows, end.samples.status, digests, end.batch_size, writer.chunk_digests())

    def _closed(
        self,
        writer: ShardWriter,
        samples: SampleTable,
        stats: layout.Stats,
        attrs: Mapping[str, Mapping[str, Any]],
        root: Mapping[str, Any],
    ) -> Callable[[], tuple[str, str]]:
        """Close the shard, with what stands beside its chunks; gives what waits for its digests.

        With processes one of them does that, beside the chunks of the next shard: it is thousands of small steps.
        """
        workers = self._work.workers
        if workers is not None:
            left, summed = writer.leave(), self._work.checksums
            return self._pool.submit(workers.finish, left, samples, stats, attrs, root, summed).result
        digest = writer.finish(samples, stats, attrs, root, durable=False)
        sha256 = self._pool.submit(file_sha256, writer.path) if self._work.checksums else None

        def wait() -> tuple[str, str]:
            durable.make_durable(writer.path)
            return digest, sha256.result() if sha256 is not None else ""

        return wait

    def _throughput(self, images: int) -> dict[str, Any]:
        """Of this shard: seconds since the one before, and busy seconds of each stage, summed over its threads."""
        now, busy = time.perf_counter(), dict(self._tally.busy)
        spent = {stage: round(seconds - self._busy.get(stage, 0.0), 3) for stage, seconds in busy.items()}
        said = {"images": images, "seconds": round(now - self._since, 3), "busy_seconds": spent}
        self._since, self._busy = now, busy
        return said

    def abort(self) -> None:
        """Leave no file of a shard that was not published."""
        if self._open is not None:
            self._open.abort()
        for path in self._paths:
            with suppress(OSError):
                path.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------- pipeline


class _Pipeline:
    """The threads and queues of one run, and the forward passes between them."""

    def __init__(self, work: Work, directory: Path, tally: Tally) -> None:
        self._work, self._directory, self._tally = work, directory, tally
        plan = work.plan
        self._micro = plan.batch_size
        self._moves = transfers_for(work.device, DEPTH)
        self._decode_pool = thread_pool("fmextract-decode", plan.threads)
        self._encode_pool = thread_pool("fmextract-encode", plan.threads)
        tally.threads |= {"decode": plan.threads, "forward": 1, "encode": plan.threads, "write": 1, "publish": 1}
        tally.threads |= {"statistics": plan.threads, "read": 1}
        self._captured: Channel[_Captured | _ShardEnd | None] = Channel(DEPTH + 1)
        self._pending: Channel[_Pending | _ShardEnd | None] = Channel(most_pending(plan.threads))
        self._finished: Channel[_Finished | None] = Channel(1)
        self.failure: BaseException | None = None
        self._threads: list[tuple[threading.Thread, threading.Event]] = []
        self._in_flight = InFlight(directory)
        self._decoder = _Decoder(work, self._decode_pool, self._moves, self._in_flight, tally)
        self._encode_all = work.workers.encoder(plan) if work.workers is not None else chunks.Encoder(plan).all
        self._describing: list[Future[None]] = []
        self._now, self._publishing = "decode", False
        self._gave_back, self._patience = -math.inf, GIVING_BACK[0]
        self._writer: _Writer | None = None

    # ---- the caller's thread

    def extract(self, shard: range, shards: Sequence[range], progress: Progress) -> None:
        """Decode, run and capture the rows of one shard; the other threads store them meanwhile."""
        if not self._threads:
            self._decoder.start(shards)
            self._start(iter(shards))
        source, plan = self._work.source, self._work.plan
        samples = SampleTable.empty(shard.start, [source.key(r) for r in shard], None)
        stats = [self._statistics(*one) for one in zip(self._work.captured, plan.layers, strict=True)]
        smallest = plan.batch_size
        for _ in range(0, len(shard), plan.batch_size):
            self._now = "decode"
            batch = self._decoder.take()
            self._collect(batch, samples)
            self._run(batch, samples, stats)
            smallest = min(smallest, self._micro)
            progress.advance(len(batch.rows), self._tally.failed)
            check_budget(self._work.budget, self._tally)
        self._described()
        samples.labels = [source.label(r) for r in shard]  # a Dataset knows them once its items were loaded
        samples.columns = {name: [column[r] for r in shard] for name, column in columns_of(source).items()}
        self._tally.smallest_batch = smallest
        self._captured.put(self._shard_end(shard, samples, stats, smallest))

    def _shard_end(
        self, shard: range, samples: SampleTable, stats: Sequence[RunningStats | Nonfinite], batch_size: int
    ) -> _ShardEnd:
        """The one place where the host waits for the device's statistics, once a shard."""
        arrays: dict[str, dict[str, np.ndarray[Any, Any]]] = {}
        attrs: dict[str, dict[str, Any]] = {}
        whole = len(shard) == self._work.plan.rows
        for spec, running in zip(self._work.plan.layers, stats, strict=True):
            if isinstance(running, RunningStats):
                found = running.result()
                # What there is to merge with other shards is kept no longer where there are none.
                arrays[spec.name], attrs[spec.name] = settled(found) if whole else (found, {})
                count = int(arrays[spec.name]["nonfinite"].sum())
            else:
                count = running.result()
                attrs[spec.name] = {"nonfinite": np.int64(count)}
            if count:
                known = self._tally.nonfinite.setdefault(spec.name, [])
                known += [samples.keys[row - shard.start] for row in running.nonfinite_rows()]
        return _ShardEnd(shard, samples, arrays, attrs, batch_size)

    def _statistics(self, captured: Captured, spec: LayerSpec) -> RunningStats | Nonfinite:
        if {"channel", "feature"} & set(captured.axes):
            top, device = self._work.plan.top, self._work.device
            return RunningStats(captured.shape, captured.axes, top, device, spec.near_zero_below)
        return Nonfinite()

    def _collect(self, batch: _Decoding, samples: SampleTable) -> None:
        """Wait for the images of a batch; note size, file and failure of each."""
        outcomes = [outcome for task in batch.outcomes for outcome in task.result()]
        for row, outcome in zip(batch.rows, outcomes, strict=True):
            i = row - samples.start
            samples.height[i], samples.width[i], samples.files[i] = outcome.height, outcome.width, outcome.file
            if outcome.error is not None:
                self._fail(samples, row, outcome.error)
        self._tally.seen += len(batch.rows)

    def _fail(self, samples: SampleTable, row: int, error: SampleError) -> None:
        i = row - samples.start
        samples.status[i], samples.message[i] = int(error.status), str(error)
        self._tally.failed += 1
        if len(self._tally.failures) < 20:
            self._tally.failures.append((samples.keys[i], str(error)))

    def _run(self, batch: _Decoding, samples: SampleTable, stats: Sequence[RunningStats | Nonfinite]) -> None:
        """Forward a batch, in pieces of `self._micro` rows where memory forced that, and hand its activations on."""
        self._now = "store"
        self._described()
        self._moves.reserve()
        self._give_back()
        pixels = self._moves.upload(batch.buffer)
        inputs = self._inputs(pixels)
        at = 0
        while at < len(batch.rows):
            piece = slice(at, at + self._micro)
            rows = batch.rows[piece]
            self._moves.reserve()
            self._now = "forward"
            try:
                tensors = self._forward(inputs[piece], rows, samples, partial(self._inputs, pixels, piece))
            except (torch.OutOfMemoryError, MemoryError) as error:
                self._halve(error)
                tensors = None
            if tensors is None:  # only here: the error holds on to the frames of the pass, and they to its activations
                inputs = self._inputs(pixels)
                continue
            failed = [samples.status[row - samples.start] != Status.OK for row in rows]
            kept = [tensor[: len(rows)] for tensor in tensors]
            self._describe(stats, kept, rows.start, [not bad for bad in failed])
            kept = [t if c.finish is None else c.finish(t) for t, c in zip(kept, self._work.captured, strict=True)]
            self._now = "store"
            at += len(rows)
            if at == len(batch.rows):
                self._decoder.go_on()  # on a CPU the next images are decoded beside the codec, not the forward pass
            self._captured.put(_Captured(self._moves.download(kept), failed))

    def _describe(
        self, stats: Sequence[RunningStats | Nonfinite], rows: Sequence[torch.Tensor], first: int, valid: Sequence[bool]
    ) -> None:
        """Bring the statistics up to date: on a device in its stream, on a CPU on the pool, one layer a thread.

        A layer's batches stay in order, since those of the batch before are waited for.
        """
        if self._work.device.type != "cpu":
            for running, tensor in zip(stats, rows, strict=True):
                running.update(tensor, first, valid)
            return
        self._described()
        self._describing = [
            self._encode_pool.submit(self._timed_update, running, tensor, first, valid)
            for running, tensor in zip(stats, rows, strict=True)
        ]

    def _timed_update(
        self, running: RunningStats | Nonfinite, rows: torch.Tensor, first: int, valid: Sequence[bool]
    ) -> None:
        started = time.perf_counter()
        running.update(rows, first, valid)
        self._tally.add("statistics", time.perf_counter() - started)

    def _described(self) -> None:
        """Wait for the statistics of the batch before."""
        waiting, self._describing = self._describing, []
        for future in waiting:
            future.result()

    def _inputs(self, pixels: torch.Tensor, piece: slice = slice(None)) -> torch.Tensor:
        if self._work.ready:
            made = pixels.clone()
        else:
            assert isinstance(self._work.preprocess, Preprocess)
            made = preprocessing.normalise(pixels, self._work.preprocess)
        return to_memory_format(made, self._work.plan.memory_format)[piece]

    def _give_back(self) -> None:
        """Between two batches, more and more seldom: what the first ones leave behind is what would add up."""
        now = time.perf_counter()
        if self._work.device.type == "cpu" and now - self._gave_back > self._patience:
            give_back_freed_memory()
            self._gave_back, self._patience = now, min(2 * self._patience, GIVING_BACK[1])

    def _halve(self, error: BaseException) -> None:
        if self._micro == 1:
            raise DeviceLost(TOO_SMALL.format(error)) from error
        self._micro = (self._micro + 1) // 2

    def _forward(
        self, inputs: torch.Tensor, rows: range, samples: SampleTable, again: Callable[[], torch.Tensor]
    ) -> list[torch.Tensor]:
        """The captured tensors. `again` makes the inputs anew: a model may write into them before it fails."""
        try:
            return self._work.capture.forward(self._work.forward, inputs)
        except (CaptureError, ConfigError, torch.OutOfMemoryError, MemoryError):  # a ConfigError: it cannot be compiled
            raise
        except Exception as error:
            _raise_if_no_image_is_to_blame(error)
            why = blame.told(error, self._work.model)
        # Only here: the error holds on to the frames of the pass, and they to its activations.
        return self._one_by_one(again(), rows, samples, why)

    def _one_by_one(self, inputs: torch.Tensor, rows: range, samples: SampleTable, why: str) -> list[torch.Tensor]:
        """The batch made the model raise: run each image among black ones, and fail those that raise alone.

        Position and neighbours never change a bit of a row, so the others come out as they would have. Raises
        MemoryError, DeviceLost or CaptureError for what no image is to blame for.
        """
        neutral = torch.zeros_like(inputs)
        try:
            made = [t.clone() for t in self._work.capture.forward(self._work.forward, neutral.clone())]
        except Exception as error:
            _raise_if_no_image_is_to_blame(error)
            raise CaptureError(
                f"the model fails on any input from row {rows.start} on, also on black images, though it did not before"
                f" the run: {why} What is done is kept."
            ) from error
        for i, row in enumerate(rows):
            if samples.status[row - samples.start] != Status.OK:
                continue
            alone = neutral.clone()
            alone[i] = inputs[i]
            try:
                tensors = self._work.capture.forward(self._work.forward, alone)
            except CaptureError:
                raise
            except Exception as its:  # whatever else a model raises for this one image is that image's verdict
                _raise_if_no_image_is_to_blame(its)
                self._fail(samples, row, SampleError(Status.FORWARD_FAILED, f"{type(its).__name__}: {its}"))
                continue
            for kept, tensor in zip(made, tensors, strict=True):
                kept[i] = tensor[i]
        return made

    # ---- the other threads

    def _start(self, shards: Iterator[range]) -> None:
        self._writer = _Writer(self._work, self._directory, shards, self._tally, self._encode_pool, self._finished.put)
        for name, work in (("cut", self._cut), ("write", self._write), ("publish", self._publish)):
            ended = threading.Event()
            thread = threading.Thread(target=self._guarded, args=(work, ended), name=f"fmextract-{name}", daemon=True)
            thread.start()
            self._threads.append((thread, ended))

    def _guarded(self, work: Callable[[], None], ended: threading.Event) -> None:
        try:
            with suppress(Closed):
                work()
        except BaseException as error:  # kept for the caller's thread, which raises it
            self.failure = self.failure or error
            self._close_channels()
        finally:
            ended.set()

    def _await_threads(self) -> None:
        for thread, ended in self._threads:
            # Not `join` alone: one that Ctrl-C interrupts takes the thread for ended (CPython before 3.13), and the
            # next returns while the shard is still being written.
            ended.wait()
            thread.join()

    def _cut(self) -> None:
        one_torch_thread()  # it copies a few rows at most
        cutters = [chunks.Cutter(i, spec) for i, spec in enumerate(self._work.plan.layers)]
        while (item := self._captured.get()) is not None:
            if isinstance(item, _ShardEnd):
                self._submit([chunk for cutter in cutters for chunk in cutter.flush()], lambda: None)
                self._pending.put(item)
                cutters = [chunks.Cutter(i, spec) for i, spec in enumerate(self._work.plan.layers)]
            else:
                tensors = item.download.wait()
                self._count(item.download)
                cut = [c for cutter, t in zip(cutters, tensors, strict=True) for c in cutter.add(t, item.failed)]
                self._submit(cut, item.download.release)
        self._pending.put(None)

    def _count(self, download: Download) -> None:
        """On a device reducers and statistics are in its stream, and count as the forward pass."""
        self._tally.add("forward", download.computing)
        if download.copying:
            self._tally.add("download", download.copying)

    def _submit(self, cut: Sequence[chunks.Chunk], release: Callable[[], None]) -> None:
        """Encode on the pool; `release` once the last of these chunks no longer needs its tensors."""
        some = tasks(cut, self._work.plan.threads, CHUNKS_A_TASK if self._work.workers is None else CHUNKS_A_PROCESS)
        done = _Countdown(len(some), release)
        for task in some:
            self._pending.put(_Pending(task, self._encode_pool.submit(self._encode, task, done)), len(task))

    def _encode(self, task: Sequence[chunks.Chunk], done: Callable[[], None]) -> list[chunks.Encoded]:
        started = time.perf_counter()
        try:
            return self._encode_all(task)
        finally:
            done()
            self._tally.add("encode", time.perf_counter() - started)

    def _write(self) -> None:
        assert self._writer is not None
        while (item := self._pending.get()) is not None:
            self._writer.write(item)
        self._finished.put(None)

    def _publish(self) -> None:
        publisher = _Publisher(self._work, self._directory, self._tally)
        while (shard := self._finished.get()) is not None:
            self._publishing = True
            publisher.publish(shard)
            self._publishing = False

    # ---- the end

    def finish(self) -> None:
        """Wait until everything is stored. Raises what a stage raised."""
        self._now = "store"
        if self._threads:
            self._captured.put(None)
        self._await_threads()
        if self.failure is not None:
            raise self.failure

    def abort(self) -> None:
        """Drop what is in flight; the shard being written leaves no file."""
        self._close_channels()
        self._await_threads()
        if self._writer is not None:
            self._writer.abort()

    def close(self) -> None:
        for pool in (self._decode_pool, self._encode_pool):
            pool.close(HANGING)
        self._in_flight.close()

    def waits_for(self) -> str:
        """The stage that holds up all others, for a person."""
        if self._now == "decode":
            rows = [f"{self._work.source.key(row)!r} (for {s:.0f} s)" for row, s in self._in_flight.rows()[:FIRST]]
            return f"images to be read and decoded: {', '.join(rows) or 'none is being decoded'}"
        if self._now == "forward" or self._writer is None:
            return "a forward pass of the model"
        if self._publishing or self._writer.now == "write":
            return f"the disk of {self._directory}"
        return "chunks to be encoded"

    def _close_channels(self) -> None:
        self._moves.close()
        self._captured.close()
        self._pending.close()
        self._finished.close()


def _raise_if_no_image_is_to_blame(error: Exception) -> None:
    """MemoryError for memory that ran out, of which smaller batches need less; DeviceLost for a device that failed."""
    if is_out_of_memory(error):
        raise MemoryError(str(error)) from error
    if (told := lost(error)) is not None:
        raise told from error


def most_pending(threads: int) -> int:
    """Chunks, of at most about 1 MiB, that may be in encoding or wait for the disk: none of `threads` runs dry."""
    return max(64, 12 * threads)


def rows_a_task(rows: int, threads: int, jpegs: device_jpegs.DeviceJpegs | Jpegs | None) -> int:
    """How many of the `rows` of a batch one task decodes."""
    if isinstance(jpegs, device_jpegs.DeviceJpegs):
        least, most = ROWS_A_DEVICE_TASK
        return min(most, max(least, rows // threads))
    return max(1, min(ROWS_A_TASK, rows // ((4 if jpegs is None else 2) * threads)))


def tasks(cut: Sequence[chunks.Chunk], threads: int, most: int) -> list[Sequence[chunks.Chunk]]:
    """Chunks by tasks: few enough to save hand-overs, and enough to keep all threads busy until the last is done."""
    step = max(1, min(most, len(cut) // (4 * threads)))
    return [cut[at : at + step] for at in range(0, len(cut), step)]


class _Countdown:
    """Calls `action` when it was called as often as there are tasks; at once where there are none."""

    def __init__(self, tasks: int, action: Callable[[], None]) -> None:
        self._left, self._action, self._lock = tasks, action, threading.Lock()
        if not tasks:
            action()

    def __call__(self) -> None:
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._action()


def thread_pool(name: str, threads: int) -> Pool:
    """Threads whose torch operations do not start teams of threads of their own: the pool is the parallelism."""
    before = torch.get_num_threads()
    pool = Pool(name, threads, begin=one_torch_thread)
    # Each thread has its own number, but what is set last is what new threads begin with: say what holds for them.
    torch.set_num_threads(before)
    return pool


def one_torch_thread() -> None:
    """The operations of the thread that calls this start no team of threads."""
    # Asked first: a thread that torch has not seen yet takes, at its first operation, the number that was set last,
    # in whatever thread.
    torch.get_num_threads()
    torch.set_num_threads(1)
