"""A model runs in a faster way only where it gives what it gives as it is written; else it runs as it is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import Notes, extract, make_photos
from torch import nn
from torch.nn import functional

from fmextract.errors import ConfigError
from fmextract.model import modes, precision
from fmextract.reading import activations

LAYERS = ["c", "d", "f"]
Way = Callable[[Any, torch.Tensor], torch.Tensor]


class Net(nn.Module):
    """Two convolutions and a linear layer, with a given way through them."""

    def __init__(self, way: Way, conv: type[nn.Conv2d] = nn.Conv2d) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c, self.d, self.f = nn.Conv2d(3, 16, 3), conv(16, 8, 3, padding=1), nn.Linear(8 * 36, 5)
        self.pool = nn.MaxPool2d(1)
        self.way = way
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.way(self, x)


def usual(net: Any, x: torch.Tensor) -> torch.Tensor:
    return net.f(net.d(net.c(x).relu()).flatten(1))  # type: ignore[no-any-return]


def by_view(net: Any, x: torch.Tensor) -> torch.Tensor:
    x = net.d(net.c(x).relu())
    return net.f(x.view(x.size(0), -1))  # type: ignore[no-any-return]


def by_strides(net: Any, x: torch.Tensor) -> torch.Tensor:
    x = net.d(net.c(x).relu())
    return net.f(torch.as_strided(x, (len(x), 288), (288, 1)))  # type: ignore[no-any-return]


def by_memory(net: Any, x: torch.Tensor) -> torch.Tensor:
    """As code that hands a tensor to a library of C by its pointer and size."""
    x = net.d(net.c(x).relu())
    flat = torch.tensor([], dtype=x.dtype).set_(x.untyped_storage(), 0, (len(x), 288))
    return net.f(flat)  # type: ignore[no-any-return]


def by_a_branch(net: Any, x: torch.Tensor) -> torch.Tensor:
    x = net.d(net.c(x).relu())
    return net.f((x if x.is_contiguous() else 2 * x).flatten(1))  # type: ignore[no-any-return]


def by_the_shape_of_a_weight(net: Any, x: torch.Tensor) -> torch.Tensor:
    mixed = functional.linear(net.c(x).flatten(2).mean(2), net.d.weight.view(8, -1)[:, :16])
    return net.f(net.d(net.c(x)).flatten(1)) + mixed.sum(1, keepdim=True)  # type: ignore[no-any-return]


def stored(out: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with activations.open(out) as acts:
        return {name: acts[name][:] for name in acts.layers}, acts.config


@pytest.mark.parametrize("way", [by_view, by_strides, by_memory, by_a_branch, by_the_shape_of_a_weight])
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_a_model_that_assumes_contiguous_memory_gets_it(way: Way, kind: str, tmp_path: Path) -> None:
    photos, notes = make_photos(tmp_path / "photos", 6), Notes()
    options = {"layers": LAYERS, "precision": kind, "batch_size": 6}
    extract(photos, tmp_path / "auto.h5", model=Net(way), notes=notes, **options)
    extract(photos, tmp_path / "asked.h5", model=Net(way), memory_format="contiguous", **options)
    made, config = stored(tmp_path / "auto.h5")
    assert config["memory_format"] == "contiguous"
    assert "channels_last memory is not used" in notes
    for name, values in stored(tmp_path / "asked.h5")[0].items():
        np.testing.assert_array_equal(made[name], values)
    with pytest.raises(ConfigError, match=r"--memory-format channels_last: .*(fails in it|not what it is).*contiguous"):
        extract(photos, tmp_path / "wrong.h5", model=Net(way), memory_format="channels_last", **options)


def test_a_model_that_does_not_care_gets_the_faster_memory(tmp_path: Path) -> None:
    extract(make_photos(tmp_path / "photos", 4), tmp_path / "out.h5", model=Net(usual), layers=LAYERS)
    assert stored(tmp_path / "out.h5")[1]["memory_format"] == "channels_last"


def into_the_map_behind_a_copy(net: Any, x: torch.Tensor) -> torch.Tensor:
    """In contiguous memory the rows are a copy; in channels_last they are the map itself, which is written."""
    x = net.c(x)
    x.permute(0, 2, 3, 1).reshape(len(x), -1).add_(1.0)
    return net.f(net.d(x).flatten(1))  # type: ignore[no-any-return]


def onto_rows(net: Any, x: torch.Tensor) -> torch.Tensor:
    """As position embeddings are added: what is written is what goes on."""
    rows = net.c(x).permute(0, 2, 3, 1).reshape(len(x), -1)
    rows += 1.0
    return net.f(net.d(rows.reshape(len(x), 6, 6, 16).permute(0, 3, 1, 2)).flatten(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("way", "memory_format"), [(into_the_map_behind_a_copy, "contiguous"), (onto_rows, "channels_last")]
)
def test_what_only_another_layout_overwrites(way: Way, memory_format: str, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", 4)
    extract(photos, tmp_path / "auto.h5", model=Net(way), layers=LAYERS)
    extract(photos, tmp_path / "asked.h5", model=Net(way), layers=LAYERS, memory_format="contiguous")
    made, config = stored(tmp_path / "auto.h5")
    assert config["memory_format"] == memory_format
    for name, values in stored(tmp_path / "asked.h5")[0].items():
        np.testing.assert_allclose(made[name], values, rtol=1e-4, atol=1e-5)


def test_what_rounding_tips_is_a_reason_for_contiguous_memory() -> None:
    """One value of a thousand changes its side, where rounding moved the layer before by 1e-7."""
    step = torch.zeros(2, 1000)
    step[:, ::2] = 1.0
    tipped = step.clone()
    tipped[0, 1] = 1.0
    assert modes._apart(tipped[0], step[0], 1e-4)
    assert modes._apart(0.01 * tipped[0] + 1.0, 0.01 * step[0] + 1.0, 1e-4), "however small beside the rest"
    assert not modes._apart(tipped[1], step[1], 1e-4)
    assert modes._apart(torch.tensor([1, 2]), torch.tensor([1, 3]), 1e-4) == "1 of 2 values are others"
    assert modes._apart(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.inf]), 1e-4)
    assert not modes._apart(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan]), 0.0)


def pooled(net: Any, x: torch.Tensor) -> torch.Tensor:
    x = net.pool(net.c(x).relu().contiguous())
    if not x.is_contiguous():
        raise RuntimeError("pooled elsewhere")
    return net.f(net.d(x).flatten(1))  # type: ignore[no-any-return]


class Counted(torch.Tensor):
    """A tensor of somebody's own that knows no other memory format."""

    def contiguous(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("memory_format") is torch.channels_last:
            raise RuntimeError("no other layout here")
        return super().contiguous(*args, **kwargs)


def pooled_by_somebody(net: Any, x: torch.Tensor) -> torch.Tensor:
    x = net.pool(net.c(x).as_subclass(Counted)).as_subclass(torch.Tensor)
    return net.f(net.d(x).flatten(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("way", "faster"), [(pooled, True), (pooled_by_somebody, False)])
def test_pooling_goes_its_own_way_where_the_other_one_fails(way: Way, faster: bool, tmp_path: Path) -> None:
    notes = Notes()
    options = {"layers": ["c", "pool", "f"], "memory_format": "contiguous", "notes": notes}
    extract(make_photos(tmp_path / "photos", 4), tmp_path / "out.h5", model=Net(way), **options)
    assert stored(tmp_path / "out.h5")[1]["pooling"] is faster
    assert ("max pooling through channels_last is not used" in notes) is not faster


# ------------------------------------------------------------------------------------------ what autocast runs


def under_autocast(model: nn.Module, photos: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """What torch gives by itself, with cloning hooks; the inputs are those that a run makes."""
    extract(
        photos, tmp_path / "inputs.h5", model=nn.Sequential(nn.Identity()), layers=["0"], memory_format="contiguous"
    )
    inputs = torch.from_numpy(stored(tmp_path / "inputs.h5")[0]["0"])
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: seen.update({name: output.clone()})

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in LAYERS]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(inputs)
    for handle in handles:
        handle.remove()
    return seen


def island(net: Any, x: torch.Tensor) -> torch.Tensor:
    x = net.c(x)
    with torch.autocast("cpu", enabled=False):
        x = net.d(x.float()).relu()
    return net.f(x.flatten(1))  # type: ignore[no-any-return]


def island_to_the_end(net: Any, x: torch.Tensor) -> torch.Tensor:
    x = net.d(net.c(x))
    with torch.autocast("cpu", enabled=False):
        return net.f(x.float().flatten(1))  # type: ignore[no-any-return]


def in_double(net: Any, x: torch.Tensor) -> torch.Tensor:
    x = net.d(net.c(x))
    weight, bias = net.f.weight.double(), net.f.bias.double()
    return net.f(x.flatten(1)) + functional.linear(x.double().flatten(1), weight, bias).float()  # type: ignore[no-any-return]


def read_by_others(net: Any, x: torch.Tensor) -> torch.Tensor:
    """A decoder with the weights of the encoder, outside of autocast, and a norm of the weights."""
    x = net.f(net.d(net.c(x)).flatten(1))
    with torch.autocast("cpu", enabled=False):
        back = functional.linear(x.float(), net.f.weight.t())
        return net.f(back) / net.f.weight.norm()  # type: ignore[no-any-return]


def in_another_type(net: Any, x: torch.Tensor) -> torch.Tensor:
    x = net.c(x)
    with torch.autocast("cpu", torch.float16):
        x = net.d(x)
    return net.f(x.float().flatten(1))  # type: ignore[no-any-return]


class Standardised(nn.Conv2d):
    """A convolution of weights with mean 0 and deviation 1, as of NF-ResNets and ViT's hybrid stems."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return functional.conv2d(x, (self.weight - mean) / std, self.bias, padding=self.padding)


def normed(model: Any) -> nn.Module:
    nn.utils.parametrizations.weight_norm(model.d)
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "model",
    [
        lambda: Net(usual),
        lambda: Net(island),
        lambda: Net(island_to_the_end),
        lambda: Net(in_double),
        lambda: Net(read_by_others),
        lambda: Net(in_another_type),
        lambda: Net(usual, Standardised),
        lambda: normed(Net(usual)),
    ],
)
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_what_autocast_runs_runs(model: Callable[[], nn.Module], memory_format: str, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", 4)
    expected = under_autocast(model(), photos, tmp_path)
    calls = {"f": ":2"} if getattr(model(), "way", None) is read_by_others else {}
    layers = [name + calls.get(name, "") for name in LAYERS]
    options = {"precision": "bf16", "memory_format": memory_format, "batch_size": 4}
    extract(photos, tmp_path / "out.h5", model=model(), layers=layers, **options)
    made, _ = stored(tmp_path / "out.h5")
    for (name, values), exact in zip(made.items(), expected.values(), strict=True):
        with activations.open(tmp_path / "out.h5") as acts:
            assert acts[name].spec.compute_dtype == str(exact.dtype).removeprefix("torch.")
        torch.testing.assert_close(torch.from_numpy(values), exact.float(), rtol=2**-7, atol=2**-8, check_dtype=False)


def without_half(net: Any, x: torch.Tensor) -> torch.Tensor:
    x = net.d(net.c(x))
    if x.dtype != torch.float32:
        raise RuntimeError("float32 only")
    return net.f(x.flatten(1))  # type: ignore[no-any-return]


def test_auto_takes_fp32_where_nothing_else_runs_and_says_why(tmp_path: Path) -> None:
    notes = Notes()
    extract(
        make_photos(tmp_path / "photos", 4),
        tmp_path / "out.h5",
        model=Net(without_half),
        layers=LAYERS,
        precision="auto",
        notes=notes,
    )
    with activations.open(tmp_path / "out.h5") as acts:
        assert acts.attrs["precision"] == "fp32"
    assert ("float32 only" in notes) is precision.bf16_on_cpu()
