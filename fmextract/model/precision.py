"""Define `fp32`, `tf32`, `bf16` and `fp16` on a device, and the memory format of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from fmextract.errors import ConfigError

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def bf16_on_cpu() -> bool:
    """Return whether this processor computes in bfloat16, rather than widening every value first."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def check(precision: str, device: torch.device) -> None:
    """Raise ConfigError for a precision that the device cannot run, or only absurdly slowly."""
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("--precision fp16 on a CPU is some 15 times slower than fp32; use bf16 or fp32")
    if precision == "tf32" and device.type != "cuda":
        raise ConfigError("--precision tf32 needs an NVIDIA GPU; use fp32 or bf16")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError("--precision bf16: this GPU has no bfloat16; use fp16 or fp32")


@contextmanager
def numerics(precision: str, device: torch.device) -> Iterator[None]:
    """Run forward passes inside the block in `precision`: no gradients, autocast where it is needed, TF32 as asked."""
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


def to_memory_format(batch: torch.Tensor, memory_format: str) -> torch.Tensor:
    """Return `batch` (B, channel, y, x) laid out as asked; other ranks stay."""
    if memory_format == "channels_last" and batch.dim() == 4:
        return batch.contiguous(memory_format=torch.channels_last)
    return batch.contiguous()
