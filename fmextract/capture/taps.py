"""The nouns of capturing: what to take (`Tap`), what the probe learnt of it (`Probed`), and why not (`Refused`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fmextract.common.text import some
from fmextract.errors import CaptureError
from fmextract.selector import Module

# --------------------------------------------------------------------------------------------- survey


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape (batch included) and type of one tensor in the output or input of a call; `path` leads to it.

    `names` is the same path with the field names of named tuples in place of their indices.
    """

    path: tuple[str, ...]
    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype


class Event(NamedTuple):
    """The start ("in") or end ("out") of a call: the `number`-th start or end of that module, from 1."""

    module: str
    number: int
    side: str


Forward = Callable[[torch.Tensor], Any]


# -------------------------------------------------------------------------------------------- resolve


@dataclass(frozen=True, slots=True)
class Tap:
    """One wanted tensor: the `number`-th call of `module`, its output or input, the member at `path`.

    `shape` is what it was for the two images of the survey.
    """

    name: str
    module: str
    module_type: str
    number: int
    calls: int
    tap: str
    path: tuple[str, ...]
    member: str
    reducer: str
    selector: str
    shape: tuple[int, ...]
    explicit: bool  # named by path or number, not by a pattern: refused aloud rather than left out
    meant_by: Module


# ------------------------------------------------------------------------------- what a tap's tensor is


@dataclass(frozen=True, slots=True)
class RowLayout:
    """Where the batch is in a tensor: in `axis`, with `k` values of that axis belonging to one image.

    `outer`: the images are the slow index (image 0 has the first k), otherwise the fast one (image 0 has every B-th).
    """

    axis: int
    k: int = 1
    outer: bool = True

    def rows_first(self, tensor: torch.Tensor, batch: int) -> torch.Tensor:
        """(batch, …): a view where the strides allow. Raises CaptureError when the axis is not batch x k long."""
        if tensor.shape[self.axis] != batch * self.k:
            raise CaptureError(f"axis {self.axis} is {tensor.shape[self.axis]} long, expected {batch} x {self.k}")
        if self.k == 1:
            return tensor.movedim(self.axis, 0) if self.axis else tensor
        split = (batch, self.k) if self.outer else (self.k, batch)
        tensor = tensor.unflatten(self.axis, split)
        return tensor.movedim(self.axis if self.outer else self.axis + 1, 0)


@dataclass(frozen=True, slots=True)
class Probed:
    """What the probe learned of a tap. `shape` and `axes` are those of one image, before the reducer.

    `alone`: a batch of one image gives what it gives in a larger one. `undecided`: it was the same for every image, so
    that nothing told whether its rows are of one image each: a run asks again when they are not the same any more.
    """

    tap: Tap
    layout: RowLayout
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    dtype: torch.dtype
    overwritten: bool
    alone: bool = True
    undecided: bool = False

    def rows(self, tensor: torch.Tensor, batch: int) -> torch.Tensor:
        """What the tap saw of `batch` images as (batch, …). Raises CaptureError for another shape than the probe's."""
        rows = self.layout.rows_first(plain(tensor), batch)
        if tuple(rows.shape[1:]) != self.shape:
            raise CaptureError(f"one image gives {tuple(rows.shape[1:])}, expected {self.shape}")
        return rows


@dataclass(frozen=True, slots=True)
class Refused:
    """A tap that cannot be stored row by row, and why."""

    tap: Tap
    why: str


def plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.dequantize() if tensor.is_quantized else tensor


def is_transformed(tensor: torch.Tensor) -> bool:
    """Whether it stands for another one within torch.vmap or the like."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def is_plain(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_nested


Reduce = Callable[[torch.Tensor], torch.Tensor]
"""What is kept of (B, …) rows, in memory of its own: what it was given may be overwritten later."""


def without(names: Sequence[str], count: int) -> str:
    """How a run goes on without these of its `count` layers."""
    if len(names) == count:
        return "."
    others = "the other layer" if count - len(names) == 1 else f"the other {count - len(names)} layers"
    return f". Leave out {some(names)}: name {others} by -l, with --overwrite or another -o."
