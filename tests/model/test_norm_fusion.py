"""Batch norms that run in the convolutions before them: only where nobody can tell, and with the values of the two."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from runs import extract, make_photos
from torch import nn
from torch.nn import functional

from fmextract.capture import hooks, probe, resolve, survey
from fmextract.errors import FormatError
from fmextract.model import norm_fusion, precision, run_mode
from fmextract.reading import activations
from fmextract.run import autotune
from fmextract.verification import verify

CPU = torch.device("cpu")
SHAPE = (3, 16, 16)
BATCH = torch.randn((4, *SHAPE), generator=torch.Generator().manual_seed(1))


def lively(model: nn.Module) -> nn.Module:
    """Batch norms with statistics as training leaves them: those of a new network change next to nothing."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(0.1, 0.3, generator=generator)
            module.running_var.uniform_(0.3, 2.0, generator=generator)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
                nn.init.normal_(module.bias, 0.0, 0.3, generator=generator)
    return model.eval()


class Net(nn.Module):
    """`conv`, then `norm`, with a given way between and around them."""

    def __init__(self, way: Callable[[Any, torch.Tensor], torch.Tensor], **changes: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = changes.get("conv", nn.Conv2d(3, 8, 3, padding=1))
        self.norm = changes.get("norm", nn.BatchNorm2d(8))
        self.box = nn.Sequential(changes.get("boxed", nn.Identity()))
        self.relu = nn.ReLU(inplace=True)
        self.way = way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.way(self, x))  # type: ignore[no-any-return]


def usual(net: Any, x: torch.Tensor) -> torch.Tensor:
    return net.norm(net.conv(x))  # type: ignore[no-any-return]


def pairs_of(model: nn.Module, layers: list[str], shape: tuple[int, ...] = SHAPE) -> tuple[norm_fusion.Pair, ...]:
    batch = torch.randn((2, *shape), generator=torch.Generator().manual_seed(2))
    with run_mode.RunMode(model, CPU), precision.numerics("fp32", CPU):
        seen = survey.survey(model, model, batch)
        probed, refused = probe.probe(model, model, resolve.resolve(layers, seen), shape, CPU)
        assert not refused
        readers = norm_fusion.readers(model, probed)
        if readers is not None:
            stop = seen.stop_before([p.tap for p in probed])
            with readers, hooks.tapped(model, probed, stop=stop) as capture:
                capture.forward(model, batch)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules() if not hooked_by_us(m))
    return readers.pairs() if readers is not None else ()


def hooked_by_us(module: nn.Module) -> bool:
    return any(hook is look for hook in module._forward_hooks.values())


def look(module: nn.Module, args: Any, output: Any) -> None:
    """Somebody's own hook."""


def run_in(
    name: str, model: nn.Module, pairs: tuple[norm_fusion.Pair, ...], batch: torch.Tensor, packing: bool = True
) -> torch.Tensor:
    mode = run_mode.Mode("channels_last", pairs, prepacked=packing)
    with run_mode.RunMode(model, CPU, name, mode), precision.numerics(name, CPU):
        return model(precision.to_memory_format(batch, "channels_last")).float()  # type: ignore[no-any-return]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


# --------------------------------------------------------------------------------------------------- where it is done


def test_a_batch_norm_that_alone_reads_its_convolution_is_fused() -> None:
    model = lively(Net(usual))
    assert pairs_of(model, ["relu"]) == ((model.conv, model.norm),)


def twice(net: Any, x: torch.Tensor) -> torch.Tensor:
    made = net.conv(x)
    return net.norm(made) + made  # type: ignore[no-any-return]


def seen_before(net: Any, x: torch.Tensor) -> torch.Tensor:
    made = net.conv(x)
    net.seen = made.mean()
    return net.norm(made)  # type: ignore[no-any-return]


def a_view_of_it(net: Any, x: torch.Tensor) -> torch.Tensor:
    made = net.conv(x)
    view = made.flatten(2)
    return net.norm(made) + view.view_as(made)  # type: ignore[no-any-return]


def changed_in_place(net: Any, x: torch.Tensor) -> torch.Tensor:
    return net.norm(net.conv(x).relu_())  # type: ignore[no-any-return]


def conv_twice(net: Any, x: torch.Tensor) -> torch.Tensor:
    return net.norm(net.conv(x)) + net.conv(-x)  # type: ignore[no-any-return]


def norm_twice(net: Any, x: torch.Tensor) -> torch.Tensor:
    return net.norm(net.norm(net.conv(x)))  # type: ignore[no-any-return]


def boxed(net: Any, x: torch.Tensor) -> torch.Tensor:
    return net.norm(net.box(x))  # type: ignore[no-any-return]


def by_keyword(net: Any, x: torch.Tensor) -> torch.Tensor:
    return net.norm(input=net.conv(x))  # type: ignore[no-any-return]


class OwnConv(nn.Conv2d):
    """Whose forward nobody knows."""


@pytest.mark.parametrize(
    "model",
    [
        Net(twice),
        Net(seen_before),
        Net(a_view_of_it),
        Net(changed_in_place),
        Net(conv_twice),
        Net(norm_twice),
        Net(by_keyword),
        Net(usual, conv=OwnConv(3, 8, 3)),
        Net(usual, conv=nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")),
        Net(usual, norm=nn.SyncBatchNorm(8)),
        Net(usual, conv=nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3))),
        Net(usual, norm=nn.GroupNorm(2, 8)),
    ],
    ids=lambda model: f"{model.way.__name__}-{type(model.conv).__name__}-{type(model.norm).__name__}",
)
def test_others_are_left_alone(model: nn.Module) -> None:
    assert pairs_of(lively(model), ["relu"]) == ()


class Bare(nn.Module):
    """Whose parent has set a weight that is no parameter, or none."""

    def __init__(self, weight: torch.Tensor | None) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        del self.conv.weight
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight is not None:
            self.conv.weight = self.weight
        return self.norm(self.conv(x))  # type: ignore[no-any-return]


def test_a_weight_that_a_parent_sets_is_left_to_it() -> None:
    assert pairs_of(lively(Bare(torch.randn(8, 3, 3, 3))), ["."]) == ()


@pytest.mark.parametrize("layers", [["conv", "relu"], ["norm", "relu"], ["norm@in", "relu"]])
def test_what_is_wanted_itself_is_not_fused(layers: list[str]) -> None:
    assert pairs_of(lively(Net(usual)), layers) == ()


def test_a_container_that_gives_what_its_convolution_gave_is_not_fooled() -> None:
    model = lively(Net(boxed, boxed=nn.Conv2d(3, 8, 3)))
    assert len(pairs_of(model, ["relu"])) == 1
    assert pairs_of(model, ["box", "relu"]) == ()


def test_somebody_elses_hook_is_respected() -> None:
    model = lively(Net(usual))
    model.conv.register_forward_hook(look)  # type: ignore[union-attr, operator]
    assert pairs_of(model, ["relu"]) == ()


def test_what_comes_after_the_last_layer_is_not_asked_for() -> None:
    model = lively(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    )
    assert [pair.conv for pair in pairs_of(model, ["2"])] == [model[0]]


# -------------------------------------------------------------------------------------------------------- the values


def test_the_weights_are_those_of_both() -> None:
    for bias in (True, False):
        model = lively(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=bias), nn.BatchNorm2d(8)))
        pair = norm_fusion.Pair(model[0], model[1])  # type: ignore[arg-type]
        with torch.no_grad():
            torch.testing.assert_close(functional.conv2d(BATCH, *pair.fused(), 2, 1), model(BATCH))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("name", "norms"), [("resnet18", 20), ("mobilenet_v3_small", 34), ("densenet121", 59)])
def test_networks_come_out_as_near_to_fp32_as_under_autocast(name: str, norms: int, packing: bool) -> None:
    torch.manual_seed(0)
    model = lively(getattr(torchvision.models, name)(weights=None))
    batch = torch.randn((2, 3, 64, 64), generator=torch.Generator().manual_seed(3))
    pairs = pairs_of(model, ["."], (3, 64, 64))
    assert len(pairs) == norms
    with torch.no_grad():
        exact = model(batch)
        with torch.autocast("cpu", torch.bfloat16):
            plain = distance(model(batch).float(), exact)
    fused = run_in("bf16", model, pairs, batch, packing)
    assert 0 < distance(fused, exact) < max(1.5 * plain, 0.005)
    assert 0 < distance(run_in("fp32", model, pairs, batch), exact) < 5e-6
    with torch.no_grad():
        assert torch.equal(model(batch), exact), "the model is as it was"


def out_of_autocast(net: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):
        return net.norm(net.conv(x.float()))  # type: ignore[no-any-return]


def with_gradients(net: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        net.norm(net.conv(leaf)).square().sum().backward()
    assert leaf.grad is not None
    return leaf.grad / leaf.grad.abs().max()


@pytest.mark.parametrize("way", [out_of_autocast, with_gradients])
@pytest.mark.parametrize("packing", [True, False])
def test_a_model_that_leaves_autocast_or_asks_for_gradients_gets_them(way: Any, packing: bool) -> None:
    model = lively(Net(way))
    pairs = (norm_fusion.Pair(model.conv, model.norm),)  # type: ignore[arg-type]
    with torch.no_grad():
        exact = model(BATCH)
    most = 1e-5 if way is out_of_autocast else 0.02
    assert distance(run_in("bf16", model, pairs, BATCH, packing), exact) < most
    assert distance(run_in("fp32", model, pairs, BATCH), exact) < 1e-5


def by_name(net: Any, x: torch.Tensor) -> torch.Tensor:
    return net.norm(net.conv(input=x))  # type: ignore[no-any-return]


def with_other_weights(net: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return net.norm(torch.func.functional_call(net.conv, {"weight": 3 * net.conv.weight}, (x,)))


def with_other_settings(net: Any, x: torch.Tensor) -> torch.Tensor:
    made = net.conv(x)
    net.conv.dilation = net.conv.padding = (2, 2)
    made = made + net.conv(x)
    net.conv.dilation = net.conv.padding = (1, 1)
    return made  # type: ignore[no-any-return]


def half_outside_of_autocast(net: Any, x: torch.Tensor) -> torch.Tensor:
    made = net.conv(x)
    if made.dtype == torch.bfloat16:
        with torch.autocast("cpu", enabled=False):
            return net.box(made)  # type: ignore[no-any-return]
    return net.box(made)  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", [by_name, with_other_weights, with_other_settings, half_outside_of_autocast])
@pytest.mark.parametrize("fused", [True, False])
def test_a_model_that_uses_its_layers_in_other_ways_is_right(way: Any, fused: bool) -> None:
    """Without batch norm beside them layers are packed, with it fused too."""
    model = lively(Net(way, boxed=nn.Conv2d(8, 8, 3)))
    pairs = (norm_fusion.Pair(model.conv, model.norm),) if fused else ()  # type: ignore[arg-type]
    if fused and way in (with_other_settings, half_outside_of_autocast):
        pairs = ()  # no norm is called
    with torch.no_grad():
        exact = model(BATCH)
    assert distance(run_in("bf16", model, pairs, BATCH), exact) < 0.02
    assert distance(run_in("fp32", model, pairs, BATCH), exact) < 1e-5


def with_other_statistics(net: Any, x: torch.Tensor) -> torch.Tensor:
    net.norm.running_mean.add_(1.0)
    made = net.norm(net.conv(x))
    net.norm.running_mean.sub_(1.0)
    return made  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["bf16", "fp32"])
@pytest.mark.parametrize("packing", [True, False])
def test_a_norm_that_has_changed_is_computed_anew(name: str, packing: bool) -> None:
    model = lively(Net(with_other_statistics))
    with torch.no_grad():
        exact = model(BATCH)
    pairs = (norm_fusion.Pair(model.conv, model.norm),)  # type: ignore[arg-type]
    assert distance(run_in(name, model, pairs, BATCH, packing), exact) < (0.02 if name == "bf16" else 1e-5)


# ------------------------------------------------------------------------------------------------------------ in a run

OPTIONS = {
    "preprocess": "size=32,crop=32,mean=0.5,std=0.5",
    "precision": "bf16",
    "layers": ["layer1", "layer4"],
    "shard_size": "64GB",
}


def residual() -> nn.Module:
    torch.manual_seed(0)
    return lively(torchvision.models.resnet18(weights=None))


def test_a_run_says_that_it_fused_and_can_be_run_again(tmp_path: Path) -> None:
    photos, model = make_photos(tmp_path / "photos", 6), residual()
    extract(photos, tmp_path / "a.h5", model=model, **OPTIONS)
    with activations.open(tmp_path / "a.h5") as acts:
        assert len(acts.config["fused"]) == 20
        stored = {name: torch.from_numpy(acts[name][:]) for name in acts.layers}
        said = {name: acts[name].spec.rel_error for name in acts.layers}
    extract(photos, tmp_path / "b.h5", model=model, **{**OPTIONS, "precision": "fp32"})
    with activations.open(tmp_path / "b.h5") as acts:
        assert acts.config["fused"] == []
        for name in acts.layers:
            error = distance(stored[name], torch.from_numpy(acts[name][:]))
            assert 1e-4 < error < 0.02
            assert said[name] == pytest.approx(error, rel=0.5)
    again = verify(tmp_path / "a.h5", rerun=3, model=model, source=photos)
    assert (again.ok, again.largest_error) == (True, 0.0)


def test_long_runs_in_fp32_fuse_where_bits_differ_anyway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos, model = make_photos(tmp_path / "photos", 6), residual()
    options = {**OPTIONS, "precision": "fp32"}
    extract(photos, tmp_path / "contiguous.h5", model=model, memory_format="contiguous", **options)
    extract(photos, tmp_path / "short.h5", model=model, **options)
    monkeypatch.setattr(autotune, "FUSING_PAYS", 6)
    extract(photos, tmp_path / "long.h5", model=model, **options)
    extract(photos, tmp_path / "again.h5", model=model, memory_format="contiguous", **options)
    stored, said, fused = {}, {}, {}
    for name in ("contiguous", "short", "long", "again"):
        with activations.open(tmp_path / f"{name}.h5") as acts:
            fused[name] = bool(acts.config["fused"])
            stored[name] = torch.from_numpy(acts["layer4"][:])
            said[name] = acts["layer4"].spec.rel_error
    assert fused == {"contiguous": False, "short": False, "long": True, "again": False}
    assert torch.equal(stored["again"], stored["contiguous"])
    assert 0 < distance(stored["long"], stored["short"]) < 1e-5
    assert said["again"] == 0.0
    assert 0 < said["short"] < 1e-5
    assert 0 < said["long"] < 1e-5
    again = verify(tmp_path / "long.h5", rerun=3, model=model, source=photos)
    assert (again.ok, again.largest_error) == (True, 0.0)


def test_what_rounding_would_move_too_far_is_not_fused_in_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean far from zero beside the deviation: the two subtract it after rounding, the one before."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    assert model[0].bias is not None
    nn.init.constant_(model[0].bias, 1e4)
    nn.init.constant_(model[1].running_mean, 1e4)
    nn.init.constant_(model[1].running_var, 1e-4)
    monkeypatch.setattr(autotune, "FUSING_PAYS", 6)
    options = {**OPTIONS, "layers": ["2"], "precision": "fp32", "memory_format": "channels_last"}
    extract(make_photos(tmp_path / "photos", 6), tmp_path / "out.h5", model=model, **options)
    with activations.open(tmp_path / "out.h5") as acts:
        assert acts.config["fused"] == []


class Secret(torch.Tensor):
    """A tensor of somebody's own, as metadata ride on."""


def by_an_alias(net: Any, x: torch.Tensor) -> torch.Tensor:
    made = net.conv(x)
    alias = made.as_subclass(Secret)
    return net.norm(made) + 3 * alias.as_subclass(torch.Tensor)  # type: ignore[no-any-return]


def by_a_thread(net: Any, x: torch.Tensor) -> torch.Tensor:
    made, found = net.conv(x), []
    thread = threading.Thread(target=lambda: found.append(3 * made.detach()))
    thread.start()
    thread.join()
    return net.norm(made) + found[0]  # type: ignore[no-any-return]


def by_calling_forward(net: Any, x: torch.Tensor) -> torch.Tensor:
    return net.norm(net.conv(x)) + 5 * net.conv.forward(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", [by_an_alias, by_a_thread, by_calling_forward])
def test_readers_that_no_mode_sees_are_found_by_what_comes_out(way: Any, tmp_path: Path) -> None:
    model = lively(Net(way))
    assert pairs_of(model, ["relu"]), "if it is seen now, another example is needed"
    photos = make_photos(tmp_path / "photos", 4)
    for name in ("bf16", "fp32"):
        extract(photos, tmp_path / f"{name}.h5", model=model, precision=name, layers=["relu"])
    with activations.open(tmp_path / "bf16.h5") as rough, activations.open(tmp_path / "fp32.h5") as exact:
        assert rough.config["fused"] == []
        assert distance(*(torch.from_numpy(acts["relu"][:]) for acts in (rough, exact))) < 0.02


def test_pairs_are_written_down_by_their_paths() -> None:
    model = residual()
    pairs = pairs_of(model, ["."], (3, 32, 32))
    paths = norm_fusion.paths_of(model, pairs)
    assert paths[0] == ("conv1", "bn1")
    assert norm_fusion.pairs_at(model, paths) == pairs
    for wrong in ((("conv1", "relu"),), (("nowhere", "bn1"),), (("bn1", "conv1"),)):
        with pytest.raises(FormatError, match="does not have"):
            norm_fusion.pairs_at(model, wrong)
