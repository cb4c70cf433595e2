"""Outputs for tests: arrays → one file or a directory of shards, written by the writers that a run uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fmextract.records import FileInfo, FileStamp, LayerSpec, SampleTable
from fmextract.storage import codecs, durable, shards
from fmextract.storage.digest import chunk_digest
from fmextract.storage.layout import chunk_grid
from fmextract.storage.writer import ShardWriter

Array = npt.NDArray[Any]
AXES: Mapping[int, tuple[str, ...]] = {
    1: (),
    2: ("feature",),
    3: ("token", "feature"),
    4: ("channel", "y", "x"),
    5: ("channel", "time", "y", "x"),
}
PER_ROW = ("keys", "status", "message", "labels", "files")
INFO = FileInfo(
    title="a test",
    source="nowhere",
    history="made by a test",
    config={"model": "tiny"},
    model="tiny",
    weights_sha256="0" * 64,
    preprocess={"resize": 256, "crop": [224, 224]},
    precision="fp32",
    versions={"fmextract": "0"},
    created="2026-01-01T00:00:00Z",
)


def make_spec(name: str, array: Array, chunk: Sequence[int] | None = None, **changes: Any) -> LayerSpec:
    """Return the LayerSpec of `array` (N, …), with `changes` to its fields; a chunk is up to 4 images unless given."""
    fields: dict[str, Any] = {
        "name": name,
        "module": name,
        "module_type": "Conv2d",
        "call": 1,
        "calls": 1,
        "tap": "out",
        "member": "",
        "reducer": "",
        "shape": array.shape[1:],
        "axes": AXES.get(array.ndim) or tuple(f"axis_{axis}" for axis in range(1, array.ndim)),
        "dtype": array.dtype.name,
        "compute_dtype": array.dtype.name,
        "chunk": tuple(chunk) if chunk else (4, *array.shape[1:]),
    }
    return LayerSpec(**(fields | changes))


def write_layers(writer: ShardWriter, arrays: Sequence[Array], codec: str, level: int | None = None) -> None:
    """Write every chunk of every layer of `writer`; `arrays` hold its rows only."""
    for number, (spec, array) in enumerate(zip(writer.layers, arrays, strict=True)):
        for place in np.ndindex(chunk_grid(array.shape, spec.chunk)):
            full = np.full(spec.chunk, codecs.fill_value(spec.dtype), spec.dtype)
            part = array[tuple(slice(i * n, (i + 1) * n) for i, n in zip(place, spec.chunk, strict=True))]
            full[tuple(map(slice, part.shape))] = part
            payload = codecs.encode([full], codec=codec, level=level, dtype=spec.dtype, values=full.size)
            writer.write_chunk(number, place, payload, chunk_digest(payload))


def make_file(
    path: Path,
    arrays: Mapping[str, Array],
    *,
    axes: Mapping[str, Sequence[str]] | None = None,
    chunk: Mapping[str, Sequence[int]] | None = None,
    codec: str = "gzip",
    level: int | None = None,
    start: int = 0,
    keys: Sequence[str] | None = None,
    status: Sequence[int] | None = None,
    message: Sequence[str] | None = None,
    labels: Sequence[Any] | None = None,
    files: Sequence[FileStamp] | None = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
    stats: Mapping[str, Mapping[str, Any]] | None = None,
    spec: Mapping[str, Mapping[str, Any]] | None = None,
    info: FileInfo = INFO,
) -> str:
    """Write `arrays`, {layer: (N, …)}, to one file whose rows begin at `start`; returns the content digest.

    `axes`, `chunk`, `stats` and `spec` (other fields of LayerSpec) are by layer. Keys default to "img/00000.jpg" …,
    messages to "broken" where the status is not 0, sizes to 480 x 640.
    """
    count = len(next(iter(arrays.values())))
    rows = range(start, start + count)
    status = [0] * count if status is None else list(status)
    specs = []
    for name, array in arrays.items():
        changes = dict((spec or {}).get(name, {}))
        if axes and name in axes:
            changes["axes"] = tuple(axes[name])
        specs.append(make_spec(name, array, (chunk or {}).get(name), **changes))
    table = SampleTable(
        start=start,
        keys=[f"img/{row:05}.jpg" for row in rows] if keys is None else list(keys),
        labels=labels,
        status=status,
        message=["broken" if s else "" for s in status] if message is None else list(message),
        height=[480] * count,
        width=[640] * count,
        files=[FileStamp()] * count if files is None else list(files),
        columns=columns or {},
    )
    with ShardWriter(path, rows, specs, info, codec, level) as writer:
        write_layers(writer, list(arrays.values()), codec, level)
        return writer.finish(table, stats)


def make_shards(
    folder: Path, arrays: Mapping[str, Array], cuts: Sequence[int], *, finish: bool = True, **options: Any
) -> list[Path]:
    """Write `arrays` to a directory of shards that begin at row 0 and at each of `cuts`; returns their paths.

    `options` are those of `make_file`. Without `finish` the last shard is left out, and with it index.json.
    """
    folder.mkdir(parents=True)
    count = len(next(iter(arrays.values())))
    ranges = [range(start, stop) for start, stop in pairwise((0, *cuts, count))]
    plan = {"shards": [[rows.start, rows.stop] for rows in ranges]}
    durable.write_json(folder / shards.PLAN, plan)
    paths = []
    for number, rows in enumerate(ranges if finish else ranges[:-1]):
        path = folder / shards.shard_name(number)
        part = {name: options[name][rows.start : rows.stop] for name in PER_ROW if options.get(name) is not None}
        if columns := options.get("columns"):
            part["columns"] = {name: values[rows.start : rows.stop] for name, values in columns.items()}
        mine = {name: array[rows.start : rows.stop] for name, array in arrays.items()}
        digest = make_file(path, mine, start=rows.start, **(options | part))
        statuses = part.get("status", [0] * len(rows))
        shards.record_shard(path, rows=rows, statuses=statuses, content_digest=digest, batch_size=1)
        paths.append(path)
    if finish:
        shards.fold_index(folder, plan)
    return paths
