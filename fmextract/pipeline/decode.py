"""Images of a shard, read and decoded ahead of the forward passes, in order, in bounded memory."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from fmextract.errors import SampleError
from fmextract.inputs import decoding, device_jpegs
from fmextract.inputs.reading import content, stamp
from fmextract.inputs.sources import on_disk
from fmextract.pipeline.threads import Pool
from fmextract.pipeline.transfers import Transfers
from fmextract.pipeline.watch import InFlight
from fmextract.pipeline.work import Outcome, Tally, Work
from fmextract.pipeline.workers import Jpegs
from fmextract.records import FileStamp, Status

ROWS_A_TASK = 8


ROWS_A_DEVICE_TASK = 8, 32  # of JPEGs that are decoded on the device, which does several at once: at least, at most


@dataclass(slots=True)
class Decoding:
    """A batch on its way: `outcomes` are those of `rows`, a few in each."""

    rows: range
    buffer: torch.Tensor
    outcomes: list[Future[list[Outcome]]]


class Decoder:
    """Decodes rows into batch buffers on a pool of threads, before they are needed.

    Where the source bears it these threads read the rows as well. Else the caller's thread does, or waits for the
    processes that do, one batch ahead: while a device computes, or the codec works on the batch before.
    """

    def __init__(self, work: Work, pool: Pool, moves: Transfers, in_flight: InFlight, tally: Tally) -> None:
        self._work, self._pool, self._moves, self._in_flight, self._tally = work, pool, moves, in_flight, tally
        self._shape = (work.plan.batch_size, *work.input_shape)
        self._ahead: deque[Decoding] = deque()
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

    def take(self) -> Decoding:
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

    def _schedule(self, rows: range) -> Decoding:
        buffer = self._moves.input_buffer(self._shape, torch.float32 if self._work.ready else torch.uint8)
        buffer[len(rows) :].zero_()  # a short batch is padded with black images
        # Several rows a task: of tiny images the hand-over would cost as much as the decoding.
        step = rows_a_task(len(rows), self._work.plan.threads, self._work.jpegs)
        tasks = [rows[at : at + step] for at in range(0, len(rows), step)]
        return Decoding(rows, buffer, [self._submit(task, buffer[task.start - rows.start :]) for task in tasks])

    def _submit(self, rows: range, into: torch.Tensor) -> Future[list[Outcome]]:
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

    def _load_and_decode(self, rows: range, into: torch.Tensor) -> list[Outcome]:
        if self._work.jpegs is None or self._work.ready:
            return [self._decode(row, into[i], self._loaded(row)) for i, row in enumerate(rows)]
        return self._decode_all(rows, into, [self._loaded(row) for row in rows])

    def _decode_all(self, rows: range, into: torch.Tensor, loaded: Sequence[Any]) -> list[Outcome]:
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
            Outcome(*done) if done is not None else self._decode(row, into[i], loaded[i])
            for i, (row, done) in enumerate(zip(rows, decoded, strict=True))
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

    def _decode(self, row: int, into: torch.Tensor, loaded: Any) -> Outcome:
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
            return Outcome(image.height, image.width, file)
        except SampleError as error:
            into.zero_()  # a failed row keeps its place as a black image
            return Outcome(0, 0, file, error)
        finally:
            self._in_flight.end()
            self._tally.add("decode", time.perf_counter() - started)


def _in_memory(item: Any) -> Any:
    """What a row holds, read where it is a file, or the SampleError that says why it cannot be had."""
    try:
        return content(item)
    except SampleError as error:
        return error


def rows_a_task(rows: int, threads: int, jpegs: device_jpegs.DeviceJpegs | Jpegs | None) -> int:
    """How many of the `rows` of a batch one task decodes."""
    if isinstance(jpegs, device_jpegs.DeviceJpegs):
        least, most = ROWS_A_DEVICE_TASK
        return min(most, max(least, rows // threads))
    return max(1, min(ROWS_A_TASK, rows // ((4 if jpegs is None else 2) * threads)))
