"""What each axis of a tensor means, learned by following the operations that made it.

Shapes lie: (B, 56, 56, 96) in a Swin is (y, x, channel), while (B, 96, 56, 56) in a ResNet is (channel, y, x), and at
other sizes the two cannot be told apart. So the probe runs once under a dispatch mode that sees every ATen operation:
convolutions, pooling and batch norm put the channel at axis 1; linear layers, layer norm and attention put it last;
views, permutes, concatenations and reductions are followed, and everything that keeps the shape inherits.

An axis is a tuple of atoms (role, size): `flatten(2)` of a (batch, channel, y, x) tensor makes an axis of the two atoms
y and x, which reads as `token`; a window partition splits y and x and puts one half of each into the batch; splitting
and merging back restores what was there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from fmextract.records import SPATIAL

Atom = tuple[str, int]
Axis = tuple[Atom, ...]
Axes = tuple[Axis, ...]
Rule = Callable[[Sequence[Any], dict[str, Any], "Lookup", Any], Any]
Lookup = Callable[[Any], "Axes | None"]

BATCH, CHANNEL, TOKEN, UNKNOWN = "batch", "channel", "token", ""


def image_axes(shape: Sequence[int]) -> Axes:
    """The axes of a model's input: (batch, channel, y, x), or (batch, channel, time, y, x) for a clip.

    A signal is (batch, channel, x); of more axes than a clip's nothing is known.
    """
    roles = (BATCH, CHANNEL, *_spatial(len(shape) - 2))[: len(shape)]
    return tuple(((role, size),) for role, size in zip(roles, shape, strict=True))


def _spatial(count: int) -> tuple[str, ...]:
    """Roles of `count` axes behind the channel: x; y, x; time, y, x."""
    return SPATIAL[-count:] if 0 < count <= len(SPATIAL) else (UNKNOWN,) * count


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
        kwargs = kwargs or {}
        # Read before the call: an in-place transpose changes the very tensor that it is asked about.
        before = {id(t): self.axes(t) for t in _tensors((*args, *kwargs.values()))}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__.rstrip("_")
        rule = RULES.get(name, _elementwise)
        try:
            made = rule(args, kwargs, lambda t: before.get(id(t)), out)
        except (IndexError, TypeError, ValueError):  # an overload with other arguments: nothing is known of its result
            made = None
        for tensor, axes in zip(_outputs(out), _per_output(made), strict=False):
            if axes is not None and tuple(_sizes(axes)) == tuple(tensor.shape):
                self._known[tensor] = axes
            elif tensor in self._known:
                del self._known[tensor]
        return out


def _tensors(values: Sequence[Any]) -> list[torch.Tensor]:
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [v for v in value if isinstance(v, torch.Tensor)]
    return found


def _outputs(out: Any) -> list[torch.Tensor]:
    return _tensors(out if isinstance(out, (list, tuple)) else (out,))


def _per_output(made: Any) -> list[Axes | None]:
    return made if isinstance(made, list) else [made]


def _size(axis: Axis) -> int:
    return math.prod(size for _, size in axis)


def _sizes(axes: Axes) -> list[int]:
    return [_size(axis) for axis in axes]


def _resized(axis: Axis, size: int) -> Axis:
    """The axis after its length changed (slice, pad): what it means survives only where it meant one thing."""
    if _size(axis) == size:
        return axis
    roles = {role for role, _ in axis}
    return ((roles.pop() if len(roles) == 1 else UNKNOWN, size),)


# ---------------------------------------------------------------------------------------------- naming


def _role(axis: Axis) -> str:
    wide = {role for role, size in axis if size > 1} or {role for role, _ in axis[:1]} or {UNKNOWN}
    if len(wide) == 1:
        return next(iter(wide))
    if UNKNOWN in wide or BATCH in wide:
        return UNKNOWN
    return TOKEN if CHANNEL not in wide else CHANNEL


def name_axes(axes: Axes | None, ndim: int) -> tuple[str, ...]:
    """Names for the axes of one image: `channel`, `y`, `x`, `time`, `token`, `feature`, or `axis_1` … where unknown.

    It is all or nothing: one axis of unknown meaning makes the others useless for geometry and statistics.
    """
    unknown = tuple(f"axis_{i + 1}" for i in range(ndim))
    if axes is None:
        return unknown
    roles = [_role(axis) for axis in axes]
    if not set(roles) & set(SPATIAL):  # without positions a channel is called a feature
        roles = ["feature" if role == CHANNEL else role for role in roles]
    if UNKNOWN in roles or BATCH in roles or len(set(roles)) != len(roles):
        return unknown
    return tuple(roles)


def without_batch(axes: Axes | None, axis: int, k: int, outer: bool) -> Axes | None:
    """The axes of one image, after the batch was taken out of `axis`, leaving `k` in its place where k > 1.

    `outer` says that the batch is the slow index of that axis. None where the trace saw the batch elsewhere.
    """
    if axes is None:
        return None
    atoms = axes[axis]
    if k == 1 and {role for role, _ in atoms} <= {UNKNOWN}:  # the trace lost it, the probe's values found it
        atoms = ((BATCH, _size(atoms)),)
    at = 0 if outer else len(atoms) - 1
    elsewhere = any(role == BATCH for i, other in enumerate(axes) if i != axis for role, _ in other)
    if not atoms or atoms[at][0] != BATCH or elsewhere:
        return None
    rest = tuple(atom for i, atom in enumerate(atoms) if i != at)
    kept = (rest,) if k > 1 else ()
    return (*axes[:axis], *kept, *axes[axis + 1 :])


# ---------------------------------------------------------------------------------------------- rules


def _elementwise(args: Sequence[Any], kwargs: dict[str, Any], get: Lookup, out: Any) -> Any:
    """Anything without a rule of its own: an output axis means what the input axis of the same length there means."""
    inputs = [axes for t in _tensors((*args, *kwargs.values())) if (axes := get(t)) is not None]
    return [_broadcast(inputs, tensor.shape) for tensor in _outputs(out)]


def _broadcast(inputs: list[Axes], shape: Sequence[int]) -> Axes | None:
    # An input of the full shape knows best: a mask or a bias of fewer axes says less.
    aligned = sorted((axes for axes in inputs if len(axes) == len(shape)), key=lambda a: _sizes(a) != list(shape))
    merged: list[Axis] = []
    for i, size in enumerate(shape):
        fitting = [axes[i] for axes in aligned if _size(axes[i]) == size]
        if not fitting:
            return None
        merged.append(next((axis for axis in fitting if UNKNOWN not in dict(axis)), fitting[0]))
    return tuple(merged)


def _channel_first(args: Sequence[Any], kwargs: dict[str, Any], get: Lookup, out: Any) -> Any:
    """Convolution, batch and group norm: (batch, channel, positions…), whatever was known of axis 1."""
    shape = _outputs(out)[0].shape
    known = get(args[0])
    if known is None or len(known) != len(shape):
        known = tuple(((UNKNOWN, size),) for size in shape)
    first: Axis = known[0] if _size(known[0]) == shape[0] else ((UNKNOWN, shape[0]),)
    usual = _spatial(len(shape) - 2)
    positions = (
        ((_position(axis, role, len(usual)), size),)
        for axis, role, size in zip(known[2:], usual, shape[2:], strict=True)
    )
    return (first, ((CHANNEL, shape[1]),), *positions)


def _position(axis: Axis, usual: str, count: int) -> str:
    """What an axis behind the channel means: what it meant before the operation where that is clear."""
    role = _role(axis)
    clear = role in (*SPATIAL, CHANNEL) or (role == TOKEN and count == 1)
    return role if clear else usual


def _pooled(args: Sequence[Any], kwargs: dict[str, Any], get: Lookup, out: Any) -> Any:
    """Pooling and resampling keep every axis; where nothing is known they are given (batch, channel, positions…)."""
    known = get(args[0])
    if known is None or any(_role(axis) == UNKNOWN for axis in known[1:]):
        return _channel_first(args, kwargs, get, out)
    return _resize(args, kwargs, get, out)


def _channel_last(args: Sequence[Any], kwargs: dict[str, Any], get: Lookup, out: Any) -> Any:
    """Linear and layer norm: the last axis is the channel, the others stay; three axes of no history are tokens."""
    return _last_is_channel(get(args[0]), _outputs(out)[0].shape)


def _last_is_channel(known: Axes | None, shape: Sequence[int]) -> Axes | None:
    last: Axis = ((CHANNEL, shape[-1]),)
    if known is not None and _sizes(known)[:-1] == list(shape[:-1]):
        return (*known[:-1], last)
    roles = {2: (UNKNOWN,), 3: (UNKNOWN, TOKEN)}.get(len(shape))
    if roles is None:
        return None
    return (*(((role, size),) for role, size in zip(roles, shape[:-1], strict=True)), last)


def _layer_norm(args: Sequence[Any], kwargs: dict[str, Any], get: Lookup, out: Any) -> Any:
    if len(args[1]) != 1:
        return _elementwise(args, kwargs, get, out)
    known = get(args[0])
    if known is None or _role(known[-1]) == UNKNOWN:
        return _last_is_channel(known, _outputs(out)[0].shape)
    return known


def _matrix_product(position: int) -> Rule:
    """(…, n, k) x (…, k, m): rows from the left factor; the columns mean what they mean on the right, else channels."""

    def rule(args: Sequence[Any], kwargs: dict[str, Any], get: Lookup, out: Any) -> Any:
        left, right = get(args[position]), get(args[position + 1])
        shape = _outputs(out)[0].shape
        if left is None:
            return None
        columns = right[-1] if right is not None else ((CHANNEL, shape[-1]),)
        return (*left[:-1], columns)

    return rule


def _view(args: Sequence[Any], kwargs: dict[str, Any], get: Lookup, out: Any) -> Any:
    known = get(args[0])
    return regroup(known, _outputs(out)[0].shape) if known is not None else None


def regroup(axes: Axes, shape: Sequence[int]) -> Axes | None:
    """The axes after a view to `shape`: atoms are merged and split in their order; None where they do not divide."""
    atoms = [atom for axis in axes for atom in axis]
    made: list[Axis] = []
    if 0 in shape:
        return None
    for size in shape:
        axis: list[Atom] = []
        have = 1
        while have < size:
            if not atoms:
                return None
            role, length = atoms.pop(0)
            need = size // have
            if length > need:
                if size % have or length % need:
                    return None
                atoms.insert(0, (role, length // need))
                length = need
            elif need % length:
                return None
            axis.append((role, length))
            have *= length
        if size == 1:
            axis.append(atoms.pop(0) if atoms and atoms[0][1] == 1 else (UNKNOWN, 1))
        made.append(_merged(axis))
    if atoms and made:
        if any(length != 1 for _, length in atoms):
            return None
        made[-1] = _merged([*made[-1], *atoms]) if made[-1] != ((UNKNOWN, 1),) else tuple(atoms)
    return tuple(made)


def _merged(atoms: list[Atom]) -> Axis:
    """Neighbouring atoms of one role are one: a split that is merged back leaves no trace."""
    made: list[Atom] = []
    for role, size in [atom for atom in atoms if atom[1] > 1] or atoms:
        if made and made[-1][0] == role:
            made[-1] = (role, made[-1][1] * size)
        else:
            made.append((role, size))
    return tuple(made)


def _permute(args: Sequence[Any], kwargs: dict[str, Any], get: Lookup, out: Any) -> Any:
    known = get(args[0])
    return tuple(known[i] for i in args[1]) if known is not None else None


def _transpose(args: Sequence[Any], kwargs: dict[str, Any], get: Lookup, out: Any) -> Any:
    known = get(args[0])
    if known is None:
        return None
    order = list(known)
    a, b = (args[1], args[2]) if len(args) > 2 else (0, len(order) - 1)
    order[a], order[b] = order[b], order[a]
    return tuple(order)


def _squeeze(args: Sequence[Any], kwargs: dict[str, Any], get: Lookup, out: Any) -> Any:
    known = get(args[0])
    if known is None:
        return None
    dims = args[1] if len(args) > 1 else range(len(known))
    gone = {d % len(known) for d in ([dims] if isinstance(dims, int) else dims)}
    return tuple(axis for i, axis in enumerate(known) if i not in gone or _size(axis) != 1)


def _unsqueeze(args: Sequence[Any], kwargs: dict[str, Any], get: Lookup, out: Any) -> Any:
    known = get(args[0])
    if known is None:
        return None
    at = args[1] % (len(known) + 1)
    return (*known[:at], ((UNKNOWN, 1),), *known[at:])


def _expand(args: Sequence[Any], kwargs: dict[str, Any], get: Lookup, out: Any) -> Any:
    known, shape = get(args[0]), _outputs(out)[0].shape
    if known is None:
        return None
    added = tuple(((UNKNOWN, size),) for size in shape[: len(shape) - len(known)])
    return (*added, *(_resized(a, s) for a, s in zip(known, shape[len(added) :], strict=True)))


def _resize(args: Sequence[Any], kwargs: dict[str, Any], get: Lookup, out: Any) -> Any:
    """Slices, padding, splits: same axes, other lengths."""
    known = get(args[0])
    if known is None:
        return None
    return [tuple(_resized(a, s) for a, s in zip(known, t.shape, strict=True)) for t in _outputs(out)]


def _cat(args: Sequence[Any], kwargs: dict[str, Any], get: Lookup, out: Any) -> Any:
    known = [axes for t in args[0] if (axes := get(t)) is not None]
    shape = _outputs(out)[0].shape
    if not known:
        return None
    # The longest part names the joined axis: a class token is put before the patches, not the other way round.
    dim = (args[1] if len(args) > 1 else 0) % len(shape)
    best = max(known, key=lambda axes: _size(axes[dim]))
    if {role for role, _ in best[dim]} <= set(SPATIAL) and len(best[dim]) > 1:
        joined: Axis = ((TOKEN, shape[dim]),)
    else:
        joined = _resized(best[dim], shape[dim])
    return tuple(joined if i == dim else axis for i, axis in enumerate(best))


def _stack(args: Sequence[Any], kwargs: dict[str, Any], get: Lookup, out: Any) -> Any:
    shape = _outputs(out)[0].shape
    known = next((axes for t in args[0] if (axes := get(t)) is not None), None)
    if known is None:
        return None
    dim = (args[1] if len(args) > 1 else 0) % len(shape)
    return (*known[:dim], ((UNKNOWN, shape[dim]),), *known[dim:])


def _index(args: Sequence[Any], kwargs: dict[str, Any], get: Lookup, out: Any) -> Any:
    """x[:, indices]: the indexed axis changes its length. Several arrays of indices, or wide ones, move axes about."""
    arrays = [indices for indices in args[1] if indices is not None]
    return _resize(args, kwargs, get, out) if len(arrays) == 1 and arrays[0].dim() == 1 else None


def _drop_axis(args: Sequence[Any], kwargs: dict[str, Any], get: Lookup, out: Any) -> Any:
    """select(x, dim, index) and unbind(x, dim)."""
    known = get(args[0])
    if known is None:
        return None
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % len(known)
    return [(*known[:dim], *known[dim + 1 :]) for _ in _outputs(out)]


def _reduce(args: Sequence[Any], kwargs: dict[str, Any], get: Lookup, out: Any) -> Any:
    """mean, sum, amax, var … over given axes: they vanish, or stay with length 1."""
    return _reduced(args, kwargs, get, out, 1)


def _reduce_norm(args: Sequence[Any], kwargs: dict[str, Any], get: Lookup, out: Any) -> Any:
    """norm(x, order, dims): as `_reduce`."""
    return _reduced(args, kwargs, get, out, 2)


def _reduced(args: Sequence[Any], kwargs: dict[str, Any], get: Lookup, out: Any, position: int) -> Any:
    known = get(args[0])
    if known is None:
        return None
    dims = args[position] if len(args) > position else kwargs.get("dim")
    if isinstance(dims, torch.Tensor):  # max(x, y)
        return _elementwise(args, kwargs, get, out)
    if dims is None or dims == []:
        dims = list(range(len(known)))
    gone = {d % len(known) for d in ([dims] if isinstance(dims, int) else dims)}
    tensor = _outputs(out)[0]
    if tensor.dim() == len(known):
        made = tuple(((axis[0][0], 1),) if i in gone else axis for i, axis in enumerate(known))
    else:
        made = tuple(axis for i, axis in enumerate(known) if i not in gone)
    return [made for _ in _outputs(out)]


def _attention(args: Sequence[Any], kwargs: dict[str, Any], get: Lookup, out: Any) -> Any:
    """softmax(q k^T) v: rows from the query, columns from the value."""
    query, value = get(args[0]), get(args[2])
    if query is None:
        return None
    return [(*query[:-1], value[-1] if value is not None else query[-1])]


def _fused_attention(args: Sequence[Any], kwargs: dict[str, Any], get: Lookup, out: Any) -> Any:
    return [get(args[0])]


def _restrided(args: Sequence[Any], kwargs: dict[str, Any], get: Lookup, out: Any) -> Any:
    """as_strided only keeps its meaning where it keeps the shape (pooling uses it to fix the memory format)."""
    known = get(args[0])
    return known if known is not None and _sizes(known) == list(_outputs(out)[0].shape) else None


def _unknown(args: Sequence[Any], kwargs: dict[str, Any], get: Lookup, out: Any) -> Any:
    return None


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        (
            "convolution", "_convolution", "conv1d", "conv2d", "conv3d", "conv2d_relu", "mkldnn_convolution",
            "cudnn_convolution", "cudnn_convolution_relu", "miopen_convolution", "_mps_convolution", "deform_conv2d",
            "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
            "miopen_batch_norm", "batch_norm", "_batch_norm_with_update", "native_group_norm", "col2im", "roi_align",
            "grid_sampler_2d", "grid_sampler_3d",
        ),
        _channel_first,
    ),
    **dict.fromkeys(
        (
            "max_pool1d", "max_pool2d", "max_pool2d_with_indices", "max_pool3d_with_indices", "mkldnn_max_pool2d",
            "quantized_max_pool1d", "quantized_max_pool2d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
            "adaptive_avg_pool1d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d",
            "adaptive_max_pool3d", "fractional_max_pool2d", "mkldnn_adaptive_avg_pool2d", "upsample_nearest1d",
            "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d",
            "upsample_bicubic2d", "upsample_trilinear3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
            "_upsample_nearest_exact2d", "pixel_shuffle", "pixel_unshuffle",
        ),
        _pooled,
    ),
    **dict.fromkeys(("linear", "linear_relu", "mkldnn_linear"), _channel_last),
    **dict.fromkeys(("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm"), _layer_norm),
    **dict.fromkeys(("mm", "bmm", "matmul"), _matrix_product(0)),
    **dict.fromkeys(("addmm", "baddbmm", "_addmm_activation"), _matrix_product(1)),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "view_as", "_reshape_copy"), _view),
    "permute": _permute,
    **dict.fromkeys(("transpose", "t", "swapaxes"), _transpose),
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
    **dict.fromkeys(("expand", "repeat"), _expand),
    **dict.fromkeys(
        (
            "slice", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
            "replication_pad1d", "replication_pad2d", "replication_pad3d", "split", "split_with_sizes", "chunk",
            "narrow", "index_select", "gather", "topk", "glu", "_fft_r2c", "_fft_c2r",
        ),
        _resize,
    ),
    "index": _index,
    "cat": _cat,
    "stack": _stack,
    **dict.fromkeys(("select", "unbind"), _drop_axis),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "argmax"), _reduce),
    **dict.fromkeys(("norm", "linalg_vector_norm"), _reduce_norm),
    **dict.fromkeys(
        (
            "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_attention_math", "scaled_dot_product_attention",
            "_scaled_dot_product_fused_attention_overrideable",
        ),
        _attention,
    ),
    **dict.fromkeys(("_native_multi_head_attention", "_transformer_encoder_layer_fwd"), _fused_attention),
    **dict.fromkeys(("im2col", "unfold"), _unknown),
    "as_strided": _restrided,
}  # fmt: skip
