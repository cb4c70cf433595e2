"""What `fp32`, `tf32`, `bf16` and `fp16` mean for a model on a device, and how to lend a model for a run unharmed.

fp32 is IEEE: TF32 and reduced-precision kernels are off while a run lasts, and as before afterwards. bf16 and fp16 run
under autocast with the weights of convolutions and linear layers cast once, not once a batch. On a CPU some modules
run another way for as long as the model is lent: max pooling through channels-last, on which torch is several times as
fast, layers in bfloat16 with weights that are laid out once, convolutions with the batch norm behind them.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fmextract import packed
from fmextract.errors import ConfigError
from fmextract.fusion import Pair
from fmextract.taps import module_kind

Forward = Callable[[torch.Tensor], torch.Tensor]

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_POOLED = 8  # channels from which max pooling gains from channels-last


def bf16_on_cpu() -> bool:
    """Whether this processor computes in bfloat16, rather than widening every value first."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def check(precision: str, device: torch.device) -> None:
    """Raises ConfigError for a precision that the device cannot run, or only absurdly slowly."""
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("--precision fp16 on a CPU is some 15 times slower than fp32; use bf16 or fp32")
    if precision == "tf32" and device.type != "cuda":
        raise ConfigError("--precision tf32 needs an NVIDIA GPU; use fp32 or bf16")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError("--precision bf16: this GPU has no bfloat16; use fp16 or fp32")


@contextmanager
def numerics(precision: str, device: torch.device) -> Iterator[None]:
    """Forward passes inside the block run in `precision`: no gradients, autocast where it is needed, TF32 as asked."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_tf32(precision == "tf32"))
        if precision in AUTOCAST:
            stack.enter_context(torch.autocast(device.type, dtype=AUTOCAST[precision], cache_enabled=False))
        else:
            stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn
    before = (torch.get_float32_matmul_precision(), conv.allow_tf32)
    try:
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        conv.allow_tf32 = allowed
        assert matmul.allow_tf32 is allowed
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        conv.allow_tf32 = before[1]


@contextmanager
def lent(
    model: nn.Module,
    device: torch.device,
    precision: str = "fp32",
    memory_format: str = "contiguous",
    fused: Sequence[Pair] = (),
    packing: bool = True,
) -> Iterator[nn.Module]:
    """The model in evaluation mode on `device`, weights cast and laid out for the run; as it was on every way out.

    Parameters and buffers keep their identity (`.data` is swapped and swapped back), so that ties, optimisers and views
    of the caller's survive; nothing is copied where nothing has to change. `fused` are pairs of this model
    (`fusion.fusible`), which run as one. `packing` False leaves out operators that no compiler knows.
    """
    training = {module: module.training for module in model.modules()}
    original: list[tuple[torch.Tensor, torch.Tensor]] = []
    half = AUTOCAST.get(precision)
    layout = torch.channels_last if memory_format == "channels_last" else torch.preserve_format
    packs = packing and half == packed.HALF and packed.available()
    fit = {m for m in training if packs and packed.fits(m, memory_format)}
    others = _other_ways(training, half, layout, fused, fit) if device.type == "cpu" else {}
    kinds = ("conv", "linear") if half else ()
    cast = {id(p) for m in training if m not in others and module_kind(m) in kinds for p in _own(m)}
    left = {id(p) for m in others for p in _own(m)} - cast
    try:
        for module in training:
            module.training = False
        seen: set[int] = set()
        for tensor in (*model.parameters(), *model.buffers()):
            if id(tensor) in seen or tensor.is_quantized:
                continue
            seen.add(id(tensor))
            data = tensor.data
            dtype = half if id(tensor) in cast and data.is_floating_point() else data.dtype
            format_ = layout if data.dim() == 4 and id(tensor) not in left else torch.preserve_format
            changed = data.to(device=device, dtype=dtype, memory_format=format_)
            if changed is not data:
                original.append((tensor, data))
                tensor.data = changed
        for module, way in others.items():
            module.forward = way()
        yield model
    finally:
        for tensor, data in original:
            tensor.data = data
        for module in others:
            vars(module).pop("forward", None)
        for module, mode in training.items():
            module.training = mode


def _other_ways(
    modules: Iterable[nn.Module],
    half: torch.dtype | None,
    layout: torch.memory_format,
    fused: Sequence[Pair],
    fit: Collection[nn.Module],
) -> dict[nn.Module, Callable[[], Forward]]:
    """What makes the forwards that some modules have on a CPU while they are lent, those that `fit` packed.

    Their weights stay as they are.
    """
    ways: dict[nn.Module, Callable[[], Forward]] = {}
    for pair in fused:
        ways |= {pair.conv: partial(_as_one, pair, half, layout, pair.conv in fit), pair.norm: lambda: _unchanged}
    for module in modules:
        if _is_plain_pool(module):
            ways[module] = partial(_pooling, module.forward)
        elif module in fit and module not in ways:
            ways[module] = partial(packed.forward, module)
    return ways


def _as_one(pair: Pair, half: torch.dtype | None, layout: torch.memory_format, packing: bool) -> Forward:
    """The forward of a convolution that does what the batch norm behind it does, too."""

    def exact(input: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(input, *pair.fused(), conv.stride, conv.padding, conv.dilation, conv.groups)

    conv = pair.conv
    weight, bias = pair.fused()
    if packing:
        return packed.convolution(conv, weight, bias, exact, pair.norm)
    dtype = half or weight.dtype
    weight, bias = weight.to(dtype, memory_format=layout), bias.to(dtype)
    rest: tuple[Any, ...] = (conv.stride, conv.padding, conv.dilation, conv.groups)
    unchanged = packed.watching(conv, pair.norm)

    def forward(input: torch.Tensor) -> torch.Tensor:
        fits = packed.in_half(input) if half else input.dtype == dtype
        return functional.conv2d(input.to(dtype), weight, bias, *rest) if fits and unchanged() else exact(input)

    return forward


def _unchanged(input: torch.Tensor) -> torch.Tensor:
    return input


def _is_plain_pool(module: nn.Module) -> bool:
    return type(module) is nn.MaxPool2d and not module.return_indices and "forward" not in vars(module)


def _pooling(forward: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The forward of an nn.MaxPool2d, bit for bit, with the vectorised kernel that torch has for channels-last alone:
    mostly four to eight times as fast, both ways of laying out included (docs/performance.md). In float32: in bfloat16
    that kernel gives another NaN.
    """

    def pool(input: torch.Tensor) -> torch.Tensor:
        x = input
        if x.ndim != 4 or x.shape[1] < _POOLED or x.dtype != torch.float32 or not x.is_contiguous():
            return forward(x)
        return forward(x.contiguous(memory_format=torch.channels_last)).contiguous()

    return pool


def _own(module: nn.Module) -> list[torch.Tensor]:
    """Weight and bias that are this module's own parameters, not computed by a parametrisation."""
    return [p for name, p in module.named_parameters(recurse=False) if name in ("weight", "bias")]


def resolve_memory_format(asked: str, model: nn.Module) -> str:
    """`auto`: channels_last for convolutional networks, where it is the faster one by half on CPUs and GPUs alike."""
    if asked != "auto":
        return asked
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    return "channels_last" if len(convolutions) > 1 else "contiguous"


def to_memory_format(batch: torch.Tensor, memory_format: str) -> torch.Tensor:
    """`batch` (B, channel, y, x) laid out as asked; other ranks stay."""
    if memory_format == "channels_last" and batch.dim() == 4:
        return batch.contiguous(memory_format=torch.channels_last)
    return batch.contiguous()


def keep_freed_memory() -> None:
    """Ask glibc to keep freed blocks: giving activations back to the system costs a page fault a page and batch.

    Measured on a CPU: ResNet-50 at batch 64 goes from 52 to 78 images/s, EfficientNet-Lite0 from 87 to 251, for 0.1 to
    0.3 GB of memory (docs/performance.md). One arena for all threads, since each else keeps what it once needed: 0.15
    GB of a run, at the same speed. Elsewhere than on glibc it does nothing.
    """
    mallopt = _of_libc("mallopt")
    if mallopt is None:
        return
    m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8
    mallopt(m_mmap_threshold, 1 << 30)
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_arena_max, 1)


def give_back_freed_memory() -> None:
    """Give the system what `keep_freed_memory` kept: holes that no pass fits into would else add up in a long run.

    Takes some 20 ms, and as much again for faults of the next pass. Elsewhere than on glibc it does nothing.
    """
    trim = _of_libc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_libc(name: str) -> Callable[..., int] | None:
    """A function of the C library; None where it has no such function, as musl and other systems than Linux."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):
        return None
    return function
