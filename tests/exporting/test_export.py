"""Exports, read back by the library of each format, against the maps that bare h5py reads."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import netCDF4
import numpy as np
import pyarrow.parquet
import pytest
import rsatoolbox
import runs
import xarray
from files import make_file, make_shards
from safetensors import safe_open
from scipy.spatial.distance import pdist

import fmextract as fm
from fmextract.cli import main
from fmextract.common.progress import Quiet
from fmextract.errors import ConfigError, DamagedError, MissingExtra, OutputError
from fmextract.exporting import dissimilarity, export, job, rdm, safetensors
from fmextract.reading.layer import Layer
from fmextract.storage import durable, writer
from fmextract.verification import verify

ROWS, CUTS = 21, (8, 16)
FAILED = (5, 16)
STATUS = [2 if row in FAILED else 0 for row in range(ROWS)]
KEYS = [f'cats/{row:02} ‘tom’, "2".jpg' if row % 3 else f"hünde/{row}.jpg" for row in range(ROWS)]
LABELS = [None if row == 3 else row % 4 for row in range(ROWS)]
NAMES = {"npy": "arrays", "safetensors": "a.safetensors", "parquet": "a.parquet", "netcdf": "a.nc", "rdm": "rdm.h5"}


def maps() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes: dict[str, tuple[type, tuple[int, ...]]] = {
        "conv": (np.float32, (6, 5, 4)),
        "split": (np.float32, (6, 3, 3)),
        "layer4=mean": (np.float32, (7,)),
        "relu:2": (np.float16, (3, 4)),
        "a/b": (np.float64, (2, 3)),
        "a_B": (np.int32, (5,)),
        "key": (np.uint8, (3,)),
    }
    made = {name: (random.standard_normal((ROWS, *shape)) * 40).astype(kind) for name, (kind, shape) in shapes.items()}
    for array in made.values():
        array[list(FAILED)] = np.nan if array.dtype.kind == "f" else 0
    return made


@pytest.fixture(scope="module", params=["one file", "shards"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("source") / "acts.h5"
    options: dict[str, Any] = {
        "keys": KEYS,
        "status": STATUS,
        "labels": LABELS,
        "chunk": {"split": (1, 4, 3, 3)},  # a grid of channels that does not come out even
    }
    if request.param == "one file":
        make_file(path, maps(), **options)
        return path
    make_shards(path.with_suffix(""), maps(), CUTS, **options)
    return path.with_suffix("")


def bare(source: Path, layer: str) -> np.ndarray:
    """The maps of a layer by h5py alone."""
    parts = []
    for path in sorted(source.glob("*.h5")) if source.is_dir() else [source]:
        with h5py.File(path, "r") as file:
            parts.append(file[f"layers/{layer.replace('/', '%2F')}/activation"][:])
    return np.concatenate(parts)


def same(have: Any, want: np.ndarray) -> None:
    """Bit for bit, but for the type: NaN where NaN is, in shape (n, …)."""
    np.testing.assert_array_equal(np.asarray(have), want)


@pytest.fixture(params=["whole blocks", "small blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As everything fits into one block, and as nothing but single images or chunks does."""
    if request.param == "small blocks":
        monkeypatch.setattr(job, "BLOCK_BYTES", 1000)
        monkeypatch.setattr(dissimilarity, "LEFT_BYTES", 5000)
        monkeypatch.setattr(dissimilarity, "RIGHT_BYTES", 3000)


# ------------------------------------------------------------------------------------------------------- the formats


@pytest.mark.usefixtures("blocks")
def test_npy(source: Path, tmp_path: Path) -> None:
    made = fm.export(source, to="npy", out=tmp_path / "arrays")
    index = json.loads((tmp_path / "arrays" / "index.json").read_text())
    assert [layer["name"] for layer in index["layers"]] == list(maps())
    assert [layer.place for layer in made.layers] == [layer["place"] for layer in index["layers"]]
    for layer in index["layers"]:
        want = bare(source, layer["name"])
        have = np.load(tmp_path / "arrays" / layer["place"], mmap_mode="r", allow_pickle=False)
        assert isinstance(have, np.memmap)
        assert (have.dtype, have.flags.c_contiguous) == (want.dtype, True)
        assert tuple(layer["shape"]) == want.shape
        same(have, want)
    with (tmp_path / "arrays" / "rows.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["key"] for row in rows] == KEYS
    assert [int(row["status"]) for row in rows] == STATUS
    assert [int(row["sample"]) for row in rows] == list(range(ROWS))
    assert [row["label"] for row in rows] == ["" if label is None else str(label) for label in LABELS]
    held = {path.name for path in (tmp_path / "arrays").iterdir()}
    assert held == {"index.json", "rows.csv", *(layer.place for layer in made.layers)}
    assert made.bytes == sum(path.stat().st_size for path in (tmp_path / "arrays").iterdir())


@pytest.mark.usefixtures("blocks")
def test_safetensors(source: Path, tmp_path: Path) -> None:
    made = fm.export(source, to="safetensors", out=tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="np") as file:
        assert set(file.keys()) == set(maps())
        for name in maps():
            want, have = bare(source, name), file.get_tensor(name)
            assert have.dtype == want.dtype
            same(have, want)
        held = {name: json.loads(value) for name, value in file.metadata().items()}
    assert (held["keys"], held["status"], held["labels"]) == (KEYS, STATUS, LABELS)
    assert held["sample"] == list(range(ROWS))
    assert made.bytes == (tmp_path / "a.safetensors").stat().st_size


def test_tensors_lie_where_their_type_wants_them(source: Path, tmp_path: Path) -> None:
    """So that a memory map can be used as it is; the length of the header and its place are the format's."""
    fm.export(source, to="safetensors", out=tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    assert size % 8 == 0
    for name, array in maps().items():
        assert header[name]["data_offsets"][0] % array.itemsize == 0


@pytest.mark.usefixtures("blocks")
def test_parquet(source: Path, tmp_path: Path) -> None:
    made = fm.export(source, to="parquet", out=tmp_path / "a.parquet")
    places = {layer.name: layer.place for layer in made.layers}
    assert places == {**{name: name for name in maps()}, "key": "key-2"}
    table = pyarrow.parquet.read_table(tmp_path / "a.parquet")
    assert table.column_names == ["sample", "key", "status", "label", *places.values()]
    for name, want in (("sample", list(range(ROWS))), ("key", KEYS), ("status", STATUS), ("label", LABELS)):
        assert table[name].to_pylist() == want
    for name in maps():
        want, column, field = bare(source, name), table[places[name]], table.field(places[name])
        assert pyarrow.types.is_fixed_size_list(field.type)
        assert field.metadata[b"layer"].decode() == name
        shape = json.loads(field.metadata[b"shape"])
        assert shape == list(want.shape[1:])
        values = column.combine_chunks().flatten().to_numpy()
        assert values.dtype == (np.float32 if want.dtype == np.float16 else want.dtype)
        same(values.reshape(-1, *shape), want)


def test_parquet_is_written_row_group_by_row_group(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = sum(array.nbytes for array in maps().values()) // ROWS
    monkeypatch.setattr(job, "BLOCK_BYTES", 8 * row)
    fm.export(source, to="parquet", out=tmp_path / "a.parquet")
    held = pyarrow.parquet.ParquetFile(tmp_path / "a.parquet").metadata
    assert [held.row_group(group).num_rows for group in range(held.num_row_groups)] == [8, 8, 5]


@pytest.mark.usefixtures("blocks")
def test_netcdf(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.nc"
    made = fm.export(source, to="netcdf", out=path)
    with netCDF4.Dataset(path) as file:
        assert list(file["key"][:]) == KEYS
        same(file["status"][:], np.array(STATUS))
        assert list(file["label"][:]) == [-1 if label is None else label for label in LABELS]
        for layer in made.layers:
            want = bare(source, layer.name)
            variable = file[layer.place]["activation"]
            variable.set_auto_mask(False)
            assert variable.filters()["zlib"]
            assert variable.dtype == (np.float32 if want.dtype == np.float16 else want.dtype)
            same(variable[:], want)
    for engine in ("netcdf4", "h5netcdf"):
        with xarray.open_dataset(path, group="layers/conv", engine=engine) as data:
            assert data["activation"].dims == ("sample", "channel", "y", "x")
            same(data["activation"], bare(source, "conv"))


def test_netcdf_is_an_output_of_its_own(tmp_path: Path) -> None:
    """Whole to `verify`, which counts the statistics again; open to what opens outputs, another export included."""
    photos = runs.make_photos(tmp_path / "photos", 10, {6: b"broken"})
    runs.extract(photos, tmp_path / "acts", dtype="float16")
    fm.export(tmp_path / "acts", to="netcdf", out=tmp_path / "a.nc", layers=["conv", "fc"])
    report = verify(tmp_path / "a.nc")
    assert (report.problems, report.layers, report.rows) == ((), 2, 10)
    with fm.open(tmp_path / "acts") as before, fm.open(tmp_path / "a.nc") as after:
        assert after.layers == ("conv", "fc")
        assert (after["conv"].dtype, after["conv"].spec.mantissa) == ("float32", 10)
        for name in before["conv"].stats.names:
            same(getattr(after["conv"].stats, name), getattr(before["conv"].stats, name))
        for column in ("keys", "status", "messages", "heights", "widths"):
            same(getattr(after, column), getattr(before, column))
        assert after.config == before.config
    fm.export(tmp_path / "a.nc", to="npy", out=tmp_path / "again")
    same(np.load(tmp_path / "again" / "conv.npy"), bare(tmp_path / "acts", "conv"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:rsatoolbox")
@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("metric", dissimilarity.METRICS)
def test_rdm(source: Path, tmp_path: Path, metric: str) -> None:
    good = [row for row in range(ROWS) if row not in FAILED]
    made = fm.export(source, to="rdm", out=tmp_path / "rdm.h5", metric=metric)
    rdms = rsatoolbox.rdm.load_rdm(str(tmp_path / "rdm.h5"))
    assert rdms.rdm_descriptors["layer"] == list(maps())
    assert rdms.pattern_descriptors["key"] == [KEYS[row] for row in good]
    assert rdms.pattern_descriptors["sample"] == good
    assert rdms.pattern_descriptors["label"] == [-1 if LABELS[row] is None else LABELS[row] for row in good]
    assert [layer.shape for layer in made.layers] == [(len(good), len(good))] * len(maps())
    for name, have in zip(maps(), rdms.dissimilarities, strict=True):
        x = bare(source, name)[good].reshape(len(good), -1).astype(np.float64)
        scale = x.shape[1] if metric == "euclidean-squared" else 1
        scipy = {"euclidean-squared": "sqeuclidean"}.get(metric, metric)
        np.testing.assert_allclose(have, pdist(x, scipy) / scale, rtol=1e-9, atol=1e-12)
        if metric != "cosine":  # which rsatoolbox does not have for patterns
            method = {"euclidean-squared": "euclidean"}.get(metric, metric)
            theirs = rsatoolbox.rdm.calc_rdm(rsatoolbox.data.Dataset(x), method=method)
            np.testing.assert_allclose(have, theirs.dissimilarities[0], rtol=1e-9, atol=1e-12)
            assert rdms.dissimilarity_measure == theirs.dissimilarity_measure
    one = rdms.subset("layer", "conv")
    assert one.get_matrices().shape == (1, len(good), len(good))
    assert rsatoolbox.rdm.compare(one, one, method="corr")[0, 0] == pytest.approx(1)


def test_rdm_says_nan_where_there_is_no_distance(tmp_path: Path) -> None:
    x = np.array([[1, 2, 3], [1, 1, 1], [0, 0, 0], [np.inf, 0, 1], [3, 1, 2]], np.float32)
    make_file(tmp_path / "a.h5", {"fc": x})
    pairs = [(i, j) for i in range(5) for j in range(i + 1, 5)]
    for metric, lost in (("euclidean-squared", {3}), ("cosine", {2, 3}), ("correlation", {1, 2, 3})):
        fm.export(tmp_path / "a.h5", to="rdm", out=tmp_path / f"{metric}.h5", metric=metric)
        (have,) = rsatoolbox.rdm.load_rdm(str(tmp_path / f"{metric}.h5")).dissimilarities
        assert [pair for pair, value in zip(pairs, have, strict=True) if np.isnan(value)] == [
            pair for pair in pairs if lost.intersection(pair)
        ]


def test_equal_images_are_at_distance_zero(tmp_path: Path) -> None:
    """Never a little less, as rounding would have it: a square root is taken of it next."""
    x = np.random.default_rng(0).standard_normal((2, 1000)).astype(np.float32) * 1e3
    make_file(tmp_path / "a.h5", {"fc": np.concatenate([x, x, x])})
    for metric in dissimilarity.METRICS:
        fm.export(tmp_path / "a.h5", to="rdm", out=tmp_path / f"{metric}.h5", metric=metric)
        (have,) = rsatoolbox.rdm.load_rdm(str(tmp_path / f"{metric}.h5")).dissimilarities
        assert have.min() >= 0
        assert have.min() <= 1e-9 * have.max()


def test_many_keys_fit_into_the_descriptors_of_an_rdm(tmp_path: Path) -> None:
    """Texts are attributes there, and HDF5 keeps those of more than 64 KiB in another way."""
    keys = [f"photos/bîrd/{i:06}.jpg" for i in range(20_000)]
    path = tmp_path / "rdm.h5"
    writer.write_rdms(path, {"fc": [np.ones(2), np.ones(1)]}, 3, "cosine", {"model": "tiny"}, {"key": keys})
    with h5py.File(path) as file:
        assert list(file["pattern_descriptors"].attrs["key"]) == keys
        assert file["dissimilarities"][:].tolist() == [[1, 1, 1]]


def test_the_page_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/how-to/other-tools.md: its commands, and then its code on what they wrote."""
    random = np.random.default_rng(0)
    arrays = {name: random.standard_normal((40, 6, 2, 2)).astype(np.float32) for name in ("conv1", "layer1", "layer4")}
    arrays["layer4=mean"] = arrays["layer4"].mean((2, 3))
    status = [int(row == 7) for row in range(40)]
    make_file(tmp_path / "acts.h5", arrays, status=status)
    make_shards(tmp_path / "acts", arrays, [20], status=status)
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs/how-to/other-tools.md").read_text(encoding="utf-8")
    shell, code = (
        re.findall(f"```{kind}\n(.*?)```", page.partition("## Export")[2], re.DOTALL)[0] for kind in ("sh", "python")
    )
    lines = [shlex.split(line, comments=True) for line in shell.splitlines()]
    assert len(lines) == len(NAMES)
    for line in lines:
        assert main(line[1:]) == 0
    said: dict[str, Any] = {}
    exec(code, said)
    same(said["maps"], np.delete(arrays["layer4=mean"], 7, axis=0))
    same(said["data"]["activation"], arrays["conv1"])
    assert len(said["keys"]) == 40
    assert said["rdms"].n_rdm == 4
    said["data"].close()


# ------------------------------------------------------------------------------------------------ what all have


@pytest.mark.parametrize("to", NAMES)
def test_layers_are_selected_as_for_pictures(source: Path, tmp_path: Path, to: str) -> None:
    made = fm.export(source, to=to, out=tmp_path / NAMES[to], layers=["a_B", "layer4*"])
    assert [layer.name for layer in made.layers] == ["layer4=mean", "a_B"]


@pytest.mark.parametrize("to", NAMES)
def test_the_same_export_has_the_same_bytes(source: Path, tmp_path: Path, to: str) -> None:
    (tmp_path / "b").mkdir()
    # HDF5 before 2.0 notes in which second the root of a file was made: both are made in the same one.
    time.sleep(1 - time.time() % 1)
    for out in (tmp_path / NAMES[to], tmp_path / "b" / NAMES[to]):
        with fm.open(source) as acts:
            fm.export(acts, to=to, out=out, layers=["conv", "split"])
            assert acts.num_rows == ROWS  # still open
    assert content(tmp_path / NAMES[to]) == content(tmp_path / "b" / NAMES[to])


def content(path: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in (path.iterdir() if path.is_dir() else [path])}


def test_layers_get_files_of_their_own(tmp_path: Path) -> None:
    """On a file system that takes neither signs nor case for a difference, and no name of more than 255 letters."""
    names = ["a/b", "a:b", "A_B", ".hidden", "-r", "n" * 255, "n" * 254 + "m", "rows", "…"]
    make_file(tmp_path / "a.h5", {name: np.full((2, 1), i, np.float32) for i, name in enumerate(names)})
    made = fm.export(tmp_path / "a.h5", to="npy", out=tmp_path / "arrays")
    files = [layer.place for layer in made.layers]
    assert len({file.casefold() for file in files}) == len(names)
    assert files[:5] == ["a_b.npy", "a_b-2.npy", "A_B-3.npy", "_.hidden.npy", "_-r.npy"]
    assert max(map(len, files)) < 255
    for i, file in enumerate(files):
        same(np.load(tmp_path / "arrays" / file), np.full((2, 1), i))


def test_one_shard_says_which_rows_it_holds(tmp_path: Path) -> None:
    _, shard, _ = make_shards(tmp_path / "acts", maps(), CUTS)
    for to in ("npy", "netcdf"):
        fm.export(shard, to=to, out=tmp_path / NAMES[to])
    rows = (tmp_path / "arrays" / "rows.csv").read_text().splitlines()
    assert [line.partition(",")[0] for line in rows] == ["sample", *map(str, range(8, 16))]
    with h5py.File(tmp_path / "a.nc") as file:
        assert file["sample"][:].tolist() == list(range(8, 16))


def test_labels_may_be_words_or_none_at_all(tmp_path: Path) -> None:
    x = {"fc": np.ones((3, 2), np.float32)}
    make_file(tmp_path / "words.h5", x, labels=["cat", None, "hünd"])
    make_file(tmp_path / "none.h5", x)
    fm.export(tmp_path / "words.h5", to="parquet", out=tmp_path / "words.parquet")
    fm.export(tmp_path / "none.h5", to="parquet", out=tmp_path / "none.parquet")
    assert pyarrow.parquet.read_table(tmp_path / "words.parquet")["label"].to_pylist() == ["cat", None, "hünd"]
    assert pyarrow.parquet.read_table(tmp_path / "none.parquet").column_names == ["sample", "key", "status", "fc"]
    fm.export(tmp_path / "words.h5", to="rdm", out=tmp_path / "rdm.h5")
    rdms = rsatoolbox.rdm.load_rdm(str(tmp_path / "rdm.h5"))
    assert rdms.pattern_descriptors["label"] == ["cat", "", "hünd"]


# ---------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("to", NAMES)
def test_no_more_than_a_block_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    """Of any layer, whatever the number of rows; and every value of every layer is asked for."""
    arrays = {"wide": np.ones((64, 8, 4, 4), np.float32), "narrow": np.ones((64, 3), np.float32)}
    make_file(tmp_path / "a.h5", arrays)
    block = 4096
    monkeypatch.setattr(job, "BLOCK_BYTES", block)
    monkeypatch.setattr(dissimilarity, "LEFT_BYTES", block)
    monkeypatch.setattr(dissimilarity, "RIGHT_BYTES", block)
    asked: dict[str, list[int]] = {"wide": [], "narrow": []}
    read: Callable[[Any, Any], Any] = Layer.__getitem__

    def watched(layer: Layer, key: Any) -> Any:
        values = read(layer, key)
        asked[layer.name].append(values.nbytes)
        return values

    monkeypatch.setattr(Layer, "__getitem__", watched)
    fm.export(tmp_path / "a.h5", to=to, out=tmp_path / NAMES[to])
    for name, array in arrays.items():
        assert max(asked[name]) <= block
        assert sum(asked[name]) >= array.nbytes
        if to != "rdm":
            assert sum(asked[name]) == array.nbytes


@pytest.mark.parametrize("to", ["npy", "safetensors", "netcdf", "rdm"])  # pyarrow's memory is not Python's
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    monkeypatch.setattr(job, "BLOCK_BYTES", 1 << 18)
    monkeypatch.setattr(dissimilarity, "LEFT_BYTES", 1 << 18)
    monkeypatch.setattr(dissimilarity, "RIGHT_BYTES", 1 << 18)
    peaks = []
    for rows in (64, 512):
        values = np.random.default_rng(0).standard_normal((rows, 16, 16, 16)).astype(np.float32)  # 16 KiB a row
        make_file(tmp_path / f"{rows}.h5", {"conv": values})
        with fm.open(tmp_path / f"{rows}.h5", threads=1) as acts:
            tracemalloc.start()
            fm.export(acts, to=to, out=tmp_path / f"{rows}-{NAMES[to]}")
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    grown = 448 * 16 * 16 * 16 * 4  # 7 MiB
    assert peaks[1] - peaks[0] < grown / 8


# ---------------------------------------------------------------------------------------------------------- errors


def test_an_unknown_layer_is_named_with_the_closest(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no layer 'layer4'.*layer4=mean"):
        fm.export(source, to="npy", out=tmp_path / "arrays", layers=["layer4"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("to", "out", "said"),
    [
        ("zarr", "a.zarr", "expected one of npy, safetensors, parquet, netcdf, rdm"),
        ("parquet", "a", "ends in .parquet"),
        ("rdm", "a.pkl", "ends in .h5 or .hdf5"),
        ("npy", "a.npy", "makes a directory"),
    ],
)
def test_a_name_that_does_not_fit_is_refused(source: Path, tmp_path: Path, to: str, out: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        fm.export(source, to=to, out=tmp_path / out)


def test_a_metric_is_for_rdm(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not for npy"):
        fm.export(source, to="npy", out=tmp_path / "a", metric="cosine")
    with pytest.raises(ConfigError, match="expected one of euclidean-squared, correlation, cosine"):
        fm.export(source, to="rdm", out=tmp_path / "a.h5", metric="euclid")


@pytest.mark.parametrize("to", NAMES)
def test_an_earlier_export_is_replaced_if_asked(source: Path, tmp_path: Path, to: str) -> None:
    out = tmp_path / NAMES[to]
    fm.export(source, to=to, out=out)
    before = content(out)
    with pytest.raises(OutputError, match="exists; --overwrite replaces it"):
        fm.export(source, to=to, out=out, layers=["conv"])
    assert content(out) == before
    made = fm.export(source, to=to, out=out, layers=["conv"], overwrite=True)
    assert [layer.name for layer in made.layers] == ["conv"]
    assert content(out) != before
    assert [path.name for path in tmp_path.iterdir()] == [NAMES[to]]


@pytest.mark.parametrize("to", NAMES)
@pytest.mark.parametrize("kind", ["a file", "a directory", "an output", "another export"])
def test_nothing_else_is_ever_replaced(source: Path, tmp_path: Path, to: str, kind: str) -> None:
    out = tmp_path / NAMES[to]
    if kind == "a file":
        out.write_bytes(b"x" * 100)
    elif kind == "a directory":
        out.mkdir()
        (out / "index.json").write_text('["thesis"]')
    elif kind == "an output":
        make_file(out, maps())
    else:
        other = "rdm" if to != "rdm" else "parquet"
        fm.export(source, to=other, out=tmp_path / NAMES[other])
        (tmp_path / NAMES[other]).rename(out)
    before = content(out)
    with pytest.raises(OutputError, match=f"no export to {to}"):
        fm.export(source, to=to, out=out, overwrite=True)
    assert content(out) == before


@pytest.mark.parametrize("to", NAMES)
def test_what_goes_wrong_leaves_what_was_there(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    fm.export(source, to=to, out=tmp_path / NAMES[to], layers=["conv"])
    before = content(tmp_path / NAMES[to])
    read: Callable[[Any, Any], Any] = Layer.__getitem__

    def broken(layer: Layer, key: Any) -> Any:
        if layer.name == "split":
            raise KeyboardInterrupt
        return read(layer, key)

    monkeypatch.setattr(Layer, "__getitem__", broken)
    for out in (NAMES[to], f"new-{NAMES[to]}"):
        with pytest.raises(KeyboardInterrupt):
            fm.export(source, to=to, out=tmp_path / out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == [NAMES[to]]
    assert content(tmp_path / NAMES[to]) == before


def test_an_old_directory_comes_back_if_the_new_one_cannot_take_its_place(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fm.export(source, to="npy", out=tmp_path / "arrays", layers=["conv"])
    before = content(tmp_path / "arrays")

    def refused(temporary: Path, final: Path) -> None:
        raise OutputError("read-only")

    monkeypatch.setattr(durable, "publish", refused)
    with pytest.raises(OutputError, match="read-only"):
        fm.export(source, to="npy", out=tmp_path / "arrays", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["arrays"]
    assert content(tmp_path / "arrays") == before


@pytest.mark.parametrize("to", NAMES)
def test_a_damaged_chunk_is_no_export(tmp_path: Path, to: str) -> None:
    path = tmp_path / "in" / "a.h5"
    path.parent.mkdir()
    make_file(path, maps())
    with h5py.File(path) as file:
        place = file["layers/conv/activation"].id.get_chunk_info(2)
    data = bytearray(path.read_bytes())
    data[place.byte_offset : place.byte_offset + place.size] = bytes(place.size)
    path.write_bytes(data)
    with pytest.raises(DamagedError, match="layer conv, rows 8 to 11"):
        fm.export(path, to=to, out=tmp_path / NAMES[to])
    assert [one.name for one in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_parquet_without_its_library(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    if overwrite:
        fm.export(source, to="parquet", out=tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"pip install 'fmextract\[parquet\]'"):
        fm.export(source, to="parquet", out=tmp_path / "a.parquet", overwrite=overwrite)
    assert len(list(tmp_path.iterdir())) == overwrite


def test_too_many_images_for_an_rdm(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rdm, "MOST_RDM_BYTES", 8 * 171 * 2)  # of 19 images, in two layers
    fm.export(source, to="rdm", out=tmp_path / "two.h5", layers=["conv", "split"])
    with pytest.raises(ConfigError, match=r"19 images make 171 pairs a layer, 9.4 KiB for 7 layers.*Name fewer layers"):
        fm.export(source, to="rdm", out=tmp_path / "seven.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["two.h5"]


def test_an_rdm_needs_two_images(tmp_path: Path) -> None:
    make_file(tmp_path / "a.h5", {"fc": np.ones((3, 2), np.float32)}, status=[0, 1, 1])
    with pytest.raises(ConfigError, match="1 of 3 images have values"):
        fm.export(tmp_path / "a.h5", to="rdm", out=tmp_path / "rdm.h5")


def test_too_many_keys_for_safetensors(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors, "MOST_HEADER_BYTES", 1000)
    with pytest.raises(ConfigError, match=r"the keys of 21 images take .* export to npy or parquet"):
        fm.export(source, to="safetensors", out=tmp_path / "a.safetensors")


def test_the_header_that_safetensors_reads(tmp_path: Path) -> None:
    """MOST_HEADER_BYTES is the library's own limit."""
    for size, error in (
        (safetensors.MOST_HEADER_BYTES, None),
        (safetensors.MOST_HEADER_BYTES + 8, "(?i)header ?too ?large"),
    ):
        path = tmp_path / f"{size}.safetensors"
        path.write_bytes(size.to_bytes(8, "little") + b"{}".ljust(size))
        if error is None:
            with safe_open(path, framework="np") as file:
                assert not list(file.keys())
        else:
            with pytest.raises(Exception, match=error):
                safe_open(path, framework="np").__enter__()


FULL_DISK = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from pathlib import Path
import fmextract as fm
to, source, out = sys.argv[1:]
try:
    fm.export(source, to=to, out=out, progress=False)
except fm.NoSpace as error:
    print("NoSpace", [path.name for path in Path(out).parent.iterdir()], error)
"""


@pytest.mark.skipif(
    subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode != 0
    if shutil.which("unshare")
    else True,
    reason="a small file system can only be made where user namespaces are allowed",
)
@pytest.mark.parametrize("to", NAMES)
def test_a_full_disk(tmp_path: Path, to: str) -> None:
    values = np.random.default_rng(0).standard_normal((600, 2000)).astype(np.float32)  # 4.8 MB; 1.4 MB of pairs
    make_file(tmp_path / "a.h5", {"fc": values})
    disk = tmp_path / "disk"
    disk.mkdir()
    script = tmp_path / "full.py"
    script.write_text(FULL_DISK)
    run = f'"{sys.executable}" "{script}" {to} "{tmp_path / "a.h5"}" "{disk / NAMES[to]}"'
    mount = f'mount -t tmpfs -o size=1m tmpfs "{disk}" && exec {run}'
    done = subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"NoSpace [] {disk} is full: {NAMES[to]}")


def test_a_place_that_cannot_be_written(source: Path) -> None:
    for to, name in NAMES.items():
        with pytest.raises(OutputError, match="cannot write /dev/null/"):
            fm.export(source, to=to, out=Path(os.devnull) / "there" / name)


class Told(Quiet):
    """A Progress that keeps what it is told of rows."""

    def __init__(self) -> None:
        self.total = self.done = 0
        self.finished = False

    def start(self, total: int, done: int) -> None:
        self.total = total

    def advance(self, images: int, failed: int) -> None:
        self.done += images

    def finish(self) -> None:
        self.finished = True


@pytest.mark.parametrize("to", NAMES)
def test_the_progress_is_told_of_every_row_of_every_layer(tmp_path: Path, to: str) -> None:
    arrays = {"a": np.random.default_rng(0).random((7, 2, 3, 3), np.float32), "b": np.eye(7, 5, dtype=np.float32)}
    make_file(tmp_path / "acts.h5", arrays)
    told = Told()
    export.export(tmp_path / "acts.h5", to=to, out=tmp_path / NAMES[to], progress=told)
    assert (told.total, told.done, told.finished) == (14, 14, True)
