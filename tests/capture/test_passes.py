"""Passes over one image alone, and forwards that enable gradients."""

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

Tensor = torch.Tensor


class Squeezing(nn.Module):
    """As people write it: the axis of a batch of one vanishes with those of the pooled map."""

    def __init__(self, drop: Callable[[Tensor], Tensor] = torch.squeeze) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.c, self.p, self.l = nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Linear(4, 5)
        self.drop = drop

    def forward(self, x: Tensor) -> Any:
        return self.l(self.drop(self.p(self.c(x))))


def images(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn((3, 8, 8), generator=generator) for _ in range(count)]


def extract(model: nn.Module, out: Path, inputs: Sequence[Tensor], layers: Sequence[str], **options: Any) -> Any:
    chosen = {"precision": "fp32", "num_workers": 1, "device": "cpu", "memory_format": "contiguous", **options}
    return fm.extract(inputs, model.eval(), out / "x.h5", layers=layers, progress=Notes(), **chosen)


def fails_on_one(x: Tensor) -> Tensor:
    if len(x) == 1:
        raise ValueError("expected more than 1 value per channel")
    return x.flatten(1)


def another_for_one(x: Tensor) -> Tensor:
    return x.flatten(1) * (2 if len(x) == 1 else 1)


@pytest.mark.parametrize("drop", [torch.squeeze, fails_on_one, another_for_one])
@pytest.mark.parametrize(("count", "batch_size"), [(1, "auto"), (1, 1), (5, 1), (3, 2)])
def test_a_batch_of_one_gives_what_a_larger_one_does(
    drop: Callable[[Tensor], Tensor], count: int, batch_size: Any, tmp_path: Path
) -> None:
    model, inputs = Squeezing(drop), images(count)
    with extract(model, tmp_path, inputs, ["c", "l"], batch_size=batch_size) as acts, torch.no_grad():
        assert acts.status.tolist() == [0] * count
        right = model(torch.stack(inputs * 2))[:count].numpy()
        np.testing.assert_allclose(acts["l"][:], right, rtol=1e-5, atol=1e-6)
        assert acts["c"].shape == (count, 4, 8, 8)
        assert acts["c"].attrs["erf_size"] == 3.0, "the field of one image, with its gradient"


def test_one_image_is_run_alone_where_it_makes_no_difference(tmp_path: Path) -> None:
    seen = []
    model = Squeezing(lambda x: x.flatten(1))
    handle = model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    extract(model, tmp_path, images(6), ["l"], batch_size=1).close()
    handle.remove()
    assert seen[-6:] == [1] * 6


class Enabling(nn.Module):
    """Its forward enables gradients: for a saliency of its own, or for no reason."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.r, self.l = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Linear(4 * 36, 5)

    def forward(self, x: Tensor) -> Any:
        with torch.enable_grad():
            return self.l(self.r(self.c(x) * 1).flatten(1))


@pytest.mark.parametrize("options", [{}, {"precision": "bf16"}, {"batch_size": 1}])
def test_a_forward_that_enables_gradients(options: dict[str, Any], tmp_path: Path) -> None:
    model, inputs = Enabling(), images(4)
    with extract(model, tmp_path, inputs, ["c", "r", "l", "c=top"], **options) as acts, torch.no_grad():
        tolerance = 0.1 if options.get("precision") == "bf16" else 1e-5
        np.testing.assert_allclose(acts["l"][:], model(torch.stack(inputs)).detach().numpy(), atol=tolerance)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
