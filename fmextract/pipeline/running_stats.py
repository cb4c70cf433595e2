"""Running statistics per channel, and the images and places where each channel is strongest.

Counted are the finite values of the rows that are given, as the forward produced them. Everything is accumulated in
float64 (float32 on MPS, which has nothing wider). On a CPU that is one pass of `kernels`. Where these are not there, on
an accelerator, and where values are not finite, torch does it: a block small enough for the cache is widened once and
then read there by every statistic, so that main memory is read once.

The variance is that of shifted data: sums of x - K and (x - K)^2, with K the middle of the first values seen in the
channel, or 0 where that lies between them: then nothing has to be taken away. K lies among the data, hence
(K - mean)^2 is at most a small multiple of the variance and nothing cancels (T. F. Chan, G. H. Golub, R. J. LeVeque,
"Algorithms for computing the sample variance", The American Statistician 37, 1983). Beside it goes the covariance over
images of each image's channel means, of which `moments` takes the effective dimension. `merge` joins the statistics of
several shards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fmextract.common import kernels
from fmextract.storage.layer_stats import MOMENTS, MOST_COMPONENTS, NEAR_ZERO, TOP, Array, folding, merge

__all__ = ["MOMENTS", "TOGETHER", "TOP", "WORKSPACE", "RunningStats", "bytes_held", "covariance_bytes", "merge"]

NAMED_ROWS = 8
"""How many of the rows with non-finite values are remembered: enough to name some images."""

_CPU_BLOCK = 1 << 17  # values: 1 MiB of float64, where calls and cache misses cost least: benchmarks/reduce_stats.py
_DEVICE_BLOCK = 1 << 24  # values: enough to fill an accelerator, small beside its memory
_NEVER = torch.iinfo(torch.int64).max
_COVARIANCE_ROWS = 256  # images that enter the covariance together: by then a product of matrices runs at full speed
TOGETHER = 1 << 17  # values that enter the statistics together: of fewer, the calls cost more than the arithmetic
_COUNTED_IN_FLOAT32 = 1 << 24  # values of one map: up to here float32 counts exactly
_COLUMNS = 256  # of the covariance that are computed at once


WORKSPACE = 32 * _CPU_BLOCK
"""Bytes that a thread works in, at most: where `kernels` are not there, or values are not finite."""


def covariance_bytes(channels: int) -> int:
    """Bytes of a layer's covariance."""
    return 8 * min(channels, MOST_COMPONENTS) ** 2


def bytes_held(channels: int) -> int:
    """Bytes that the statistics of a layer hold, but for a little: its covariance, and the images that wait for it."""
    return covariance_bytes(channels) + 8 * min(channels, MOST_COMPONENTS) * _COVARIANCE_ROWS


class RunningStats:
    """Statistics of one layer over the rows of one shard.

    `shape` and `axes` are those of one image; the axis `channel` (else `feature`) is kept, everything else is a
    position. `top` is the number of strongest images a channel, 0 for none; values of at most `near_zero` either side
    of zero are counted where it is given. Raises ValueError where the axes have neither role.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        top: int,
        device: torch.device,
        near_zero: float | None = None,
    ) -> None:
        role = next((role for role in ("channel", "feature") if role in axes), None)
        if role is None or len(shape) != len(axes):
            raise ValueError(f"expected an axis 'channel' or 'feature', got {axes} for {shape}")
        self._shape, self._device, self._k, self._near_zero = shape, device, top, near_zero
        self._axis = axes.index(role)
        self._others = tuple((r, n) for r, n in zip(axes, shape, strict=True) if r != role)
        self._wide = torch.float32 if device.type == "mps" else torch.float64
        # A question to the CPU costs nothing; to an accelerator it costs a wait, so it is never asked.
        self._may_ask = device.type == "cpu"
        self._next_row = 0
        self._seen = 0  # values of one channel, finite or not
        self._unshifted, self._at_zero = True, False  # whether a channel may have no K yet; whether K is 0 everywhere
        channels = shape[self._axis]
        self._nonfinite = torch.zeros(channels, dtype=torch.int64, device=device)
        self._sum, self._squares, self._zeros, self._near = (self._full(0.0, channels) for _ in range(4))
        self._shift = self._full(torch.nan, channels)
        self._low, self._high = self._full(torch.inf, channels), self._full(-torch.inf, channels)
        self._top_value = self._full(-torch.inf, channels, top)
        self._top_row, self._top_position = (
            torch.full((channels, top), -1, dtype=torch.int64, device=device) for _ in range(2)
        )
        self._bad_rows = torch.full((NAMED_ROWS,), _NEVER, device=device)
        self._covariance = _RunningCovariance(channels, self._wide, device)
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def update(self, rows: Tensor, first_row: int, valid: Sequence[bool] | None = None) -> None:
        """Add the images of `rows` (B, *shape), any real type and any strides; row i is the global row first_row + i.

        `valid[i]` False leaves a row out. Batches come in the order of their rows. Nothing waits for the device. Copies
        of small batches wait until together they are worth the trouble.
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
            # Cut and joined, not indexed: an index would be uploaded, and that waits for the device.
            keep = [slice(i, i + 1) for i, good in enumerate(valid) if good] or [slice(0)]
            rows, numbers = (torch.cat([t[one] for one in keep]) for t in (rows, numbers))
        if rows.numel() == 0:
            return
        rows = rows.detach().resolve_neg()
        # Copied where it waits: it may be a view of something large.
        self._waiting.append((rows if rows.numel() >= TOGETHER else rows.clone(), numbers))
        if sum(batch.numel() for batch, _ in self._waiting) >= TOGETHER:
            self._enter()

    def _enter(self) -> None:
        """Let the batches that wait enter the statistics, as one."""
        if not self._waiting:
            return
        parts, self._waiting = self._waiting, []
        rows, numbers = parts[0] if len(parts) == 1 else (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        x = rows.movedim(1 + self._axis, 1).flatten(2) if rows.ndim > 2 else rows[:, :, None]
        peaks, masked = self._add(x, numbers)
        if self._k and self._may_ask and not masked:
            self._add_finite_top(x, peaks.numpy(), numbers.numpy())
        elif self._k:
            self._add_top(x, peaks, numbers)

    def result(self) -> dict[str, Array]:
        """The statistics so far, float64 and int64.

        MOMENTS, and NEAR_ZERO where it is counted, as (channels,); TOP as (channels, k) unless `top` is 0; COVARIANCE
        as `moments` says. Positions: `top_y` and `top_x` where the layer has these axes; of a token map `top_y` is the
        token and `top_x` -1; of a single value both are -1. Channels without values hold NaN.
        """
        self._enter()
        floats = [self._shift, self._sum, self._squares, self._low, self._high, self._zeros, self._near]
        shift, total, squares, low, high, zeros, near = torch.stack(floats).cpu().double().numpy()
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
        if self._near_zero is not None:
            moments[NEAR_ZERO] = near / n
        return moments | (self._top() if self._k else {}) | self._covariance.result(self._shift)

    def nonfinite_rows(self) -> list[int]:
        """The first rows, at most NAMED_ROWS of them, that hold NaN or infinite values."""
        self._enter()
        return [row for row in self._bad_rows.tolist() if row != _NEVER]

    def _full(self, value: float, *shape: int) -> Tensor:
        return torch.full(shape, value, dtype=self._wide, device=self._device)

    # ------------------------------------------------------------------------------------------ moments

    def _add(self, x: Tensor, numbers: Tensor) -> tuple[Tensor, bool]:
        """Add x (B, C, P) to the moments.

        Returns the highest finite value of each image and channel, (B, C), and whether there may be others than finite.
        """
        found = self._in_one_pass(x) if self._may_ask else None
        if found is None:
            found = self._in_blocks(x)
        self._sum.add_(found.sums.sum(0))
        for held, new in ((self._squares, found.squares), (self._zeros, found.zeros), (self._near, found.near)):
            held.add_(new)
        self._low = torch.minimum(self._low, found.low)
        self._high = torch.maximum(self._high, found.peaks.amax(0))
        self._covariance.add(found.sums / x.shape[2], None if found.bad is None else ~found.bad)
        self._seen += x.shape[0] * x.shape[2]
        if found.bad is not None and found.nonfinite is not None:
            self._nonfinite.add_(found.nonfinite)
            first_bad = numbers.masked_fill(~found.bad, _NEVER)
            self._bad_rows = torch.cat([self._bad_rows, first_bad]).sort().values[:NAMED_ROWS]
        return found.peaks, found.bad is not None

    def _in_one_pass(self, x: Tensor) -> _Found | None:
        """What is found of x (B, C, P) in memory of the host where all of it is finite, and there is a kernel for it;
        else None, and nothing has changed but K.
        """
        if not kernels.are_there() or x.dtype not in (torch.float32, torch.bfloat16):
            return None
        if self._unshifted and not self._shifted_at_once(x):
            first = x[:1].to(self._wide)
            self._shift_by(*_extremes(first, first.isfinite()))
        found = kernels.moments(_numbers(x), None if self._at_zero else self._shift.numpy(), self._near_zero)
        if found is None:
            return None
        return _Found(
            sums=torch.from_numpy(found.sums),
            squares=torch.from_numpy(found.squares),
            zeros=torch.from_numpy(found.zeros),
            near=torch.from_numpy(found.near),
            low=torch.from_numpy(found.low),
            peaks=torch.from_numpy(found.peaks),
        )

    def _in_blocks(self, x: Tensor) -> _Found:
        """What is found of the finite values of x (B, C, P). No wait for a device."""
        channels = x.shape[1]
        # Not in bfloat16, which would round the bound of what is near zero.
        exact = x.is_floating_point() and x.dtype.itemsize <= 4 and x.shape[2] <= _COUNTED_IN_FLOAT32
        kind = torch.float32 if exact else self._wide
        nonfinite, bad = torch.zeros_like(self._nonfinite), torch.zeros(len(x), dtype=torch.bool, device=self._device)
        found = _Found(
            sums=self._full(0.0, *x.shape[:2]),
            squares=self._full(0.0, channels),
            zeros=self._full(0.0, channels),
            near=self._full(0.0, channels),
            low=self._full(torch.inf, channels),
            peaks=self._full(-torch.inf, *x.shape[:2]),
            nonfinite=nonfinite,
            bad=bad,
        )
        for _, images, part, positions in _blocks(x, _CPU_BLOCK if self._may_ask else _DEVICE_BLOCK):
            block = x[images, part, positions]
            wide = block.to(self._wide, copy=True)
            whole = False
            if self._may_ask:  # the extremes of a block with a NaN or an infinity are not finite themselves
                low, high = wide.amin((0, 2)), wide.amax(2)
                whole = math.isfinite((low.sum() + high.sum()).item())
            if not whole:
                finite = wide.isfinite()
                low, high = _extremes(wide, finite)
                nonfinite[part].add_((~finite).sum((0, 2)))
                bad[images].logical_or_(~finite.flatten(1).all(1))
            self._shift_by(low, high, part)
            peaks = found.peaks[images, part]
            torch.maximum(peaks, high, out=peaks)
            found.low[part].copy_(torch.minimum(found.low[part], low))
            # As numbers, which torch adds up much faster than truth values. Nothing is true of NaN.
            short = block.to(kind)
            flags = torch.empty_like(short)
            found.zeros[part].add_(torch.eq(short, 0, out=flags).sum((0, 2)))
            if self._near_zero is not None:
                found.near[part].add_(torch.le(short.abs(), self._near_zero, out=flags).sum((0, 2)))
            wide.sub_(self._shift[part, None])
            if not whole:
                wide.masked_fill_(~finite, 0.0)
            found.sums[images, part].add_(wide.sum(2))
            found.squares[part].add_(wide.square_().sum((0, 2)))
        return found

    def _shift_by(self, low: Tensor, high: Tensor, channels: slice = slice(None)) -> None:
        """Give those of `channels` that have no K one between `low` (c,) and `high` (b, c); a channel in which no value
        was finite waits for its own.
        """
        high = high.amax(0)
        middle = (low / 2 + high / 2).masked_fill_((low <= 0) & (high >= 0), 0.0)  # of no finite value: inf - inf
        shift = self._shift[channels]
        shift.copy_(torch.where(shift.isnan(), middle, shift))
        self._unshifted = not self._may_ask or bool(self._shift.isnan().any())
        self._at_zero = self._may_ask and not bool(self._shift.any())

    def _shifted_at_once(self, x: Tensor) -> bool:
        """Do what `_shift_by` does, with the first values of all channels, where they are finite: with fewer calls."""
        if self._seen or x.dtype != torch.float32:
            return False
        first = x[0].numpy()
        low, high = first.min(1).astype(np.float64), first.max(1).astype(np.float64)  # NaN where one is there
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            return False
        middle = np.where((low <= 0) & (high >= 0), 0.0, low / 2 + high / 2)
        self._shift = torch.from_numpy(middle)
        self._unshifted, self._at_zero = False, not middle.any()
        return True

    # ------------------------------------------------------------------------------------ strongest images

    def _add_finite_top(self, x: Tensor, peaks: Array, numbers: Array) -> None:
        """Do what `_add_top` does in numpy, whose calls take a fraction of torch's: of x on a CPU, all of it finite."""
        k, value = self._k, self._top_value.numpy()
        row, position = self._top_row.numpy(), self._top_position.numpy()
        channels = np.flatnonzero((peaks > value[:, -1]).any(0))
        if not len(channels):
            return
        values = np.concatenate([value[channels], peaks.T[channels]], 1)
        order = np.argsort(-values, axis=1, kind="stable")[:, :k]
        values, held = np.take_along_axis(values, order, 1), np.minimum(order, k - 1)
        entered = (order >= k) & (values > -np.inf)
        image, channel = order[entered] - k, channels[np.nonzero(entered)[0]]
        found = kernels.places(_numbers(x), image, channel, values[entered])
        assert found is not None  # `kernels` gave the peaks
        for kept, new in ((row, numbers[image]), (position, found)):
            joined = np.take_along_axis(kept[channels], held, 1)
            joined[entered] = new
            kept[channels] = joined
        value[channels] = values

    def _add_top(self, x: Tensor, peaks: Tensor, numbers: Tensor) -> None:
        """Let the images of x (B, C, P) with their peaks (B, C) compete for the places of each channel."""
        channels = torch.arange(x.shape[1], device=self._device)
        if self._may_ask:
            channels = channels[(peaks > self._top_value[:, -1]).any(0)]
            if not len(channels):
                return
        # Of all channels a view does: to pick them one by one costs more than all the rest where they are few.
        those = slice(None) if len(channels) == x.shape[1] else channels
        # Held entries come first and rows ascend: a stable sort leaves the lower of two equal rows in front.
        values = torch.cat([self._top_value[those], peaks.T[those]], 1)
        values, order = (t[:, : self._k] for t in values.sort(dim=1, descending=True, stable=True))
        entered = (order >= self._k) & (values > -torch.inf)
        held, image = order.clamp(max=self._k - 1), (order - self._k).clamp(min=0)
        positions = self._positions(x, image, channels[:, None].expand_as(image), entered)
        self._top_value[those] = values
        self._top_row[those] = torch.where(entered, numbers[image], self._top_row[those].gather(1, held))
        self._top_position[those] = torch.where(entered, positions, self._top_position[those].gather(1, held))

    def _positions(self, x: Tensor, image: Tensor, channel: Tensor, wanted: Tensor) -> Tensor:
        """The first place of the highest finite value of x[image, channel], (…), at least where `wanted`."""
        positions = torch.zeros_like(image)
        if not self._may_ask:
            places = max(1, _DEVICE_BLOCK // (x.shape[1] * x.shape[2]))  # so many at a time bound the copy
            for i in range(0, image.shape[1], places):
                some = slice(i, i + places)
                maps = _finite_or_lowest(x[image[:, some], channel[:, some]])
                positions[:, some] = _first_highest(maps.flatten(0, 1)).view(maps.shape[:2])
            return positions
        for i in image[wanted].unique().tolist():
            its = wanted & (image == i)
            positions[its] = _first_highest(_finite_or_lowest(x[i].index_select(0, channel[its])))
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


class _RunningCovariance:
    """The covariance over images of one vector an image (the means of its channels), however the images come.

    Images wait until there are enough of them for one product of matrices, which is centred on their own mean; it
    joins the earlier ones by the pairwise update of `moments`. Of more than MOST_COMPONENTS channels, the covariance
    of their `moments.folding` is kept.
    """

    def __init__(self, channels: int, wide: torch.dtype, device: torch.device) -> None:
        self._fold: tuple[Tensor, Tensor] | None = None
        components = min(channels, MOST_COMPONENTS)
        if channels > components:
            order, signs = folding(channels)
            self._fold = torch.from_numpy(order).to(device), torch.from_numpy(signs).to(device, wide)
        self._count = torch.zeros((), dtype=wide, device=device)
        self._mean = torch.zeros(components, dtype=wide, device=device)
        self._scatter = torch.zeros(components, components, dtype=wide, device=device)
        self._origin: Tensor | None = None
        self._waiting: list[tuple[Tensor, Tensor | None]] = []
        self._rows = 0

    def add(self, vectors: Tensor, good: Tensor | None) -> None:
        """Add the images of `vectors` (B, channels), all finite, for which `good` (B,) holds: all, where it is None."""
        vectors = self._folded(vectors)
        if self._origin is None:
            self._origin = vectors[0].clone()
        # Taken from the first: where all images are alike, nothing is left whose rounding would pass for a dimension.
        self._waiting.append((vectors - self._origin, good))
        self._rows += len(vectors)
        if self._rows >= _COVARIANCE_ROWS:
            self._enter()

    def result(self, shift: Tensor) -> dict[str, Array]:
        """COVARIANCE of the images so far, to each of which `shift` (channels,) is added. NaN where there were none."""
        if self._waiting:
            self._enter()
        count = int(self._count)
        origin = 0.0 if self._origin is None else self._origin
        mean = (self._mean + origin + self._folded(shift[None])[0]).cpu().double().numpy()
        scatter = (self._scatter.tril() + self._scatter.tril(-1).T).cpu().double().numpy()
        return {
            "covariance": scatter / (count or np.nan),
            "covariance_mean": mean if count else np.full_like(mean, np.nan),
            "covariance_count": np.full(len(mean), count),
        }

    def _folded(self, vectors: Tensor) -> Tensor:
        if self._fold is None:
            return vectors
        order, signs = self._fold
        signed = vectors.index_select(1, order).mul_(signs)
        padded = torch.nn.functional.pad(signed, (0, -len(order) % MOST_COMPONENTS))
        components: Tensor = padded.unflatten(1, (-1, MOST_COMPONENTS)).sum(1)
        return components

    def _enter(self) -> None:
        parts, self._waiting, self._rows = self._waiting, [], 0
        rows = parts[0][0] if len(parts) == 1 else torch.cat([some for some, _ in parts])
        left_out = None
        if any(good is not None for _, good in parts):
            good = [torch.ones_like(some[:, 0], dtype=torch.bool) if g is None else g for some, g in parts]
            left_out = ~torch.cat(good)[:, None]
            rows = rows.masked_fill(left_out, 0.0)
        new = rows.new_full((), len(rows)) if left_out is None else (~left_out).sum().to(rows.dtype)
        total = self._count + new
        mean = rows.sum(0) / new.clamp(min=1)
        gap = mean - self._mean
        # The term between the two means is that of one more image: so one product does it all.
        between = gap * (self._count * new / total.clamp(min=1)).sqrt()
        centred = torch.cat([rows - mean, between[None]])
        if left_out is not None:
            centred[:-1].masked_fill_(left_out, 0.0)
        for i in range(0, len(mean), _COLUMNS):  # the lower triangle, nearly: the upper one is the same
            self._scatter[i:, i : i + _COLUMNS].addmm_(centred[:, i:].T, centred[:, i : i + _COLUMNS])
        self._mean += gap * (new / total.clamp(min=1))
        self._count = total


def _planes(x: Tensor) -> bool:
    """Whether the positions of a channel lie side by side in memory, rather than the channels of a position."""
    return x.shape[2] > 1 and x.stride(1) > x.stride(2)


def _blocks(x: Tensor, size: int) -> Iterator[tuple[int, slice, slice, slice]]:
    """Cut (B, C, P) into blocks of about `size` values, each in few long runs of memory: which part of the positions
    it is, then images, channels, positions. The last one is of the last part.
    """
    everything = slice(None)
    images = max(1, size // max(1, x[0].numel()))
    outer = 1 if _planes(x) else 2
    step = max(1, size // max(1, images * x.shape[3 - outer]))
    for b in range(0, len(x), images):
        for turn, i in enumerate(range(0, x.shape[outer], step)):
            part = slice(i, i + step)
            cut = (0, part, everything) if outer == 1 else (turn, everything, part)
            yield cut[0], slice(b, b + images), *cut[1:]


@dataclass(slots=True)
class _Found:
    """Of some images: sums of x - K and highest values (B, C), sums of (x - K)^2 and the others (C,), and which images
    hold values that are not finite (B,). The last two are None where all are finite.
    """

    sums: Tensor
    squares: Tensor
    zeros: Tensor
    near: Tensor
    low: Tensor
    peaks: Tensor
    nonfinite: Tensor | None = None
    bad: Tensor | None = None


def _numbers(x: Tensor) -> Array:
    """The values of x, float32 or bfloat16, as `kernels` takes them."""
    return x.numpy() if x.dtype == torch.float32 else x.view(torch.int16).numpy().view(np.uint16)


def _extremes(x: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
    """Of the values of x (b, c, p) that are `finite`: the lowest (c,), and the highest of each image (b, c)."""
    # masked_fill, not `where`, which uploads a number that it is given: that waits for the device.
    return x.masked_fill(~finite, torch.inf).amin((0, 2)), x.masked_fill(~finite, -torch.inf).amax(2)


def _finite_or_lowest(maps: Tensor) -> Tensor:
    return maps.masked_fill(~maps.isfinite(), -torch.inf) if maps.is_floating_point() else maps


def _first_highest(maps: Tensor) -> Tensor:
    """The first position of the highest value of each of (n, P). In bfloat16 `max` is four times as fast as argmax."""
    return maps.max(1).indices
