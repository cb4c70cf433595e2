"""Files that are sound HDF5 and say what fmextract never says: refused, with the place, or read as if nothing were."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import runs
import torch
from files import make_file, make_shards
from torch import nn

from benchmarks import fuzz_structure
from fmextract.common.boxes import photo_box
from fmextract.errors import DamagedError, FmextractError, FormatError
from fmextract.planning import Plan
from fmextract.reading import activations
from fmextract.records import Field
from fmextract.run import recheck
from fmextract.storage import schema, shards
from fmextract.storage.digest import content_digest

MAPS = np.random.default_rng(0).normal(size=(6, 4, 3, 2)).astype(np.float32)
TOP = {name: np.zeros((4, 2), np.int64) for name in ("top_sample", "top_y", "top_x")} | {"top_value": np.ones((4, 2))}
STATS = {name: np.zeros(4) for name in ("count", "mean", "std", "min", "max", "zero_fraction", "nonfinite")} | TOP
SPEC = {"maps": {"field": Field((3.0, 3.0), (1.0, 1.0), (0.5, 0.5)), "erf_size": 2.0, "rel_error": 0.01}}
LAYER = "layers/maps"

Edit = Callable[[h5py.File], Any]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "a.h5"
    make_file(made, {"maps": MAPS}, stats={"maps": STATS}, spec=SPEC, labels=[1] * 6)
    return made


def changed(path: Path, edit: Edit) -> None:
    """Edit a file, and make its digest again where it can be made."""
    with h5py.File(path, "r+", libver=("earliest", "v110")) as file:
        edit(file)
    with contextlib.suppress(FmextractError):
        digest = content_digest(path)
        with h5py.File(path, "r+") as file:
            file.attrs["content_digest"] = digest


def attribute(place: str, name: str, value: Any) -> Edit:
    return lambda file: file[place].attrs.__setitem__(name, value)


def said(name: str, **fields: Any) -> Edit:
    """Fields of a root attribute that holds JSON."""

    def edit(file: h5py.File) -> None:
        file.attrs[name] = json.dumps(json.loads(file.attrs.get(name, "{}")) | fields)

    return edit


def dataset(place: str, values: Any) -> Edit:
    """Another one in the place of a dataset, with its scales."""

    def edit(file: h5py.File) -> None:
        scales = [list(dim.values()) for dim in file[place].dims]
        del file[place]
        file[place] = values
        for axis, some in enumerate(scales[: file[place].ndim]):
            for scale in some:
                file[place].dims[axis].attach_scale(scale)

    return edit


def scales_of(place: str, *lists: Any, type: Any = None) -> Edit:
    """DIMENSION_LIST: per axis, the paths of what is referred to, None for a reference to nothing."""

    def edit(file: h5py.File) -> None:
        made = np.empty(len(lists), object)
        for axis, names in enumerate(lists):
            some = [h5py.Reference() if name is None else file[name].ref for name in names]
            made[axis] = np.array(some, dtype=h5py.ref_dtype)
        del file[place].attrs["DIMENSION_LIST"]
        file[place].attrs.create("DIMENSION_LIST", made, dtype=h5py.vlen_dtype(h5py.ref_dtype))

    return edit


def replaced_list(value: Any) -> Edit:
    def edit(file: h5py.File) -> None:
        del file[f"{LAYER}/activation"].attrs["DIMENSION_LIST"]
        file[f"{LAYER}/activation"].attrs["DIMENSION_LIST"] = value

    return edit


ENUM = np.array(1, dtype=h5py.enum_dtype({"NO": 0, "YES": 1}))
COMPOUND = np.zeros((), [("a", "i4"), ("b", "f8")])
TOO_DEEP: Any = [[] for _ in range(1)]
for _ in range(60):
    TOO_DEEP = [TOO_DEEP]

REFUSED: dict[str, tuple[Edit, str]] = {
    "attribute of another type": (attribute(LAYER, "call", "first"), "/layers/maps: the attribute call: .*whole"),
    "attribute as an enumeration": (attribute(LAYER, "copied", ENUM), "/layers/maps: the attribute copied"),
    "attribute as a compound": (attribute(LAYER, "rel_error", COMPOUND), "/layers/maps: the attribute rel_error"),
    "attribute without a value": (attribute(LAYER, "module", h5py.Empty("f4")), "/layers/maps: the attribute module"),
    "attribute of other length": (attribute(LAYER, "rf_size", np.zeros(3)), "rf_size: expected two numbers"),
    "attribute that is not finite": (attribute(LAYER, "rf_stride", np.full(2, np.inf)), "the attribute rf_stride"),
    "attribute that is negative": (attribute(LAYER, "erf_size", -1.0), "the attribute erf_size"),
    "attribute that is huge": (attribute(LAYER, "mantissa", 2**62), "the attribute mantissa"),
    "attribute that is no text": (attribute("/", "model", np.bytes_(b"\xff\xfe")), "the attribute model: .*UTF-8"),
    "attribute that is missing": (lambda file: file[LAYER].attrs.pop("tap"), "/layers/maps has no attribute tap"),
    "half of a field": (lambda file: file[LAYER].attrs.pop("rf_offset"), "rf_size, rf_stride, rf_offset"),
    "half of a dimension": (attribute(LAYER, "effective_dimension", 2.0), "effective_dimension_rows"),
    "root attribute that is missing": (lambda file: file.attrs.pop("precision"), "has no attribute precision"),
    "crop of nothing": (said("preprocess", crop=[None, None]), r"the attribute preprocess, crop\.0: expected a whole"),
    "crop beyond all memory": (said("preprocess", crop=[65536, 65536]), "preprocess, crop: expected at most"),
    "resize to a text": (said("preprocess", resize="big"), "the attribute preprocess, resize"),
    "mean that is an object": (said("preprocess", mean={"r": 1}), "the attribute preprocess, mean"),
    "number that no float holds": (said("preprocess", mean=[10**400]), "the attribute preprocess: .*too large"),
    "JSON that is too deep": (said("fmextract_config", more=TOO_DEEP), "fmextract_config: .*levels"),
    "JSON with half a character": (said("versions", torch="\ud800"), "the attribute versions"),
    "JSON with NaN": (lambda file: file.attrs.__setitem__("versions", '{"a": NaN}'), "versions: .*NaN"),
    "batch size of none": (said("fmextract_config", batch_size=None), "fmextract_config, batch_size"),
    "input shape of texts": (said("fmextract_config", identity={"input_shape": ["a"]}), r"identity\.input_shape\.0"),
    "column of another type": (dataset("status", np.zeros(6)), "/status of uint8, got float64"),
    "column of numbers for texts": (dataset("key", np.zeros(6)), "/key of text"),
    "column of two axes": (dataset("height", np.zeros((6, 2), np.int32)), "/height with one value per row"),
    "column that is a group": (lambda file: (file.pop("message"), file.create_group("message")), "/message"),
    "label of another type": (dataset("label", np.zeros(6, np.complex64)), "/label"),
    "layer that is a dataset": (lambda file: (file.pop(LAYER), file.create_dataset(LAYER, data=1)), "/layers/maps"),
    "layer of a name that none has": (lambda file: file.move(LAYER, "layers/a%zz"), "a%zz: no layer can have"),
    "scales that are a number": (replaced_list(7), "/layers/maps/activation: its DIMENSION_LIST"),
    "scales that are texts": (replaced_list("sample"), "/layers/maps/activation: its DIMENSION_LIST"),
    "scales that are plain references": (
        lambda file: replaced_list(np.array([file.ref] * 4, h5py.ref_dtype))(file),
        "/layers/maps/activation: its DIMENSION_LIST",
    ),
    "scales of nothing": (scales_of(f"{LAYER}/activation", [None], [], [], []), "a scale of it is not there"),
    "scales that are groups": (scales_of(f"{LAYER}/activation", ["/"], ["/layers"], [], []), "is not there"),
    "scales of too few axes": (scales_of(f"{LAYER}/activation", ["sample"]), "its DIMENSION_LIST"),
    "scales of none": (scales_of(f"{LAYER}/activation", ["sample"], [], [], []), "one scale of its own"),
    "scales of two": (
        scales_of(f"{LAYER}/activation", ["sample"], [f"{LAYER}/y"] * 2, [f"{LAYER}/y"], [f"{LAYER}/x"]),
        "one scale of its own",
    ),
    "scales of other axes": (
        scales_of(f"{LAYER}/activation", ["sample"], [f"{LAYER}/y"], [f"{LAYER}/channel"], [f"{LAYER}/x"]),
        "one scale of its own",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_open_says_what_is_wrong_and_where(path: Path, what: str) -> None:
    edit, place = REFUSED[what]
    changed(path, edit)
    with pytest.raises(FormatError, match=rf"a\.h5.*{place}"):
        activations.open(path)
    with pytest.raises(FormatError, match=r"a\.h5"):
        content_digest(path)


STATISTICS: dict[str, tuple[Edit, str]] = {
    "of another length": (dataset(f"{LAYER}/stats/mean", np.zeros(3)), "stats/mean: expected numbers of 4 channels"),
    "of another rank": (dataset(f"{LAYER}/stats/std", np.zeros((4, 2))), "stats/std"),
    "of shares above one": (dataset(f"{LAYER}/stats/zero_fraction", np.full(4, 2.0)), "stats/zero_fraction"),
    "of counts below none": (dataset(f"{LAYER}/stats/count", np.full(4, -5)), "stats/count"),
    "of counts that are not finite": (dataset(f"{LAYER}/stats/nonfinite", np.full(4, np.nan)), "stats/nonfinite"),
    "of rows that are no integers": (dataset(f"{LAYER}/stats/top_sample", np.zeros((4, 2))), "stats/top_sample"),
    "of one top alone": (dataset(f"{LAYER}/stats/top_y", np.zeros((4, 3), np.int64)), "of one shape"),
}


@pytest.mark.parametrize("what", STATISTICS)
def test_statistics_are_what_they_can_be(path: Path, what: str) -> None:
    edit, place = STATISTICS[what]
    changed(path, edit)
    with (
        activations.open(path) as acts,
        pytest.raises(DamagedError, match=rf"a\.h5: /layers/maps/{place}|a\.h5.*{place}"),
    ):
        acts["maps"].stats  # noqa: B018


def test_what_later_versions_add_is_not_looked_at(path: Path) -> None:
    def edit(file: h5py.File) -> None:
        file.attrs["later"] = COMPOUND
        file.attrs["note"] = "of a later version"
        file[LAYER].attrs["rank"] = 3
        file["later"] = np.zeros(3)
        file["layers"].attrs["order"] = ENUM
        file[f"{LAYER}/stats/kurtosis"] = np.zeros(4)
        file[f"{LAYER}/extra"] = np.zeros((2, 2))

    changed(path, edit)
    with activations.open(path) as acts:
        assert acts.attrs["note"] == "of a later version"
        assert "later" not in acts.attrs
        assert acts["maps"].attrs["rank"] == 3
        np.testing.assert_array_equal(acts["maps"][:], MAPS)
        assert acts["maps"].stats.kurtosis.shape == (4,)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("rows", 10**15),
        ("shard_rows", 0),
        ("layers", [1]),
        ("shards", [[0, 3], [5, 6]]),
        ("estimate", {"seconds": "long"}),
        ("batch_size", True),
        ("notes", "none"),
    ],
)
def test_a_plan_is_checked(tmp_path: Path, name: str, change: Any) -> None:
    runs.extract(runs.make_photos(tmp_path / "photos", 6), tmp_path / "out")
    plan = json.loads((tmp_path / "out/plan.json").read_text())
    assert Plan.from_json(plan).rows == 6
    with pytest.raises(FormatError, match=r"here/plan\.json is damaged"):
        Plan.from_json(plan | {name: change}, "here/plan.json")


@pytest.mark.parametrize("change", [{"name": 3}, {"start": None}, {"extra": {"chunks": []}}, {"statuses": {"0": "4"}}])
def test_a_record_is_checked(tmp_path: Path, change: dict[str, Any]) -> None:
    make_shards(tmp_path / "acts", {"maps": MAPS}, (4,))
    listed = json.loads((tmp_path / "acts/index.json").read_text())
    listed["shards"][1] |= change
    (tmp_path / "acts/index.json").write_text(json.dumps(listed))
    with pytest.raises(FormatError, match=r"acts/index\.json, shard 1 is damaged"):
        shards.read_index(tmp_path / "acts")


# ------------------------------------------------------------------------------------------------------------ booleans


class Positive(nn.Module):
    """A layer of booleans between two of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.signs = Signs()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.signs(x).float().mean((2, 3))


class Signs(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x > 0


def test_booleans_are_stored_as_the_format_says(tmp_path: Path) -> None:
    """Layers, statistics and attributes alike."""
    photos = runs.make_photos(tmp_path / "photos", 3)
    runs.extract(photos, tmp_path / "a.h5", model=Positive(), layers=["signs"], shard_size=None)
    doc = (Path(__file__).parents[2] / "docs/reference/format.md").read_text()
    (kind,) = re.findall(r"Booleans\s+are\s+stored\s+as\s+`(\w+)`", doc)
    with h5py.File(tmp_path / "a.h5") as file:
        layer = file["layers/signs"]
        assert layer["activation"].dtype == layer.attrs["copied"].dtype == kind
        stored = layer["activation"][:]
    assert set(np.unique(stored)) == {0, 1}


# ---------------------------------------------------------------------------------------------------------- the fuzzer


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("subjects")
    fuzz_structure.make_subjects(folder)
    return folder


def test_no_structure_is_met_with_a_foreign_error(subjects: Path) -> None:
    """Mutants of a file, a directory and a run that was not finished, in a process that a crash may end.

    Always the same ones, as many as half a minute of this machine allows; benchmarks/fuzz_structure.py goes on.
    """
    found = [
        f"seed {seed}, {mutant}: {said}"
        for seed, mutant, some in fuzz_structure.search(iter(range(60)), 30, subjects, entries=1)
        for said in some
    ]
    assert not found, "\n".join(found)


def test_the_fuzzer_sees_what_it_looks_for(subjects: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that is not ours, and an error that does not say where."""
    target = subjects / "acts.h5"
    info = ["info", str(target), "--json"]
    assert fuzz_structure.wrong("info", info, target) is None

    def found(error: Exception) -> str | None:
        def raising(acts: activations.Activations) -> None:
            raise error

        monkeypatch.setattr(activations.Activations, "info", raising)
        return fuzz_structure.wrong("info", info, target)

    assert "exit status 1" in (found(KeyError("x")) or "")
    assert "does not name the file" in (found(FormatError("something is wrong")) or "")


def test_the_tables_name_what_a_file_has(path: Path) -> None:
    """What the writer writes is in the schema: else it would be read unchecked."""
    with h5py.File(path) as file:
        assert set(file.attrs) <= set(schema.ROOT)
        assert set(file[LAYER].attrs) <= set(schema.LAYER)
        assert {name for name in file if isinstance(file[name], h5py.Dataset)} <= set(schema.COLUMNS)


def test_rows_that_do_not_count_up_are_refused(path: Path) -> None:
    changed(path, lambda file: file["sample"].__setitem__(3, 10**6))
    with activations.open(path) as acts, pytest.raises(DamagedError, match=r"a\.h5: /sample does not count its rows"):
        acts.samples  # noqa: B018
    changed(path, lambda file: file["sample"].__setitem__(slice(None), np.arange(-6, 0)))
    with pytest.raises(DamagedError, match=r"a\.h5: /sample begins at row -6"):
        activations.open(path)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 7), (-(2**31), -(2**31))])
def test_photos_of_no_size_have_no_boxes(size: tuple[int, int]) -> None:
    """A row whose height and width are not known, or are anything."""
    assert photo_box((0, 0, 4, 4), {"resize": 256, "crop": [224, 224]}, size) is None


def test_plans_of_before_a_field_are_read(tmp_path: Path) -> None:
    runs.extract(runs.make_photos(tmp_path / "photos", 6), tmp_path / "out")
    plan = json.loads((tmp_path / "out/plan.json").read_text())
    old = {name: value for name, value in plan.items() if name not in ("fused", "pooling", "prepacked")}
    assert Plan.from_json(old) == Plan.from_json(plan | {"fused": False, "pooling": False, "prepacked": False})


@pytest.mark.parametrize("missing", ["options", "identity", "layers"])
def test_a_run_that_is_not_told_is_not_run_again(tmp_path: Path, missing: str) -> None:
    runs.extract(runs.make_photos(tmp_path / "photos", 3), tmp_path / "a.h5", shard_size=None)

    def edit(file: h5py.File) -> None:
        config = json.loads(file.attrs["fmextract_config"])
        config.pop(missing, None)
        if missing == "layers":
            config["identity"]["layers"] = ["conv"]
        file.attrs["fmextract_config"] = json.dumps(config)

    changed(tmp_path / "a.h5", edit)
    with activations.open(tmp_path / "a.h5") as acts, pytest.raises(FormatError, match=r"a\.h5.* cannot be run again"):
        recheck.plan_of(acts, "cpu")
