"""What a tensor's cells see of the image, axis by axis: the values that the rules of `field_rules` work on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fmextract.capture.atoms import CHANNEL, TOKEN, UNKNOWN, Axes, Axis, length, plain

ROLES = ("y", "x")


EPS = 1e-6  # of a cell: below this, two intervals that floating point has kept apart are the same


Window = tuple[int, int]  # the first and the last cell that is read


class LostError(Exception):
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
            raise LostError
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
            raise LostError
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
class Operand:
    """A tensor before an operation. `seen` is None for what does not come from the image (weights, tables, masks)."""

    seen: Seen | None
    axes: Axes | None
    shape: tuple[int, ...]

    @property
    def known_axes(self) -> Axes:
        if self.seen is None:
            return tuple(plain(CHANNEL, size) for size in self.shape)
        if self.axes is None:
            raise LostError
        return self.axes


# ------------------------------------------------------------------------------------------------ axes


def _roles(axis: Axis) -> set[str]:
    """The directions of the image in which one moves along `axis`: all of them, where it is not known."""
    wide = {atom.role for atom in axis if atom.size > 1}
    return set(ROLES) if wide & {TOKEN, UNKNOWN} else wide & set(ROLES)


def moves_along(span: Span | None, axes: Axes, at: int, role: str) -> bool:
    """Whether one moves in a direction along the axis `at`, or may do so: it is not known, and the rest stands nowhere
    else."""
    if span is None or role not in _roles(axes[at]):
        return False
    explicit = any(atom.role == role for atom in axes[at])
    return explicit or math.prod(size for _, size in parts_of(axes, role)) < span.cells


def parts_of(axes: Axes, role: str) -> list[tuple[int, int]]:
    """(axis, size) of every part into which views have split a direction, as they come in memory order of the axes."""
    return [(i, atom.size) for i, axis in enumerate(axes) for atom in axis if atom.role == role and atom.size > 1]


def is_whole(axis: Axis, role: str, cells: int) -> bool:
    """Whether the axis is one direction, all of it, in order."""
    return len(axis) == 1 and axis[0].role == role and length(axis) == cells


def mapped(seen: Seen, change: Callable[[str, Span], Span | None]) -> Seen:
    """`seen` with another span along the axes that are placed."""
    y, x = (change(role, span) if (span := seen.span(role)) is not None else None for role in ROLES)
    return replace(seen, y=y, x=x)


def expect(span: Span | None, axes: Axes, at: int, role: str) -> None:
    """Make sure that the axis `at` is the whole of a direction, in order."""
    if span is None:
        return
    if not is_whole(axes[at], role, span.cells) or len(parts_of(axes, role)) > 1 or span.order != (0,):
        raise LostError


def join(seen: Sequence[Seen]) -> Seen:
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
                raise LostError
            known = joined[role]
            joined[role] = span if known is None else known.joined(span)
    return Seen(joined["y"], joined["x"], has_global)


def aligned(operand: Operand, out: Axes | None, skip: int | None = None) -> bool:
    """Whether the positions of `operand` stand along the same axes as in an output with axes `out`."""
    if operand.seen is None or not operand.seen.placed:
        return True
    if operand.axes is None or out is None:
        return operand.seen.everything
    axes, seen = operand.axes, operand.seen
    for at in range(-1, -1 - min(len(axes), len(out)), -1):
        moves = any(moves_along(seen.span(role), axes, at, role) for role in ROLES)
        own, their = (tuple(atom for atom in axis if _roles((atom,))) for axis in (axes[at], out[at]))
        if moves and own != their and len(axes) + at != skip:
            return False
    return True


def _absorb(span: Span, axes: Axes, at: int, role: str) -> Span:
    """The span after the values along axis `at` were mixed: all of a direction, its fast part, or nothing of it."""
    parts = parts_of(axes, role)
    inside = [k for k, (i, _) in enumerate(parts) if i == at]
    if not moves_along(span, axes, at, role):
        return span
    if len(inside) == len(parts):
        return replace(span, whole=True)
    if len(parts) != len(span.order) or [span.order[k] for k in inside] != [len(parts) - 1]:
        raise LostError
    size = parts[inside[0]][1]
    made = span.read([(i * size, i * size + size - 1) for i in range(span.cells // size)], size)
    return replace(made, order=tuple(rank for rank in span.order if rank != len(parts) - 1))


def absorbed(seen: Seen, axes: Axes, at: int) -> tuple[Seen, Axes]:
    """The same after the values along the axis `at` were mixed, which is then a plain axis of channels.

    Pixels that a view has put beside the channels (space to depth, patch merging) become part of the span.
    """
    mixed = mapped(seen, lambda role, span: _absorb(span, axes, at, role))
    return mixed, (*axes[:at], plain(CHANNEL, length(axes[at])), *axes[at + 1 :])
