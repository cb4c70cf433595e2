"""Labels and columns of a source through a file, shards, packing, exports and a torch Dataset: as they were given."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import h5py
import netCDF4
import numpy as np
import pandas
import pytest
import runs
import torch
import xarray
from files import make_file, make_shards

import fmextract as fm
from fmextract.errors import ConfigError, FmextractError, FormatError
from fmextract.reading import activations
from fmextract.run import packing
from fmextract.storage.columns import common_form, form_of, stored_names
from fmextract.verification import verify

COLUMNS: dict[str, list[Any]] = {
    "int": [3, 0, 7, 3, 2**40, 5],
    "int with gaps": [3, None, 7, 3, None, 5],
    "-1 is a label": [-1, 0, 1, -1, 0, 1],
    "-1 beside None": [-1, None, 1, -1, 0, None],
    "float": [0.5, -1.25, 3.0, 1e300, 0.1, 2.0],
    "float with gaps": [0.5, None, 3.0, 2.0, None, 2.0],
    "multi-hot": [[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1], [-1, 0, 0]],
    "multi-hot with gaps": [[1, 0], None, [-1, 1], [0, 1], [0, 0], None],
    "coordinates": [[0.5, 1], [2, 3], [4, 5.5], [6, 7], [8, 9], [10, 11.0]],
    "coordinates with gaps": [[0.5, 1.0], None, [4, 5.5], [6.0, 7], None, [8.0, 9]],
    "text": ["cat", "né 猫", "dog", "cat", "a b", "cat"],
    "text with gaps": ["cat", None, "dog", None, "cat", "cat"],
    "tags": [["a", "b"], [], ["c"], ["a"], [], ["b"]],
    "ragged": [[1], [1, 2], [], [3.5], None, [1]],
    "boxes": [{"boxes": [[1, 2, 3, 4]], "class": ["cat"]}, {}, None, {"boxes": []}, {"a": 1}, {"b": None}],
    "one of each": [1, 2.5, [3], {"four": 4}, None, 6],
}


def written(tmp_path: Path, values: list[Any], how: str, **columns: Any) -> Path:
    arrays = {"fc": np.arange(12, dtype=np.float32).reshape(6, 2)}
    options: dict[str, Any] = {"labels": values, "chunk": {"fc": (2, 2)}, **columns}
    if how == "one file":
        make_file(tmp_path / "a.h5", arrays, **options)
        return tmp_path / "a.h5"
    make_shards(tmp_path / "a", arrays, [2, 4], **options)
    if how == "shards":
        return tmp_path / "a"
    packing.pack(tmp_path / "a", tmp_path / "packed.h5")
    return tmp_path / "packed.h5"


def same(found: Any, given: Any) -> None:
    assert found == given


@pytest.mark.parametrize("how", ["one file", "shards", "packed"])
@pytest.mark.parametrize("name", COLUMNS)
def test_labels_and_columns_come_back_as_they_were_given(tmp_path, name, how):
    values = COLUMNS[name]
    path = written(tmp_path, values, how, columns={"condition": values, "sex": list("mfmfmf")})
    with fm.open(path) as acts:
        same(acts.listed(), values)
        same(acts.listed("condition"), values)
        assert list(acts.columns) == ["condition", "sex"]
        assert acts.columns["sex"].tolist() == list("mfmfmf")
        assert acts.listed("nothing") is None
        assert acts.labels is not None
        assert len(acts.labels) == len(acts.columns["condition"]) == 6
    if how != "shards":  # whose plan is none of a run
        assert verify(path).ok


def test_arrays_that_people_get(tmp_path):
    def arrays(values: list[Any]) -> tuple[Any, Any]:
        path = written(tmp_path, values, "one file", columns={"x": values})
        with fm.open(path) as acts:
            return acts.labels, acts.columns["x"]

    for name in ("int", "-1 is a label", "multi-hot"):
        for array in arrays(COLUMNS[name]):
            assert array.dtype == np.int64
            np.testing.assert_array_equal(array, COLUMNS[name])
    labels, column = arrays(COLUMNS["int with gaps"])
    assert labels.tolist() == [3, -1, 7, 3, -1, 5]
    np.testing.assert_array_equal(column, [3, np.nan, 7, 3, np.nan, 5])
    for array in arrays(COLUMNS["-1 beside None"]):
        np.testing.assert_array_equal(array, [-1, np.nan, 1, -1, 0, np.nan])
    for array in arrays(COLUMNS["multi-hot with gaps"]):
        np.testing.assert_array_equal(array, [[1, 0], [np.nan] * 2, [-1, 1], [0, 1], [0, 0], [np.nan] * 2])
    for array in arrays(COLUMNS["text with gaps"]):
        assert array.tolist() == ["cat", "", "dog", "", "cat", "cat"]
    for array in arrays(COLUMNS["ragged"]):
        assert array.tolist() == COLUMNS["ragged"]


def test_what_other_readers_see(tmp_path):
    columns = {
        "condition": ["a", "b", None, "a", "b", "c"],
        "subject": [1, None, 3, 4, 5, 6],
        "reaction time": [0.5, 1.5, None, 2, 3, 4],
    }
    path = written(tmp_path, COLUMNS["multi-hot"], "one file", columns=columns)
    for engine in ("h5netcdf", "netcdf4"):
        with xarray.open_dataset(path, engine=engine) as file:
            assert file["condition"].dims == ("sample",)
            assert file["condition"].values.tolist() == ["a", "b", "", "a", "b", "c"]
            np.testing.assert_array_equal(file["subject"], [1, np.nan, 3, 4, 5, 6])
            np.testing.assert_array_equal(file["reaction time"], [0.5, 1.5, np.nan, 2, 3, 4])
            assert file["label"].dims == ("sample", "label_index")
            np.testing.assert_array_equal(file["label"], COLUMNS["multi-hot"])
    with netCDF4.Dataset(path) as file:
        assert file["subject"][:].mask.tolist() == [False, True, False, False, False, False]
    with h5py.File(path) as file:
        assert file["label"].dtype == np.int64
        assert file["label"].dims[1][0].name == "/label_index"


def test_names_that_the_file_needs_itself(tmp_path):
    names = ["status", "layers", "label", "sample", "a/b", "", "x", "x_index", "file_size", "né", "y" * 400, "y" * 401]
    stored = stored_names(names)
    assert [stored[name] for name in ("status", "layers", "label", "x", "né")] == [
        "column_status",
        "column_layers",
        "column_label",
        "x",
        "né",
    ]
    assert len(set(stored.values())) == len(names)
    columns = {name: list(range(place, place + 6)) for place, name in enumerate(names)}
    path = written(tmp_path, [1] * 6, "packed", columns=columns)
    with fm.open(path) as acts:
        assert {name: values.tolist() for name, values in acts.columns.items()} == columns
        assert acts.status.tolist() == [0] * 6
    with xarray.open_dataset(path, engine="netcdf4") as file:
        assert file["column_status"].values.tolist() == columns["status"]


def test_a_column_of_nothing_is_none(tmp_path):
    for how in ("one file", "shards", "packed"):
        (tmp_path / how).mkdir()
        path = written(tmp_path / how, [None] * 6, how, columns={"x": [None] * 6, "y": [None] * 5 + [1]})
        with fm.open(path) as acts:
            assert acts.labels is None
            assert list(acts.columns) == ["y"]
            np.testing.assert_array_equal(acts.columns["y"], [np.nan] * 5 + [1])


def test_forms_over_shards():
    for one, other, kind in (
        ([1, 2], [0.5], "float"),
        ([1], ["a"], "text"),
        ([[1, 2]], [[1.5, 2]], "float"),
        ([[1, 2]], [[1, 2, 3]], "json"),
        ([1], [[1]], "json"),
        ([None], [1], "int"),
    ):
        form = common_form([form_of(one), form_of(other)])
        assert form is not None
        assert form.kind == kind
    assert common_form([None, None]) is None


# ---------------------------------------------------------------------------------------------------- torch, exports


@pytest.mark.parametrize(
    ("values", "wanted", "classes"),
    [
        ([3, None, 7, 3, 0, 5], [3, 7, 3, 0, 5], ()),
        ([0.5, 1, 2, None, 3, 4], [0.5, 1, 2, 3, 4], ()),
        ([[1, 0], [0, 0], [1, 1], [0, 1], None, [1, 0]], [[1, 0], [0, 0], [1, 1], [0, 1], [1, 0]], ()),
        (["dog", "cat", None, "cat", "elk", "dog"], [1, 0, 0, 2, 1], ("cat", "dog", "elk")),
    ],
)
def test_a_torch_dataset_with_labels(tmp_path, values, wanted, classes):
    with fm.open(written(tmp_path, values, "shards", columns={"x": values})) as acts:
        rows = [row for row in range(6) if values[row] is not None]
        for labels in (True, "x"):
            data = acts.dataset("fc", labels=labels)
            assert data.classes == classes
            assert data.rows.tolist() == rows
            for item in range(5):
                row, tensor, label = data[item]
                assert row == rows[item]
                assert tensor.tolist() == [2 * row, 2 * row + 1]
                assert label.tolist() == wanted[item]
            loaded = [batch[2] for batch in torch.utils.data.DataLoader(data, batch_size=2)]
            assert torch.cat(loaded).tolist() == wanted
            whole = [batch[2] for batch in torch.utils.data.DataLoader(data, sampler=data.batches(4), batch_size=None)]
            assert torch.cat(whole).tolist() == wanted
        assert len(acts.dataset("fc")) == 6
        assert len(acts.dataset("fc")[0]) == 2
        with pytest.raises(ConfigError, match=r"has no column 'y'\. Columns of images: 'x'"):
            acts.dataset("fc", labels="y")


def test_labels_that_make_no_tensor(tmp_path):
    with fm.open(written(tmp_path, COLUMNS["tags"], "one file")) as acts, pytest.raises(ConfigError, match="no tensor"):
        acts.dataset("fc", labels=True)


@pytest.mark.parametrize("name", ["float with gaps", "multi-hot", "-1 beside None", "tags", "text"])
def test_exports_take_them_along(tmp_path, name):
    values = COLUMNS[name]
    path = written(tmp_path, values, "shards", columns={"x": values, "status": list("mfmfmf")})
    fm.export(path, to="npy", out=tmp_path / "npy")
    table = pandas.read_csv(tmp_path / "npy" / "rows.csv", dtype=str, keep_default_na=False)
    cells = ["" if v is None else json.dumps(v) if isinstance(v, list) else str(v) for v in values]
    assert table["label"].tolist() == table["x"].tolist() == cells
    assert table["column_status"].tolist() == list("mfmfmf")
    fm.export(path, to="parquet", out=tmp_path / "a.parquet")
    frame = pandas.read_parquet(tmp_path / "a.parquet")
    for column in ("label", "x"):
        found = [one.tolist() if isinstance(one, np.ndarray) else one for one in frame[column]]
        wanted = [json.dumps(v) if name == "tags" else v for v in values]
        assert [None if isinstance(one, float) and math.isnan(one) else one for one in found] == wanted
    fm.export(path, to="netcdf", out=tmp_path / "a.nc")
    with fm.open(tmp_path / "a.nc") as acts:
        same(acts.listed(), values)
        same(acts.listed("x"), values)
    fm.export(path, to="safetensors", out=tmp_path / "a.safetensors")
    header = (tmp_path / "a.safetensors").read_bytes()
    said = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]
    assert json.loads(said["labels"]) == json.loads(said["columns"])["x"] == values
    fm.export(path, to="rdm", out=tmp_path / "rdm.h5")
    with h5py.File(tmp_path / "rdm.h5") as file:
        assert {"label", "x", "column_status"} <= set(file["pattern_descriptors"].attrs) | set(
            file["pattern_descriptors"]
        )


# -------------------------------------------------------------------------------------------------------- hostile files


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file["label"].__setitem__(0, "not JSON"),
        lambda file: file["label"].__setitem__(0, "[" * 100_000),
        lambda file: file["label"].attrs.__setitem__("encoding", "pickle"),
        lambda file: file["label"].attrs.__setitem__("encoding", 7),
        lambda file: file["x"].attrs.__setitem__("column", 7),
        lambda file: file["y"].attrs.__setitem__("_FillValue", "text"),
        lambda file: file["y"].attrs.__setitem__("_FillValue", [1, 2]),
        lambda file: (file.__delitem__("y"), file.create_dataset("y", data=[1, 2]).attrs.__setitem__("column", "y")),
        lambda file: (
            file.__delitem__("y"),
            file.create_dataset("y", data=np.zeros((6, 1, 1))).attrs.__setitem__("column", "y"),
        ),
        lambda file: (
            file.__delitem__("label"),
            file.create_dataset("label", data=np.zeros(6, np.float32)),
        ),
    ],
)
def test_columns_that_are_not_what_was_written(tmp_path, spoil):
    path = written(tmp_path, COLUMNS["tags"], "one file", columns={"x": COLUMNS["text"], "y": COLUMNS["int with gaps"]})
    with h5py.File(path, "r+") as file:
        spoil(file)
    with pytest.raises(FormatError), fm.open(path) as acts:
        _ = acts.labels, acts.columns


def test_a_flipped_label_is_found(tmp_path):
    path = written(tmp_path, COLUMNS["multi-hot"], "one file", columns={"x": COLUMNS["text"]})
    with h5py.File(path, "r+") as file:
        file["label"][2, 1] = 0
    assert not verify(path).ok


# ---------------------------------------------------------------------------------------------------------------- runs


class Items:
    def __init__(self, labels: list[Any], named: bool = False) -> None:
        self.labelled, self.named = labels, named

    def __len__(self) -> int:
        return len(self.labelled)

    def __getitem__(self, row: int) -> Any:
        image = np.full((8, 8, 3), 20 * row, np.uint8)
        label = self.labelled[row]
        return {"img": image, "labels": label} if self.named else (image, label)


@pytest.mark.parametrize("kind", ["threads", "processes"])
@pytest.mark.parametrize(
    "labels",
    [
        [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.5])] * 5,
        [np.float32(0.5), np.float64(1.25)] * 5,
        [-1, None] * 5,
        [torch.tensor(True), np.bool_(False)] * 5,
        [np.array([3]), np.array([4])] * 5,
        [["a"], ["b", "c"]] * 5,
    ],
    ids=["vectors", "floats", "-1 and None", "bools", "arrays of one", "ragged"],
)
def test_labels_of_a_dataset_through_a_run(tmp_path, labels, kind):
    """Over three shards; a run that is stopped and goes on stores the same."""
    wanted = [one.tolist() if hasattr(one, "tolist") else one for one in labels]
    wanted = [one[0] if isinstance(one, list) and isinstance(one[0], int) else one for one in wanted]
    for named in (False, True):
        data = Items(labels, named)
        out = tmp_path / f"{named}.h5"
        runs.extract_until(4, data, out, worker_kind=kind)
        runs.extract(data, out, worker_kind=kind)
        with fm.open(out) as acts:
            same(acts.listed(), [int(one) if isinstance(one, bool) else one for one in wanted])


def test_labels_that_cannot_be_stored_are_said(tmp_path):
    made = runs.extract(Items([1, 2, 3, np.zeros((8, 8, 3)), 5]), tmp_path / "a.h5")
    assert [note for note in made.notes if "The first: row 3, ndarray of shape (8, 8, 3)" in note]
    with fm.open(tmp_path / "a.h5") as acts:
        assert acts.listed() == [1, 2, 3, None, 5]


def test_other_labels_are_another_run(tmp_path):
    photos = runs.make_photos(tmp_path / "photos", 5)
    for labels in ("abcde", "abcdX"):
        (photos / "m.csv").write_text("path,label\n" + "".join(f"{n:04}.png,{labels[n]}\n" for n in range(5)))
        if labels == "abcde":
            runs.extract(photos / "m.csv", tmp_path / "a.h5")
    with pytest.raises(FmextractError, match="source"):
        runs.extract(photos / "m.csv", tmp_path / "a.h5")


def test_columns_of_a_manifest_through_a_run(tmp_path):
    photos = runs.make_photos(tmp_path / "photos", 10)
    lines = [f"{n:04}.png; {n / 4} ;{'ab'[n % 2]};{n if n != 3 else ''};x{n}" for n in range(10)]
    (photos / "m.csv").write_text("\n".join([" Path ; Label;condition;subject;status", *lines]))
    runs.extract_until(4, photos / "m.csv", tmp_path / "a.h5")
    runs.extract(photos / "m.csv", tmp_path / "a.h5")
    with fm.open(tmp_path / "a.h5") as acts:
        np.testing.assert_array_equal(acts.labels, np.arange(10) / 4)
        assert acts.columns["condition"].tolist() == ["a", "b"] * 5
        np.testing.assert_array_equal(acts.columns["subject"], [0, 1, 2, np.nan, 4, 5, 6, 7, 8, 9])
        assert acts.columns["status"].tolist() == [f"x{n}" for n in range(10)]
    with xarray.open_dataset(tmp_path / "a.h5") as file:
        assert file["condition"].values.tolist() == ["a", "b"] * 5


def test_folder_labels_through_a_run(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "photos" / name / f"{number}.png").write_bytes(runs.picture(number))
    made = runs.extract(tmp_path / "photos", tmp_path / "a.h5", label="folder")
    assert not [note for note in made.notes if "--label" in note]
    with fm.open(tmp_path / "a.h5") as acts:
        assert acts.labels is not None
        assert acts.labels.tolist() == ["cat"] * 3 + ["dog"] * 3
        assert [label.item() for *_, label in acts.dataset("fc", labels=True)] == [0, 0, 0, 1, 1, 1]
    made = runs.extract(tmp_path / "photos", tmp_path / "b.h5")
    assert [note for note in made.notes if "--label folder takes them" in note]
    with fm.open(tmp_path / "b.h5") as acts:
        assert acts.labels is None


def test_a_source_that_nobody_can_read_is_one_message_before_the_run(tmp_path):
    class Sides(Items):
        def __getitem__(self, row: int) -> Any:
            return {"left": np.zeros((8, 8, 3), np.uint8), "right": np.zeros((8, 8, 3), np.uint8)}

    with pytest.raises(ConfigError, match="'left' and 'right', and each may be the image"):
        runs.extract(Sides([1] * 8), tmp_path / "a.h5")


def test_arrays_as_people_have_them_give_the_same_activations(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    runs.extract(pixels, tmp_path / "uint8.h5")
    others = {"float": pixels / 255, "int": pixels.astype(np.int64), "big": pixels.astype(">u2") * np.uint16(257)}
    with activations.open(tmp_path / "uint8.h5") as wanted:
        for name, data in others.items():
            runs.extract(data, tmp_path / f"{name}.h5")
            with activations.open(tmp_path / f"{name}.h5") as acts:
                np.testing.assert_array_equal(acts["conv"][:], wanted["conv"][:])
