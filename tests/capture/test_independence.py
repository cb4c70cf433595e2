"""Rows of layers that noise says nothing of: right or refused, whatever image of the source brings them to life."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import Notes
from torch import nn

import fmextract as fm
from fmextract.capture import hooks, independence, probe, resolve, survey

Tensor = torch.Tensor


class Does(nn.Module):
    """`inner` is a module whose output is what a function says."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner = Inner(function)
        self.end = nn.Flatten()

    def forward(self, x: Tensor) -> Any:
        self.inner(x)
        return self.end(x)


class Inner(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def pictures(count: int, bright: Sequence[int]) -> list[Tensor]:
    """Dark images, all different, and bright ones in some places."""
    generator = torch.Generator().manual_seed(3)
    made = [torch.rand((3, 8, 8), generator=generator) for _ in range(count)]
    return [image + 20 if i in bright else image for i, image in enumerate(made)]


def extract(function: Callable[[Tensor], Any], out: Path, inputs: Sequence[Tensor], **options: Any) -> np.ndarray:
    chosen = {"precision": "fp32", "batch_size": 4, "num_workers": 1, "device": "cpu", "memory_format": "contiguous"}
    with fm.extract(
        inputs, Does(function).eval(), out / "x.h5", layers=["inner"], progress=Notes(), **{**chosen, **options}
    ) as acts:
        values: np.ndarray = acts["inner"][:]
        return values


def dead(x: Tensor) -> Tensor:
    """Zero for any noise of the probe's."""
    return (x - 15).relu()


def flipped(x: Tensor) -> Tensor:
    return dead(torch.cat([x, x.flip(3)]))


FLIPPED_ROWS = lambda x: dead(torch.stack([x, x.flip(3)], 1))  # noqa: E731

RIGHT: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "views side by side": (flipped, FLIPPED_ROWS),
    "one an image": (dead, dead),
    "on top of a large number": (lambda x: x / 1000 + 1e4, lambda x: x / 1000 + 1e4),
    "batch in the middle": (lambda x: dead(x.transpose(0, 1)), dead),
}
BRIGHT = {"in the sample": range(0, 16, 2), "late": [13, 14], "never": []}


@pytest.mark.parametrize("bright", list(BRIGHT))
@pytest.mark.parametrize("name", list(RIGHT))
def test_layers_that_noise_leaves_dead_have_their_own_rows(name: str, bright: str, tmp_path: Path) -> None:
    function, rows = RIGHT[name]
    inputs = pictures(16, list(BRIGHT[bright]))
    np.testing.assert_array_equal(extract(function, tmp_path, inputs), rows(torch.stack(inputs)).numpy())


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "views turned round": lambda x: dead(torch.cat([x, x.flip(0)])),
    "turned round": lambda x: dead(x.flip(0)),
    "the neighbour": lambda x: dead(x.roll(1, 0)),
    "the other neighbour": lambda x: dead(x.roll(-1, 0)),
    "batch statistics": lambda x: dead(x - x.mean(0) + 10),
    "a little of the batch": lambda x: dead(x + 1e-4 * x.mean(0)),
    "the mean for all": lambda x: dead(x.mean(0, keepdim=True) * 2).expand_as(x),
    "the number of images": lambda x: dead(x * (1 + 1 / len(x))),
    "the neighbour, on top of a large number": lambda x: x.roll(1, 0) / 1000 + 1e4,
    "chance": lambda x: dead(x + torch.rand_like(x)),
}
BESIDE_LIVE_CHANNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "the neighbour": lambda x: torch.cat([x, dead(x.roll(1, 0))], 1),
    "batch statistics": lambda x: torch.cat([x, dead(x + x.mean(0))], 1),
}


@pytest.mark.parametrize("bright", ["in the sample", "late"])
@pytest.mark.parametrize("name", list(WRONG))
def test_what_noise_does_not_show_is_refused_by_name(name: str, bright: str, tmp_path: Path) -> None:
    with pytest.raises(fm.LayerError, match="layer 'inner' cannot be stored row by row: its rows change with"):
        extract(WRONG[name], tmp_path, pictures(16, list(BRIGHT[bright])))
    assert not (tmp_path / "x.h5").exists()


@pytest.mark.parametrize("name", list(BESIDE_LIVE_CHANNELS))
def test_nor_does_it_hide_beside_what_noise_shows(name: str, tmp_path: Path) -> None:
    with pytest.raises(fm.LayerError, match="layer 'inner' cannot be stored row by row: its rows change with"):
        extract(BESIDE_LIVE_CHANNELS[name], tmp_path, pictures(16, range(0, 16, 2)))


def hidden(x: Tensor) -> Tensor:
    """Zero for every image that the probe can make: only where two pixels are exactly what none of its is."""
    key = ((x[:, 0, 0, 0] == 7) & (x[:, 0, 0, 1] == 7)).float()
    return key.view(-1, 1, 1, 1) * x


def with_key(count: int, keyed: Sequence[int]) -> list[Tensor]:
    made = pictures(count, [])
    for i in keyed:
        made[i][0, 0, :2] = 7
    return made


def test_a_layer_that_comes_to_life_in_the_run_is_asked_then(tmp_path: Path) -> None:
    inputs = with_key(40, [31, 37, 38])
    np.testing.assert_array_equal(extract(hidden, tmp_path, inputs), hidden(torch.stack(inputs)).numpy())


@pytest.mark.parametrize(
    "function",
    [
        lambda x: hidden(x).flip(0),
        lambda x: hidden(x).roll(1, 0),
        lambda x: hidden(x).mean(0, keepdim=True).expand_as(x),
        lambda x: hidden(x) - hidden(x).mean(0),
    ],
)
def test_and_stops_the_run_where_its_rows_are_of_others(function: Any, tmp_path: Path) -> None:
    inputs = with_key(40, [31, 37, 38])
    with pytest.raises(fm.CaptureError, match="layer 'inner' was the same for every image that the probe tried"):
        extract(function, tmp_path, inputs)


def test_where_not_even_the_shape_tells_the_rows_apart_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(fm.LayerError, match="'inner' cannot be stored row by row: it is the same for every image"):
        extract(lambda x: torch.cat([hidden(x), hidden(x.flip(3))]), tmp_path, pictures(8, []))


CONSTANT: dict[str, Callable[[Tensor], Tensor]] = {
    "ones": torch.ones_like,
    "a position embedding": lambda x: torch.arange(4.0).expand(len(x), 4),
    "windows of one": lambda x: torch.arange(8.0).repeat(len(x), 1).reshape(-1, 4),
    "integers": lambda x: x.flatten(1).argmax(1) * 0 + 3,
}


@pytest.mark.parametrize("name", list(CONSTANT))
def test_what_is_the_same_for_every_image_by_design_is_stored(name: str, tmp_path: Path) -> None:
    inputs = pictures(10, [])
    stored = extract(CONSTANT[name], tmp_path, inputs)
    for start in range(0, 8, 4):
        expected = CONSTANT[name](torch.stack(inputs[start : start + 4])).numpy()
        np.testing.assert_array_equal(stored[start : start + 4], expected.reshape(stored[start : start + 4].shape))


def test_a_pattern_leaves_out_what_cannot_be_told_and_says_so(tmp_path: Path) -> None:
    notes = Notes()
    model = nn.Sequential(nn.Identity(), Inner(lambda x: dead(x.flip(0))))
    with fm.extract(
        pictures(6, [1]), model, tmp_path / "x.h5", layers=["*"], progress=notes, device="cpu", batch_size=2
    ) as acts:
        assert list(acts.layers) == ["0"]
    assert "left out '1': its rows change with the other images" in notes


def test_an_image_that_the_model_fails_on_is_only_its_own_row(tmp_path: Path) -> None:
    def choosy(x: Tensor) -> Tensor:
        if x.amax() > 15:
            raise ValueError("too bright")
        return x

    inputs = pictures(6, [0, 3])
    with fm.extract(
        inputs, Does(choosy), tmp_path / "x.h5", layers=["inner"], progress=Notes(), device="cpu", batch_size=2
    ) as acts:
        assert acts.status.tolist() == [3, 0, 0, 3, 0, 0]


@pytest.mark.parametrize("length", [2, 3, 5, 8])
def test_any_place_that_another_one_reaches_is_found(length: int) -> None:
    """Every pair of places, one of which is added to the other."""
    batch, strangers = torch.rand(length, 4), torch.rand(length, 4)
    for seen in range(length):
        for place in range(length):

            def run(x: Tensor, seen: int = seen, place: int = place) -> list[Tensor]:
                mixed = x.clone()
                mixed[place] += x[seen] * (seen != place)
                return [x, mixed]

            rows = dict(enumerate(run(batch)))
            assert independence.leaking(run, batch, strangers, rows) == ({1} if seen != place else set())


def test_only_what_tells_something_is_run_again_among_strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.late, self.dead = nn.Identity(), nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.late((x - 20).relu()) + self.dead(x * 0)

    model, image_shape = Layers().eval(), (3, 4, 4)
    noise = torch.randn(2, *image_shape, generator=torch.Generator().manual_seed(0))
    wanted = resolve.resolve(["late", "dead"], survey.survey(model, model, noise))
    hooked: list[list[str]] = []

    def tapped(model: nn.Module, probed: Any, *rest: Any) -> Any:
        hooked.append([one.tap.name for one in probed])
        return hooks.tapped(model, probed, *rest)

    monkeypatch.setattr(probe, "tapped", tapped)
    probed, refused = probe.probe(model, model, wanted, image_shape, torch.device("cpu"))
    assert [(one.tap.name, one.undecided) for one in probed] == [("late", False), ("dead", True)]
    assert not refused
    assert ["late"] in hooked, "of the dead layer there is nothing to compare"
    assert hooked[0] == ["late", "dead"]
    assert hooked[-1] == ["dead"]
