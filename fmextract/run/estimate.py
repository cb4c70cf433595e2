"""What a run will cost: bytes from compressing a sample, seconds from timing it, memory from the shapes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fmextract.capture.inspection import TapOutput
from fmextract.common.text import byte_count
from fmextract.errors import NoSpace
from fmextract.pipeline.chunks import as_array
from fmextract.pipeline.running_stats import TOGETHER, WORKSPACE, RunningStats, bytes_held, covariance_bytes
from fmextract.pipeline.storing import DEPTH, most_pending
from fmextract.planning import Estimate
from fmextract.records import LayerSpec
from fmextract.run.sharding import CHUNK_BYTES
from fmextract.storage import codecs

# Bytes a second through digest, write, fsync and the checksum of the shard, on one core (docs/measurements).
# Measuring it would mean to write, which a plan does not.
WRITE_RATE = 350e6

# What a run on a CPU reaches of the rate at which its stages alone would run by turns (docs/measurements): the rest
# goes into handing over, and into waiting for the last of a batch.
SHARE_OF_LIMIT = 0.88


PROCESSES = 384 << 20, 40 << 20  # what processes share, and what each has for itself and in common with us, measured
DATASET_PROCESS = 400 << 20  # what a process that reads a Dataset has for itself, without its copy of it, measured
LIBRARIES = 96 << 20  # HDF5, the decoders and the stacks of the threads, once each
INSIDE = 6  # tensors as large as the largest that a forward pass holds at a time, the matrix library's scratch included


@dataclass(frozen=True, slots=True)
class Costs:
    """Measured on a sample: seconds an image of each stage, those of decode, statistics and encode on one core."""

    decode: float
    forward: float
    statistics: float
    encode: float
    stored: dict[str, float]


def encode_sample(
    layers: Sequence[LayerSpec], sample: Sequence[torch.Tensor], codec: str, level: int, keep_bits: int | None
) -> tuple[dict[str, float], float]:
    """(stored bytes an image by layer, seconds an image on one core) from encoding what the probe captured."""
    started = time.perf_counter()
    stored = {}
    for layer, tensor in zip(layers, sample, strict=True):
        rows = min(len(tensor), layer.chunk[0])
        piece = tensor[:rows].float() if layer.dtype == "float16" else tensor[:rows]
        half = piece.dtype == torch.bfloat16
        payload = codecs.encode(
            [as_array(piece.cpu(), codecs.takes_channels_last(codec))],
            codec=codec,
            level=level,
            dtype=layer.dtype,
            values=layer.values * rows,
            keep_bits=keep_bits if np.dtype(layer.dtype).kind == "f" else None,
            bfloat16=half,
        )
        stored[layer.name] = len(payload) / rows
    images = max(1, min(len(t) for t in sample))
    return stored, (time.perf_counter() - started) / images


def describe_sample(
    layers: Sequence[LayerSpec], captured: Sequence[TapOutput], sample: Sequence[torch.Tensor], top: int
) -> float:
    """Seconds an image that the statistics of a sample take on one core, the second time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = 0.0
        for layer, what, rows in zip(layers, captured, sample, strict=True):
            if {"channel", "feature"} & set(what.axes):
                rows = rows[: max(2, -(-TOGETHER // rows[0].numel()))]  # as few as enter the statistics at once
                running = RunningStats(what.shape, what.axes, top, rows.device, layer.near_zero_below)
                running.update(rows, 0)
                started = time.perf_counter()
                running.update(rows, len(rows))
                seconds += (time.perf_counter() - started) / len(rows)
        return seconds
    finally:
        torch.set_num_threads(threads)


def estimate(
    layers: Sequence[LayerSpec],
    rows: int,
    batch_size: int,
    threads: int,
    costs: Costs,
    *,
    device: str,
    largest: int,
    kept: int,
    processes: Callable[[float], bool] = lambda seconds: False,
) -> Estimate:
    """What a run costs, on a machine that is otherwise idle.

    `largest`: bytes an image of the largest tensor inside the model. `kept`: bytes held from the beginning to the end,
    as the weights in another type or layout, and the sample. `processes`: whether each thread has one in a run of so
    many seconds.
    """
    raw = [layer.values * np.dtype(layer.dtype).itemsize for layer in layers]
    per_image = sum(costs.stored.values())
    captured = sum(layer.values * np.dtype(layer.dtype).itemsize for layer in layers)
    write = per_image / WRITE_RATE
    if device == "cpu":  # everything shares the cores; a forward pass takes them all
        seconds = (costs.forward + (costs.decode + costs.statistics + costs.encode + write) / threads) / SHARE_OF_LIMIT
    else:
        seconds = max(costs.forward, costs.decode / threads, costs.encode / threads, write)
    # Three batches of activations, the encoded chunks that wait for the disk, and what the codec threads work on.
    in_flight = (DEPTH + 1) * batch_size * captured + (most_pending(threads) + 3 * threads) * CHUNK_BYTES
    inside = INSIDE * batch_size * largest if device == "cpu" else 0
    forked = PROCESSES[0] + threads * PROCESSES[1] if processes(rows * seconds) else 0
    return Estimate(
        bytes_raw=rows * sum(raw),
        bytes_stored=int(rows * per_image),
        seconds=rows * seconds,
        bytes_peak=LIBRARIES + forked + kept + in_flight + _statistics(layers, threads) + inside,
        stored_per_image=costs.stored,
    )


def _statistics(layers: Sequence[LayerSpec], threads: int) -> int:
    """Bytes of the statistics: of one shard while they are gathered, of the one before while they are written, and the
    copies that the largest layer's end takes."""
    held = [bytes_held(layer.shape[layer.channel_axis]) for layer in layers if layer.channel_axis is not None]
    return 2 * sum(held) + 3 * max(held, default=0) + threads * WORKSPACE


def shared_bytes(layers: Sequence[LayerSpec]) -> int:
    """Bytes of a shard that are there to be merged with those of other shards: the covariances."""
    return sum(covariance_bytes(layer.shape[layer.channel_axis]) for layer in layers if layer.channel_axis is not None)


def advice(layers: Sequence[LayerSpec], estimate: Estimate, rows: int, free: int | None) -> list[str]:
    """What to say of an output that is large: how large, and which reducers make it small."""
    large = 100 << 30
    if estimate.bytes_stored < (large if free is None else min(large, free // 2)):
        return []
    maps = [layer for layer in layers if layer.channel_axis is not None and len(layer.shape) > 1]
    if not maps:
        return []
    mean = rows * sum(4 * layer.shape[layer.channel_axis or 0] for layer in maps)
    pooled = rows * sum(4 * 16 * layer.shape[layer.channel_axis or 0] for layer in maps if "y" in layer.axes)
    smaller = f"'{maps[0].name}=mean' (or =max) for all of them takes {byte_count(mean)}"
    if pooled:
        smaller += f", '=pool:4' {byte_count(pooled)}"
    full, stored = byte_count(estimate.bytes_raw), byte_count(estimate.bytes_stored)
    layers_said = "1 layer" if len(layers) == 1 else f"{len(layers)} layers"
    text = f"full maps of {layers_said} for {rows:,} images are {full}, about {stored} on disk."
    return [f"{text} Reducers keep less: {smaller}, before compression."]


def free_space(out: Path) -> int | None:
    """Free bytes where `out` will be; None where that cannot be asked."""
    there = out.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        return shutil.disk_usage(there).free
    except OSError:
        return None


def check_space(needed: int, free: int | None, out: Path) -> None:
    """Raises NoSpace before hours are spent on what the disk cannot hold."""
    if free is not None and needed > free:
        raise NoSpace(
            f"{out} needs about {byte_count(needed)}, and its disk has {byte_count(free)} free. Take fewer layers or"
            " reducers ('layer4=mean'), --limit the images, --keep-bits fewer, or name another disk."
        )
