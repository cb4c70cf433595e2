"""From what was asked for and what was measured to the plan of a run: layers, chunks, shards, costs."""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from fmextract import planning
from fmextract.capture import effective_fields
from fmextract.capture.inspection import of_maps
from fmextract.common import kernels, text
from fmextract.common.system import cores
from fmextract.config import is_single_file
from fmextract.errors import LayerError
from fmextract.model import norm_fusion, run_mode
from fmextract.model.modes import Subject
from fmextract.pipeline import workers
from fmextract.planning import Identity, Plan
from fmextract.records import LayerSpec, Progress
from fmextract.run import autotune, estimate, provenance, sharding
from fmextract.run.identity import identity
from fmextract.run.prepare import Prepared
from fmextract.storage import codecs
from fmextract.storage.layer_stats import NEAR_ZERO_SHARE

EFFECTIVE_IMAGES = 2  # photos that an effective receptive field is measured on


EFFECTIVE_SHARE = 0.04  # of a run that measuring may take


EFFECTIVE_SECONDS = 0.3  # that it may take of any run, however short


# ----------------------------------------------------------------------------------------------- plan


def plan_for(
    prepared: Prepared,
    out: Path,
    progress: Progress,
    asked: Identity | None = None,
    command: str | None = None,
) -> Plan:
    """What a run of `prepared` into `out` will do. Measures what `auto` leaves open, and what the run will cost.

    `asked` is its identity, if that is known; `command` the line that asked for it.
    """
    config, rows = prepared.config, len(prepared.source)
    tuned = _tuned(prepared)
    sizes, left_out = _effective_sizes(prepared, tuned, progress)
    layers = tuple(_layer_spec(prepared, i, tuned, rows, sizes) for i in range(len(prepared.probed)))
    level = codecs.codec_named(config.codec).checked_level(config.level)
    threads = config.num_workers or cores()
    reading_seconds, decoding_seconds = _decoding(prepared, threads)
    cost = _estimate(prepared, tuned, layers, level, threads, decoding_seconds)
    needed = sharding.rows_of_shard(cost, rows, config.shard_size, is_single_file(out))
    said = identity(prepared) if asked is None else asked
    layers = tuple(sharding.within_shard(layer, needed) for layer in layers)
    shard_rows = sharding.shard_length(layers, tuned.batch_size, rows, needed)
    free = estimate.free_space(out)
    stored, needed = _on_disk(cost, layers, -(-rows // shard_rows), out)
    cost = replace(cost, bytes_stored=stored, bytes_needed=needed, bytes_free=free)
    left_out += _without_statistics(prepared)
    left_out += _slow_reading(prepared, reading_seconds, tuned.seconds_per_image)
    notes = [*tuned.notes, *left_out, *_not_compiled(prepared.device), *estimate.advice(layers, cost, rows, free)]
    for note in notes:
        progress.note(note)
    return Plan(
        run_id=uuid.uuid4().hex,
        rows=rows,
        layers=layers,
        precision=tuned.precision,
        memory_format=tuned.mode.memory_format,
        fused=norm_fusion.paths_of(prepared.loaded.module, tuned.mode.fused),
        pooling=tuned.mode.pooling,
        prepacked=tuned.mode.prepacked,
        batch_size=tuned.batch_size,
        device=str(prepared.device),
        threads=threads,
        forward_threads=torch.get_num_threads(),
        codec=config.codec,
        level=level,
        dtype=config.dtype,
        keep_bits=config.keep_bits,
        clip=config.clip,
        top_k=config.top_k,
        shard_rows=shard_rows,
        identity=said,
        config=config.as_json(),
        info=provenance.describe_run(prepared.loaded, prepared.source, out, ready=prepared.ready, command=command),
        versions=provenance.versions_for(said),
        estimate=cost,
        notes=(*prepared.notes, *prepared.reader.notes, *notes),
    )


def _tuned(prepared: Prepared) -> autotune.Tuning:
    """Precision, memory format and batch size; measured where they are `auto`."""
    config = prepared.config
    question = autotune.Question(
        subject=_subject(prepared),
        inputs=lambda n: prepared.sampler.sample(n)[0],
        precision=_asked(prepared),
        max_error=config.max_error,
        memory_format=config.memory_format,
        batch_size=config.batch_size,
        compile=config.compile,
        rows=len(prepared.source),
    )
    return autotune.tune(question)


def _asked(prepared: Prepared) -> str:
    """The precision to choose: of a model in another type than float32 its own, if none is named."""
    own = prepared.loaded.input_dtype != torch.float32
    return "fp32" if own and prepared.config.precision == "auto" else prepared.config.precision


def _subject(prepared: Prepared) -> Subject:
    return Subject(
        module=prepared.loaded.module,
        forward=prepared.forward,
        device=prepared.device,
        probed=prepared.probed,
        reducers=prepared.inspection.reduce,
        stop=prepared.inspection.stop,
    )


def _without_statistics(prepared: Prepared) -> list[str]:
    """A note on the layers that have no axis of channels."""
    pairs = zip(prepared.probed, prepared.outputs, strict=True)
    names = [probed.tap.name for probed, captured in pairs if not {"channel", "feature"} & set(captured.axes)]
    if not names:
        return []
    of = f"{len(names)} of {len(prepared.probed)} layers"
    return [f"no statistics of {of}, in which no axis of channels is known: {text.some(names)}"]


def _not_compiled(device: torch.device) -> list[str]:
    if device.type != "cpu" or kernels.are_there():
        return []
    why = "statistics and encoding take longer than they need, as fmextract was installed without a C compiler"
    return [f"{why}; with gcc or clang on the path, install it again (by pip with --no-cache-dir)"]


def _estimate(
    prepared: Prepared, tuned: autotune.Tuning, layers: Sequence[LayerSpec], level: int, threads: int, decode: float
) -> planning.Estimate:
    config = prepared.config
    stored_values = [
        tensor if captured.finish is None else captured.finish(tensor)
        for tensor, captured in zip(tuned.sample, prepared.outputs, strict=True)
    ]
    stored, encode = estimate.encode_sample(layers, stored_values, config.codec, level, config.keep_bits)
    statistics = estimate.describe_sample(layers, prepared.outputs, tuned.sample, config.top_k)
    costs = estimate.Costs(decode, tuned.seconds_per_image, statistics, encode, stored)
    return estimate.estimate(
        layers,
        len(prepared.source),
        tuned.batch_size,
        threads,
        costs,
        device=prepared.device.type,
        largest=prepared.inspection.largest,
        kept=_kept_bytes(prepared, tuned) + prepared.reader.workers * estimate.DATASET_PROCESS,
        processes=partial(workers.are_processes, threads, config.worker_kind),
    )


def _decoding(prepared: Prepared, threads: int) -> tuple[float, float]:
    """Seconds an image that the user's code takes by itself, and that all of decoding would, shared by `threads`."""
    reader = prepared.reader
    before = reader.seconds
    seconds = prepared.sampler.sample(4)[1]
    alone = min(seconds, (reader.seconds - before) / 4) / max(1, reader.workers) if reader.serial else 0.0
    return alone, seconds - alone * max(1, reader.workers) + alone * threads


def _slow_reading(prepared: Prepared, seconds: float, forward: float) -> list[str]:
    """What to do where the user's code takes longer than the forward pass, and the run is long enough for it."""
    if prepared.reader.workers or seconds < forward or seconds * len(prepared.source) < workers.WORTH:
        return []
    pace = f"at {seconds * 1000:.3g} ms an image; the forward pass takes {forward * 1000:.3g} ms"
    what_to_do = "--dataset-workers N reads it in N processes, threads do where its class says thread_safe = True"
    return [f"one thread reads {prepared.source.name}, {pace}. {what_to_do}"]


def _on_disk(cost: planning.Estimate, layers: Sequence[LayerSpec], shards: int, out: Path) -> tuple[int, int]:
    """Bytes of the output, and bytes that must be free for it: several shards become one file beside them."""
    if shards == 1:
        return cost.bytes_stored, cost.bytes_stored
    parts = cost.bytes_stored + shards * estimate.shared_bytes(layers)
    return (cost.bytes_stored, parts + cost.bytes_stored) if is_single_file(out) else (parts, parts)


def _kept_bytes(prepared: Prepared, tuned: autotune.Tuning) -> int:
    """Host memory that a run holds all the time: weights laid out or cast anew, and what was captured of the sample."""
    state = prepared.loaded.module.state_dict().values()
    weights = sum(t.numel() * t.element_size() for t in state if isinstance(t, torch.Tensor) and not is_lazy(t))
    as_it_is = tuned.mode in (run_mode.PLAIN, run_mode.Mode(pooling=True))
    # Twice: the reference in fp32 lives beside what the chosen precision captured.
    sample = 2 * sum(4 * t.numel() for t in tuned.sample)
    return sample + (0 if as_it_is else weights)


# How a tensor of the forward pass lies on disk. Everything of half precision is widened, exactly.
_ON_DISK = {
    torch.float32: "float32",
    torch.bfloat16: "float32",
    torch.float16: "float32",
    torch.float64: "float64",
    torch.bool: "uint8",
    torch.uint8: "uint8",
    torch.int8: "int8",
    torch.int16: "int16",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.uint16: "uint16",
    torch.uint32: "uint32",
    torch.uint64: "uint64",
}


def _effective_sizes(
    prepared: Prepared, tuned: autotune.Tuning, progress: Progress
) -> tuple[Sequence[float | None], list[str]]:
    """(effective receptive fields, a note where they were left out): three passes a layer and image.

    `auto` measures them where that is short, or small beside the run: on one image if it must be.
    """
    spatial = sum({"y", "x"} <= set(p.axes) for p in prepared.probed)
    none: list[float | None] = [None] * len(prepared.probed)
    if not spatial or len(prepared.input_shape) != 3 or prepared.config.effective_fields == "never":
        return none, []
    seconds = math.inf
    if prepared.config.effective_fields == "auto":
        run, cost = len(prepared.source) * tuned.seconds_per_image, 3 * spatial * tuned.seconds_per_image
        seconds = max(EFFECTIVE_SHARE * run, EFFECTIVE_SECONDS)
        if cost > seconds:
            why = f"they would take {cost:.0f} s or more" if cost >= 1 else "the run is short"
            return none, [f"effective receptive fields are not measured, as {why}; --effective-fields always does it"]
    failures: list[str] = []
    with run_mode.as_written(prepared.loaded.module, prepared.device):
        inputs, _ = prepared.sampler.sample(EFFECTIVE_IMAGES)
        sizes = effective_fields.effective_sizes(
            prepared.loaded.module,
            prepared.forward,
            prepared.probed,
            prepared.inspection.fields,
            inputs,
            reductions=prepared.inspection.reduced,
            stop=prepared.inspection.stop,
            seconds=seconds,
            tell=failures.append,
            step=partial(progress.step, "effective receptive fields"),
        )
    captured = zip(prepared.probed, prepared.outputs, sizes, strict=True)
    without = [p.tap.name for p, c, size in captured if size is None and {"y", "x"} <= set(c.axes)]
    why = failures[0] if failures else "the model has no gradient there"
    return sizes, [f"no effective receptive field of {text.some(without)}: {why}"] if without else []


def _layer_spec(
    prepared: Prepared, i: int, tuned: autotune.Tuning, rows: int, erf_sizes: Sequence[float | None]
) -> LayerSpec:
    probed, captured, config = prepared.probed[i], prepared.inspection.output(i), prepared.config
    sample = tuned.sample[i] if captured.finish is None else captured.finish(tuned.sample[i])
    dtype = sample.dtype
    if dtype not in _ON_DISK:
        raise LayerError(f"layer {probed.tap.name!r}: values of type {dtype} cannot be stored")
    on_disk = _stored_type(dtype, config.dtype)
    shape = tuple(sample.shape[1:])
    known = known_of_layer(prepared, i)
    return LayerSpec(
        **known,
        shape=shape,
        dtype=on_disk,
        compute_dtype=str(dtype).removeprefix("torch."),
        chunk=sharding.chunk_shape(shape, known["axes"], np.dtype(on_disk).itemsize, rows),
        copied=probed.overwritten or i in tuned.overwritten,
        rel_error=tuned.rel_errors[i],
        erf_size=erf_sizes[i] if {"y", "x"} <= set(captured.axes) else None,
        near_zero_below=_near_zero_below(tuned.sample[i]) if {"channel", "feature"} & set(captured.axes) else None,
    )


def known_of_layer(prepared: Prepared, i: int) -> dict[str, Any]:
    """The fields of a layer's LayerSpec that nothing has to be measured for."""
    tap, captured = prepared.probed[i].tap, prepared.inspection.output(i)
    return {
        "name": tap.name,
        "module": tap.module,
        "module_type": tap.module_type,
        "call": tap.number,
        "calls": tap.calls,
        "number": tap.meant_by.number,
        "number_from_end": tap.meant_by.number_from_end,
        "classes": tap.meant_by.classes,
        "further_paths": tap.meant_by.further_paths,
        "tap": tap.tap,
        "member": tap.member,
        "reducer": tap.reducer,
        "axes": captured.axes if captured.finish is None else ("feature",),
        "field": of_maps(captured.axes, prepared.inspection.fields[i]),
    }


def _stored_type(dtype: torch.dtype, wanted: str) -> str:
    on_disk = _ON_DISK[dtype]
    return "float16" if wanted == "float16" and on_disk == "float32" else on_disk


def type_on_disk(compute_dtype: str, wanted: str) -> str | None:
    """How what was computed in a type (torch's name) is stored; None where that is no type of a layer."""
    dtype = getattr(torch, compute_dtype, None)
    return _stored_type(dtype, wanted) if dtype in _ON_DISK else None


def _near_zero_below(sample: torch.Tensor) -> float | None:
    """The bound of what counts as near zero, from what was captured of a few images; None where that says nothing.

    In the precision of float32, in which most values are compared with it.
    """
    squares, count = 0.0, 0
    for image in sample:
        values = image.cpu().double()
        if not math.isfinite(square := float(values.square().sum())):
            values = values[values.isfinite()]
            square = float(values.square().sum())
        squares, count = squares + square, count + values.numel()
    if not count or not math.isfinite(squares):
        return None
    bound = float(np.float32(NEAR_ZERO_SHARE * math.sqrt(squares / count)))
    return bound if math.isfinite(bound) else None
