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

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from fmextract.capture.atoms import Axes, image_axes
from fmextract.capture.axes import AxisTracer
from fmextract.capture.field_rules import CONSTANTS, RULES, TracedOperation, pointwise
from fmextract.capture.hooks import tapped
from fmextract.capture.spans import LOST, ROLES, LostError, Operand, Seen, Span, absorbed, expect
from fmextract.capture.taps import Event, Forward, Probed, Reduce
from fmextract.records import Field


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

    def operand(self, tensor: torch.Tensor) -> Operand:
        """`tensor` as an operation finds it."""
        return Operand(self.seen(tensor), self.axes(tensor), tuple(tensor.shape))

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
                    seen, axes = absorbed(seen, axes, at)
            for role in ROLES:
                expect(seen.span(role), axes, names.index(role), role)
        except LostError:
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
        operation = TracedOperation(func, args, kwargs or {}, self)
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


def _result(operation: TracedOperation, tensor: torch.Tensor) -> Seen | None:
    """What an output of `operation` sees."""
    sources = operation.sources
    if not sources or operation.name in CONSTANTS:
        return None
    if any(source.seen is LOST for source in sources):
        return LOST
    rule = RULES.get(operation.name) or RULES.get(operation.name.rstrip("_"))
    if rule is None and not operation.pointwise:
        return LOST
    try:
        seen = (rule or pointwise)(operation)
    except (LostError, LookupError, TypeError, ValueError):  # also an overload with other arguments than is known here
        return LOST
    if seen is not None and operation.out_axes is None and not seen.everything:
        return LOST
    return seen


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
