"""Layers as the columns of a Parquet file, one row an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fmextract.common import strict_json
from fmextract.errors import MissingExtra
from fmextract.exporting.job import ABOUT, ExportedLayer, Job, cell, distinct, durable_file, exported_layers
from fmextract.records import Label
from fmextract.storage import schema
from fmextract.storage.columns import form_of

# ----------------------------------------------------------------------------------------------------------- parquet


def write_parquet(job: Job, path: Path) -> list[ExportedLayer]:
    """One row an image: sample, key, status, label where there are any, and a list of fixed size for each layer.

    Shape and axes of a layer are metadata of its column. float16 becomes float32, which every reader knows. A block is
    a row group.
    """
    arrow, parquet = _pyarrow()
    layers = job.layers
    dtypes = ["float32" if layer.dtype == np.float16 else layer.dtype.name for layer in layers]
    columns: dict[str, Any] = {"sample": job.acts.samples, "key": job.acts.keys, "status": job.acts.status}
    kinds = {"sample": arrow.int64(), "key": arrow.string(), "status": arrow.uint8()}
    for name, values in job.columns.items():
        columns[name], kinds[name] = _arrow_column(arrow, values)
    places = distinct(job.names, list(columns))
    written = exported_layers(layers, places, dtypes)
    fields = [arrow.field(name, kind) for name, kind in kinds.items()]
    for layer, dtype, place in zip(layers, dtypes, places, strict=True):
        kind = arrow.list_(arrow.from_numpy_dtype(dtype), math.prod(layer.shape[1:]))
        said = {
            "layer": layer.name,
            "shape": strict_json.dumps(layer.shape[1:]),
            "axes": strict_json.dumps(layer.axes[1:]),
        }
        fields.append(arrow.field(place, kind, metadata={"layer": layer.name} | said))
    table = arrow.schema(fields, metadata={ABOUT: strict_json.dumps(job.about(written))})
    with (
        durable_file(path) as file,
        parquet.ParquetWriter(file, table, compression="zstd", use_dictionary=False) as writer,
    ):
        for rows in job.blocks(layers):
            arrays = [arrow.array(columns[name][rows], kinds[name]) for name in columns]
            for layer, dtype, field in zip(layers, dtypes, fields[len(columns) :], strict=True):
                values = arrow.array(layer[rows].reshape(-1).astype(dtype, copy=False))
                arrays.append(arrow.FixedSizeListArray.from_arrays(values, type=field.type))
            writer.write_table(arrow.Table.from_arrays(arrays, schema=table))
    return written


def _arrow_column(arrow: Any, values: Sequence[Label]) -> tuple[list[Any], Any]:
    """Return the values of a column that the source brought along as arrow takes them, and their type."""
    form = form_of(values)
    if form is None or not form.is_numeric:
        texts = [value if value is None or isinstance(value, str) else str(cell(value)) for value in values]
        return texts, arrow.string()
    kind = arrow.int64() if form.kind == "int" else arrow.float64()
    return list(values), kind if form.length is None else arrow.list_(kind)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtra("pyarrow", "parquet", "export to parquet") from error
    return pyarrow, pyarrow.parquet


def about_parquet(path: Path) -> Any:
    return schema.load(_pyarrow()[1].read_schema(path).metadata[ABOUT.encode()].decode())
