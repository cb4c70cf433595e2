"""The thread that owns HDF5: chunks into shards, shards published and recorded."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fmextract.errors import ConfigError
from fmextract.pipeline import chunks
from fmextract.pipeline.threads import Pool
from fmextract.pipeline.work import Tally, Work
from fmextract.records import SampleTable
from fmextract.storage import codecs, durable, layout
from fmextract.storage.shards import file_sha256, record_shard, shard_name
from fmextract.storage.writer import ShardWriter

log = logging.getLogger(__name__)


@dataclass(slots=True)
class ShardEnd:
    """All rows of a shard have been captured: what stands beside its activations."""

    rows: range
    samples: SampleTable
    stats: Mapping[str, Mapping[str, np.ndarray[Any, Any]]]
    layer_attrs: Mapping[str, Mapping[str, Any]]
    batch_size: int


@dataclass(slots=True)
class Pending:
    """Some chunks and, once they are encoded, what is stored of each."""

    cut: Sequence[chunks.Chunk]
    encoded: Future[list[chunks.Encoded]]


@dataclass(slots=True)
class Finished:
    """A shard that is written and closed under its temporary name.

    `digests` are that of its content and its SHA-256 or "", once it is durable.
    """

    path: Path
    rows: range
    statuses: Sequence[int]
    digests: Callable[[], tuple[str, str]]
    batch_size: int
    chunk_digests: Mapping[str, str]


class Publisher:
    """Makes shards durable, names and records them, in order, while the next one is written.

    That is waiting for the disk, and for a checksum over all of it: nothing that HDF5 or the encoders should wait for.
    """

    def __init__(self, work: Work, directory: Path, tally: Tally) -> None:
        self._work, self._directory, self._tally = work, directory, tally

    def publish(self, shard: Finished) -> None:
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
        first, last = shard.rows.start, shard.rows.stop - 1
        log.info("published %s: rows %d-%d, %d of them failed", final.name, first, last, record.failed)
        self._tally.add("publish", time.perf_counter() - started)


class Writer:
    """The one thread that owns HDF5: opens, fills and finishes one shard after the other."""

    def __init__(
        self,
        work: Work,
        directory: Path,
        shards: Iterator[range],
        tally: Tally,
        pool: Pool,
        finished: Callable[[Finished], None],
    ) -> None:
        self._work, self._directory, self._shards, self._tally, self._pool = work, directory, shards, tally, pool
        self._finished = finished
        self._open: ShardWriter | None = None
        self._paths: list[Path] = []
        self._overflowed: dict[str, int] = {}
        self._since, self._busy = time.perf_counter(), dict[str, float]()
        self.now = "encode"

    def write(self, item: Pending | ShardEnd) -> None:
        if isinstance(item, ShardEnd):
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
            for chunk, its in zip(item.cut, encoded, strict=True):
                self._count_overflow(chunk.layer, its.overflowed)
                writer.write_chunk(chunk.layer, chunk.at, its.payload, its.digest)
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
                f"layer {name!r} has values beyond ±{codecs.FLOAT16_MAX:.0f}, which float16 cannot hold. Use --dtype"
                " float32, or --clip to store the largest float16 instead (how many were clipped stands in the file)."
            )
        self._overflowed[name] = self._overflowed.get(name, 0) + count

    def _finish(self, end: ShardEnd) -> Finished:
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
        return Finished(writer.path, end.rows, end.samples.status, digests, end.batch_size, writer.chunk_digests())

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
