"""Receptive fields: what the cells of a feature map can see of the image, by following every executed operation.

A cell's field is an interval along y and one along x. Operations with a window (convolution, pooling, interpolation,
padding, slices) say which cells of their input each cell of their output reads; joins of branches take the smallest
interval that holds those of all branches; attention and linear layers over positions see the whole image. Following the
executed graph, and not a list of layers, is what makes residual joins, dense blocks and branches come out right
(Araujo, Norris and Sim, "Computing Receptive Fields of Convolutional Neural Networks", Distill 2019, has the
arithmetic; here each rule lists the cells that are read, so that there is one formula for all of them).

What is the same for all positions is no part of a spatial field: a squeeze-excitation, or the statistics of a norm over
space. Such a side branch is left out, and the field says so (`has_global`). Where an operation is not known, the field
of everything that comes from it is None: never a wrong number.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from fmextract.axes import AxisTracer, Operation
from fmextract.capture.atoms import CHANNEL, TOKEN, UNKNOWN, Axes, Axis, image_axes, length, plain
from fmextract.records import Field
from fmextract.taps import Event, Forward, Probed, Reduce, tapped

ROLES = ("y", "x")
EPS = 1e-6  # of a cell: below this, two intervals that floating point has kept apart are the same

Window = tuple[int, int]  # the first and the last cell that is read


class _LostError(Exception):
    """An operation whose effect on positions is not known."""


@dataclass(frozen=True, slots=True)
class Span:
    """What the cells along one axis see: cell i covers [low, high] + i * stride, in pixels of the input.

    `bound`: at most that much. `whole`: all of the image; then the interval only says where the cell is. `order` tells
    apart the parts of an axis that a view has split: (0, 1) is the slow and the fast part as they come, (1, 0) swapped.
    """

    low: float
    high: float
    stride: float
    cells: int
    bound: bool = False
    whole: bool = False
    order: tuple[int, ...] = (0,)

    def read(self, windows: Sequence[Window | None], ratio: float) -> Span:
        """The span of an output whose cell i reads the cells `windows[i]` of this one, None where it reads nothing.

        `ratio` is the stride of the output in cells of this axis. Windows that are not all alike give a bound.
        """
        first = [window[0] - i * ratio for i, window in enumerate(windows) if window]
        last = [window[1] - i * ratio for i, window in enumerate(windows) if window]
        if not first:
            raise _LostError
        uneven = max(first) - min(first) > EPS or max(last) - min(last) > EPS or None in windows
        return replace(
            self,
            low=self.low + self.stride * min(first),
            high=self.high + self.stride * max(last),
            stride=self.stride * ratio,
            cells=len(windows),
            bound=self.bound or uneven,
        )

    def joined(self, other: Span) -> Span:
        """The smallest span that holds both, cell by cell."""
        if self.cells != other.cells or self.order != other.order:
            raise _LostError
        # Along an axis the edges drift apart by the difference of the strides: the ends are the extremes.
        drift = (other.stride - self.stride) * (self.cells - 1)
        apart = abs(drift) > EPS * self.stride
        return replace(
            self,
            low=min(self.low, other.low, other.low + drift),
            high=max(self.high, other.high, other.high + drift),
            bound=self.bound or other.bound or apart,
            whole=self.whole or other.whole,
        )


@dataclass(frozen=True, slots=True)
class Seen:
    """What a tensor that comes from the image sees of it. A span of None: the same part, all of it, for every cell."""

    y: Span | None
    x: Span | None
    has_global: bool = False

    def span(self, role: str) -> Span | None:
        """Along `y` or `x`."""
        return self.y if role == "y" else self.x

    @property
    def placed(self) -> list[Span]:
        """The spans along which cells differ."""
        return [span for span in (self.y, self.x) if span is not None]

    @property
    def everything(self) -> bool:
        """Whether all cells see the whole image, so that it does not matter which one is which."""
        return all(span.whole for span in self.placed)


LOST = Seen(None, None)  # told apart by identity: from the image, but nobody knows from where


@dataclass(frozen=True, slots=True)
class _Operand:
    """A tensor before an operation. `seen` is None for what does not come from the image (weights, tables, masks)."""

    seen: Seen | None
    axes: Axes | None
    shape: tuple[int, ...]

    @property
    def known_axes(self) -> Axes:
        if self.seen is None:
            return tuple(plain(CHANNEL, size) for size in self.shape)
        if self.axes is None:
            raise _LostError
        return self.axes


class _Operation(Operation):
    """One executed operation, and what its tensors saw before it ran."""

    def __init__(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], tracer: FieldTracer) -> None:
        super().__init__(func, args, kwargs, tracer)
        self.before = {id(t): tracer.operand(t) for t in self.tensors}
        self.out_axes: Axes | None = None

    @property
    def sources(self) -> list[_Operand]:
        """The tensors among the arguments that come from the image."""
        return [operand for operand in self.before.values() if operand.seen is not None]

    def operand(self, name: str) -> _Operand:
        return self.before[id(self.args[name])]

    def seen_of(self, name: str) -> tuple[Seen, Axes]:
        """The operand `name`, when nothing else comes from the image."""
        operand = self.operand(name)
        if operand.seen is None or len(self.sources) > 1:
            raise _LostError
        return operand.seen, operand.known_axes

    def dims(self, name: str, ndim: int) -> set[int]:
        """The axes that argument `name` (an int, a list, or None for all) stands for, counted from 0."""
        value = self.args[name]
        if value is None or value == []:
            return set(range(ndim))
        return {d % ndim for d in ([value] if isinstance(value, int) else value)}


Rule = Callable[[_Operation], Seen | None]


class FieldTracer(AxisTracer):
    """Follow the receptive fields of all tensors through every operation executed inside the `with` block.

    >>> with torch.no_grad(), FieldTracer() as tracer:
    ...     tracer.seed(x, image_axes(x.shape))
    ...     y = model(x)
    >>> tracer.field(y, ("batch", "channel", "y", "x"))

    Ask for the field of a tensor before it is overwritten: an in-place operation changes what it sees.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: Any = WeakTensorKeyDictionary()
        self._writes: Counter[int] = Counter()
        self._storages: dict[int, StorageWeakRef] = {}
        self.image_size = (0, 0)

    def seed(self, tensor: torch.Tensor, axes: Axes) -> None:
        """Say that `tensor` (…, y, x) is the image."""
        super().seed(tensor, axes)
        height, width = self.image_size = (int(tensor.shape[-2]), int(tensor.shape[-1]))
        self._note(tensor, Seen(Span(0, 1, 1, height), Span(0, 1, 1, width)))

    def seen(self, tensor: torch.Tensor) -> Seen | None:
        """What `tensor` sees, LOST where that is not known, None where it does not come from the image."""
        writes = self._writes[_storage(tensor)]
        seen, then = self._seen.get(tensor, (None, 0))
        # Written through another view of the same memory: what was known of this one is out of date.
        return seen if then == writes else LOST

    def operand(self, tensor: torch.Tensor) -> _Operand:
        """`tensor` as an operation finds it."""
        return _Operand(self.seen(tensor), self.axes(tensor), tuple(tensor.shape))

    def field(self, tensor: torch.Tensor, names: Sequence[str]) -> Field | None:
        """The receptive field of `tensor`, whose axes are called `names`; None where it is not defined.

        Without axes y and x, only a tensor that sees the whole image has a field.
        """
        seen, axes = self.seen(tensor), self.axes(tensor)
        if seen is None or seen is LOST:
            return None
        spatial = [role for role in ROLES if role in names]
        if not spatial:
            return self._field(seen, (1, 1)) if seen.everything else None
        if len(spatial) != len(ROLES) or axes is None or len(axes) != len(names):
            return None
        try:
            for at, name in enumerate(names):
                if name not in ROLES:
                    seen, axes = _absorbed(seen, axes, at)
            for role in ROLES:
                _expect(seen.span(role), axes, names.index(role), role)
        except _LostError:
            return None
        return self._field(seen, (tensor.shape[names.index("y")], tensor.shape[names.index("x")]))

    def _field(self, seen: Seen, cells: tuple[int, int]) -> Field:
        whole = any(span is None or span.whole for span in (seen.y, seen.x))
        # Cells that stand nowhere in particular are given places spread evenly over the image.
        y, x = (
            span if span is not None and span.cells == n else Span(0, size / n, size / n, n)
            for span, size, n in zip((seen.y, seen.x), self.image_size, cells, strict=True)
        )
        size = self.image_size if whole else (y.high - y.low, x.high - x.low)
        return Field(
            size=(float(size[0]), float(size[1])),
            stride=(float(y.stride), float(x.stride)),
            offset=((y.low + y.high) / 2, (x.low + x.high) / 2),
            # `whole` stands for both axes: where only one is, it is a bound.
            bound=any(span.bound for span in seen.placed) or (whole and not seen.everything),
            whole=whole,
            has_global=seen.has_global and not whole,
        )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        operation = _Operation(func, args, kwargs or {}, self)
        out = func(*args, **(kwargs or {}))
        self.follow(operation, out)
        for tensor in operation.out:
            operation.out_axes = self.axes(tensor)
            seen = _result(operation, tensor)
            before = operation.before.get(id(tensor))
            if operation.mutates and before is not None and before.seen != seen:
                self._writes[_storage(tensor, self._storages)] += 1
            self._note(tensor, seen)
        return out

    def _note(self, tensor: torch.Tensor, seen: Seen | None) -> None:
        if seen is not None:
            self._seen[tensor] = (seen, self._writes[_storage(tensor)])
        elif tensor in self._seen:
            del self._seen[tensor]


def _storage(tensor: torch.Tensor, keep: dict[int, StorageWeakRef] | None = None) -> int:
    """The identity of the memory behind `tensor`. A reference in `keep` prevents its number from being used again."""
    if tensor.layout != torch.strided:
        return id(tensor)
    reference = StorageWeakRef(tensor.untyped_storage())
    if keep is not None:
        keep.setdefault(reference.cdata, reference)
    return int(reference.cdata)


def _result(operation: _Operation, tensor: torch.Tensor) -> Seen | None:
    """What an output of `operation` sees."""
    sources = operation.sources
    if not sources or operation.name in _CONSTANTS:
        return None
    if any(source.seen is LOST for source in sources):
        return LOST
    rule = RULES.get(operation.name) or RULES.get(operation.name.rstrip("_"))
    if rule is None and not operation.pointwise:
        return LOST
    try:
        seen = (rule or _pointwise)(operation)
    except (_LostError, LookupError, TypeError, ValueError):  # also an overload with other arguments than is known here
        return LOST
    if seen is not None and operation.out_axes is None and not seen.everything:
        return LOST
    return seen


# ------------------------------------------------------------------------------------------------ axes


def _roles(axis: Axis) -> set[str]:
    """The directions of the image in which one moves along `axis`: all of them, where it is not known."""
    wide = {atom.role for atom in axis if atom.size > 1}
    return set(ROLES) if wide & {TOKEN, UNKNOWN} else wide & set(ROLES)


def _moves(span: Span | None, axes: Axes, at: int, role: str) -> bool:
    """Whether one moves in a direction along the axis `at`, or may do so: it is not known, and the rest stands nowhere
    else."""
    if span is None or role not in _roles(axes[at]):
        return False
    explicit = any(atom.role == role for atom in axes[at])
    return explicit or math.prod(size for _, size in _parts(axes, role)) < span.cells


def _parts(axes: Axes, role: str) -> list[tuple[int, int]]:
    """(axis, size) of every part into which views have split a direction, as they come in memory order of the axes."""
    return [(i, atom.size) for i, axis in enumerate(axes) for atom in axis if atom.role == role and atom.size > 1]


def _is_whole(axis: Axis, role: str, cells: int) -> bool:
    """Whether the axis is one direction, all of it, in order."""
    return len(axis) == 1 and axis[0].role == role and length(axis) == cells


def _map(seen: Seen, change: Callable[[str, Span], Span | None]) -> Seen:
    """`seen` with another span along the axes that are placed."""
    y, x = (change(role, span) if (span := seen.span(role)) is not None else None for role in ROLES)
    return replace(seen, y=y, x=x)


def _expect(span: Span | None, axes: Axes, at: int, role: str) -> None:
    """Make sure that the axis `at` is the whole of a direction, in order."""
    if span is None:
        return
    if not _is_whole(axes[at], role, span.cells) or len(_parts(axes, role)) > 1 or span.order != (0,):
        raise _LostError


def _join(seen: Sequence[Seen]) -> Seen:
    """The union of several branches; one that is the same for every cell is left out of it, and flagged."""
    has_global = any(one.has_global for one in seen)
    joined: dict[str, Span | None] = {}
    for role in ROLES:
        placed = [span for one in seen if (span := one.span(role)) is not None]
        most = max((span.cells for span in placed), default=0)
        local = [span for span in placed if span.cells == most]
        has_global |= bool(local) and len(local) < len(seen)
        joined[role] = None
        for span in local:
            if any(other.cells not in (1, most) for other in placed):
                raise _LostError
            known = joined[role]
            joined[role] = span if known is None else known.joined(span)
    return Seen(joined["y"], joined["x"], has_global)


def _aligned(operand: _Operand, out: Axes | None, skip: int | None = None) -> bool:
    """Whether the positions of `operand` stand along the same axes as in an output with axes `out`."""
    if operand.seen is None or not operand.seen.placed:
        return True
    if operand.axes is None or out is None:
        return operand.seen.everything
    axes, seen = operand.axes, operand.seen
    for at in range(-1, -1 - min(len(axes), len(out)), -1):
        moves = any(_moves(seen.span(role), axes, at, role) for role in ROLES)
        own, their = (tuple(atom for atom in axis if _roles((atom,))) for axis in (axes[at], out[at]))
        if moves and own != their and len(axes) + at != skip:
            return False
    return True


def _union(operation: _Operation, out: Axes | None, skip: int | None = None) -> Seen:
    if not all(_aligned(source, out, skip) for source in operation.sources):
        raise _LostError
    return _join([source.seen for source in operation.sources if source.seen is not None])


def _absorb(span: Span, axes: Axes, at: int, role: str) -> Span:
    """The span after the values along axis `at` were mixed: all of a direction, its fast part, or nothing of it."""
    parts = _parts(axes, role)
    inside = [k for k, (i, _) in enumerate(parts) if i == at]
    if not _moves(span, axes, at, role):
        return span
    if len(inside) == len(parts):
        return replace(span, whole=True)
    if len(parts) != len(span.order) or [span.order[k] for k in inside] != [len(parts) - 1]:
        raise _LostError
    size = parts[inside[0]][1]
    made = span.read([(i * size, i * size + size - 1) for i in range(span.cells // size)], size)
    return replace(made, order=tuple(rank for rank in span.order if rank != len(parts) - 1))


def _absorbed(seen: Seen, axes: Axes, at: int) -> tuple[Seen, Axes]:
    """The same after the values along the axis `at` were mixed, which is then a plain axis of channels.

    Pixels that a view has put beside the channels (space to depth, patch merging) become part of the span.
    """
    mixed = _map(seen, lambda role, span: _absorb(span, axes, at, role))
    return mixed, (*axes[:at], plain(CHANNEL, length(axes[at])), *axes[at + 1 :])


# ------------------------------------------------------------------------------------ rules: windows

Windows = tuple[list[Window | None], float]


def _windowed(name: str, windows: Callable[[_Operation, int, int, int], Windows | None]) -> Rule:
    """A rule for an operation on argument `name`, (batch, channel, …, y, x).

    `windows(operation, axis, cells, out)` gives the cells that each of the `out` output cells reads along `axis`, -2 or
    -1, and the stride; None where all of them read the same.
    """

    def rule(operation: _Operation) -> Seen:
        seen, axes = operation.seen_of(name)
        shape = operation.out[0].shape
        count = len(shape) - 2
        seen, axes = _absorbed(seen, axes, 1)
        made = {role: seen.span(role) for role in ROLES}
        for role, axis in zip(ROLES[-count:], range(-min(2, count), 0), strict=True):
            span = seen.span(role)
            _expect(span, axes, axis, role)
            found = windows(operation, axis, span.cells, shape[axis]) if span is not None else None
            made[role] = span.read(*found) if span is not None and found is not None else None
        return replace(seen, y=made["y"], x=made["x"])

    return rule


def _along(value: Any, axis: int) -> Any:
    """The entry of a list a direction has, where a list of one stands for all directions."""
    return value[axis] if len(value) > 1 else value[0]


def _sliding(kernel: int, stride: int, padding: int, dilation: int, out: int) -> Windows:
    starts = [i * stride - padding for i in range(out)]
    return [(start, start + dilation * (kernel - 1)) for start in starts], stride


def _convolution(operation: _Operation, axis: int, cells: int, out: int) -> Windows:
    args = operation.args
    kernel = int(args["weight"].shape[axis])
    stride, padding, dilation = (_along(args[name], axis) for name in ("stride", "padding", "dilation"))
    if not args["transposed"]:
        return _sliding(kernel, stride, padding, dilation, out)
    # Input cell m goes to output cells m * stride - padding + dilation * tap: these are the m that end up in cell i.
    places = [[i + padding - dilation * tap for tap in range(kernel)] for i in range(out)]
    sources = [[place // stride for place in row if place % stride == 0] for row in places]
    return [(min(row), max(row)) if row else None for row in sources], 1 / stride


def _pool(operation: _Operation, axis: int, cells: int, out: int) -> Windows:
    args = operation.args
    kernel, padding = (_along(args[name], axis) for name in ("kernel_size", "padding"))
    stride = _along(args["stride"] or args["kernel_size"], axis)
    return _sliding(kernel, stride, padding, _along(args.get("dilation", [1]), axis), out)


def _adaptive_pool(operation: _Operation, axis: int, cells: int, out: int) -> Windows | None:
    if out == 1 < cells:
        return None
    return [(i * cells // out, -(-(i + 1) * cells // out) - 1) for i in range(out)], cells / out


def _interpolation(reach: float, exact: bool) -> Callable[[_Operation, int, int, int], Windows | None]:
    """`reach`: how far from its centre a kernel takes, in cells; 0 is the nearest, at pixel centres where `exact`."""

    def windows(operation: _Operation, axis: int, cells: int, out: int) -> Windows | None:
        args = operation.args
        if cells == 1 < out:
            return None
        scale = args.get("scales_h" if axis == -2 else "scales_w", args.get("scales"))
        ratio = 1 / scale if scale else cells / out
        half = 0.5 if exact else 0.0
        if args.get("align_corners") and out > 1:
            ratio, half = (cells - 1) / (out - 1), 0.0
        wide = reach * max(1.0, ratio) if operation.name.endswith("_aa") else reach
        # Where a place falls between two cells by rounding alone, it may be either.
        slack = 0.0 if (ratio * 64).is_integer() else 1e-4
        found: list[Window | None] = []
        for i in range(out):
            centre = (i + half) * ratio - (half if reach else 0.0)
            low = math.floor(centre - slack) if not reach else math.floor(centre - wide - slack) + 1
            high = math.floor(centre + slack) if not reach else math.ceil(centre + wide + slack) - 1
            found.append((min(max(low, 0), cells - 1), min(max(high, 0), cells - 1)))
        return found, ratio

    return windows


def _pixel_shuffle(operation: _Operation, axis: int, cells: int, out: int) -> Windows:
    factor = operation.args["upscale_factor"]
    return [(i // factor, i // factor) for i in range(out)], 1 / factor


def _pixel_unshuffle(operation: _Operation, axis: int, cells: int, out: int) -> Windows:
    factor = operation.args["downscale_factor"]
    return _sliding(factor, factor, 0, 1, out)


# ---------------------------------------------------------------------- rules: one axis after another


def _change_axis(seen: Seen, axes: Axes, at: int, change: Callable[[Span], Span]) -> Seen:
    """`change` the span along the axis `at`, where that is one direction in order; positions elsewhere stay."""

    def one(role: str, span: Span) -> Span:
        if not _moves(span, axes, at, role):
            return span
        if not _is_whole(axes[at], role, span.cells):
            if span.whole:
                return span
            raise _LostError
        _expect(span, axes, at, role)
        return change(span)

    return _map(seen, one)


def _slice(operation: _Operation) -> Seen:
    seen, axes = operation.seen_of("self")
    at = operation.args["dim"] % len(axes)
    taken = range(*slice(*(operation.args[name] for name in ("start", "end", "step"))).indices(length(axes[at])))
    return _change_axis(seen, axes, at, lambda span: span.read([(i, i) for i in taken], taken.step))


def _pad(operation: _Operation) -> Seen:
    """Padding shifts the cells; a negative one crops. What is filled with other cells makes the field a bound: at the
    border it is of pixels that stand elsewhere.
    """
    name = "input" if "input" in operation.args else "self"
    seen, axes = operation.seen_of(name)
    pads = operation.args["pad"] if "pad" in operation.args else operation.args["padding"]
    for k in range(len(pads) // 2):
        at = len(axes) - 1 - k
        before, cells = pads[2 * k], operation.out[0].shape[at]
        if any(pads[2 * k : 2 * k + 2]):
            filled = operation.name != "constant_pad_nd" and max(pads[2 * k : 2 * k + 2]) > 0
            change = functools.partial(_shifted, by=-before, cells=cells, bound=filled)
            seen = _change_axis(seen, axes, at, change)
    return seen


def _roll(operation: _Operation) -> Seen:
    """Cells that go out on one side come in on the other: everything may be seen, and rolling back restores places."""
    seen, axes = operation.seen_of("self")
    if not operation.args["dims"]:
        raise _LostError
    for shift, dim in zip(operation.args["shifts"], operation.args["dims"], strict=True):
        at = dim % len(axes)
        seen = _change_axis(seen, axes, at, functools.partial(_shifted, by=-shift, cells=length(axes[at])))
        seen = _change_axis(seen, axes, at, lambda span: replace(span, whole=True, bound=True))
    return seen


def _shifted(span: Span, by: int, cells: int, bound: bool = False) -> Span:
    moved = span.read([(i + by, i + by) for i in range(cells)], 1)
    return replace(moved, bound=moved.bound or bound)


def _part(operation: _Operation) -> Seen:
    """split, unbind, select: other axes stay as they are; pieces of a direction are not followed."""
    seen, axes = operation.seen_of("self")

    return _change_axis(seen, axes, operation.args["dim"] % len(axes), _only_whole)


def _reduce(operation: _Operation) -> Seen:
    """mean, sum, amax, var … over given axes: what is taken over a whole direction is the same for every cell."""
    name = "self" if "self" in operation.args else "input"
    seen, axes = operation.seen_of(name)
    dims = operation.dims("dim", len(axes)) if "dim" in operation.args else set(range(len(axes)))

    def one(role: str, span: Span) -> Span | None:
        parts = _parts(axes, role)
        gone = [size for i, size in parts if i in dims]
        if not any(_moves(span, axes, i, role) for i in dims):
            return span
        if len(gone) < len(parts):
            raise _LostError
        return None

    return _map(seen, one)


def _expand(operation: _Operation) -> Seen:
    """One cell that is spread over many is the same for all of them."""
    seen, axes = operation.seen_of("self")
    sizes = operation.out[0].shape[-len(axes) :] if axes else ()
    spread = {atom.role for axis, size in zip(axes, sizes, strict=True) for atom in axis if atom.size == 1 < size}
    return _map(seen, lambda role, span: None if role in spread else span)


# ------------------------------------------------------------------------------- rules: same positions


def _pointwise(operation: _Operation) -> Seen:
    """Element by element, broadcast: the union of the operands."""
    return _union(operation, operation.out_axes)


def _copy(operation: _Operation) -> Seen | None:
    """copy_(self, src): what was there is gone."""
    source = operation.operand("src")
    if source.seen is None:
        return None
    if source.shape != tuple(operation.out[0].shape) or not _aligned(source, operation.out_axes):
        raise _LostError
    return source.seen


def _cat(operation: _Operation) -> Seen:
    out = operation.out_axes
    at = operation.args["dim"] % operation.out[0].dim()
    seen = _union(operation, out, skip=at)
    for source in operation.sources:
        # A class token before the patches makes an axis of tokens, in which nothing is looked up by place any more.
        if out is not None and not any(atom.role == TOKEN for atom in out[at]):
            _change_axis(seen, source.known_axes, at, _only_whole)
    return seen


def _only_whole(span: Span) -> Span:
    if not span.whole:
        raise _LostError
    return span


def _stack(operation: _Operation) -> Seen:
    at = operation.args["dim"] % operation.out[0].dim()
    out = operation.out_axes
    return _union(operation, None if out is None else (*out[:at], *out[at + 1 :]))


def _view(operation: _Operation) -> Seen:
    """A view keeps positions. It may split a direction into parts, and merge them where they are in order."""
    seen, axes = operation.seen_of("self")
    out = operation.out_axes
    if out is None:
        raise _LostError

    def one(role: str, span: Span) -> Span:
        old, new = ([size for _, size in _parts(some, role)] for some in (axes, out))
        if old == new:
            return span
        if span.order != tuple(sorted(span.order)):
            raise _LostError
        return replace(span, order=tuple(range(max(1, len(new)))))

    return _map(seen, one)


def _permute(operation: _Operation) -> Seen:
    """permute, transpose, t: the parts of a direction may change their order."""
    seen, axes = operation.seen_of("self")
    order = list(range(len(axes)))
    if "dims" in operation.args:
        order = [d % len(axes) for d in operation.args["dims"]]
    else:
        a, b = operation.args.get("dim0", 0), operation.args.get("dim1", -1)
        order[a], order[b] = order[b], order[a]

    def one(role: str, span: Span) -> Span:
        parts, own = _parts(axes, role), len(span.order)
        if len(parts) < 2:
            return span
        moved = [k for j in order for k, (i, _) in enumerate(parts) if i == j]
        # An attention map has positions twice, those of its rows first: these are the ones that are followed.
        if len(parts) < own or any(k >= own for k in moved[:own]):
            raise _LostError
        return replace(span, order=tuple(span.order[k] for k in moved[:own]))

    return _map(seen, one)


def _same_shape(operation: _Operation) -> Seen:
    """as_strided keeps positions only where it keeps the axes."""
    seen, axes = operation.seen_of("self")
    if operation.out_axes != axes:
        raise _LostError
    return seen


def _first(operation: _Operation) -> Seen:
    """Everything stays where it is."""
    return operation.seen_of("self" if "self" in operation.args else "input")[0]


# ------------------------------------------------------------------------------------- rules: all positions


def _norm(operation: _Operation) -> Seen:
    """Batch norm uses statistics of its own; by those of the batch, as in an instance norm, everything has a part."""
    seen = operation.seen_of("input")[0]
    spatial = operation.name == "native_group_norm" or operation.args.get("training", operation.name.endswith("legit"))
    return replace(seen, has_global=seen.has_global or (spatial and _is_spread(seen)))


def _is_spread(seen: Seen) -> bool:
    return any(span.cells > 1 for span in seen.placed)


def _layer_norm(operation: _Operation) -> Seen:
    seen, axes = operation.seen_of("input")
    return _over(seen, axes, range(len(axes) - len(operation.args["normalized_shape"]), len(axes)))


def _softmax(operation: _Operation) -> Seen:
    seen, axes = operation.seen_of("self")
    return _over(seen, axes, [operation.args["dim"] % len(axes)])


def _over(seen: Seen, axes: Axes, dims: Iterable[int]) -> Seen:
    """Divided by a statistic over `dims`: a global part, where these hold all of a direction."""
    inside = set(dims)
    for role in ROLES:
        span, parts = seen.span(role), _parts(axes, role)
        if any(_moves(span, axes, i, role) for i in inside) and all(i in inside for i, _ in parts):
            seen = replace(seen, has_global=True)
    return seen


def _matrix_product(left: str, right: str) -> Rule:
    def rule(operation: _Operation) -> Seen:
        made = _product(operation.operand(left), operation.operand(right))
        others = [s.seen for s in operation.sources if s not in (operation.operand(left), operation.operand(right))]
        if made.seen is None or others:
            raise _LostError
        return made.seen

    return rule


def _linear(operation: _Operation) -> Seen:
    seen, axes = operation.seen_of("input")
    return _absorbed(seen, axes, len(axes) - 1)[0]


def _product(left: _Operand, right: _Operand) -> _Operand:
    """(…, n, k) x (…, k, m). Where k are positions, and both factors come from the image, it is attention."""
    a, b = left.known_axes, right.known_axes
    shape = (*left.shape[:-1], right.shape[-1])
    axes = (*a[:-1], b[-1])
    if left.seen is None or right.seen is None:
        known, own, at = (left, a, len(a) - 1) if left.seen is not None else (right, b, len(b) - 2)
        return _Operand(_absorbed(known.seen, own, at)[0] if known.seen is not None else None, axes, shape)
    spans: dict[str, Span | None] = {}
    has_global = left.seen.has_global or right.seen.has_global
    for role in ROLES:
        one, other = left.seen.span(role), right.seen.span(role)
        in_rows, in_columns = _moves(one, a, -2, role), _moves(other, b, -1, role)
        contracted = _moves(one, a, -1, role) or _moves(other, b, -2, role)
        if contracted or (in_rows and in_columns):
            # Windows stand in the axes before the last two.
            windowed = any(atom.role == role for axis in a[:-2] for atom in axis if atom.size > 1)
            placed = one if in_rows or other is None else other
            kept = placed is not None and (in_rows or in_columns or windowed)
            spans[role] = replace(placed, whole=True, bound=placed.bound or windowed) if placed and kept else None
        else:
            joined = _join([Seen(one, None), Seen(other, None)])
            spans[role] = joined.y
            has_global |= joined.has_global
    return _Operand(Seen(spans["y"], spans["x"], has_global), axes, shape)


def _attention(operation: _Operation) -> Seen:
    """softmax(q k^T) v."""
    query, key, value = (operation.operand(name) for name in ("query", "key", "value"))
    axes = key.known_axes
    turned = _Operand(key.seen, (*axes[:-2], axes[-1], axes[-2]), (*key.shape[:-2], key.shape[-1], key.shape[-2]))
    made = _product(_product(query, turned), value).seen
    if made is None:
        raise _LostError
    return made


def _self_attention(operation: _Operation) -> Seen:
    """The fused layers: (batch, token, feature), query, key and value all the same."""
    seen, axes = operation.seen_of("query" if "query" in operation.args else "src")
    return _map(seen, lambda role, span: replace(span, whole=True) if _moves(span, axes, -2, role) else span)


_CONSTANTS = frozenset(
    (
        "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "new_zeros", "new_ones",
        "new_full", "new_empty", "new_empty_strided", "zero_", "bernoulli",
    )
)  # fmt: skip

RULES: dict[str, Rule] = {
    "convolution": _windowed("input", _convolution),
    **dict.fromkeys(("max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool2d", "avg_pool3d"),
                    _windowed("self", _pool)),
    **dict.fromkeys(("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
                    _windowed("self", _adaptive_pool)),
    **dict.fromkeys(("upsample_nearest2d", "upsample_nearest3d"), _windowed("self", _interpolation(0, False))),
    **dict.fromkeys(("_upsample_nearest_exact2d", "_upsample_nearest_exact3d"),
                    _windowed("self", _interpolation(0, True))),
    **dict.fromkeys(("upsample_bilinear2d", "upsample_trilinear3d", "_upsample_bilinear2d_aa"),
                    _windowed("self", _interpolation(1, True))),
    **dict.fromkeys(("upsample_bicubic2d", "_upsample_bicubic2d_aa"), _windowed("self", _interpolation(2, True))),
    "pixel_shuffle": _windowed("self", _pixel_shuffle),
    "pixel_unshuffle": _windowed("self", _pixel_unshuffle),
    **dict.fromkeys(("constant_pad_nd", "reflection_pad2d", "replication_pad2d"), _pad),
    "slice": _slice,
    "roll": _roll,
    **dict.fromkeys(("split", "split_with_sizes", "unbind", "select"), _part),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "norm",
                     "linalg_vector_norm", "logsumexp"), _reduce),
    "expand": _expand,
    "copy_": _copy,
    "cat": _cat,
    "stack": _stack,
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy"), _view),
    **dict.fromkeys(("permute", "transpose", "t"), _permute),
    "as_strided": _same_shape,
    **dict.fromkeys(("squeeze", "unsqueeze", "alias", "detach", "clone", "lift_fresh", "contiguous", "_to_copy",
                     "native_dropout", "hardswish", "_prelu_kernel", "hardtanh", "leaky_relu", "elu", "celu", "mish",
                     "softplus", "threshold", "log_sigmoid_forward"), _first),
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
                     "cudnn_batch_norm", "miopen_batch_norm", "_batch_norm_with_update", "native_group_norm"), _norm),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), _layer_norm),
    **dict.fromkeys(("_softmax", "_log_softmax", "_safe_softmax"), _softmax),
    **dict.fromkeys(("mm", "bmm"), _matrix_product("self", "mat2")),
    "addmm": _matrix_product("mat1", "mat2"),
    "_addmm_activation": _matrix_product("mat1", "mat2"),
    "baddbmm": _matrix_product("batch1", "batch2"),
    "linear": _linear,
    **dict.fromkeys(
        (
            "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_attention_math", "scaled_dot_product_attention",
            "_scaled_dot_product_fused_attention_overrideable",
        ),
        _attention,
    ),
    **dict.fromkeys(("_native_multi_head_attention", "_transformer_encoder_layer_fwd"), _self_attention),
}  # fmt: skip


# ------------------------------------------------------------------------------------------ a whole model


Reduced = tuple[Reduce, tuple[str, ...]]  # what is kept of a tap: rows (b, …) to rows, and the axes of one image then


def trace_fields(
    model: nn.Module,
    forward: Forward,
    probed: Sequence[Probed],
    batch: torch.Tensor,
    reductions: Sequence[Reduced | None] | None = None,
    stop: Event | None = None,
) -> list[Field | None]:
    """The receptive field of every tap, by one forward pass over `batch` (b, channel, y, x), b of 2 or more.

    `reductions[i]` is what is kept of tap i, with the axes of one image of it: the field is of that. A field is None
    where it is not defined: no axes y and x and less than the whole image seen, or an operation that is not known.
    The model must be in the mode in which it will run. Raises what the forward raises, and CaptureError.
    """
    tracer = FieldTracer()
    fields: list[Field | None] = [None] * len(probed)

    def note(i: int) -> Reduce:
        reduction = reductions[i] if reductions else None

        def take(rows: torch.Tensor) -> torch.Tensor:
            kept = reduction[0](rows) if reduction else rows
            names = reduction[1] if reduction else probed[i].axes
            fields[i] = tracer.field(kept, ("batch", *names))
            return rows.new_empty(0)  # nothing is wanted of the values

        return take

    with tapped(model, probed, [note(i) for i in range(len(probed))], stop) as capture, torch.no_grad(), tracer:
        tracer.seed(batch, image_axes(batch.shape))
        capture.forward(forward, batch)
    return fields
