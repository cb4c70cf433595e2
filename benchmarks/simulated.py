"""The host at the speed of a GPU: a simulated accelerator in front of the real pipeline.

    python -m benchmarks.simulated [--only small-bf16-gzip] [--rate 2000] [--seconds 6] [--turns 3] [--out DIR] [--json]

The accelerator is a model whose forward pass sleeps, without the GIL, for as long as a device of `--rate` images a
second would compute, and then hands out activations that the demo's trained network gave for real photos (12 photos,
128 crops). Behind it runs the pipeline of every run: `prepare`, `plan_for`, `engine.run_shards`. Three things differ
from a run on a GPU:

- downloads are copied by a thread of their own, as the copy engine of a GPU does, into a ring of reused buffers; that
  thread takes time from the cores, which a copy engine does not, and its time is given (`copy`);
- statistics, which a GPU computes, are left out;
- images are tiny tensors in memory, so that decoding costs next to nothing beside what a batch always costs.

Sizes: `small`, eight maps of 192 x 7 x 7 an image (18 KiB each in half precision); `large`, one map of 96 x 112 x 112
(2.3 MiB in half precision). Half precision is widened to float32 on disk, as in every run.

In every turn, before and after the run: the encoder alone, on the same chunks with as many threads as the run has; the
codec's library alone, on bytes that are shuffled already; and the disk alone, to which as many bytes as the run stores
are written, a chunk a call, and synced. The run ends when all its files are published. Its limit is the slowest of
device, encoder and disk; with codec `none` of device and disk. Medians over the turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.nn.functional import max_pool2d

from fmextract import benchmark
from fmextract.common.machine import machine
from fmextract.common.progress import Quiet
from fmextract.common.sample_photos import make_photos
from fmextract.config import WORKER_KINDS, Config
from fmextract.pipeline import chunks, pipeline, threads
from fmextract.pipeline.channel import Channel, Closed
from fmextract.pipeline.statistics import ShardStatistics
from fmextract.pipeline.transfers import Download
from fmextract.pipeline.work import Tally
from fmextract.pipeline.workers import hired
from fmextract.planning import Plan
from fmextract.reading import activations
from fmextract.run.make_plan import plan_for
from fmextract.run.prepare import Prepared, prepare
from fmextract.run.working import working
from fmextract.storage import codecs

IMAGES = 128  # different ones
TAPS = {
    "small": tuple(f"blocks.5.{block}.{part}" for block in range(4) for part in ("bn3", "")),
    "large": ("blocks.1.0.bn1",),
}
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
IN_FLIGHT = 256 << 20  # bytes of activations in a batch, as `choose` allows
SHARD = "512MiB"  # the default, of stored bytes


# ------------------------------------------------------------------------------------------ accelerator


class Layer(nn.Module):
    """One layer of the simulated network: the prepared maps (IMAGES, channel, y, x) of the rows that are asked for."""

    def __init__(self, maps: torch.Tensor) -> None:
        super().__init__()
        self.maps = maps
        self.probed = False

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        first, last = int(rows[0]), int(rows[-1])
        if self.probed and last - first == len(rows) - 1:
            return self.maps[first : last + 1]
        # The probe follows operations, and after a pooling layer axis 1 is the channel; this one changes nothing.
        return max_pool2d(self.maps[rows], 1)


class Accelerator(nn.Module):
    """A network that only takes its time. An image names its row: the first value is the row over IMAGES."""

    def __init__(self, maps: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(map(Layer, maps))
        self.images_per_second = 0.0  # 0: no sleep
        self.computed = 0.0

    def begin(self, images_per_second: float) -> None:
        """From here on it computes at that rate."""
        self.images_per_second, self.computed = images_per_second, 0.0
        for layer in self.modules():
            if isinstance(layer, Layer):
                layer.probed = True

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        rows = (images[:, 0, 0, 0].abs() * IMAGES).long() % IMAGES
        if self.images_per_second:
            seconds = len(images) / self.images_per_second
            time.sleep(seconds)
            self.computed += seconds
        return [layer(rows) for layer in self.layers]


class Images:
    """`count` inputs of the accelerator, in memory."""

    def __init__(self, count: int) -> None:
        self._rows = (torch.arange(count) % IMAGES / IMAGES).reshape(-1, 1, 1, 1)
        self.labels = range(count)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> torch.Tensor:
        return self._rows[row]


class Ring:
    """The transfers of the simulated device: `depth` host buffers, filled by a thread in place of a copy engine."""

    ahead = 2

    def __init__(self, depth: int) -> None:
        self._slots: Channel[dict[int, torch.Tensor]] = Channel(depth, [{} for _ in range(depth)])
        self._reserved: dict[int, torch.Tensor] | None = None
        self._engine = ThreadPoolExecutor(1, "copy-engine", threads.one_torch_thread)
        self.copying = 0.0

    def input_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(tuple(shape), dtype=dtype)

    def upload(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer

    def reserve(self) -> None:
        if self._reserved is None:
            self._reserved = self._slots.get()

    def download(self, tensors: Sequence[torch.Tensor]) -> Download:
        self.reserve()
        slot, self._reserved = self._reserved, None
        assert slot is not None
        return _Download(self, slot, self._engine.submit(self._copy, slot, list(tensors)))

    def _copy(self, slot: dict[int, torch.Tensor], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        started = time.thread_time()
        copies = []
        for i, tensor in enumerate(tensors):
            if i not in slot or len(slot[i]) < len(tensor):
                slot[i] = torch.empty_like(tensor)
            copies.append(slot[i][: len(tensor)].copy_(tensor))
        self.copying += time.thread_time() - started
        return copies

    def give_back(self, slot: dict[int, torch.Tensor]) -> None:
        with suppress(Closed):
            self._slots.put(slot)

    def close(self) -> None:
        self._slots.close()


class _Download:
    def __init__(self, ring: Ring, slot: dict[int, torch.Tensor], copied: Future[list[torch.Tensor]]) -> None:
        self._ring, self._slot, self._copied = ring, slot, copied

    computing = copying = 0.0

    def wait(self) -> list[torch.Tensor]:
        return self._copied.result()

    def release(self) -> None:
        self._ring.give_back(self._slot)


@contextmanager
def _on_the_device() -> Iterator[list[Ring]]:
    """The engine takes the model for one on an accelerator: rings in place of turns, no statistics on the host."""
    rings: list[Ring] = []

    def transfers(device: torch.device, depth: int) -> Ring:
        rings.append(Ring(depth))
        return rings[-1]

    with (
        mock.patch.object(pipeline, "transfers_for", transfers),
        mock.patch.object(ShardStatistics, "update", return_value=None),
    ):
        yield rings


def capture(scratch: Path) -> dict[str, list[torch.Tensor]]:
    """What the demo's network gives for IMAGES crops of photos: by size, one float32 tensor (IMAGES, C, y, x) a map."""
    from fmextract import demo
    from fmextract.inputs import decoding, preprocessing

    network, preprocess = demo.model()
    photos = sorted(make_photos(scratch / "photos", IMAGES).iterdir())
    caught: dict[str, list[torch.Tensor]] = {name: [] for names in TAPS.values() for name in names}
    for name, kept in caught.items():
        hook = lambda module, args, output, kept=kept: kept.append(output.clone())  # noqa: E731
        network.get_submodule(name.rstrip(".")).register_forward_hook(hook)
    with torch.no_grad():
        for at in range(0, IMAGES, 16):
            pixels = [decoding.decode(photo.read_bytes(), preprocess).pixels for photo in photos[at : at + 16]]
            network(preprocessing.normalise(torch.stack(pixels), preprocess))
    return {size: [torch.cat(caught[name]) for name in names] for size, names in TAPS.items()}


# --------------------------------------------------------------------------------------------- a turn


@dataclass(frozen=True, slots=True)
class Turn:
    """Figures of one turn, or their medians; GB/s of values as the disk's type has them, before the codec.

    `alone`: the encoder, `library`: the compressor without shuffling and digest, `disk`: the stored bytes written and
    synced, in GB/s of values too. `idle`: share of the run in which the accelerator has nothing to do.
    """

    images_per_second: float
    run: float
    alone: float
    library: float
    disk: float
    idle: float
    ratio: float
    busy: dict[str, float]


class Case:
    """One size, type and codec."""

    def __init__(self, name: str, maps: Sequence[torch.Tensor], options: argparse.Namespace) -> None:
        _, kind, codec = name.split("-")
        self.name, self.codec, self._options = name, codec, options
        self._maps = [m.to(TYPES[kind]) for m in maps]
        self.bytes = sum(m[0].numel() * 4 for m in maps)
        self._batch = min(64, 1 << (IN_FLIGHT // self.bytes).bit_length() - 1)

    def turn(self, scratch: Path) -> Turn:
        """The references before and after the run, which changes of the machine's speed then meet alike."""
        with self._prepared(self._batch) as (_, _, made):
            references = _References(made, self._maps, IMAGES * self.bytes, self._options.seconds / 8)
        before, ratio = references.encode(), references.ratio
        goal = min(self._options.rate * self.bytes, *(before[:1] if self.codec != "none" else [1e9]))
        images = max(2, round(goal * self._options.seconds / self.bytes / self._batch)) * self._batch
        stored = int(images * self.bytes * ratio)
        # The first file only warms up: page cache that the system has not used lately costs the first who takes it.
        disk = [references.write(scratch / "disk.bin", stored) for _ in range(2)][1:]
        took, idle, busy = self._run(images, scratch / "run")
        disk.append(references.write(scratch / "disk.bin", stored))
        alone, library = (statistics.mean(pair) / 1e9 for pair in zip(before, references.encode(), strict=True))
        rate = images / took
        return Turn(
            rate, rate * self.bytes / 1e9, alone, library, statistics.mean(disk) / ratio / 1e9, idle, ratio, busy
        )

    @contextmanager
    def _prepared(self, images: int) -> Iterator[tuple[Accelerator, Prepared, Plan]]:
        model = Accelerator(self._maps)
        config = Config.of(
            layers=[f"layers.{i}" for i in range(len(self._maps))], preprocess="none",
            precision="fp32", memory_format="contiguous", batch_size=self._batch, codec=self.codec,
            shard_size=SHARD, device="cpu", num_workers=self._options.workers,
        )  # fmt: skip
        with prepare(Images(images), model, config, Quiet()) as prepared:
            yield model, prepared, plan_for(prepared, self._options.out / "run", Quiet())

    def _run(self, images: int, folder: Path) -> tuple[float, float, dict[str, float]]:
        """(seconds, share of them in which the accelerator is idle, busy share of each stage); the files are gone."""
        folder.mkdir()
        with (
            self._prepared(images) as (model, prepared, made),
            hired(made.threads, self._options.worker_kind, made.estimate.seconds, print) as workers,
            _on_the_device() as rings,
        ):
            if workers is not None:
                workers.wait()
            tally = Tally()
            os.sync()
            started = time.perf_counter()
            with working(prepared, made, workers) as work:
                model.begin(self._options.rate)
                pipeline.run_shards(work, folder, made.shards, Quiet(), tally)
            took = time.perf_counter() - started
        self._check(folder)
        shutil.rmtree(folder)
        busy = {stage: seconds / tally.threads.get(stage, 1) / took for stage, seconds in tally.busy.items()}
        return took, 1 - model.computed / took, busy | {"copy": rings[0].copying / took}

    def _check(self, folder: Path) -> None:
        """The first shard holds what the accelerator handed out."""
        with activations.open(sorted(folder.glob("*.h5"))[0]) as acts:
            for name, maps in zip(acts.layers, self._maps, strict=True):
                row = min(IMAGES, acts.num_rows) - 1
                assert torch.equal(torch.from_numpy(acts[name][row]), maps[row].float()), name


class _References:
    """What the encoder, the compressor's library and the disk do alone with the chunks of a run."""

    def __init__(self, made: Plan, maps: Sequence[torch.Tensor], values: int, seconds: float) -> None:
        """`values`: bytes of all maps, as the disk's type has them; `seconds` that each measurement lasts."""
        self._made, self._values, self._seconds, self._encoder = made, values, seconds, chunks.Encoder(made)
        self._cut = [
            chunk
            for i, (spec, rows) in enumerate(zip(made.layers, maps, strict=True))
            for cutter in [chunks.Cutter(i, spec)]
            for chunk in (*cutter.add(rows, [False] * len(rows)), *cutter.flush())
        ]
        plain = chunks.Encoder(dataclasses.replace(made, codec="none", level=0))
        payloads = [self._encoder(chunk).payload for chunk in self._cut]
        self.ratio = sum(map(len, payloads)) / values
        self._block = b"".join(payloads[:64])
        self._planes = [_shuffled(bytes(plain(chunk).payload)) for chunk in self._cut] if made.codec != "none" else []

    def encode(self) -> tuple[float, float]:
        """Bytes of values a second: (the encoder, the library), each with all threads of a run."""
        with benchmark._threads(self._made) as run_all:
            tasks = [partial(_forget, self._encoder, chunk) for chunk in self._cut]
            alone = _rate(lambda: run_all(tasks), self._seconds) * self._values
            if self._made.codec == "none":
                return alone, 0.0
            bare = [partial(_forget, _library(self._made.codec), planes) for planes in self._planes]
            return alone, _rate(lambda: run_all(bare), self._seconds) * self._values

    def write(self, path: Path, total: int) -> float:
        """Bytes a second of writing `total` to one file, chunk after chunk, and syncing it."""
        piece = max(1, len(self._block) // min(64, len(self._cut)))
        pieces = [memoryview(self._block)[at : at + piece] for at in range(0, len(self._block), piece)]
        started, done = time.perf_counter(), 0
        with path.open("wb", buffering=0) as file:
            while done < total:
                for one in pieces:
                    done += file.write(one)
            os.fsync(file.fileno())
        took = time.perf_counter() - started
        path.unlink()
        return done / took


def _forget(function: Callable[[Any], Any], data: Any) -> None:
    function(data)


def _shuffled(values: bytes) -> bytes:
    """Byte planes of 4-byte values, as a compressor gets them."""
    return np.frombuffer(values, np.uint8).reshape(-1, 4).T.tobytes()


def _rate(work: Callable[[], Any], seconds: float) -> float:
    """Times a second."""
    done, started = 0, time.perf_counter()
    while (took := time.perf_counter() - started) < seconds or not done:
        work()
        done += 1
    return done / took


def _library(codec: str) -> Callable[[bytes], bytes]:
    if codec == "gzip":
        return partial(codecs.deflate, level=1)
    import lz4.block

    return partial(lz4.block.compress, store_size=False)


# -------------------------------------------------------------------------------------------- reporting


CASES = [f"{size}-{kind}-{codec}" for size in TAPS for kind in ("bf16", "fp32") for codec in ("gzip", "lz4", "none")]


def _median(turns: Sequence[Turn]) -> Turn:
    plain = [asdict(turn) for turn in turns]
    made = {name: statistics.median(t[name] for t in plain) for name in plain[0] if name != "busy"}
    stages = plain[0]["busy"]
    return Turn(**made, busy={stage: statistics.median(t["busy"][stage] for t in plain) for stage in stages})


def _row(name: str, turn: Turn, rate: float, values: float) -> dict[str, Any]:
    """What is reported of a case. `values`: bytes an image; the limit is the slowest of device, encoder and disk."""
    limits = {"device": rate * values / 1e9, "disk": turn.disk}
    if not name.endswith("none"):  # which has no codec: its encoder copies and digests
        limits["encoder"] = turn.alone
    slowest = min(limits, key=lambda what: limits[what])
    share = {"share": turn.run / limits[slowest], "limited_by": slowest}
    return {"case": name, "bytes_per_image": values, **asdict(turn), **share}


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| case | images/s | run | encoder | library | disk | limit | **share** | idle | busiest stages |",
        "|---|--:|--:|--:|--:|--:|---|--:|--:|---|",
    ]
    for row in rows:
        busy = sorted(row["busy"].items(), key=lambda item: -item[1])[:4]
        stages = ", ".join(f"{stage} {share:.0%}" for stage, share in busy)
        library = f"{row['library']:.2f}" if row["library"] else ""
        lines.append(
            f"| {row['case']} | {row['images_per_second']:.0f} | {row['run']:.2f} | {row['alone']:.2f} | {library} |"
            f" {row['disk']:.2f} | {row['limited_by']} | **{row['share']:.0%}** | {row['idle']:.0%} | {stages} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="cases, comma-separated: " + ", ".join(CASES))
    parser.add_argument("--rate", type=float, default=5000, help="images a second that the device could compute")
    parser.add_argument("--seconds", type=float, default=6, help="about how long a run lasts")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--workers", type=int, help="threads of the codec; by default as many as cores")
    parser.add_argument("--worker-kind", choices=WORKER_KINDS, default="auto", help="of the codec, as of a run")
    parser.add_argument("--out", type=Path, help="where to write; a temporary directory if not given")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else CASES
    with tempfile.TemporaryDirectory(prefix="fmextract-simulated-", dir=options.out) as place:
        options.out = Path(place)
        maps = capture(options.out)
        cases = [Case(name, maps[name.partition("-")[0]], options) for name in names]
        turns: dict[str, list[Turn]] = {case.name: [] for case in cases}
        for number in range(options.turns):
            for case in cases:
                with tempfile.TemporaryDirectory(dir=options.out) as scratch:
                    turns[case.name].append(case.turn(Path(scratch)))
                    print(f"turn {number + 1}: {case.name}: {turns[case.name][-1]}", file=sys.stderr)
    rows = [_row(case.name, _median(turns[case.name]), options.rate, case.bytes) for case in cases]
    if options.json:
        print(json.dumps({"rate": options.rate, "cases": rows, "machine": machine()}, indent=2))
    else:
        print(_table(rows))


if __name__ == "__main__":
    main()
