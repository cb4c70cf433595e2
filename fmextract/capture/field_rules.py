"""What each operation does to receptive fields: one rule an operation, by the name that torch dispatches.

A rule takes what the inputs of an operation see and says what its output sees; `receptive_fields` applies them along
the graph that a forward pass executes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fmextract.capture.receptive_fields import FieldTracer


from fmextract.capture.atoms import TOKEN, Axes, length
from fmextract.capture.axes import ATTENTION, FUSED_ATTENTION, Operation
from fmextract.capture.spans import (
    ROLES,
    LostError,
    Operand,
    Seen,
    Span,
    Window,
    absorbed,
    aligned,
    expect,
    is_whole,
    join,
    mapped,
    moves_along,
    parts_of,
)


class TracedOperation(Operation):
    """One executed operation, and what its tensors saw before it ran."""

    def __init__(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], tracer: FieldTracer) -> None:
        super().__init__(func, args, kwargs, tracer)
        self.before = {id(t): tracer.operand(t) for t in self.tensors}
        self.out_axes: Axes | None = None

    @property
    def sources(self) -> list[Operand]:
        """The tensors among the arguments that come from the image."""
        return [operand for operand in self.before.values() if operand.seen is not None]

    def operand(self, name: str) -> Operand:
        return self.before[id(self.args[name])]

    def seen_of(self, name: str) -> tuple[Seen, Axes]:
        """The operand `name`, when nothing else comes from the image."""
        operand = self.operand(name)
        if operand.seen is None or len(self.sources) > 1:
            raise LostError
        return operand.seen, operand.known_axes

    def dims(self, name: str, ndim: int) -> set[int]:
        """The axes that argument `name` (an int, a list, or None for all) stands for, counted from 0."""
        value = self.args[name]
        if value is None or value == []:
            return set(range(ndim))
        return {d % ndim for d in ([value] if isinstance(value, int) else value)}


Rule = Callable[[TracedOperation], Seen | None]


def _union(operation: TracedOperation, out: Axes | None, skip: int | None = None) -> Seen:
    if not all(aligned(source, out, skip) for source in operation.sources):
        raise LostError
    return join([source.seen for source in operation.sources if source.seen is not None])


# ------------------------------------------------------------------------------------ rules: windows

Windows = tuple[list[Window | None], float]


def _windowed(name: str, windows: Callable[[TracedOperation, int, int, int], Windows | None]) -> Rule:
    """A rule for an operation on argument `name`, (batch, channel, …, y, x).

    `windows(operation, axis, cells, out)` gives the cells that each of the `out` output cells reads along `axis`, -2 or
    -1, and the stride; None where all of them read the same.
    """

    def rule(operation: TracedOperation) -> Seen:
        seen, axes = operation.seen_of(name)
        shape = operation.out[0].shape
        count = len(shape) - 2
        seen, axes = absorbed(seen, axes, 1)
        made = {role: seen.span(role) for role in ROLES}
        for role, axis in zip(ROLES[-count:], range(-min(2, count), 0), strict=True):
            span = seen.span(role)
            expect(span, axes, axis, role)
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


def _convolution(operation: TracedOperation, axis: int, cells: int, out: int) -> Windows:
    args = operation.args
    kernel = int(args["weight"].shape[axis])
    stride, padding, dilation = (_along(args[name], axis) for name in ("stride", "padding", "dilation"))
    if not args["transposed"]:
        return _sliding(kernel, stride, padding, dilation, out)
    # Input cell m goes to output cells m * stride - padding + dilation * tap: these are the m that end up in cell i.
    places = [[i + padding - dilation * tap for tap in range(kernel)] for i in range(out)]
    sources = [[place // stride for place in row if place % stride == 0] for row in places]
    return [(min(row), max(row)) if row else None for row in sources], 1 / stride


def _pool(operation: TracedOperation, axis: int, cells: int, out: int) -> Windows:
    args = operation.args
    kernel, padding = (_along(args[name], axis) for name in ("kernel_size", "padding"))
    stride = _along(args["stride"] or args["kernel_size"], axis)
    return _sliding(kernel, stride, padding, _along(args.get("dilation", [1]), axis), out)


def _adaptive_pool(operation: TracedOperation, axis: int, cells: int, out: int) -> Windows | None:
    if out == 1 < cells:
        return None
    return [(i * cells // out, -(-(i + 1) * cells // out) - 1) for i in range(out)], cells / out


def _interpolation(reach: float, exact: bool) -> Callable[[TracedOperation, int, int, int], Windows | None]:
    """`reach`: how far from its centre a kernel takes, in cells; 0 is the nearest, at pixel centres where `exact`."""

    def windows(operation: TracedOperation, axis: int, cells: int, out: int) -> Windows | None:
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


def _pixel_shuffle(operation: TracedOperation, axis: int, cells: int, out: int) -> Windows:
    factor = operation.args["upscale_factor"]
    return [(i // factor, i // factor) for i in range(out)], 1 / factor


def _pixel_unshuffle(operation: TracedOperation, axis: int, cells: int, out: int) -> Windows:
    factor = operation.args["downscale_factor"]
    return _sliding(factor, factor, 0, 1, out)


# ---------------------------------------------------------------------- rules: one axis after another


def _change_axis(seen: Seen, axes: Axes, at: int, change: Callable[[Span], Span]) -> Seen:
    """`change` the span along the axis `at`, where that is one direction in order; positions elsewhere stay."""

    def one(role: str, span: Span) -> Span:
        if not moves_along(span, axes, at, role):
            return span
        if not is_whole(axes[at], role, span.cells):
            if span.whole:
                return span
            raise LostError
        expect(span, axes, at, role)
        return change(span)

    return mapped(seen, one)


def _slice(operation: TracedOperation) -> Seen:
    seen, axes = operation.seen_of("self")
    at = operation.args["dim"] % len(axes)
    taken = range(*slice(*(operation.args[name] for name in ("start", "end", "step"))).indices(length(axes[at])))
    return _change_axis(seen, axes, at, lambda span: span.read([(i, i) for i in taken], taken.step))


def _pad(operation: TracedOperation) -> Seen:
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


def _roll(operation: TracedOperation) -> Seen:
    """Cells that go out on one side come in on the other: everything may be seen, and rolling back restores places."""
    seen, axes = operation.seen_of("self")
    if not operation.args["dims"]:
        raise LostError
    for shift, dim in zip(operation.args["shifts"], operation.args["dims"], strict=True):
        at = dim % len(axes)
        seen = _change_axis(seen, axes, at, functools.partial(_shifted, by=-shift, cells=length(axes[at])))
        seen = _change_axis(seen, axes, at, lambda span: replace(span, whole=True, bound=True))
    return seen


def _shifted(span: Span, by: int, cells: int, bound: bool = False) -> Span:
    moved = span.read([(i + by, i + by) for i in range(cells)], 1)
    return replace(moved, bound=moved.bound or bound)


def _part(operation: TracedOperation) -> Seen:
    """split, unbind, select: other axes stay as they are; pieces of a direction are not followed."""
    seen, axes = operation.seen_of("self")

    return _change_axis(seen, axes, operation.args["dim"] % len(axes), _only_whole)


def _reduce(operation: TracedOperation) -> Seen:
    """mean, sum, amax, var … over given axes: what is taken over a whole direction is the same for every cell."""
    name = "self" if "self" in operation.args else "input"
    seen, axes = operation.seen_of(name)
    dims = operation.dims("dim", len(axes)) if "dim" in operation.args else set(range(len(axes)))

    def one(role: str, span: Span) -> Span | None:
        parts = parts_of(axes, role)
        gone = [size for i, size in parts if i in dims]
        if not any(moves_along(span, axes, i, role) for i in dims):
            return span
        if len(gone) < len(parts):
            raise LostError
        return None

    return mapped(seen, one)


def _expand(operation: TracedOperation) -> Seen:
    """One cell that is spread over many is the same for all of them."""
    seen, axes = operation.seen_of("self")
    sizes = operation.out[0].shape[-len(axes) :] if axes else ()
    spread = {atom.role for axis, size in zip(axes, sizes, strict=True) for atom in axis if atom.size == 1 < size}
    return mapped(seen, lambda role, span: None if role in spread else span)


# ------------------------------------------------------------------------------- rules: same positions


def pointwise(operation: TracedOperation) -> Seen:
    """Element by element, broadcast: the union of the operands."""
    return _union(operation, operation.out_axes)


def _copy(operation: TracedOperation) -> Seen | None:
    """copy_(self, src): what was there is gone."""
    source = operation.operand("src")
    if source.seen is None:
        return None
    if source.shape != tuple(operation.out[0].shape) or not aligned(source, operation.out_axes):
        raise LostError
    return source.seen


def _cat(operation: TracedOperation) -> Seen:
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
        raise LostError
    return span


def _stack(operation: TracedOperation) -> Seen:
    at = operation.args["dim"] % operation.out[0].dim()
    out = operation.out_axes
    return _union(operation, None if out is None else (*out[:at], *out[at + 1 :]))


def _view(operation: TracedOperation) -> Seen:
    """A view keeps positions. It may split a direction into parts, and merge them where they are in order."""
    seen, axes = operation.seen_of("self")
    out = operation.out_axes
    if out is None:
        raise LostError

    def one(role: str, span: Span) -> Span:
        old, new = ([size for _, size in parts_of(some, role)] for some in (axes, out))
        if old == new:
            return span
        if span.order != tuple(sorted(span.order)):
            raise LostError
        return replace(span, order=tuple(range(max(1, len(new)))))

    return mapped(seen, one)


def _permute(operation: TracedOperation) -> Seen:
    """permute, transpose, t: the parts of a direction may change their order."""
    seen, axes = operation.seen_of("self")
    order = list(range(len(axes)))
    if "dims" in operation.args:
        order = [d % len(axes) for d in operation.args["dims"]]
    else:
        a, b = operation.args.get("dim0", 0), operation.args.get("dim1", -1)
        order[a], order[b] = order[b], order[a]

    def one(role: str, span: Span) -> Span:
        parts, own = parts_of(axes, role), len(span.order)
        if len(parts) < 2:
            return span
        moved = [k for j in order for k, (i, _) in enumerate(parts) if i == j]
        # An attention map has positions twice, those of its rows first: these are the ones that are followed.
        if len(parts) < own or any(k >= own for k in moved[:own]):
            raise LostError
        return replace(span, order=tuple(span.order[k] for k in moved[:own]))

    return mapped(seen, one)


def _same_shape(operation: TracedOperation) -> Seen:
    """as_strided keeps positions only where it keeps the axes."""
    seen, axes = operation.seen_of("self")
    if operation.out_axes != axes:
        raise LostError
    return seen


def _first(operation: TracedOperation) -> Seen:
    """Everything stays where it is."""
    return operation.seen_of("self" if "self" in operation.args else "input")[0]


# ------------------------------------------------------------------------------------- rules: all positions


def _norm(operation: TracedOperation) -> Seen:
    """Batch norm uses statistics of its own; by those of the batch, as in an instance norm, everything has a part."""
    seen = operation.seen_of("input")[0]
    spatial = operation.name == "native_group_norm" or operation.args.get("training", operation.name.endswith("legit"))
    return replace(seen, has_global=seen.has_global or (spatial and _is_spread(seen)))


def _is_spread(seen: Seen) -> bool:
    return any(span.cells > 1 for span in seen.placed)


def _layer_norm(operation: TracedOperation) -> Seen:
    seen, axes = operation.seen_of("input")
    return _over(seen, axes, range(len(axes) - len(operation.args["normalized_shape"]), len(axes)))


def _softmax(operation: TracedOperation) -> Seen:
    seen, axes = operation.seen_of("self")
    return _over(seen, axes, [operation.args["dim"] % len(axes)])


def _over(seen: Seen, axes: Axes, dims: Iterable[int]) -> Seen:
    """Divided by a statistic over `dims`: a global part, where these hold all of a direction."""
    inside = set(dims)
    for role in ROLES:
        span, parts = seen.span(role), parts_of(axes, role)
        if any(moves_along(span, axes, i, role) for i in inside) and all(i in inside for i, _ in parts):
            seen = replace(seen, has_global=True)
    return seen


def _matrix_product(left: str, right: str) -> Rule:
    def rule(operation: TracedOperation) -> Seen:
        made = _product(operation.operand(left), operation.operand(right))
        others = [s.seen for s in operation.sources if s not in (operation.operand(left), operation.operand(right))]
        if made.seen is None or others:
            raise LostError
        return made.seen

    return rule


def _linear(operation: TracedOperation) -> Seen:
    seen, axes = operation.seen_of("input")
    return absorbed(seen, axes, len(axes) - 1)[0]


def _product(left: Operand, right: Operand) -> Operand:
    """(…, n, k) x (…, k, m). Where k are positions, and both factors come from the image, it is attention."""
    a, b = left.known_axes, right.known_axes
    shape = (*left.shape[:-1], right.shape[-1])
    axes = (*a[:-1], b[-1])
    if left.seen is None or right.seen is None:
        known, own, at = (left, a, len(a) - 1) if left.seen is not None else (right, b, len(b) - 2)
        return Operand(absorbed(known.seen, own, at)[0] if known.seen is not None else None, axes, shape)
    spans: dict[str, Span | None] = {}
    has_global = left.seen.has_global or right.seen.has_global
    for role in ROLES:
        one, other = left.seen.span(role), right.seen.span(role)
        in_rows, in_columns = moves_along(one, a, -2, role), moves_along(other, b, -1, role)
        contracted = moves_along(one, a, -1, role) or moves_along(other, b, -2, role)
        if contracted or (in_rows and in_columns):
            # Windows stand in the axes before the last two.
            windowed = any(atom.role == role for axis in a[:-2] for atom in axis if atom.size > 1)
            placed = one if in_rows or other is None else other
            kept = placed is not None and (in_rows or in_columns or windowed)
            spans[role] = replace(placed, whole=True, bound=placed.bound or windowed) if placed and kept else None
        else:
            joined = join([Seen(one, None), Seen(other, None)])
            spans[role] = joined.y
            has_global |= joined.has_global
    return Operand(Seen(spans["y"], spans["x"], has_global), axes, shape)


def _attention(operation: TracedOperation) -> Seen:
    """softmax(q k^T) v."""
    query, key, value = (operation.operand(name) for name in ("query", "key", "value"))
    axes = key.known_axes
    turned = Operand(key.seen, (*axes[:-2], axes[-1], axes[-2]), (*key.shape[:-2], key.shape[-1], key.shape[-2]))
    made = _product(_product(query, turned), value).seen
    if made is None:
        raise LostError
    return made


def _self_attention(operation: TracedOperation) -> Seen:
    """The fused layers: (batch, token, feature), query, key and value all the same."""
    seen, axes = operation.seen_of("query" if "query" in operation.args else "src")
    return mapped(seen, lambda role, span: replace(span, whole=True) if moves_along(span, axes, -2, role) else span)


CONSTANTS = frozenset(
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
    **dict.fromkeys(ATTENTION, _attention),
    **dict.fromkeys(FUSED_ATTENTION, _self_attention),
}  # fmt: skip
