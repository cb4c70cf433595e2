"""One run, from what was asked for to a finished output: prepare, plan, extract, fold.

prepare: open the source, build the model, survey and probe it        → Prepared
plan:    resolve every `auto`, chunks, shards                         → plan.json
extract: the shards that are not there yet                            → shard-*.h5
fold:    one file, or the directory with its index
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fmextract import engine, estimate, index, precision, reader, taps
from fmextract.config import Config
from fmextract.errors import TooManyFailures
from fmextract.output import Output
from fmextract.planning import Plan
from fmextract.prepare import Prepared, describe, identity, plan_for, prepare, reduce_functions
from fmextract.records import FileInfo, LayerResult, LayerSpec, Progress, Result

__all__ = ["describe", "extract", "make_plan", "run"]


class Quiet:
    """A Progress that says nothing."""

    def note(self, text: str) -> None: ...
    def start(self, total: int, done: int) -> None: ...
    def advance(self, images: int, failed: int) -> None: ...
    def finish(self) -> None: ...


def make_plan(source: Any, model: Any, out: Any, config: Config, progress: Progress | None = None) -> Plan:
    """What `run` with the same arguments would do. Writes nothing."""
    progress = progress or Quiet()
    with prepare(source, model, config, progress) as prepared:
        return plan_for(prepared, Path(out), progress)


def extract(
    source: Any,
    model: Any,
    out: Any,
    *,
    layers: Sequence[str] | str = (),
    progress: Progress | None = None,
    **options: Any,
) -> reader.Activations:
    """Run `source` through `model` and store the activations of `layers` in `out`; gives what `open(out)` gives.

    `source`: a folder, a manifest, a map-style Dataset or a sequence of images. `model`: a name (`resnet50`), or an
    `nn.Module`, which is left exactly as it was. `out`: `name.h5` or a directory of shards. Options are those of the
    command line (`batch_size=`, `precision=`, `keep_bits=` …; see `Config`).

    Raises ConfigError and its kin for what cannot be done, RunStopped for a run that ended early and can be resumed.
    Failed images are no exception: they are rows with a status.
    """
    run(source, model, out, Config.of(layers=layers, **options), progress or _default_progress())
    return reader.open(out)


def _default_progress() -> Progress:
    from fmextract.progress import TerminalProgress

    return TerminalProgress()


def run(source: Any, model: Any, out: Any, config: Config, progress: Progress) -> Result:
    """Do what `fmextract extract` does. Raises as `extract`."""
    started = time.perf_counter()
    target = Path(out)
    with prepare(source, model, config, progress) as prepared:
        output = Output(target)
        made = output.begin(
            identity(prepared), lambda: _affordable(prepared, target, progress), progress, overwrite=config.overwrite
        )
        tally = engine.Tally()
        done = {record.start for record in output.records}
        _count_earlier(tally, output.records)
        todo = [part for part in made.shards if part.start not in done]
        resumed = sum(len(record.rows) for record in output.records)
        if todo:
            _extract(prepared, made, output.directory, todo, resumed, progress, tally)
        if tally.failed == made.rows:
            key, message = _first_failure(output.directory, tally)
            raise TooManyFailures(f"every one of the {made.rows} images failed. The first: {key!r}: {message}")
        output.fold(made)
    seconds = time.perf_counter() - started
    return _result(target, made, tally, seconds, resumed)


def _affordable(prepared: Prepared, target: Path, progress: Progress) -> Plan:
    """A new plan. Raises NoSpace where the disk cannot hold what it will write."""
    made = plan_for(prepared, target, progress)
    estimate.check_space(made.estimate.bytes_needed, made.estimate.bytes_free, target)
    return made


def _count_earlier(tally: engine.Tally, records: Sequence[index.ShardRecord]) -> None:
    tally.records = list(records)
    tally.failed = sum(record.failed for record in records)
    tally.seen = sum(len(record.rows) for record in records)


def _first_failure(directory: Path, tally: engine.Tally) -> tuple[str, str]:
    return tally.failures[0] if tally.failures else ("", f"see the messages in {directory}")


def _extract(
    prepared: Prepared,
    made: Plan,
    directory: Path,
    todo: Sequence[range],
    resumed: int,
    progress: Progress,
    tally: engine.Tally,
) -> None:
    where = torch.device(made.device)
    with (
        precision.lent(prepared.loaded.module, where, made.precision, made.memory_format) as module,
        taps.tapped(module, _copied_as_planned(prepared, made), reduce_functions(prepared), prepared.stop) as capture,
    ):
        work = engine.Work(
            plan=made,
            info=_file_info(made),
            source=prepared.source,
            preprocess=prepared.loaded.preprocess,
            exif=prepared.config.exif,
            input_shape=prepared.input_shape,
            ready=prepared.ready,
            model=module,
            forward=prepared.forward,
            capture=capture,
            captured=prepared.captured,
            device=where,
            budget=prepared.config.max_failures,
        )
        progress.start(made.rows, resumed)
        try:
            engine.run_shards(work, directory, todo, progress, tally)
        finally:
            progress.finish()


def _copied_as_planned(prepared: Prepared, made: Plan) -> list[taps.Probed]:
    """The taps, those marked as overwritten that the plan says are: in the run's precision as in fp32."""
    return [
        dataclasses.replace(probed, overwritten=layer.copied)
        for probed, layer in zip(prepared.probed, made.layers, strict=True)
    ]


def _file_info(made: Plan) -> FileInfo:
    info = made.info
    config = {"options": made.config, "identity": made.identity, "batch_size": made.batch_size, "device": made.device}
    config |= {"memory_format": made.memory_format, "weights": info["weights"], "origin": info["origin"]}
    return FileInfo(
        title=info["title"],
        source=info["source"],
        history=info["history"],
        config=config,
        model=info["model"],
        weights_sha256=info["weights_sha256"],
        preprocess=info["preprocess"],
        precision=made.precision,
        versions=made.versions,
        created=info["created"],
    )


def _result(target: Path, made: Plan, tally: engine.Tally, seconds: float, resumed: int) -> Result:
    new = made.rows - resumed
    with reader.open(target) as acts:
        layers = tuple(_layer_result(acts[name], made.layers[i]) for i, name in enumerate(acts.layers))
        failures = tally.failures or _failures(acts)
    load = {stage: busy / tally.threads.get(stage, 1) for stage, busy in tally.busy.items()}
    return Result(
        output=str(target),
        images=made.rows,
        failed=tally.failed,
        seconds=round(seconds, 3),
        images_per_second=round(new / seconds, 3),
        bytes_raw=sum(made.rows * spec.values * np.dtype(spec.dtype).itemsize for spec in made.layers),
        bytes_stored=_bytes(target),
        device=made.device,
        precision=made.precision,
        batch_size=tally.smallest_batch or made.batch_size,
        limiting_stage=max(load, key=lambda stage: load[stage]) if load else "none",
        stages={
            stage: {"busy_seconds": round(busy, 3), "threads": tally.threads.get(stage, 1)}
            for stage, busy in tally.busy.items()
        },
        layers=layers,
        resumed_images=resumed,
        failures=tuple(failures),
        notes=made.notes,
    )


def _bytes(target: Path) -> int:
    files = target.iterdir() if target.is_dir() else [target]
    return sum(file.stat().st_size for file in files)


def _failures(acts: reader.Activations) -> list[tuple[str, str]]:
    rows = np.flatnonzero(acts.status)[:20]
    return [(str(acts.keys[row]), str(acts.messages[row])) for row in rows]


def _layer_result(layer: reader.Layer, spec: LayerSpec) -> LayerResult:
    stats = layer.stats
    sparsity, nonfinite = None, 0
    if "zero_fraction" in stats.names:
        count = np.asarray(stats.count, np.float64)
        sparsity = float(np.nansum(stats.zero_fraction * count) / count.sum()) if count.sum() else None
        nonfinite = int(np.sum(stats.nonfinite))
    return LayerResult(
        name=spec.name,
        shape=spec.shape,
        dtype=spec.dtype,
        bytes_stored=layer.info()["bytes_stored"],
        sparsity=sparsity,
        nonfinite=nonfinite,
        rel_error=spec.rel_error,
    )
