"""What every export shares: which layers and rows, where they go, and how a file becomes durable."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy.typing as npt

from fmextract.common import strict_json
from fmextract.exporting.dissimilarity import dissimilarities
from fmextract.reading.activations import Activations
from fmextract.reading.layer import Layer
from fmextract.records import Label, Progress
from fmextract.storage.columns import stored_names

Array: TypeAlias = npt.NDArray[Any]


BLOCK_BYTES = 64 << 20
"""Values that are read at once, or the images of one chunk where those are more."""


MARK, VERSION = "fmextract-export", 1


ABOUT = "fmextract_export"


@dataclass(frozen=True, slots=True)
class ExportedLayer:
    """One layer in an export. `shape` has the rows first, that of an RDM is images × images.

    `place` is its file, tensor, column, group or matrix.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    place: str


class Job(NamedTuple):
    """What every format is given."""

    acts: Activations
    names: tuple[str, ...]
    to: str
    metric: str
    progress: Progress

    @property
    def layers(self) -> list[Layer]:
        return [self.acts[name] for name in self.names]

    @property
    def labels(self) -> list[Label] | None:
        """None for an image without a label, and in place of the list where no image has one."""
        return self.acts.listed()

    @property
    def columns(self) -> dict[str, list[Label]]:
        """The label, where there are any, and what else the source says of its images, None where it says nothing."""
        made = {name: self.acts.listed(name) or [] for name in self.acts.columns}
        labels = self.labels
        names = stored_names(made)
        return ({} if labels is None else {"label": labels}) | {names[name]: values for name, values in made.items()}

    def blocks(self, layers: Sequence[Layer]) -> Iterator[slice]:
        """Yield the rows of `layers` in parts, see `_blocks`; the progress is told when the next part is asked for."""
        for rows in _blocks(layers):
            yield rows
            self.progress.advance((min(rows.stop, len(layers[0])) - rows.start) * len(layers), 0)

    def matrix(self, layer: Layer, rows: Array) -> Iterator[Array]:
        """Yield the dissimilarities of a layer, in parts; the progress is told at the end."""
        yield from dissimilarities(layer, rows, self.metric)
        self.progress.advance(len(layer), 0)

    def about(self, written: Sequence[ExportedLayer]) -> dict[str, Any]:
        """Where this comes from, as plain data: it stands in every export, and marks it as one."""
        root = self.acts.attrs
        said = {name: str(root[name]) for name in ("model", "weights_sha256", "precision", "created") if name in root}
        layers = [
            {**asdict(one), "axes": self.acts[one.name].axes, "module": self.acts[one.name].module} for one in written
        ]
        head = {"format": MARK, "format_version": VERSION, "to": self.to, "source": str(self.acts.path)}
        return {**head, **said, "rows": self.acts.num_rows, "layers": layers}


def exported_layers(
    layers: Sequence[Layer], places: Sequence[str], dtypes: Sequence[str] | None = None
) -> list[ExportedLayer]:
    dtypes = dtypes or [layer.dtype.name for layer in layers]
    return [
        ExportedLayer(layer.name, layer.shape, dtype, place)
        for layer, dtype, place in zip(layers, dtypes, places, strict=True)
    ]


def _blocks(layers: Sequence[Layer]) -> Iterator[slice]:
    """Return how many rows have up to BLOCK_BYTES of values in all of `layers`: whole chunks, if one fits."""
    chunk = max(layer.chunks[0] for layer in layers)
    rows = max(1, BLOCK_BYTES // sum(layer.nbytes // len(layer) for layer in layers))
    if rows >= chunk:
        rows -= rows % chunk
    elif len(layers) == 1:
        rows = chunk  # a chunk is decoded whole in any case
    return (slice(start, start + rows) for start in range(0, len(layers[0]), rows))


def distinct(names: Sequence[str], taken: Sequence[str] = ()) -> list[str]:
    """Return the same names, those that are taken or there before with a number; letters' case makes no difference."""
    used, made = {name.casefold() for name in taken}, []
    for name in names:
        numbers = (f"{name}-{number}" for number in range(2, len(names) + len(taken) + 2))
        made.append(next(one for one in (name, *numbers) if one.casefold() not in used))
        used.add(made[-1].casefold())
    return made


@contextlib.contextmanager
def durable_file(path: Path) -> Iterator[BinaryIO]:
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def cell(value: Label) -> Any:
    """Of a table of text: lists as JSON."""
    return strict_json.dumps(value) if isinstance(value, (list, dict)) else value


def file_name(layer: str) -> str:
    """Letters that every file system takes, and not too many of them; no hidden file, and none that looks an option."""
    plain = re.sub(r"[^A-Za-z0-9._=@-]", "_", layer)[:200]
    return f"_{plain}" if plain[0] in ".-" else plain
