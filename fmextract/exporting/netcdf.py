"""Layers as one netCDF file, a group a layer."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fmextract.exporting.job import ABOUT, Array, ExportedLayer, Job, exported_layers
from fmextract.reading import totals
from fmextract.reading.layer import Layer
from fmextract.records import FileStamp, LayerSpec, SampleTable
from fmextract.run import packing
from fmextract.storage import codecs, contents, digest, layout, schema
from fmextract.storage.writer import ShardWriter

# ------------------------------------------------------------------------------------------------------------ netcdf


def write_netcdf(job: Job, path: Path) -> list[ExportedLayer]:
    """Return a file of `store`, which is netCDF-4, with the layers wanted; gzip. `fm.open` reads it, too.

    float16, on which netCDF-C crashes, becomes float32. Columns and statistics come along, those of shards merged.
    """
    acts = job.acts
    parts = [file.path for file in acts.files]
    stats, attrs, smaller = totals.merged(parts, job.names)
    info = acts.files[0].info()
    written = exported_layers(
        job.layers,
        [f"/layers/{layout.escape_name(name)}" for name in job.names],
        [_netcdf_spec(layer).dtype for layer in job.layers],
    )
    extra = {**info.extra, **({"smaller_batches": smaller} if smaller else {}), ABOUT: job.about(written)}
    extra |= packing.images_from(acts, path.parent)
    specs = [_netcdf_spec(layer) for layer in job.layers]
    rows = range(int(acts.samples[0]), int(acts.samples[-1]) + 1)
    columns = [acts.status, acts.messages, acts.heights, acts.widths]
    status, message, height, width = (column.tolist() for column in columns)
    files = list(map(FileStamp, acts.file_sizes.tolist(), acts.file_digests))
    brought = {name: acts.listed(name) or [] for name in acts.columns}
    table = SampleTable(rows.start, acts.keys.tolist(), job.labels, status, message, height, width, files, brought)
    with (
        ShardWriter(path, rows, specs, replace(info, extra=extra), "gzip", None) as writer,
        ThreadPoolExecutor(acts.threads) as pool,
    ):
        for number, (layer, spec) in enumerate(zip(job.layers, specs, strict=True)):
            for block in job.blocks([layer]):
                values = layer[block]
                grid = layout.chunk_grid(values.shape, spec.chunk)
                before = block.start // spec.chunk[0]
                payloads = pool.map(functools.partial(_encoded, values, spec), np.ndindex(grid))
                for place, payload in zip(np.ndindex(grid), payloads, strict=True):
                    at = (before + place[0], *place[1:])
                    writer.write_chunk(number, at, payload, digest.chunk_digest(payload))
        writer.finish(table, stats, attrs)
    return written


def _netcdf_spec(layer: Layer) -> LayerSpec:
    if layer.dtype != np.float16:
        return layer.spec
    mantissa = min(layer.spec.mantissa or codecs.MANTISSA["float16"], codecs.MANTISSA["float16"])
    return replace(layer.spec, dtype="float32", mantissa=mantissa)


def _encoded(values: Array, spec: LayerSpec, place: Sequence[int]) -> codecs.Stored:
    """One chunk of a block; where the block ends within it, fill values follow."""
    part = values[tuple(slice(i * n, (i + 1) * n) for i, n in zip(place, spec.chunk, strict=True))]
    if part.shape[1:] != spec.chunk[1:]:
        whole = np.full((len(part), *spec.chunk[1:]), codecs.fill_value(spec.dtype), values.dtype)
        whole[tuple(map(slice, part.shape))] = part
        part = whole
    piece = np.ascontiguousarray(part)
    return codecs.encode([piece], codec="gzip", level=None, dtype=spec.dtype, values=math.prod(spec.chunk))


def about_netcdf(path: Path) -> Any:
    return schema.load(contents.read_text(path, "/", ABOUT))
