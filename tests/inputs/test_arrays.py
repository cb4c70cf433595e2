"""Arrays of h5py, zarr, dask, xarray and of whoever has their interface, against the same pixels in numpy's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import dask.array
import h5py
import numpy as np
import pytest
import torch
import xarray
import zarr
from runs import Notes, extract

from fmextract.errors import OutputError, SourceError
from fmextract.inputs.sources import open_source
from fmextract.reading import activations

ROWS = 12
PIXELS = np.random.default_rng(0).integers(0, 256, (ROWS, 8, 8, 3), np.uint8)


def of_h5py(folder: Path) -> Any:
    file = h5py.File(folder / "x.hdf5", "w")
    file["images"] = PIXELS
    file.flush()
    return file["images"]


def of_zarr(folder: Path) -> Any:
    made = zarr.open_array(str(folder / "x.zarr"), mode="w", shape=PIXELS.shape, dtype="uint8", chunks=(2, 8, 8, 3))
    made[:] = PIXELS
    return made


def of_memmap(folder: Path) -> Any:
    made = np.memmap(folder / "x.bin", np.uint8, "w+", shape=PIXELS.shape)
    made[:] = PIXELS
    return made


def of_netcdf(folder: Path) -> Any:
    of_xarray(folder).to_dataset(name="images").to_netcdf(folder / "x.nc", engine="h5netcdf")
    return xarray.open_dataset(folder / "x.nc", engine="h5netcdf")["images"]


def of_xarray(folder: Path) -> Any:
    """By position, whatever its labels say."""
    return xarray.DataArray(PIXELS, dims=("n", "y", "x", "c"), coords={"n": np.arange(ROWS)[::-1]})


class Foreign:
    """An array as TensorFlow and others have it: its parts are of its own kind, numpy's only where asked for."""

    asked: ClassVar[list[tuple[int, ...]]] = []

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    @property
    def shape(self) -> tuple[int, ...]:
        return self._values.shape

    @property
    def dtype(self) -> Any:
        return self._values.dtype

    def __getitem__(self, at: Any) -> Foreign:
        return Foreign(self._values[at])

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        self.asked.append(self._values.shape)
        return np.array(self._values, dtype)


class Dicts(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Of one array of another library an item, as a processor gives it."""

    def __init__(self, images: Any) -> None:
        self.images = images

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"pixel_values": self.images[row], "labels": row}


KINDS: dict[str, Callable[[Path], Any]] = {
    "h5py": of_h5py,
    "zarr": of_zarr,
    "dask": lambda folder: dask.array.from_array(PIXELS, chunks=(5, 8, 8, 3)),
    "xarray": of_xarray,
    "netcdf": of_netcdf,
    "memmap": of_memmap,
    "foreign": lambda folder: Foreign(PIXELS),
    "a list": lambda folder: list(of_xarray(folder)),
    "dicts of arrays": lambda folder: Dicts(of_zarr(folder)),
    "dicts of DataArrays": lambda folder: Dicts(of_xarray(folder)),
}


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    out = tmp_path_factory.mktemp("right") / "x.h5"
    extract(PIXELS, out)
    with activations.open(out) as acts:
        values: np.ndarray = acts["conv"][:]
        return values


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_are_read_row_by_row(kind: str, right: np.ndarray, tmp_path: Path) -> None:
    data = KINDS[kind](tmp_path)
    Foreign.asked.clear()
    extract(data, tmp_path / "out.h5")
    with activations.open(tmp_path / "out.h5") as acts:
        np.testing.assert_array_equal(acts["conv"][:], right)
        assert (acts.labels is not None) == kind.startswith("dicts")
    assert set(Foreign.asked) <= {PIXELS.shape[1:]}, "never the whole"
    notes = Notes()
    extract(data, tmp_path / "out.h5", notes=notes)
    assert "is complete already" in notes
    assert ("nobody can tell what is in it" in notes) == (kind in ("dask", "foreign")), "no file; a list that grows"


@pytest.mark.parametrize("kind", ["h5py", "zarr", "xarray", "netcdf", "memmap"])
def test_one_row_that_is_another_is_noticed(kind: str, tmp_path: Path) -> None:
    extract(KINDS[kind](tmp_path), tmp_path / "out.h5", batch_size=1, shard_size="1GiB")
    if kind == "netcdf":
        with h5py.File(tmp_path / "x.nc", "r+") as file:
            file["images"][5] = 255 - PIXELS[5]
        data = xarray.open_dataset(tmp_path / "x.nc", engine="h5netcdf")["images"]
    else:
        data = KINDS[kind](tmp_path).copy() if kind == "xarray" else KINDS[kind](tmp_path)
        data[5] = 255 - PIXELS[5]
        if kind == "h5py":
            data.file.flush()
    with pytest.raises(Exception, match=r"cannot be made again|row 5: other than it was"):
        extract(data, tmp_path / "out.h5", batch_size=1, shard_size="1GiB")


def test_an_array_of_the_users_own_is_compared_by_its_attributes(tmp_path: Path) -> None:
    class Flipped(Foreign):
        flip = False

        def __getitem__(self, at: Any) -> Foreign:
            return Foreign(self._values[at][::-1] if self.flip else self._values[at])

    data = Flipped(PIXELS)
    extract(data, tmp_path / "out.h5")
    other = Flipped(PIXELS)
    other.flip = True
    with pytest.raises(OutputError, match=r"flip: .*True now"):
        extract(other, tmp_path / "out.h5", recheck=False)


def test_an_array_in_which_a_row_cannot_be_read_fails_that_row(tmp_path: Path) -> None:
    data = of_zarr(tmp_path)
    (chunk,) = tmp_path.glob("x.zarr/c/3/0/0/0")
    chunk.write_bytes(b"damaged")
    result = extract(data, tmp_path / "out.h5")
    assert [key for key, _ in result.failures] == ["000006", "000007"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: of_h5py(folder).file, r"File: a File holds arrays by name. Give one of them: data\['images'\]"),
        (lambda folder: of_xarray(folder).to_dataset(name="images"), r"a Dataset holds .*: data\['images'\]"),
        (lambda folder: zarr.open_group(str(folder / "g"), mode="w"), "a Group holds arrays by name.*it has none"),
        (lambda folder: Foreign(PIXELS[:0]), "Foreign is empty"),
        (lambda folder: Foreign(PIXELS[0, 0, 0]), "expected a map-style Dataset"),
    ],
)
def test_what_holds_arrays_says_which_to_give(make: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=message):
        open_source(make(tmp_path))
