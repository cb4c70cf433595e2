"""What `auto` means: precision and batch size, decided by measuring on this model, these layers and this device.

A precision is judged by what it does to the wanted activations: the relative L2 error of each layer against fp32 on the
same images. The fastest one whose median error over the layers stays under `--max-error` is taken. Measuring may cost a
tenth of the expected run; only the two images that any judgement needs are run in every case.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from fmextract import precision, taps
from fmextract.capture import probe
from fmextract.compiled import CompiledCapture
from fmextract.device import TOO_SMALL, is_out_of_memory
from fmextract.errors import ConfigError, DeviceLost, FmextractError, LayerError
from fmextract.fusion import Pair

SAMPLE_BYTES = 256 << 20  # of activations in fp32 that the sample may take
MOST_SAMPLES = 8
DEFAULT_BATCH = {"cpu": 8}  # in fp32; in half precision as many as take the same memory
ACCELERATOR_BATCH = 64
LARGEST_BATCH = {"cpu": 64}
LARGEST_ACCELERATOR_BATCH = 512
IN_FLIGHT = 3  # batches of activations alive at once: one captured, two on their way to the disk
IN_FLIGHT_BYTES = 768 << 20
IN_FLIGHT_ACCELERATOR = (
    3 << 30
)  # each batch is a few hundred calls whatever its size, and a device is soon done with it
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
MOST_OF_HOST = 1 / 8  # of the memory of the host, for them
SHARE_OF_RUN = 0.1
LEAST_MEASURING = 4.0  # seconds that an accelerator may take for it in a run of any length: it loads its kernels
PASSES = 3


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be decided, and on what. `inputs(n)` gives n real images, spread over the source, as model inputs.

    `fused` are, by precision, the pairs that run as one in it.
    """

    module: nn.Module
    forward: taps.Forward
    device: torch.device
    memory_format: str
    probed: Sequence[taps.Probed]
    reducers: Sequence[taps.Reduce | None]
    stop: taps.Event | None
    fused: Mapping[str, Sequence[Pair]]
    inputs: Callable[[int], torch.Tensor]
    precision: str
    max_error: float
    batch_size: int | None
    compile: bool
    rows: int


@dataclass(frozen=True, slots=True)
class Chosen:
    """The answers. `rel_errors[i]` is the relative L2 error of layer i in this precision, None for integers.

    `sample` is what the chosen precision captured of a few images, one tensor (n, …) a layer. `overwritten`: layers
    that are written in place in this precision. `seconds_per_image` is that of forward passes at this batch size.
    """

    precision: str
    batch_size: int
    rel_errors: tuple[float | None, ...]
    overwritten: frozenset[int]
    sample: tuple[torch.Tensor, ...]
    seconds_per_image: float
    notes: tuple[str, ...]


def choose(question: Question) -> Chosen:
    """Measure and decide. Raises ConfigError for a precision that the device, or this model, cannot run in."""
    started = time.perf_counter()
    inputs, reference, full, said = _first_trials(question)
    trials, failed = {"fp32": full}, []
    for name in _candidates(question):
        try:
            trials[name] = _Trial.of(question, name, inputs, reference)
        except Exception as error:
            why = f"precision {name}: the model fails in it, as it does not in fp32: {type(error).__name__}: {error}"
            if question.precision != "auto":
                raise ConfigError(f"{why}. Use --precision fp32.") from error
            failed.append(why)
    name, notes = _fastest_faithful(question, trials)
    notes = [*said, *failed, *notes]
    taken = trials[name]
    size, per_image, measured = _batch_size(question, name, taken, inputs, started)
    if measured:
        notes.append(measured)
    if question.compile:
        taken, compiling = _compiled(question, name, size, inputs, reference, replace(taken, seconds=per_image))
        per_image = taken.seconds
        notes.append(compiling)
    if "auto" in (question.precision, question.batch_size or "auto"):
        notes.append(f"measuring took {time.perf_counter() - started:.1f} s")
    return Chosen(
        precision=name,
        batch_size=size,
        rel_errors=taken.errors,
        overwritten=taken.overwritten,
        sample=taken.tensors,
        seconds_per_image=per_image,
        notes=tuple(notes),
    )


def _first_trials(question: Question) -> tuple[torch.Tensor, _Trial, _Trial, list[str]]:
    """(the sample, what fp32 makes of it as the model is written, and as a run in fp32 would; what is odd about it).

    Raises DeviceLost where there is not enough memory for one image, LayerError where the model fails.
    """
    said: list[str] = []
    for n in dict.fromkeys((_sample_size(question), 1)):
        inputs = question.inputs(n)
        try:
            return inputs, *_in_fp32(question, inputs), said
        except Exception as error:
            if is_out_of_memory(error):
                if n == 1:
                    raise DeviceLost(TOO_SMALL.format(error)) from error
                said = [f"what is measured is measured on one image: there is not enough memory for {n}"]
                continue
            if isinstance(error, FmextractError):
                raise
            why = f"{type(error).__name__}: {error}"
        # Only here: the error holds on to the frames of the pass, and they to its activations.
        # An image that the model fails on is a matter of its row: what it fails on every time is not.
        inputs = torch.zeros_like(inputs)
        said.append(f"what is measured is measured on black images, as the model fails on the first ones: {why}")
        try:
            return inputs, *_in_fp32(question, inputs), said
        except Exception as error:
            raise LayerError(f"the model fails on a batch of {n} images: {why}") from error
    raise AssertionError("unreachable: one image was tried")


def _in_fp32(question: Question, inputs: torch.Tensor) -> tuple[_Trial, _Trial]:
    reference = _Trial.of(question, "fp32", inputs, None)
    fused = "fp32" in question.fused
    return reference, _Trial.of(question, "fp32", inputs, reference) if fused else reference


def _sample_size(question: Question) -> int:
    one = 4 * sum(math.prod(p.shape) for p in question.probed)
    return min(MOST_SAMPLES, max(2, min(SAMPLE_BYTES // max(1, one), question.rows // 100)))


# ------------------------------------------------------------------------------------------ precision


@dataclass(frozen=True, slots=True)
class _Trial:
    """One precision on the sample: what it captured, how far from fp32, seconds an image."""

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

    @classmethod
    def of(cls, question: Question, name: str, inputs: torch.Tensor, reference: _Trial | None) -> _Trial:
        """`reference`: what the model gives in fp32 as it is written; None: this is to be it."""
        with _running(question, name, exact=reference is None):
            # The probe ran in fp32; what autocast copies, or does not, shows only in the precision itself.
            if name == "fp32":
                hazards = {i for i, p in enumerate(question.probed) if p.overwritten}
            else:
                every = [p.tap for p in question.probed]
                hazards = probe.overwritten(question.module, question.forward, every, inputs[:2].clone())
            passes = _passes(question, name, len(inputs))
            if name == "fp32" and name in question.fused:  # what is to be compared with has warmed up for the other
                passes = 1 if reference is None else max(1, passes - 1)
            seconds, tensors = _timed(question, inputs, passes)
        if reference is None:
            errors = tuple(0.0 if t.is_floating_point() else None for t in tensors)
            return cls(tensors, errors, frozenset(hazards), seconds / len(inputs), True)
        return cls(
            tensors=tensors,
            errors=tuple(map(relative_error, tensors, reference.tensors)),
            overwritten=frozenset(hazards),
            seconds=seconds / len(inputs),
            finite=all(
                bool(t.isfinite().all()) or not bool(r.isfinite().all())
                for t, r in zip(tensors, reference.tensors, strict=True)
            ),
        )


def _passes(question: Question, name: str, images: int) -> int:
    """The first pass is slower by up to the half; more are taken where they are nothing beside the run.

    One a precision that is only there to be compared with; two of what was asked for, for the plan's time.
    """
    if question.precision not in ("auto", name) or question.rows < 50 * images:
        return 1
    return PASSES if "auto" in (question.precision, question.batch_size or "auto") else 2


def _candidates(question: Question) -> list[str]:
    """Precisions to try beside fp32: the one asked for, or with `auto` those the device is fast at."""
    if question.precision == "auto":
        return [name for name in ("fp16", "bf16") if _is_fast(name, question.device)]
    precision.check(question.precision, question.device)
    return [] if question.precision == "fp32" else [question.precision]


def _is_fast(name: str, device: torch.device) -> bool:
    try:
        precision.check(name, device)
    except ConfigError:
        return False
    return device.type != "cpu" or precision.bf16_on_cpu()


@contextmanager
def _running(question: Question, name: str, exact: bool = False) -> Iterator[None]:
    """`exact`: without what is fused."""
    fused, packing = () if exact else question.fused.get(name, ()), not question.compile
    with (
        precision.lent(question.module, question.device, name, question.memory_format, fused, packing),
        precision.numerics(name, question.device),
    ):
        yield


def _timed(question: Question, inputs: torch.Tensor, passes: int = 1) -> tuple[float, tuple[torch.Tensor, ...]]:
    """(least seconds of a forward pass with its captures, what the last one captured, copied)."""
    with taps.tapped(question.module, question.probed, question.reducers, question.stop) as capture:
        return _timed_passes(question, capture, inputs, passes)


def _timed_passes(
    question: Question, capture: taps.Capture, inputs: torch.Tensor, passes: int
) -> tuple[float, tuple[torch.Tensor, ...]]:
    times = []
    for _ in range(passes):
        started = time.perf_counter()
        tensors = capture.forward(question.forward, inputs.clone())
        if question.device.type != "cpu":
            torch.accelerator.synchronize(question.device)
        times.append(time.perf_counter() - started)
    return min(times), tuple(t.clone() for t in tensors)


def relative_error(tensor: torch.Tensor, reference: torch.Tensor) -> float | None:
    """|a - b| / |b| over all values, in float64; None for integers."""
    if not reference.is_floating_point():
        return None
    exact = reference.double()
    scale = float(exact.norm())
    error = float((tensor.double() - exact).norm())
    return error / scale if scale else (0.0 if error == 0 else math.inf)


def _fastest_faithful(question: Question, trials: dict[str, _Trial]) -> tuple[str, list[str]]:
    """(name, the line that says why)."""
    if question.precision != "auto":
        error = trials[question.precision].error
        why = f"precision {question.precision}: median error of the layers against fp32 {error:.2%}"
        return question.precision, [why] if question.precision != "fp32" else []
    told, fit = [], ["fp32"]
    for name, trial in trials.items():
        if name == "fp32":
            continue
        faithful = trial.finite and trial.error <= question.max_error
        verdict = "" if faithful else " (too much)" if trial.finite else " (overflows)"
        told.append(
            f"{name} is {trials['fp32'].seconds / trial.seconds:.1f} times as fast, error {trial.error:.2%}{verdict}"
        )
        fit += [name] if faithful else []
    # Where fp16 and bf16 are about as fast, fp16 is the more faithful; a gain under 5 % is not worth an error at all.
    handicap = {"fp32": 0.95, "bf16": 1.1}
    best = min(fit, key=lambda name: trials[name].seconds * handicap.get(name, 1.0))
    if not told:
        return best, [f"precision {best} (auto): this device is fast at no other"]
    return best, [f"precision {best} (auto): {'; '.join(told)}; --max-error is {question.max_error:.2%}"]


# -------------------------------------------------------------------------------------------- compiled


def _compiled(
    question: Question, name: str, size: int, inputs: torch.Tensor, reference: _Trial, eager: _Trial
) -> tuple[_Trial, str]:
    """(the trial as batches of `size` give it when compiled, the line that says what that takes and brings).

    Precision and batch size were chosen without compiling, which takes minutes; of what was chosen, what is stored and
    foretold is that of the passes which will run. Raises ConfigError for a model that cannot be compiled.
    """
    some = inputs[:size]
    # Filled up with black images, as a short batch of the run is: another length would have to be compiled as well.
    batch = torch.cat([some, some.new_zeros((size - len(some), *some.shape[1:]))])
    batch = precision.to_memory_format(batch, question.memory_format)
    every = (question.module, question.probed, question.reducers, question.stop, CompiledCapture)
    try:
        with _running(question, name), taps.tapped(*every) as capture:
            started = time.perf_counter()
            capture.forward(question.forward, batch.clone())
            compiling = time.perf_counter() - started
            seconds, tensors = _timed_passes(question, capture, batch, PASSES)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return eager, f"compiled (--compile): {size} images a batch need too much memory; judged without compiling"
    kept = tuple(t[: len(some)] for t in tensors)
    errors = tuple(relative_error(t, r[: len(some)]) for t, r in zip(kept, reference.tensors, strict=True))
    ratio = eager.seconds * size / seconds
    told = f"compiled (--compile) in {compiling:.1f} s: {ratio:.2f} times as fast as the same passes without"
    return replace(eager, tensors=kept, errors=errors, seconds=seconds / size), told


# ----------------------------------------------------------------------------------------- batch size


def _batch_size(
    question: Question, name: str, taken: _Trial, inputs: torch.Tensor, started: float
) -> tuple[int, float, str]:
    """(images a batch, seconds an image, one line that says what was measured)."""
    if question.batch_size is not None:
        return question.batch_size, taken.seconds, ""
    kind = question.device.type
    most = min(_fits(taken, kind), max(1, question.rows), LARGEST_BATCH.get(kind, LARGEST_ACCELERATOR_BATCH))
    usual = DEFAULT_BATCH.get(kind, ACCELERATOR_BATCH)
    if kind == "cpu" and name in precision.AUTOCAST:
        usual *= 2
    size = min(usual, 1 << (most.bit_length() - 1))
    default = size
    now = time.perf_counter()
    deadline = max(
        started + SHARE_OF_RUN * question.rows * taken.seconds, now + (0.0 if kind == "cpu" else LEAST_MEASURING)
    )
    measured: dict[int, float] = {}
    too_much = ""
    with _running(question, name):
        while size <= most and (
            time.perf_counter() + (PASSES + 1) * size * measured.get(size // 2, taken.seconds) < deadline
        ):
            try:
                # What is in the images makes no difference: those of the sample over and over.
                some = torch.cat([inputs] * -(-size // len(inputs)))[:size]
                measured[size] = _timed(question, some, PASSES)[0] / size
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                too_much = f"{size}: not enough memory"
                break
            if measured[size] > 1.1 * min(measured.values()):
                break
            size *= 2
    if not measured:
        return default, taken.seconds, f"batch size {default} (auto; {too_much})" if too_much else ""
    best = min(measured, key=lambda n: measured[n])
    if kind != "cpu":  # what comes before and after a pass takes as long for few images as for many
        best = max(n for n in measured if measured[n] < 1.05 * measured[best])
    told = [f"{n}: {1 / seconds:.1f}/s" for n, seconds in measured.items()] + ([too_much] if too_much else [])
    return best, measured[best], f"batch size {best} (auto; {', '.join(told)})"


def _fits(taken: _Trial, kind: str) -> int:
    """Images a batch whose activations, in flight, stay within what a device of this kind may take on the host."""
    one = sum(t[0].numel() * t.element_size() for t in taken.tensors)
    room = IN_FLIGHT_BYTES if kind == "cpu" else min(IN_FLIGHT_ACCELERATOR, int(MOST_OF_HOST * host_memory()))
    return max(1, int(room / IN_FLIGHT / max(1, one)))


def host_memory() -> int:
    """Bytes that the host has, or the container on it."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no control groups; or "max", no limit
        memory = min(memory, int(CONTAINER_LIMIT.read_text()))
    return memory
