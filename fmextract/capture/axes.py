"""What each axis of a tensor means, learned by following the operations that made it.

Shapes lie: (B, 56, 56, 96) in a Swin is (y, x, channel), while (B, 96, 56, 56) in a ResNet is (channel, y, x), and at
other sizes the two cannot be told apart. So the probe runs once under a dispatch mode that sees every ATen operation:
convolutions, pooling and batch norm put the channel at axis 1; linear layers, layer norm and attention put it last;
views, permutes, concatenations and reductions are followed, and what works element by element inherits.

Of an operation that is not known here nothing is known. `capture.atoms` has what an axis is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from fmextract.capture.atoms import (
    BATCH,
    CHANNEL,
    FREQUENCY,
    MIXED,
    UNKNOWN,
    Atom,
    Axes,
    Axis,
    cut,
    is_positional,
    joined,
    length,
    lengths,
    of_both,
    plain,
    regroup,
    resized,
    role_of,
    split,
)
from fmextract.records import SPATIAL


class Operation:
    """One executed operation: its arguments by name, what it gave, and what was known of its tensors before it ran."""

    def __init__(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], tracer: AxisTracer) -> None:
        schema = func._schema.arguments
        self.name: str = func.overloadpacket.__name__
        self.pointwise = torch.Tag.pointwise in func.tags
        self.mutates: bool = func._schema.is_mutable
        self.args: dict[str, Any] = {a.name: a.default_value for a in schema if a.has_default_value()}
        self.args |= dict(zip((a.name for a in schema), args, strict=False)) | kwargs
        self.tensors = tensors_in(self.args.values())
        # Read before the call: an in-place transpose changes the very tensor that it is asked about.
        self._axes = {id(t): tracer.axes(t) for t in self.tensors}
        self.out: list[torch.Tensor] = []

    def known(self, *names: str) -> Axes | None:
        """The axes of the tensor that is called by the first of `names` that there is."""
        value = next((self.args[name] for name in names if name in self.args), None)
        return self._axes.get(id(value))

    def image(self) -> Axes | None:
        """The axes of what it is done to."""
        return self.known("self", "input")

    def all_known(self) -> list[Axes]:
        """The axes of its tensors, where they are known."""
        return [axes for t in self.tensors if (axes := self._axes[id(t)]) is not None]

    def of(self, tensor: torch.Tensor) -> Axes | None:
        """The axes of one of its tensors."""
        return self._axes.get(id(tensor))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its first output."""
        return tuple(self.out[0].shape)

    def dim(self, ndim: int, name: str = "dim") -> int:
        """The axis that an argument means, counted from 0."""
        return int(self.args[name]) % ndim


def tensors_in(values: Any) -> list[torch.Tensor]:
    """The tensors among `values`, those in lists too."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [v for v in value if isinstance(v, torch.Tensor)]
    return found


Found = Axes | list[Axes | None] | None
Rule = Callable[[Operation], Found]
"""The axes of an operation's output, or of each of them; None where they are not known."""


class AxisTracer(TorchDispatchMode):
    """Follow the meaning of axes through every operation executed inside the `with` block.

    >>> with AxisTracer() as tracer:
    ...     tracer.seed(x, image_axes(x.shape))
    ...     y = model(x)
    >>> tracer.axes(y)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: Any = WeakTensorKeyDictionary()

    def seed(self, tensor: torch.Tensor, axes: Axes) -> None:
        """Say what the axes of `tensor` are."""
        self._known[tensor] = axes

    def axes(self, tensor: Any) -> Axes | None:
        """The axes of `tensor`, or None where nothing is known."""
        return self._known.get(tensor) if isinstance(tensor, torch.Tensor) else None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        operation = Operation(func, args, kwargs or {}, self)
        out = func(*args, **(kwargs or {}))
        self.follow(operation, out)
        return out

    def follow(self, operation: Operation, out: Any) -> None:
        """Note what `operation` made of what was known."""
        operation.out = tensors_in(out if isinstance(out, (list, tuple)) else (out,))
        rule = RULES.get(operation.name) or RULES.get(operation.name.rstrip("_"))
        if rule is None and operation.pointwise:
            rule = _elementwise
        try:
            made = rule(operation) if rule is not None and operation.out else None
        except (LookupError, TypeError, ValueError):  # an overload with other arguments: nothing is known of its result
            made = None
        for tensor, axes in zip(operation.out, made if isinstance(made, list) else [made], strict=False):
            if axes is not None and tuple(lengths(axes)) == tuple(tensor.shape):
                self._known[tensor] = axes
                if operation.mutates:
                    self._written(tensor, axes)
            elif tensor in self._known:
                del self._known[tensor]

    def _written(self, view: torch.Tensor, axes: Axes) -> None:
        """`view` got its values in place: what it is a view of, where nothing is known of it, has them where the steps
        in memory are the same (images that are copied into a larger batch, circular padding).
        """
        base = view._base
        if base is None or base in self._known:
            return
        along = {view.stride(i): axis for i, axis in enumerate(axes) if view.shape[i] > 1}
        found = [
            along[step] if size > 1 and step in along else plain(UNKNOWN, size)
            for size, step in zip(base.shape, base.stride(), strict=True)
        ]
        self._known[base] = tuple(map(resized, found, base.shape))


# ------------------------------------------------------------------------------------------ element by element


def _elementwise(operation: Operation) -> Found:
    """An output axis means what the input axes of the same length there mean."""
    known = operation.all_known()
    return [_broadcast(known, tensor.shape) for tensor in operation.out]


def _broadcast(inputs: Sequence[Axes], shape: Sequence[int]) -> Axes | None:
    # An input of the full shape knows best: a mask or a bias of fewer axes says less.
    aligned = sorted((axes for axes in inputs if len(axes) == len(shape)), key=lambda a: lengths(a) != list(shape))
    merged: list[Axis] = []
    for i, size in enumerate(shape):
        fitting = [axes[i] for axes in aligned if length(axes[i]) == size]
        if not fitting:
            return None
        merged.append(of_both(fitting))
    return tuple(merged)


def _same(operation: Operation) -> Found:
    """Everything stays where it is."""
    return [operation.image() for _ in operation.out]


def _copied(operation: Operation) -> Found:
    """copy_: what was there is gone."""
    source = operation.known("src")
    return _broadcast([source], operation.shape) if source is not None else operation.image()


def _constant(operation: Operation) -> Found:
    return None


# -------------------------------------------------------------------------------- layers that define their axes


def _unknown(shape: Sequence[int]) -> Axes:
    return tuple(plain(UNKNOWN, size) for size in shape)


def _features(axis: Axis, size: int) -> Axis:
    """Features that are made of what stood along `axis`: of positions, also mixed before."""
    mixed = {atom.role for atom in axis if atom.size > 1} == {MIXED}
    return plain(MIXED if mixed or (is_positional(axis) and length(axis) > 1) else CHANNEL, size)


def _channel_first(operation: Operation, channel: Callable[[Axis, int], Axis] = _features) -> Axes:
    """(batch, channel, positions…): positions keep what they meant, `channel` makes the second of what it was."""
    shape = operation.shape
    known = operation.image()
    if known is None or len(known) != len(shape):
        known = _unknown(shape)
    first = known[0] if length(known[0]) == shape[0] else plain(UNKNOWN, shape[0])
    return (first, channel(known[1], shape[1]), *map(resized, known[2:], shape[2:]))


def _convolution(operation: Operation) -> Found:
    groups = int(operation.args.get("groups", 1))

    def channel(axis: Axis, size: int) -> Axis:
        # Weights of their own for each image: the images stand in the channel, and are kept apart by groups.
        images = axis[0].size if axis[0].role == BATCH else 0
        if images > 1 and groups % images == 0 and size % images == 0:
            return (axis[0], Atom(CHANNEL, size // images))
        return _features(axis, size)

    return _channel_first(operation, channel)


def _norm(operation: Operation) -> Found:
    """Batch, group and instance norm: every axis stays, the second is the channel by definition."""

    def channel(axis: Axis, size: int) -> Axis:
        holds = {atom.role for atom in axis} & {BATCH, CHANNEL, MIXED}
        return axis if holds and length(axis) == size else _features(axis, size)

    return [_channel_first(operation, channel)]


def _pooled(operation: Operation) -> Found:
    """Pooling and resampling keep every axis; of nothing known the second is the channel."""
    known = operation.image()
    if known is None:
        return [_channel_first(operation) for _ in operation.out]
    return _resize(operation)


def _shuffled(operation: Operation) -> Found:
    """Pixel shuffle and unshuffle: (batch, channel, y, x) alone."""
    known = operation.image()
    usual = known is not None and role_of(known[1]) == CHANNEL
    return _resize(operation) if usual else None


def _sampled(operation: Operation) -> Found:
    """Values from anywhere: of positions nothing is known."""
    shape = operation.shape
    known = operation.image() or _unknown(shape)
    first = known[0] if length(known[0]) == shape[0] else plain(UNKNOWN, shape[0])
    return [(first, _features(known[1], shape[1]), *_unknown(shape[2:]))]


def _linear(operation: Operation) -> Found:
    """The last axis is the channel, the others stay."""
    return _last_is_channel(operation.known("input", "self"), operation.shape)


def _last_is_channel(known: Axes | None, shape: Sequence[int]) -> Axes:
    if known is not None and lengths(known)[:-1] == list(shape[:-1]):
        return (*known[:-1], _features(known[-1], shape[-1]))
    return (*_unknown(shape[:-1]), plain(CHANNEL, shape[-1]))


def _layer_norm(operation: Operation) -> Found:
    known = operation.image()
    if len(operation.args["normalized_shape"]) == 1 and (known is None or UNKNOWN in {a.role for a in known[-1]}):
        return _last_is_channel(known, operation.shape)
    return known


def _matrix_product(left: str, right: str) -> Rule:
    """(…, n, k) x (…, k, m): rows from the left factor; the columns mean what they mean on the right, else channels."""

    def rule(operation: Operation) -> Found:
        a, b, shape = operation.known(left), operation.known(right), operation.shape
        if a is not None:
            return (*a[:-1], b[-1] if b is not None else _features(a[-1], shape[-1]))
        if b is None:
            return None
        rows = (
            _features(b[-2], shape[-2]) if UNKNOWN not in {atom.role for atom in b[-2]} else plain(UNKNOWN, shape[-2])
        )
        return (*b[:-2], rows, b[-1])

    return rule


ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math", "scaled_dot_product_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip
"""What torch calls the attention of (queries, keys, values), by the way it is computed."""
FUSED_ATTENTION = ("_native_multi_head_attention", "_transformer_encoder_layer_fwd")
"""Attention with the linear layers around it in one operation."""


def _attention(operation: Operation) -> Found:
    """softmax(q k^T) v: rows from the query, columns from the value."""
    query, value = operation.known("query"), operation.known("value")
    if query is None:
        return None
    return [(*query[:-1], value[-1] if value is not None else query[-1])]


def _fused_attention(operation: Operation) -> Found:
    return [operation.known("query", "src")]


# ----------------------------------------------------------------------------------------------------- views


def _view(operation: Operation) -> Found:
    known = operation.image()
    return regroup(known, operation.shape) if known is not None else None


def _permute(operation: Operation) -> Found:
    known = operation.image()
    return tuple(known[i] for i in operation.args["dims"]) if known is not None else None


def _transpose(operation: Operation) -> Found:
    known = operation.image()
    if known is None:
        return None
    order = list(known)
    a, b = (operation.args.get(name, usual) for name, usual in (("dim0", 0), ("dim1", len(order) - 1)))
    order[a], order[b] = order[b], order[a]
    return tuple(order)


def _squeeze(operation: Operation) -> Found:
    known = operation.image()
    if known is None:
        return None
    dims = operation.args.get("dim", range(len(known)))
    gone = {d % len(known) for d in ([dims] if isinstance(dims, int) else dims)}
    return tuple(axis for i, axis in enumerate(known) if i not in gone or length(axis) != 1)


def _unsqueeze(operation: Operation) -> Found:
    known = operation.image()
    if known is None:
        return None
    at = operation.dim(len(known) + 1)
    return (*known[:at], plain(UNKNOWN, 1), *known[at:])


def _expand(operation: Operation) -> Found:
    """Repeated along an axis: the copies are no channels, images or places of their own."""
    known, shape = operation.image(), operation.shape
    if known is None:
        return None
    added = _unknown(shape[: len(shape) - len(known)])
    pairs = zip(known, shape[len(added) :], strict=True)
    return (*added, *(axis if length(axis) == size else plain(UNKNOWN, size) for axis, size in pairs))


def _restrided(operation: Operation) -> Found:
    """as_strided keeps its meaning where it changes nothing (pooling uses it to fix the memory format)."""
    known, tensor = operation.image(), operation.args["self"]
    if known is None or lengths(known) != list(operation.shape):
        return None
    pairs = zip(tensor.stride(), operation.args["stride"], operation.shape, strict=True)
    same = all(own == given for own, given, size in pairs if size > 1)
    return known if same and operation.out[0].storage_offset() == tensor.storage_offset() else None


def _windows(operation: Operation) -> Found:
    """unfold: an axis becomes that of its windows, and the places within them are a new last one."""
    known = operation.image()
    if known is None:
        return None
    at, size, step = operation.dim(len(known), "dimension"), operation.args["size"], operation.args["step"]
    axis, count = known[at], operation.shape[operation.dim(len(known), "dimension")]
    coarse, fine = resized(axis, count), plain(UNKNOWN, size)
    if size == step and len(axis) == 1 and not axis[0].parts:
        coarse, fine = ((part,) for part in split(axis[0]._replace(size=size * count), count))
    return (*known[:at], coarse, *known[at + 1 :], fine)


# --------------------------------------------------------------------------------------------- changed lengths


def _resize(operation: Operation) -> Found:
    """Padding, pooling: same axes, other lengths."""
    known = operation.image()
    if known is None:
        return None
    return [tuple(map(resized, known, t.shape)) for t in operation.out]


def _changed(known: Axes, at: int, axis: Axis) -> Axes:
    return (*known[:at], axis, *known[at + 1 :])


def _slice(operation: Operation) -> Found:
    known = operation.image()
    if known is None:
        return None
    at, step = operation.dim(len(known)), operation.args["step"]
    start, stop, _ = slice(operation.args["start"], operation.args["end"]).indices(length(known[at]))
    axis = cut(known[at], start, stop) if step == 1 else resized(known[at], operation.shape[at])
    return _changed(known, at, axis)


def _split(operation: Operation) -> Found:
    known = operation.image()
    if known is None:
        return None
    at, start = operation.dim(len(known)), 0
    made: list[Axes | None] = []
    for tensor in operation.out:
        made.append(_changed(known, at, cut(known[at], start, start + tensor.shape[at])))
        start += tensor.shape[at]
    return made


def _picked(operation: Operation) -> Found:
    """Other steps along `dim` for every place (gather, topk, sort): what stood there is no axis any more."""
    known = operation.image()
    if known is None:
        return None
    at = operation.dim(len(known))
    return [_changed(known, at, plain(UNKNOWN, t.shape[at])) if t.dim() == len(known) else None for t in operation.out]


def _index(operation: Operation) -> Found:
    """x[:, indices]: several arrays of indices, or wide ones, move axes about."""
    known = operation.image()
    if known is None:
        return None
    arrays = operation.args.get("indices") or [*[None] * operation.dim(len(known)), operation.args["index"]]
    at = next((i for i, indices in enumerate(arrays) if indices is not None), 0)
    if sum(indices is not None for indices in arrays) != 1 or arrays[at].dim() != 1:
        return None
    indices = arrays[at] if arrays[at].dtype != torch.bool else arrays[at].nonzero().flatten()
    in_order = bool((indices.diff() >= 0).all())
    axis = resized(known[at], operation.shape[at])
    return _changed(known, at, axis if in_order or not is_positional(axis) else plain(UNKNOWN, length(axis)))


def _cat(operation: Operation) -> Found:
    tensors = [t for t in operation.args["tensors"] if t.dim() == operation.out[0].dim()]
    known = [axes for t in tensors if (axes := operation.of(t)) is not None]
    if not known:
        return None
    at = operation.dim(operation.out[0].dim())
    others = tuple(map(of_both, zip(*known, strict=True))) if len(known) > 1 else known[0]
    parts = [axes[at] if (axes := operation.of(t)) is not None else plain(UNKNOWN, t.shape[at]) for t in tensors]
    return _changed(others, at, joined(parts))


def _stack(operation: Operation) -> Found:
    known = [axes for t in operation.args["tensors"] if (axes := operation.of(t)) is not None]
    if not known:
        return None
    at = operation.dim(operation.out[0].dim())
    axes = tuple(map(of_both, zip(*known, strict=True)))
    return (*axes[:at], plain(UNKNOWN, operation.shape[at]), *axes[at:])


def _repeat(operation: Operation) -> Found:
    known, shape = operation.image(), operation.shape
    if known is None:
        return None
    added = len(shape) - len(known)
    kept = (
        axis if length(axis) == size else plain(CHANNEL if role_of(axis) == CHANNEL else UNKNOWN, size)
        for axis, size in zip(known, shape[added:], strict=True)
    )
    return (*_unknown(shape[:added]), *kept)


def _drop_axis(operation: Operation) -> Found:
    """select(x, dim, index) and unbind(x, dim)."""
    known = operation.image()
    if known is None:
        return None
    at = operation.dim(len(known))
    return [(*known[:at], *known[at + 1 :]) for _ in operation.out]


def _reduce(operation: Operation) -> Found:
    """mean, sum, amax, var … over given axes: they vanish, or stay with length 1."""
    if "other" in operation.args:  # max(x, y)
        return _elementwise(operation)
    known = operation.image()
    if known is None:
        return None
    dims = operation.args.get("dim")
    if dims is None or dims == []:
        dims = list(range(len(known)))
    gone = {d % len(known) for d in ([dims] if isinstance(dims, int) else dims)}
    if operation.out[0].dim() == len(known):
        made = tuple((axis[0]._replace(size=1, parts=()),) if i in gone else axis for i, axis in enumerate(known))
    else:
        made = tuple(axis for i, axis in enumerate(known) if i not in gone)
    return [made for _ in operation.out]


def _fourier(operation: Operation) -> Found:
    """Places become frequencies, and frequencies places."""
    known = operation.image()
    if known is None:
        return None
    made = list(known)
    for dim in operation.args["dim"]:
        role = role_of(known[dim])
        whole = len(known[dim]) == 1 and (role in SPATIAL or role.startswith(FREQUENCY))
        other = role.removeprefix(FREQUENCY) if role.startswith(FREQUENCY) else FREQUENCY + role
        made[dim] = plain(other if whole else UNKNOWN, operation.shape[dim])
    return tuple(made)


# ------------------------------------------------------------------------------------------ patches in columns


def _columns(operation: Operation) -> Found:
    """im2col: (batch, channel and places within a patch, patches), the patches row by row."""
    known = operation.image()
    if known is None or len(known) != 4:
        return None
    sides, steps, patches = _patches(operation, lengths(known)[2:])
    rows, columns = map(resized, known[2:], patches)
    apart = sides == steps and all(len(axis) == 1 for axis in known[2:]) and lengths(known)[2:] == [
        side * count for side, count in zip(sides, patches, strict=True)
    ]  # fmt: skip
    inside: Axis = (Atom(UNKNOWN, sides[0] * sides[1]),)
    if apart:
        (row, down), (column, across) = (split(axis[0], n) for axis, n in zip(known[2:], patches, strict=True))
        rows, columns, inside = (row,), (column,), (down, across)
    return (known[0], (*known[1], *inside), (*rows, *columns))


def _patches(operation: Operation, sizes: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Sides of a patch, steps from one to the next, and how many there are, along y and x."""
    sides, dilation, padding, steps = (
        list(operation.args[n]) for n in ("kernel_size", "dilation", "padding", "stride")
    )
    counts = [
        (size + 2 * pad - d * (side - 1) - 1) // step + 1
        for size, side, d, pad, step in zip(sizes, sides, dilation, padding, steps, strict=True)
    ]
    return sides, steps, counts


def _uncolumned(operation: Operation) -> Found:
    """col2im: patches back to their places."""
    known, shape = operation.image(), operation.shape
    if known is None or len(known) != 3:
        return (*_unknown(shape[:1]), plain(CHANNEL, shape[1]), *_unknown(shape[2:]))
    counts = _patches(operation, shape[2:])[2]
    places = [atom for atom in known[2] if atom.size > 1]
    wanted = [(role, n) for role, n in zip(("y", "x"), counts, strict=True) if n > 1]
    back = [(atom.role, atom.size) for atom in places] == wanted and all(atom.outer == 1 for atom in places)
    positions = tuple(map(plain, ("y", "x"), shape[2:])) if back else _unknown(shape[2:])
    return (known[0], plain(CHANNEL, shape[1]), *positions)


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        (
            "convolution", "_convolution", "conv1d", "conv2d", "conv3d", "conv2d_relu", "mkldnn_convolution",
            "cudnn_convolution", "cudnn_convolution_relu", "miopen_convolution", "_mps_convolution", "deform_conv2d",
        ),
        _convolution,
    ),
    **dict.fromkeys(
        (
            "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
            "miopen_batch_norm", "batch_norm", "_batch_norm_with_update", "native_group_norm",
        ),
        _norm,
    ),
    **dict.fromkeys(
        (
            "max_pool1d", "max_pool2d", "max_pool2d_with_indices", "max_pool3d_with_indices", "mkldnn_max_pool2d",
            "quantized_max_pool1d", "quantized_max_pool2d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
            "adaptive_avg_pool1d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d",
            "adaptive_max_pool3d", "fractional_max_pool2d", "mkldnn_adaptive_avg_pool2d", "upsample_nearest1d",
            "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d",
            "upsample_bicubic2d", "upsample_trilinear3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
            "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d",
        ),
        _pooled,
    ),
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle"), _shuffled),
    **dict.fromkeys(("roi_align", "grid_sampler_2d", "grid_sampler_3d"), _sampled),
    **dict.fromkeys(("linear", "linear_relu", "mkldnn_linear"), _linear),
    **dict.fromkeys(("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm"), _layer_norm),
    **dict.fromkeys(("mm", "bmm"), _matrix_product("self", "mat2")),
    "matmul": _matrix_product("self", "other"),
    **dict.fromkeys(("addmm", "_addmm_activation"), _matrix_product("mat1", "mat2")),
    "baddbmm": _matrix_product("batch1", "batch2"),
    **dict.fromkeys(ATTENTION, _attention),
    **dict.fromkeys(FUSED_ATTENTION, _fused_attention),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "view_as", "_reshape_copy"), _view),
    "permute": _permute,
    **dict.fromkeys(("transpose", "t", "swapaxes"), _transpose),
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
    "expand": _expand,
    "repeat": _repeat,
    "as_strided": _restrided,
    "unfold": _windows,
    "im2col": _columns,
    "col2im": _uncolumned,
    **dict.fromkeys(
        (
            "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
            "replication_pad2d", "replication_pad3d", "glu",
        ),
        _resize,
    ),
    "slice": _slice,
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split", "unsafe_chunk"), _split),
    **dict.fromkeys(("gather", "topk", "sort", "argsort"), _picked),
    **dict.fromkeys(("index", "index_select"), _index),
    "cat": _cat,
    "stack": _stack,
    **dict.fromkeys(("select", "unbind"), _drop_axis),
    **dict.fromkeys(
        (
            "mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "argmax", "argmin",
            "logsumexp", "norm", "linalg_vector_norm", "any", "all", "prod", "median", "nanmean",
        ),
        _reduce,
    ),
    **dict.fromkeys(("_fft_r2c", "_fft_c2r", "_fft_c2c"), _fourier),
    # Not said to work element by element, or along an axis alone: everything stays where it is.
    **dict.fromkeys(
        (
            "alias", "detach", "clone", "contiguous", "_to_copy", "lift_fresh", "_conj", "conj", "_neg_view",
            "resolve_conj", "resolve_neg", "native_dropout", "dropout", "alpha_dropout", "_softmax", "_log_softmax",
            "_safe_softmax", "softmax", "log_softmax", "cumsum", "cumprod", "logcumsumexp", "flip", "roll", "tril",
            "triu", "hardswish", "hardtanh", "_prelu_kernel", "rrelu_with_noise", "log_sigmoid_forward",
            "channel_shuffle", "native_channel_shuffle", "index_put", "_index_put_impl", "index_fill", "index_add",
            "index_copy", "scatter", "scatter_add", "masked_scatter", "slice_scatter", "select_scatter", "renorm",
            "quantize_per_tensor", "dequantize", "fill",
        ),
        _same,
    ),
    "copy": _copied,
    **dict.fromkeys(
        (
            "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "new_zeros", "new_ones",
            "new_full", "new_empty", "new_empty_strided", "zero", "bernoulli",
        ),
        _constant,
    ),
}  # fmt: skip
