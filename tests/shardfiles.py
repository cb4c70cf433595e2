"""Small files in the layout of fmextract, for tests: made by ShardWriter from arrays that the test knows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fmextract.records import FileInfo, LayerSpec, SampleTable
from fmextract.storage import codecs, digest, layout
from fmextract.storage.writer import ShardWriter

INFO = FileInfo(
    title="activations",
    source="photos",
    history="2026-01-01 extract",
    config={"batch_size": 4, "layers": ["conv", "fc"]},
    model="resnet50",
    weights_sha256="00ff",
    preprocess={"resize": 232, "crop": [224, 224]},
    precision="fp32",
    versions={"torch": "2.14"},
    created="2026-01-01T00:00:00Z",
)


def layer(name: str, shape: Sequence[int], axes: str, *, images: int = 4, **changes: Any) -> LayerSpec:
    """A LayerSpec with `axes` as words, whole images in a chunk, float32; any field can be changed."""
    spec = LayerSpec(
        name=name,
        module=name,
        module_type="Conv2d",
        call=1,
        calls=1,
        tap="out",
        member="",
        reducer="",
        shape=tuple(shape),
        axes=tuple(axes.split()),
        dtype="float32",
        compute_dtype="float32",
        chunk=(images, *shape),
    )
    return replace(spec, **changes)


def values(spec: LayerSpec, rows: int, seed: int = 0) -> np.ndarray:
    """Distinct values of the layer's type, (rows, *shape), half of them zero as after a ReLU."""
    noise = np.random.default_rng(seed).standard_normal((rows, *spec.shape)) * 50
    return np.maximum(noise, 0).astype(spec.dtype)


def table(rows: range, **columns: Any) -> SampleTable:
    """Columns of sound rows; any column can be changed."""
    made = SampleTable.empty(rows.start, [f"photos/{row:04d}.jpg" for row in rows], None)
    made.height, made.width = [375] * len(rows), [500] * len(rows)
    for name, column in columns.items():
        setattr(made, name, column)
    return made


def fill(writer: ShardWriter, arrays: Sequence[np.ndarray], codec: str = "gzip", level: int | None = None) -> None:
    """Write every chunk of every layer."""
    for number, (spec, array) in enumerate(zip(writer.layers, arrays, strict=True)):
        for index in np.ndindex(layout.chunk_grid(array.shape, spec.chunk)):
            box = tuple(slice(i * size, (i + 1) * size) for i, size in zip(index, spec.chunk, strict=True))
            part = array[box]
            if part.shape[1:] != spec.chunk[1:]:  # a channel split that does not come out even
                whole = np.full((len(part), *spec.chunk[1:]), codecs.fill_value(spec.dtype))
                whole[tuple(slice(size) for size in part.shape)] = part
                part = whole
            payload = codecs.encode(
                [np.ascontiguousarray(part)],
                codec=codec,
                level=level,
                dtype=spec.dtype,
                values=math.prod(spec.chunk),
            )
            writer.write_chunk(number, index, payload, digest.chunk_digest(payload))


def write(
    path: Path,
    arrays: Mapping[LayerSpec, np.ndarray],
    *,
    start: int = 0,
    codec: str = "gzip",
    info: FileInfo = INFO,
    samples: SampleTable | None = None,
    **finish: Any,
) -> str:
    """A finished file of the given activations. Returns its content digest."""
    rows = range(start, start + len(next(iter(arrays.values()))))
    writer = ShardWriter(path, rows, list(arrays), info, codec, None)
    fill(writer, list(arrays.values()), codec)
    return writer.finish(samples or table(rows), **finish)
