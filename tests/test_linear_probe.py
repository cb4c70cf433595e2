"""The tutorial on linear probes: it runs from anywhere, its split does not leak, and its probe reads what is there."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from files import make_file
from PIL import Image

import fmextract

SCRIPT = Path(__file__).parent.parent / "docs" / "linear_probe.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("linear_probe", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_small_run(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accuracy = script.run(tmp_path, 240, 8)
    with fmextract.open(tmp_path / "acts.h5") as acts:
        assert list(accuracy) == list(acts.layers)
        assert acts.num_rows == 240
        assert not acts.status.any()
        assert acts["blocks.6=mean"].shape == (240, 320)
    assert all(set(shares) == {"photo", "noise", "light"} for shares in accuracy.values())
    # Even so small: a late layer knows the photo (by chance 8 %), an early one does not.
    assert accuracy["blocks.4=mean"]["photo"] > 0.3 > accuracy["bn1=mean"]["photo"]
    assert f"{accuracy['blocks.4=mean']['photo']:.0%}" in capsys.readouterr().out
    with Image.open(tmp_path / "linear_probe.png") as picture:
        assert min(picture.size) > 400
        assert np.unique(np.asarray(picture.convert("L"))).size > 50


def test_from_a_clean_directory(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--crops", "60", "--epochs", "1"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "blocks.6=mean" in ended.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["probe"]
    assert {path.name for path in (tmp_path / "probe").iterdir()} == {"photos", "acts.h5", "linear_probe.png"}


def test_no_pixel_is_both_learnt_from_and_asked_about(script: Any, tmp_path: Path) -> None:
    """On photos that show the number of their tile, a crop shows one number: so it stays within its tile."""
    crops = script.Crops(tmp_path, 300)
    assert crops.testing.tolist() == [tile in (0, 4, 8) for tile in crops.tile]
    tiles = np.arange(1, 10).reshape(3, 3).repeat(101, 0).repeat(140, 1)
    crops.photos = [(25 * tiles).astype(np.uint8)] * 12
    for row in np.flatnonzero(crops.answers["noise"] == 0):
        pixels = np.asarray(crops[int(row)])
        assert pixels.min() == pixels.max()
        bright = pixels[0, 0, 0] / (25 * (crops.tile[row] + 1) * script.LIGHT[crops.answers["light"][row]])
        assert 0.85 < bright < 1.15 or pixels[0, 0, 0] == 255


def test_crops_are_the_same_again(script: Any, tmp_path: Path) -> None:
    first, second, other = (script.Crops(tmp_path, 5, seed) for seed in (0, 0, 1))
    for row in range(5):
        np.testing.assert_array_equal(np.asarray(first[row]), np.asarray(second[row]))
    assert any((np.asarray(first[row]) != np.asarray(other[row])).any() for row in range(5))


def test_the_probe_finds_what_is_there_and_nothing_else(script: Any, tmp_path: Path) -> None:
    crops = script.Crops(tmp_path, 1200)
    rng = np.random.default_rng(0)
    known = np.eye(12)[crops.answers["photo"]] * 5
    features = np.hstack([known, np.zeros((1200, 8))]) + rng.normal(size=(1200, 20))
    make_file(tmp_path / "a.h5", {"fc": features.astype(np.float32)})
    with fmextract.open(tmp_path / "a.h5") as acts:
        shares = script.probe(acts, "fc", crops, epochs=20)
    assert shares["photo"] > 0.95
    assert 0.15 < shares["noise"] < 0.35
    assert 0.15 < shares["light"] < 0.35
