"""Whole runs: memory that runs out, images a model fails on, overflow, non-finite values, several views, plans."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from runs import OPTIONS, Notes, Tiny, extract, make_photos
from torch import nn

import fmextract as fm
from fmextract import planning
from fmextract.common import kernels
from fmextract.config import Config
from fmextract.errors import ConfigError, DeviceLost, NoSpace
from fmextract.reading import activations
from fmextract.records import LayerSpec, Status
from fmextract.run import estimate, sharding
from fmextract.run.extract import make_plan


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_photos(tmp_path / "photos", 11)


# ------------------------------------------------------------------------------- memory and failing forwards


class Hungry(Tiny):
    """Has not enough memory for more than `most` images at once; says so as a device does, or as the CPU does."""

    def __init__(self, most: int, error: Exception) -> None:
        super().__init__()
        self.most, self.error = most, error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > max(self.most, 3) or (len(x) > self.most and not self.probing(x)):
            raise self.error
        return super().forward(x)

    @staticmethod
    def probing(x: torch.Tensor) -> bool:
        """The probe's noise has values that no photo has; its black images are whole batches of one value."""
        return bool(x.abs().max() > 1.0) or not x.any()


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("out of memory"), RuntimeError("DefaultCPUAllocator: not enough memory: you tried to")],
    ids=["device", "cpu"],
)
def test_out_of_memory_halves_the_batch_and_loses_no_row(photos: Path, tmp_path: Path, error: Exception) -> None:
    whole = extract(photos, tmp_path / "whole.h5", batch_size=8)
    halved = extract(photos, tmp_path / "halved.h5", batch_size=8, model=Hungry(2, error))
    assert (whole.batch_size, halved.batch_size) == (8, 2)
    assert halved.failed == 0
    with fm.open(tmp_path / "whole.h5") as a, fm.open(tmp_path / "halved.h5") as b:
        assert list(a.keys) == list(b.keys)
        for name in a.layers:
            np.testing.assert_allclose(b[name][:], a[name][:], rtol=1e-5, atol=1e-6)


def test_no_memory_for_one_image_stops_the_run(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(DeviceLost, match="not enough memory for one image"):
        extract(photos, tmp_path / "out.h5", model=Hungry(0, torch.OutOfMemoryError("full")))
    assert not (tmp_path / "out.h5").exists()


class Picky(Tiny):
    """Raises for an image whose first pixel is that of `enemy`."""

    def __init__(self, enemy: torch.Tensor) -> None:
        super().__init__()
        self.enemy = enemy

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if any(torch.equal(image[:, 0, 0], self.enemy) for image in x):
            raise ValueError("I will not look at this")
        return super().forward(x)


def test_an_image_that_the_model_fails_on_is_a_failed_row(photos: Path, tmp_path: Path) -> None:
    import PIL.Image

    pixel = np.asarray(PIL.Image.open(photos / "0005.png"))[0, 0]
    enemy = (torch.tensor(pixel, dtype=torch.float32) / 255 - 0.5) / 0.5
    expected = extract(photos, tmp_path / "whole.h5")
    result = extract(photos, tmp_path / "picky.h5", model=Picky(enemy))
    assert (expected.failed, result.failed) == (0, 1)
    with fm.open(tmp_path / "whole.h5") as a, fm.open(tmp_path / "picky.h5") as b:
        assert b.status[5] == Status.FORWARD_FAILED
        assert b.messages[5] == "ValueError: I will not look at this"
        others = np.arange(11) != 5
        for name in a.layers:
            assert np.isnan(b[name][5]).all()
            np.testing.assert_array_equal(b[name][others], a[name][others], err_msg="neighbours changed")
        np.testing.assert_array_equal(b["conv"].stats.count, 10 * 64)


# ---------------------------------------------------------------------------------- values that do not fit


class Loud(nn.Module):
    """Multiplies: beyond float16 where a pixel is bright."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.act = nn.Identity()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.act(x * self.factor)
        return made


def test_float16_refuses_what_overflows_unless_told_to_clip(photos: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"layers": ["act"], "dtype": "float16", "model": Loud(1e5)}
    with pytest.raises(ConfigError, match=r"'act' has values beyond ±65504.*--clip"):
        extract(photos, tmp_path / "refused.h5", **options)
    assert not (tmp_path / "refused.h5").exists()
    extract(photos, tmp_path / "clipped.h5", **options, clip=True)
    extract(photos, tmp_path / "exact.h5", layers=["act"], model=Loud(1e5))
    with h5py.File(tmp_path / "clipped.h5") as clipped, h5py.File(tmp_path / "exact.h5") as exact:
        stored, values = clipped["layers/act/activation"], exact["layers/act/activation"][:]
        over = np.abs(values) > 65504
        assert stored.dtype == np.float16
        assert 0 < over.sum() < over.size
        assert clipped["layers/act"].attrs["clipped"] == over.sum()
        np.testing.assert_array_equal(stored[:], np.clip(values, -65504, 65504).astype(np.float16))
        # statistics are of the values before they were made to fit
        np.testing.assert_array_equal(clipped["layers/act/stats/max"][:], exact["layers/act/stats/max"][:])
        assert clipped["layers/act/stats/max"][:].max() > 65504


class Broken(nn.Module):
    """NaN and infinity in an image that is bright in one corner; a second layer whose axes nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.odd = nn.Identity(), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bright = x[:, :1, :1, :1] >= 1
        x = torch.where(bright, x / 0, x)
        made: torch.Tensor = self.odd(torch.from_numpy(self.act(x).numpy().copy()))
        return made


def test_non_finite_values_are_counted_and_named(photos: Path, tmp_path: Path) -> None:
    import PIL.Image

    for path in photos.iterdir():
        pixels = np.array(PIL.Image.open(path))
        pixels[0, 0] = 255 if path.name == "0003.png" else 100
        PIL.Image.fromarray(pixels).save(path)
    result = extract(photos, tmp_path / "out.h5", layers=["act", "odd"], model=Broken())
    counts = {layer.name: layer.nonfinite for layer in result.layers}
    assert counts == {"act": 3 * 64, "odd": 3 * 64}
    assert any("'act'" in note and "0003.png" in note for note in result.notes), result.notes
    assert "no statistics of 1 of 2 layers, in which no axis of channels is known: 'odd'" in result.notes
    with fm.open(tmp_path / "out.h5") as acts:
        assert acts["odd"].axes == ("sample", "axis_1", "axis_2", "axis_3")
        assert acts["act"].stats.nonfinite.tolist() == [64, 64, 64]
        finite = np.isfinite(acts["act"][:])
        assert acts["act"].stats.count.tolist() == finite.sum((0, 2, 3)).tolist()


# ------------------------------------------------------------------------------------------ several views


def test_several_views_of_a_layer_in_one_run(photos: Path, tmp_path: Path) -> None:
    views = ["conv", "conv=mean", "conv=max", "conv=pool:2", "conv=channels:1-2", "conv=flatten", "conv=top"]
    extract(photos, tmp_path / "out.h5", layers=views)
    with fm.open(tmp_path / "out.h5") as acts:
        full = acts["conv"][:]
        assert set(acts.layers) == set(views)
        np.testing.assert_allclose(acts["conv=mean"][:], full.mean((2, 3), dtype=np.float64), rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(acts["conv=max"][:], full.max((2, 3)))
        np.testing.assert_allclose(
            acts["conv=pool:2"][:], full.reshape(11, 4, 2, 4, 2, 4).mean((3, 5)), rtol=1e-5, atol=1e-7
        )
        np.testing.assert_array_equal(acts["conv=channels:1-2"][:], full[:, 1:3])
        np.testing.assert_array_equal(acts["conv=flatten"][:], full.reshape(11, -1))


def test_top_keeps_maxima_and_the_statistics_of_whole_maps(photos: Path, tmp_path: Path) -> None:
    extract(photos, tmp_path / "full.h5", layers=["conv"], top_k=3)
    extract(photos, tmp_path / "top.h5", layers=["conv=top"], top_k=3)
    with fm.open(tmp_path / "full.h5") as full, fm.open(tmp_path / "top.h5") as top:
        maps = full["conv"][:]
        layer = top["conv=top"]
        np.testing.assert_array_equal(layer[:], maps.max((2, 3)))
        for name in full["conv"].stats.names:
            np.testing.assert_array_equal(getattr(layer.stats, name), getattr(full["conv"].stats, name))
        for channel in range(4):
            best = layer.top(channel, 1)[0]
            assert maps[best.row, channel, best.y, best.x] == maps[:, channel].max() == np.float32(best.value)


# -------------------------------------------------------------------------------------------------- plans


def test_a_plan_foretells_the_bytes(photos: Path, tmp_path: Path) -> None:
    config = Config.of(**{**OPTIONS, "layers": ["conv", "fc"]})
    plan = make_plan(photos, Tiny(), tmp_path / "out.h5", config)
    assert not (tmp_path / "out.h5").exists()
    assert list(tmp_path.iterdir()) == [photos], "a plan writes nothing"
    assert plan.estimate.bytes_raw == 11 * 4 * (4 * 64 + 5)
    assert plan.estimate.bytes_stored == pytest.approx(plan.estimate.bytes_raw, rel=0.2)  # noise does not compress
    assert plan.estimate.seconds > 0
    assert planning.Plan.from_json(plan.as_json()) == plan


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_without_compiled_loops_a_run_stores_the_same_and_says_so(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    options: dict[str, Any] = {"precision": precision, "memory_format": "channels_last", "top_k": 3}
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    said = extract(photos, tmp_path / "with" / "out.h5", **options).notes
    assert any("C compiler" in note for note in said) is not kernels.are_there()
    monkeypatch.setattr(kernels, "_library", None)
    said = extract(photos, tmp_path / "without" / "out.h5", **options).notes
    assert any("C compiler" in note for note in said)
    with h5py.File(tmp_path / "with" / "out.h5") as one, h5py.File(tmp_path / "without" / "out.h5") as other:
        for name in one["layers"]:
            a, b = (file["layers"][name] for file in (one, other))
            for i in range(a["activation"].id.get_num_chunks()):
                at = a["activation"].id.get_chunk_info(i).chunk_offset
                assert a["activation"].id.read_direct_chunk(at) == b["activation"].id.read_direct_chunk(at)
            for statistic in a["stats"]:
                np.testing.assert_allclose(a["stats"][statistic], b["stats"][statistic], rtol=1e-12, atol=1e-14)


def test_several_shards_in_one_file_need_twice_the_room(photos: Path, tmp_path: Path) -> None:
    short = Config.of(**OPTIONS)
    one = Config.of(**{**OPTIONS, "shard_size": "1GiB"})
    covariances = 3 * 8 * (4 * 4 + 4 * 4 + 5 * 5)  # of three shards, to be merged: a single file does not hold them
    for config, out, times, more in ((short, "a.h5", 2, covariances), (short, "a", 1, 0), (one, "a.h5", 1, 0)):
        cost = make_plan(photos, Tiny(), tmp_path / out, config).estimate
        assert cost.bytes_needed == times * cost.bytes_stored + more


def test_a_disk_that_cannot_hold_the_run_is_refused_at_once(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5_000))
    notes = Notes()
    with pytest.raises(NoSpace, match=r"needs about .* has 4.9 KiB free.*reducers"):
        extract(photos, tmp_path / "out.h5", notes=notes)
    assert notes.done == 0
    assert not (tmp_path / "out.h5").exists()


def spec(shape: tuple[int, ...], axes: tuple[str, ...]) -> LayerSpec:
    chunk = sharding.chunk_shape(shape, axes, 4, 1_000_000)
    return LayerSpec("a", "a", "Conv2d", 1, 1, "out", "", "", shape, axes, "float32", "float32", chunk)


def test_terabytes_are_told_with_the_reducers_that_help() -> None:
    layers = [spec((256, 56, 56), ("channel", "y", "x"))] * 50
    raw = 1_281_167 * 50 * 4 * 256 * 56 * 56
    cost = planning.Estimate(bytes_raw=raw, bytes_stored=raw // 2)
    (told,) = estimate.advice(layers, cost, 1_281_167, free=10**12)
    assert "187 TiB" in told
    assert "=mean" in told
    assert "=pool:4" in told
    assert estimate.advice(layers, planning.Estimate(bytes_raw=10**9, bytes_stored=10**8), 100, 10**12) == []


@pytest.mark.parametrize(
    ("shape", "axes", "chunk"),
    [
        ((64, 56, 56), ("channel", "y", "x"), (1, 64, 56, 56)),  # 784 KiB: one image
        ((512, 7, 7), ("channel", "y", "x"), (8, 512, 7, 7)),  # 98 KiB: eight are 784 KiB
        ((256, 56, 56), ("channel", "y", "x"), (1, 64, 56, 56)),  # 3.1 MiB: split along channels, evenly
        ((112, 112, 96), ("y", "x", "channel"), (1, 112, 112, 20)),  # channels last: along channels too
        ((1000,), ("feature",), (256, 1000)),
        ((1,), ("feature",), (1024, 1)),  # never more than 1024 images
        ((1, 4000, 4000), ("channel", "y", "x"), (1, 1, 65, 4000)),  # one channel is too large alone
    ],
)
def test_chunks_are_about_a_mebibyte(shape: tuple[int, ...], axes: tuple[str, ...], chunk: tuple[int, ...]) -> None:
    assert sharding.chunk_shape(shape, axes, 4, 1_000_000) == chunk


def test_shards_end_where_every_chunk_and_batch_does() -> None:
    layers = [spec((1000,), ("feature",)), spec((512, 7, 7), ("channel", "y", "x"))]
    for wanted in (1, 700, 5000):
        length = sharding.shard_length(layers, 24, 100_000, wanted)
        assert length % 256 == 0
        assert length % 24 == 0
        assert length >= min(wanted, 768)
    assert sharding.shard_length(layers, 24, 100, 10**6) >= 100


def test_a_shard_is_two_gibibytes_or_five_minutes() -> None:
    def rows(seconds: float, size: int | None = None, one_file: bool = False) -> int:
        cost = planning.Estimate(bytes_stored=1000 << 20, seconds=seconds)
        return sharding.rows_of_shard(cost, 1000, size, one_file)

    assert rows(1.0) == 2048  # 1 MiB an image
    assert rows(10_000.0) == 30  # 10 s an image
    assert rows(10_000.0, 64 << 20) == 64
    assert rows(1.0, one_file=True) == 8 * 2048  # else all of it would be copied into the one file
    assert rows(10_000.0, one_file=True) == 30
    assert rows(1.0, 64 << 20, one_file=True) == 64


def test_python_and_command_line_share_words(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown option 'batchsize'; the closest: batch_size"):
        fm.extract(photos, Tiny(), tmp_path / "out.h5", batchsize=4)
    with pytest.raises(ConfigError, match=r"--clip only means something with --dtype float16"):
        fm.extract(photos, Tiny(), tmp_path / "out.h5", clip=True)
    with pytest.raises(ConfigError, match="--keep-bits 24"):
        fm.extract(photos, Tiny(), tmp_path / "out.h5", keep_bits=24)
    assert fm.plan(photos, Tiny(), **OPTIONS, progress=False).rows == 11


# ------------------------------------------------------------------------------------------ many layers


def test_an_output_is_opened_once(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening checks every object of every layer: of many layers that is much of a short run."""
    opened: list[Any] = []
    original = activations.Activations.__init__

    def counting(self: activations.Activations, *args: Any, **kwargs: Any) -> None:
        opened.append(args)
        original(self, *args, **kwargs)

    monkeypatch.setattr(activations.Activations, "__init__", counting)
    with fm.extract(photos, Broken(), tmp_path / "out.h5", layers=["act"], preprocess="size=8,mean=0,std=1") as acts:
        assert len(opened) == 1
        assert acts["act"].shape[0] == acts.num_rows
