"""Pictures of kernels show the weights of the convolution that was asked for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from looking import PREPROCESS, Tiny, write_photos
from torch import nn

from fmextract.cli import main
from fmextract.errors import ConfigError, LayerError
from fmextract.visual.filters import _coloured, parse_slice, show_filters


def test_colour_kernels_are_the_weights(tmp_path: Path) -> None:
    model = Tiny()
    made = show_filters(model, "conv#0", tmp_path / "f.png", preprocess=PREPROCESS)
    weights = model.conv1.weight.detach().numpy()
    assert made.layer == "conv1"
    assert made.filters == tuple(range(6))
    assert np.array_equal(made.weights, weights)
    assert np.allclose(made.high, np.abs(weights).max((1, 2, 3)))
    assert made.picture.stat().st_size > 5000


def test_colours_mean_what_they_say() -> None:
    kernel = np.zeros((1, 3, 1, 3), np.float32)
    kernel[0, 0, 0] = [1, -1, 0]
    (pixels,) = _coloured(kernel, np.ones(1))
    assert pixels[0].tolist() == [[255, 128, 128], [0, 128, 128], [128, 128, 128]]


def test_other_kernels_by_row_ordered_and_sliced(tmp_path: Path) -> None:
    model = Tiny()
    made = show_filters(model, "conv2", tmp_path / "f.png", order="norm", count=3, inputs=(1, 4), scale="shared")
    weights = model.conv2.weight.detach().numpy()
    largest = np.argsort(-np.linalg.norm(weights.reshape(8, -1), axis=1))[:3]
    assert made.filters == tuple(largest)
    assert made.inputs == (1, 2, 3)
    assert np.array_equal(made.weights, weights[largest][:, 1:4])
    assert len(set(made.high)) == 1
    chosen = show_filters(model, "conv2", tmp_path / "f.png", filters=[7, 0])
    assert chosen.filters == (7, 0)


def test_beside_a_photo_and_the_map_it_makes(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", 2)
    model = Tiny()
    made = show_filters(model, "conv1", tmp_path / "f.png", image=photos / "1.png", preprocess=PREPROCESS, count=2)
    assert made.maps is not None
    assert made.maps.shape == (2, 16, 16)
    assert np.allclose(made.maps[1], -1)  # the dead channel: its bias
    assert np.ptp(made.maps[0]) > 0


def test_depthwise_and_transposed_convolutions(tmp_path: Path) -> None:
    model = nn.ModuleDict({"deep": nn.Conv2d(4, 4, 3, groups=4), "up": nn.ConvTranspose2d(5, 2, 2)})
    assert show_filters(model, "deep", tmp_path / "d.png").weights.shape == (4, 1, 3, 3)
    up = show_filters(model, "up", tmp_path / "u.png")
    assert np.array_equal(up.weights, model["up"].weight.detach().transpose(0, 1).numpy())


@pytest.mark.parametrize(
    ("layer", "options", "error", "said"),
    [
        ("fc", {}, LayerError, "fc is a Linear, no two-dimensional convolution. The closest: conv1, conv2"),
        ("conv2", {"inputs": (4, 9)}, ConfigError, "within 0:6, got 4:9"),
        ("conv2", {"filters": [8]}, ConfigError, "filters 0 to 7, and no filter 8"),
        ("conv2", {"order": "hue"}, ConfigError, "unknown order"),
        ("conv2", {"scale": "log"}, ConfigError, "unknown scale"),
        ("type:Conv2d", {"preprocess": PREPROCESS}, LayerError, "matches 2 modules: name one of conv1, conv2"),
        ("conv#9", {"preprocess": PREPROCESS}, LayerError, "conv#9"),
        ("conv#0", {"preprocess": "none"}, ConfigError, "give --size"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, layer: str, options: dict, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        show_filters(Tiny(), layer, tmp_path / "f.png", **options)


def test_slices_as_they_are_typed() -> None:
    assert parse_slice(None) is None
    assert parse_slice("2:16") == (2, 16)
    with pytest.raises(ConfigError, match="as 0:16"):
        parse_slice("2-16")


def test_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [
        "show",
        "filters",
        "-m",
        "resnet18",
        "-w",
        "random:3",
        "-l",
        "conv1",
        "-o",
        str(tmp_path / "f.png"),
        "--json",
    ]
    assert main(words) == 0
    said = json.loads(capfd.readouterr().out)
    assert said["shape"] == [64, 3, 7, 7]
    torch.manual_seed(3)
    from torchvision.models import resnet18

    norms = resnet18().conv1.weight.flatten(1).norm(dim=1)
    assert np.allclose([one["norm"] for one in said["filters"]], norms.tolist(), rtol=1e-5)
