"""Layers as one safetensors file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fmextract.common import strict_json
from fmextract.common.text import byte_count
from fmextract.errors import ConfigError
from fmextract.exporting.job import ABOUT, ExportedLayer, Job, distinct, durable_file, exported_layers
from fmextract.storage import schema

MOST_HEADER_BYTES = 100_000_000
"""What the safetensors library reads of a header at the most."""


_SAFETENSORS = {"float": "F", "int": "I", "uint": "U"}


# ------------------------------------------------------------------------------------------------------- safetensors


def write_safetensors(job: Job, path: Path) -> list[ExportedLayer]:
    """One tensor a layer; the columns as JSON in the metadata: keys, status, sample, and labels where there are any.

    Eight bytes of length, a header in JSON, the tensors one after the other (github.com/huggingface/safetensors): the
    library itself would want all of them in memory. Wide types first, so that each lies where its type wants it.
    """
    layers = sorted(job.layers, key=lambda layer: -layer.dtype.itemsize)
    places = dict(zip(job.names, distinct(job.names, ["__metadata__"]), strict=True))
    written = exported_layers(job.layers, list(places.values()))
    columns: dict[str, Any] = {
        "keys": job.acts.keys.tolist(),
        "status": job.acts.status.tolist(),
        "sample": job.acts.samples.tolist(),
    }
    if (labels := job.labels) is not None:
        columns["labels"] = labels
    if others := {name: values for name, values in job.columns.items() if name != "label"}:
        columns["columns"] = others
    metadata = {ABOUT: job.about(written), **columns}
    header: dict[str, Any] = {"__metadata__": {name: strict_json.dumps(value) for name, value in metadata.items()}}
    end = 0
    for layer in layers:
        kind = f"{_SAFETENSORS[layer.dtype.name.rstrip('0123456789')]}{8 * layer.dtype.itemsize}"
        start, end = end, end + layer.nbytes
        header[places[layer.name]] = {"dtype": kind, "shape": layer.shape, "data_offsets": [start, end]}
    said = strict_json.dumps(header).encode()
    said += b" " * (-len(said) % 8)
    if len(said) > MOST_HEADER_BYTES:
        raise ConfigError(
            f"the keys of {job.acts.num_rows:,} images take {byte_count(len(said))}, and safetensors reads a header of "
            f"up to {byte_count(MOST_HEADER_BYTES)}: export to npy or parquet"
        )
    with durable_file(path) as file:
        file.write(len(said).to_bytes(8, "little") + said)
        for layer in layers:
            for rows in job.blocks([layer]):
                file.write(layer[rows].data)
    return written


def about_safetensors(path: Path) -> Any:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = schema.load(file.read(min(size, MOST_HEADER_BYTES)).decode())
    return schema.load(header["__metadata__"][ABOUT])
