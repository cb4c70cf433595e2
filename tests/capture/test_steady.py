"""What differs from one pass to the next, or with the other images of a batch, is no row of an image."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import Notes
from torch import nn

import fmextract as fm

Tensor = torch.Tensor


class Odd(nn.Module):
    """A convolution, and a module whose output is what a function says of what it gives."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        self.odd = _Odd(function)

    def forward(self, x: Tensor) -> Any:
        return self.odd(self.conv(x))


class _Odd(nn.Module):
    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.passes, self.seen = function, 0, []

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.function(self, x)


def images(count: int = 10) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 60 + 15 * i, (12, 12, 3)).astype(np.uint8) for i in range(count)]


def extract(function: Callable[[Any, Tensor], Tensor], out: Path, notes: Notes, **options: Any) -> fm.Activations:
    chosen = {"layers": ["*"], "precision": "fp32", "batch_size": 4, "device": "cpu", "num_workers": 1, **options}
    return fm.extract(
        images(),
        Odd(function).eval(),
        out / "x.h5",
        preprocess="size=12,crop=12,mean=0,std=1",
        progress=notes,
        **chosen,
    )


def rounded(x: Tensor) -> Tensor:
    step = x.abs().max() / 127
    return (x / step).round() * step


STATISTICS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "the largest value": lambda m, x: x / x.abs().max(),
    "the smallest value": lambda m, x: x - x.min(),
    "the largest value, if it is large": lambda m, x: x / x.abs().max().clamp(min=2),
    "steps of the batch's range": lambda m, x: rounded(x),
    "one large value anywhere": lambda m, x: x * (1 + (x.max() > 2.5)),
}


@pytest.mark.parametrize("name", list(STATISTICS))
def test_what_depends_on_the_range_of_a_batch_is_left_out(name: str, tmp_path: Path) -> None:
    notes = Notes()
    with extract(STATISTICS[name], tmp_path, notes) as acts:
        assert list(acts.layers) == ["conv"]
    assert "left out 'odd': its rows change with the other images of the batch" in notes


def remembering(module: Any, x: Tensor) -> Tensor:
    module.seen.append(x.detach().mean())
    return x + torch.stack(module.seen[-8:]).mean() if len(module.seen) > 8 else x


NOW_AND_THEN: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "numpy's dice": (lambda m, x: x.flip(3) if np.random.rand() < 0.3 else x, "with random numbers"),
    "the standard library's dice": (lambda m, x: x * 2 if random.random() < 0.3 else x, "with random numbers"),
    "images left out": (lambda m, x: x * (torch.rand(len(x), 1, 1, 1) > 0.1), "with random numbers"),
    "every seventh pass": (lambda m, x: x * (1 + (m.passes % 7 == 0)), "with what the model remembers"),
    "a queue that fills": (remembering, "with what the model remembers"),
}


@pytest.mark.parametrize("name", list(NOW_AND_THEN))
def test_what_a_model_does_now_and_then_is_left_out(name: str, tmp_path: Path) -> None:
    notes = Notes()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    function, why = NOW_AND_THEN[name]
    with extract(function, tmp_path, notes) as acts:
        assert list(acts.layers) == ["conv"]
    assert "left out 'odd': its values change" in notes or "left out 'odd': its rows change" in notes
    assert why in notes or "at random" in notes  # it may show at once


def test_random_numbers_that_change_nothing_are_told(tmp_path: Path) -> None:
    notes = Notes()
    with extract(lambda m, x: x + 0 * torch.rand_like(x), tmp_path, notes) as acts:
        assert list(acts.layers) == ["conv", "odd"]
    assert "the model draws random numbers in its forward pass" in notes


def test_a_counter_that_changes_nothing_is_not(tmp_path: Path) -> None:
    notes = Notes()
    with extract(lambda m, x: x, tmp_path, notes) as acts:
        assert list(acts.layers) == ["conv", "odd"]
    assert "random numbers" not in notes


TURNED: dict[str, Callable[[Tensor], Any]] = {
    "unsqueeze_": lambda y: y.unsqueeze_(1),
    "transpose_": lambda y: y.transpose_(1, 2),
    "squeeze_": lambda y: y.squeeze_(),
    "set_": lambda y: y.set_(torch.zeros_like(y)),
    "resize_": lambda y: y.resize_(len(y), 2, 10, 10),
    "data": lambda y: setattr(y, "data", torch.zeros(3)),
}


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("how", list(TURNED))
def test_a_tensor_that_gets_another_shape_in_place_is_stored_as_it_was(how: str, pooled: bool, tmp_path: Path) -> None:
    class Turns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 4, 12 if pooled else 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            if not (pooled and how == "resize_"):
                TURNED[how](y)
            return y.sum()

    model = Turns().eval()
    expected: list[Tensor] = []
    inputs = [torch.rand(3, 12, 12) for _ in range(5)]
    with torch.no_grad():
        expected = [model.conv(one[None])[0] for one in inputs]
    with fm.extract(
        inputs, model, tmp_path / "x.h5", layers=["conv"], precision="fp32", device="cpu", progress=Notes()
    ) as acts:
        assert acts["conv"].axes == ("sample", "channel", "y", "x")
        np.testing.assert_allclose(acts["conv"][:], torch.stack(expected).numpy(), atol=1e-6)


def test_a_model_that_refuses_some_images_fails_their_rows_alone(tmp_path: Path) -> None:
    """Neither the noise of the probe nor a photo that it looks at first makes a model one that cannot be run."""

    class Choosy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            if ((x < -1.01) | (x > 1.01)).any() or (x.mean((1, 2, 3)) > 0.8).any():
                raise ValueError("out of range")
            return self.inner(x)

    photos = [np.full((8, 8, 3), value, np.uint8) for value in (255, 10, 40, 90, 120, 250)]
    how: dict[str, Any] = {"preprocess": "size=8,crop=8,mean=0.5,std=0.5", "precision": "fp32", "batch_size": 2}
    with fm.extract(photos, Choosy(), tmp_path / "x.h5", layers=["inner"], device="cpu", max_failures=3, **how) as acts:
        assert acts.status.tolist() == [3, 0, 0, 0, 0, 3]
