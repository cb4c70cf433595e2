"""Make a model ready for a precision and mode on a device, and put it back as it was.

fp32 is IEEE: TF32 and reduced-precision kernels are off while a run lasts, and as before afterwards. bf16 and fp16 run
under autocast. A `Mode` says in which faster ways some modules run for as long as the model is in it: convolutions and
linear layers in half precision with weights that are cast once, not once per batch, and on a CPU prepacked for the
kernel; max pooling on a CPU through channels-last, on which torch is several times as fast; convolutions with the batch
norm behind them. Which of them give the right values for a model `model.modes` finds out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fmextract.model.norm_fusion import Pair
from fmextract.model.precision import AUTOCAST, numerics
from fmextract.model.prepacked import (
    HALF,
    available,
    cast_once,
    convolution,
    fits,
    forward,
    has_kernel,
    in_half,
    watching,
)

Forward = Callable[[torch.Tensor], torch.Tensor]


_POOLED = 8  # channels from which max pooling gains from channels-last


@dataclass(frozen=True, slots=True)
class Mode:
    """How a model runs, beside its precision. The default is as it is written.

    `fused`: pairs of this model that run as one (`norm_fusion`). `pooling`: max pooling through channels-last.
    `prepacked`: in half precision, weights of convolutions and linear layers cast and laid out once, not in every pass.
    """

    memory_format: str = "contiguous"
    fused: tuple[Pair, ...] = ()
    pooling: bool = False
    prepacked: bool = False


PLAIN = Mode()


@contextmanager
def as_written(model: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """Make the model ready for passes as it is written, in fp32 on `device`; put it back on every way out."""
    with RunMode(model, device), numerics("fp32", device):
        yield model


class RunMode:
    """A model in evaluation mode on `device`, ready for a precision and mode, for as long as a `with` block lasts.

    The copies that this needs are made once, so that two run modes can take turns. Parameters and buffers keep their
    identity (`.data` is swapped and swapped back) and their type: ties, optimisers, the caller's views, and all other
    code that reads a weight go on working. Nothing is copied where nothing has to change.
    """

    def __init__(self, model: nn.Module, device: torch.device, precision: str = "fp32", mode: Mode = PLAIN) -> None:
        self._model, self._device, self.mode = model, device, mode
        self._half = AUTOCAST.get(precision)
        self._layout = torch.channels_last if mode.memory_format == "channels_last" else torch.preserve_format
        self._changed: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._forwards: dict[nn.Module, Forward] | None = None
        self._training: dict[nn.Module, bool] = {}
        self._original: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._ways = self._other_ways()

    def __enter__(self) -> nn.Module:
        try:
            self._training = {module: getattr(module, "training", False) for module in self._model.modules()}
            for module in self._training:
                _set_mode(module, False)
            if self._forwards is None:
                self._changed = self._laid_out()
            for tensor, changed in self._changed:
                self._original.append((tensor, tensor.data))
                tensor.data = changed
            if self._forwards is None:
                self._forwards = {module: way() for module, way in self._ways.items()}
            for module, forward in self._forwards.items():
                module.forward = forward
        except BaseException:
            self.__exit__()
            raise
        return self._model

    def __exit__(self, *exc_info: object) -> None:
        for tensor, data in self._original:
            tensor.data = data
        for module in self._forwards or ():
            vars(module).pop("forward", None)
        for module, mode in self._training.items():
            _set_mode(module, mode)
        self._original.clear()

    def _laid_out(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return (tensor, its data on the device and in the layout), for each parameter and buffer that changes."""
        on_cpu = self._device.type == "cpu"  # whose other ways lay the weights out themselves
        left = {id(p) for module in self._ways if on_cpu for p in module.parameters(recurse=False)}
        relaid: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for tensor in (*self._model.parameters(), *self._model.buffers()):
            if nn.parameter.is_lazy(tensor) or tensor.is_quantized:
                continue
            data = tensor.data
            if data.layout != torch.strided:  # sparse, opaque: there is no other layout of those
                if data.device != self._device:
                    relaid.setdefault(id(tensor), (tensor, data.to(self._device)))
                continue
            format_ = self._layout if data.dim() == 4 and id(tensor) not in left else torch.preserve_format
            changed = data.to(device=self._device, memory_format=format_)
            if changed is not data:
                relaid.setdefault(id(tensor), (tensor, changed))
        return list(relaid.values())

    def _other_ways(self) -> dict[nn.Module, Callable[[], Forward]]:
        """Return what makes the forwards that some modules have inside the block."""
        half, mode = self._half, self.mode
        packing = half == HALF and self._device.type == "cpu" and mode.prepacked and available()
        ways: dict[nn.Module, Callable[[], Forward]] = {}
        for pair in mode.fused:
            ways[pair.conv] = partial(_as_one, pair, half, self._layout, packing and self._packs(pair.conv))
            ways[pair.norm] = lambda: _unchanged
        for module in self._model.modules():
            if mode.pooling and is_plain_pool(module):
                ways[module] = partial(_pooling, module.forward)
            elif half and mode.prepacked and module not in ways and fits(module):
                made = forward if packing and self._packs(module) else partial(cast_once, half, self._layout)
                ways[module] = partial(made, module)
        return ways

    def _packs(self, module: nn.Module) -> bool:
        return has_kernel(module, self.mode.memory_format)


def _set_mode(module: nn.Module, training: bool) -> None:
    """Set its mode if that differs. A module without a mode, or with one that cannot be set, stays as it is: if that
    makes its rows random or dependent on each other, the probe finds it.
    """
    if getattr(module, "training", training) == training:
        return
    with suppress(AttributeError, RuntimeError, TypeError):
        module.training = training


def _as_one(pair: Pair, half: torch.dtype | None, layout: torch.memory_format, packing: bool) -> Forward:
    """Return the forward of a convolution that does what the batch norm behind it does, too."""

    def exact(input: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(input, *pair.fused(), conv.stride, conv.padding, conv.dilation, conv.groups)

    conv = pair.conv
    weight, bias = pair.fused()
    if packing:
        return convolution(conv, weight, bias, exact, pair.norm)
    dtype = half or weight.dtype
    weight, bias = weight.to(dtype, memory_format=layout), bias.to(dtype)
    rest: tuple[Any, ...] = (conv.stride, conv.padding, conv.dilation, conv.groups)
    unchanged = watching(conv, pair.norm)

    def forward(input: torch.Tensor) -> torch.Tensor:
        fits = in_half(input, half) if half else input.dtype == dtype
        return functional.conv2d(input.to(dtype), weight, bias, *rest) if fits and unchanged() else exact(input)

    return forward


def _unchanged(input: torch.Tensor) -> torch.Tensor:
    return input


def is_plain_pool(module: nn.Module) -> bool:
    """Return whether it is torch's own max pooling, as it is written."""
    return type(module) is nn.MaxPool2d and not module.return_indices and "forward" not in vars(module)


def _pooling(forward: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the forward of an nn.MaxPool2d, bit for bit, with the vectorised kernel that torch has only for
    channels-last: mostly four to eight times as fast, changing the layout and back included (docs/measurements). Only
    in float32: in bfloat16 that kernel gives another NaN.
    """

    def pool(input: torch.Tensor) -> torch.Tensor:
        x = input
        if x.ndim != 4 or x.shape[1] < _POOLED or x.dtype != torch.float32 or not x.is_contiguous():
            return forward(x)
        return forward(x.contiguous(memory_format=torch.channels_last)).contiguous()

    return pool
