"""Merge several shards into one file, raw chunk by raw chunk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from fmextract.errors import FormatError
from fmextract.records import FileInfo, LayerSpec, SampleTable, Status
from fmextract.storage.codecs import CODECS, encode, fill_value
from fmextract.storage.columns import common_form
from fmextract.storage.contents import (
    brought_in,
    open_shard,
    read_chunk,
    read_info,
    read_layer,
    read_samples,
    row_range,
)
from fmextract.storage.digest import chunk_digest
from fmextract.storage.layout import COLUMN_CHUNK, Stats, chunk_grid, escape_name
from fmextract.storage.writer import Forms, ShardWriter

# ------------------------------------------------------------------------------------------------------------- packing


def pack(
    parts: Sequence[Path | range],
    out: Path,
    *,
    info: FileInfo | None = None,
    stats: Stats | None = None,
    layer_attrs: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """Merge files whose rows follow one another into `out`, a temporary name. Returns the content digest.

    Chunks are copied as they are, without decoding. A range among the parts stands for rows that are left out: they
    keep their places as failed rows without a key. `info` defaults to that of the first file; statistics are those
    given, none by default. Raises FormatError where the parts do not belong together, DamagedError for a broken one.
    """
    files = [part for part in parts if not isinstance(part, range)]
    if not files:
        raise ValueError("expected at least one file to pack")
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(open_shard(files[0]))
        layout = _layout(first)
        ranges, forms = [], list[Forms]()
        for part in parts:
            if isinstance(part, range):
                ranges.append(part)
                continue
            with open_shard(part) as file:
                _check_same_run(first, file, layout)
                ranges.append(row_range(file))
                forms.append({title: one.form for title, one in brought_in(file).items()})
        _check_ranges(parts, ranges, layout[0])
        rows = range(ranges[0].start, ranges[-1].stop)
        specs, codec, level = layout
        writer = stack.enter_context(ShardWriter(out, rows, specs, info or read_info(first), codec, level))
        for part, span in zip(parts, ranges, strict=True):
            if isinstance(part, range):
                _fill_chunks(writer, span.start - rows.start, len(span), codec, level)
            else:
                with open_shard(part) as file:
                    _copy_chunks(file, writer, span.start - rows.start)
        return writer.finish_parts(_tables(parts), _common_forms(forms), stats, layer_attrs)


def _layout(file: h5py.File) -> tuple[list[LayerSpec], str, int]:
    """Return the layers of a file in order, and the codec with its level that they share."""
    specs = [read_layer(group) for group in file["layers"].values()]
    pipelines = set()
    for group in file["layers"].values():
        data = group["activation"]
        plist = data.id.get_create_plist()
        pipeline = [plist.get_filter(i) for i in range(plist.get_nfilters())]
        pipelines.add((data.dtype.itemsize, tuple((stage[0], tuple(stage[2])) for stage in pipeline)))
    for codec in CODECS.values():
        for level in codec.levels:
            if all(pipeline == codec.filters(itemsize, level) for itemsize, pipeline in pipelines):
                return specs, codec.name, level
    raise FormatError(f"{file.filename} has filters that fmextract does not write")


def _check_same_run(first: h5py.File, file: h5py.File, layout: tuple[list[LayerSpec], str, int]) -> None:
    if _layout(file) != layout:
        raise FormatError(f"{file.filename} has other layers, chunks or filters than {first.filename}")
    then, now = read_info(first), read_info(file)  # as they are read: an option may have had another name
    for name in ("config", "model", "weights_sha256", "preprocess", "precision"):
        if getattr(then, name) != getattr(now, name):
            raise FormatError(f"{file.filename} was made with another {name} than {first.filename}")


def _check_ranges(parts: Sequence[Path | range], ranges: Sequence[range], specs: Sequence[LayerSpec]) -> None:
    for path, (before, span) in zip(parts[1:], pairwise(ranges), strict=True):
        if span.start != before.stop:
            raise FormatError(
                f"{path} starts at row {span.start}, expected {before.stop}: the parts must follow one another"
            )
        for spec in specs:
            if (span.start - ranges[0].start) % spec.chunk[0]:
                raise FormatError(f"{path} starts at row {span.start}, in the middle of a chunk of {spec.name}")


def _copy_chunks(file: h5py.File, writer: ShardWriter, rows_before: int) -> None:
    for layer, spec in enumerate(writer.layers):
        data = file["layers"][escape_name(spec.name)]["activation"]
        shift = rows_before // spec.chunk[0]
        for index in np.ndindex(chunk_grid(data.shape, data.chunks)):
            mask, payload = read_chunk(data, index)
            if mask:
                raise FormatError(
                    f"{file.filename}: chunk {index} of {spec.name} skips a filter; fmextract writes none such"
                )
            writer.write_chunk(layer, (index[0] + shift, *index[1:]), payload, chunk_digest(payload))


def _fill_chunks(writer: ShardWriter, rows_before: int, rows: int, codec: str, level: int) -> None:
    for layer, spec in enumerate(writer.layers):
        full = np.full(spec.chunk, fill_value(spec.dtype), spec.dtype)
        payload = encode([full], codec=codec, level=level, dtype=spec.dtype, values=full.size)
        digest, shift = chunk_digest(payload), rows_before // spec.chunk[0]
        for index in np.ndindex(chunk_grid((rows, *spec.shape), spec.chunk)):
            writer.write_chunk(layer, (index[0] + shift, *index[1:]), payload, digest)


def _tables(parts: Sequence[Path | range]) -> Iterator[SampleTable]:
    for part in parts:
        if not isinstance(part, range):
            with open_shard(part) as file:
                yield read_samples(file)
            continue
        for at in range(part.start, part.stop, COLUMN_CHUNK):
            table = SampleTable.empty(at, [""] * min(COLUMN_CHUNK, part.stop - at), None)
            table.status = [Status.UNREADABLE] * len(table)
            table.message = ["left out when the shards were packed: this row's shard was missing"] * len(table)
            yield table


def _common_forms(forms: Sequence[Forms]) -> Forms:
    titles = dict.fromkeys(title for one in forms for title in one)
    return {title: common_form(one.get(title) for one in forms) for title in titles}
