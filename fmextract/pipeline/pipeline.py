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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fmextract.capture import blame
from fmextract.capture.inspection import TapOutput
from fmextract.common.allocator import give_back_freed_memory
from fmextract.common.devices import TOO_SMALL, is_out_of_memory, lost
from fmextract.errors import CaptureError, ConfigError, DeviceLost, SampleError
from fmextract.inputs import preprocessing
from fmextract.inputs.sources import columns_of
from fmextract.model.precision import numerics, to_memory_format
from fmextract.pipeline import chunks
from fmextract.pipeline.channel import Channel, Closed
from fmextract.pipeline.decode import Decoder, Decoding
from fmextract.pipeline.running_stats import RunningStats
from fmextract.pipeline.threads import one_torch_thread, thread_pool
from fmextract.pipeline.transfers import Download, transfers_for
from fmextract.pipeline.watch import InFlight, Watch
from fmextract.pipeline.work import FIRST, Nonfinite, Tally, Work, check_budget
from fmextract.pipeline.write import Finished, Pending, Publisher, ShardEnd, Writer
from fmextract.records import LayerSpec, Preprocess, Progress, SampleTable, Status
from fmextract.storage.layer_stats import settled

DEPTH = 2  # batches of activations of an accelerator on the host: one being encoded, one arriving


HANGING = 10.0  # seconds that the end of a run waits for threads in foreign code; then it leaves them behind


CHUNKS_A_TASK = 4  # at most; of small maps the hand-over of a chunk costs a tenth of the encoding


CHUNKS_A_PROCESS = 8  # at most, where a task goes to another process


GIVING_BACK = 0.5, 5.0  # seconds between two times that a CPU's freed memory goes back to the system: first, at most


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


# ------------------------------------------------------------------------------------------------ write


@dataclass(slots=True)
class _Captured:
    """The activations of some rows of a batch, on their way to the host."""

    download: Download
    failed: list[bool]


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
        self._captured: Channel[_Captured | ShardEnd | None] = Channel(DEPTH + 1)
        self._pending: Channel[Pending | ShardEnd | None] = Channel(most_pending(plan.threads))
        self._finished: Channel[Finished | None] = Channel(1)
        self.failure: BaseException | None = None
        self._threads: list[tuple[threading.Thread, threading.Event]] = []
        self._in_flight = InFlight(directory)
        self._decoder = Decoder(work, self._decode_pool, self._moves, self._in_flight, tally)
        self._encode_all = work.workers.encoder(plan) if work.workers is not None else chunks.Encoder(plan).all
        self._describing: list[Future[None]] = []
        self._now, self._publishing = "decode", False
        self._gave_back, self._patience = -math.inf, GIVING_BACK[0]
        self._writer: Writer | None = None

    # ---- the caller's thread

    def extract(self, shard: range, shards: Sequence[range], progress: Progress) -> None:
        """Decode, run and capture the rows of one shard; the other threads store them meanwhile."""
        if not self._threads:
            self._decoder.start(shards)
            self._start(iter(shards))
        source, plan = self._work.source, self._work.plan
        samples = SampleTable.empty(shard.start, [source.key(r) for r in shard], None)
        stats = [self._statistics(*one) for one in zip(self._work.outputs, plan.layers, strict=True)]
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
    ) -> ShardEnd:
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
        return ShardEnd(shard, samples, arrays, attrs, batch_size)

    def _statistics(self, output: TapOutput, spec: LayerSpec) -> RunningStats | Nonfinite:
        if {"channel", "feature"} & set(output.axes):
            top, device = self._work.plan.top_k, self._work.device
            return RunningStats(output.shape, output.axes, top, device, spec.near_zero_below)
        return Nonfinite()

    def _collect(self, batch: Decoding, samples: SampleTable) -> None:
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

    def _run(self, batch: Decoding, samples: SampleTable, stats: Sequence[RunningStats | Nonfinite]) -> None:
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
            kept = [t if c.finish is None else c.finish(t) for t, c in zip(kept, self._work.outputs, strict=True)]
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
        self._writer = Writer(self._work, self._directory, shards, self._tally, self._encode_pool, self._finished.put)
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
            if isinstance(item, ShardEnd):
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
            self._pending.put(Pending(task, self._encode_pool.submit(self._encode, task, done)), len(task))

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
        publisher = Publisher(self._work, self._directory, self._tally)
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
