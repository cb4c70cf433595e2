"""What `auto` means: precision, memory format and batch size, measured on this model, these layers and this device.

Whether the model may run in a faster way at all is a matter of what it gives (`model.modes`). A precision is judged by
what it does to the wanted activations: the relative L2 error of each layer against fp32 on the same images. The fastest
one whose median error over the layers stays under `--max-error` is taken, if it is surely faster: what takes turns is
timed in turns, and a tie goes to fp32, as to the usual batch size. Measuring may cost a tenth of the expected run; only
the few images that any judgement needs are run in every case.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fmextract.capture.compiled import CompiledCapture
from fmextract.common.devices import TOO_SMALL, is_out_of_memory
from fmextract.common.relative_error import relative_error
from fmextract.common.system import host_memory
from fmextract.errors import ConfigError, DeviceLost, FmextractError, LayerError
from fmextract.model import modes, norm_fusion, precision, run_mode
from fmextract.model.modes import Subject, Trial
from fmextract.model.run_mode import PLAIN, Mode

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


MOST_OF_HOST = 1 / 8  # of the memory of the host, for them


SHARE_OF_RUN = 0.1


LEAST_MEASURING = 4.0  # seconds that an accelerator may take for it in a run of any length: it loads its kernels


PASSES = 3


FUSING_PAYS = 400
"""Images of a run in fp32 from which norms run inside the convolutions: to try it takes what it spares two hundred."""


TIE = 1.1
"""Times as fast as the default that something else has to be, in turns; in one pass each, which says little:"""


TIE_OF_ONE_PASS = 1.5


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be decided, and on what. `inputs(n)` gives n real images, spread over the source, as model inputs."""

    subject: Subject
    inputs: Callable[[int], torch.Tensor]
    precision: str
    max_error: float
    memory_format: str
    batch_size: int | None
    compile: bool
    rows: int

    @property
    def device(self) -> torch.device:
        return self.subject.device


@dataclass(frozen=True, slots=True)
class Tuning:
    """The answers. `rel_errors[i]` is the relative L2 error of layer i in this precision, None where there is none.

    `sample` is what the chosen precision captured of a few images, one tensor (n, …) a layer. `overwritten`: layers
    that are written in place in this precision. `seconds_per_image` is that of forward passes at this batch size.
    """

    precision: str
    mode: Mode
    batch_size: int
    rel_errors: tuple[float | None, ...]
    overwritten: frozenset[int]
    sample: tuple[torch.Tensor, ...]
    seconds_per_image: float
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Sample:
    """Images that everything is tried on: `real` ones of the source, and behind them noise, which is unlike them."""

    inputs: torch.Tensor
    real: int

    def __len__(self) -> int:
        return len(self.inputs)


def tune(question: Question) -> Tuning:
    """Measure and decide. Raises ConfigError for a precision or memory format that this model, or the device, cannot
    run in."""
    started = time.perf_counter()
    sample, reference, full, pairs, said = _first_trials(question)
    trials, failed = {"fp32": full}, []
    for name in _candidates(question):
        try:
            trials[name], told = _in_lower_precision(question, name, sample, reference, full.mode, pairs)
            said += [told] if told else []
        except Exception as error:
            why = f"precision {name}: the model fails in it, as it does not in fp32: {type(error).__name__}: {error}"
            if question.precision != "auto":
                raise ConfigError(f"{why}. Use --precision fp32.") from error
            failed.append(why)
    seconds = _in_turns(question, trials, sample)
    judged = {name: _Judged.of(trial, reference, sample.real) for name, trial in trials.items()}
    name, notes = _fastest_faithful(question, judged, seconds)
    notes = [*said, *_not_finite(question, reference, sample), *failed, *notes]
    taken, per_image = trials[name], min(seconds[name])
    size, per_image, measured = _batch_size(question, taken, per_image, sample.inputs, started)
    if measured:
        notes.append(measured)
    tensors, errors = tuple(t[: sample.real] for t in taken.tensors), judged[name].errors
    if question.compile:
        tensors, errors, per_image, compiling = _compiled(question, taken, size, sample, reference, per_image)
        notes.append(compiling)
    if "auto" in (question.precision, question.batch_size or "auto"):
        notes.append(f"measuring took {time.perf_counter() - started:.1f} s")
    return Tuning(
        precision=name,
        mode=taken.mode,
        batch_size=size,
        rel_errors=tuple(e if e is not None and math.isfinite(e) else None for e in errors),
        overwritten=taken.overwritten,
        sample=tensors,
        seconds_per_image=per_image,
        notes=tuple(notes),
    )


def _first_trials(
    question: Question,
) -> tuple[_Sample, Trial, Trial, tuple[norm_fusion.Pair, ...], list[str]]:
    """(the sample, what fp32 makes of it as the model is written, and as a run in fp32 would; the pairs that could run
    as one; what is odd about all that).

    Raises DeviceLost where there is not enough memory for one image, LayerError where the model fails, ConfigError
    where it is another one in the memory format that was asked for.
    """
    said: list[str] = []
    for n in dict.fromkeys((_sample_size(question), 1)):
        sample = _with_noise(question.inputs(n))
        try:
            return sample, *_in_fp32(question, sample.inputs, said), said
        except Exception as error:
            if is_out_of_memory(error):
                if n == 1:
                    raise DeviceLost(TOO_SMALL.format(error)) from error
                said = [f"what is measured is measured on one image: there is not enough memory for {len(sample)}"]
                continue
            if isinstance(error, FmextractError):
                raise
            why = f"{type(error).__name__}: {error}"
        # Only here: the error holds on to the frames of the pass, and they to its activations.
        # An image that the model fails on is a matter of its row: what it fails on every time is not.
        sample = _Sample(torch.zeros_like(sample.inputs), sample.real)
        said.append(f"what is measured is measured on black images, as the model fails on the first ones: {why}")
        try:
            return sample, *_in_fp32(question, sample.inputs, said), said
        except Exception as error:
            raise LayerError(f"the model fails on a batch of {len(sample)} images: {why}") from error
    raise AssertionError("unreachable: one image was tried")


def _sample_size(question: Question) -> int:
    per_image_bytes = 4 * sum(math.prod(p.shape) for p in question.subject.probed)
    return min(MOST_SAMPLES - 1, max(2, min(SAMPLE_BYTES // max(1, per_image_bytes), question.rows // 100)))


def _with_noise(images: torch.Tensor) -> _Sample:
    """The images, and one of noise in stronger contrast behind them; a single one stays alone, for want of memory."""
    if len(images) == 1:
        return _Sample(images, 1)
    generator = torch.Generator().manual_seed(0)
    noise = 1.6 * torch.randn((1, *images.shape[1:]), generator=generator, dtype=torch.float32)
    return _Sample(torch.cat([images, noise.to(images)]), len(images))


def _in_fp32(
    question: Question, inputs: torch.Tensor, said: list[str]
) -> tuple[Trial, Trial, tuple[norm_fusion.Pair, ...]]:
    subject = question.subject
    reference, pairs = _reference(question, inputs, said)
    formats = modes.formats(question.memory_format, subject.module)
    fusing = pairs if question.precision in ("auto", "fp32") and question.rows >= FUSING_PAYS else ()
    wanted = modes.candidates("fp32", formats, fusing, _own_ways(question) and _has_pooling(subject))
    if wanted == [PLAIN]:
        return reference, reference, pairs
    judge = modes.within_rounding(subject, reference)
    taken, told = modes.first_right(subject, "fp32", [m for m in wanted if m != PLAIN], inputs, judge)
    if taken is None and PLAIN not in wanted:
        raise ConfigError(f"--memory-format {question.memory_format}: {told}. Use --memory-format contiguous, or auto.")
    said += [told] if told else []
    return reference, taken or reference, pairs


def _reference(question: Question, inputs: torch.Tensor, said: list[str]) -> tuple[Trial, tuple[norm_fusion.Pair, ...]]:
    """(the model as it is written, the pairs that could run as one)."""
    subject = question.subject
    readers = norm_fusion.readers(subject.module, subject.probed) if _own_ways(question) else None
    if readers is None:
        return modes.as_written(subject, "fp32", inputs), ()
    try:
        return modes.as_written(subject, "fp32", inputs, readers), readers.pairs()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        why = f"{type(error).__name__}: {error}"
    reference = modes.as_written(subject, "fp32", inputs)  # raises what it fails on anyway
    said.append(f"batch norm is not taken into the convolutions: the model does not bear being watched: {why}")
    return reference, ()


def _own_ways(question: Question) -> bool:
    """Whether modules may run by other forwards than their own ones. A compiler is left to its own devices."""
    return question.device.type == "cpu" and not question.compile


def _has_pooling(subject: Subject) -> bool:
    return any(map(run_mode.is_plain_pool, subject.module.modules()))


def _in_lower_precision(
    question: Question,
    name: str,
    sample: _Sample,
    reference: Trial,
    full: Mode,
    pairs: tuple[norm_fusion.Pair, ...],
) -> tuple[Trial, str]:
    """(The fastest way in which the model is in `name` what it is as written, what was left and why).

    Raises whatever the model raises in this precision as it is written.
    """
    subject, auto = question.subject, question.memory_format == "auto"
    real = sample.inputs[: sample.real]  # without the noise: what errors are told of
    plain = modes.as_written(subject, name, real)
    formats = dict.fromkeys((full.memory_format, "contiguous") if auto else (full.memory_format,))
    wanted = modes.candidates(name, list(formats), pairs if _own_ways(question) else (), pooling=False)
    if question.compile:  # which casts by itself, and knows no other operators than torch's
        wanted = list(dict.fromkeys(Mode(mode.memory_format) for mode in wanted))
    judge = modes.no_rougher(subject, [t[: sample.real] for t in reference.tensors], plain)
    taken, told = modes.first_right(subject, name, [m for m in wanted if m != PLAIN], real, judge)
    if taken is None and PLAIN not in wanted:
        raise ConfigError(told)
    return taken or plain, told


# ------------------------------------------------------------------------------------------ precision


@dataclass(frozen=True, slots=True)
class _Judged:
    """How far a precision is from fp32 on the real images of the sample; how many values overflow in it."""

    errors: tuple[float | None, ...]
    overflown: int

    @property
    def error(self) -> float:
        """Median over the layers that have one."""
        known = [e for e in self.errors if e is not None]
        return statistics.median(known) if known else 0.0

    @classmethod
    def of(cls, trial: Trial, reference: Trial, real: int) -> _Judged:
        pairs = [(t[:real], r[:real]) for t, r in zip(trial.tensors, reference.tensors, strict=True)]
        return cls(
            tuple(relative_error(rows, exact) for rows, exact in pairs),
            sum(modes.overflown(rows, exact) for rows, exact in pairs),
        )


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


def _in_turns(question: Question, trials: Mapping[str, Trial], sample: _Sample) -> dict[str, list[float]]:
    """Seconds an image of each precision that counts, one number a round, in which each had one pass.

    The first pass is slower by up to the half; it counts where others are not nothing beside the run. Two more of what
    was asked for, for the plan's time, three where there is a choice.
    """
    name = question.precision
    asked = list(trials) if name == "auto" else [name]
    seconds = {name: [trial.seconds] for name, trial in trials.items()}
    if question.device.type == "cpu" and question.rows < 50 * len(sample):
        return seconds
    rounds = PASSES if name == "auto" and len(trials) > 1 else PASSES - 1
    turns: dict[str, list[float]] = {name: [] for name in asked}
    for _ in range(rounds):
        for name in asked:
            turns[name].append(_timed(question, trials[name], sample.inputs) / len(sample))
    return seconds | turns


def _timed(question: Question, trial: Trial, inputs: torch.Tensor) -> float:
    """Seconds of one pass over `inputs`, with its captures."""
    return modes.run(question.subject, trial.precision, trial.run_mode, inputs, trial.overwritten)[0]


def _fastest_faithful(
    question: Question, judged: Mapping[str, _Judged], seconds: Mapping[str, Sequence[float]]
) -> tuple[str, list[str]]:
    """(name, the line that says why)."""
    if question.precision != "auto":
        why = f"precision {question.precision}: median error of the layers against fp32 "
        return question.precision, [why + _share(judged[question.precision].error)] * (question.precision != "fp32")
    told, fit = [], ["fp32"]
    for name, its in judged.items():
        if name == "fp32":
            continue
        gains = [a / b for a, b in zip(seconds["fp32"], seconds[name], strict=True)]
        least = TIE if len(gains) > 1 else TIE_OF_ONE_PASS
        faithful = not its.overflown and its.error <= question.max_error
        faster = statistics.median(gains) >= least and min(gains) > 1
        verdict = " (too much)" if its.error > question.max_error else " (overflows)" if its.overflown else ""
        if faithful and not faster and max(gains) > 1 / least:
            verdict = " (a tie, or too short a measurement to be sure)"
        told.append(f"{name} is {_range(gains)} times as fast, error {_share(its.error)}{verdict}")
        fit += [name] if faithful and faster else []
    # Where fp16 and bf16 are about as fast, fp16 is the more faithful.
    fit = fit[1:] or fit
    best = min(fit, key=lambda name: min(seconds[name]) * (TIE if name == "bf16" else 1.0))
    if not told:
        return best, [f"precision {best} (auto): this device is fast at no other"]
    return best, [f"precision {best} (auto): {'; '.join(told)}; --max-error is {question.max_error:.2%}"]


def _range(gains: Sequence[float]) -> str:
    """`1.7`, or `1.2 to 1.9` where rounds do not agree."""
    low, high = min(gains), max(gains)
    return f"{statistics.median(gains):.1f}" if high < TIE * low else f"{low:.1f} to {high:.1f}"


def _share(error: float) -> str:
    return f"{error:.2%}" if math.isfinite(error) else "beyond measure, as fp32 gives zeros alone"


def _not_finite(question: Question, reference: Trial, sample: _Sample) -> list[str]:
    """What the errors do not cover."""
    told = []
    for probed, tensor in zip(question.subject.probed, reference.tensors, strict=True):
        rows = tensor[: sample.real]
        count = int((~rows.isfinite()).sum()) if rows.is_floating_point() else 0
        if count:
            told.append(
                f"layer {probed.tap.name!r}: {count:,} of {rows.numel():,} values of the sample are not finite, in fp32"
                " already; errors are those of the others"
            )
    return told


# -------------------------------------------------------------------------------------------- compiled


def _compiled(
    question: Question, trial: Trial, size: int, sample: _Sample, reference: Trial, eager: float
) -> tuple[tuple[torch.Tensor, ...], tuple[float | None, ...], float, str]:
    """(what batches of `size` give when compiled, its errors, seconds an image, the line that says what that brings).

    Precision and batch size were chosen without compiling, which takes minutes; of what was chosen, what is stored and
    foretold is that of the passes which will run. Raises ConfigError for a model that cannot be compiled.
    """
    some = sample.inputs[: min(size, sample.real)]
    # Filled up with black images, as a short batch of the run is: another length would have to be compiled as well.
    batch = torch.cat([some, some.new_zeros((size - len(some), *some.shape[1:]))])
    given = question.subject, trial.precision, trial.run_mode, batch, trial.overwritten, CompiledCapture
    started = time.perf_counter()
    try:
        seconds, tensors = modes.run(*given, PASSES + 1)  # the first one compiles
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        kept = tuple(t[: sample.real] for t in trial.tensors)
        told = f"compiled (--compile): {size} images a batch need too much memory; judged without compiling"
        return kept, _Judged.of(trial, reference, sample.real).errors, eager, told
    compiling = time.perf_counter() - started - PASSES * seconds
    kept = tuple(t[: len(some)] for t in tensors)
    errors = tuple(relative_error(t, r[: len(some)]) for t, r in zip(kept, reference.tensors, strict=True))
    ratio = eager * size / seconds
    told = f"compiled (--compile) in {compiling:.1f} s: {ratio:.2f} times as fast as the same passes without"
    return kept, errors, seconds / size, told


# ----------------------------------------------------------------------------------------- batch size


def _batch_size(
    question: Question, taken: Trial, per_image: float, inputs: torch.Tensor, started: float
) -> tuple[int, float, str]:
    """(images a batch, seconds an image, one line that says what was measured).

    On a CPU another size than the usual one has to be surely faster, in turns with it; on an accelerator larger ones
    are taken that are as fast, since what comes before and after a pass takes as long for few images as for many.
    """
    if question.batch_size is not None:
        return question.batch_size, per_image, ""
    kind = question.device.type
    most = min(_fits(taken, kind), max(1, question.rows), LARGEST_BATCH.get(kind, LARGEST_ACCELERATOR_BATCH))
    usual = DEFAULT_BATCH.get(kind, ACCELERATOR_BATCH)
    if kind == "cpu" and taken.precision in precision.AUTOCAST:
        usual *= 2
    default = size = min(usual, 1 << (most.bit_length() - 1))
    now = time.perf_counter()
    deadline = max(
        started + SHARE_OF_RUN * question.rows * per_image, now + (0.0 if kind == "cpu" else LEAST_MEASURING)
    )
    measured: dict[int, float] = {}
    too_much = ""
    while size <= most:
        sizes = dict.fromkeys((default, size) if kind == "cpu" else (size,))
        if time.perf_counter() + (PASSES + 1) * sum(sizes) * min(measured.values(), default=per_image) >= deadline:
            break
        try:
            measured |= _sizes_in_turns(question, taken, list(sizes), inputs, measured)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            too_much = f"{size}: not enough memory"
            break
        if measured[size] > TIE * min(measured.values()):
            break
        size *= 2
    if not measured:
        return default, per_image, f"batch size {default} (auto; {too_much})" if too_much else ""
    best = min(measured, key=lambda n: measured[n])
    if kind != "cpu":
        best = max(n for n in measured if measured[n] < 1.05 * measured[best])
    elif measured[default] < TIE * measured[best]:
        best = default
    told = [f"{n}: {1 / seconds:.1f}/s" for n, seconds in measured.items()] + ([too_much] if too_much else [])
    return best, measured[best], f"batch size {best} (auto; {', '.join(told)})"


def _sizes_in_turns(
    question: Question, trial: Trial, sizes: Sequence[int], inputs: torch.Tensor, before: Mapping[int, float]
) -> dict[int, float]:
    """The least seconds an image of batches of `sizes`, those measured `before` included, which take turns."""
    least = {size: before.get(size, math.inf) for size in sizes}
    for _ in range(PASSES):
        for size in sizes:
            # What is in the images makes no difference: those of the sample over and over.
            some = torch.cat([inputs] * -(-size // len(inputs)))[:size]
            least[size] = min(least[size], _timed(question, trial, some) / size)
    return least


def _fits(taken: Trial, kind: str) -> int:
    """Images a batch whose activations, in flight, stay within what a device of this kind may take on the host."""
    per_image_bytes = sum(t[0].numel() * t.element_size() for t in taken.tensors)
    room = IN_FLIGHT_BYTES if kind == "cpu" else min(IN_FLIGHT_ACCELERATOR, int(MOST_OF_HOST * host_memory()))
    return max(1, int(room / IN_FLIGHT / max(1, per_image_bytes)))
