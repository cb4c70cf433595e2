"""The strongest images, what in them did it, and what depth does: tested against numpy on the stored maps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from files import make_file
from looking import Tokens, small_run, write_photos

import fmextract
from fmextract.cli import main
from fmextract.errors import ConfigError
from fmextract.visual import depth
from fmextract.visual.maps import show_maps
from fmextract.visual.top import show_top, strongest
from fmextract.visual.where import localize, show_where


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("top")
    write_photos(root / "photos")
    small_run(root / "photos", root / "acts.h5", effective_fields="never").close()
    small_run(root / "photos", root / "shards", effective_fields="never", shard_size="20KiB").close()
    return root


@pytest.fixture(params=["acts.h5", "shards"])
def acts(place: Path, request: pytest.FixtureRequest) -> Iterator[fmextract.Activations]:
    with fmextract.open(place / request.param) as opened:
        yield opened


def test_strongest_images_are_those_of_the_maps(acts: fmextract.Activations) -> None:
    maps = acts["conv2"][:]
    for channel in range(8):
        found = strongest(acts, "conv2", channel, 3)
        peaks = maps[:, channel].reshape(len(maps), -1)
        assert [one.row for one in found] == np.argsort(-peaks.max(1), kind="stable")[:3].tolist()
        for one in found:
            assert one.value == peaks[one.row].max()
            assert maps[one.row, channel][one.cell] == one.value
            assert one.key == acts.keys[one.row]


def test_the_region_holds_what_drove_the_channel(acts: fmextract.Activations) -> None:
    """conv1 has no zero padding inside: its theoretical field is 5 pixels around 2 * cell + 0.5."""
    (one, *_) = strongest(acts, "conv1", 0, 1)
    assert one.cell is not None
    assert one.region is not None
    y, x = one.cell
    wanted = [np.clip(v, 0, 32) for v in (2 * y - 2, 2 * x - 2, 2 * y + 3, 2 * x + 3)]
    box = one.region.box if one.region.kind == "theoretical" else one.region.theoretical
    assert box is not None
    assert np.allclose(box, wanted)
    assert one.photo_box is not None
    assert 0 <= one.photo_box[0] < one.photo_box[2] <= 48
    assert 0 <= one.photo_box[1] < one.photo_box[3] <= 64


def test_top_is_drawn_for_maps_and_features(acts: fmextract.Activations, place: Path, tmp_path: Path) -> None:
    found = show_top(acts, "conv2", [3, 4], tmp_path / "top.png", k=4, images=place / "photos")
    assert [one.channel for one in found] == [3] * 4 + [4] * 4
    (plain, *_) = show_top(acts, "fc", [0], tmp_path / "fc.png")
    assert plain.cell is plain.region is None
    assert (tmp_path / "top.png").stat().st_size > 10_000
    with pytest.raises(ConfigError, match="channel 99"):
        show_top(acts, "conv2", [99], tmp_path / "x.png")
    with pytest.raises(ConfigError, match="at least one channel"):
        show_top(acts, "conv2", [], tmp_path / "x.png")
    with pytest.raises(ConfigError, match="--images"):
        show_top(acts, "conv2", [0], tmp_path / "x.png", images=tmp_path)


def test_tokens_have_their_patch(place: Path, tmp_path: Path) -> None:
    with small_run(place / "photos", tmp_path / "tokens.h5", Tokens(), layers=["norm"]) as acts:
        stored = acts["norm"][:]
        for channel in range(4):
            for one in strongest(acts, "norm", channel, 4):
                token = int(stored[one.row, :, channel].argmax())
                assert one.cell == (None if token == 0 else divmod(token - 1, 4))
        found = show_where(acts, "2.png", "norm", tmp_path / "w.png", k=2)
        assert np.allclose(found.heat, np.abs(stored[acts.row("2.png"), 1:]).sum(1).reshape(4, 4))


def test_where_is_heat_and_unusual_channels(acts: fmextract.Activations, tmp_path: Path) -> None:
    maps = acts["conv2"][:].astype(np.float64)
    row = acts.row("3.png")
    found = show_where(acts, "3.png", "conv2", tmp_path / "w.png", k=3)
    assert np.allclose(found.heat, np.abs(maps[row]).sum(0))
    assert found.cell == np.unravel_index(found.heat.argmax(), found.heat.shape)
    assert found.spread.shape == (32, 32)
    mean, std = maps.mean((0, 2, 3)), maps.std((0, 2, 3))
    strength = (maps[row].max((1, 2)) - mean) / std
    assert [peak.channel for peak in found.peaks] == np.argsort(-strength)[:3].tolist()
    assert np.allclose([peak.strength for peak in found.peaks], np.sort(strength)[::-1][:3], rtol=1e-6)
    for peak in found.peaks:
        assert maps[row, peak.channel][peak.cell] == maps[row, peak.channel].max() == peak.value
    with pytest.raises(ConfigError, match="at least 1"):
        localize(acts, "3.png", "conv2", 0)


def test_a_dead_channel_is_never_the_strongest(acts: fmextract.Activations) -> None:
    assert 1 not in [peak.channel for peak in localize(acts, "3.png", "relu", 5).peaks]


def test_depth_is_numpy_on_the_stored_maps(acts: fmextract.Activations, tmp_path: Path) -> None:
    path, rows = depth.show_depth(acts, tmp_path / "depth.png")
    assert path.exists()
    assert [row.layer for row in rows] == list(acts.layers)
    for row in rows:
        maps = acts[row.layer][:].astype(np.float64)
        assert row.values == maps.size
        assert row.zeros == pytest.approx((maps == 0).mean())
        assert row.mean == pytest.approx(maps.mean(), rel=1e-6, abs=1e-9)
        assert row.std == pytest.approx(maps.std(), rel=1e-6)
        assert (row.min, row.max) == (maps.min(), maps.max())
        axes = tuple(i for i, axis in enumerate(acts[row.layer].axes) if axis not in ("channel", "feature"))
        assert row.dead == (maps == 0).all(axes).sum()
    assert {row.layer: row.dead for row in rows}["relu"] >= 1
    assert {row.layer: row.constant for row in rows}["conv1"] == 1  # the dead channel before its ReLU: its bias


def test_depth_counts_what_is_not_finite(tmp_path: Path) -> None:
    import torch

    from fmextract.pipeline.running_stats import RunningStats

    values = np.random.default_rng(0).normal(size=(3, 2, 4, 4)).astype(np.float32)
    values[0, 0, 0, 0], values[1, 1, 2, 2] = np.nan, np.inf
    running = RunningStats((2, 4, 4), ("channel", "y", "x"), 2, torch.device("cpu"))
    running.update(torch.from_numpy(values), 0)
    make_file(tmp_path / "a.h5", {"conv": values}, stats={"conv": running.result()})
    with fmextract.open(tmp_path / "a.h5") as acts:
        (row,) = depth.measure_depth(acts)
    finite = values[np.isfinite(values)].astype(np.float64)
    assert (row.nonfinite, row.values) == (2, finite.size)
    assert row.mean == pytest.approx(finite.mean())
    assert row.std == pytest.approx(finite.std())


def test_the_commands(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    acts = str(place / "acts.h5")
    assert main(["show", "depth", acts, "--json", "-o", str(tmp_path / "d.png")]) == 0
    assert [row["layer"] for row in json.loads(capfd.readouterr().out)] == ["conv1", "relu", "conv2", "fc"]
    assert main(["show", "depth", acts]) == 0
    assert "dead" in capfd.readouterr().out
    top = ["show", "top", acts, "-l", "conv2", "--channel", "3", "-k", "2", "-o", str(tmp_path / "t.png")]
    assert main([*top, "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert [one["channel"] for one in said["examples"]] == [3, 3]
    assert main(top) == 0
    assert "cell (y, x)" in capfd.readouterr().out
    where = ["show", "where", acts, "-l", "conv2", "--image", "3.png", "-o", str(tmp_path / "w.png")]
    assert main([*where, "--json"]) == 0
    assert len(json.loads(capfd.readouterr().out)["channels"]) == 5
    assert main(where) == 0
    assert main([*where[:-3], "4.pngg", "-o", str(tmp_path / "w.png")]) == 2
    assert "closest are 4.png" in capfd.readouterr().err


def test_nothing_is_drawn_where_the_preprocessing_cannot_be_undone(place: Path, tmp_path: Path) -> None:
    import torch

    def own(photo: object) -> torch.Tensor:
        return torch.from_numpy(np.array(photo.resize((32, 32)), np.float32).transpose(2, 0, 1) / 255)  # type: ignore[attr-defined]

    with small_run(place / "photos", tmp_path / "own.h5", preprocess=own) as acts:
        found = show_top(acts, "conv2", [0], tmp_path / "top.png", k=2)
        assert all(one.photo_box is None for one in found)
        assert acts.input_size == (32, 32)
        for top in acts["conv2"].top(0, 9):
            assert top.box is not None
            assert min(top.box) >= 0
            assert max(top.box) <= 32, "clipped to the input, as in the picture"
        with pytest.raises(ConfigError, match="the user's own"):
            show_where(acts, "2.png", "conv2", tmp_path / "w.png")
        with pytest.raises(ConfigError, match="the user's own"):
            show_maps(acts, "2.png", tmp_path / "m", overlay=True)
        show_maps(acts, "2.png", tmp_path / "m", layers=["conv2"])


def test_positions_are_kept_where_the_maps_are_not(place: Path, tmp_path: Path) -> None:
    with small_run(place / "photos", tmp_path / "t.h5", layers=["conv2=top", "conv2"]) as acts:
        (bare, *_), (full, *_) = (strongest(acts, name, 3) for name in ("conv2=top", "conv2"))
        assert (bare.row, bare.value, bare.cell) == (full.row, full.value, full.cell)
        show_top(acts, "conv2=top", [3], tmp_path / "top.png", k=2)
