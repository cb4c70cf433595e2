"""From captured activations to published shards, each step on threads of its own.

download → cut into chunks (a thread) → encode (a pool) → write (a thread) → publish (a thread)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from fmextract.pipeline import chunks
from fmextract.pipeline.channel import Channel, Closed
from fmextract.pipeline.threads import Pool, one_torch_thread
from fmextract.pipeline.transfers import Download, Transfers
from fmextract.pipeline.work import Tally, Work
from fmextract.pipeline.write import Finished, Pending, Publisher, ShardEnd, Writer

DEPTH = 2  # batches of activations of an accelerator on the host: one being encoded, one arriving


CHUNKS_A_TASK = 4  # at most; of small maps the hand-over of a chunk costs a tenth of the encoding


CHUNKS_A_PROCESS = 8  # at most, where a task goes to another process


@dataclass(slots=True)
class _Arriving:
    """The activations of some rows of a batch, on their way to the host."""

    download: Download
    failed: list[bool]


class Storing:
    """The threads and queues behind the forward passes. The first error of any of them ends all, and is `failure`."""

    def __init__(self, work: Work, directory: Path, tally: Tally, pool: Pool, transfers: Transfers) -> None:
        self._work, self._directory, self._tally, self._pool = work, directory, tally, pool
        self._transfers = transfers
        self._arriving: Channel[_Arriving | ShardEnd | None] = Channel(DEPTH + 1)
        self._pending: Channel[Pending | ShardEnd | None] = Channel(most_pending(work.plan.threads))
        self._finished: Channel[Finished | None] = Channel(1)
        self._encode_all = (
            work.workers.encoder(work.plan) if work.workers is not None else chunks.Encoder(work.plan).all
        )
        self._writer: Writer | None = None
        self._publishing = False
        self._threads: list[tuple[threading.Thread, threading.Event]] = []
        self.failure: BaseException | None = None

    # ---- the caller's thread

    def start(self, shards: Iterable[range]) -> None:
        """Begin, with the rows of `shards` in order."""
        self._writer = Writer(self._work, self._directory, iter(shards), self._tally, self._pool, self._finished.put)
        for name, step in (("cut", self._cut), ("write", self._write), ("publish", self._publish)):
            ended = threading.Event()
            thread = threading.Thread(target=self._guarded, args=(step, ended), name=f"fmextract-{name}", daemon=True)
            thread.start()
            self._threads.append((thread, ended))

    def put(self, tensors: Sequence[torch.Tensor], failed: list[bool]) -> None:
        """Store the next rows: one tensor (rows, …) a layer, in the memory of the device. Waits while many are there.

        Raises Closed where a thread failed.
        """
        self._arriving.put(_Arriving(self._transfers.download(tensors), failed))

    def end_shard(self, end: ShardEnd) -> None:
        """All rows of a shard were put."""
        self._arriving.put(end)

    def finish(self) -> None:
        """Wait until everything is stored. Raises what a thread raised."""
        if self._threads:
            self._arriving.put(None)
        self._await_threads()
        if self.failure is not None:
            raise self.failure

    def abort(self) -> None:
        """Drop what is in flight; the shard being written leaves no file."""
        self._close()
        self._await_threads()
        if self._writer is not None:
            self._writer.abort()

    def waits_for(self) -> str:
        """What holds it up, for a person; nothing before it has begun."""
        if self._writer is None:
            return ""
        if self._publishing or self._writer.now == "write":
            return f"the disk of {self._directory}"
        return "chunks to be encoded"

    def _await_threads(self) -> None:
        for thread, ended in self._threads:
            # Not `join` alone: one that Ctrl-C interrupts takes the thread for ended (CPython before 3.13), and the
            # next returns while the shard is still being written.
            ended.wait()
            thread.join()

    def _close(self) -> None:
        self._transfers.close()
        self._arriving.close()
        self._pending.close()
        self._finished.close()

    # ---- its threads

    def _guarded(self, step: Callable[[], None], ended: threading.Event) -> None:
        try:
            with suppress(Closed):
                step()
        except BaseException as error:  # kept for the caller's thread, which raises it
            self.failure = self.failure or error
            self._close()
        finally:
            ended.set()

    def _cut(self) -> None:
        one_torch_thread()  # it copies a few rows at most
        cutters = [chunks.Cutter(i, spec) for i, spec in enumerate(self._work.plan.layers)]
        while (item := self._arriving.get()) is not None:
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
            self._pending.put(Pending(task, self._pool.submit(self._encode, task, done)), len(task))

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
