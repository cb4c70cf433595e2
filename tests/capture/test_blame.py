"""The reason of an error: what is known, and no guess."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Notes
from torch import nn

import fmextract as fm

Tensor = torch.Tensor


class Fails(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class Text(nn.Module):
    def forward(self, x: Tensor, input_ids: Tensor) -> Any:
        return x, input_ids


def asking(x: Tensor) -> Any:
    raise ValueError("You have to specify input_ids or inputs_embeds")


def indexing(x: Tensor) -> Any:
    return x.shape[7]


def images(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn((3, 8, 8), generator=generator) for _ in range(count)]


def refused(model: nn.Module, out: Path, layers: Sequence[str] = ()) -> str:
    with pytest.raises(fm.LayerError) as caught:
        fm.extract(images(), model, out / "x.h5", layers=layers, progress=Notes(), device="cpu", batch_size=2)
    return str(caught.value)


SHAPES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "channels": (lambda: nn.Conv2d(1, 2, 3), "module '1.1', Conv2d, given 2 x 3 x 8 x 8 float32"),
    "a linear layer": (lambda: nn.Linear(5, 2), "module '1.1', Linear, given 2 x 3 x 8 x 8 float32"),
    "a kernel": (lambda: nn.Conv2d(3, 2, 9), "module '1.1', Conv2d, given 2 x 3 x 8 x 8 float32"),
    "a view": (lambda: Fails(lambda x: x.view(2, 7)), "module '1.1', Fails, given 2 x 3 x 8 x 8 float32"),
}


@pytest.mark.parametrize("name", list(SHAPES))
def test_where_a_shape_is_to_blame_the_size_is_named(name: str, tmp_path: Path) -> None:
    build, place = SHAPES[name]
    said = refused(nn.Sequential(nn.Identity(), nn.Sequential(nn.ReLU(), build())), tmp_path)
    assert said.startswith("the model fails on an input of 3 x 8 x 8 (channel x height x width): RuntimeError: ")
    assert place in said
    assert "Another input size is set by --size" in said


OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "an attribute": (lambda: Fails(lambda x: x.foo), "'foo'"),
    "a key": (lambda: Fails(lambda x: {}["features"]), "KeyError: 'features'"),
    "types": (lambda: Fails(lambda x: x.flatten(1) @ x.flatten(1).T.double()), "to have the same dtype"),
    "an index": (lambda: Fails(indexing), "IndexError: tuple index out of range"),
}


@pytest.mark.parametrize("name", list(OTHERS))
def test_of_another_error_it_is_not(name: str, tmp_path: Path) -> None:
    build, what = OTHERS[name]
    said = refused(nn.Sequential(nn.Identity(), build()), tmp_path)
    assert what in said
    assert "(in module '1', Fails, given 2 x 3 x 8 x 8 float32)" in said
    assert "--size" not in said


@pytest.mark.parametrize("model", [nn.Sequential(nn.Identity(), Text()), nn.Sequential(nn.Identity(), Fails(asking))])
def test_a_model_that_wants_text_is_told_so(model: nn.Module, tmp_path: Path) -> None:
    said = refused(model, tmp_path)
    assert "in module '1'" in said
    assert "It wants other inputs than a batch of images" in said
    assert "--size" not in said


def test_all_that_cannot_be_had_is_said_at_once(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Identity(), Fails(lambda x: x.flip(0)), nn.Flatten())
    layers = ["0", "nothing", "1", "conv#3", "2=mean", "0=top:9", "relu=[", "0:4"]
    said = refused(model, tmp_path, layers)
    assert said.startswith("7 of the layers cannot be had:\n- ")
    for part in (
        "matches 'nothing'",
        "layer '1' cannot be stored",
        "'conv#3'",
        "'2=mean'",
        "'0=top:9'",
        "'relu=['",
        "'0:4'",
    ):
        assert part in said


def test_one_that_cannot_be_had_is_said_as_ever(tmp_path: Path) -> None:
    assert refused(nn.Sequential(nn.Identity()), tmp_path, ["0", "nothing"]).startswith("no layer matches 'nothing'")


class Breaks(nn.Module):
    """Fails on whatever it is given, after so many passes."""

    def __init__(self, passes: int) -> None:
        super().__init__()
        self.inner, self.passes = nn.Identity(), [passes]

    def forward(self, x: Tensor) -> Any:
        self.passes[0] -= 1
        if self.passes[0] < 0:
            raise IndexError("tuple index out of range")
        return self.inner(x)


def test_a_model_that_fails_in_the_run_is_no_lost_device(tmp_path: Path) -> None:
    options = {"progress": Notes(), "device": "cpu", "batch_size": 2, "precision": "fp32", "overwrite": True}
    model = Breaks(10**6)
    fm.extract(images(12), model, tmp_path / "x.h5", layers=["inner"], **options).close()
    taken = 10**6 - model.passes[0]
    with pytest.raises(fm.CaptureError, match="the model fails on any input from row") as caught:
        fm.extract(images(12), Breaks(taken - 2), tmp_path / "x.h5", layers=["inner"], **options)
    assert caught.value.exit_code == 4
    assert "IndexError: tuple index out of range (in the model itself, Breaks, given 2 x 3 x 8 x 8 float32)" in str(
        caught.value
    )
