"""Stored layers in the forms that other tools read: npy, safetensors, parquet, netCDF, and RDMs of rsatoolbox.

Rows go through in blocks of BLOCK_BYTES: memory does not grow with the number of images, but for their keys. Every
format keeps every row in its place, so that row r of an array is row r of the output it came from; a failed row holds
NaN (0 in integer layers), and its status stands beside it. Only `rdm` leaves failed rows out: they have no distance.
What is written appears under its name at once, or not at all. No torch.

Each format is one function `(job, temporary) → where each layer went`, and one that reads back what `_about` wrote.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fmextract.common import text
from fmextract.common.progress import Quiet
from fmextract.errors import ConfigError, NoSpace, OutputError
from fmextract.exporting.dissimilarity import METRICS
from fmextract.exporting.job import MARK, ExportedLayer, Job
from fmextract.exporting.netcdf import about_netcdf, write_netcdf
from fmextract.exporting.npy import about_npy, write_npy
from fmextract.exporting.parquet import about_parquet, write_parquet
from fmextract.exporting.rdm import about_rdm, write_rdm
from fmextract.exporting.safetensors import about_safetensors, write_safetensors
from fmextract.reading import activations
from fmextract.reading.activations import Activations
from fmextract.reading.select import select_layers
from fmextract.records import Progress
from fmextract.storage import durable, shards


@dataclass(frozen=True, slots=True, repr=False)
class Exported(text.Tabled):
    """What `export` wrote.

    Attributes:
        path: The file or directory.
        to: The format.
        rows: Images of the source, failed ones included.
        failed: Images without values.
        bytes: Of everything written.
        metric: Of dissimilarities, else None.
        layers: Name, shape, type and place of each layer.
    """

    path: str
    to: str
    rows: int
    failed: int
    bytes: int
    metric: str | None
    layers: tuple[ExportedLayer, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def table(self, width: int | None = None) -> str:
        """Return what was written, and where each layer is in it, as `fmextract export` shows it."""
        held = [f"{text.count(self.rows, 'image')} in {text.printable(self.path)}", text.byte_count(self.bytes)]
        if self.metric:
            held.append(self.metric)
        lines = [", ".join(held)]
        if self.failed:
            what = "left out" if self.metric else "NaN, or 0 where integers are stored; status says which"
            lines.append(f"{text.count(self.failed, 'image')} without values: {what}")
        rows = [(layer.name, text.shape(layer.shape), layer.dtype, layer.place) for layer in self.layers]
        return "\n".join([*lines, "", text.table(("layer", "shape", "type", "place"), rows, width=width)])

    def __repr__(self) -> str:
        what = f"{text.count(len(self.layers), 'layer')}, {text.byte_count(self.bytes)}"
        return f"<Exported: {text.printable(self.path)}, {self.to}, {what}>"


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
    job = Job(acts, names, to, metric or next(iter(METRICS)), told)
    with _published(target) as temporary:
        told.start(acts.num_rows * len(names), 0)
        try:
            written = form.write(job, temporary)
        finally:
            told.finish()
    return Exported(
        path=str(target),
        to=to,
        rows=acts.num_rows,
        failed=int((acts.status != 0).sum()),
        bytes=sum(path.stat().st_size for path in (target.iterdir() if target.is_dir() else [target])),
        metric=job.metric if to == "rdm" else None,
        layers=tuple(written),
    )


# --------------------------------------------------------------------------------------------------- the place of it


def _check_target(target: Path, to: str, overwrite: bool) -> None:
    """Raise OutputError for a name that the format's readers would not take, and for what may not be replaced."""
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


@dataclass(frozen=True, slots=True)
class _Format:
    """`suffixes` of its files, none where it makes a directory."""

    suffixes: tuple[str, ...]
    write: Callable[[Job, Path], list[ExportedLayer]]
    about: Callable[[Path], Mapping[str, Any]]


FORMATS: Mapping[str, _Format] = {
    "npy": _Format((), write_npy, about_npy),
    "safetensors": _Format((".safetensors",), write_safetensors, about_safetensors),
    "parquet": _Format((".parquet",), write_parquet, about_parquet),
    "netcdf": _Format((".nc",), write_netcdf, about_netcdf),
    "rdm": _Format((".h5", ".hdf5"), write_rdm, about_rdm),
}
