"""Dissimilarities between all images, layer by layer, as rsatoolbox reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fmextract.common import strict_json
from fmextract.common.text import byte_count, count
from fmextract.errors import ConfigError
from fmextract.exporting.dissimilarity import METRICS
from fmextract.exporting.job import ABOUT, ExportedLayer, Job, cell
from fmextract.storage import contents, schema
from fmextract.storage.columns import stored_names
from fmextract.storage.writer import write_rdms

MOST_RDM_BYTES = 16 << 30
"""Of all matrices of a file: rsatoolbox loads them whole."""


# --------------------------------------------------------------------------------------------------------------- rdm


def write_rdm(job: Job, path: Path) -> list[ExportedLayer]:
    """One matrix a layer over the images that did not fail, for `rsatoolbox.rdm.load_rdm`."""
    rows = job.acts.rows()
    pairs = len(rows) * (len(rows) - 1) // 2
    total = 8 * pairs * len(job.names)
    if not pairs:
        raise ConfigError(f"{job.acts.path}: {len(rows)} of {job.acts.num_rows} images have values; an RDM needs two")
    if total > MOST_RDM_BYTES:
        raise ConfigError(
            f"{len(rows):,} images make {pairs:,} pairs a layer, {byte_count(total)} for "
            f"{count(len(job.names), 'layer')}, and rsatoolbox loads all at once: {byte_count(MOST_RDM_BYTES)} at most"
            ". Name fewer layers with -l, or extract fewer images (--limit, or a manifest of those you want)"
        )
    written = [ExportedLayer(layer.name, (len(rows), len(rows)), "float64", layer.name) for layer in job.layers]
    patterns: dict[str, Any] = {"key": job.acts.keys[rows].tolist(), "sample": job.acts.samples[rows]}
    arrays = {} if job.acts.labels is None else {"label": job.acts.labels}
    arrays |= dict(zip(stored_names(job.acts.columns).values(), job.acts.columns.values(), strict=True))
    for name, values in arrays.items():
        is_number = values.ndim == 1 and values.dtype.kind in "if"
        patterns[name] = values[rows] if is_number else [str(cell(value)) for value in values[rows].tolist()]
    about = job.about(written)
    said = {name: str(about[name]) for name in ("source", "model", "precision") if name in about}
    write_rdms(
        path,
        {layer.name: job.matrix(layer, rows) for layer in job.layers},
        pairs,
        METRICS[job.metric],
        said | {ABOUT: strict_json.dumps(about)},
        patterns,
    )
    return written


def about_rdm(path: Path) -> Any:
    return schema.load(contents.read_text(path, "/descriptors", ABOUT))
