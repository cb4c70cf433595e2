"""Is an output what was written? Checksums, every chunk, counts, coordinates, statistics, rows; and K images run again.

A checksum says that something changed; decoding says where. Memory is a few chunks, whatever the size of the output.
Torch is imported only to run images again.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fmextract.common import text
from fmextract.errors import FormatError, OutputError
from fmextract.planning import Plan
from fmextract.reading import activations, indexing
from fmextract.reading.layer import Layer
from fmextract.records import Progress, Status
from fmextract.storage import codecs, layer_stats, layout, shards
from fmextract.storage.digest import chunk_digest
from fmextract.storage.shards import INDEX, PLAN, ShardRecord

Array = indexing.Array
BLOCK_BYTES = 32 << 20
"""Values looked at at once, at least one chunk."""
SHOWN = 50
"""Problems that a table names; `problems` holds all."""
ROUNDING = 1e-5
"""Share of the largest value by which a mean differs when it is summed in another order, or in float32."""


_DIGEST = re.compile("[0-9a-f]{32}")
"""Of a file: XXH3 (128 bits) in hex."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as it was written. `layer` and `rows` (as 8-15) are empty where that is not known."""

    file: str
    layer: str
    rows: str
    what: str

    def __str__(self) -> str:
        place = [self.file, self.layer and f"layer {self.layer}", self.rows and f"rows {self.rows}"]
        return f"{', '.join(filter(None, place))}: {self.what}"


@dataclass(frozen=True, slots=True, repr=False)
class Verification(text.Tabled):
    """What `verify` looked at and what it found.

    Attributes:
        path: The output.
        files: How many were read.
        rows: Images, failed ones included.
        layers: How many there are.
        chunks: How many were decoded.
        bytes: Of the files.
        rerun: Images that were run again.
        largest_error: Relative L2 error of those images, the largest of any layer; None where none was run again.
        problems: What is not as it was written, with file, layer and rows.
    """

    path: str
    files: int
    rows: int
    layers: int
    chunks: int
    bytes: int
    rerun: int
    largest_error: float | None
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        """Plain data, ready for `json.dumps`."""
        return {**asdict(self), "ok": self.ok}

    def table(self, width: int | None = None) -> str:
        """Return whether it is whole, or the first SHOWN problems, as `fmextract verify` shows it."""
        held = [text.count(self.files, "file"), f"{self.rows:,} rows", text.count(self.layers, "layer")]
        held += [text.count(self.chunks, "chunk"), text.byte_count(self.bytes)]
        head = f"{text.printable(self.path)}: {', '.join(held)}"
        if self.ok:
            rerun = f"; {text.count(self.rerun, 'image')} run again" if self.rerun else ""
            error = f", off by {self.largest_error:.2g} at most" if self.largest_error else ""
            return f"{head}\nwhole{rerun}{error}"
        problems = [text.printable(str(problem)) for problem in self.problems[:SHOWN]]
        more = [f"… and {len(self.problems) - SHOWN} more"] if len(self.problems) > SHOWN else []
        return "\n".join([head, *problems, *more])

    def __repr__(self) -> str:
        found = "whole" if self.ok else text.count(len(self.problems), "problem")
        return f"<Verification: {text.printable(self.path)}, {self.rows:,} rows, {found}>"


def verify(
    path: str | os.PathLike[str],
    *,
    rerun: int = 0,
    model: Any = None,
    source: Any = None,
    preprocess: Any = None,
    weights: str | None = None,
    trust: bool = False,
    seed: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Compare a finished output with everything it says of itself, and `rerun` random images with the model.

    What `rerun` needs is what the file names, unless it is given here: `model`, `source`, `preprocess`, `weights`. Code
    that only the file names is not run, and nothing is downloaded for it, unless `trust` says that the file is known to
    be harmless: models of the libraries whose weights are on this disk, and photos, are used without that. `seed`
    chooses the images.

    Raises OutputError or FormatError for what is no finished output, ConfigError where images cannot be run again. What
    is damaged is no exception but a problem in the report.
    """
    place = Path(path)
    check = _Check(place)
    check.run()
    largest = None
    if rerun and not check.problems:
        largest = _rerun(check, rerun, (model, source, preprocess, weights, trust), seed, progress)
    return Verification(
        path=str(place),
        files=check.files,
        rows=check.rows,
        layers=len(check.layers),
        chunks=check.chunks,
        bytes=check.bytes,
        rerun=rerun if largest is not None else 0,
        largest_error=largest,
        problems=tuple(check.problems),
    )


class _Check:
    """One pass over the files of an output."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.problems: list[Problem] = []
        self.files = self.rows = self.chunks = self.bytes = 0
        self.layers: tuple[str, ...] = ()
        self._first: tuple[Path, Mapping[str, Any]] | None = None
        self._hashes: list[Array] = []

    def run(self) -> None:
        if not self.place.exists() or (self.place.is_dir() and not (self.place / INDEX).exists()):
            activations.open(self.place)  # raises, saying what there is
        if self.place.is_dir():
            self._directory()
        else:
            self._file(self.place, None)
        hashes = np.concatenate(self._hashes) if self._hashes else np.zeros(0)
        if len(np.unique(hashes)) != len(hashes):
            self._wrong(self.place, "two rows have the same key")

    def _wrong(self, file: Path, what: str, layer: str = "", rows: range | None = None) -> None:
        shown = f"{rows.start}-{rows.stop - 1}" if rows is not None and len(rows) else ""
        self.problems.append(Problem(str(file), layer, shown, what))

    @contextlib.contextmanager
    def _looking_at(self, file: Path, rows: range | None = None) -> Iterator[None]:
        """What cannot be read there is a problem, and the rest is looked at all the same."""
        try:
            yield
        except (FormatError, OutputError) as error:
            self._wrong(file, str(error).removeprefix(f"{file}: ").removeprefix(f"{file} "), rows=rows)

    # ---- a directory

    def _directory(self) -> None:
        records: list[ShardRecord] = []
        with self._looking_at(self.place / INDEX):
            records = shards.read_index(self.place)
            shards.read_sealed(self.place / INDEX)
        with self._looking_at(self.place / PLAN):
            planned = Plan.load(self.place / PLAN)
            if records and planned.shards != [record.rows for record in records]:
                self._wrong(self.place / PLAN, f"plans other shards than {INDEX} lists")
            if (digest := shards.plan_digest(self.place)) and shards.file_sha256(self.place / PLAN) != digest:
                self._wrong(self.place / PLAN, "has changed: its SHA-256 is not the recorded one")
        for record in records:
            path = self.place / record.name
            chunks = self._own_record(path, record)
            if not path.exists():
                self._wrong(path, "is missing", rows=record.rows)
                continue
            before = len(self.problems)
            sound = shards.file_sha256(path) == record.sha256
            self._file(path, record, chunks, sound)
            if not sound and len(self.problems) == before:
                self._wrong(path, "its SHA-256 is not the recorded one", rows=record.rows)

    def _own_record(self, path: Path, record: ShardRecord) -> Mapping[str, str]:
        """The digests of the chunks in a shard's own record, which must say what the index says."""
        chunks: Mapping[str, str] = {}
        own = path.with_suffix(".json")
        with self._looking_at(own, record.rows):
            said = ShardRecord.from_json(shards.read_sealed(own), own)
            chunks = said.extra.get("chunks", {})
            if replace(said, extra=shards.without_chunks(said.extra)) != record:
                self._wrong(own, f"is another record than that in {INDEX}", rows=record.rows)
        return chunks

    # ---- a file

    def _file(
        self, path: Path, record: ShardRecord | None, chunks: Mapping[str, str] | None = None, sound: bool = True
    ) -> None:
        rows = record.rows if record else None
        self.files += 1
        self.bytes += path.stat().st_size
        with self._looking_at(path, rows), activations.open(path) as acts:
            self.rows += acts.num_rows
            self._same_run(path, acts, sound)
            start = acts.first_row
            before = len(self.problems)
            if chunks and set(chunks) != set(acts.layers):
                self._wrong(path.with_suffix(".json"), "has the digests of other layers", rows=rows)
            with acts.files.held():  # once: opening it for each layer would take longer than reading it
                with self._looking_at(path, rows):
                    self._columns(path, acts, record, range(start, start + acts.num_rows))
                for name in acts.layers:
                    with self._looking_at(path, rows):
                        self._layer(path, acts[name], start, (chunks or {}).get(name))
                with self._looking_at(path, rows):
                    digest = acts.files[0].content_digest()
                    stored = acts.attrs.get("content_digest")
                    if digest != stored and len(self.problems) == before:
                        self._wrong(path, "the content is not the one its content_digest was made of", rows=rows)
                    if record and stored != record.content_digest:
                        self._wrong(path, "its content_digest is not the recorded one", rows=rows)

    def _same_run(self, path: Path, acts: activations.Activations, sound: bool) -> None:
        """Against the first file that is `sound`: one that changed is no measure for the others."""
        self.layers = self.layers or acts.layers
        said = {name: acts.attrs.get(name) for name in ("model", "weights_sha256", "precision")}
        said["config"] = acts.config
        if self._first is None and sound:
            self._first = path, {**said, "layers": acts.layers}
        if self._first is not None and {**said, "layers": acts.layers} != self._first[1]:
            start = acts.first_row
            rows = range(start, start + acts.num_rows)
            self._wrong(path, f"is of another run than {self._first[0].name}", rows=rows)

    def _columns(self, path: Path, acts: activations.Activations, record: ShardRecord | None, rows: range) -> None:
        if record and rows != record.rows:
            self._wrong(path, f"holds the rows {rows.start} to {rows.stop - 1}", rows=record.rows)
        if not np.array_equal(acts.samples, np.arange(rows.start, rows.stop)):
            self._wrong(path, "/sample does not count its rows", rows=rows)
        status, messages = acts.status, acts.messages
        if not np.isin(status, [int(code) for code in Status]).all():
            self._wrong(path, "/status has codes that do not exist", rows=rows)
        if any(bool(said) != bool(code) for said, code in zip(messages, status, strict=True)):
            self._wrong(path, "/message and /status do not agree", rows=rows)
        counts = {str(code): count for code, count in sorted(Counter(status.tolist()).items())}
        if record and counts != dict(record.statuses):
            self._wrong(path, f"has the statuses {counts}, recorded are {dict(record.statuses)}", rows=rows)
        left_out = acts.attrs.get("left_out")
        keys = acts.keys[status != Status.UNREADABLE] if left_out else acts.keys
        self._hashes.append(np.fromiter(map(hash, keys), np.int64, len(keys)))
        for name, column in (("height", acts.heights), ("width", acts.widths)):
            if (column < 0).any():
                self._wrong(path, f"/{name} is negative", rows=rows)
        sizes = zip(acts.file_sizes.tolist(), acts.file_digests, strict=True)
        if not all((size == -1 and not digest) or (size >= 0 and _DIGEST.fullmatch(digest)) for size, digest in sizes):
            self._wrong(path, "/file_size and /file_digest are not those of files", rows=rows)
        try:
            _ = acts.labels, acts.columns
        except FormatError as error:
            self._wrong(path, str(error), rows=rows)

    def _layer(self, path: Path, layer: Layer, start: int, digests: str | None) -> None:
        self._coordinates(path, layer)
        file = layer.acts.files[0]
        stored = file.stored(layer.name)
        self.chunks += stored.sizes.size
        recount = _Recount(layer)
        per_image = layer.nbytes // max(1, len(layer))
        step = max(1, BLOCK_BYTES // max(1, per_image * layer.chunks[0])) * layer.chunks[0]
        broken = False
        for number, place in enumerate(np.ndindex(stored.sizes.shape) if digests else ()):
            payload = os.pread(file.fd, int(stored.sizes[place]), int(stored.offsets[place]))
            if chunk_digest(payload).hex()[:16] != (digests or "")[16 * number : 16 * number + 16]:
                broken = True
                at = start + place[0] * layer.chunks[0]
                rows = range(at, min(at + layer.chunks[0], start + len(layer)))
                self._wrong(path, f"the chunk {place} has changed", layer.name, rows)
        for at in range(0, len(layer), step):
            rows = range(start + at, start + min(at + step, len(layer)))
            try:
                values = layer[at : at + step]
            except FormatError as error:
                broken = True
                self._wrong(path, str(error).rpartition(": ")[2], layer.name, self._damaged(layer, at, step, start))
                continue
            for what in recount.add(values, at):
                self._wrong(path, what, layer.name, rows)
        if not broken:
            for what in recount.compare():
                self._wrong(path, what, layer.name, range(start, start + len(layer)))

    @staticmethod
    def _damaged(layer: Layer, at: int, step: int, start: int) -> range:
        """The first rows of a block that cannot be decoded: those of one chunk."""
        for first in range(at, min(at + step, len(layer)), layer.chunks[0]):
            last = min(first + layer.chunks[0], len(layer))
            try:
                layer[first:last]
            except FormatError:
                return range(start + first, start + last)
        return range(start + at, start + min(at + step, len(layer)))

    def _coordinates(self, path: Path, layer: Layer) -> None:
        there = layer.acts.files[0].coordinates(layer.name)
        for role, size in zip(layer.axes[1:], layer.shape[1:], strict=True):
            expected, _ = layout.coordinate(layer.field, role, size)
            if not np.array_equal(there[role], expected):
                self._wrong(path, f"the coordinate {role} is not what the receptive field gives", layer.name)


class _Recount:
    """The statistics of a layer, counted again from what is stored, against those in the file."""

    def __init__(self, layer: Layer) -> None:
        self._layer, self._ok = layer, layer.acts.status == Status.OK
        self._stats = layer.acts.files[0].stats(layer.name)
        self._axis = layer.spec.channel_axis
        self._seen: dict[str, Array] = {}
        self._nonfinite = 0
        options = layer.acts.config.get("options", {})
        # An export to netCDF widens what the run had narrowed.
        kind = options.get("dtype") if layer.spec.dtype == "float32" else layer.spec.dtype
        narrowed = kind == "float16" and layer.spec.compute_dtype != "float16"
        bits = options.get("keep_bits") or (10 if narrowed else None)
        # Statistics are of the values before they were rounded.
        self._rounding = 0.0 if bits is None or layer.dtype.kind != "f" else 2.0**-bits
        self._flushes = narrowed
        self._clip = codecs.FLOAT16_MAX if narrowed and options.get("clip") else math.inf

    def add(self, values: Array, at: int) -> Iterator[str]:
        """A block of rows from `at` on; yields what is wrong with it."""
        ok = self._ok[at : at + len(values)]
        failed = values[~ok]
        if failed.size and not (np.isnan(failed) if failed.dtype.kind == "f" else failed == 0).all():
            yield "a failed row holds values"
        good = values[ok]
        if good.dtype.kind == "f":
            self._nonfinite += int(np.count_nonzero(~np.isfinite(good)))
        if self._axis is None or not self._stats:
            return
        if "top_value" in self._stats and not self._top_is_there(values, at):
            yield "the strongest images are not where the statistics say"
        by_channel = np.moveaxis(good, 1 + self._axis, 0).reshape(good.shape[1 + self._axis], -1)
        part = _moments(by_channel.astype(np.float64), self._layer.spec.near_zero_below)
        self._seen = layer_stats.merge([self._seen, part]) if self._seen else part

    def _top_is_there(self, values: Array, at: int) -> bool:
        """Whether each of the strongest in these rows is stored in its place."""
        value, sample, y, x = (self._stats[f"top_{name}"] for name in ("value", "sample", "y", "x"))
        first = at + self._layer.acts.first_row
        channel, k = np.nonzero((sample >= first) & (sample < first + len(values)))
        row = sample[channel, k] - first
        if not self._ok[at + row].all():
            return False
        places: dict[str, Array] = {self._layer.axes[1 + (self._axis or 0)]: channel}
        if self._layer.spec.reducer != "top":
            places |= {"y": y[channel, k], "token": y[channel, k], "x": x[channel, k]}
        index = [places.get(role) for role in self._layer.axes[1:]]
        if any(place is None for place in index):
            return True  # an axis whose places are not kept
        try:
            seen = values[(row, *index)].astype(np.float64)
        except IndexError:
            return False
        return bool(np.all(np.abs(seen - self._clipped(value[channel, k])) <= self._tolerance(value[channel, k])))

    def _clipped(self, values: Array) -> Array:
        clipped: Array = np.clip(values, -self._clip, self._clip)
        return clipped

    def _tolerance(self, values: Array) -> Array:
        tolerance: Array = np.abs(values) * self._rounding + (1e-7 if self._flushes else 0.0)
        return tolerance

    def compare(self) -> Iterator[str]:
        """What the statistics in the file say otherwise, once all rows were added."""
        counted = int(self._layer.attrs.get("nonfinite", self._nonfinite))
        if self._layer.spec.reducer == "top":  # of the whole maps, of which only the maxima are stored
            return
        if counted != self._nonfinite:
            yield f"has {self._nonfinite} values that are not finite, counted were {counted}"
        if not self._seen:
            return
        told = self._stats
        if missing := [name for name in layer_stats.MOMENTS if name not in told]:
            yield f"has no statistics {', '.join(missing)}"
            return
        scale = np.fmax(np.abs(told["min"]), np.abs(told["max"]))
        near = scale * (ROUNDING + self._rounding) + (1e-7 if self._flushes else 0.0)
        slack: dict[str, Array] = {
            "count": np.zeros_like(scale),
            "nonfinite": np.zeros_like(scale),
            "zero_fraction": np.full_like(scale, 1.0 if self._flushes else 1e-12),
            layer_stats.NEAR_ZERO: np.full_like(scale, 1.0 if self._rounding else 1e-12),
            "min": self._tolerance(told["min"]),
            "max": self._tolerance(told["max"]),
            "mean": near,
            "std": near,
        }
        for name in (
            name for name in (*layer_stats.MOMENTS, layer_stats.NEAR_ZERO) if name in told and name in self._seen
        ):
            expected, seen = told[name].astype(np.float64), self._seen[name].astype(np.float64)
            if name in ("min", "max"):
                expected = self._clipped(expected)
            elif name in ("mean", "std") and self._clip != math.inf:
                continue
            same = (np.abs(seen - expected) <= slack[name]) | (np.isnan(seen) & np.isnan(expected))
            if not same.all():
                channel = int(np.flatnonzero(~same)[0])
                yield (
                    f"the values are not those that {name} was taken of: channel {channel} gives {seen[channel]:.9g},"
                    f" stored is {expected[channel]:.9g}"
                )


def _moments(values: Array, near_zero_below: float | None) -> dict[str, Array]:
    """MOMENTS, and NEAR_ZERO where there is a bound, of (channels, n) in float64, over the finite values."""
    finite = np.isfinite(values)
    count = finite.sum(1)
    n = np.maximum(count, 1)
    zeroed = np.where(finite, values, 0.0)
    mean = zeroed.sum(1) / n
    deviation = np.where(finite, values - mean[:, None], 0.0)
    empty = count == 0
    moments = {
        "count": count,
        "mean": np.where(empty, np.nan, mean),
        "std": np.where(empty, np.nan, np.sqrt((deviation**2).sum(1) / n)),
        "min": np.where(empty, np.nan, np.where(finite, values, np.inf).min(1, initial=np.inf)),
        "max": np.where(empty, np.nan, np.where(finite, values, -np.inf).max(1, initial=-np.inf)),
        "zero_fraction": np.where(empty, np.nan, ((values == 0) & finite).sum(1) / n),
        "nonfinite": values.shape[1] - count,
    }
    if near_zero_below is not None:
        near = (np.abs(values) <= near_zero_below) & finite
        moments[layer_stats.NEAR_ZERO] = np.where(empty, np.nan, near.sum(1) / n)
    return moments


# ----------------------------------------------------------------------------------------------------------- run again


def _rerun(check: _Check, count: int, said: tuple[Any, ...], seed: int | None, progress: Progress | None) -> float:
    """Run `count` random images again; notes what does not agree, returns the largest error."""
    from fmextract.run.rerun import Said, rerun

    with activations.open(check.place) as acts:
        differing = rerun(acts, count, Said(*said), seed, progress)
    for difference in itertools.filterfalse(lambda d: d.tolerated, differing):
        rows = range(difference.row, difference.row + 1)
        check._wrong(check.place, f"{difference.key!r} run again: {difference.message}", difference.layer, rows)
    return max((difference.error for difference in differing), default=0.0)
