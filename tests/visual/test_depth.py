"""What a run keeps of near zeros and effective dimension: numpy on the maps it stored, whatever the way to the file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import runs
import shardfiles
import torch
from runs import extract, make_photos
from torch import nn

import fmextract
from fmextract.cli import main
from fmextract.pipeline.running_stats import RunningStats
from fmextract.planning import Plan
from fmextract.records import LayerSpec
from fmextract.storage.digest import content_digest
from fmextract.storage.layer_stats import COVARIANCE, NEAR_ZERO, TOP
from fmextract.storage.shards import PLAN
from fmextract.visual import depth

ATTRS = ("effective_dimension", "effective_dimension_rows")
EXACT = 1e-9


class Kinds(nn.Module):
    """Maps with signs and after a ReLU, tokens, features, and more channels than are kept exactly."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 6, 3)
            self.relu = nn.ReLU()
            self.norm = nn.LayerNorm(6)
            self.fc = nn.Linear(6, 5)
            self.wide = nn.Linear(6, 1100)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.relu(self.conv(x))
        tokens = self.norm(maps.flatten(2).transpose(1, 2))
        return self.wide(self.fc(tokens.mean(1)).repeat(1, 2)[:, :6])


OPTIONS: Mapping[str, Any] = {"layers": ["conv", "relu", "norm", "fc", "wide"], "model": Kinds(), "top_k": 3}


def vectors(layer: Any) -> np.ndarray:
    """(images, channels) float64: the mean of each channel over its positions, of sound rows."""
    maps = layer[:].astype(np.float64)
    role = 1 + layer.spec.channel_axis
    means = maps.mean(tuple(axis for axis in range(1, maps.ndim) if axis != role))
    return means[np.isfinite(means).all(1)]


def participation(rows: np.ndarray) -> float:
    found = np.linalg.eigvalsh(np.cov(rows.T))
    return float(found.sum() ** 2 / (found**2).sum())


def check(acts: fmextract.Activations) -> None:
    """Both statistics against numpy on what is stored."""
    for name in acts:
        layer = acts[name]
        maps, below = layer[:][acts.status == 0].astype(np.float64), layer.spec.near_zero_below
        by_channel = np.moveaxis(maps, 1 + layer.spec.channel_axis, 0).reshape(
            maps.shape[1 + layer.spec.channel_axis], -1
        )
        finite = np.isfinite(by_channel)
        near = ((np.abs(by_channel) <= below) & finite).sum(1) / finite.sum(1)
        np.testing.assert_allclose(layer.stats.near_zero_fraction, near, rtol=1e-15, err_msg=name)
        assert (layer.stats.near_zero_fraction >= layer.stats.zero_fraction).all()
        found, rows = layer.effective_dimension, vectors(layer)
        assert found.rows == len(rows)
        assert found.estimated == (name == "wide")
        assert found.value == pytest.approx(participation(rows), rel=0.02 if found.estimated else EXACT), name
    for row in depth.measure_depth(acts):
        layer = acts[row.layer]
        values = layer[:][acts.status == 0].astype(np.float64)
        values = values[np.isfinite(values)]
        assert row.near_zeros == pytest.approx((np.abs(values) <= row.near_zero_below).mean(), rel=1e-12)
        assert row.zeros == pytest.approx((values == 0).mean(), rel=1e-12)
        assert row.effective_dimension == layer.effective_dimension.value


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen pictures, of which one is broken."""
    return make_photos(tmp_path_factory.mktemp("depth") / "photos", 14, {5: b"not a picture"})


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one shard, and so one file."""
    out = tmp_path_factory.mktemp("depth") / "whole.h5"
    extract(photos, out, **OPTIONS, shard_size="1GiB", max_failures="1")
    return out


@pytest.fixture(scope="module")
def shards(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in shards of four rows."""
    out = tmp_path_factory.mktemp("depth") / "shards"
    extract(photos, out, **OPTIONS, max_failures="1")
    return out


def names(path: Path, layer: str = "relu") -> set[str]:
    """What stands in `stats/` of a file, and which of the attributes."""
    with h5py.File(path) as file:
        group = file["layers"][layer]
        return {*group["stats"], *(name for name in group.attrs if name.startswith("effective"))}


def dimensions(path: Path) -> dict[str, float]:
    with fmextract.open(path) as acts:
        return {name: acts[name].effective_dimension.value for name in acts}


def test_a_run_keeps_both_for_maps_tokens_and_features(whole: Path) -> None:
    with fmextract.open(whole) as acts:
        assert acts["norm"].axes == ("sample", "token", "feature")
        check(acts)
        assert acts["wide"].attrs["effective_dimension_estimated"] == 1
    assert set(ATTRS) < names(whole)
    assert not names(whole) & {*COVARIANCE, "component"}, "of one shard there is nothing to be merged"


def test_shards_hold_what_the_whole_is_merged_of(shards: Path, whole: Path) -> None:
    assert len(list(shards.glob("*.h5"))) == 4
    assert {*COVARIANCE, "component", "covariance_bin"} < names(shards / "shard-00000.h5")
    assert not set(ATTRS) & names(shards / "shard-00000.h5"), "it would be that of the first shard alone"
    with fmextract.open(shards) as acts:
        check(acts)
    assert dimensions(shards) == pytest.approx(dimensions(whole), rel=EXACT)


def test_a_shard_alone_has_those_of_its_rows(shards: Path) -> None:
    with fmextract.open(shards / "shard-00001.h5") as acts:
        assert acts["fc"].effective_dimension.rows == 3  # of four, of which one is broken
        check(acts)


def test_the_threshold_is_a_hundredth_of_the_root_mean_square(photos: Path, tmp_path: Path) -> None:
    extract(photos, tmp_path / "two.h5", **OPTIONS, limit=2)  # as many as it is taken of
    with fmextract.open(tmp_path / "two.h5") as acts:
        for name in acts:
            rms = math.sqrt(np.square(acts[name][:], dtype=np.float64).mean())
            assert acts[name].attrs["near_zero_below"] == pytest.approx(0.01 * rms, rel=1e-6), name
            assert acts[name].attrs["near_zero_below"] == np.float32(acts[name].attrs["near_zero_below"])


def test_the_threshold_is_the_plans_and_the_same_in_every_file(whole: Path, shards: Path) -> None:
    plan = Plan.from_json(json.loads((shards / PLAN).read_text()))
    bounds = {layer.name: layer.near_zero_below for layer in plan.layers}
    for path in (whole, shards, *shards.glob("*.h5")):
        with fmextract.open(path) as acts:
            assert {name: acts[name].attrs["near_zero_below"] for name in acts} == bounds


def test_one_file_of_several_shards_holds_what_one_shard_would(
    photos: Path, shards: Path, whole: Path, tmp_path: Path
) -> None:
    assert main(["pack", str(shards), "-o", str(tmp_path / "packed.h5")]) == 0
    extract(photos, tmp_path / "folded.h5", **OPTIONS, max_failures="1")
    for path in (tmp_path / "packed.h5", tmp_path / "folded.h5"):
        assert names(path, "wide") == names(whole, "wide")
        assert dimensions(path) == pytest.approx(dimensions(whole), rel=EXACT)
        with fmextract.open(path) as acts:
            check(acts)
        assert main(["verify", str(path)]) == 0


def test_a_directory_of_one_shard_can_be_packed(photos: Path, whole: Path, tmp_path: Path) -> None:
    extract(photos, tmp_path / "one", **OPTIONS, shard_size="1GiB", max_failures="1")
    assert main(["pack", str(tmp_path / "one"), "-o", str(tmp_path / "one.h5")]) == 0
    assert dimensions(tmp_path / "one.h5") == dimensions(tmp_path / "one") == dimensions(whole)


def test_rows_that_were_left_out_of_a_packed_file_count_nowhere(shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in shards.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    for lost in ("shard-00001.h5", "shard-00001.json", "index.json"):
        (copy / lost).unlink()
    assert main(["pack", str(copy), "-o", str(tmp_path / "part.h5"), "--leave-out", "4-7"]) == 0
    with fmextract.open(tmp_path / "part.h5") as acts:
        assert acts["fc"].effective_dimension.rows == 10
        check(acts)


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(photos: Path, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "resumed"
    runs.extract_until(12, photos, out, **OPTIONS, max_failures="1")
    assert extract(photos, out, **OPTIONS, max_failures="1").resumed_images > 0
    runs.same(out, shards)
    assert dimensions(out) == dimensions(shards)
    for shard in shards.glob("*.h5"):
        with h5py.File(shard) as once, h5py.File(out / shard.name) as again:
            for name in (f"layers/{layer}/stats/{kept}" for layer in once["layers"] for kept in COVARIANCE):
                np.testing.assert_array_equal(once[name], again[name])


def test_the_covariance_is_numpys_and_part_of_the_digest(shards: Path, tmp_path: Path) -> None:
    path = tmp_path / "shard.h5"
    path.write_bytes((shards / "shard-00002.h5").read_bytes())
    with fmextract.open(path) as acts, h5py.File(path) as file:
        found = vectors(acts["conv"])
        stats = file["layers/conv/stats"]
        np.testing.assert_allclose(stats["covariance"], np.cov(found.T, bias=True), rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(stats["covariance_mean"], found.mean(0), rtol=1e-6)
        assert stats["covariance_count"][:].tolist() == [len(found)] * 6
        assert [dim[0].name for dim in stats["covariance"].dims] == [
            "/layers/conv/stats/component", "/layers/conv/stats/covariance_bin"]  # fmt: skip
    digest = content_digest(path)
    with h5py.File(path, "r+") as file:
        file["layers/conv/stats/covariance"][1, 2] += 1e-9
    assert content_digest(path) != digest
    assert main(["verify", str(path)]) == 5


def test_images_with_values_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    class Sometimes(Kinds):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(torch.where((x[:, :1, :1, :1] > 0.9), torch.nan, x))

    bad = np.full((8, 8, 3), 255, np.uint8)
    pictures = [np.random.default_rng(i).integers(0, 200, (8, 8, 3), np.uint8) for i in range(9)]
    pictures[1], pictures[7] = bad, bad
    for out, size in (("one.h5", "1GiB"), ("several", 1)):
        extract(pictures, tmp_path / out, **{**OPTIONS, "model": Sometimes()}, shard_size=size)
        with fmextract.open(tmp_path / out) as acts:
            assert {acts[name].effective_dimension.rows for name in acts} == {7}
            check(acts)


def test_too_few_good_images_have_no_dimension(photos: Path, tmp_path: Path) -> None:
    extract(photos, tmp_path / "one.h5", **OPTIONS, limit=1)
    with fmextract.open(tmp_path / "one.h5") as acts:
        assert all(math.isnan(acts[name].effective_dimension.value) for name in acts)
        assert [row.effective_dimension_rows for row in depth.measure_depth(acts)] == [1] * 5
    assert main(["show", "depth", str(tmp_path / "one.h5"), "-o", str(tmp_path / "d.png")]) == 0


def test_layers_without_maps_have_those_of_what_was_captured(photos: Path, tmp_path: Path) -> None:
    layers = ["relu", "relu=top", "relu=mean"]
    extract(photos, tmp_path / "a.h5", **{**OPTIONS, "layers": layers}, max_failures="1")
    with fmextract.open(tmp_path / "a.h5") as acts:
        full, top, mean = (acts[name] for name in layers)
        assert top.effective_dimension == full.effective_dimension
        np.testing.assert_array_equal(top.stats.near_zero_fraction, full.stats.near_zero_fraction)
        assert mean.effective_dimension.value == pytest.approx(full.effective_dimension.value, rel=1e-4)


def test_a_layer_whose_axes_have_no_role_has_neither(tmp_path: Path, photos: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1).unflatten(1, (4, 6, 8)).sort(1).values

    extract(photos, tmp_path / "odd.h5", model=nn.Sequential(Odd()), layers=["0"], max_failures="1")
    with fmextract.open(tmp_path / "odd.h5") as acts:
        assert acts["0"].spec.channel_axis is None
        assert acts["0"].effective_dimension is None
        assert "near_zero_below" not in acts["0"].attrs


# ------------------------------------------------------------------------------------------------ earlier versions


def earlier(path: Path, values: np.ndarray, start: int = 0) -> LayerSpec:
    """A file as it was before these two statistics: sound in every other way."""
    spec = shardfiles.layer("conv", values.shape[1:], "channel y x")
    running = RunningStats(values.shape[1:], ("channel", "y", "x"), 2, torch.device("cpu"))
    running.update(torch.from_numpy(values), start)
    stats = {name: found for name, found in running.result().items() if name not in COVARIANCE}
    assert NEAR_ZERO not in stats
    assert set(TOP) < set(stats)
    shardfiles.write(path, {spec: values}, start=start, stats={"conv": stats})
    return spec


def test_files_of_earlier_versions_are_shown_without(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "old.h5"
    earlier(path, np.random.default_rng(0).normal(size=(8, 3, 4, 4)).astype(np.float32))
    with fmextract.open(path) as acts:
        assert acts["conv"].effective_dimension is None
        assert acts["conv"].spec.near_zero_below is None
        (row,) = depth.measure_depth(acts)
    assert (row.near_zeros, row.effective_dimension, row.effective_dimension_rows) == (None, None, None)
    assert main(["show", "depth", str(path), "-o", str(tmp_path / "depth.png")]) == 0
    said = capfd.readouterr().out
    assert "zeros" in said
    assert "near zero" not in said
    assert "dimension" not in said
    assert main(["verify", str(path)]) == 0
    assert main(["report", str(path), "-o", str(tmp_path / "report.html")]) == 0


def test_a_run_begun_by_an_earlier_version_is_finished_as_it_began(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "begun"
    runs.extract_until(12, photos, out, **OPTIONS, max_failures="1")
    plan = json.loads((out / PLAN).read_text())
    del plan["digest"]
    for layer in plan["layers"]:
        del layer["near_zero_below"]
    (out / PLAN).write_text(json.dumps(plan))
    for shard in out.glob("*.h5"):  # what an earlier version left, with a record that says so
        record = shard.with_suffix(".json")
        shard.unlink()
        record.unlink()
    extract(photos, out, **OPTIONS, max_failures="1")
    with fmextract.open(out) as acts:
        assert NEAR_ZERO not in acts["relu"].stats.names
        assert {row.near_zeros for row in depth.measure_depth(acts)} == {None}


# ------------------------------------------------------------------------------------------------------ what is told


def test_the_table_says_what_the_columns_are(whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "depth", str(whole)]) == 0
    head, *lines = capfd.readouterr().out.splitlines()
    assert head.split()[:6] == ["layer", "type", "channels", "zeros", "near", "zero"]
    with fmextract.open(whole) as acts:
        told = dict(zip(acts.layers, lines, strict=False))
        assert f" {acts['relu'].effective_dimension.value:#.3g} " in told["relu"]
        assert f" ~{acts['wide'].effective_dimension.value:#.3g} " in told["wide"]
    assert "zeros included" in lines[-2]
    assert "over 13 images; ~ is estimated" in lines[-1]


def test_json_has_the_numbers_and_null_for_what_is_not_known(
    whole: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", "depth", str(whole), "--json", "-l", "wide"]) == 0
    (row,) = json.loads(capfd.readouterr().out)
    assert row["effective_dimension_estimated"] is True
    assert row["effective_dimension_rows"] == 13
    extract(photos, tmp_path / "one.h5", **OPTIONS, limit=1)
    assert main(["show", "depth", str(tmp_path / "one.h5"), "--json", "-l", "fc"]) == 0
    (row,) = json.loads(capfd.readouterr().out)
    assert row["effective_dimension"] is None
