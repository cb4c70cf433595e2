"""The model as its plan runs it: in the plan's run mode, hooked, and as it was on every way out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from fmextract.capture import hooks
from fmextract.capture.taps import Probed
from fmextract.common.devices import is_out_of_memory
from fmextract.inputs import device_jpegs
from fmextract.model import norm_fusion, precision, run_mode
from fmextract.pipeline.work import Work
from fmextract.pipeline.workers import Jpegs, Workers
from fmextract.planning import Plan
from fmextract.run.prepare import Prepared
from fmextract.run.provenance import file_info


@contextmanager
def working(prepared: Prepared, plan: Plan, workers: Workers | None = None, checksums: bool = True) -> Iterator[Work]:
    """Everything that the pipeline needs, for as long as the block lasts."""
    with (
        _threads(plan.forward_threads),
        _seeded(prepared.config.seed),
        in_run_mode(prepared, plan) as module,
        hooks.tapped(
            module,
            copied_as_planned(prepared, plan),
            prepared.inspection.reduce,
            prepared.inspection.stop,
            prepared.capture_kind,
            asking=True,
        ) as capture,
    ):
        if prepared.config.compile:
            _compile(prepared, plan, capture)
        yield Work(
            plan=plan,
            info=file_info(plan),
            source=prepared.source,
            reader=prepared.reader,
            preprocess=prepared.loaded.preprocess,
            jpegs=jpegs(prepared, workers),
            workers=workers,
            input_shape=prepared.input_shape,
            ready=prepared.ready,
            model=module,
            forward=prepared.forward,
            capture=capture,
            outputs=prepared.outputs,
            device=torch.device(plan.device),
            budget=prepared.config.max_failures,
            checksums=checksums,
        )


@contextmanager
def in_run_mode(prepared: Prepared, plan: Plan) -> Iterator[torch.nn.Module]:
    """The model as the plan runs it. Raises FormatError for pairs of modules that it does not have."""
    module = prepared.loaded.module
    mode = run_mode.Mode(plan.memory_format, norm_fusion.pairs_at(module, plan.fused), plan.pooling, plan.prepacked)
    with run_mode.RunMode(module, torch.device(plan.device), plan.precision, mode):
        yield module


def stored_types(prepared: Prepared, plan: Plan) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of what is stored of each layer, as a pass over two images shows that runs as planned."""
    inputs = precision.to_memory_format(prepared.sampler.sample(2)[0], plan.memory_format)
    taps, reduce = copied_as_planned(prepared, plan), prepared.inspection.reduce
    with (
        in_run_mode(prepared, plan) as module,
        precision.numerics(plan.precision, prepared.device),
        hooks.tapped(module, taps, reduce, prepared.inspection.stop) as capture,
    ):
        tensors = capture.forward(prepared.forward, inputs)
        stored = [t if o.finish is None else o.finish(t) for t, o in zip(tensors, prepared.outputs, strict=True)]
        return {
            probed.tap.name: (str(t.dtype).removeprefix("torch."), tuple(t.shape[1:]))
            for probed, t in zip(prepared.probed, stored, strict=True)
        }


def copied_as_planned(prepared: Prepared, plan: Plan) -> list[Probed]:
    """The taps, those marked as overwritten that the plan says are: in the run's precision as in fp32."""
    return [
        replace(probed, overwritten=layer.copied) for probed, layer in zip(prepared.probed, plan.layers, strict=True)
    ]


def jpegs(prepared: Prepared, workers: Workers | None) -> device_jpegs.DeviceJpegs | Jpegs | None:
    """What decodes plain JPEGs elsewhere than in the threads of a run; None: nothing does."""
    if prepared.config.jpeg_decoder == "device":
        return device_jpegs.DeviceJpegs(prepared.device)
    return workers.jpegs(prepared.config.exif) if workers is not None else None


def _compile(prepared: Prepared, plan: Plan, capture: hooks.Capture) -> None:
    """Before the first image is read: else a minute of compiling counts as a first batch that hangs.

    Raises ConfigError for what cannot be compiled. Where memory does not suffice, the pipeline takes smaller batches.
    """
    batch = torch.zeros((plan.batch_size, *prepared.input_shape), dtype=torch.float32, device=prepared.device)
    with precision.numerics(plan.precision, prepared.device):
        try:
            capture.forward(prepared.forward, precision.to_memory_format(batch, plan.memory_format))
        except Exception as error:
            if not is_out_of_memory(error):
                raise


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """What is random in a model's forward begins from `seed`; the caller's own random state is as before afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Forward passes run on `count` threads: another number would change the last bits of a resumed run."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
