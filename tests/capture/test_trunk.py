"""The convolutions that lie on no shortcut: by names in networks whose names tell, which the numbering never reads."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import fmextract as fm
from fmextract.capture import resolve, survey
from fmextract.errors import ConfigError, LayerError
from fmextract.reading.select import select_layers
from fmextract.visual.maps import describe_field

Tensor = torch.Tensor


def surveyed(model: nn.Module, size: int = 32) -> survey.Survey:
    return survey.survey(model.eval(), model, torch.randn(2, 3, size, size))


@pytest.mark.parametrize(
    ("name", "convolutions", "trunk"),
    [
        ("resnet18", 20, 17),
        ("resnet50", 53, 49),
        ("resnext50_32x4d", 53, 49),
        ("wide_resnet50_2", 53, 49),
        ("regnet_x_400mf", 71, 67),
        ("regnet_y_400mf", 85, 81),
    ],
)
def test_shortcuts_of_residual_networks(name: str, convolutions: int, trunk: int) -> None:
    seen = surveyed(torchvision.models.get_model(name, weights=None))
    named = {path for path in seen.numbered("conv") if re.search(r"downsample|\.proj\.", path)}
    assert seen.shortcuts == named
    assert (len(seen.numbered("conv")), len(seen.numbered("trunk"))) == (convolutions, trunk)


def test_the_numbers_of_books() -> None:
    seen = surveyed(torchvision.models.resnet50(weights=None))
    names = [tap.name for tap in resolve.resolve([f"trunk#{i}" for i in (0, 20, 40, 44, 48)], seen)]
    assert names == ["conv1", "layer2.3.conv2", "layer4.0.conv1", "layer4.1.conv2", "layer4.2.conv3"]
    assert seen.numbers["layer4.2.conv3"] == "conv#52 trunk#48"
    assert seen.numbers["layer1.0.downsample.0"] == "conv#4"
    assert [tap.name for tap in resolve.resolve(["trunk#-1"], seen)] == ["layer4.2.conv3"]
    with pytest.raises(LayerError, match="this model has trunk#0 to trunk#48"):
        resolve.resolve(["trunk#49"], seen)


class Joined(nn.Module):
    """Two sides that are added; `order` says which stands first, in the call and in the sum."""

    def __init__(self, one: nn.Module, other: nn.Module, order: int) -> None:
        super().__init__()
        self.stem, self.one, self.other, self.order = nn.Conv2d(3, 4, 1), one, other, order

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        sides = [self.one, self.other][:: self.order]
        made = sides[0](x).relu()
        made += sides[1](x)
        return made


def convs(count: int) -> nn.Module:
    return nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(count)))


@pytest.mark.parametrize("order", [1, -1])
def test_which_side_is_the_shortcut(order: int) -> None:
    assert surveyed(Joined(convs(1), convs(3), order)).shortcuts == {"one.0"}
    assert surveyed(Joined(convs(2), convs(2), order)).shortcuts == set(), "two ways of one length"
    assert surveyed(Joined(convs(1), nn.Identity(), order)).shortcuts == set(), "the input itself"
    assert surveyed(Joined(convs(2), convs(3), order)).shortcuts == set(), "a branch, not a projection"


def test_a_model_without_convolutions_has_no_trunk() -> None:
    with pytest.raises(LayerError, match="'trunk#0': this model has none at all"):
        resolve.resolve(["trunk#0"], surveyed(nn.Sequential(nn.ReLU(), nn.Flatten())))


def test_a_file_tells_the_numbers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Joined(convs(1), convs(2), 1)
    images = [torch.from_numpy(np.random.default_rng(i).normal(size=(3, 8, 8)).astype(np.float32)) for i in range(2)]
    layers = ["trunk#0", "trunk#2", "one.0"]
    with fm.extract(images, model, tmp_path / "out.h5", layers=layers, preprocess="none") as acts:
        assert {name: acts[name].attrs["number"] for name in acts.layers} == {
            "stem": "conv#0 trunk#0",
            "one.0": "conv#1",
            "other.1": "conv#3 trunk#2",
        }
        assert select_layers(acts, ["trunk#2"]) == select_layers(acts, ["conv#3"]) == ["other.1"]
        assert describe_field(acts["other.1"]).startswith("conv#3  ·  trunk#2")
        with pytest.raises(ConfigError, match="no layer that is trunk#1; it has trunk#0, trunk#2"):
            select_layers(acts, ["trunk#1"])
    rows = fm.layers(model, preprocess="size=8,mean=0,std=1")
    assert {row.path: row.number for row in rows}["other.1"] == "conv#3 trunk#2"
