"""Prepack the weights of convolutions and linear layers in bfloat16 on a CPU: lay them out for the kernel once.

torch keeps weights in the order of their axes and lays them out again in every call: with small batches that is a tenth
of a network's time. The operators that take prepacked weights give the same bits, except the last one where a linear
layer's sums are taken in another order; torch's own compiler uses them. They are private: so they are tried once, and
if they have changed, nothing is prepacked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

HALF = torch.bfloat16

Forward = Callable[[Tensor], Tensor]


def fits(module: nn.Module) -> bool:
    """Return whether `module` is torch's own convolution or linear layer, whose use of its weights is known.

    A subclass may standardise its weights first, and a module whose forward was replaced may do anything.
    """
    plain = type(module) is nn.Linear or (type(module) is nn.Conv2d and module.padding_mode == "zeros")
    return plain and "forward" not in vars(module) and has_weight(module)


def has_kernel(module: nn.Module, memory_format: str) -> bool:
    """Return whether `forward` works for a `module` that `fits`, in a model of this memory format.

    Convolutions give channels-last outputs, as they do with channels-last weights.
    """
    return not isinstance(module, nn.Conv2d) or (
        memory_format == "channels_last" and not isinstance(module.padding, str)
    )


def has_weight(module: nn.Module) -> bool:
    """Return whether the weight is a parameter in float32, not computed for every pass by a hook or a parent."""
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, nn.Parameter)
        and weight.dtype == torch.float32
        and weight.numel() > 0
        and not weight.is_inference()
    )


def available() -> bool:
    """Return whether this processor, this torch and its settings allow it."""
    return bool(torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled() and _works())


@functools.cache
def _works() -> bool:
    """Return whether the operators are there and give what their public twins give."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    conv = nn.Conv2d(16, 16, 3, stride=2, padding=1, device="meta")
    x, weight = (torch.linspace(-1, 1, n * 16 * 9, dtype=torch.float32).view(n, 16, 3, 3).to(HALF) for n in (2, 16))
    bias, flat = weight[:, 0, 0, 0].contiguous(), weight.flatten(1)
    try:
        with torch.no_grad():
            convolved, multiplied = _convolution(conv, weight, bias)(x), _linear(flat, bias)(x.flatten(1))
            same = torch.equal(convolved, functional.conv2d(x, weight, bias, conv.stride, conv.padding))
            return same and torch.equal(multiplied, functional.linear(x.flatten(1), flat, bias))
    except (AttributeError, RuntimeError, TypeError):  # what a private operator that has changed raises
        return False


def forward(module: nn.Module) -> Forward:
    """Return the forward of a module that `fits`. Its own runs outside of half precision, and after a change."""
    if isinstance(module, nn.Conv2d):
        return convolution(module, module.weight.detach(), _cast(module.bias), module.forward)
    assert isinstance(module, nn.Linear)
    return _guarded(watching(module), _linear(module.weight.detach().to(HALF), _cast(module.bias)), module.forward)


def cast_once(half: torch.dtype, layout: torch.memory_format, module: nn.Module) -> Forward:
    """Return the forward of a module that `fits`, through torch's public operators: weights are cast once."""
    if isinstance(module, nn.Linear):
        flat, bias = module.weight.detach().to(half), _cast(module.bias, half)
        return _guarded(watching(module), lambda x: functional.linear(x, flat, bias), module.forward, half)
    assert isinstance(module, nn.Conv2d)
    weight, bias = module.weight.detach().to(half, memory_format=layout), _cast(module.bias, half)
    rest: tuple[Any, ...] = (module.stride, module.padding, module.dilation, module.groups)
    return _guarded(watching(module), lambda x: functional.conv2d(x, weight, bias, *rest), module.forward, half)


def convolution(
    conv: nn.Conv2d, weight: Tensor, bias: Tensor | None, otherwise: Forward, *others: nn.Module
) -> Forward:
    """Return the forward of `conv` with `weight` and `bias`, made of its own and those of `others`.

    The bias may be wider.

    `otherwise` runs where the model does not compute in half precision, gives one image without a batch, or has other
    weights or settings than now, as a model may that shares one convolution between several.
    """
    packed = _guarded(watching(conv, *others), _convolution(conv, weight.to(HALF), bias), otherwise)
    return lambda input: packed(input) if input.dim() == 4 else otherwise(input)


def _guarded(unchanged: Callable[[], bool], fast: Forward, otherwise: Forward, half: torch.dtype = HALF) -> Forward:
    def forward(input: Tensor) -> Tensor:
        return fast(input.to(half)) if in_half(input, half) and unchanged() else otherwise(input)

    return forward


def watching(*modules: nn.Module) -> Callable[[], bool]:
    """Return a function that says whether all that the forwards of `modules` depend on is still as it is now."""
    given = list(map(_state, modules))
    return lambda: list(map(_state, modules)) == given


_TENSORS = ("weight", "bias", "running_mean", "running_var")
_SETTINGS = ("stride", "padding", "dilation", "groups", "eps")


def _state(module: nn.Module) -> tuple[Any, ...]:
    """Return the state of a module, as far as it shows without looking at values."""
    tensors = (getattr(module, name, None) for name in _TENSORS)
    seen = [(id(t), t._version, t.data_ptr()) for t in tensors if isinstance(t, Tensor)]
    return (*seen, *(getattr(module, name, None) for name in _SETTINGS))


def _cast(bias: Tensor | None, half: torch.dtype = HALF) -> Tensor | None:
    """Return a bias as autocast gives it to a layer."""
    return None if bias is None else bias.detach().to(half)


def in_half(x: Tensor, half: torch.dtype = HALF) -> bool:
    """Return whether a layer computes in `half` on `x`: within autocast, in its type, without gradients."""
    if torch.is_grad_enabled() or not x.is_floating_point() or x.dtype == torch.float64:
        return False
    kind = x.device.type
    return torch.get_autocast_dtype(kind) == half if torch.is_autocast_enabled(kind) else x.dtype == half


def _convolution(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> Forward:
    where: tuple[Any, ...] = (conv.padding, conv.stride, conv.dilation, conv.groups)
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
    once = _Once(lambda x: reorder(weight.to_mkldnn(), *where, x.shape))
    return lambda x: torch.ops.mkldnn._convolution_pointwise(x, once(x), bias, *where, "none", [], "")


def _linear(weight: Tensor, bias: Tensor | None) -> Forward:
    once = _Once(lambda x: torch.ops.mkldnn._reorder_linear_weight(weight, x.numel() // x.shape[-1]))
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, once(x), bias, "none", [], "")


class _Once:
    """Weights that the first call lays out, since the images decide how; then what they were made of is dropped."""

    def __init__(self, pack: Forward) -> None:
        self._pack: Forward | None = pack
        self._packed: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed is None:
            assert self._pack is not None
            self._packed, self._pack = self._pack(x), None
        return self._packed
