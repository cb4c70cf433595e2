"""Pictures of feature maps show what lies in the file: values, places, tokens, and names that cannot harm."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from looking import SIZE, Tokens, small_run, write_photos
from PIL import Image

import fmextract
from fmextract.cli import main
from fmextract.common.boxes import patch_grid
from fmextract.errors import ConfigError, MissingExtra, OutputError, SourceError
from fmextract.reading.select import select_layers
from fmextract.records import Field
from fmextract.visual import canvas, live
from fmextract.visual.maps import show_maps
from fmextract.visual.photos import as_seen, load_photo
from fmextract.visual.places import Grid, grid_of, read_maps


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("maps")
    write_photos(root / "photos")
    small_run(root / "photos", root / "acts.h5").close()
    small_run(root / "photos", root / "tokens.h5", Tokens(), layers=["norm", "patches"]).close()
    return root


@pytest.fixture
def acts(place: Path) -> Iterator[fmextract.Activations]:
    with fmextract.open(place / "acts.h5") as opened:
        yield opened


@pytest.fixture
def tokens(place: Path) -> Iterator[fmextract.Activations]:
    with fmextract.open(place / "tokens.h5") as opened:
        yield opened


def test_maps_are_those_of_the_file(acts: fmextract.Activations, tmp_path: Path) -> None:
    made = show_maps(acts, "3.png", tmp_path / "maps", count=4)
    assert [one.layer for one in made] == ["conv1", "relu", "conv2"]
    for one in made:
        stored = acts[one.layer][acts.row("3.png")]
        strongest = np.argsort(-stored.std((1, 2)), kind="stable")[:4]
        assert one.channels == tuple(sorted(strongest.tolist()))
        assert np.array_equal(one.values, stored[list(one.channels)])
        assert one.ranges == tuple((m.min(), m.max()) for m in one.values)
        with Image.open(one.picture) as picture:
            assert min(picture.size) > 500


def test_a_shared_scale_and_chosen_channels(acts: fmextract.Activations, tmp_path: Path) -> None:
    (one,) = show_maps(acts, "3.png", tmp_path / "m", layers=["conv2"], channels=[5, 2], scale="shared")
    assert one.channels == (5, 2)
    assert one.ranges == ((one.values.min(), one.values.max()),) * 2
    (first,) = show_maps(acts, "3.png", tmp_path / "m", layers=["conv2"], count=3, order="first", overlay=True)
    assert first.channels == (0, 1, 2)


def test_all_layers_in_one_picture_and_a_name_that_tries_everything(
    acts: fmextract.Activations, tmp_path: Path
) -> None:
    key = next(str(key) for key in acts.keys if "odd" in key)
    made = show_maps(acts, key, tmp_path / "all.png", overlay=True)
    assert {one.picture for one in made} == {tmp_path / "all.png"}
    show_maps(acts, key, tmp_path / "each", count=1)
    assert canvas.safe("a\n$b$\u202e") == r"a\n\$b\$\u202e"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"image": "3.pn"}, "no image '3.pn'.*closest are 3.png"),
        ({"layers": ["conv9"]}, "no layer 'conv9'.*conv1"),
        ({"layers": ["fc"]}, "no maps to draw. Layers with maps: conv1, relu, conv2"),
        ({"channels": [8], "layers": ["conv2"]}, "channels 0 to 7, and no channel 8"),
        ({"count": 0}, "at least 1 channel"),
        ({"order": "best"}, "unknown order 'best'"),
        ({"scale": "log"}, "unknown scale 'log'"),
        ({"images": "/nowhere"}, "no photo '3.png' in /nowhere: say with --images"),
    ],
)
def test_mistakes_are_named(acts: fmextract.Activations, tmp_path: Path, options: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        show_maps(acts, options.pop("image", "3.png"), tmp_path / "m", **options)


def test_photos_are_found_where_they_moved_to(acts: fmextract.Activations, place: Path, tmp_path: Path) -> None:
    with Image.open(place / "photos" / "2.png") as photo:
        photo.save(tmp_path / "2.png")
        assert load_photo(acts, acts.row("2.png"), tmp_path).tobytes() == photo.convert("RGB").tobytes()
    (tmp_path / "3.png").write_bytes(b"no picture")
    with pytest.raises(ConfigError, match=r"3\.png is not the photo that was extracted"):
        load_photo(acts, acts.row("3.png"), tmp_path)


def test_the_photo_is_what_the_network_saw(acts: fmextract.Activations) -> None:
    """The same pixels as the decoder's, but for one level of rounding."""
    from fmextract.inputs.decoding import decode

    photo = load_photo(acts, 2)
    fields = {k: v for k, v in acts.preprocess.items() if k not in ("kind", "size")}
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    seen = decode(photo, fmextract.Preprocess(**fields)).pixels.numpy().transpose(1, 2, 0)
    assert np.abs(np.asarray(as_seen(photo, acts.preprocess), int) - seen).max() <= 1
    small = Image.new("RGB", (10, 20), "white")
    padded = np.asarray(as_seen(small, {"resize": None, "crop": [30, 30]}))
    assert padded.shape == (30, 30, 3)
    assert (padded.sum(2) > 0).sum() == 200


def test_layers_by_selector(acts: fmextract.Activations) -> None:
    assert select_layers(acts, ["conv#-1", "conv#0"]) == ["conv1", "conv2"]
    assert select_layers(acts, ["conv?"]) == select_layers(acts, ["type:Conv2d"]) == ["conv1", "conv2"]
    assert select_layers(acts, [], with_maps=True) == ["conv1", "relu", "conv2"]
    assert select_layers(acts, ["conv#1"]) == select_layers(acts, ["trunk#1"]) == ["conv2"]
    with pytest.raises(ConfigError, match="no layer that is conv#2; it has conv#0, conv#1"):
        select_layers(acts, ["conv#2"])


def test_tokens_stand_on_their_patches_and_the_class_token_apart(tokens: fmextract.Activations, tmp_path: Path) -> None:
    maps = read_maps(tokens, tokens["norm"], 2)
    stored = tokens["norm"][2]
    assert tokens["norm"].shape[1:] == (17, 4)
    assert np.array_equal(maps.values, stored[1:].T.reshape(4, 4, 4))
    assert [(name, values.tolist()) for name, values in maps.apart] == [("cls", stored[0].tolist())]
    assert maps.grid.cell(0, -1) is None
    assert maps.grid.cell(1 + 6, -1) == (1, 2)
    assert maps.grid.region((1, 2)).box == (8, 16, 16, 24)
    (one,) = show_maps(tokens, str(tokens.keys[2]), tmp_path / "t", layers=["norm"], overlay=True)
    assert np.array_equal(one.values, maps.values)


@pytest.mark.parametrize(
    ("tokens", "size", "grid"),
    [
        (197, (224, 224), ((14, 14), 1)),
        (196, (224, 224), ((14, 14), 0)),
        (201, (224, 224), ((14, 14), 5)),
        (198, (224, 224), ((14, 14), 2)),
        (50, (224, 224), ((7, 7), 1)),
        (1 + 24 * 32, (384, 512), ((24, 32), 1)),
        (257, None, ((16, 16), 1)),
        (7, (224, 224), ((2, 2), 3)),
    ],
)
def test_patch_grids(tokens: int, size: tuple[int, int] | None, grid: object) -> None:
    assert patch_grid(tokens, size) == grid


def test_maps_are_spread_over_the_input_at_the_right_place() -> None:
    grid = Grid((4, 4), (32, 32), 0, Field(size=(9, 9), stride=(8, 8), offset=(4, 4)), None)
    values = np.zeros((4, 4))
    values[1, 2] = 1
    heat = grid.over_input(values)
    y, x = np.unravel_index(heat.argmax(), heat.shape)
    assert abs(y + 0.5 - 12) <= 0.5
    assert abs(x + 0.5 - 20) <= 0.5
    assert np.allclose(grid.over_input(np.ones((4, 4))), 1)
    assert grid.extent == (0, 32, 32, 0)


def test_regions_say_where_they_come_from(acts: fmextract.Activations) -> None:
    field = Field(size=(9, 9), stride=(8, 8), offset=(4, 4))
    assert Grid((4, 4), (32, 32), 0, field, None).region((1, 1)).kind == "theoretical"
    both = Grid((4, 4), (32, 32), 0, field, 5.0).region((1, 1))
    assert (both.kind, both.box, both.theoretical) == ("effective", (9.5, 9.5, 14.5, 14.5), (7.5, 7.5, 16.5, 16.5))
    large = Field(size=(99, 99), stride=(8, 8), offset=(4, 4))
    assert Grid((4, 4), (32, 32), 0, large, 5.0).region((1, 1)).theoretical is None
    assert Grid((4, 4), (32, 32), 0, large, None).region((1, 2)).box == (8, 16, 16, 24)
    assert grid_of(acts, acts["conv1"]).region((3, 3)).box == (4, 4, 9, 9)


def test_straight_from_a_model(place: Path, tmp_path: Path) -> None:
    from looking import PREPROCESS, Tiny

    photo = place / "photos" / "3.png"
    made = live.show_maps_of(Tiny(), photo, tmp_path / "m", layers=["conv#0", "conv#-1"], preprocess=PREPROCESS)
    assert [one.layer for one in made] == ["conv1", "conv2"]
    with fmextract.open(place / "acts.h5") as acts:
        for one in made:
            stored = acts[one.layer][acts.row("3.png")][list(one.channels)]
            np.testing.assert_allclose(one.values, stored, rtol=1e-4, atol=1e-5)
    with pytest.raises(SourceError, match="no such image"):
        live.show_maps_of(Tiny(), tmp_path / "none.png", tmp_path, preprocess=PREPROCESS)


def test_six_pictures_of_resnet50_from_first_to_last_convolution(place: Path, tmp_path: Path) -> None:
    """It has 53, downsampling included. The weights are random: what is tested is which layers they are."""
    selectors = [f"conv#{i}" for i in (0, 20, 40, 44, 48, -1)]
    photo = place / "photos" / "3.png"
    made = live.show_maps_of("resnet50", photo, tmp_path, layers=selectors, weights="random:0", size=64, count=4)
    names = ["conv1", "layer2.2.conv3", "layer3.5.conv1", "layer4.0.conv2", "layer4.1.conv2", "layer4.2.conv3"]
    assert [one.layer for one in made] == names
    assert len(list(tmp_path.glob("*.png"))) == 6


def test_the_command(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["show", "maps", str(place / "acts.h5"), "--image", "3.png", "-l", "conv#0", "-o", str(tmp_path / "m")]
    assert main([*words, "--json"]) == 0
    (said,) = json.loads(capfd.readouterr().out)
    assert said["layer"] == "conv1"
    assert said["shape"] == [SIZE // 2, SIZE // 2]
    assert Path(said["picture"]).exists()
    assert main(["show", "maps", "-o", str(tmp_path)]) == 2
    assert "--image KEY" in capfd.readouterr().err


def test_what_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        canvas.save(canvas.figure(1, 1), tmp_path / "file" / "x.png")
    with pytest.raises(OutputError, match="ends in one of"):
        canvas.save(canvas.figure(1, 1), tmp_path / "x.gif")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"fmextract\[look\]"):
        canvas.figure(1, 1)
