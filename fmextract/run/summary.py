"""What a finished run says of itself: rows, speed, bytes, layers, failures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fmextract.pipeline.work import FIRST, Tally
from fmextract.reading import activations
from fmextract.records import LayerResult, LayerSpec, Result
from fmextract.storage.layer_stats import Totals


def result(acts: activations.Activations, target: Path, tally: Tally, seconds: float, resumed: int | None) -> Result:
    """What a finished output holds, and what this run did for it. `resumed` None: it was complete before."""
    rows = acts.num_rows
    with acts.held():
        layers = tuple(_layer_result(acts[name].spec, totals) for name, totals in acts.totals().items())
    config, chosen = acts.config, str(acts.attrs.get("precision"))
    failed, failures = int(np.count_nonzero(acts.status)), _failures(acts)
    bytes_raw = sum(acts[name].nbytes for name in acts.layers)
    speed = (acts.throughput or {}).get("images_per_second", 0.0)
    resumed = rows if resumed is None else resumed
    load = {stage: busy / tally.threads.get(stage, 1) for stage, busy in tally.busy.items()}
    return Result(
        output=str(target),
        images=rows,
        failed=failed,
        seconds=round(seconds, 3),
        images_per_second=speed,
        bytes_raw=bytes_raw,
        bytes_stored=_bytes(target),
        device=config["device"],
        precision=chosen,
        batch_size=tally.smallest_batch or config["batch_size"],
        limiting_stage=max(load, key=lambda stage: load[stage]) if load else "none",
        stages={
            stage: {"busy_seconds": round(busy, 3), "threads": tally.threads.get(stage, 1)}
            for stage, busy in tally.busy.items()
        },
        layers=layers,
        resumed_images=resumed,
        failures=tuple(failures),
        notes=(*config.get("notes", ()), *nonfinite_notes(layers, tally)),
    )


def nonfinite_notes(layers: Sequence[LayerResult], tally: Tally) -> list[str]:
    told = []
    for layer in layers:
        if layer.nonfinite:
            keys = ", ".join(repr(key) for key in tally.nonfinite.get(layer.name, [])[:FIRST])
            some = f", first in {keys}" if keys else ""
            told.append(f"layer {layer.name!r} holds {layer.nonfinite:,} values that are not finite{some}")
    return told


def _bytes(target: Path) -> int:
    files = target.iterdir() if target.is_dir() else [target]
    return sum(file.stat().st_size for file in files)


def _failures(acts: activations.Activations) -> list[tuple[str, str]]:
    rows = np.flatnonzero(acts.status)[:20]
    return [(str(acts.keys[row]), str(acts.messages[row])) for row in rows]


def _layer_result(spec: LayerSpec, totals: Totals) -> LayerResult:
    return LayerResult(
        name=spec.name,
        shape=spec.shape,
        dtype=spec.dtype,
        bytes_stored=totals.nbytes,
        sparsity=totals.zeros / totals.values if totals.values else None,
        nonfinite=totals.nonfinite,
        rel_error=spec.rel_error,
    )
