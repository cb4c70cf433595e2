"""Layers as .npy files in a directory, one a layer."""

from __future__ import annotations

import csv
import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np

from fmextract.common import strict_json
from fmextract.exporting.job import ExportedLayer, Job, cell, distinct, durable_file, exported_layers, file_name
from fmextract.storage import schema

# --------------------------------------------------------------------------------------------------------------- npy


def write_npy(job: Job, folder: Path) -> list[ExportedLayer]:
    """One .npy a layer; rows.csv, one line a row; index.json, which layer is in which file.

    Written from the front, not through a memory map: a full disk is then an error, and not the end of the process.
    """
    folder.mkdir()
    files = [f"{place}.npy" for place in distinct([file_name(name) for name in job.names])]
    written = exported_layers(job.layers, files)
    for layer, name in zip(job.layers, files, strict=True):
        with durable_file(folder / name) as file:
            header = {"descr": layer.dtype.str, "fortran_order": False, "shape": layer.shape}
            np.lib.format.write_array_header_1_0(file, header)
            for rows in job.blocks([layer]):
                file.write(layer[rows].data)
    columns: dict[str, Any] = {"sample": job.acts.samples, "key": job.acts.keys, "status": job.acts.status}
    columns |= {name: list(map(cell, values)) for name, values in job.columns.items()}
    with durable_file(folder / "rows.csv") as file:
        text = io.TextIOWrapper(file, "utf-8", newline="")
        csv.writer(text, lineterminator="\n").writerows(itertools.chain([columns], zip(*columns.values(), strict=True)))
        text.detach()
    with durable_file(folder / "index.json") as file:
        file.write(strict_json.dumps(job.about(written), indent=1).encode())
    return written


def about_npy(folder: Path) -> Any:
    return schema.load((folder / "index.json").read_text(encoding="utf-8"))
