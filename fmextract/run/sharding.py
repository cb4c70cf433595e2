"""How large a chunk and a shard are: whole images, one shape a layer, ranges that pack without decoding."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from fmextract.planning import Estimate, step
from fmextract.records import LayerSpec

# Measured (docs/measurements): chunks under 256 KiB cost the writer, over 1 MiB they make one image dear to read.
CHUNK_BYTES = 1 << 20


SPLIT_BYTES = 2 << 20


MOST_IMAGES = 1024


SHARD_BYTES = 2 << 30


ONE_FILE_BYTES = 16 << 30  # where one file is wanted: to make one of several shards, all of it is copied


SHARD_SECONDS = 300.0


def chunk_shape(shape: Sequence[int], axes: Sequence[str], itemsize: int, rows: int) -> tuple[int, ...]:
    """(images, part of one image) of every chunk of a layer, about 512 KiB to 1 MiB.

    Whole images, a power of two of them; where one is larger than 2 MiB, one image split along its channels. No more
    images than `rows` needs, and at most 1024, so that shards can be short.
    """
    per_image = max(1, math.prod(shape)) * itemsize
    if per_image > SPLIT_BYTES:
        axis = axes.index("channel") if "channel" in axes else int(np.argmax(shape))
        return (1, *_split(shape, axis, itemsize))
    images = 1 << max(0, (CHUNK_BYTES // per_image).bit_length() - 1)
    needed = 1 << max(0, rows - 1).bit_length()
    return (min(images, MOST_IMAGES, needed), *shape)


def _split(shape: Sequence[int], axis: int, itemsize: int) -> tuple[int, ...]:
    per_step = math.prod(shape) // shape[axis] * itemsize
    parts = list(shape)
    parts[axis] = _even(shape[axis], CHUNK_BYTES // per_step)
    if per_step > SPLIT_BYTES and len(shape) > 1:  # one channel alone is too large: split its longest axis too
        rest = max((i for i in range(len(shape)) if i != axis), key=lambda i: shape[i])
        parts[rest] = _even(shape[rest], shape[rest] * CHUNK_BYTES // per_step)
    return tuple(parts)


def _even(length: int, most: int) -> int:
    """The length of as few parts as there must be where none is longer than `most`: a last one that is mostly edge
    would be encoded, and read, nearly in vain.
    """
    return -(-length // -(-length // max(1, min(length, most))))


def rows_of_shard(cost: Estimate, rows: int, shard_size: int | None, one_file: bool) -> int:
    """How many rows a shard should have: as many as fill `shard_size` bytes, by default 5 minutes of work, or 2 GiB.

    `one_file`: 16 GiB, since the shards are to become one file.
    """
    per_image = max(1.0, cost.bytes_stored / rows)
    by_bytes = int((shard_size or (ONE_FILE_BYTES if one_file else SHARD_BYTES)) / per_image)
    if shard_size is not None or not cost.seconds:
        return max(1, by_bytes)
    return max(1, min(by_bytes, int(SHARD_SECONDS * rows / cost.seconds)))


def within_shard(layer: LayerSpec, rows: int) -> LayerSpec:
    """The layer with no more images in a chunk than a shard of about `rows` has.

    Else a pooled layer, of which a thousand images make a chunk, would make the shards of the maps beside it huge.
    """
    images = min(layer.chunk[0], 1 << (rows.bit_length() - 1))
    return dataclasses.replace(layer, chunk=(images, *layer.chunk[1:]))


def shard_length(layers: Sequence[LayerSpec], batch_size: int, rows: int, wanted: int) -> int:
    """Rows of a shard: about `wanted`, a multiple of the batch and of every layer's images a chunk; at most `rows`.

    So batches never cross a shard, and shards can be packed chunk by chunk without decoding.
    """
    least = step(layers, batch_size)
    return min(max(least, wanted // least * least), -(-rows // least) * least)
