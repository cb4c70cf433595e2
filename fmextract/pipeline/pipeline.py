"""The staged pipeline: from rows of a source to published shards.

    decode (threads) → forward (the caller's thread) → statistics (threads) → store (`storing`)

Every queue is bounded, rows keep their order, and the first error of any stage ends all of them. What a shard holds
depends on the plan and the images alone, not on the number of threads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fmextract.common.allocator import give_back_freed_memory
from fmextract.common.devices import lost
from fmextract.inputs.sources import columns_of
from fmextract.model.precision import numerics
from fmextract.pipeline.channel import Closed
from fmextract.pipeline.decode import Decoder, Decoding
from fmextract.pipeline.forward import ForwardPasses
from fmextract.pipeline.statistics import ShardStatistics
from fmextract.pipeline.storing import DEPTH, Storing
from fmextract.pipeline.threads import thread_pool
from fmextract.pipeline.transfers import transfers_for
from fmextract.pipeline.watch import InFlight, Watch
from fmextract.pipeline.work import FIRST, Tally, Work, check_budget
from fmextract.pipeline.write import ShardEnd
from fmextract.records import Progress, SampleTable, Status

HANGING = 10.0  # seconds that the end of a run waits for threads in foreign code; then it leaves them behind


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


class _Pipeline:
    """The stages of one run, and what the caller's thread does between them."""

    def __init__(self, work: Work, directory: Path, tally: Tally) -> None:
        self._work, self._tally = work, tally
        threads = work.plan.threads
        self._transfers = transfers_for(work.device, DEPTH)
        self._decode_pool = thread_pool("fmextract-decode", threads)
        self._encode_pool = thread_pool("fmextract-encode", threads)
        tally.threads |= {"decode": threads, "forward": 1, "encode": threads, "write": 1, "publish": 1}
        tally.threads |= {"statistics": threads, "read": 1}
        self._in_flight = InFlight(directory)
        self._decoder = Decoder(work, self._decode_pool, self._transfers, self._in_flight, tally)
        self._forward = ForwardPasses(work, tally)
        self._storing = Storing(work, directory, tally, self._encode_pool, self._transfers)
        self._started = False
        self._now = "decode"
        self._gave_back, self._patience = -math.inf, GIVING_BACK[0]

    @property
    def failure(self) -> BaseException | None:
        """The first error of another thread than the caller's."""
        return self._storing.failure

    def extract(self, shard: range, shards: Sequence[range], progress: Progress) -> None:
        """Decode, run and capture the rows of one shard; the other threads store them meanwhile."""
        if not self._started:
            self._decoder.start(shards)
            self._storing.start(shards)
            self._started = True
        source, plan = self._work.source, self._work.plan
        samples = SampleTable.empty(shard.start, [source.key(r) for r in shard], None)
        statistics = ShardStatistics(self._work, self._encode_pool, self._tally)
        smallest = plan.batch_size
        for _ in range(0, len(shard), plan.batch_size):
            self._now = "decode"
            batch = self._decoder.take()
            self._collect(batch, samples)
            self._run(batch, samples, statistics)
            smallest = min(smallest, self._forward.batch_size)
            progress.advance(len(batch.rows), self._tally.failed)
            check_budget(self._work.budget, self._tally)
        statistics.wait()
        samples.labels = [source.label(r) for r in shard]  # a Dataset knows them once its items were loaded
        samples.columns = {name: [column[r] for r in shard] for name, column in columns_of(source).items()}
        self._tally.smallest_batch = smallest
        arrays, attrs = statistics.result(shard, samples.keys)
        self._storing.end_shard(ShardEnd(shard, samples, arrays, attrs, smallest))

    def _collect(self, batch: Decoding, samples: SampleTable) -> None:
        """Wait for the images of a batch; note size, file and failure of each."""
        outcomes = [outcome for task in batch.outcomes for outcome in task.result()]
        for row, outcome in zip(batch.rows, outcomes, strict=True):
            i = row - samples.start
            samples.height[i], samples.width[i], samples.files[i] = outcome.height, outcome.width, outcome.file
            if outcome.error is not None:
                self._tally.fail(samples, row, outcome.error)
        self._tally.seen += len(batch.rows)

    def _run(self, batch: Decoding, samples: SampleTable, statistics: ShardStatistics) -> None:
        """Forward a batch and hand its activations on, a piece of it at a time where memory forces that."""
        self._now = "store"
        statistics.wait()
        self._transfers.reserve()
        self._give_back()
        pixels = self._transfers.upload(batch.buffer)
        for rows, tensors in self._forward.over(pixels, batch.rows, samples, self._before_pass):
            failed = [samples.status[row - samples.start] != Status.OK for row in rows]
            statistics.update(tensors, rows.start, [not bad for bad in failed])
            stored = self._stored(tensors)
            self._now = "store"
            if rows.stop == batch.rows.stop:
                self._decoder.go_on()  # on a CPU the next images are decoded beside the codec, not the forward pass
            self._storing.put(stored, failed)

    def _before_pass(self) -> None:
        self._transfers.reserve()
        self._now = "forward"

    def _stored(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What is stored of what the layers hand over."""
        return [t if o.finish is None else o.finish(t) for t, o in zip(tensors, self._work.outputs, strict=True)]

    def _give_back(self) -> None:
        """Between two batches, more and more seldom: what the first ones leave behind is what would add up."""
        now = time.perf_counter()
        if self._work.device.type == "cpu" and now - self._gave_back > self._patience:
            give_back_freed_memory()
            self._gave_back, self._patience = now, min(2 * self._patience, GIVING_BACK[1])

    def finish(self) -> None:
        """Wait until everything is stored. Raises what a stage raised."""
        self._now = "store"
        self._storing.finish()

    def abort(self) -> None:
        """Drop what is in flight; the shard being written leaves no file."""
        self._storing.abort()

    def close(self) -> None:
        """End the pools, and leave behind what hangs in them."""
        for pool in (self._decode_pool, self._encode_pool):
            pool.close(HANGING)
        self._in_flight.close()

    def waits_for(self) -> str:
        """The stage that holds up all others, for a person."""
        if self._now == "decode":
            rows = [f"{self._work.source.key(row)!r} (for {s:.0f} s)" for row, s in self._in_flight.rows()[:FIRST]]
            return f"images to be read and decoded: {', '.join(rows) or 'none is being decoded'}"
        if self._now == "store" and (what := self._storing.waits_for()):
            return what
        return "a forward pass of the model"
