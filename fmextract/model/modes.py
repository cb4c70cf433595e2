"""Find the fastest way to run a model that gives the same values as its code: try each on images, layer by layer.

The model as written is the truth: contiguous memory, every module by its own forward, weights as they are. A network
may assume that memory (a view, a stride, a pointer), read a weight of its neighbour, or amplify rounding by a
threshold. So each way is tried, the fastest first, and the first one in which nothing differs by more than rounding is
taken. One that fails or differs is not used, and the reason is reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn

from fmextract.capture import hooks, probe, taps
from fmextract.common.devices import is_out_of_memory
from fmextract.common.relative_error import relative_error
from fmextract.errors import CaptureError
from fmextract.model import norm_fusion, precision
from fmextract.model.run_mode import PLAIN, Mode, RunMode

ROUNDING = {torch.float64: 1e-11, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Relative L2 distance of an image's layer in another memory format, by its type; measured in float32: 3e-6 at most."""
FUSED_ROUNDING = 1e-5
"""The same with norms in the convolutions before them, which are in float32."""
OF_ONE_VALUE = 10
"""Times that, of the root mean square: what one value may differ by. Where rounding tips a threshold, it is more."""
ROUGHER = 1.5
"""Times the error under plain autocast that a layer may have in half precision; that of its best layers, at least:"""
LEAST_ERROR = 5e-3


@dataclass(frozen=True, slots=True)
class Subject:
    """A model on trial: what runs, and what is captured of it."""

    module: nn.Module
    forward: taps.Forward
    device: torch.device
    probed: Sequence[taps.Probed]
    reducers: Sequence[taps.Reduce | None]
    stop: taps.Event | None

    @property
    def overwritten(self) -> frozenset[int]:
        """Taps that are written in place later, as the probe saw it."""
        return frozenset(i for i, p in enumerate(self.probed) if p.overwritten)


@dataclass(frozen=True, slots=True)
class Trial:
    """A model in one precision and mode: a copy of what one pass over a sample captured, and its seconds per image.

    `overwritten`: taps that are written in place later, in this precision and mode.
    """

    precision: str
    mode: Mode
    run_mode: RunMode
    overwritten: frozenset[int]
    tensors: tuple[torch.Tensor, ...]
    seconds: float


Judge = Callable[[Trial], str]
"""Says why what a trial captured is not what it should be; "" if it is."""


def run(
    subject: Subject,
    name: str,
    run_mode: RunMode,
    inputs: torch.Tensor,
    overwritten: Collection[int],
    kind: type[hooks.Capture] = hooks.Capture,
    passes: int = 1,
) -> tuple[float, tuple[torch.Tensor, ...]]:
    """Run passes over `inputs`. Returns the least seconds of a pass with its captures, and a copy of the last."""
    probed = [replace(p, overwritten=i in overwritten) for i, p in enumerate(subject.probed)]
    inputs = precision.to_memory_format(inputs, run_mode.mode.memory_format)
    times = []
    with (
        run_mode as module,
        precision.numerics(name, subject.device),
        hooks.tapped(module, probed, subject.reducers, subject.stop, kind) as capture,
    ):
        for _ in range(passes):
            started = time.perf_counter()
            tensors = capture.forward(subject.forward, inputs.clone())
            if subject.device.type != "cpu":
                torch.accelerator.synchronize(subject.device)
            times.append(time.perf_counter() - started)
        return min(times), tuple(t.clone() for t in tensors)


def as_written(subject: Subject, name: str, inputs: torch.Tensor, readers: norm_fusion.Readers | None = None) -> Trial:
    """Try the model as it is written, watched by `readers`. Raises what the model raises."""
    return _settled(subject, name, PLAIN, inputs, lambda trial: "", readers)


def formats(asked: str, model: nn.Module) -> tuple[str, ...]:
    """Return the memory formats to try; `auto`: channels_last first for convolutional networks, which are then faster
    by half on CPUs and GPUs.
    """
    if asked != "auto":
        return (asked,)
    convolutions = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    return ("channels_last", "contiguous") if convolutions > 1 else ("contiguous",)


def candidates(name: str, formats: Sequence[str], pairs: tuple[norm_fusion.Pair, ...], pooling: bool) -> list[Mode]:
    """Return the modes to try in a precision, the fastest first; each memory format ends with itself alone."""
    half = name in precision.AUTOCAST
    found = []
    for memory_format in formats:
        pools = pooling and not half and memory_format == "contiguous"  # elsewhere every pooling goes that way
        fusing = pairs if half or memory_format == "channels_last" else ()  # contiguous fp32 stays torch's, bit for bit
        found += [Mode(memory_format, fused, pools, half) for fused in (fusing, ())]
        found.append(Mode(memory_format))
    return list(dict.fromkeys(found))


def first_right(
    subject: Subject, name: str, modes: Sequence[Mode], inputs: torch.Tensor, judge: Judge
) -> tuple[Trial | None, str]:
    """Return (the first of `modes` that `judge` accepts, or None; the modes before it, and why they are not used).

    Raises errors of memory: they say nothing of the mode.
    """
    told = ""
    for mode in modes:
        try:
            return _settled(subject, name, mode, inputs, judge), told
        except _Differs as error:
            why = str(error)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            why = f"the model fails in it: {type(error).__name__}: {error}".rstrip(".")
        told = f"{_in_words(mode)} is not used{'' if name == 'fp32' else f' in {name}'}: {why}"
    return None, told


class _Differs(Exception):
    """What a trial captured is not what it should be."""


def _settled(
    subject: Subject,
    name: str,
    mode: Mode,
    inputs: torch.Tensor,
    judge: Judge,
    readers: norm_fusion.Readers | None = None,
) -> Trial:
    """Return a trial that `judge` accepts. Raises _Differs, or what the model raises.

    The probe ran as written, in fp32: what a precision or a layout copies, or does not, shows only in itself. Taps that
    are written in place only here are looked for if something is wrong.
    """
    run_mode = RunMode(subject.module, subject.device, name, mode)
    overwritten = subject.overwritten
    while True:
        try:
            with readers or nullcontext():
                seconds, tensors = run(subject, name, run_mode, inputs, overwritten)
            trial = Trial(name, mode, run_mode, overwritten, tensors, seconds / len(inputs))
            why: Exception = _Differs(judge(trial))
            if not str(why):
                return trial
        except CaptureError as error:
            why = error.with_traceback(None)
        with run_mode as module, precision.numerics(name, subject.device):
            every, two = [p.tap for p in subject.probed], precision.to_memory_format(inputs[:2], mode.memory_format)
            found = probe.overwritten(module, subject.forward, every, two.clone())
        if found <= overwritten:
            raise why
        overwritten |= found


def _in_words(mode: Mode) -> str:
    ways = [
        (mode.memory_format != "contiguous", "channels_last memory"),
        (bool(mode.fused), "batch norm inside the convolutions"),
        (mode.pooling, "max pooling through channels_last"),
        (mode.prepacked, "casting weights once"),
    ]
    return " with ".join(words for is_there, words in ways if is_there) or "contiguous memory"


# --------------------------------------------------------------------------------------------- judges


def within_rounding(subject: Subject, reference: Trial) -> Judge:
    """Judge in fp32: every layer of every image equals `reference`'s up to rounding; exactly, without another layout or
    other weights.
    """

    def judge(trial: Trial) -> str:
        for i, (rows, others) in enumerate(zip(trial.tensors, reference.tensors, strict=True)):
            most = ROUNDING.get(others.dtype, 0.0)
            if trial.mode.fused:
                most = min(most, FUSED_ROUNDING)
            elif trial.mode.memory_format == "contiguous":
                most = 0.0
            if (rows.dtype, rows.shape) == (others.dtype, others.shape) and torch.equal(rows, others):
                continue
            for row, other in zip(rows, others, strict=True):
                if told := _apart(row, other, most):
                    return f"layer {subject.probed[i].tap.name!r} is not what it is in the model as written: {told}"
        return ""

    return judge


def _apart(row: torch.Tensor, other: torch.Tensor, most: float) -> str:
    """Say how far the values of one image are from what they should be; "" if by rounding at most."""
    if (row.dtype, row.shape) != (other.dtype, other.shape):
        return f"{row.dtype} {tuple(row.shape)} for {other.dtype} {tuple(other.shape)}"
    if torch.equal(row, other):
        return ""
    if not row.is_floating_point():
        return f"{int((row != other).sum()):,} of {row.numel():,} values are others"
    finite = other.isfinite()
    if not torch.equal(row.isfinite(), finite) or not torch.equal(
        row[~finite].nan_to_num(), other[~finite].nan_to_num()
    ):
        return "other values are not finite"
    if not bool(finite.all()):
        row, other = row[finite], other[finite]
    away = row - other
    scale, far = (float(torch.linalg.vector_norm(values, dtype=torch.float64)) for values in (other, away))
    farthest = float(away.abs().amax()) if away.numel() else 0.0
    of_one = OF_ONE_VALUE * ROUNDING.get(row.dtype, 0.0) * scale / max(1, away.numel()) ** 0.5
    if far <= most * scale and farthest <= of_one:
        return ""
    return f"relative L2 distance {far / scale:.2g}" if scale else "it is zero there"


def no_rougher(subject: Subject, reference: Sequence[torch.Tensor], plain: Trial) -> Judge:
    """Judge in a lower precision: no layer is much farther from fp32, the `reference`, than in the model as written."""
    pairs = list(zip(plain.tensors, reference, strict=True))
    allowed = [max(LEAST_ERROR, ROUGHER * (relative_error(rows, exact) or 0.0)) for rows, exact in pairs]
    beyond = [overflown(rows, exact) for rows, exact in pairs]

    def judge(trial: Trial) -> str:
        for i, (rows, exact) in enumerate(zip(trial.tensors, reference, strict=True)):
            error, name = relative_error(rows, exact), subject.probed[i].tap.name
            if error is not None and error > allowed[i]:
                return f"layer {name!r} is farther from fp32 than in the model as written: {error:.2g}"
            if overflown(rows, exact) > beyond[i]:
                return f"layer {name!r} holds values that are not finite, unlike in the model as written"
        return ""

    return judge


def overflown(rows: torch.Tensor, exact: torch.Tensor) -> int:
    """Return how many values are not finite where those of `exact` are."""
    return int((exact.isfinite() & ~rows.isfinite()).sum())
