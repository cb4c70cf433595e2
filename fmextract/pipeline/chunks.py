"""From captured rows to stored chunks: cut on the grid of a layer's chunks, then rounded, shuffled and compressed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fmextract.planning import Plan
from fmextract.records import LayerSpec
from fmextract.storage import codecs, layout
from fmextract.storage.digest import chunk_digest

Piece = torch.Tensor | int  # a tensor of rows, or a number of failed rows, which are stored as the fill value


@dataclass(slots=True)
class Chunk:
    """One chunk of one layer, still as pieces of captured tensors."""

    layer: int
    at: tuple[int, ...]
    pieces: list[Piece]


class Cutter:
    """Cuts the rows of one layer, as they come, into chunks. Rows of unfinished chunks are copied; others are views."""

    def __init__(self, layer: int, spec: LayerSpec) -> None:
        self._layer, self._spec = layer, spec
        self._images = spec.chunk[0]
        self._grid = layout.chunk_grid(spec.shape, spec.chunk[1:])
        self._staged: list[Piece] = []
        self._row = 0

    def add(self, rows: torch.Tensor, failed: Sequence[bool]) -> Iterator[Chunk]:
        """`rows` (n, *shape) follow the rows before; rows whose `failed` is set are replaced by the fill value."""
        n, at = len(failed), 0
        while at < n:
            missing = self._images - self._row % self._images
            take = min(missing, n - at)
            whole = take == self._images
            pieces = list(_runs(rows, failed, at, at + take, copy=not whole))
            at, self._row = at + take, self._row + take
            if whole:
                yield from self._chunks(pieces)
            else:
                self._staged += pieces
                if take == missing:
                    yield from self.flush()

    def flush(self) -> Iterator[Chunk]:
        """The unfinished chunk at the end of a shard, if there is one."""
        if self._staged:
            staged, self._staged = self._staged, []
            yield from self._chunks(staged)

    def _chunks(self, pieces: list[Piece]) -> Iterator[Chunk]:
        image = (self._row - 1) // self._images
        for part in np.ndindex(self._grid):
            window = tuple(slice(i * step, (i + 1) * step) for i, step in zip(part, self._spec.chunk[1:], strict=True))
            cut = [
                p if isinstance(p, int) or self._grid == (1,) * len(self._grid) else p[(slice(None), *window)]
                for p in pieces
            ]
            yield Chunk(self._layer, (image, *part), cut)


def _runs(rows: torch.Tensor, failed: Sequence[bool], start: int, stop: int, copy: bool) -> Iterator[Piece]:
    """Rows start..stop as few pieces: runs of good rows, and counts of failed ones."""
    while start < stop:
        end = start
        while end < stop and failed[end] == failed[start]:
            end += 1
        if failed[start]:
            yield end - start
        else:
            yield rows[start:end].clone(memory_format=torch.contiguous_format) if copy else rows[start:end]
        start = end


@dataclass(slots=True)
class Encoded:
    """The stored bytes of a chunk, their digest, and how many finite values were too large for float16."""

    payload: codecs.Stored
    digest: bytes
    overflowed: int


class Encoder:
    """Turns chunks into stored bytes, as a plan says. Safe to call from several threads at once."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._channels_last = codecs.takes_channels_last(plan.codec)

    def __call__(self, chunk: Chunk) -> Encoded:
        """Round, widen or narrow, shuffle, compress; count what overflows float16, and clip it if the plan says so."""
        plan, spec = self._plan, self._plan.layers[chunk.layer]
        values = math.prod(spec.chunk)
        narrow = spec.dtype == "float16" and spec.compute_dtype != "float16"
        bfloat16 = spec.compute_dtype == "bfloat16" and not narrow
        arrays: list[np.ndarray[Any, Any]] = []
        overflowed = 0
        for piece in self._padded(chunk, spec):
            if isinstance(piece, int):
                arrays.append(_fill(piece, spec, bfloat16))
            elif narrow:
                array, over = _narrowed(piece, plan.clip)
                arrays.append(array)
                overflowed += over
            else:
                arrays.append(as_array(piece, self._channels_last))
        payload = codecs.encode(
            arrays,
            codec=plan.codec,
            level=plan.level,
            dtype=spec.dtype,
            values=values,
            keep_bits=plan.keep_bits if np.dtype(spec.dtype).kind == "f" else None,
            bfloat16=bfloat16,
        )
        return Encoded(payload, chunk_digest(payload), overflowed)

    def all(self, task: Sequence[Chunk]) -> list[Encoded]:
        """The same of several."""
        return [self(chunk) for chunk in task]

    @staticmethod
    def _padded(chunk: Chunk, spec: LayerSpec) -> Iterator[Piece]:
        """The pieces with the edge of a split layer filled up to the full chunk."""
        for piece in chunk.pieces:
            if isinstance(piece, int) or piece.shape[1:] == spec.chunk[1:]:
                yield piece
            else:
                full = piece.new_zeros((piece.shape[0], *spec.chunk[1:]))
                if piece.is_floating_point():
                    full.fill_(float("nan"))
                full[tuple(slice(size) for size in piece.shape)] = piece
                yield full


def as_array(piece: torch.Tensor, channels_last: bool = False) -> np.ndarray[Any, Any]:
    """An array over the values of `piece` (n, …), C-contiguous; bfloat16 as its uint16 bit patterns.

    With `channels_last`, channels that lie side by side are left so: (n, channels, positions).
    """
    piece = piece.resolve_neg()
    if piece.dtype == torch.bfloat16:
        return as_array(piece.view(torch.int16), channels_last).view(np.uint16)
    if piece.is_contiguous() or piece.ndim < 3 or piece.stride(1) != 1:
        return piece.contiguous().numpy()
    if channels_last:  # by numpy, which does not give the GIL away for each of these, as torch does
        pixels = np.moveaxis(piece.numpy(), 1, -1)
        return pixels.reshape(len(piece), math.prod(piece.shape[2:]), piece.shape[1]).transpose(0, 2, 1)
    # One image at a time, as the transpose of a matrix: torch does that in blocks, two to five times as fast as
    # `contiguous` (docs/measurements), where the rows of the matrix follow each other. Those of some of the channels
    # are brought together first.
    planar = torch.empty(piece.shape, dtype=piece.dtype)
    for planes, image in zip(planar.flatten(2), piece.movedim(1, -1), strict=True):
        planes.copy_(image.contiguous().flatten(0, -2).t())
    return planar.numpy()


def _fill(rows: int, spec: LayerSpec, bfloat16: bool) -> np.ndarray[Any, Any]:
    shape = (rows, *spec.chunk[1:])
    return np.full(shape, 0x7FC0, np.uint16) if bfloat16 else np.full(shape, codecs.fill_value(spec.dtype), spec.dtype)


def _narrowed(piece: torch.Tensor, clip: bool) -> tuple[np.ndarray[Any, Any], int]:
    """(float32 values that fit into float16, how many finite ones did not)."""
    wide = piece.to(torch.float32)
    over = (wide.abs() > codecs.FLOAT16_MAX) & wide.isfinite()
    count = int(over.count_nonzero())
    if count and clip:
        wide = torch.where(over, wide.clamp(-codecs.FLOAT16_MAX, codecs.FLOAT16_MAX), wide)
    return wide.contiguous().numpy(), count
