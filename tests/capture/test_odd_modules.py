"""One odd module, and the rest of the model can be taken all the same: what is left out is named, with the reason."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.mkldnn
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils.checkpoint import checkpoint

import fmextract as fm
from fmextract.errors import LayerError
from fmextract.model.weights import weights_digest

# What torch says of its own older ways: people use them all the same.
pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]

Tensor = torch.Tensor
IMAGES = [torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]


class Net(nn.Module):
    """`call` says how `odd` is called, where that is not the usual way."""

    def __init__(self, odd: nn.Module, call: Callable[[nn.Module, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.first, self.odd, self.last = nn.Conv2d(3, 4, 3, padding=1), odd, nn.ReLU()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        made: Tensor = self.last(self.call(self.odd, x) if self.call else self.odd(x))
        return made


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class NoHooks(Doubled):
    def register_forward_hook(self, *args: Any, **options: Any) -> Any:
        raise RuntimeError("not here")


class OwnCall(Doubled):
    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x)


class AlwaysTraining(Doubled):
    @property
    def training(self) -> bool:
        return True

    @training.setter
    def training(self, mode: bool) -> None:
        if not mode:
            raise AttributeError("read only")


class Weighted(Doubled):
    """Mixes channels by a matrix that is kept in an odd layout."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("oc,bcyx->boyx", self.weight.to_dense(), x)


class Opaque(nn.Module):
    """Layers of oneDNN, which torch makes as scripted modules."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.utils.mkldnn.to_mkldnn(
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)).eval()
        )

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.inner(x.to_mkldnn()).to_dense()
        return made


class Quantized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.ao.nn.quantized.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.conv(torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)).dequantize()
        return made


def compiled() -> nn.Module:
    module = conv()
    module.compile(backend="eager")
    return module


ODD: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "scripted": (lambda: Net(torch.jit.script(conv())), "it is scripted"),
    "traced": (lambda: Net(torch.jit.trace(conv().eval(), torch.zeros(1, 4, 8, 8))), "it is scripted"),
    "frozen": (lambda: Net(torch.jit.freeze(torch.jit.script(conv().eval()))), "it is scripted"),
    "vmap": (lambda: Net(conv(), lambda odd, x: torch.vmap(odd)(x)), "inside torch.vmap"),
    "grad": (
        lambda: Net(conv(), lambda odd, x: torch.vmap(torch.func.grad(lambda v: odd(v).sum()))(x)),
        "inside torch.vmap",
    ),
    "unused and lazy": (lambda: Net(nn.LazyConv2d(4, 1), lambda odd, x: x), "lazy and not initialised"),
    "compiled": (lambda: Net(compiled()), r"it was compiled by its compile\(\)"),
    "own call": (lambda: Net(OwnCall()), "OwnCall has a __call__ of its own"),
    "no hooks": (lambda: Net(NoHooks()), r"it takes no hooks \(RuntimeError: not here\)"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_module_is_left_out_by_name_and_the_rest_is_taken(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    build, why = ODD[name]
    model = build()
    modes = {path: getattr(module, "training", None) for path, module in model.named_modules()}
    result = fm.extract(IMAGES, model, tmp_path / "out.h5", layers=["**"], preprocess="none", precision="fp32")
    assert list(result.layers) == ["first", "last"]
    with torch.no_grad():
        expected = model.eval()(torch.stack(IMAGES))
    np.testing.assert_allclose(result["last"][:], expected.numpy(), atol=1e-6)
    assert all(getattr(module, "training", None) in (modes[path], False) for path, module in model.named_modules())
    with pytest.raises(LayerError, match=f"'odd'.*{why}"):
        fm.extract(IMAGES, model, tmp_path / "odd.h5", layers=["odd"], preprocess="none")
    rows = {row.path: row for row in fm.layers(model, preprocess="size=8,mean=0,std=1")}
    assert re.search(why, rows["odd"].refused)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Weighted(torch.eye(4).to_sparse()),
        lambda: Weighted(torch.eye(4).to_sparse_csr()),
        lambda: Weighted(torch.eye(4).to_mkldnn()),
        Opaque,
        Quantized,
        AlwaysTraining,
        lambda: torch.fx.symbolic_trace(conv()),
        lambda: nn.DataParallel(conv()),
        lambda: torch.compile(conv(), backend="eager"),
    ],
    ids=["sparse", "csr", "opaque", "opaque layers", "quantized", "training", "graph", "parallel", "compiled"],
)
def test_modules_of_an_odd_kind_are_taken(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    odd = build()
    model = Net(odd)
    result = fm.extract(IMAGES, model, tmp_path / "out.h5", layers=["first", "odd", "last"], preprocess="none")
    seen: list[Tensor] = []
    with torch.no_grad(), odd.register_forward_hook(lambda module, args, out: seen.append(out.clone())):
        model(torch.stack(IMAGES))
    np.testing.assert_allclose(result["odd"][:], seen[0].numpy(), rtol=0.02, atol=0.02)


def test_a_pass_ends_where_weights_are_not_there_yet(tmp_path: Path) -> None:
    model = Net(nn.LazyConv2d(4, 1))
    result = fm.extract(IMAGES, model, tmp_path / "out.h5", layers=["**"], preprocess="none")
    assert list(result.layers) == ["first"]
    assert is_lazy(model.odd.weight), "the caller's model is as it was"
    with pytest.raises(LayerError, match="The forward pass ends at 'odd': its parameters are lazy"):
        fm.extract(IMAGES, model, tmp_path / "last.h5", layers=["last"], preprocess="none")


def test_compiled_under_gradient_checkpointing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net(conv(), lambda odd, x: checkpoint(odd, x, use_reentrant=False))
    options: dict[str, Any] = {"layers": ["odd.0", "last"], "preprocess": "none", "precision": "fp32"}
    result = fm.extract(IMAGES, model, tmp_path / "out.h5", compile=True, **options)
    plain = fm.extract(IMAGES, model, tmp_path / "plain.h5", **options)
    for layer in ("odd.0", "last"):
        np.testing.assert_allclose(result[layer][:], plain[layer][:], atol=1e-5)


def test_every_value_of_odd_weights_is_in_their_digest() -> None:
    def digest(weight: Tensor) -> str:
        return weights_digest(Weighted(weight))

    one, other = torch.eye(4), torch.eye(4)
    other[2, 2] = 3
    for kind in ("to_sparse", "to_sparse_csr", "to_sparse_csc", "to_mkldnn", "clone"):
        assert digest(getattr(one, kind)()) == digest(getattr(one, kind)())
        assert digest(getattr(one, kind)()) != digest(getattr(other, kind)()), kind
    moved = torch.zeros(4, 4)
    moved[0, 1] = 1
    assert digest(moved.to_sparse()) != digest(moved.T.contiguous().to_sparse())
    plain = hashlib.sha256(b"weight\0torch.float32\0(4, 4)\0" + one.numpy().tobytes()).hexdigest()
    assert digest(one) == plain, "as it has always been"


@pytest.mark.parametrize("every", [False, True])
def test_modules_that_a_first_pass_makes_are_layers(every: bool, tmp_path: Path) -> None:
    """Built once the shape is known; or a new one in every pass."""

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            if every or not hasattr(self, "late"):
                self.late = nn.Flatten()
            out: torch.Tensor = self.late(y)
            return out

    model = Late().eval()
    inputs = [torch.rand(3, 8, 8) for _ in range(4)]
    with fm.extract(inputs, model, tmp_path / "x.h5", layers=["*"], device="cpu", precision="fp32") as acts:
        assert list(acts.layers) == (["conv"] if every else ["conv", "late"])
    assert [name for name, _ in model.named_modules()] == ["", "conv"]
