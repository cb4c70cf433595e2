"""`open(path)` → Activations: numpy-like layers over one file or a directory of shards.

HDF5 is asked only for what describes the data (names, shapes, where each chunk lies), and is closed again at once. The
chunks are then read with `os.pread` and decoded by several threads: no lock of libhdf5 is held, nothing that must not
be shared is open across a fork, and memory is the result plus one chunk per thread.

What a damaged file makes libhdf5 raise comes out as a FormatError or DamagedError; the caller's own mistakes in
indexing come out as numpy's IndexError and TypeError.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fmextract.common.system import cores
from fmextract.common.text import count as plural
from fmextract.errors import ConfigError, FmextractError, FormatError
from fmextract.reading.chunks import RECENT_BYTES, Recent
from fmextract.reading.counts import total_throughput
from fmextract.reading.files import File, Files, Part, listed_shards
from fmextract.reading.indexing import Array, Rows, batched
from fmextract.reading.layer import DATASET_BYTES, Layer
from fmextract.reading.parallel import _pool
from fmextract.reading.select import UnknownName, closest, meant_layers
from fmextract.records import Label
from fmextract.storage.columns import Form, as_array, common_form, encode_column
from fmextract.storage.layer_stats import Totals

if TYPE_CHECKING:
    from fmextract.reading.dataset import LayerDataset


class Keys(np.ndarray[Any, np.dtype[Any]]):
    """An array of the keys of images, in the place where mappings have a method, which dict(acts) would call."""

    def __call__(self) -> Any:
        raise TypeError(
            "acts.keys is the array of the images' keys, one per row. The layers: acts.layers, in order; "
            "acts.items(), with their names; dict(acts.items())"
        )


def open(path: str | os.PathLike[str], *, threads: int | None = None, cache: int = RECENT_BYTES) -> Activations:
    """The activations in one .h5 file, or in a directory of shards.

    `threads` decode chunks (all of the process's CPUs when None), and about `cache` bytes of chunks that hold more
    than was asked for are kept. Raises FormatError where there is no such file, it
    is not fmextract's, is newer, or is a run in progress, and DamagedError where its content is not what was written.
    """
    place = Path(path).expanduser()
    return Activations(place, _parts(place), threads, cache)


def just_written(path: Path) -> Activations:
    """Open what this process has just written: the file that it finished last is not checked again.

    With thousands of layers a check takes seconds. Files of other processes, or earlier ones, are checked as by `open`.
    """
    return Activations(path, [part._replace(own=True) for part in _parts(path)], None, RECENT_BYTES)


def _parts(place: Path) -> list[Part]:
    return listed_shards(place.absolute()) if place.is_dir() else [Part(place.absolute())]


class Activations:
    """What `open` returns: the layers by name, and the columns with one entry per row (an image). A context manager.

    A mapping of names to layers, in the order of execution: `len`, iteration and `in` are of the layers, `items` and
    `values` go over them. Only `keys` is something else: the array of the keys of the images, of which there are
    `num_rows`.

    Safe to use from several threads. Columns are numpy arrays, loaded when first asked for. It can be pickled, as can
    its layers: the path travels, and the files are opened again on the other side. A notebook shows a table of the
    layers.
    """

    def __init__(self, path: Path, parts: Sequence[Part], threads: int | None, cache: int) -> None:
        self.path = path
        self.place = path.absolute()  # the working directory may be another one later
        self.files = Files(parts)
        """The .h5 files that it is read from, in the order of their rows."""
        self._given_threads = threads
        self.threads = threads or cores()
        """How many threads read and decode at once."""
        self.recent = Recent(cache)
        """Chunks that were read lately, decoded."""
        self._made: dict[str, Layer] = {}
        first = self.files[0]
        self.layers: tuple[str, ...] = tuple(first.contents.layers)
        self.attrs: Mapping[str, Any] = first.contents.attrs
        """The root attributes; see `config`, `preprocess` and `versions` for those that hold JSON."""

    def __enter__(self) -> Activations:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def held(self) -> contextlib.AbstractContextManager[None]:
        """Keep an output of one file open in HDF5 within the block, for many small reads: each would open it again."""
        return self.files.held()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self.files.closed

    def close(self) -> None:
        """Close the files and drop what is kept of them; reading afterwards raises ConfigError."""
        self.files.close()
        self.recent.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened_again, (self.place, self._given_threads, self.recent.nbytes, self.files.content())

    @property
    def num_rows(self) -> int:
        """Images, failed ones included."""
        return self.files.rows

    def __getitem__(self, name: str) -> Layer:
        """Return a layer by name, or by a selector that means just one: `conv#20`. Raises UnknownName, a KeyError."""
        if name not in self._made:
            if name not in self.layers:
                return self[self._one_meant(name)]
            self._made[name] = Layer(self, name)
        return self._made[name]

    def _one_meant(self, text: str) -> str:
        if not isinstance(text, str):
            raise UnknownName(f"no layer {text!r} in {self.path}{closest(text, self.layers)}")
        name, *others = self.select(text)
        if others:
            raise UnknownName(f"{text!r} means {plural(len(others) + 1, 'layer')} of {self.path}: {name}, {others[0]}…")
        return name

    def select(self, *selectors: str) -> tuple[str, ...]:
        """Return the names of the layers that selectors mean, in their order: as `conv#-1`, `type:Conv2d`, `layer?`.

        A selector means what it meant to the run. Raises UnknownName, a KeyError, for one that means none.
        """
        layers = {name: layer.spec for name, layer in self.files[0].contents.layers.items()}
        wanted = {name for text in selectors for name in meant_layers(text, layers, self.path)}
        return tuple(name for name in self.layers if name in wanted)

    def __contains__(self, name: object) -> bool:
        return name in self.layers

    def __len__(self) -> int:
        """Layers, as iteration gives them. Rows: `num_rows`."""
        return len(self.layers)

    def __iter__(self) -> Iterator[str]:
        """The names of the layers, like `layers`."""
        return iter(self.layers)

    def values(self) -> Iterator[Layer]:
        """The layers, in the order of execution."""
        return (self[name] for name in self.layers)

    def items(self) -> Iterator[tuple[str, Layer]]:
        """(name, layer) of each; `dict(acts.items())` is a dict of them."""
        return ((name, self[name]) for name in self.layers)

    @functools.cached_property
    def keys(self) -> Array:
        """Relative paths or tar keys of the images, str (N) as objects."""
        return self._column("key").view(Keys)

    @property
    def first_row(self) -> int:
        """The number of its first row in the whole source: 0, except for one shard opened alone."""
        return self.files[0].start

    @functools.cached_property
    def samples(self) -> Rows:
        """Row numbers in the whole source, int64 (N): from 0, except for one shard opened alone."""
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
        return np.concatenate([_column_or(file, "file_size", np.int64(-1)) for file in self.files])

    @functools.cached_property
    def file_digests(self) -> Array:
        """XXH3 (128 bits, in hex) of that file, str (N) as objects; empty where `file_sizes` is -1."""
        return np.concatenate([_column_or(file, "file_digest", "") for file in self.files])

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
        """Return a column, or the labels, as plain Python, None where there is no value; None for an unknown column."""
        if name not in self._brought:
            return None
        return [value for file in self.files for value in file.brought(name)]

    def row(self, key: str) -> int:
        """The row of an image; raises UnknownName, a KeyError."""
        try:
            return self._row_of[key]
        except KeyError:
            raise UnknownName(f"no image {key!r} in {self.path}{closest(key, self._row_of)}") from None

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
        """What the labels 0, 1, … are called, by the `classes` of a Dataset; empty where they are not known."""
        return tuple(self.files[0].contents.said.get("label_names", ()))

    @property
    def throughput(self) -> Mapping[str, Any] | None:
        """How fast the run was, over all its shards: `images`, `seconds`, `images_per_second`, and `busy_seconds` of
        each stage, summed over its threads. None where the file does not say."""
        total = total_throughput(file.contents.said.get("throughput") for file in self.files)
        if total is None or not total["seconds"]:
            return None
        return {**total, "images_per_second": round(total["images"] / total["seconds"], 3)}

    @property
    def versions(self) -> Mapping[str, Any]:
        """Versions of the libraries that made the file."""
        return self._said("versions")

    @property
    def input_size(self) -> tuple[int, int] | None:
        """(height, width) of the network's input, None where the file does not say, or the input is no image."""
        shape = self.config.get("identity", {}).get("input_shape")
        if shape is not None:
            return (shape[1], shape[2]) if len(shape) == 3 else None
        for step in ("crop", "resize"):
            size = self.preprocess.get(step)
            if isinstance(size, list):
                return size[0], size[1]
        return None

    def rows(self, include_failed: bool = False) -> Rows:
        """The rows with status 0, or all: int64, ascending."""
        return np.arange(self.num_rows) if include_failed else np.flatnonzero(self.status == 0)

    def batches(
        self, names: Sequence[str] | None = None, size: int = 256, include_failed: bool = False
    ) -> Iterator[tuple[Rows, dict[str, Array]]]:
        """Yield (rows int64 (n), {name: array (n, …)}) over several layers, all if None; see `Layer.batches`."""
        layers = {name: self[name] for name in (self.layers if names is None else names)}
        for rows in batched(self.rows(include_failed), size):
            yield rows, {name: layer[rows] for name, layer in layers.items()}

    def dataset(
        self,
        *names: str,
        rows: npt.ArrayLike | None = None,
        include_failed: bool = False,
        labels: bool | str = False,
        cache: int = DATASET_BYTES,
    ) -> LayerDataset:
        """Return a map-style torch Dataset of (row, one tensor per name), of all layers if none is named.

        With `labels` the items end in the label of the row, or in its value of the column of that name: a number, or a
        tensor; of text the number of the class among `dataset.classes`. Rows without one are left out.
        Of `rows` (numbers, or a mask), of all when None; those with a status other than 0 are left out unless asked
        for. Item i is row `dataset.rows[i]`. It pickles, and opens the files again in every process. What is no larger
        than `cache` bytes is read by the first batch, and held; else batches are read as they come, and about `cache`
        bytes of chunks of several rows are kept, in each process. `dataset.batches` is a sampler that spares a
        DataLoader the copying together of rows, and shuffles chunk-wise what does not fit.
        """
        from fmextract.reading.dataset import LayerDataset

        layers = [self[name] for name in names or self.layers]
        targets, classes, there = self._targets(None if labels is True else labels) if labels is not False else _NONE
        wanted = np.arange(self.num_rows)
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
            functools.partial(_open_shared, self.place, self.threads, cache, self.files.content()),
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
        for file in self.files:
            with file.hdf5():
                totals = {name: known.plus(file.totals(name)) for name, known in totals.items()}
        return totals

    def info(self) -> dict[str, Any]:
        """A summary as plain data: what `fmextract info` shows."""
        failed = np.flatnonzero(self.status)
        stored = self._stored_bytes()
        layers = [self[name].described(stored[name]) for name in self.layers]
        return {
            "path": str(self.path),
            "format": f"{self.attrs.get('format')} {self.attrs.get('format_version')}",
            "files": len(self.files),
            "model": self.attrs.get("model"),
            "weights_sha256": self.attrs.get("weights_sha256"),
            "precision": self.attrs.get("precision"),
            "created": self.attrs.get("created"),
            "throughput": self.throughput,
            "rows": self.num_rows,
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
        if self.closed:
            return f"<Activations {str(self.path)!r}, closed>"
        head = f"<Activations {str(self.path)!r}: {plural(self.num_rows, 'row')}, {plural(len(self.layers), 'layer')}"
        made_by = ", ".join(str(self.attrs[k]) for k in ("model", "precision") if k in self.attrs)
        wide = max((len(name) for name in self.layers), default=0)
        # A network has hundreds of layers, and each costs a look into the file: show the two ends.
        shown = self.layers if len(self.layers) <= 24 else (*self.layers[:12], "…", *self.layers[-12:])
        lines = (f"  {n:{wide}}  {self._line(n)}" if n in self.layers else f"  {n}" for n in shown)
        return "\n".join([head + (f", {made_by}" if made_by else ""), *lines]) + ">"

    def _line(self, name: str) -> str:
        """What `repr` says of a layer, also of one that cannot be read."""
        try:
            return self[name].summary()
        except FmextractError as error:
            return str(error)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from fmextract.reading.html import of_output

        return of_output(self)

    @functools.cached_property
    def _row_of(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(self.keys)}

    @functools.cached_property
    def _brought(self) -> Mapping[str | None, Form]:
        """The forms of the columns that the source brought along, over all files; None is the labels'."""
        titles = dict.fromkeys(title for file in self.files for title in file.contents.brought)
        found: dict[str | None, Form] = {}
        for title in titles:
            there = [file.contents.brought[title] for file in self.files if title in file.contents.brought]
            form = common_form(one.form for one in there)
            assert form is not None
            found[title] = form
        return found

    def _brought_array(self, name: str | None) -> Array:
        form, whole = self._brought[name], name is None
        there = [file.contents.brought.get(name) for file in self.files]
        as_stored = form.kind != "json" and (form.kind != "int" or not form.gaps or (whole and form.missing == -1))
        if as_stored and all(one is not None and one.form.kind == form.kind for one in there):
            return np.concatenate([file.column(one.name) for file, one in zip(self.files, there, strict=True) if one])
        return as_array(self.listed(name) or [], form, whole=whole)

    def _column(self, name: str) -> Array:
        return np.concatenate([file.column(name) for file in self.files])

    def _stored_bytes(self) -> Counter[str]:
        """Return the stored bytes of every layer, over all files, each of them opened once."""
        total: Counter[str] = Counter()
        for file in self.files:
            with file.hdf5():
                total.update({name: file.stored(name).nbytes for name in self.layers})
        return total

    def _said(self, name: str) -> Mapping[str, Any]:
        """What a root attribute that holds JSON means."""
        return self.files[0].contents.said.get(name, {})  # type: ignore[no-any-return]


_NONE: tuple[None, tuple[str, ...], None] = (None, (), None)
"""No targets."""


def _column_or(file: File, name: str, missing: Any) -> Array:
    """A column, or `missing` for each row of a file that does not have it."""
    if name in file.contents.columns:
        return file.column(name)
    return np.full(len(file.rows), missing, object if isinstance(missing, str) else None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


def _opened_again(path: Path, threads: int | None, cache: int, content: str) -> Activations:
    """Open what was pickled. Raises FormatError where the files have changed."""
    acts = open(path, threads=threads, cache=cache)
    if acts.files.content() != content:
        acts.close()
        raise FormatError(f"{path} is not the output that was opened first: it was replaced since. Open it again")
    return acts


def _open_shared(path: Path, threads: int, cache: int, content: str, processes: int) -> Activations:
    """Open it for one of several processes that read at once."""
    return _opened_again(path, max(1, threads // processes), cache, content)
