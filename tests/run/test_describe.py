"""`fmextract layers` and fm.layers say what each layer sees of the image."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fmextract as fm
from fmextract.cli import main

SIZE = 32


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 5, stride=2, padding=2), nn.Conv2d(4, 4, 3, padding=2, dilation=2)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.two(self.one(x))).mean((2, 3)))


class Moody(Net):
    """Calls another layer in every third pass."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        made = self.two(self.one(x))
        return self.head((self.pool(made) if self.passes % 3 else made).mean((2, 3)))


def reached(net: nn.Module, name: str) -> tuple[int, int]:
    """Pixels between the first and the last that the middle cell of a layer has a gradient of, along (y, x)."""
    held: list[Tensor] = []
    handle = net.get_submodule(name).register_forward_hook(lambda m, args, out: held.append(out))
    x = torch.rand(1, 3, SIZE, SIZE, requires_grad=True)
    net(x)
    handle.remove()
    (made,) = held
    # A convolution of positive weights has a gradient wherever it looks; a pool only at its largest value.
    made[0, :, made.shape[2] // 2, made.shape[3] // 2].sum().backward()
    assert x.grad is not None
    seen = x.grad[0].abs().sum(0).nonzero().numpy()
    height, width = seen.max(0) - seen.min(0) + 1
    return int(height), int(width)


def test_layers_say_what_they_see() -> None:
    torch.manual_seed(0)
    net = Net().eval()
    for module in (net.one, net.two):
        nn.init.uniform_(module.weight, 0.5, 1.0)
    rows = {row.path: row for row in fm.layers(net, size=SIZE)}
    for name in ("one", "two"):
        field = rows[name].field
        assert field is not None
        assert field.size == reached(net, name)
    pooled = rows["pool"].field
    assert pooled is not None
    assert pooled.size == (rows["two"].field.size[0] + 2,) * 2  # type: ignore[union-attr]
    assert rows["head"].field is None, "it has no cells"
    assert "13×13 px" in str(fm.layers(net, size=SIZE))


def test_they_are_those_of_the_file(tmp_path: Path) -> None:
    layers = ["one", "two", "pool=max", "pool", "two=pool:2", "head"]
    images = [torch.from_numpy(np.random.default_rng(i).random((3, SIZE, SIZE), np.float32)) for i in range(2)]
    net = Net()
    with fm.extract(images, net, tmp_path / "a.h5", layers=layers, preprocess="none", precision="fp32") as acts:
        stored = {name: acts[name].field for name in acts.layers}
    assert {row.path: row.field for row in fm.layers(net, layers=layers, size=SIZE)} == stored


def test_a_model_that_does_something_else_each_time_is_listed_all_the_same() -> None:
    rows = {row.path: row for row in fm.layers(Moody(), size=SIZE)}
    assert rows["one"].shape == (4, SIZE // 2, SIZE // 2)


def test_the_command(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["layers", "resnet18", "--size", "64", "-l", "conv1", "-l", "layer?"]
    assert main(words) == 0
    assert "43×43 px" in capfd.readouterr().out
    assert main([*words, "--json"]) == 0
    said = {row["path"]: row["field"] for row in json.loads(capfd.readouterr().out)}
    # r + (k - 1) x jump over its convolutions: 7; 7 + 4 + 4 x 8; 43 + 8 + 3 x 16; 99 + 16 + 3 x 32.
    assert [said[name]["size"] for name in ("conv1", "layer1", "layer2", "layer3")] == [
        [7, 7], [43, 43], [99, 99], [211, 211],
    ]  # fmt: skip
