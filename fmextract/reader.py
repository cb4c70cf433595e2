"""`open(path)` → Activations: numpy-like layers over one file or a directory of shards.

HDF5 is asked only for what describes the data (names, shapes, where each chunk lies), and is closed again at once. The
chunks are then read with `os.pread` and decoded by several threads: no lock of libhdf5 is held, nothing that must not
be shared is open across a fork, and memory is the result plus one chunk a thread.

Whatever a mutated file makes libhdf5 raise comes out as a FormatError or DamagedError; the caller's own mistakes in
indexing come out as numpy's IndexError and TypeError.
"""

from __future__ import annotations

import bisect
import contextlib
import difflib
import functools
import hashlib
import itertools
import math
import operator
import os
import stat
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import h5py
import numpy as np
import numpy.typing as npt

from fmextract.common.boxes import cell_box
from fmextract.common.system import cpus
from fmextract.common.text import byte_count
from fmextract.common.text import count as plural
from fmextract.errors import ConfigError, DamagedError, FmextractError, FormatError
from fmextract.records import Field, FileInfo, Label, LayerSpec
from fmextract.selection import AxisIndex, Part, Selection, count, crossing, cut, per_axis, selection_of, stretches
from fmextract.storage import codecs, contents, layer_stats, layout, schema, writer
from fmextract.storage.columns import Form, as_array, common_form, decode_column, encode_column
from fmextract.storage.shards import INDEX, PLAN, load_index, load_records, read_sealed
from fmextract.storage.validation import check_heaps

if TYPE_CHECKING:
    from fmextract.feeding import LayerDataset

Array: TypeAlias = npt.NDArray[Any]


Rows: TypeAlias = npt.NDArray[np.int64]


SIGNATURE = b"\x89HDF\r\n\x1a\n"


_COUNTED = ("count", "zero_fraction", "nonfinite")
"""Statistics that the summary of a run is made of."""


FILES_OPEN = 32
"""Open shards: each costs one file descriptor and 20 bytes a chunk."""


RECENT_BYTES = 16 * 2**20
"""Chunks kept, so that a loop over single rows decodes a chunk of many images once."""


DATASET_BYTES = 256 * 2**20
"""The same for a torch Dataset, which is read in any order, again and again; and how much of it is held as a whole."""


ALONE_BYTES = 2**20
"""What is copied from the page cache before a thread of the pool has begun."""


SEEK_BYTES = 32 * 2**10
"""What one more read of a stretch of a chunk costs, in bytes read (3 µs at 10 GB/s, from the page cache)."""


FEW = 4
"""Of the values of a chunk at most one in so many: these alone are picked when the chunk is met for the first time."""


class NotInMemory(ConfigError):
    """A reduction of a layer, which is no array in memory; the message says what to use."""


class UnknownStatistic(ConfigError, AttributeError):
    """A statistic that a layer does not have; the message names those that it has."""


class UnknownName(ConfigError, KeyError):
    """A layer, or the key of an image, that is not in the file; the message names the closest ones."""

    __str__ = Exception.__str__  # KeyError's shows the message in quotes, with its line ends escaped


def open(path: str | os.PathLike[str], *, threads: int | None = None, cache: int = RECENT_BYTES) -> Activations:
    """The activations in one .h5 file, or in a directory of shards.

    `threads` decode chunks (all of the process's CPUs when None), and about `cache` bytes of chunks that hold more
    than was asked for are kept. Raises FormatError where there is no such file, it
    is not fmextract's, is newer, or is a run in progress, and DamagedError where its content is not what was written.
    """
    place = Path(path).expanduser()
    return Activations(place, _parts(place), threads, cache)


def just_written(path: Path) -> Activations:
    """The same, for the run that has just written `path`: the file that it finished last is not looked through again.

    Of thousands of layers that takes seconds. What was written by another process, or before, is, as `open` does it.
    """
    return Activations(path, [part._replace(own=True) for part in _parts(path)], None, RECENT_BYTES)


def _parts(place: Path) -> list[_Part]:
    return _listed_shards(place.absolute()) if place.is_dir() else [_Part(place.absolute())]


class Activations:
    """What `open` returns: the layers by name, and the columns with one entry a row (an image). A context manager.

    Safe to use from several threads. Columns are numpy arrays, loaded when first asked for. It can be pickled, as can
    its layers: the path travels, and the files are opened again on the other side.
    """

    def __init__(self, path: Path, parts: Sequence[_Part], threads: int | None, cache: int) -> None:
        self.path = path
        self._place = path.absolute()  # the working directory may be another one later
        self._files = _Files(parts)
        self._given_threads = threads
        self._threads = threads or cpus()
        self._recent = _Recent(cache)
        self._made: dict[str, Layer] = {}
        first = self._files[0]
        self.layers: tuple[str, ...] = tuple(first.contents.layers)
        self.attrs: Mapping[str, Any] = first.contents.attrs
        """The root attributes; see `config`, `preprocess` and `versions` for those that hold JSON."""

    def __enter__(self) -> Activations:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def held(self) -> contextlib.AbstractContextManager[None]:
        """Keep an output of one file open in HDF5 within, for many small questions: each would open it anew."""
        return self._files.held()

    def close(self) -> None:
        """Close the files and forget what is kept of them; reading afterwards raises ConfigError."""
        self._files.close()
        self._recent.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened_again, (self._place, self._given_threads, self._recent.nbytes, self._files.content())

    def __len__(self) -> int:
        """Rows, failed ones included."""
        return self._files.rows

    def __getitem__(self, name: str) -> Layer:
        """A layer by name; raises UnknownName, a KeyError, that shows the closest names."""
        if name not in self._made:
            if name not in self.layers:
                raise UnknownName(f"no layer {name!r} in {self.path}{_closest(name, self.layers)}")
            self._made[name] = Layer(self, name)
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self.layers

    def __iter__(self) -> Iterator[str]:
        """The names of the layers, like `layers`."""
        return iter(self.layers)

    @functools.cached_property
    def keys(self) -> Array:
        """Relative paths or tar keys, str (N) as objects."""
        return self._column("key")

    @functools.cached_property
    def samples(self) -> Rows:
        """Row numbers in the whole source, int64 (N): from 0, but for one shard opened alone."""
        return self._column("sample")

    @functools.cached_property
    def status(self) -> npt.NDArray[np.uint8]:
        """uint8 (N), see `records.Status`; rows other than 0 hold NaN."""
        return self._column("status")

    @functools.cached_property
    def messages(self) -> Array:
        """What went wrong, str (N) as objects; empty where nothing did."""
        return self._column("message")

    @functools.cached_property
    def heights(self) -> npt.NDArray[np.int32]:
        """Height of the original image, int32 (N)."""
        return self._column("height")

    @functools.cached_property
    def widths(self) -> npt.NDArray[np.int32]:
        """Width of the original image, int32 (N)."""
        return self._column("width")

    @functools.cached_property
    def file_sizes(self) -> npt.NDArray[np.int64]:
        """Bytes of the file that each row was made of, int64 (N); -1 where it was no file, or the output does not say.

        Outputs of before there were digests do not say.
        """
        return np.concatenate([_column_or(file, "file_size", np.int64(-1)) for file in self._files])

    @functools.cached_property
    def file_digests(self) -> Array:
        """XXH3 (128 bits, in hex) of that file, str (N) as objects; empty where `file_sizes` is -1."""
        return np.concatenate([_column_or(file, "file_digest", "") for file in self._files])

    @functools.cached_property
    def labels(self) -> Array | None:
        """The source's labels, None where it has none: int64 (N), float64 (N), or text (N) as objects.

        Where an image has none: -1 (NaN, if there are labels of -1), NaN, an empty text. Lists of as many numbers each
        are (N, number); other lists, and mappings, objects.
        """
        return self._brought_array(None) if None in self._brought else None

    @functools.cached_property
    def columns(self) -> Mapping[str, Array]:
        """What the source says of its images besides, by name: as `labels`, but NaN where a number is missing."""
        return {name: self._brought_array(name) for name in self._brought if name is not None}

    def listed(self, name: str | None = None) -> list[Label] | None:
        """One of `columns`, or the labels, as plain Python, None where there is none; None for what is not there."""
        if name not in self._brought:
            return None
        return [value for file in self._files for value in file.brought(name)]

    def row(self, key: str) -> int:
        """The row of an image; raises UnknownName, a KeyError."""
        try:
            return self._row_of[key]
        except KeyError:
            raise UnknownName(f"no image {key!r} in {self.path}{_closest(key, self._row_of)}") from None

    @property
    def config(self) -> Mapping[str, Any]:
        """Everything needed to repeat the run."""
        return self._said("fmextract_config")

    @property
    def preprocess(self) -> Mapping[str, Any]:
        """How a photo became an input, the fields of `records.Preprocess`."""
        return self._said("preprocess")

    @property
    def images(self) -> Mapping[str, str]:
        """Where the run found its files: the folder that their paths begin at, `absolute` and `relative` to the output.

        Empty where the images were no files.
        """
        return self._said("images")

    @property
    def label_names(self) -> Sequence[str]:
        """What the labels 0, 1, … are called, as the `classes` of a Dataset say; empty where nobody says it."""
        return tuple(self._files[0].contents.said.get("label_names", ()))

    @property
    def throughput(self) -> Mapping[str, Any] | None:
        """How fast the run was, over all its shards: `images`, `seconds`, `images_per_second`, and `busy_seconds` of
        each stage, summed over its threads. None where the file does not say."""
        total = total_throughput(file.contents.said.get("throughput") for file in self._files)
        if total is None or not total["seconds"]:
            return None
        return {**total, "images_per_second": round(total["images"] / total["seconds"], 3)}

    @property
    def versions(self) -> Mapping[str, Any]:
        """Versions of the libraries that made the file."""
        return self._said("versions")

    @property
    def input_size(self) -> tuple[int, int] | None:
        """(height, width) of the network's input, None where the file does not say."""
        for step in ("crop", "resize"):
            size = self.preprocess.get(step)
            if isinstance(size, list):
                return size[0], size[1]
        return None

    def rows(self, include_failed: bool = False) -> Rows:
        """The rows with status 0, or all: int64, ascending."""
        return np.arange(len(self)) if include_failed else np.flatnonzero(self.status == 0)

    def batches(
        self, names: Sequence[str] | None = None, size: int = 256, include_failed: bool = False
    ) -> Iterator[tuple[Rows, dict[str, Array]]]:
        """(rows int64 (n), {name: array (n, …)}) over several layers, all of them when None; see `Layer.batches`."""
        layers = [self[name] for name in (self.layers if names is None else names)]
        for rows in _batched(self.rows(include_failed), size):
            yield rows, {layer.name: layer[rows] for layer in layers}

    def dataset(
        self,
        *names: str,
        rows: npt.ArrayLike | None = None,
        include_failed: bool = False,
        labels: bool | str = False,
        cache: int = DATASET_BYTES,
    ) -> LayerDataset:
        """A map-style torch Dataset of (row, one tensor a name), all layers when there is none.

        With `labels` the items end in the label of the row, or in its value of the column of that name: a number, or a
        tensor; of text the number of the class among `dataset.classes`. Rows without one are left out.
        Of `rows` (numbers, or a mask), of all when None; those with a status other than 0 are left out unless asked
        for. Item i is row `dataset.rows[i]`. It pickles, and opens the files anew in every process. What is no larger
        than `cache` bytes is read by the first batch, and held; else batches are read as they come, and about `cache`
        bytes of chunks of several rows are kept, in each process. `dataset.batches` is a sampler that spares a
        DataLoader the copying together of rows, and shuffles chunk-wise what does not fit.
        """
        from fmextract.feeding import LayerDataset

        layers = [self[name] for name in names or self.layers]
        targets, classes, there = self._targets(None if labels is True else labels) if labels is not False else _NONE
        wanted = np.arange(len(self))
        if rows is not None:
            chosen = np.asarray(rows)
            wanted = wanted[chosen if chosen.size else chosen.astype(np.int64)]  # numpy takes [] for floats
        if not include_failed:
            wanted = wanted[self.status[wanted] == 0]
        if there is not None:
            wanted = wanted[there[wanted]]
        of_a_row = {layer: layer.nbytes // max(1, len(layer)) for layer in layers}
        shared = [layer for layer in layers if layer.chunks[0] > 1]
        together = max((layer.chunks[0] for layer in shared), default=1)
        return LayerDataset(
            functools.partial(_open_shared, self._place, self._threads, cache, self._files.content()),
            [layer.name for layer in layers],
            wanted,
            fits=len(wanted) * sum(of_a_row.values()) <= cache,
            together=together,
            # Half of what can be kept: a batch on the border between two windows needs the chunks of both.
            window=max(1, cache // max(1, 2 * together * sum(of_a_row[layer] for layer in shared))),
            targets=targets,
            classes=classes,
        )

    def _targets(self, name: str | None) -> tuple[Array, tuple[str, ...], npt.NDArray[np.bool_]]:
        """A number, or as many for each row, what texts stand behind numbers, and which rows have a value at all."""
        values = self.listed(name)
        if values is None:
            known = ", ".join(map(repr, self.columns)) or "none"
            what = "labels" if name is None else f"column {name!r}"
            raise ConfigError(f"{self.path} has no {what}. Columns of images: {known}")
        form = self._brought[name]
        if form.kind == "json":
            raise ConfigError(f"{self.path}: labels that are lists of different lengths, or mappings, make no tensor")
        there = np.array([value is not None for value in values])
        classes: tuple[str, ...] = ()
        if form.kind == "text":
            classes = tuple(sorted({str(value) for value in values if value is not None}))
            number: dict[Any, Label] = {text: place for place, text in enumerate(classes)}
            values, form = [number.get(value) for value in values], Form("int")
        nothing: Any = 0 if form.length is None else [0] * form.length
        return (
            np.asarray(encode_column([nothing if value is None else value for value in values], form)),
            classes,
            there,
        )

    def totals(self) -> dict[str, Totals]:
        """What is counted of every layer, over all rows. Each file is opened once, however many there are."""
        totals = dict.fromkeys(self.layers, Totals())
        for file in self._files:
            with file.hdf5():
                totals = {name: known.plus(file.totals(name)) for name, known in totals.items()}
        return totals

    def info(self) -> dict[str, Any]:
        """A summary as plain data: what `fmextract info` shows."""
        failed = np.flatnonzero(self.status)
        stored = self._stored_bytes()
        layers = [self[name]._info(stored[name]) for name in self.layers]
        return {
            "path": str(self.path),
            "format": f"{self.attrs.get('format')} {self.attrs.get('format_version')}",
            "files": len(self._files),
            "model": self.attrs.get("model"),
            "weights_sha256": self.attrs.get("weights_sha256"),
            "precision": self.attrs.get("precision"),
            "created": self.attrs.get("created"),
            "throughput": self.throughput,
            "rows": len(self),
            "failed": len(failed),
            "failures": [
                {"row": int(r), "key": self.keys[r], "status": int(self.status[r]), "message": self.messages[r]}
                for r in failed[:5]
            ],
            "bytes_raw": sum(layer["bytes_raw"] for layer in layers),
            "bytes_stored": sum(layer["bytes_stored"] for layer in layers),
            "layers": layers,
        }

    def __repr__(self) -> str:
        if self._files.closed:
            return f"<Activations {str(self.path)!r}, closed>"
        head = f"<Activations {str(self.path)!r}: {plural(len(self), 'row')}, {plural(len(self.layers), 'layer')}"
        made_by = ", ".join(str(self.attrs[k]) for k in ("model", "precision") if k in self.attrs)
        wide = max((len(name) for name in self.layers), default=0)
        # A network has hundreds of layers, and each costs a look into the file: show the two ends.
        shown = self.layers if len(self.layers) <= 24 else (*self.layers[:12], "…", *self.layers[-12:])
        lines = (f"  {n:{wide}}  {self[n]._summary()}" if n in self.layers else f"  {n}" for n in shown)
        return "\n".join([head + (f", {made_by}" if made_by else ""), *lines]) + ">"

    @functools.cached_property
    def _row_of(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(self.keys)}

    @functools.cached_property
    def _brought(self) -> Mapping[str | None, Form]:
        """The forms of the columns that the source brought along, over all files; None is the labels'."""
        titles = dict.fromkeys(title for file in self._files for title in file.contents.brought)
        found: dict[str | None, Form] = {}
        for title in titles:
            there = [file.contents.brought[title] for file in self._files if title in file.contents.brought]
            form = common_form(one.form for one in there)
            assert form is not None
            found[title] = form
        return found

    def _brought_array(self, name: str | None) -> Array:
        form, whole = self._brought[name], name is None
        there = [file.contents.brought.get(name) for file in self._files]
        as_stored = form.kind != "json" and (form.kind != "int" or not form.gaps or (whole and form.missing == -1))
        if as_stored and all(one is not None and one.form.kind == form.kind for one in there):
            return np.concatenate([file.column(one.name) for file, one in zip(self._files, there, strict=True) if one])
        return as_array(self.listed(name) or [], form, whole=whole)

    def _column(self, name: str) -> Array:
        return np.concatenate([file.column(name) for file in self._files])

    def _stored_bytes(self) -> Counter[str]:
        """Of every layer, over all files, each of them opened once."""
        total: Counter[str] = Counter()
        for file in self._files:
            with file.hdf5():
                total.update({name: file.stored(name).nbytes for name in self.layers})
        return total

    def _said(self, name: str) -> Mapping[str, Any]:
        """What a root attribute that holds JSON means."""
        return self._files[0].contents.said.get(name, {})  # type: ignore[no-any-return]


_NONE: tuple[None, tuple[str, ...], None] = (None, (), None)
"""No targets."""


def _column_or(file: _File, name: str, missing: Any) -> Array:
    """A column, or `missing` for each row of a file that does not have it."""
    if name in file.contents.columns:
        return file.column(name)
    return np.full(len(file.rows), missing, object if isinstance(missing, str) else None)


def total_throughput(files: Iterable[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """The sum of what some files say in `throughput`; None where none of them does."""
    images, seconds, busy = 0, 0.0, Counter[str]()
    for said in files:
        if said is not None:
            images, seconds = images + said["images"], seconds + said["seconds"]
            busy.update(said["busy_seconds"])
    if not images:
        return None
    rounded = {stage: round(spent, 3) for stage, spent in busy.items()}
    return {"images": images, "seconds": round(seconds, 3), "busy_seconds": rounded}


class Totals(NamedTuple):
    """Of a layer: bytes on the disk, finite values of images without an error, zeros among them, values not finite.

    `values` and `zeros` are 0 where the channel axis is not known.
    """

    nbytes: int = 0
    values: float = 0.0
    zeros: float = 0.0
    nonfinite: int = 0

    def plus(self, other: Totals) -> Totals:
        return Totals(
            self.nbytes + other.nbytes,
            self.values + other.values,
            self.zeros + other.zeros,
            self.nonfinite + other.nonfinite,
        )


@dataclass(frozen=True, slots=True)
class Top:
    """One of the strongest images of a channel.

    `y` and `x` are the cell in the feature map, None for a layer without them. `box` is what that cell sees of the
    network's input, in its pixels and clipped to it: (left, top, right, bottom), as PIL's `crop` takes it; None where
    the receptive field is not defined.
    """

    row: int
    key: str
    value: float
    y: int | None
    x: int | None
    box: tuple[float, float, float, float] | None


class Stats:
    """Statistics of a layer: one attribute a name in `names`, each an array (channels,) or (channels, k)."""

    def __init__(self, layer: str, values: Mapping[str, Array]) -> None:
        self._layer = layer
        self._values = dict(values)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._values)

    def __getattr__(self, name: str) -> Array:
        try:
            return self.__dict__["_values"][name]  # type: ignore[no-any-return]
        except KeyError:
            have = ", ".join(self.__dict__.get("_values", ()))
            raise UnknownStatistic(
                f"no statistic {name!r} for {self.__dict__.get('_layer')}; there are: {have}"
            ) from None

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._values]

    def __repr__(self) -> str:
        return f"<Stats of {self._layer}: {', '.join(self.names)}>"


class Layer:
    """One layer as an array of shape (N, …) that is read when indexed.

    Indexing is numpy's: integers, slices with any step, Ellipsis, lists, integer arrays and boolean masks on any axis
    (several arrays are paired, as in numpy). The result is a new array. Only the chunks that hold something wanted are
    read. Raises IndexError and TypeError like numpy, DamagedError where the stored bytes are broken.
    """

    def __init__(self, acts: Activations, name: str) -> None:
        self._acts = acts
        self.name = name
        first = acts._files[0].stored(name)
        self.spec = first.spec
        self.attrs: Mapping[str, Any] = first.attrs
        self.shape: tuple[int, ...] = (len(acts), *first.spec.shape)
        self.axes: tuple[str, ...] = ("sample", *first.spec.axes)
        self.chunks = first.spec.chunk
        self.dtype = np.dtype(first.spec.dtype)
        self.codec = first.codec
        self._alike = first.alike
        self._chunk_bytes = math.prod(self.chunks) * self.dtype.itemsize
        self._as_it_is = first.codec == "none" and self.chunks[1:] == self.shape[1:]
        self._last = -2  # the chunk along the rows that was read last
        for start in acts._files.starts:
            if start % self.chunks[0]:
                raise FormatError(
                    f"{acts.path}: a file starts at row {start}, within a chunk of {self.chunks[0]} rows of {name}"
                )

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all values, not compressed."""
        return self.size * self.dtype.itemsize

    @property
    def module(self) -> str:
        """The path of the module in the model."""
        return self.spec.module

    @property
    def module_type(self) -> str:
        return self.spec.module_type

    @property
    def numbers(self) -> tuple[str, ...]:
        """The selectors by number that mean its module, as `conv#52` and `trunk#48`; none where the file has none."""
        return tuple(str(self.attrs.get("number", "")).split())

    @property
    def compute_dtype(self) -> str:
        """The type in the forward pass (torch's name)."""
        return self.spec.compute_dtype

    @property
    def field(self) -> Field | None:
        """The receptive field, None where it is not defined."""
        return self.spec.field

    def __reduce__(self) -> tuple[Any, ...]:
        return operator.getitem, (self._acts, self.name)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Array]:
        return (self[row] for row in range(len(self)))

    def _not_in_memory(self, *args: Any, **options: Any) -> Any:
        """What `numpy.mean(layer)` calls: it would read all of it at once, with failed rows, which are NaN."""
        name = f"acts[{self.name!r}]"
        raise NotInMemory(
            f"{name} is read from its file when indexed, and has no reductions of its own. Over all images that did "
            f"not fail, by channel: {name}.stats.mean (or std, min, max, …). Part by part: for rows, values in "
            f"{name}.batches(). Of everything at once, {byte_count(self.nbytes)}: {name}[acts.rows()].mean()"
        )

    mean = std = var = sum = min = max = prod = any = all = argmin = argmax = _not_in_memory

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError("a layer is read from its file: it cannot become an array without a copy")
        values: Array = self[...]
        return values if dtype is None else values.astype(dtype, copy=False)

    def __getitem__(self, key: Any) -> Any:
        key = self._as_stretch(key)
        if self._as_it_is and isinstance(key, slice) and key.step in (None, 1):
            return self._stretch(range(*key.indices(len(self))))
        if self._as_it_is and type(key) is int and 0 <= key < len(self):
            return self._stretch(range(key, key + 1))[0]
        axes, place = per_axis(key, self.shape)
        arrays = [axis for axis, one in enumerate(axes) if isinstance(one, np.ndarray)]
        if len(arrays) > 1:
            return self._paired(axes, place)
        block = self._block([selection_of(one) for one in axes])
        if not arrays:
            return block[tuple(0 if isinstance(one, int) else slice(None) for one in axes)]
        (axis,) = arrays
        dropped = tuple(a for a, one in enumerate(axes) if isinstance(one, int))
        block = np.moveaxis(block.squeeze(dropped), axis - sum(a < axis for a in dropped), place)
        shape = axes[axis].shape  # type: ignore[union-attr]
        return block.reshape(block.shape[:place] + shape + block.shape[place + 1 :])

    def _as_stretch(self, key: Any) -> Any:
        """Rows that follow each other, as most batches are, as a slice: of pooled features the index costs the most."""
        if key is Ellipsis:
            return slice(None)
        if not (isinstance(key, np.ndarray) and key.ndim == 1 and key.dtype.kind == "i" and len(key)):
            return key
        first, last = int(key[0]), int(key[-1])
        follows = first >= 0 and last < len(self) and last - first == len(key) - 1 and bool((key[1:] > key[:-1]).all())
        return slice(first, last + 1) if follows else key

    def batches(self, size: int = 256, include_failed: bool = False) -> Iterator[tuple[Rows, Array]]:
        """(rows int64 (n), maps (n, …)) in the order of the rows, n = `size` but for the last.

        Rows with a status other than 0 are left out unless asked for. Memory is one batch and a few chunks.
        """
        for rows in _batched(self._acts.rows(include_failed), size):
            first, last = int(rows[0]), int(rows[-1])
            yield rows, self[first : last + 1] if last - first == len(rows) - 1 else self[rows]

    @functools.cached_property
    def stats(self) -> Stats:
        """Statistics per channel over the rows with status 0; ConfigError where the layer has none."""
        merged = _merged_stats(self)
        if not merged:
            raise ConfigError(f"{self._acts.path}: no statistics for {self.name}: its channel axis is not known")
        return Stats(f"{self.name} of {self._acts.path}", merged)

    @functools.cached_property
    def effective_dimension(self) -> layer_stats.EffectiveDimension | None:
        """In how many directions the images differ (see `moments`); None where that was not kept.

        Read from the layer's attributes; in a directory, computed of its shards' covariances.
        """
        known = layer_stats.EffectiveDimension.of_attrs(self.attrs)
        if known is not None:
            return known
        with _damage(self._acts.path):
            return layer_stats.effective_dimension(_merged_stats(self, covariance=True))

    def top(self, channel: int, k: int = 9) -> list[Top]:
        """The `k` images with the highest values in a channel, strongest first: as many as were kept (--top).

        Raises IndexError for a channel that the layer does not have, ConfigError where nothing was kept.
        """
        stats = self.stats
        if "top_value" not in stats.names:
            raise ConfigError(f"{self._acts.path}: no strongest images were kept for {self.name} (extract with --top)")
        channels = len(stats.top_value)
        if not -channels <= channel < channels:
            raise IndexError(f"channel {channel} is out of bounds for {self.name} with {channels} channels")
        value, sample, y, x = (getattr(stats, f"top_{part}")[channel][:k] for part in ("value", "sample", "y", "x"))
        first = self._acts._files[0].start
        return [
            self._one_top(int(s) - first, float(v), int(b), int(a))
            for v, s, b, a in zip(value, sample, y, x, strict=True)
            if s >= 0
        ]

    def info(self) -> dict[str, Any]:
        """A summary as plain data."""
        return self._info(sum(file.stored(self.name).nbytes for file in self._acts._files))

    def _info(self, stored: int) -> dict[str, Any]:
        return {
            "name": self.name,
            "module": self.module,
            "module_type": self.module_type,
            "shape": list(self.shape),
            "axes": list(self.axes),
            "dtype": self.dtype.name,
            "compute_dtype": self.compute_dtype,
            "chunk": list(self.chunks),
            "codec": self.codec,
            "bytes_raw": self.nbytes,
            "bytes_stored": stored,
            "ratio": self.nbytes / stored if stored else None,
        }

    def __repr__(self) -> str:
        return f"<Layer {self.name!r}: {self._summary()}>"

    def _summary(self) -> str:
        return f"{self.dtype.name} {self.shape} ({', '.join(self.axes)})"

    def _one_top(self, row: int, value: float, y: int, x: int) -> Top:
        if not 0 <= row < len(self):
            raise DamagedError(f"{self._acts.path}: the statistics of {self.name} name row {row} of {len(self)}")
        key = str(self._acts.keys[row])
        if y < 0 or x < 0:
            return Top(row, key, value, None, None, None)
        box = _seen(self.field, (y, x), self._acts.input_size) if self.field else None
        return Top(row, key, value, y, x, box)

    def _stretch(self, rows: range) -> Array:
        """Rows that follow each other of a layer that is stored as it is: read straight to where they belong."""
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        images = self.chunks[0]
        chunks = range(rows.start // images, -(-rows.stop // images)) if rows else range(0)

        def read(chunk: int) -> None:
            first = chunk * images
            begin, end = max(rows.start, first), min(rows.stop, first + images)
            room = out[begin - rows.start : end - rows.start]
            with self._chunk_at((chunk, *(0,) * (self.ndim - 1))) as (file, stored, place):
                file.read_rows(stored, place, [range(begin - first, end - first)], room)

        _in_parallel(read, chunks, len(chunks), min(self._acts._threads, 1 + out.nbytes // ALONE_BYTES))
        return out

    def _block(self, selections: Sequence[Selection]) -> Array:
        """The values at the crossing of one selection an axis, in their order: a new array."""
        out = np.empty(tuple(len(one) for one in selections), self.dtype)
        parts = [cut(one, chunk) for one, chunk in zip(selections, self.chunks, strict=True)]
        number = math.prod(map(len, parts))
        ahead = self._ahead(parts, number)
        work = functools.partial(self._fill, out)
        _in_parallel(work, itertools.chain(itertools.product(*parts), ahead), number + len(ahead), self._acts._threads)
        return out

    def _ahead(self, parts: Sequence[Sequence[Part]], number: int) -> list[tuple[Part, ...]]:
        """The next chunks along the rows as parts of which nothing is wanted yet, for threads that have nothing to do.

        Where reading goes in order and comes to a chunk that must be decoded: so small batches are decoded in parallel.
        """
        idle = self._acts._threads - number
        if idle <= 0 or not number or self.codec in (None, "none"):
            return []
        first, last = parts[0][0].chunk, parts[0][-1].chunk
        in_order, self._last = first - self._last in (0, 1), last
        wanted = itertools.product(*([part.chunk for part in one] for one in parts))
        if not in_order or all((self.name, coords) in self._acts._recent for coords in wanted):
            return []
        room = self._acts._recent.nbytes // (2 * self._chunk_bytes)
        rows = min(idle, room) // math.prod(map(len, parts[1:]))
        stop = min(last + 1 + rows, -(-len(self) // self.chunks[0]))
        nothing = slice(0, 0, 1)
        return list(itertools.product((Part(i, nothing, nothing) for i in range(last + 1, stop)), *parts[1:]))

    def _fill(self, out: Array, parts: tuple[Part, ...]) -> None:
        """Read what is wanted of one chunk, and put it where it belongs in `out`."""
        coords, theres, heres = zip(*parts, strict=True)
        there = crossing(theres, out.shape)
        kept = self._acts._recent.get((self.name, coords))
        if kept is None and all(map(_is_whole, heres, self.chunks)) and all(isinstance(one, slice) for one in there):
            room = out[there]
            if room.flags.c_contiguous:
                with self._chunk_at(coords) as (file, stored, place):
                    file.read(stored, place, room)
                return
        out[there] = self._part(coords, heres, kept)

    def _part(self, coords: tuple[int, ...], heres: tuple[slice | Rows, ...], kept: Array | bytes | None) -> Array:
        """What is wanted of a chunk, from what is `kept` of it: never write to it.

        Where a few values are wanted of a chunk that is met for the first time, they are picked of what its compressor
        gave, and that is kept; else all its values are joined, and kept.
        """
        key, at = (self.name, coords), crossing(heres, self.chunks)
        if kept is None:
            counts = [count(here, n) for here, n in zip(heres, self.chunks, strict=True)]
            with self._chunk_at(coords) as (file, stored, place):
                if stored.codec == "none" and counts[1:] == list(self.chunks[1:]):
                    rows = stretches(heres[0], self.chunks[0])
                    if len(rows) * SEEK_BYTES <= self._chunk_bytes:
                        part = np.empty((counts[0], *self.chunks[1:]), self.dtype)
                        file.read_rows(stored, place, rows, part)
                        return part
                kept = file.unpack(stored, place)
            if isinstance(kept, bytes) and 0 < FEW * math.prod(counts) <= math.prod(self.chunks):
                self._acts._recent.put(key, kept)
                return self._pick(kept, at)
        if isinstance(kept, bytes):
            kept = self._pick(kept, ())
            self._acts._recent.put(key, kept)
        return kept[at]  # type: ignore[no-any-return]

    def _pick(self, unpacked: bytes, at: tuple[Any, ...]) -> Array:
        return codecs.pick(unpacked, codec=self.codec or "none", dtype=self.dtype.name, shape=self.chunks, at=at)

    @contextlib.contextmanager
    def _chunk_at(self, coords: tuple[int, ...]) -> Iterator[tuple[_File, _Stored, tuple[int, ...]]]:
        """The file with the chunk at `coords` of the grid over all files, and its place there; damage gets its rows."""
        row = coords[0] * self.chunks[0]
        file = self._acts._files.holding(row)
        stored = file.stored(self.name)
        if stored.alike != self._alike:
            raise FormatError(
                f"{file.path}: layer {self.name} has another shape, type or codec here than in the first shard"
            )
        try:
            yield file, stored, (coords[0] - file.rows.start // self.chunks[0], *coords[1:])
        except DamagedError as error:
            last = min(row + self.chunks[0], file.rows.stop) - 1
            raise DamagedError(f"{file.path}: layer {self.name}, rows {row} to {last}: {error}") from error

    def _paired(self, axes: Sequence[AxisIndex], place: int) -> Array:
        """Several index arrays: paired like numpy's, one chunk along the first of their axes at a time."""
        fixed = [axis for axis, one in enumerate(axes) if not isinstance(one, range)]
        free = [axis for axis, one in enumerate(axes) if isinstance(one, range)]
        try:
            points = np.broadcast_arrays(*(axes[axis] for axis in fixed))
        except ValueError:
            shapes = " ".join(str(np.shape(axes[axis])) for axis in fixed)
            raise IndexError(f"shape mismatch: indexing arrays could not be broadcast together: {shapes}") from None
        shape = points[0].shape
        flat = [np.ascontiguousarray(one).reshape(-1).astype(np.int64) for one in points]
        out = np.empty((len(flat[0]), *(len(axes[axis]) for axis in free)), self.dtype)  # type: ignore[arg-type]
        number = flat[0] // self.chunks[fixed[0]]
        order = np.argsort(number, kind="stable")
        for group in np.split(order, np.flatnonzero(np.diff(number[order])) + 1):
            selections: list[Selection] = [selection_of(one) for one in axes]
            places = []
            for axis, one in zip(fixed, flat, strict=True):
                selections[axis], at = np.unique(one[group], return_inverse=True)
                places.append(at)
            block = np.moveaxis(self._block(selections), fixed, range(len(fixed)))
            out[group] = block[tuple(places)]
        out = out.reshape(shape + out.shape[1:])
        return np.moveaxis(out, range(len(shape)), range(place, place + len(shape)))


def _is_whole(here: slice | Rows, size: int) -> bool:
    return isinstance(here, slice) and here == slice(0, size, 1)


def _merged_stats(layer: Layer, covariance: bool = False) -> dict[str, Array]:
    """The statistics of a layer over all rows, empty where there are none.

    Those of several shards are joined one by one, in their order.
    """
    path = layer._acts.path
    merged: dict[str, Array] = {}
    for file in layer._acts._files:
        part = file.stats(layer.name, covariance)
        if not part:
            return {}
        with _damage(path):
            merged = layer_stats.merge([merged, part]) if merged else part
    return merged


def _seen(field: Field, cell: tuple[int, int], size: tuple[int, int] | None) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of what a cell sees of the input, clipped to its (height, width) where known."""
    top, left, bottom, right = cell_box(field, cell, size)
    return left, top, right, bottom


# ----------------------------------------------------------------------------------------------------------- the files


@dataclass(frozen=True)
class _Stored:
    """One layer in one file: where its chunks lie. `codec` None leaves a chunk to libhdf5."""

    spec: LayerSpec
    attrs: Mapping[str, Any]
    codec: str | None
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    masks: npt.NDArray[np.uint32]
    """Filters that were not applied to a chunk, by bit."""

    @property
    def nbytes(self) -> int:
        return int(self.sizes.sum())

    @functools.cached_property
    def chunk_bytes(self) -> int:
        """Of a chunk's values."""
        return math.prod(self.spec.chunk) * np.dtype(self.spec.dtype).itemsize

    @functools.cached_property
    def alike(self) -> tuple[Any, ...]:
        """What all shards of an output have in common."""
        return self.spec.shape, self.spec.dtype, self.spec.chunk, self.codec


class _Part(NamedTuple):
    """One file of an output: its rows (all that are there, if None), and its content's digest as the index knows it.

    `own`: what this process knows of the file, since it has just written it, is trusted.
    """

    path: Path
    rows: range | None = None
    digest: str | None = None
    own: bool = False


class _File:
    """One open .h5 file: a descriptor, its names and root attributes, and the layers met so far.

    `rows` are its rows among all that are open. HDF5 itself is open only inside `hdf5()`.
    """

    def __init__(self, part: _Part) -> None:
        path, rows, digest, own = part
        self.path = path
        self._lock = threading.Lock()
        self._opening = threading.RLock()
        self._opened: h5py.File | None = None
        self._users = 0
        self._stored: dict[str, _Stored] = {}
        self.fd = _descriptor(path)
        weakref.finalize(self, os.close, self.fd)
        self._identity = _identity(self.fd)
        self.nbytes = os.fstat(self.fd).st_size
        check_heaps(self.fd, path)
        with self.hdf5() as file:
            known = writer.take_written(self._identity) if own else None
            self.contents = known or contents.validate(file)
            self.start = int(file["sample"][0])
        if not 0 <= self.start <= schema.LARGEST:
            raise DamagedError(f"{path}: /sample begins at row {self.start}")
        if digest is not None and self.contents.attrs.get("content_digest", digest) != digest:
            raise FormatError(
                f"{path} is another shard than {INDEX} lists, or was replaced since: open the output again,"
                " or verify it"
            )
        count = self.contents.rows
        self.rows = range(count) if rows is None else rows
        if len(self.rows) != count:
            raise FormatError(f"{path} has {count} rows where rows {self.rows.start} to {self.rows.stop - 1} belong")

    @contextlib.contextmanager
    def hdf5(self) -> Iterator[h5py.File]:
        """The file in HDF5, for a moment. Whatever it raises within comes out as a FormatError or DamagedError.

        Within another it is the same: the one around many small questions keeps the file from being opened for each.
        """
        with _damage(self.path):
            with self._opening:
                if self._opened is None:
                    self._opened = self._open_hdf5()
                file = self._opened
                self._users += 1
            try:
                yield file
            finally:
                with self._opening:
                    self._users -= 1
                    if not self._users:
                        self._opened = None
                        file.close()

    def _open_hdf5(self) -> h5py.File:
        file = _hdf5_file(self.path)
        if _identity(file.id.get_vfd_handle()) != self._identity:
            file.close()
            raise FormatError(f"{self.path} was replaced or changed since it was opened: open it again")
        return file

    def column(self, name: str) -> Array:
        """One entry a row; strings as objects."""
        with self.hdf5() as file:
            dataset = file[name]
            if dataset.chunks is not None:
                self._complete(dataset.id, dataset.shape, dataset.chunks, name)
            strings = h5py.check_string_dtype(dataset.dtype) is not None
            values: Array = np.asarray(dataset.asstr()[:] if strings else dataset[:])
        if name == "sample" and not np.array_equal(values, np.arange(self.start, self.start + len(values))):
            raise DamagedError(f"{self.path}: /sample does not count its rows")
        return values

    def brought(self, name: str | None) -> list[Label]:
        """A column that the source brought along, None where there is no value, and for every row without a column."""
        found = self.contents.brought.get(name)
        if found is None:
            return [None] * len(self.rows)
        return decode_column(self.column(found.name), found.form, f"{self.path}: /{found.name}")

    def totals(self, layer: str) -> Totals:
        """What is counted of a layer. Raises DamagedError where its statistics are missing."""
        stored = self.stored(layer)
        if stored.spec.channel_axis is None:
            return Totals(stored.nbytes, nonfinite=int(stored.attrs.get("nonfinite", 0)))
        stats = self.stats(layer, only=_COUNTED)
        if missing := [name for name in _COUNTED if name not in stats]:
            raise DamagedError(f"{self.path}: layer {layer} has no statistics {', '.join(missing)}")
        count = np.asarray(stats["count"], np.float64)
        zeros = float(np.nansum(stats["zero_fraction"] * count))  # NaN in a channel without values
        return Totals(stored.nbytes, float(count.sum()), zeros, int(np.sum(stats["nonfinite"])))

    def stats(self, layer: str, covariance: bool = False, only: Iterable[str] | None = None) -> dict[str, Array]:
        """The statistics of a layer by name, empty where it has none; its covariance, of megabytes, only on demand.

        Where `only` some are wanted, the others are not read.
        """
        with self.hdf5() as file:
            path, spec = f"/layers/{layout.escape_name(layer)}/stats", self.contents.layers[layer].spec
            if spec.channel_axis is None:
                return {}
            left_out = () if covariance else layer_stats.COVARIANCE
            channels, values = spec.shape[spec.channel_axis], contents.read_statistics(file, path, left_out, only)
            return schema.statistics(values, channels, f"{self.path}: {path}")

    def coordinates(self, layer: str) -> dict[str, Array]:
        """The values of the scales along the axes of a layer, by the axis."""
        with self.hdf5() as file:
            group = file["layers"][layout.escape_name(layer)]
            return {axis: np.asarray(group[axis][()]) for axis in self.contents.layers[layer].spec.axes}

    def info(self) -> FileInfo:
        """The root attributes as they were written."""
        return contents.info_of(self.contents.attrs, self.contents.said)

    def stored(self, layer: str) -> _Stored:
        """Where the chunks of a layer lie; looked up once."""
        with self._lock:
            if layer not in self._stored:
                with self.hdf5() as file:
                    self._stored[layer] = self._look_up(file, layer)
            return self._stored[layer]

    def read(self, stored: _Stored, place: tuple[int, ...], out: Array) -> None:
        """Decode one chunk into `out`, C-contiguous. Raises DamagedError (without saying where), MissingExtra."""
        if stored.codec is None or stored.masks[place]:
            out[...] = self._through_hdf5(stored, place)
        elif stored.codec == "none":
            self._read_at(out, stored, place)
        else:
            payload = self._payload(stored, place)
            with _damage(self.path):
                codecs.decode(payload, codec=stored.codec, dtype=stored.spec.dtype, values=out.size, out=out)

    def unpack(self, stored: _Stored, place: tuple[int, ...]) -> bytes | Array:
        """One chunk as `codecs.unpack` gives it, or its values where libhdf5 must read it. Raises as `read` does."""
        if stored.codec is None or stored.masks[place]:
            return self._through_hdf5(stored, place)
        payload = self._payload(stored, place)
        with _damage(self.path):
            return codecs.unpack(payload, codec=stored.codec, nbytes=stored.chunk_bytes)

    def read_rows(self, stored: _Stored, place: tuple[int, ...], rows: Sequence[range], out: Array) -> None:
        """Stretches of rows of a chunk that is stored as it is, one after the other. Raises as `read` does."""
        one, at = stored.chunk_bytes // stored.spec.chunk[0], 0
        for some in rows:
            self._read_at(out[at : at + len(some)], stored, place, some.start * one)
            at += len(some)

    def _read_at(self, out: Array, stored: _Stored, place: tuple[int, ...], start: int = 0) -> None:
        """Fill `out` with what lies `start` bytes into a chunk that is stored as it is."""
        size = int(stored.sizes[place])
        if size != stored.chunk_bytes:
            raise DamagedError(f"a chunk of {stored.chunk_bytes} bytes has {size}")
        there = os.preadv(self.fd, [out.data], int(stored.offsets[place]) + start)
        if there != out.nbytes:
            raise DamagedError(f"the file ends within a chunk: {there} of {out.nbytes} bytes are there")

    def _payload(self, stored: _Stored, place: tuple[int, ...]) -> bytes:
        """The bytes of a chunk as they are in the file."""
        size = int(stored.sizes[place])
        payload = os.pread(self.fd, size, int(stored.offsets[place]))
        if len(payload) != size:
            raise DamagedError(f"the file ends within a chunk: {len(payload)} of {size} bytes are there")
        return payload

    def _through_hdf5(self, stored: _Stored, place: tuple[int, ...]) -> Array:
        """A chunk that is not of our making; what lies beyond the last row is not defined."""
        if stored.sizes[place] > codecs.most_stored(stored.chunk_bytes):
            raise DamagedError(f"a chunk of {stored.chunk_bytes} bytes has {stored.sizes[place]}")
        region = tuple(slice(i * n, (i + 1) * n) for i, n in zip(place, stored.spec.chunk, strict=True))
        with self.hdf5() as file:
            values = file["layers"][layout.escape_name(stored.spec.name)]["activation"][region]
        out = np.empty(stored.spec.chunk, stored.spec.dtype)
        out[tuple(map(slice, values.shape))] = values
        return out

    def _look_up(self, file: h5py.File, layer: str) -> _Stored:
        # Not by `file[…]`: what h5py asks on the way is most of the time where there are many layers.
        dataset = h5py.h5d.open(file.id, f"/layers/{layout.escape_name(layer)}/activation".encode())
        spec, attrs = self.contents.layers[layer]
        plist, kind = dataset.get_create_plist(), dataset.dtype
        grid = self._complete(dataset, dataset.shape, plist.get_chunk(), f"layer {layer}")
        offsets, sizes, masks = np.zeros(grid, np.int64), np.full(grid, -1, np.int64), np.zeros(grid, np.uint32)

        def note(chunk: Any) -> None:
            place = tuple(i // n for i, n in zip(chunk.chunk_offset, spec.chunk, strict=True))
            offsets[place], sizes[place], masks[place] = chunk.byte_offset, chunk.size, chunk.filter_mask

        dataset.chunk_iter(note)
        if sizes.min() < 0 or offsets.min() < 0 or (offsets + sizes).max() > self.nbytes:
            raise DamagedError(f"{self.path}: layer {layer} has chunks that lie outside the file")
        codec = codecs.filters_to_codec(plist, kind.itemsize) if kind.isnative else None
        return _Stored(spec, attrs, codec, offsets, sizes, masks)

    def _complete(
        self, dataset: h5py.h5d.DatasetID, shape: tuple[int, ...], chunk: tuple[int, ...], name: str
    ) -> tuple[int, ...]:
        """The grid of chunks of a dataset. Raises DamagedError where one is not there: HDF5 would show fill values."""
        grid = layout.chunk_grid(shape, chunk)
        there = dataset.get_num_chunks()
        if there != math.prod(grid):
            raise DamagedError(f"{self.path}: {name} has {there} of {math.prod(grid)} chunks")
        return grid


class _Files:
    """The files of an output in the order of their rows; a bounded number of them is open at a time."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        self._parts = list(parts)
        self._open: OrderedDict[int, _File] = OrderedDict()
        self._lock = threading.Lock()
        self.closed = False
        if len(self._parts) == 1:
            self._parts = [self._parts[0]._replace(rows=self[0].rows)]
        self.starts = [part.rows.start for part in self._parts if part.rows is not None]
        self.rows = max((part.rows.stop for part in self._parts if part.rows is not None), default=0)

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, number: int) -> _File:
        with self._lock:
            if self.closed:
                raise ConfigError(f"{self._parts[0].path} was closed: open it again")
            if number not in self._open:
                self._open[number] = _File(self._parts[number])
            self._open.move_to_end(number)
            if len(self._open) > FILES_OPEN:
                self._open.popitem(last=False)  # closed when the last thread that reads from it lets go of it
            return self._open[number]

    def __iter__(self) -> Iterator[_File]:
        return (self[number] for number in range(len(self)))

    def holding(self, row: int) -> _File:
        """The file that holds a row."""
        return self[bisect.bisect_right(self.starts, row) - 1]

    def content(self) -> str:
        """What tells this output from another one at its place: the digests in it. ConfigError where it is closed."""
        first = self[0].contents.attrs.get("content_digest")
        return hashlib.sha256(repr([first, *(part.digest for part in self._parts)]).encode()).hexdigest()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        with self[0].hdf5() if len(self) == 1 else contextlib.nullcontext():
            yield

    def close(self) -> None:
        with self._lock:
            self.closed = True
            self._open.clear()


def _descriptor(path: Path) -> int:
    """An open descriptor of a file that starts like HDF5. Raises FormatError."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise FormatError(f"{path} is not a regular file")
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        partial = path.with_name(path.name + ".partial")
        if (partial / PLAN).exists():
            raise _in_progress(partial, path) from None
        raise FormatError(f"no such file or directory: {path}") from None
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read: {error}") from error
    if os.pread(fd, len(SIGNATURE), 0) != SIGNATURE:
        os.close(fd)
        raise FormatError(f"{path} is not an HDF5 file")
    return fd


def _hdf5_file(path: Path) -> h5py.File:
    """Opened without a lock, since locks fail on network file systems, and nobody changes a finished file."""
    try:
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        if "locking flag" not in str(error):
            raise
        return h5py.File(path, "r")  # this process has it open with locks: libhdf5 wants all openings alike


def _identity(fd: int) -> tuple[int, ...]:
    """What changes when the content of a path does."""
    return writer.file_identity(os.fstat(fd))


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    """The boundary to libraries that read bytes which may be anything: whatever they raise is a DamagedError."""
    try:
        yield
    except FmextractError:
        raise
    except Exception as error:
        # libhdf5 and h5py raise OSError, RuntimeError, KeyError, ValueError, TypeError, … for a broken file.
        raise DamagedError(f"{path} cannot be read, it is damaged: {str(error) or type(error).__name__}") from error


def _listed_shards(folder: Path) -> list[_Part]:
    """The shards of a finished directory. Raises FormatError for one that is not finished, or not ours."""
    if not (folder / INDEX).exists() and (folder / PLAN).exists():
        raise _in_progress(folder, folder)
    records = load_index(folder)
    if not records:
        raise FormatError(f"{folder}: index.json lists no shards")
    return [_Part(folder / record.name, record.rows, record.content_digest) for record in records]


def _in_progress(folder: Path, output: Path) -> FormatError:
    """What to say of a run that is at work, or was ended: how many rows are stored, not only how many shards."""
    with _damage(folder):
        records = load_records(folder)
        shards = [range(*ends) for ends in read_sealed(folder / PLAN)["shards"]]
        rows, total = sum(len(record.rows) for record in records), sum(map(len, shards))
        failed = sum(record.failed for record in records)
    said = f"{rows:,} of {total:,} images are stored" + (f", {failed:,} of them failed" if failed else "")
    return FormatError(
        f"{output} is a run in progress: {said} ({len(records)} of {len(shards)} shards). "
        "The same extract command resumes it"
    )


# --------------------------------------------------------------------------------------------------- threads and torch


class _Recent:
    """The chunks met last, decoded or as `codecs.unpack` gives them: up to `nbytes` of them, at least one."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._room = nbytes
        self._chunks: OrderedDict[tuple[str, tuple[int, ...]], Array | bytes] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, key: tuple[str, tuple[int, ...]]) -> bool:
        return key in self._chunks

    def get(self, key: tuple[str, tuple[int, ...]]) -> Array | bytes | None:
        with self._lock:
            if key in self._chunks:
                self._chunks.move_to_end(key)
            return self._chunks.get(key)

    def put(self, key: tuple[str, tuple[int, ...]], chunk: Array | bytes) -> None:
        with self._lock:
            self._room += _size(self._chunks.pop(key, b"")) - _size(chunk)
            self._chunks[key] = chunk
            while self._room < 0 and len(self._chunks) > 1:
                self._room += _size(self._chunks.popitem(last=False)[1])

    def clear(self) -> None:
        with self._lock:
            self._chunks.clear()
            self._room = self.nbytes


def _size(chunk: Array | bytes) -> int:
    return len(chunk) if isinstance(chunk, bytes) else chunk.nbytes


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """The threads that all readers of this process share."""
    return ThreadPoolExecutor(cpus(), thread_name_prefix="fmextract-read")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


def _in_parallel(work: Callable[[Any], None], tasks: Iterable[Any], count: int, threads: int) -> None:
    """work(task) for every one of `count` tasks, on this thread and `threads` - 1 shared ones.

    Returns, or raises the first error, when no thread works any more. This thread takes tasks too: so a pool that is
    busy for others costs time only, and a single task costs no pool.
    """
    todo = iter(tasks)
    lock = threading.Lock()
    stopped = False

    def drain() -> None:
        nonlocal stopped
        while True:
            with lock:
                task = None if stopped else next(todo, None)
            if task is None:
                return
            try:
                work(task)
            except BaseException:
                stopped = True
                raise

    helpers = [_pool().submit(drain) for _ in range(min(threads, count) - 1)]
    if not helpers:
        drain()
        return
    try:
        drain()
    except BaseException:
        stopped = True  # an interrupt may also come between two tasks
        raise
    finally:
        wait([helper for helper in helpers if not helper.cancel()])
    for helper in helpers:
        if not helper.cancelled():
            helper.result()


def _batched(rows: Rows, size: int) -> Iterator[Rows]:
    if size < 1:
        raise ConfigError(f"expected a batch size of at least 1, got {size}")
    return (rows[start : start + size] for start in range(0, len(rows), size))


ALL_NAMED = 12
"""Names that are all told where none is close to the one that was asked for."""


def _closest(name: object, names: Iterable[str]) -> str:
    some = [str(known) for known in itertools.islice(names, 10_000)]
    holding = [known for known in some if str(name).lower() in known.lower()]  # `tom` for `cats/tom.jpg`
    close = holding[:3] or difflib.get_close_matches(str(name), some, n=3, cutoff=0.5)
    if not close and 0 < len(some) <= ALL_NAMED:
        return f"; there are {', '.join(some)}"
    return f"; the closest are {', '.join(close)}" if close else ""


def _opened_again(path: Path, threads: int | None, cache: int, content: str) -> Activations:
    """What was pickled. Raises FormatError where the files are others by now."""
    acts = open(path, threads=threads, cache=cache)
    if acts._files.content() != content:
        acts.close()
        raise FormatError(f"{path} is not the output that was opened first: it was replaced since. Open it again")
    return acts


def _open_shared(path: Path, threads: int, cache: int, content: str, processes: int) -> Activations:
    """For one of several processes that read at once."""
    return _opened_again(path, max(1, threads // processes), cache, content)
