"""Files in readers that we did not write: h5py's own filters, h5netcdf, netCDF4, xarray, and h5wasm under node."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5netcdf
import h5py
import hdf5plugin
import numpy as np
import pytest
import shardfiles
import xarray
from shardfiles import layer, table, values

from fmextract.records import Field, LayerSpec
from fmextract.storage import layout

assert hdf5plugin  # importing it registers the filters of zstd and lz4

FIELD = Field((7.0, 7.0), (2.0, 2.0), (0.5, 0.5))
ODD_NAMES = ("layer4=mean", "relu:2", "fc@in", "x[1]", "two words", "50%", "a/b", "blöck", "n" * 255)

CASES: dict[str, tuple[list[LayerSpec], int]] = {
    "one image": ([layer("conv", (3, 4, 5), "channel y x", field=FIELD), layer("fc", (10,), "feature")], 1),
    "equal axis lengths": ([layer("conv", (4, 4, 4), "channel y x", field=FIELD)], 4),
    "failed rows": ([layer("conv", (3, 2, 2), "channel y x")], 6),
    "2-D to 5-D": (
        [
            layer("fc", (7,), "feature"),
            layer("block", (5, 6), "token feature", images=2),
            layer("swin", (3, 4, 5), "y x channel", field=FIELD),
            layer("video", (2, 3, 4, 5), "channel time y x"),
            layer("odd", (2, 3, 2), "axis_1 axis_2 axis_3"),
            layer("split", (5, 3, 3), "channel y x", chunk=(1, 2, 3, 3)),
            layer("counts", (6,), "channel", dtype="int32"),
            layer("wide", (6,), "channel", dtype="float64"),
        ],
        9,
    ),
    "odd names": ([layer(name, (2, 3), "token feature") for name in ODD_NAMES], 3),
    "statistics": ([layer("conv", (3, 2, 2), "channel y x", field=FIELD), layer("fc", (3,), "feature")], 3),
}


def arrays_of(case: str) -> dict[LayerSpec, np.ndarray]:
    layers, rows = CASES[case]
    arrays = {spec: values(spec, rows, seed) for seed, spec in enumerate(layers)}
    if case == "failed rows":
        for array in arrays.values():
            array[1:4] = np.nan
    return arrays


def stats_of(case: str) -> dict[str, dict[str, np.ndarray]]:
    if case != "statistics":
        return {}
    top = np.arange(6.0).reshape(3, 2)
    one_layer = {
        "mean": np.array([0.5, np.nan, 2]),
        "count": np.array([4, 0, 4]),
        "top_value": top,
        "top_sample": top.astype(np.int64),
        "histogram": np.ones((3, 16), np.int64),
    }
    return {"conv": one_layer, "fc": one_layer}


def write_case(directory: Path, case: str) -> Path:
    path = directory / f"{case}.h5"
    arrays = arrays_of(case)
    rows = range(len(next(iter(arrays.values()))))
    samples = table(rows, labels=[row % 2 for row in rows])
    if case == "failed rows":
        samples.status[1:4] = [1, 2, 3]
        samples.message[1:4] = ["no such file", "truncated JPEG", "ünï"]
    # An attribute of more than 64 kB, and one without any text: both are ordinary.
    info = shardfiles.replace(shardfiles.INFO, config={"keys": "x" * 100_000}, history="")
    shardfiles.write(path, arrays, samples=samples, stats=stats_of(case), info=info)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    directory = tmp_path_factory.mktemp("interop")
    return {case: write_case(directory, case) for case in CASES}


def expect(case: str, spec: LayerSpec, array: np.ndarray, read: Any) -> None:
    assert read.shape == array.shape, (case, spec.name)
    assert read.dtype == array.dtype, (case, spec.name)
    np.testing.assert_array_equal(read, array, err_msg=f"{case}: {spec.name}")


@pytest.mark.parametrize("case", CASES)
def test_h5py(files: Mapping[str, Path], case: str) -> None:
    with h5py.File(files[case]) as file:
        for spec, array in arrays_of(case).items():
            expect(case, spec, array, file["layers"][layout.escape_name(spec.name)]["activation"][()])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "uint8", "int64"])
@pytest.mark.parametrize("codec", ["gzip", "zstd", "lz4", "none"])
def test_h5py_undoes_every_codec(tmp_path: Path, codec: str, dtype: str) -> None:
    spec = layer("conv", (5, 7, 3), "channel y x", dtype=dtype)
    array = values(spec, 10)
    shardfiles.write(tmp_path / "a.h5", {spec: array}, codec=codec)
    with h5py.File(tmp_path / "a.h5") as file:
        expect(codec, spec, array, file["layers/conv/activation"][()])


@pytest.mark.parametrize("case", CASES)
def test_h5netcdf(files: Mapping[str, Path], case: str) -> None:
    with h5netcdf.File(files[case], "r") as file:
        for spec, array in arrays_of(case).items():
            variable = file[f"/layers/{layout.escape_name(spec.name)}"].variables["activation"]
            assert variable.dimensions == ("sample", *spec.axes)
            expect(case, spec, array, variable[...])


@pytest.mark.parametrize("case", CASES)
def test_netcdf4(files: Mapping[str, Path], case: str) -> None:
    import netCDF4

    with netCDF4.Dataset(files[case]) as file:
        assert file.Conventions == "CF-1.11"
        assert file.dimensions["sample"].isunlimited()
        assert file["key"][0] == "photos/0000.jpg"
        for spec, array in arrays_of(case).items():
            group = file["layers"].groups[layout.escape_name(spec.name)]
            assert group["activation"].dimensions == ("sample", *spec.axes)
            assert group["activation"].filters()["zlib"]
            group["activation"].set_auto_mask(False)
            expect(case, spec, array, group["activation"][...])
            if stats := stats_of(case).get(spec.name):
                assert group["stats"]["top_value"].dimensions == (spec.axes[0], "k")
                np.testing.assert_array_equal(group["stats"]["histogram"][...], stats["histogram"])


@pytest.mark.parametrize("engine", ["h5netcdf", "netcdf4"])
def test_xarray_puts_rows_and_keys_beside_a_layer(files: Mapping[str, Path], engine: str) -> None:
    """As docs/reference/format.md says: a group opened alone knows nothing of the root's columns."""
    with xarray.open_datatree(files["failed rows"], engine=engine) as tree:
        name, _ = next(iter(arrays_of("failed rows").items()))
        layer = tree[f"layers/{layout.escape_name(name.name)}"].to_dataset().assign_coords(key=tree["key"])
        assert layer["sample"].values.tolist() == list(range(6))
        row = layer["activation"].swap_dims(sample="key").sel(key="photos/0004.jpg")
        assert int(row["sample"]) == 4


@pytest.mark.parametrize("engine", ["h5netcdf", "netcdf4"])
@pytest.mark.parametrize("case", CASES)
def test_xarray(files: Mapping[str, Path], case: str, engine: str) -> None:
    with xarray.open_dataset(files[case], engine=engine) as root:
        rows = CASES[case][1]
        assert root["sample"].values.tolist() == list(range(rows))
        assert root["key"].values.tolist() == [f"photos/{row:04d}.jpg" for row in range(rows)]
        assert root["label"].dims == ("sample",)
        if case == "failed rows":
            assert root["status"].values.tolist() == [0, 1, 2, 3, 0, 0]
            assert root["message"].values[3] == "ünï"
    for spec, array in arrays_of(case).items():
        group = f"layers/{layout.escape_name(spec.name)}"
        with xarray.open_dataset(files[case], engine=engine, group=group) as dataset:
            activation = dataset["activation"]
            assert activation.dims == ("sample", *spec.axes)
            expect(case, spec, array, activation.values)
            if spec.field and "y" in spec.axes:
                assert activation.coords["y"].values.tolist() == [0.5 + 2 * i for i in range(activation.sizes["y"])]
        if stats := stats_of(case).get(spec.name):
            with xarray.open_dataset(files[case], engine=engine, group=f"{group}/stats") as dataset:
                np.testing.assert_array_equal(dataset["mean"], stats["mean"])
                assert dataset["top_sample"].dims == (spec.axes[0], "k")


# -------------------------------------------------------------------------------------------------------------- h5wasm

HERE = Path(__file__).parents[1] / "h5wasm"


@pytest.fixture(scope="module")
def seen_by_h5wasm(files: Mapping[str, Path]) -> Mapping[str, Any]:
    if not (shutil.which("node") and shutil.which("npm")):
        assert not os.environ.get("CI"), "CI reads with h5wasm too: install node and npm"
        pytest.skip("node and npm are not installed")
    if not (HERE / "node_modules" / "h5wasm").is_dir():
        subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=HERE, check=True)
    paths = [str(path) for path in files.values()]
    done = subprocess.run(["node", "read.mjs", *paths], cwd=HERE, check=True, capture_output=True, text=True)
    seen = json.loads(done.stdout)
    return {case: seen[str(path)] for case, path in files.items()}


def as_array(seen: Mapping[str, Any], dtype: Any) -> np.ndarray:
    return np.array([np.dtype(dtype).type(value) for value in seen["values"]], dtype).reshape(seen["shape"])


@pytest.mark.parametrize("case", CASES)
def test_h5wasm(seen_by_h5wasm: Mapping[str, Any], case: str) -> None:
    seen = seen_by_h5wasm[case]
    arrays = arrays_of(case)
    assert seen["/layers"]["children"] == [layout.escape_name(spec.name) for spec in arrays]
    assert seen["/"]["attributes"]["format"] == ["fmextract"]
    assert len(seen["/"]["attributes"]["fmextract_config"][0]) > 100_000
    assert seen["/key"]["values"][0] == "photos/0000.jpg"
    for spec, array in arrays.items():
        group = f"/layers/{layout.escape_name(spec.name)}"
        expect(case, spec, array, as_array(seen[f"{group}/activation"], spec.dtype))
        assert seen[group]["attributes"]["module"] == [spec.module]
        for name, expected in stats_of(case).get(spec.name, {}).items():
            np.testing.assert_array_equal(as_array(seen[f"{group}/stats/{name}"], expected.dtype), expected)
    if case == "failed rows":
        assert seen["/message"]["values"][3] == "ünï"
        assert seen["/status"]["values"] == [0, 1, 2, 3, 0, 0]
