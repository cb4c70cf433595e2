"""How fast this machine can be, stage by stage, and how near to that a whole run comes.

Each stage is measured alone, through the same code that a run uses, with all the threads it would have; beside it
stands the bare library call it is made of, so that a slow stage cannot pass for a low limit. On a CPU everything shares
the cores, so the least time for an image is the sum of the stages' core-seconds over the cores (a stage that waits for
the disk leaves them to others); on an accelerator stages overlap, and the slowest one is the limit: there the forward
pass and the statistics are one, in one stream. What the cores of its host allow, which decoding, encoding and writing
share, is given beside it. The end-to-end run is given as a share of the limit.

Beside the forward pass stands what its multiplications would take at the speed of large products of matrices: how near
it is to what the device can do at all.
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fmextract.capture import hooks
from fmextract.common import text
from fmextract.common.machine import machine
from fmextract.common.progress import Quiet
from fmextract.common.sample_photos import make_photos
from fmextract.common.system import cores
from fmextract.config import Config
from fmextract.errors import ConfigError, MissingExtra
from fmextract.inputs import preprocessing
from fmextract.inputs.reading import content
from fmextract.inputs.sources import on_disk
from fmextract.model import precision, run_mode
from fmextract.pipeline import chunks, decode, pipeline, storing, threads
from fmextract.pipeline.running_stats import RunningStats
from fmextract.pipeline.work import Tally
from fmextract.pipeline.workers import Jpegs, Workers, hired
from fmextract.planning import Plan
from fmextract.records import LayerSpec, Preprocess, Progress
from fmextract.run.make_plan import plan_for
from fmextract.run.prepare import Prepared, prepare
from fmextract.run.working import in_run_mode, jpegs, working
from fmextract.storage import codecs, shards

STAGE_SECONDS = 1.0  # each stage is repeated for about this long, each time it is measured


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage alone: images a second with all its threads, and of the bare library call (0: there is none).

    `core_seconds` an image, where the stage leaves cores to others. `part` False: not a stage of this run, but what
    another codec would be.
    """

    name: str
    images_per_second: float
    bare: float = 0.0
    what: str = ""
    core_seconds: float | None = None
    part: bool = True


@dataclass(frozen=True, slots=True, repr=False)
class Benchmark(text.Tabled):
    """What `bench` found; rates are in images per second.

    Attributes:
        model: Its name.
        device: Where the forward pass ran.
        precision: Of the forward pass.
        memory_format: Of the forward pass.
        batch_size: Images per batch.
        layers: Names of the layers that were stored.
        stages: Each stage alone, beside the bare library call it is made of.
        limit: What the stages allow.
        host_limit: What the cores allow; on a CPU that is the limit.
        limiting_stage: The stage that takes most.
        end_to_end: Of whole runs.
        share: `end_to_end` over `limit`.
        would_help: What would make the limit higher.
        flop: Operations of a forward pass per image in convolutions, products and attention (a multiplication and its
            addition are two); 0: not known.
        flop_per_second: Of a large product of matrices in the run's precision.
        bytes_raw_per_image: Of the values.
        bytes_stored_per_image: Of the values on disk.
        runs: The rate of each whole run.
        machine: What it was measured on.
    """

    model: str
    device: str
    precision: str
    memory_format: str
    batch_size: int
    layers: tuple[str, ...]
    stages: tuple[Stage, ...]
    limit: float
    host_limit: float
    limiting_stage: str
    end_to_end: float
    share: float
    would_help: str
    flop: int
    flop_per_second: float
    bytes_raw_per_image: int
    bytes_stored_per_image: int
    runs: tuple[float, ...]
    machine: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain data, ready for `json.dumps`."""
        return asdict(self)

    def table(self, width: int | None = None) -> str:
        """Return the stages, the limit they set, and how near a run comes, as `fmextract bench` shows it."""
        head = ["stage", "images/s", "bare", "what is bare"]
        stages = [
            [stage.name, text.rate(stage.images_per_second), text.rate(stage.bare) if stage.bare else "", stage.what]
            for stage in self.stages
            if stage.part
        ]
        others = [[s.name, text.rate(s.images_per_second), s.what] for s in self.stages if not s.part]
        shares = (
            "the core-seconds of all stages over the cores"
            if self.device == "cpu"
            else f"the slowest stage, {_stage_of_device(self.limiting_stage)}"
        )
        cores = f"{text.rate(self.host_limit)} images/s (what its cores allow to decode, encode and write)"
        return "\n".join(
            [
                f"{self.model}, {self.precision}, batch size {self.batch_size}, on {self.machine['processor']}",
                "",
                text.table(head, stages, right=["images/s", "bare"], width=width),
                "",
                text.table(["other codecs", "images/s", "stored"], others, right=["images/s", "stored"], width=width),
                "",
                *([self._arithmetic()] if self.flop else []),
                f"limit       {text.rate(self.limit)} images/s ({shares})",
                *([] if self.device == "cpu" else [f"host        {cores}"]),
                f"end to end  {text.rate(self.end_to_end)} images/s, {text.share(self.share)} of the limit",
                f"{self.limiting_stage} takes most; what would help: {self.would_help}",
            ]
        )

    def _arithmetic(self) -> str:
        """What the forward pass would be at the speed of large matrix products."""
        (forward,) = (stage for stage in self.stages if stage.name == "forward")
        most = self.flop_per_second / self.flop
        return (
            f"arithmetic  {text.rate(most)} images/s (convolutions, products and attention, {self.flop / 1e9:.3g} GFLOP"
            f" an image, at the {self.flop_per_second / 1e9:.3g} GFLOP/s of large matrix products);"
            f" forward reaches {text.share(forward.images_per_second / most)} of it"
        )

    def __repr__(self) -> str:
        speed = f"{text.rate(self.end_to_end)} images/s, {text.share(self.share)} of the limit"
        return f"<Benchmark: {self.model}, {self.precision} on {self.device}, {speed}>"


def _stage_of_device(name: str) -> str:
    return "forward with statistics" if name == "forward" else name


def bench(source: Any, model: Any, config: Config, progress: Progress, *, repeats: int = 3) -> Benchmark:
    """Measure the stages and whole runs, by turns, `repeats` times; medians are reported.

    `source` None makes photographic JPEGs from the photos of the demo (extra `demo`). Raises as `run.run`.
    """
    if repeats < 1:
        raise ConfigError(f"--repeats {repeats}: expected 1 or more")
    with tempfile.TemporaryDirectory(prefix="fmextract-bench-") as scratch:
        folder = Path(scratch)
        source = source if source is not None else make_photos(folder / "photos", config.limit or 128)
        with (
            hired(config.num_workers or cores(), config.worker_kind, math.inf, progress.note) as workers,
            _once_there(workers),
            prepare(source, model, config, progress) as prepared,
        ):
            plan = plan_for(prepared, folder / "out.h5", progress)
            flop = _flop(prepared, progress)
            measured: dict[str, list[Stage]] = {}
            runs, speeds = [], []
            for turn in range(repeats):
                progress.note(f"measuring, turn {turn + 1} of {repeats}")
                for stage in _stages(prepared, plan, workers, folder):
                    measured.setdefault(stage.name, []).append(stage)
                speeds.append(_flop_per_second(prepared, plan) if flop else 0.0)
                seconds, stored = _end_to_end(prepared, plan, workers, folder / f"run{turn}")
                runs.append(plan.rows / seconds)
    stages = [_median(turns) for turns in measured.values()]
    return _report(prepared, plan, stages, runs, stored, flop, statistics.median(speeds))


@contextmanager
def _once_there(workers: Workers | None) -> Iterator[None]:
    """Processes that start would take part in what is measured."""
    if workers is not None:
        workers.wait()
    yield


def _median(turns: Sequence[Stage]) -> Stage:
    rates, bare = [s.images_per_second for s in turns], [s.bare for s in turns]
    busy = [s.core_seconds for s in turns if s.core_seconds is not None]
    return replace(
        turns[0],
        images_per_second=statistics.median(rates),
        bare=statistics.median(bare),
        core_seconds=statistics.median(busy) if busy else None,
    )


def _report(
    prepared: Prepared, plan: Plan, stages: list[Stage], runs: list[float], stored: int, flop: int, speed: float
) -> Benchmark:
    on_cpu = prepared.device.type == "cpu"
    cores = {s.name: _least(s, plan.threads) for s in stages if s.part and (on_cpu or s.name in _OF_THE_HOST)}
    seconds = cores if on_cpu else {s.name: 1 / s.images_per_second for s in stages if s.part}
    if not on_cpu:
        seconds["forward"] += seconds.pop("statistics")
    slowest = max(seconds, key=lambda name: seconds[name])
    least = sum(seconds.values()) if on_cpu else seconds[slowest]
    rate = statistics.median(runs)
    return Benchmark(
        model=prepared.loaded.name,
        device=plan.device,
        precision=plan.precision,
        memory_format=plan.memory_format,
        batch_size=plan.batch_size,
        layers=tuple(layer.name for layer in plan.layers),
        stages=tuple(stages),
        limit=1 / least,
        host_limit=1 / sum(cores.values()),
        limiting_stage=slowest,
        end_to_end=rate,
        share=rate * least,
        would_help=_WOULD_HELP[slowest],
        flop=flop,
        flop_per_second=speed,
        bytes_raw_per_image=plan.estimate.bytes_raw // plan.rows,
        bytes_stored_per_image=stored // plan.rows,
        runs=tuple(runs),
        machine=machine(),
    )


def _least(stage: Stage, cores: int) -> float:
    """Seconds an image that a stage takes from all the cores."""
    return 1 / stage.images_per_second if stage.core_seconds is None else stage.core_seconds / cores


_OF_THE_HOST = ("decode", "encode", "write")
_WOULD_HELP = {
    "decode": "smaller images on disk, or more cores",
    "upload": "a faster bus",
    "forward": "a lower precision (--precision bf16), a smaller model or earlier layers, a faster device",
    "statistics": "fewer layers; --top-k 0",
    "download": "reducers, which run on the device ('layer4=mean')",
    "encode": "reducers ('layer4=mean', '=pool:4'), --keep-bits, --codec lz4, or more cores",
    "write": "a faster disk, or a stronger codec",
}


# ---------------------------------------------------------------------------------------------- stages


def _stages(prepared: Prepared, plan: Plan, workers: Workers | None, folder: Path) -> list[Stage]:
    """Every stage once. The tensors that the later ones work on are what the forward pass captures of real images."""
    batch, tensors, forward = _forward(prepared, plan)
    stages = [_decode(prepared, plan, workers), forward, _statistics(prepared, plan, tensors)]
    if prepared.device.type != "cpu":
        stages[1:1] = [_upload(prepared, batch)]
        stages.append(_download(tensors, plan.batch_size))
        tensors = [t.contiguous() for t in tensors]  # as they are downloaded
    host = [t.cpu() for t in tensors]
    payloads, encode = _encode(plan, host, workers)
    return [*stages, encode, _write(plan, payloads, folder), *_other_codecs(plan, host, workers)]


def _drop(_: Any) -> None:
    """What a repeated piece of work gives is of no interest."""


def _rate(work: Callable[[], None], count: int, device: torch.device | None = None) -> float:
    """Images a second of `work`, which does `count` of them; once to warm up, then for STAGE_SECONDS."""
    work()
    _wait(device)
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < STAGE_SECONDS:
        work()
        done += count
    _wait(device)
    return done / (time.perf_counter() - started)


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def _threads(plan: Plan) -> Iterator[Callable[[Sequence[Callable[[], Any]]], list[Any]]]:
    """A function that runs tasks on as many threads as a run has, and gives their results in order."""
    pool = threads.thread_pool("fmextract-bench", plan.threads)
    try:
        yield lambda tasks: [future.result() for future in [pool.submit(task) for task in tasks]]
    finally:
        pool.close(1.0)


def _decode(prepared: Prepared, plan: Plan, workers: Workers | None) -> Stage:
    rows = range(min(len(prepared.source), max(64, 16 * plan.threads)))
    decoder, reader = jpegs(prepared, workers), prepared.reader
    step = decode.rows_a_task(len(rows), plan.threads, decoder)
    tasks = [rows[at : at + step] for at in range(0, len(rows), step)]
    into = None if prepared.ready else torch.zeros((len(rows), *prepared.input_shape), dtype=torch.uint8)

    def load(row: int) -> Any:
        file = on_disk(prepared.source, row) if isinstance(decoder, Jpegs) else None
        return reader.load(row) if file is None else file

    def ours(some: range, read: Sequence[Any] | None = None) -> None:
        loaded = [load(row) for row in some] if read is None else read
        sizes: Sequence[Any] = [None] * len(some)
        if decoder is not None and into is not None:
            sizes = decoder.decode(loaded, prepared.loaded.preprocess, into[some.start : some.stop])
        for item, size in zip(loaded, sizes, strict=True):
            if size is None:
                reader.decode(content(item))

    def read_and_decode() -> list[Any]:
        if not reader.serial:
            return run_all([partial(ours, some) for some in tasks])
        read = reader.ahead(rows)
        return run_all([partial(ours, some, [next(read) for _ in some]) for some in tasks])

    data = list(reader.ahead(rows)) if reader.serial else [reader.load(row) for row in rows]
    with _threads(plan) as run_all:
        rate = _rate(lambda: _drop(read_and_decode()), len(rows))
        bare = _rate(lambda: _drop(run_all([partial(_bare_decode, item) for item in data])), len(rows))
    return Stage("decode", rate, bare, "libjpeg-turbo alone, without resizing")


def _bare_decode(data: Any) -> None:
    import simplejpeg

    if isinstance(data, bytes) and data[:2] == b"\xff\xd8":
        simplejpeg.decode_jpeg(data, colorspace="RGB")


def _forward(prepared: Prepared, plan: Plan) -> tuple[torch.Tensor, list[torch.Tensor], Stage]:
    """(a batch of uint8 images on the host, what was captured of it, the stage with the bare model beside it)."""
    pixels, device = _pixels(prepared, plan.batch_size), prepared.device
    there = pixels.to(device)
    with (
        in_run_mode(prepared, plan) as module,
        precision.numerics(plan.precision, device),
    ):

        def inputs() -> torch.Tensor:
            return precision.to_memory_format(_normalised(prepared, there), plan.memory_format)

        ready = inputs()
        with _bare(prepared, module) as capture:
            bare = _rate(lambda: _drop(capture.forward(prepared.forward, ready.clone())), len(pixels), device)
        reduce, kind = prepared.inspection.reduce, prepared.capture_kind
        with hooks.tapped(module, prepared.probed, reduce, prepared.inspection.stop, kind) as capture:
            rate = _rate(lambda: _drop(capture.forward(prepared.forward, inputs())), len(pixels), device)
            tensors = [t.clone() for t in capture.forward(prepared.forward, inputs())]
    return pixels, tensors, Stage("forward", rate, bare, "the model alone")


@contextmanager
def _bare(prepared: Prepared, module: torch.nn.Module) -> Iterator[hooks.Capture]:
    """The bare model, ended where a run ends it: after the last wanted layer; a compiled one has to give that."""
    last = [replace(p, overwritten=False) for p in prepared.probed[-1:]]
    drop = [None if prepared.config.compile else lambda rows: rows.new_empty(0)]
    with hooks.tapped(module, last, drop, prepared.inspection.stop, prepared.capture_kind) as capture:
        yield capture


def _flop(prepared: Prepared, progress: Progress) -> int:
    """Floating point operations of a forward pass, an image: those of convolutions, products and attention.

    Counted in float32, on operators that torch's counter knows. 0, and a note, where a model cannot be run under it.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    two = _normalised(prepared, _pixels(prepared, 2).to(prepared.device))  # a batch, as the probe has shown it to work
    last = [replace(p, overwritten=False) for p in prepared.probed[-1:]]
    fast, counter = torch.backends.mha.get_fastpath_enabled(), FlopCounterMode(display=False)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            run_mode.as_written(prepared.loaded.module, prepared.device) as module,
            hooks.tapped(module, last, [lambda rows: rows.new_empty(0)], prepared.inspection.stop) as capture,
            sdpa_kernel(SDPBackend.MATH),
            counter,
        ):
            capture.forward(prepared.forward, two)
    except Exception as error:  # whatever a model does that the counter's hooks cannot bear: runs do without it
        progress.note(f"the operations of a forward pass are not counted: {type(error).__name__}: {error}")
        return 0
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops()) // 2


def _flop_per_second(prepared: Prepared, plan: Plan) -> float:
    """What the device does in a large product of matrices, all cores on it, in the precision of the run."""
    size = 2048 if prepared.device.type == "cpu" else 8192
    kind = precision.AUTOCAST.get(plan.precision, torch.float32)
    random = torch.Generator().manual_seed(0)
    factors = torch.randn((2, size, size), generator=random, dtype=torch.float32)
    left, right = factors.to(prepared.device, kind)

    def work() -> None:
        _drop(left @ right)
        _wait(prepared.device)  # each: a second's worth of queued products would take many to end

    with precision.numerics(plan.precision, prepared.device):
        return 2 * size**3 * _rate(work, 1, prepared.device)


def _pixels(prepared: Prepared, count: int) -> torch.Tensor:
    """The first `count` images of the source, over again where it has fewer, on the host."""
    rows = [row % len(prepared.source) for row in range(count)]
    return torch.stack([prepared.reader.image(row).pixels for row in rows])


def _normalised(prepared: Prepared, pixels: torch.Tensor) -> torch.Tensor:
    """What the model takes: a new tensor."""
    preprocess = prepared.loaded.preprocess
    if prepared.ready:
        return pixels.clone()
    assert isinstance(preprocess, Preprocess)
    return preprocessing.normalise(pixels, preprocess)


def _statistics(prepared: Prepared, plan: Plan, tensors: Sequence[torch.Tensor]) -> Stage:
    at = 0
    running = [
        RunningStats(c.shape, c.axes, plan.top_k, prepared.device, layer.near_zero_below)
        for c, layer in zip(prepared.outputs, plan.layers, strict=True)
        if {"channel", "feature"} & set(c.axes)
    ]
    described = [t for t, c in zip(tensors, prepared.outputs, strict=True) if {"channel", "feature"} & set(c.axes)]

    def update(first: int) -> None:
        valid = [True] * plan.batch_size
        if prepared.device.type != "cpu":
            for layer, tensor in zip(running, described, strict=True):
                layer.update(tensor, first, valid)
            return
        run_all([partial(layer.update, t, first, valid) for layer, t in zip(running, described, strict=True)])

    def work() -> None:
        nonlocal at
        update(at)
        at += plan.batch_size

    with _threads(plan) as run_all:
        return Stage("statistics", _rate(work, plan.batch_size, prepared.device))


def _upload(prepared: Prepared, batch: torch.Tensor) -> Stage:
    pinned = batch.pin_memory()
    rate = _rate(lambda: _drop(pinned.to(prepared.device, non_blocking=True)), len(batch), prepared.device)
    return Stage("upload", rate)


def _download(tensors: Sequence[torch.Tensor], images_a_batch: int) -> Stage:
    sources = [t.contiguous() for t in tensors]
    targets = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in sources]

    def work() -> None:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source, non_blocking=True)

    return Stage("download", _rate(work, images_a_batch, sources[0].device))


def _encode(
    plan: Plan, tensors: Sequence[torch.Tensor], workers: Workers | None
) -> tuple[list[tuple[int, codecs.Stored]], Stage]:
    """(the encoded chunks of a batch with their layers, the stage)."""
    most = storing.CHUNKS_A_TASK if workers is None else storing.CHUNKS_A_PROCESS
    encode = workers.encoder(plan) if workers is not None else chunks.Encoder(plan).all
    cut = [
        chunk
        for i, (spec, tensor) in enumerate(zip(plan.layers, tensors, strict=True))
        for cutter in [chunks.Cutter(i, spec)]
        for chunk in (*cutter.add(tensor, [False] * len(tensor)), *cutter.flush())
    ]
    tasks = [partial(encode, task) for task in storing.tasks(cut, plan.threads, most)]
    with _threads(plan) as run_all:
        encoded = [chunk for some in run_all(tasks) for chunk in some]
        payloads = [(chunk.layer, done.payload) for chunk, done in zip(cut, encoded, strict=True)]
        # A chunk at the end of a batch holds fewer images than it could: count the images, not the chunks.
        rate = _rate(lambda: _drop(run_all(tasks)), len(tensors[0]))
    return payloads, Stage("encode", rate, _bare_encode(plan, tensors), f"{_library(plan.codec)} on shuffled bytes")


def _other_codecs(plan: Plan, tensors: Sequence[torch.Tensor], workers: Workers | None) -> Iterator[Stage]:
    """What encoding would be with the other codecs that are installed, at their usual level."""
    for name, codec in codecs.CODECS.items():
        if name != plan.codec:
            with suppress(MissingExtra):
                payloads, stage = _encode(replace(plan, codec=name, level=codec.default_level), tensors, workers)
                size = text.byte_count(sum(len(payload) for _, payload in payloads) // len(tensors[0]))
                yield replace(stage, name=f"encode: {name}", bare=0.0, what=f"{size} an image", part=False)


def _library(codec: str) -> str:
    return {"gzip": "ISA-L", "zstd": "zstandard", "lz4": "lz4", "none": "a copy"}[codec]


def _bare_encode(plan: Plan, tensors: Sequence[torch.Tensor]) -> float:
    """The codec's library alone, on bytes that are shuffled already."""
    codec = codecs.codec_named(plan.codec)
    if codec.name != "gzip":
        return 0.0
    shuffled = [_shuffled(spec, row) for spec, t in zip(plan.layers, tensors, strict=True) for row in t]
    with _threads(plan) as run_all:
        return _rate(lambda: _drop(run_all([partial(codecs.deflate, data, 1) for data in shuffled])), len(tensors[0]))


def _shuffled(spec: LayerSpec, row: torch.Tensor) -> bytes:
    values = row.float().contiguous().numpy().astype(spec.dtype, copy=False).reshape(-1)
    return values.view(np.uint8).reshape(-1, values.itemsize).T.tobytes()


def _write(plan: Plan, payloads: Sequence[tuple[int, codecs.Stored]], folder: Path) -> Stage:
    """The encoded chunks of a batch, written and made durable as a shard is, while the one before is summed up.

    Bare: the same by os.write.
    """
    path, before = folder / "write.bin", folder / "written.bin"
    before.touch()
    blob = b"".join(payload for _, payload in payloads)
    busy: list[float] = []

    def ours() -> None:
        started = time.process_time()
        digest = beside.submit(shards.file_sha256, before)
        with path.open("wb", buffering=0) as file:
            for _, payload in payloads:
                file.write(payload)
            os.fsync(file.fileno())
        digest.result()
        path.replace(before)
        busy.append(time.process_time() - started)

    def bare() -> None:
        with path.open("wb", buffering=0) as file:
            file.write(blob)
            os.fsync(file.fileno())

    with ThreadPoolExecutor(1) as beside:
        ours_rate = _rate(ours, plan.batch_size)
    bare_rate = _rate(bare, plan.batch_size)
    return Stage("write", ours_rate, bare_rate, "os.write and fsync", statistics.median(busy) / plan.batch_size)


def _end_to_end(prepared: Prepared, plan: Plan, workers: Workers | None, folder: Path) -> tuple[float, int]:
    """(seconds from the first image to the published file, its bytes): a run without its start."""
    folder.mkdir()
    with working(prepared, plan, workers) as work:
        started = time.perf_counter()
        pipeline.run_shards(work, folder, plan.shards, Quiet(), Tally())
        seconds = time.perf_counter() - started
    return seconds, sum(file.stat().st_size for file in folder.glob("*.h5"))
