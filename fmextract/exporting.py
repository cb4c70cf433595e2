"""Stored layers in the forms that other tools read: npy, safetensors, parquet, netCDF, and RDMs of rsatoolbox.

Rows go through in blocks of BLOCK_BYTES: memory does not grow with the number of images, but for their keys. Every
format keeps every row in its place, so that row r of an array is row r of the output it came from; a failed row holds
NaN (0 in integer layers), and its status stands beside it. Only `rdm` leaves failed rows out: they have no distance.
What is written appears under its name at once, or not at all. No torch.

Each format is one function `(job, temporary) → where each layer went`, and one that reads back what `_about` wrote.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import itertools
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from fmextract.common import strict_json
from fmextract.common.progress import Quiet
from fmextract.common.text import byte_count, count
from fmextract.dissimilarity import METRICS, dissimilarities
from fmextract.errors import ConfigError, MissingExtra, NoSpace, OutputError
from fmextract.reading import activations, totals
from fmextract.reading.activations import Activations
from fmextract.reading.layer import Layer
from fmextract.reading.select import select_layers
from fmextract.records import FileStamp, Label, LayerSpec, Progress, SampleTable
from fmextract.run import packing
from fmextract.storage import codecs, contents, digest, durable, layout, schema, shards
from fmextract.storage.columns import form_of, stored_names
from fmextract.storage.writer import ShardWriter, write_rdms

Array: TypeAlias = npt.NDArray[Any]

BLOCK_BYTES = 64 << 20
"""Values that are read at once, or the images of one chunk where those are more."""
MOST_RDM_BYTES = 16 << 30
"""Of all matrices of a file: rsatoolbox loads them whole."""
MOST_HEADER_BYTES = 100_000_000
"""What the safetensors library reads of a header at the most."""
MARK, VERSION = "fmextract-export", 1
_ABOUT = "fmextract_export"
_SAFETENSORS = {"float": "F", "int": "I", "uint": "U"}


@dataclass(frozen=True, slots=True)
class ExportedLayer:
    """One layer in an export. `shape` has the rows first, that of an RDM is images × images.

    `place` is its file, tensor, column, group or matrix.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    place: str


@dataclass(frozen=True, slots=True)
class Exported:
    """What `export` wrote. `rows` counts all of the source; `failed` those of them without values."""

    path: str
    to: str
    rows: int
    failed: int
    bytes: int
    metric: str | None
    layers: tuple[ExportedLayer, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def export(
    acts: Activations | str | os.PathLike[str],
    *,
    to: str,
    out: str | os.PathLike[str],
    layers: Sequence[str] | None = None,
    metric: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write stored layers, all of them if none is named, into `out` in another format: one of FORMATS.

    `acts` is what `open` returned, or a path. `layers` are names, or selectors as of `fmextract show`. `metric` is for
    rdm only: one of METRICS, euclidean-squared unless given. An earlier export in the same format is replaced if
    `overwrite`. `progress` is told of the rows of every layer. Raises ConfigError, OutputError where something else
    stands at `out`, MissingExtra, NoSpace, and what reading raises.
    """
    if not isinstance(acts, Activations):
        with activations.open(acts) as opened:
            return export(opened, to=to, out=out, layers=layers, metric=metric, overwrite=overwrite, progress=progress)
    if to not in FORMATS:
        raise ConfigError(f"--to {to!r}: expected one of {', '.join(FORMATS)}")
    if metric is not None and to != "rdm":
        raise ConfigError(f"--metric is for --to rdm, not for {to}")
    if metric is not None and metric not in METRICS:
        raise ConfigError(f"--metric {metric!r}: expected one of {', '.join(METRICS)}")
    target, form = Path(out), FORMATS[to]
    _check_target(target, to, overwrite)
    names, told = tuple(select_layers(acts, layers or ())), progress or Quiet()
    job = _Job(acts, names, to, metric or next(iter(METRICS)), told)
    with _published(target) as temporary:
        told.start(len(acts) * len(names), 0)
        try:
            written = form.write(job, temporary)
        finally:
            told.finish()
    return Exported(
        path=str(target),
        to=to,
        rows=len(acts),
        failed=int((acts.status != 0).sum()),
        bytes=sum(path.stat().st_size for path in (target.iterdir() if target.is_dir() else [target])),
        metric=job.metric if to == "rdm" else None,
        layers=tuple(written),
    )


class _Job(NamedTuple):
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
        """The rows of `layers` in parts, see `_blocks`; the progress is told when the next part is asked for."""
        for rows in _blocks(layers):
            yield rows
            self.progress.advance((min(rows.stop, len(layers[0])) - rows.start) * len(layers), 0)

    def matrix(self, layer: Layer, rows: Array) -> Iterator[Array]:
        """The dissimilarities of a layer, in parts; the progress is told at the end."""
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
        return {**head, **said, "rows": len(self.acts), "layers": layers}


def _written(
    layers: Sequence[Layer], places: Sequence[str], dtypes: Sequence[str] | None = None
) -> list[ExportedLayer]:
    dtypes = dtypes or [layer.dtype.name for layer in layers]
    return [
        ExportedLayer(layer.name, layer.shape, dtype, place)
        for layer, dtype, place in zip(layers, dtypes, places, strict=True)
    ]


def _blocks(layers: Sequence[Layer]) -> Iterator[slice]:
    """Rows such that their values in all of `layers` are up to BLOCK_BYTES, in whole chunks where they can be."""
    chunk = max(layer.chunks[0] for layer in layers)
    rows = max(1, BLOCK_BYTES // sum(layer.nbytes // len(layer) for layer in layers))
    if rows >= chunk:
        rows -= rows % chunk
    elif len(layers) == 1:
        rows = chunk  # a chunk is decoded whole in any case
    return (slice(start, start + rows) for start in range(0, len(layers[0]), rows))


def _distinct(names: Sequence[str], taken: Sequence[str] = ()) -> list[str]:
    """The same names, those that are taken or there before with a number; letters' case makes no difference."""
    used, made = {name.casefold() for name in taken}, []
    for name in names:
        numbers = (f"{name}-{number}" for number in range(2, len(names) + len(taken) + 2))
        made.append(next(one for one in (name, *numbers) if one.casefold() not in used))
        used.add(made[-1].casefold())
    return made


# --------------------------------------------------------------------------------------------------- the place of it


def _check_target(target: Path, to: str, overwrite: bool) -> None:
    """Raises OutputError for a name that the format's readers would not take, and for what may not be replaced."""
    form = FORMATS[to]
    if form.suffixes and target.suffix.lower() not in form.suffixes:
        raise OutputError(f"{target}: {to} makes a file whose name ends in {' or '.join(form.suffixes)}")
    if not form.suffixes and target.suffix.lower() in (".npy", ".npz", ".h5"):
        raise OutputError(f"{target}: {to} makes a directory, with one file a layer; name it without {target.suffix}")
    if not target.exists():
        return
    if not overwrite:
        raise OutputError(f"{target} exists; --overwrite replaces it, -o names another")
    try:
        about = form.about(target)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):  # it is something else
        about = {}
    if not isinstance(about, dict) or about.get("format") != MARK:
        raise OutputError(f"{target} exists and is no export to {to}; name another place, or remove it yourself")


@contextlib.contextmanager
def _published(target: Path) -> Iterator[Path]:
    """A temporary name beside `target` for a file or a directory, which gets that name when the block ends well."""
    temporary, aside = durable.temporary_name(target), durable.temporary_name(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # A folder that was set aside may be all that is left of an earlier export.
        shards.remove_dead(target, directories=target.exists())
        yield temporary
        if target.is_dir():  # one that holds something is not replaced by a rename
            target.rename(aside)
        durable.publish(temporary, target)
        shards.remove_dead(target, directories=True)
    except OSError as error:
        raise durable.disk_error(target, error) from error
    except (NoSpace, OutputError) as error:
        raise type(error)(str(error).replace(temporary.name, target.name)) from error
    finally:
        if aside.exists() and not target.exists():
            aside.rename(target)
        for left in (temporary, aside):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):  # what went wrong first is told
                    left.unlink(missing_ok=True)


@contextlib.contextmanager
def _durable(path: Path) -> Iterator[BinaryIO]:
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


# --------------------------------------------------------------------------------------------------------------- npy


def _write_npy(job: _Job, folder: Path) -> list[ExportedLayer]:
    """One .npy a layer; rows.csv, one line a row; index.json, which layer is in which file.

    Written from the front, not through a memory map: a full disk is then an error, and not the end of the process.
    """
    folder.mkdir()
    files = [f"{place}.npy" for place in _distinct([_file_name(name) for name in job.names])]
    written = _written(job.layers, files)
    for layer, name in zip(job.layers, files, strict=True):
        with _durable(folder / name) as file:
            header = {"descr": layer.dtype.str, "fortran_order": False, "shape": layer.shape}
            np.lib.format.write_array_header_1_0(file, header)
            for rows in job.blocks([layer]):
                file.write(layer[rows].data)
    columns: dict[str, Any] = {"sample": job.acts.samples, "key": job.acts.keys, "status": job.acts.status}
    columns |= {name: list(map(_cell, values)) for name, values in job.columns.items()}
    with _durable(folder / "rows.csv") as file:
        text = io.TextIOWrapper(file, "utf-8", newline="")
        csv.writer(text, lineterminator="\n").writerows(itertools.chain([columns], zip(*columns.values(), strict=True)))
        text.detach()
    with _durable(folder / "index.json") as file:
        file.write(strict_json.dumps(job.about(written), indent=1).encode())
    return written


def _cell(value: Label) -> Any:
    """Of a table of text: lists as JSON."""
    return strict_json.dumps(value) if isinstance(value, (list, dict)) else value


def _file_name(layer: str) -> str:
    """Letters that every file system takes, and not too many of them; no hidden file, and none that looks an option."""
    plain = re.sub(r"[^A-Za-z0-9._=@-]", "_", layer)[:200]
    return f"_{plain}" if plain[0] in ".-" else plain


def _about_npy(folder: Path) -> Any:
    return schema.load((folder / "index.json").read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------- safetensors


def _write_safetensors(job: _Job, path: Path) -> list[ExportedLayer]:
    """One tensor a layer; the columns as JSON in the metadata: keys, status, sample, and labels where there are any.

    Eight bytes of length, a header in JSON, the tensors one after the other (github.com/huggingface/safetensors): the
    library itself would want all of them in memory. Wide types first, so that each lies where its type wants it.
    """
    layers = sorted(job.layers, key=lambda layer: -layer.dtype.itemsize)
    places = dict(zip(job.names, _distinct(job.names, ["__metadata__"]), strict=True))
    written = _written(job.layers, list(places.values()))
    columns: dict[str, Any] = {
        "keys": job.acts.keys.tolist(),
        "status": job.acts.status.tolist(),
        "sample": job.acts.samples.tolist(),
    }
    if (labels := job.labels) is not None:
        columns["labels"] = labels
    if others := {name: values for name, values in job.columns.items() if name != "label"}:
        columns["columns"] = others
    metadata = {_ABOUT: job.about(written), **columns}
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
            f"the keys of {len(job.acts):,} images take {byte_count(len(said))}, and safetensors reads a header of up "
            f"to {byte_count(MOST_HEADER_BYTES)}: export to npy or parquet"
        )
    with _durable(path) as file:
        file.write(len(said).to_bytes(8, "little") + said)
        for layer in layers:
            for rows in job.blocks([layer]):
                file.write(layer[rows].data)
    return written


def _about_safetensors(path: Path) -> Any:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = schema.load(file.read(min(size, MOST_HEADER_BYTES)).decode())
    return schema.load(header["__metadata__"][_ABOUT])


# ----------------------------------------------------------------------------------------------------------- parquet


def _write_parquet(job: _Job, path: Path) -> list[ExportedLayer]:
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
    places = _distinct(job.names, list(columns))
    written = _written(layers, places, dtypes)
    fields = [arrow.field(name, kind) for name, kind in kinds.items()]
    for layer, dtype, place in zip(layers, dtypes, places, strict=True):
        kind = arrow.list_(arrow.from_numpy_dtype(dtype), math.prod(layer.shape[1:]))
        said = {
            "layer": layer.name,
            "shape": strict_json.dumps(layer.shape[1:]),
            "axes": strict_json.dumps(layer.axes[1:]),
        }
        fields.append(arrow.field(place, kind, metadata={"layer": layer.name} | said))
    table = arrow.schema(fields, metadata={_ABOUT: strict_json.dumps(job.about(written))})
    with (
        _durable(path) as file,
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
    """The values of a column that the source brought along as arrow takes them, and their type."""
    form = form_of(values)
    if form is None or not form.is_numeric:
        texts = [value if value is None or isinstance(value, str) else str(_cell(value)) for value in values]
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


def _about_parquet(path: Path) -> Any:
    return schema.load(_pyarrow()[1].read_schema(path).metadata[_ABOUT.encode()].decode())


# ------------------------------------------------------------------------------------------------------------ netcdf


def _write_netcdf(job: _Job, path: Path) -> list[ExportedLayer]:
    """A file of `store`, which is netCDF-4, with the layers wanted; gzip. `fm.open` reads it, too.

    float16, on which netCDF-C crashes, becomes float32. Columns and statistics come along, those of shards merged.
    """
    acts = job.acts
    parts = [file.path for file in acts._files]
    stats, attrs, smaller = totals.merged(parts, job.names)
    info = acts._files[0].info()
    written = _written(
        job.layers,
        [f"/layers/{layout.escape_name(name)}" for name in job.names],
        [_netcdf_spec(layer).dtype for layer in job.layers],
    )
    extra = {**info.extra, **({"smaller_batches": smaller} if smaller else {}), _ABOUT: job.about(written)}
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
        ThreadPoolExecutor(acts._threads) as pool,
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


def _about_netcdf(path: Path) -> Any:
    return schema.load(contents.read_text(path, "/", _ABOUT))


# --------------------------------------------------------------------------------------------------------------- rdm


def _write_rdm(job: _Job, path: Path) -> list[ExportedLayer]:
    """One matrix a layer over the images that did not fail, for `rsatoolbox.rdm.load_rdm`."""
    rows = job.acts.rows()
    pairs = len(rows) * (len(rows) - 1) // 2
    total = 8 * pairs * len(job.names)
    if not pairs:
        raise ConfigError(f"{job.acts.path}: {len(rows)} of {len(job.acts)} images have values; an RDM needs two")
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
        patterns[name] = values[rows] if is_number else [str(_cell(value)) for value in values[rows].tolist()]
    about = job.about(written)
    said = {name: str(about[name]) for name in ("source", "model", "precision") if name in about}
    write_rdms(
        path,
        {layer.name: job.matrix(layer, rows) for layer in job.layers},
        pairs,
        METRICS[job.metric],
        said | {_ABOUT: strict_json.dumps(about)},
        patterns,
    )
    return written


def _about_rdm(path: Path) -> Any:
    return schema.load(contents.read_text(path, "/descriptors", _ABOUT))


@dataclass(frozen=True, slots=True)
class _Format:
    """`suffixes` of its files, none where it makes a directory."""

    suffixes: tuple[str, ...]
    write: Callable[[_Job, Path], list[ExportedLayer]]
    about: Callable[[Path], Mapping[str, Any]]


FORMATS: Mapping[str, _Format] = {
    "npy": _Format((), _write_npy, _about_npy),
    "safetensors": _Format((".safetensors",), _write_safetensors, _about_safetensors),
    "parquet": _Format((".parquet",), _write_parquet, _about_parquet),
    "netcdf": _Format((".nc",), _write_netcdf, _about_netcdf),
    "rdm": _Format((".h5", ".hdf5"), _write_rdm, _about_rdm),
}
