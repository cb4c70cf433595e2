"""Finding out what is written in place: by its values, all of them, and by watching every operation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

_BLOCK = 1 << 20  # values that are weighted at once
_KEPT = 1 << 11  # numbers of 64 bits, up to which a copy of them is their own digest: of many small layers the cheaper
_AS_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(tensor: torch.Tensor) -> int | bytes:
    """A number of 64 bits over all bits of a dense tensor, in whatever order it lies in memory.

    One that differs in a single value has another digest for certain, any other one but by a chance of 2^-32. Of a
    small tensor in memory of the host it is the bits themselves.
    """
    bits = _bits(tensor.detach())
    if len(bits) <= _KEPT and type(bits) is torch.Tensor and bits.device.type == "cpu":
        return bits.numpy().tobytes()
    weights = _weights(bits.device)
    if len(bits) <= _BLOCK:
        return int((bits * weights[: len(bits)]).sum())
    sums = torch.stack([(block * weights[: len(block)]).sum() for block in bits.split(_BLOCK)])
    return int((sums * weights[: len(sums)]).sum())


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """All values as one row of int64, two or more of them in one where they fill it."""
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    tensor = tensor.resolve_neg()  # the imaginary part of a conjugate is its bits with a sign to turn
    if not tensor.is_contiguous():  # in the order of memory no copy is needed, unless there are gaps
        strides = tensor.stride()
        tensor = tensor.permute(sorted(range(tensor.dim()), key=lambda axis: -strides[axis]))
    flat = tensor.reshape(-1)
    size = flat.element_size()
    if flat.is_contiguous() and not flat.numel() * size % 8 and not flat.storage_offset() * size % 8:
        return flat.view(torch.int64)
    return flat.view(_AS_INTEGERS[size]).to(torch.int64)


@lru_cache
def _weights(device: torch.device) -> torch.Tensor:
    """Random odd numbers: a multiple of one is zero only where its factor is, so that no changed value is lost."""
    generator = torch.Generator().manual_seed(7)
    weights = torch.randint(-(2**62), 2**62, (_BLOCK,), generator=generator, dtype=torch.int64)
    return (2 * weights + 1).to(device)


class Writes(TorchDispatchMode):
    """Tells of every tensor that an operation of torch is about to write, also through `.data` or another view.

    What is written past torch (numpy, DLPack, code of one's own) it cannot see.
    """

    def __init__(self, tell: Callable[[torch.Tensor], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tell = tell

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for at, name in _written_by(func):
            for value in tree_leaves(args[at] if at < len(args) else kwargs.get(name)):
                if isinstance(value, torch.Tensor):
                    self._tell(value)
        return func(*args, **kwargs)


@lru_cache(maxsize=4096)
def _written_by(func: Any) -> list[tuple[int, str]]:
    """The arguments that an operation writes, by position and name."""
    arguments = enumerate(func._schema.arguments) if func._schema.is_mutable else ()
    return [(i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]


def unwatched() -> AbstractContextManager[Any]:
    """Nothing is told of the operations within, which are not the model's: of many layers, telling is the work."""
    return _disable_current_modes() if torch._C._len_torch_dispatch_stack() else nullcontext()


def memory(tensor: torch.Tensor) -> int:
    """The address of the memory that a tensor is a view of; 0 where it has none."""
    return tensor.untyped_storage().data_ptr()
