"""Running statistics per channel, and the images and places where each channel is strongest.

Counted are the finite values of the rows that are given, as the forward produced them. Everything is accumulated in
float64 (float32 on MPS, which has nothing wider): a block small enough for the cache is widened once and then read
there by every statistic, so that main memory is read once and no pass costs more than the cache can deliver.

The variance is that of shifted data: sums of x - K and (x - K)^2, with K the middle of the first values seen in the
channel. K lies among the data, hence (K - mean)^2 is at most a small multiple of the variance and nothing cancels
(T. F. Chan, G. H. Golub, R. J. LeVeque, "Algorithms for computing the sample variance", The American Statistician 37,
1983). `merge` joins the statistics of several shards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fmextract.moments import MOMENTS, TOP, Array, merge

__all__ = ["MOMENTS", "TOP", "RunningStats", "merge"]

NAMED_ROWS = 8
"""How many of the rows with non-finite values are remembered: enough to name some images."""

_CPU_BLOCK = 1 << 19  # values: 4 MiB of float64, where calls and cache misses cost least: benchmarks/reduce_stats.py
_DEVICE_BLOCK = 1 << 24  # values: enough to fill an accelerator, small beside its memory
_NEVER = torch.iinfo(torch.int64).max


class RunningStats:
    """Statistics of one layer over the rows of one shard.

    `shape` and `axes` are those of one image; the axis `channel` (else `feature`) is kept, everything else is a
    position. `top` is the number of strongest images a channel, 0 for none. Raises ValueError where the axes have
    neither role.
    """

    def __init__(self, shape: tuple[int, ...], axes: tuple[str, ...], top: int, device: torch.device) -> None:
        role = next((role for role in ("channel", "feature") if role in axes), None)
        if role is None or len(shape) != len(axes):
            raise ValueError(f"expected an axis 'channel' or 'feature', got {axes} for {shape}")
        self._shape, self._device, self._k = shape, device, top
        self._axis = axes.index(role)
        self._others = tuple((r, n) for r, n in zip(axes, shape, strict=True) if r != role)
        self._wide = torch.float32 if device.type == "mps" else torch.float64
        # A question to the CPU costs nothing; to an accelerator it costs a wait, so it is never asked.
        self._may_ask = device.type == "cpu"
        self._next_row = 0
        self._seen = 0  # values of one channel, finite or not
        self._unshifted = True  # whether a channel may still have no K
        channels = shape[self._axis]
        self._nonfinite = torch.zeros(channels, dtype=torch.int64, device=device)
        self._sum, self._squares, self._zeros = (self._full(0.0, channels) for _ in range(3))
        self._shift = self._full(torch.nan, channels)
        self._low, self._high = self._full(torch.inf, channels), self._full(-torch.inf, channels)
        self._top_value = self._full(-torch.inf, channels, top)
        self._top_row, self._top_position = (
            torch.full((channels, top), -1, dtype=torch.int64, device=device) for _ in range(2)
        )
        self._bad_rows = torch.full((NAMED_ROWS,), _NEVER, device=device)

    def update(self, rows: Tensor, first_row: int, valid: Sequence[bool] | None = None) -> None:
        """Add the images of `rows` (B, *shape), any real type and any strides; row i is the global row first_row + i.

        `valid[i]` False leaves a row out. Batches come in the order of their rows. Nothing waits for the device.
        Raises ValueError for another shape, for marks of other rows, and for a batch before the end of the last one.
        """
        if tuple(rows.shape[1:]) != self._shape:
            raise ValueError(f"expected rows of shape {self._shape}, got {tuple(rows.shape[1:])}")
        if valid is not None and len(valid) != len(rows):
            raise ValueError(f"expected {len(rows)} marks of valid rows, got {len(valid)}")
        if first_row < self._next_row:
            raise ValueError(f"expected rows from {self._next_row} on, got row {first_row}")
        self._next_row = first_row + len(rows)
        numbers = torch.arange(first_row, self._next_row, device=self._device)
        if valid is not None and not all(valid):
            keep = torch.tensor([i for i, good in enumerate(valid) if good], dtype=torch.int64).to(self._device)
            rows, numbers = rows.index_select(0, keep), numbers.index_select(0, keep)
        if rows.numel() == 0:
            return
        x = rows.detach().movedim(1 + self._axis, 1).flatten(2) if rows.ndim > 2 else rows.detach()[:, :, None]
        peaks, masked = self._add(x, numbers)
        if self._k:
            self._add_top(x, peaks, numbers, masked)

    def result(self) -> dict[str, Array]:
        """The statistics so far: MOMENTS as (channels,), TOP as (channels, k) unless `top` is 0; float64 and int64.

        Positions: `top_y` and `top_x` where the layer has these axes; of a token map `top_y` is the token and `top_x`
        -1; of a single value both are -1. Channels without values hold NaN.
        """
        floats = torch.stack([self._shift, self._sum, self._squares, self._low, self._high, self._zeros])
        shift, total, squares, low, high, zeros = floats.cpu().double().numpy()
        nonfinite = self._nonfinite.cpu().numpy()
        count = self._seen - nonfinite
        n = np.where(count, count, np.nan)
        offset = total / n
        moments = {
            "count": count,
            "mean": shift + offset,
            "std": np.sqrt(np.maximum(squares / n - offset**2, 0.0)),
            "min": np.where(count, low, np.nan),
            "max": np.where(count, high, np.nan),
            "zero_fraction": zeros / n,
            "nonfinite": nonfinite,
        }
        return moments | (self._top() if self._k else {})

    def nonfinite_rows(self) -> list[int]:
        """The first rows, at most NAMED_ROWS of them, that hold NaN or infinite values."""
        return [row for row in self._bad_rows.tolist() if row != _NEVER]

    def _full(self, value: float, *shape: int) -> Tensor:
        return torch.full(shape, value, dtype=self._wide, device=self._device)

    # ------------------------------------------------------------------------------------------ moments

    def _add(self, x: Tensor, numbers: Tensor) -> tuple[Tensor, bool]:
        """Add x (B, C, P) to the moments.

        Returns the highest finite value of each image and channel, (B, C), and whether there may be others than finite.
        """
        peaks = self._full(-torch.inf, *x.shape[:2])
        bad = torch.zeros(len(x), dtype=torch.bool, device=self._device)
        size = _CPU_BLOCK if self._may_ask else _DEVICE_BLOCK
        space = torch.empty(0, dtype=self._wide, device=self._device)
        for block in _blocks(x, size):
            images, channels, _ = block
            self._add_block(x[block], space, channels, peaks[images, channels], bad[images])
        self._seen += x.shape[0] * x.shape[2]
        self._unshifted = not self._may_ask or bool(self._shift.isnan().any())
        self._high = torch.maximum(self._high, peaks.amax(0))
        first_bad = torch.where(bad, numbers, _NEVER)
        self._bad_rows = torch.cat([self._bad_rows, first_bad]).sort().values[:NAMED_ROWS]
        return peaks, not self._may_ask or bool(bad.any())

    def _add_block(self, x: Tensor, space: Tensor, channels: slice, peaks: Tensor, bad: Tensor) -> None:
        """Add a block x (b, c, p). `space` is room to work in; `peaks` (b, c) and `bad` (b,) are views to be updated.

        Everything on the way is done in place in one block: fresh memory costs more than all the arithmetic.
        """
        wide = _like(x, space).copy_(x)
        low, high = wide.amin((0, 2)), wide.amax(2)
        finite = None
        # The extremes of a block with a NaN or an infinity are not finite themselves: no pass of its own to find out.
        if not self._may_ask or not math.isfinite((low.sum() + high.sum()).item()):
            finite = wide.isfinite()
            low = torch.where(finite, wide, torch.inf).amin((0, 2))
            high = torch.where(finite, wide, -torch.inf).amax(2)
            self._nonfinite[channels].add_((~finite).sum((0, 2)))
            bad.logical_or_(~finite.flatten(1).all(1))
        torch.maximum(peaks, high, out=peaks)
        self._low[channels].copy_(torch.minimum(self._low[channels], low))
        shift = self._shift[channels]
        if self._unshifted:
            # A channel without a finite value so far has inf - inf here, and waits for its K.
            shift.copy_(torch.where(shift.isnan(), low / 2 + high.amax(0) / 2, shift))
        wide.sub_(shift[:, None])
        if finite is not None:
            wide.masked_fill_(~finite, 0.0)
        self._sum[channels].add_(wide.sum((0, 2)))
        self._squares[channels].add_(wide.mul_(wide).sum((0, 2)))
        self._zeros[channels].add_(wide.copy_(x).eq_(0).sum((0, 2)))

    # ------------------------------------------------------------------------------------ strongest images

    def _add_top(self, x: Tensor, peaks: Tensor, numbers: Tensor, masked: bool) -> None:
        """Let the images of x (B, C, P) with their peaks (B, C) compete for the places of each channel."""
        channels = torch.arange(x.shape[1], device=self._device)
        if self._may_ask:
            channels = channels[(peaks > self._top_value[:, -1]).any(0)]
        # Held entries come first and rows ascend: a stable sort leaves the lower of two equal rows in front.
        values = torch.cat([self._top_value[channels], peaks.T[channels]], 1)
        values, order = (t[:, : self._k] for t in values.sort(dim=1, descending=True, stable=True))
        entered = (order >= self._k) & (values > -torch.inf)
        held, image = order.clamp(max=self._k - 1), (order - self._k).clamp(min=0)
        positions = self._positions(x, image, channels[:, None].expand_as(image), entered, masked)
        self._top_value[channels] = values
        self._top_row[channels] = torch.where(entered, numbers[image], self._top_row[channels].gather(1, held))
        self._top_position[channels] = torch.where(entered, positions, self._top_position[channels].gather(1, held))

    def _positions(self, x: Tensor, image: Tensor, channel: Tensor, wanted: Tensor, masked: bool) -> Tensor:
        """The first place of the highest finite value of x[image, channel], (…), at least where `wanted`."""
        positions = torch.zeros_like(image)
        if not self._may_ask:
            for i in range(image.shape[1]):  # one place at a time bounds the copy to one map a channel
                positions[:, i] = _first_highest(_finite_or_lowest(x[image[:, i], channel[:, i]]))
            return positions
        for i in image[wanted].unique().tolist():
            here = wanted & (image == i)
            maps = x[i].index_select(0, channel[here])
            positions[here] = _first_highest(_finite_or_lowest(maps) if masked else maps)
        return positions

    def _top(self) -> dict[str, Array]:
        value = self._top_value.cpu().double().numpy()
        row, position = torch.stack([self._top_row, self._top_position]).cpu().numpy()
        places = np.unravel_index(np.maximum(position, 0), [n for _, n in self._others] or [1])
        along = {role: place for (role, _), place in zip(self._others, places, strict=False)}
        nowhere = np.full_like(row, -1)
        y, x = along.get("y", along.get("token", nowhere)), along.get("x", nowhere)
        empty = row < 0
        return {
            "top_value": np.where(empty, np.nan, value),
            "top_sample": row,
            "top_y": np.where(empty, -1, y),
            "top_x": np.where(empty, -1, x),
        }


def _planes(x: Tensor) -> bool:
    """Whether the positions of a channel lie side by side in memory, rather than the channels of a position."""
    return x.shape[2] > 1 and x.stride(1) > x.stride(2)


def _blocks(x: Tensor, size: int) -> Iterator[tuple[slice, slice, slice]]:
    """Cut (B, C, P) into blocks of about `size` values, each in few long runs of memory."""
    everything = slice(None)
    images = max(1, size // max(1, x[0].numel()))
    outer = 1 if _planes(x) else 2
    step = max(1, size // max(1, images * x.shape[3 - outer]))
    for b in range(0, len(x), images):
        for i in range(0, x.shape[outer], step):
            part = slice(i, i + step)
            yield slice(b, b + images), *((part, everything) if outer == 1 else (everything, part))


def _like(x: Tensor, space: Tensor) -> Tensor:
    """Room of the shape and the order in memory of the block x (b, c, p), at the beginning of `space`."""
    b, c, p = x.shape
    if space.numel() < x.numel():
        space.resize_(x.numel())
    flat = space[: x.numel()]
    return flat.view(b, c, p) if _planes(x) else flat.view(b, p, c).transpose(1, 2)


def _finite_or_lowest(maps: Tensor) -> Tensor:
    return torch.where(maps.isfinite(), maps, -torch.inf) if maps.is_floating_point() else maps


def _first_highest(maps: Tensor) -> Tensor:
    """The first position of the highest value of each of (n, P). In bfloat16 `max` is four times as fast as argmax."""
    return maps.max(1).indices
