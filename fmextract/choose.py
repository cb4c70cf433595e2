"""What `auto` means: precision and batch size, decided by measuring on this model, these layers and this device.

A precision is judged by what it does to the wanted activations: the relative L2 error of each layer against fp32 on the
same images. The fastest one whose median error over the layers stays under `--max-error` is taken.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from fmextract import precision, taps
from fmextract.errors import ConfigError

PROBE_IMAGES = 4
DEFAULT_BATCH = {"cpu": 8}
ACCELERATOR_BATCH = 64
LARGEST_BATCH = {"cpu": 64}
LARGEST_ACCELERATOR_BATCH = 512
IN_FLIGHT = 3  # batches of activations alive at once: one captured, two on their way to the disk
IN_FLIGHT_BYTES = 1 << 30
SHARE_OF_RUN = 0.1  # measuring may cost this much of the expected run


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be decided, and on what. `inputs(n)` gives n real images as inputs of the model."""

    module: nn.Module
    forward: taps.Forward
    device: torch.device
    memory_format: str
    probed: Sequence[taps.Probed]
    reducers: Sequence[taps.Reduce | None]
    stop: taps.Event | None
    inputs: Callable[[int], torch.Tensor]
    precision: str
    max_error: float
    batch_size: int | None
    rows: int


@dataclass(frozen=True, slots=True)
class Chosen:
    """The answers. `rel_errors[i]` is the relative L2 error of layer i in this precision, None for integers.

    `overwritten`: layers that are written in place in this precision. `seconds_per_image` is that of forward passes.
    """

    precision: str
    batch_size: int
    dtypes: tuple[torch.dtype, ...]
    rel_errors: tuple[float | None, ...]
    overwritten: frozenset[int]
    seconds_per_image: float
    notes: tuple[str, ...] = field(default=())


def choose(question: Question) -> Chosen:
    """Measure and decide. Raises ConfigError for a precision the device cannot run."""
    started = time.perf_counter()
    reference = _measure(question, "fp32", None)
    trials = {"fp32": reference}
    for name in _candidates(question):
        trials[name] = _measure(question, name, reference)
    name, why = _fastest_faithful(question, trials)
    taken = trials[name]
    notes = [why] if why else []
    batch, per_image, note = _batch_size(question, name, taken, started)
    notes += [note] if note else []
    return Chosen(
        precision=name,
        batch_size=batch,
        dtypes=tuple(t.dtype for t in taken.tensors),
        rel_errors=taken.errors,
        overwritten=reference.overwritten | taken.overwritten,
        seconds_per_image=per_image,
        notes=tuple(notes),
    )


# ------------------------------------------------------------------------------------------ precision


@dataclass(frozen=True, slots=True)
class _Trial:
    """One precision on the probe batch: what it captured, how far from fp32, seconds a pass."""

    tensors: tuple[torch.Tensor, ...]
    errors: tuple[float | None, ...]
    overwritten: frozenset[int]
    seconds: float
    finite: bool

    @property
    def error(self) -> float:
        """Median over the layers that have one."""
        known = [e for e in self.errors if e is not None]
        return statistics.median(known) if known else 0.0


def _candidates(question: Question) -> list[str]:
    """Precisions to try beside fp32: the one asked for, or with `auto` those the device is fast at."""
    if question.precision not in ("auto", "fp32"):
        precision.check(question.precision, question.device)
        return [question.precision]
    if question.precision == "fp32":
        return []
    return [name for name in ("fp16", "bf16") if _is_fast(name, question.device)]


def _is_fast(name: str, device: torch.device) -> bool:
    try:
        precision.check(name, device)
    except ConfigError:
        return False
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return True


@contextmanager
def _running(question: Question, name: str) -> Iterator[None]:
    with (
        precision.lent(question.module, question.device, name, question.memory_format),
        precision.numerics(name, question.device),
    ):
        yield


def _measure(question: Question, name: str, reference: _Trial | None) -> _Trial:
    inputs = question.inputs(PROBE_IMAGES)
    with _running(question, name):
        overwritten = frozenset(
            taps.overwritten(question.module, question.forward, [p.tap for p in question.probed], inputs.clone())
        )
        tensors = tuple(t.clone() for t in _capture(question, inputs))
        seconds = _timed(question, inputs, passes=3)
    errors = tuple(
        _relative_error(tensor, reference.tensors[i]) if reference is not None else _zero_error(tensor)
        for i, tensor in enumerate(tensors)
    )
    finite = reference is None or all(
        bool(torch.isfinite(t).all()) or not bool(torch.isfinite(r).all())
        for t, r in zip(tensors, reference.tensors, strict=True)
    )
    return _Trial(tensors, errors, overwritten, seconds, finite)


def _capture(question: Question, inputs: torch.Tensor) -> list[torch.Tensor]:
    with taps.tapped(question.module, question.probed, question.reducers, question.stop) as capture:
        return capture.forward(question.forward, inputs.clone())


def _timed(question: Question, inputs: torch.Tensor, passes: int) -> float:
    """Median seconds of a forward pass with its captures. The probe has warmed the kernels up already."""
    times = []
    with taps.tapped(question.module, question.probed, question.reducers, question.stop) as capture:
        for _ in range(passes):
            started = time.perf_counter()
            capture.forward(question.forward, inputs.clone())
            if question.device.type != "cpu":
                torch.accelerator.synchronize(question.device)
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def _zero_error(tensor: torch.Tensor) -> float | None:
    return 0.0 if tensor.is_floating_point() else None


def _relative_error(tensor: torch.Tensor, reference: torch.Tensor) -> float | None:
    """|a - b| / |b| over the whole probe batch, in float64; None for integers."""
    if not reference.is_floating_point():
        return None
    exact = reference.double()
    scale = float(exact.norm())
    error = float((tensor.double() - exact).norm())
    return error / scale if scale else (0.0 if error == 0 else float("inf"))


def _fastest_faithful(question: Question, trials: dict[str, _Trial]) -> tuple[str, str]:
    """(name, one line that says why)."""
    if question.precision != "auto":
        trial = trials[question.precision]
        note = f"precision {question.precision}: median error of the layers against fp32 {trial.error:.2%}"
        return question.precision, note if question.precision != "fp32" else ""
    told, fit = [], []
    for name, trial in trials.items():
        speed = trials["fp32"].seconds / trial.seconds
        faithful = trial.finite and trial.error <= question.max_error
        if name != "fp32":
            why = "" if faithful else (", too much" if trial.finite else ", and overflows")
            told.append(f"{name} {speed:.1f} times as fast, error {trial.error:.2%}{why}")
        if faithful:
            fit.append(name)
    # fp16 stands before bf16: where both are about as fast, it is the more faithful one.
    best = min(fit, key=lambda name: trials[name].seconds * (1.1 if name != "fp16" else 1.0))
    if best != "fp32" and trials[best].seconds > 0.95 * trials["fp32"].seconds:
        best = "fp32"
    if not told:
        return best, f"precision {best}: this device is fast at no other"
    return best, f"precision {best} (auto): {'; '.join(told)}; --max-error {question.max_error:.2%}"


# ----------------------------------------------------------------------------------------- batch size


def _batch_size(question: Question, name: str, taken: _Trial, started: float) -> tuple[int, float, str]:
    """(images a batch, seconds an image, one line that says what was measured)."""
    per_image = taken.seconds / PROBE_IMAGES
    if question.batch_size is not None:
        return question.batch_size, per_image, ""
    kind = question.device.type
    most = min(_fits(taken), max(1, question.rows), LARGEST_BATCH.get(kind, LARGEST_ACCELERATOR_BATCH))
    size = min(DEFAULT_BATCH.get(kind, ACCELERATOR_BATCH), 1 << (most.bit_length() - 1))
    allowed = SHARE_OF_RUN * question.rows * per_image - (time.perf_counter() - started)
    measured: dict[int, float] = {}
    begun = time.perf_counter()
    with _running(question, name):
        while size <= most and 4 * size * per_image < allowed - (time.perf_counter() - begun):
            try:
                measured[size] = _timed(question, question.inputs(size), passes=3) / size
            except (torch.OutOfMemoryError, MemoryError):
                break
            if measured[size] > 1.1 * min(measured.values()):
                break
            size *= 2
    if not measured:
        return size if size <= most else max(1, size // 2), per_image, ""
    best = min(measured, key=lambda n: measured[n])
    rates = ", ".join(f"{n}: {1 / seconds:.1f}/s" for n, seconds in measured.items())
    cost = time.perf_counter() - started
    return best, measured[best], f"batch size {best} (auto; {rates}); measuring took {cost:.1f} s"


def _fits(taken: _Trial) -> int:
    one = sum(t.numel() * t.element_size() for t in taken.tensors) / PROBE_IMAGES
    return max(1, int(IN_FLIGHT_BYTES / IN_FLIGHT / max(1.0, one)))
