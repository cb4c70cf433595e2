"""A selector means of a file what it meant to the run: by the classes and the numbers that the file stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from files import make_file
from torch import Tensor, nn

import fmextract as fm
from fmextract.capture import resolve, survey
from fmextract.cli import main
from fmextract.errors import ConfigError
from fmextract.planning import Plan

SIZE = 8


class ConvNormAct(nn.Sequential):
    """A container whose name sounds like a convolution, as torchvision's Conv2dNormActivation."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__(conv, nn.BatchNorm2d(4), nn.ReLU6())


class Same(nn.Conv2d):
    """A convolution whose class does not say so."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(ConvNormAct(nn.Conv2d(3, 4, 3)), ConvNormAct(Same(4, 4, 1)))
        self.fit = nn.Conv2d(4, 4, 1)
        self.act = nn.ReLU()
        self.again = self.act
        self.pair = nn.LSTM(4, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.fit(self.act(self.features(x))))
        return self.head(self.pair(x.mean(2).transpose(1, 2))[0][:, -1])


def images(count: int = 3) -> list[Tensor]:
    return [torch.from_numpy(np.random.default_rng(i).normal(size=(3, SIZE, SIZE)).astype("f4")) for i in range(count)]


def model() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def run(out: Path, layers: list[str], net: nn.Module | None = None, **options: Any) -> fm.Activations:
    fixed = {"preprocess": "none", "precision": "fp32", "effective_fields": "never", "batch_size": 3}
    return fm.extract(images(), net or model(), out, layers=layers, **(fixed | options))


def convolutions(net: nn.Module) -> list[Tensor]:
    """What each convolution gives, in the order of execution, cloned by hooks of our own."""
    given: list[Tensor] = []
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, args, out: given.append(out.clone()))
    with torch.no_grad():
        net(torch.stack(images()))
    return given


ASKED = [
    "conv#0", "conv#1", "conv#-1", "conv#-3", "conv#01", "trunk#1", "trunk#-1", "act#0", "norm#-1", "linear#-1",
    "type:Conv2d", "type:Same", "type:_ConvNd", "type:nn.ReLU6", "type:ReLU", "type:Hardtanh", "type:Sequential",
    "type:ReLU:2", "features.*", "**.0", "*", "f*", "again", "again:2", "act:1", "ag*", "conv#1@in", "fit@in",
    "pair[0]", "pair[1]", "pair[1][0]", "pair", ".", "features.0", "conv#0=mean", "fit=max", "type:Conv2d=mean",
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> fm.Activations:
    """A file of everything that any of these selectors takes."""
    return run(tmp_path_factory.mktemp("whole") / "acts.h5", ["**", ".", *ASKED])


@pytest.fixture(scope="module")
def seen() -> survey.Survey:
    net = model()
    return survey.survey(net, net, torch.zeros(2, 3, SIZE, SIZE))


@pytest.mark.parametrize("selector", ASKED)
def test_a_selector_means_what_it_means_to_a_run(whole: fm.Activations, seen: survey.Survey, selector: str) -> None:
    taken = tuple(tap.name for tap in resolve.resolve([selector], seen))
    found = whole.select(selector)
    if "*" in selector or selector.startswith("type:"):  # takes what else is stored of them, reduced
        found = tuple(name for name in found if name in taken or "=" not in name)
    assert found == taken


def test_a_container_called_a_convolution_is_none(tmp_path: Path) -> None:
    """As after a run with `type:Conv2d` and `features.0`, whose type has the word in its name."""
    given = convolutions(model())
    with run(tmp_path / "acts.h5", ["type:Conv2d", "features.0"]) as acts:
        assert "features.0" in acts.layers
        for number, values in enumerate(given):
            for name in (f"conv#{number}", f"conv#{number - len(given)}"):
                np.testing.assert_allclose(acts[name][:], values.numpy(), rtol=1e-5, atol=1e-6)
        assert acts.select("type:Conv2d") == ("features.0.0", "features.1.0", "fit")


def test_a_number_counts_the_model_and_not_the_file(tmp_path: Path) -> None:
    with run(tmp_path / "acts.h5", ["fit", "act@in"]) as acts:
        assert acts["conv#2"].name == acts["conv#-1"].name == acts["type:Conv2d"].name == "fit"
        with pytest.raises(KeyError, match="has no layer that is conv#0; it has conv#2"):
            acts["conv#0"]
        with pytest.raises(ConfigError, match=r"has no layer that is act#-1; of what that means it has 'act:1@in'"):
            acts["act#-1"]
        with pytest.raises(ConfigError, match="unknown kind 'cnv'; expected one of conv, linear"):
            acts["cnv#0"]
        with pytest.raises(ConfigError, match="no layer 'type:Linear'"):
            acts["type:Linear"]
        with pytest.raises(ConfigError, match=r"'act@in' means 2 layers of .*: act:1@in, act:2@in"):
            acts["act@in"]


def test_one_layer_is_not_its_reduced_self(tmp_path: Path) -> None:
    with run(tmp_path / "acts.h5", ["fit=mean", "conv#0=max"]) as acts:
        with pytest.raises(ConfigError, match="has no layer that is fit; of what that means it has 'fit=mean'"):
            acts["fit"]
        assert acts["conv#-1=mean"].name == "fit=mean"
        assert acts.select("**") == acts.layers, "a glob takes what is there"
        assert acts.select("**=max") == ("features.0.0=max",)


def test_layers_by_selector_in_batches(tmp_path: Path) -> None:
    with run(tmp_path / "acts.h5", ["fit", "head"]) as acts:
        ((_, values),) = acts.batches(["conv#-1", "linear#0"])
        assert {name: array.shape for name, array in values.items()} == {
            "conv#-1": acts["fit"].shape,
            "linear#0": acts["head"].shape,
        }
        assert len(acts.dataset("conv#-1")[0]) == 2


def test_a_module_called_as_a_number(tmp_path: Path) -> None:
    """A path goes before a number, in a run and in its file."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("first", nn.Conv2d(3, 3, 1))
            self.add_module("conv#0", nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            for module in self.children():
                x = module(x)
            return x

    with run(tmp_path / "both.h5", ["**"], Odd()) as acts:
        assert acts["conv#0"].module_type == "ReLU"
    with run(tmp_path / "one.h5", ["first"], Odd()) as acts, pytest.raises(ConfigError, match="no layer that is"):
        acts["conv#0"]


def test_shards_and_what_is_packed_of_them_say_it(tmp_path: Path) -> None:
    with run(tmp_path / "shards", ["type:Conv2d"], shard_size="1KiB", batch_size=1) as acts:
        assert acts.info()["files"] > 1
        assert acts.select("conv#-1", "type:Same") == ("features.1.0", "fit")
    assert main(["pack", str(tmp_path / "shards"), "-o", str(tmp_path / "packed.h5")]) == 0
    with fm.open(tmp_path / "packed.h5") as acts:
        assert acts.select("conv#-1", "type:Same") == ("features.1.0", "fit")


def test_a_plan_says_it_and_an_older_one_still_runs(tmp_path: Path) -> None:
    layers = ["type:Conv2d", "again"]
    run(tmp_path / "first", layers).close()
    plan = Plan.load(tmp_path / "first" / "plan.json")
    assert plan.layers[0].classes[:2] == ("Conv2d", "_ConvNd")
    with run(tmp_path / "second.h5", layers, plan=plan) as acts:
        assert acts.select("conv#-1", "again:1") == ("act:1", "fit")
    old = plan.as_json()
    for layer in old["layers"]:
        for name in ("number", "number_from_end", "classes", "further_paths"):
            del layer[name]
    with run(tmp_path / "third.h5", layers, plan=Plan.from_json(old)) as acts:
        assert acts.select("fit") == ("fit",)
        with pytest.raises(ConfigError, match="was written before files said"):
            acts["conv#-1"]


@pytest.mark.parametrize(
    ("selector", "unsaid"),
    [
        ("type:Conv2d", "of which classes each is"),
        ("conv#-1", "how many of a kind there are"),
        ("conv#0", "which of its kind each is"),
    ],
)
def test_an_older_file_says_what_to_give_instead(selector: str, unsaid: str, tmp_path: Path) -> None:
    values = np.ones((2, 3, 4, 4), np.float32)
    make_file(tmp_path / "old.h5", {"first": values, "second": values})
    with fm.open(tmp_path / "old.h5") as acts:
        with pytest.raises(
            ConfigError, match=rf"does not say which .*{selector}.*{unsaid}.*: name one of first, second"
        ):
            acts[selector]
        assert acts.select("f*") == acts.select("first") == ("first",)


def test_an_older_file_that_says_its_numbers(tmp_path: Path) -> None:
    values = np.ones((2, 3, 4, 4), np.float32)
    make_file(tmp_path / "old.h5", {"layer": values}, spec={"layer": {"number": "conv#20 trunk#19"}})
    with fm.open(tmp_path / "old.h5") as acts:
        assert acts.select("conv#20") == acts.select("trunk#19") == ("layer",)
        with pytest.raises(ConfigError, match="it has conv#20"):
            acts["conv#0"]


def test_comparing_two_models_by_number(tmp_path: Path) -> None:
    """`conv#1` of one is not a layer that the other has under the same name."""
    other = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1))
    same = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.ReLU())
    with run(tmp_path / "a.h5", ["*"], other) as a, run(tmp_path / "b.h5", ["*"], same) as b:
        assert [row.layer for row in fm.compare(a, b, layers=["conv#0"]).layers] == ["0"]
        with pytest.raises(ConfigError, match=r"conv#1 is 2 in .*a.h5, and 1 in .*b.h5"):
            fm.compare(a, b, layers=["conv#1"])
        assert [row.layer for row in fm.compare(a, a, layers=["conv#-1", "act#0"]).layers] == ["1", "2"]


def test_show_and_export_by_selector(tmp_path: Path) -> None:
    run(tmp_path / "acts.h5", ["type:Conv2d", "features.0"]).close()
    made = fm.export(tmp_path / "acts.h5", to="npy", out=tmp_path / "arrays", layers=["conv#1"])
    assert [layer.name for layer in made.layers] == ["features.1.0"]
