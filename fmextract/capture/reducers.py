"""What is kept of a map: `layer4=mean`, `layer3=pool:4`, `blocks.11=cls` … Reducers run on the device, row by row.

`capture.reducer_help` lists them in words; `module:callable` is a function of the user's from (B, …) to (B, …).

Averages of half-precision and integer maps are computed and kept in float32, those of float64 in float64; all else
keeps its type. Nothing here waits for the device, and no result shares memory with the map, which the model may
overwrite.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from fmextract.capture.reducer_help import REDUCER_HELP
from fmextract.common.imports import import_object
from fmextract.errors import LayerError
from fmextract.records import SPATIAL

Shape = tuple[int, ...]
Axes = tuple[str, ...]
Apply = Callable[[Tensor], Tensor]
Made = tuple[Shape, Axes, Apply]

MOST_PREFIX_TOKENS = 8
"""Networks have a class token, perhaps a distillation token or 4 registers: a longer rest means no square grid."""


@dataclass(frozen=True, slots=True)
class Reduction:
    """A reducer for one layer. `shape` and `axes` are those of one image after it.

    `apply` maps (B, *shape before) to (B, *shape) on the tensor's device. `stores` is False where the result is there
    for its statistics only: `top`, whose result is the map itself.
    """

    name: str
    shape: Shape
    axes: Axes
    apply: Apply
    stores: bool = True

    @property
    def is_ours(self) -> bool:
        """Whether it is one of this package, and not code of the user's."""
        return self.name.partition(":")[0] in REDUCERS


def reduction(text: str, shape: Shape, axes: Axes) -> Reduction:
    """The reducer `text` for a layer whose images have `shape` and `axes`, as the probe saw them.

    Raises LayerError for an unknown name, a wrong argument, and a layer that lacks the axes it needs.
    """
    name, _, argument = text.partition(":")
    if name in REDUCERS:
        factory = REDUCERS[name]
        if argument and ":" not in REDUCER_HELP[name].usage:
            raise LayerError(f"reducer {name!r} takes no argument, got {text!r}")
        new_shape, new_axes, apply = factory(argument, shape, axes)
    elif is_code(text):
        new_shape, new_axes, apply = _users(text, shape, axes)
    else:
        usages = {known: REDUCER_HELP[known].usage for known in REDUCERS}
        close = [usages[n] for n in difflib.get_close_matches(name, usages, n=2)]
        closest = f" The closest: {', '.join(close)}." if close else ""
        raise LayerError(
            f"unknown reducer {text!r}.{closest} There are: {', '.join(usages.values())}, and module:callable"
        )
    return Reduction(text, new_shape, new_axes, _own(apply), stores=name != "top")


def is_code(text: str) -> bool:
    """Whether a reducer is a function of somebody's own, `module:callable`."""
    name, colon, argument = text.partition(":")
    return name not in REDUCERS and bool(colon) and not argument[:1].isdigit()


def _own(apply: Apply) -> Apply:
    """`apply`, but its result never shares memory with its input: the input may be overwritten, and it can go."""

    def owned(rows: Tensor) -> Tensor:
        out = apply(rows)
        if torch.compiler.is_compiling():  # no memory yet to look at; the compiler leaves out a copy that is not needed
            return out.clone()
        shared = out.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()
        return out.clone() if shared else out

    return owned


def _average_type(rows: Tensor) -> torch.dtype:
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def _lacks(text: str, needs: str, shape: Shape, axes: Axes) -> LayerError:
    return LayerError(f"reducer {text!r} needs {needs}, but the axes of the layer are {axes} of {shape}")


# ------------------------------------------------------------------------------------------ one factory a reducer


def _over_positions(name: str, apply: Callable[[Tensor, list[int]], Tensor]) -> Callable[[str, Shape, Axes], Made]:
    """A factory for reducers to one value a channel. `apply(rows, dims)` takes away the axes `dims` of rows (B, …)."""

    def factory(argument: str, shape: Shape, axes: Axes) -> Made:
        dims = [i + 1 for i, role in enumerate(axes) if role in (*SPATIAL, "token")]
        kept = [i for i, role in enumerate(axes) if role in ("channel", "feature")]
        if not dims or len(kept) != 1 or len(dims) + 1 != len(axes):
            raise _lacks(name, "channels at positions (y, x, time) or tokens", shape, axes)
        return (shape[kept[0]],), ("feature",), lambda rows: apply(rows, dims)

    return factory


def _pool(argument: str, shape: Shape, axes: Axes) -> Made:
    if not {"y", "x"} <= set(axes):
        raise _lacks("pool", "the axes y and x", shape, axes)
    y, x = axes.index("y"), axes.index("x")
    if not argument.isdecimal() or not 1 <= int(argument) <= min(shape[y], shape[x]):
        raise LayerError(
            f"expected pool:k with k from 1 to {min(shape[y], shape[x])}, the smaller side of the layer's"
            f" {shape[y]} x {shape[x]} map, got {f'pool:{argument}'!r}"
        )
    k = int(argument)

    def apply(rows: Tensor) -> Tensor:
        last = rows.to(_average_type(rows)).movedim((y + 1, x + 1), (-2, -1))
        maps = last[:, None] if last.ndim == 3 else last.flatten(1, -3)
        return adaptive_avg_pool2d(maps, k).reshape(*last.shape[:-2], k, k).movedim((-2, -1), (y + 1, x + 1))

    return tuple(k if role in ("y", "x") else n for role, n in zip(axes, shape, strict=True)), axes, apply


def _flatten(argument: str, shape: Shape, axes: Axes) -> Made:
    size = math.prod(shape)
    return (size,), ("feature",), lambda rows: rows.reshape(len(rows), size)


def _cls(argument: str, shape: Shape, axes: Axes) -> Made:
    if "token" not in axes:
        raise _lacks("cls", "an axis of tokens", shape, axes)
    at = axes.index("token")
    return (*shape[:at], *shape[at + 1 :]), (*axes[:at], *axes[at + 1 :]), lambda rows: rows.select(at + 1, 0)


def _tokens(argument: str, shape: Shape, axes: Axes) -> Made:
    """Without a number, the prefix is what is left over when the largest square grid is taken from the end."""
    if "token" not in axes:
        raise _lacks("tokens", "an axis of tokens", shape, axes)
    at = axes.index("token")
    n = shape[at]
    if argument and not (argument.isdecimal() and int(argument) < n):
        raise LayerError(
            f"expected tokens:P with P, the prefix tokens to drop, below {n}, got {f'tokens:{argument}'!r}"
        )
    prefix = int(argument) if argument else n - math.isqrt(n) ** 2
    if not argument and prefix > MOST_PREFIX_TOKENS:
        raise LayerError(
            f"{n} tokens are no square grid after a few prefix tokens: say how many to drop, as tokens:1 for one"
        )
    return (*shape[:at], n - prefix, *shape[at + 1 :]), axes, lambda rows: rows.narrow(at + 1, prefix, n - prefix)


def _channels(argument: str, shape: Shape, axes: Axes) -> Made:
    at = next((axes.index(role) for role in ("channel", "feature") if role in axes), None)
    if at is None:
        raise _lacks("channels", "an axis of channels (or features)", shape, axes)
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", argument)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if not first <= last < shape[at]:
        raise LayerError(
            f"expected channels:A-B or channels:A, with channels from 0 to {shape[at] - 1}, both included,"
            f" got {f'channels:{argument}'!r}"
        )
    size = last - first + 1
    return (*shape[:at], size, *shape[at + 1 :]), axes, lambda rows: rows.narrow(at + 1, first, size)


def _top(argument: str, shape: Shape, axes: Axes) -> Made:
    if not {"channel", "feature"} & set(axes):
        raise _lacks("top", "an axis of channels (or features)", shape, axes)
    return shape, axes, lambda rows: rows


def _users(text: str, shape: Shape, axes: Axes) -> Made:
    """A function of the user's, tried on two images of zeros; axes keep their names only where the shape stays."""
    function = import_object(text, LayerError, f"reducer {text!r}")
    try:
        out = function(torch.zeros(2, *shape))
    except Exception as cause:
        raise LayerError(
            f"reducer {text!r} raised {type(cause).__name__} for zeros of shape {(2, *shape)}: {cause}"
        ) from cause
    if not isinstance(out, Tensor) or out.ndim == 0 or len(out) != 2 or out.is_complex():
        got = f"{out.dtype} {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise LayerError(f"reducer {text!r}: expected a real tensor (2, …) for one of shape {(2, *shape)}, got {got}")
    new_shape = tuple(out.shape[1:])
    unknown = tuple(f"axis_{i + 1}" for i in range(len(new_shape)))
    new_axes = axes if new_shape == shape else ("feature",) if len(new_shape) == 1 else unknown
    return new_shape, new_axes, function


REDUCERS: dict[str, Callable[[str, Shape, Axes], Made]] = {
    "mean": _over_positions("mean", lambda rows, dims: rows.mean(dims, dtype=_average_type(rows))),
    "max": _over_positions("max", lambda rows, dims: rows.amax(dims)),
    "pool": _pool,
    "flatten": _flatten,
    "cls": _cls,
    "tokens": _tokens,
    "channels": _channels,
    "top": _top,
}
"""By name: its factory (argument, shape, axes) -> (new shape, new axes, function)."""
