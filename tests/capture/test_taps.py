"""Selectors, the layers that a run takes by itself, where the rows of a tensor are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import fmextract as fm
from fmextract.capture import probe, resolve, survey, taps
from fmextract.capture.taps import RowLayout
from fmextract.errors import CaptureError, LayerError
from fmextract.selector import Selector

Tensor = torch.Tensor


def surveyed(model: nn.Module, size: int = 32) -> survey.Survey:
    with torch.no_grad():
        return survey.survey(model.eval(), model, torch.randn(2, 3, size, size))


def names(seen: survey.Survey, *selectors: str) -> list[str]:
    return [tap.name for tap in resolve.resolve(selectors, seen)]


@pytest.fixture(scope="module")
def resnet50() -> survey.Survey:
    return surveyed(torchvision.models.resnet50())


@pytest.fixture(scope="module")
def resnet18() -> survey.Survey:
    return surveyed(torchvision.models.resnet18())


# ------------------------------------------------------------------------------------------------ grammar


@pytest.mark.parametrize(
    ("text", "base", "call", "tap", "member", "reducer"),
    [
        ("layer4.2.conv3", "layer4.2.conv3", None, "out", (), ""),
        ("layer?.*.conv1", "layer?.*.conv1", None, "out", (), ""),
        ("type:Conv2d", "type:Conv2d", None, "out", (), ""),
        ("type:Conv2d:2", "type:Conv2d", 2, "out", (), ""),
        ("type:torch.nn.Conv2d@in", "type:torch.nn.Conv2d", None, "in", (), ""),
        ("conv#20", "conv#20", None, "out", (), ""),
        ("conv#-1=pool:7", "conv#-1", None, "out", (), "pool:7"),
        ("relu:2@in[0]=mean", "relu", 2, "in", ("0",), "mean"),
        ("head[cls_logits]", "head", None, "out", ("cls_logits",), ""),
        ("rnn[1][0]", "rnn", None, "out", ("1", "0"), ""),
        (" fc ", "fc", None, "out", (), ""),
        (".", ".", None, "out", (), ""),
    ],
)
def test_selectors_are_taken_apart(
    text: str, base: str, call: int | None, tap: str, member: tuple[str, ...], reducer: str
) -> None:
    made = Selector.parse(text)
    assert (made.base, made.call, made.tap, made.member, made.reducer) == (base, call, tap, member, reducer)


@pytest.mark.parametrize(
    "text", ["", ":2", "relu@in:2", "relu[0]:2", "relu[0]@in", "relu[]", "relu[0", "relu:two", "relu="]
)
def test_what_is_no_selector_shows_the_grammar(text: str) -> None:
    with pytest.raises(LayerError, match=r"is not a layer selector. Expected .*':2' \(call\), '@in' \(input\)"):
        Selector.parse(text)


def test_calls_count_from_one() -> None:
    with pytest.raises(LayerError, match="calls count from 1"):
        Selector.parse("relu:0")


def test_globs(resnet18: survey.Survey) -> None:
    assert names(resnet18, "layer*") == ["layer1", "layer2", "layer3", "layer4"]
    assert names(resnet18, "layer?.*.conv1") == [f"layer{i}.{j}.conv1" for i in (1, 2, 3, 4) for j in (0, 1)]
    assert names(resnet18, "**.conv1") == ["conv1", *names(resnet18, "layer?.*.conv1")]
    assert names(resnet18, "layer1.**") == [name for name in names(resnet18, "**") if name.startswith("layer1.")]
    assert names(resnet18, "layer4.?") == ["layer4.0", "layer4.1"]
    assert names(resnet18, "*") == ["conv1", "bn1", "relu", "maxpool", *names(resnet18, "layer*"), "avgpool", "fc"]


def test_types_with_their_subclasses(resnet18: survey.Survey) -> None:
    convolutions = [name for name in names(resnet18, "**") if "conv" in name or name.endswith("downsample.0")]
    assert names(resnet18, "type:Conv2d") == convolutions
    assert names(resnet18, "type:_ConvNd") == names(resnet18, "type:Conv2d")
    assert names(resnet18, "type:torch.nn.Conv2d") == names(resnet18, "type:Conv2d")
    assert names(resnet18, "type:BasicBlock:1") == names(resnet18, "type:BasicBlock")

    class MyConv(nn.Conv2d):
        pass

    assert names(surveyed(nn.Sequential(MyConv(3, 3, 1), nn.Conv2d(3, 3, 1))), "type:Conv2d") == ["0", "1"]
    assert names(surveyed(nn.Sequential(MyConv(3, 3, 1), nn.Conv2d(3, 3, 1))), "type:MyConv") == ["0"]


class Oddly(nn.Module):
    """A convolution that runs twice, one whose path is how the second call is named, and one with further paths."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.add_module("a:2", nn.Conv2d(3, 3, 1))
        self.more = nn.ModuleDict({"b:2": self.b, "b=mean": self.b, "b[0]": self.b, "conv#0": self.b})

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.b(self.get_submodule("a:2")(self.a(self.a(x))))
        return made


def test_a_further_path_of_a_module_goes_before_what_else_it_could_mean() -> None:
    seen = surveyed(Oddly())
    for path in ("more.b:2", "more.b=mean", "more.b[0]", "more.conv#0"):
        assert names(seen, path) == ["b"]


def test_no_layer_is_lost_to_another_of_its_name() -> None:
    seen = surveyed(Oddly())
    assert names(seen, "a:2") == ["a:2"]
    for selectors in (["a", "a:2"], ["a:2", "a"], ["**"]):
        with pytest.raises(LayerError, match=r"two layers would be called 'a:2', of call . of .* and of call . of .*"):
            names(seen, *selectors)
    assert names(seen, "a", "b") == ["a:1", "a:2", "b"]


def test_kinds_by_number_in_the_order_of_execution(resnet50: survey.Survey) -> None:
    assert len(resnet50.numbered("conv")) == 53
    assert names(resnet50, "conv#0") == ["conv1"]
    # The branch beside the first block comes after its three convolutions: execution, not definition, counts.
    assert names(resnet50, "conv#4") == ["layer1.0.downsample.0"]
    assert names(resnet50, "conv#20") == ["layer2.2.conv3"]
    assert names(resnet50, "conv#-1") == names(resnet50, "conv#52") == ["layer4.2.conv3"]
    assert names(resnet50, "norm#1", "linear#0", "pool#-1", "pool#0") == ["maxpool", "layer1.0.bn1", "avgpool", "fc"]
    assert names(resnet50, "act#1:2") == ["layer1.0.relu:2"]
    with pytest.raises(LayerError, match="this model has conv#0 to conv#52"):
        names(resnet50, "conv#53")
    with pytest.raises(LayerError, match="this model has linear#0 to linear#0"):
        names(resnet50, "linear#-2")
    with pytest.raises(LayerError, match="unknown kind 'cnv'; expected one of conv, linear, norm, act, pool"):
        names(resnet50, "cnv#1")
    with pytest.raises(LayerError, match="this model has none at all"):
        names(surveyed(nn.Sequential(nn.Flatten())), "conv#0")


def test_order_of_execution_without_repeats(resnet18: survey.Survey) -> None:
    found = names(resnet18, "fc", "layer1", "conv#0", "conv1", "**.conv1", "layer1=mean", "bn1@in", "bn1")
    assert found[:3] == ["conv1", "bn1@in", "bn1"]
    assert found.index("layer1.1.conv1") < found.index("layer1") < found.index("layer2.0.conv1")
    assert found[-1] == "fc"
    assert len(found) == len(set(found)) == 14
    assert "layer1=mean" in found


def test_calls_of_reused_modules(resnet18: survey.Survey) -> None:
    assert names(resnet18, "layer1.0.relu") == ["layer1.0.relu:1", "layer1.0.relu:2"]
    assert names(resnet18, "layer1.0.relu:2@in=mean") == ["layer1.0.relu:2@in=mean"]
    assert len(names(resnet18, "type:ReLU:2")) == 8, "the first ReLU is called once: a pattern leaves it out"
    with pytest.raises(LayerError, match=r"'layer1.0.relu:3': 'layer1.0.relu' is called 2 times in a forward pass"):
        names(resnet18, "layer1.0.relu:3")
    with pytest.raises(LayerError, match=r"'relu:2': 'relu' is called 1 time in a forward pass"):
        names(resnet18, "relu:2")
    with pytest.raises(LayerError, match="is called 1 time"):
        names(resnet18, "**.conv1:2")


@pytest.mark.parametrize(
    ("selector", "closest"),
    [
        ("layer4.2.conv1", "layer4.1.conv1"),
        ("layr4", "layer4"),
        ("layer9*", "layer1"),
        ("type:Conv2D", "Conv2d"),
        ("type:nn.Relu", "ReLU"),
        ("downsample", "layer2.0.downsample"),
        ("bn2", "bn1"),
    ],
)
def test_what_matches_nothing_names_the_closest(resnet18: survey.Survey, selector: str, closest: str) -> None:
    with pytest.raises(LayerError, match=rf"no layer matches '{selector.replace('*', '[*]')}'.*'{closest}'"):
        names(resnet18, selector)


def test_modules_that_are_never_called() -> None:
    vit = surveyed(torchvision.models.VisionTransformer(32, 16, 1, 2, 16, 32, num_classes=5))
    path = "encoder.layers.encoder_layer_0.self_attention.out_proj"
    with pytest.raises(LayerError, match=rf"'{path}' matches '{path}', which the forward pass never calls"):
        names(vit, path)
    with pytest.raises(LayerError, match="which the forward pass never calls"):
        names(vit, "**.out_proj")
    assert path not in names(vit, "**")
    assert names(vit, "type:MultiheadAttention") == ["encoder.layers.encoder_layer_0.self_attention"]


def test_a_tap_named_outright_counts_as_such_beside_a_pattern(resnet18: survey.Survey) -> None:
    for selectors in (["layer*", "layer1"], ["layer1", "layer*"], ["layer*", "layer?", "layer1"]):
        explicit = [tap.name for tap in resolve.resolve(selectors, resnet18) if tap.explicit]
        assert explicit == ["layer1"]


def test_the_model_itself(resnet18: survey.Survey) -> None:
    assert names(resnet18, ".") == names(resnet18, "(model)") == ["(model)"]
    assert "(model)" not in names(resnet18, "**")


def test_other_names_of_a_module() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 3, 1)
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    seen = surveyed(Twice())
    assert names(seen, "second") == names(seen, "first") == names(seen, "*") == ["first:1", "first:2"]
    assert names(seen, "second:2") == ["first:2"]


def test_names_with_letters_of_the_grammar() -> None:
    odd = ["a:2", "b@in", "c[0]", "d=mean", "conv#7", "e*", "type:x"]

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in odd:
                self.add_module(name, nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            for module in self.children():
                x = module(x)
            return x

    seen = surveyed(Odd())
    for name in odd:
        assert [tap.module for tap in resolve.resolve([name], seen)] == [name]
    assert names(seen, "*") == odd


# ------------------------------------------------------------------------------------------ what is there


@pytest.mark.parametrize("model", ["resnet18", "mobilenet_v3_small", "squeezenet1_1"])
def test_the_table_of_layers_and_the_selectors_agree(model: str) -> None:
    rows = fm.layers(model, size="64")
    seen = surveyed(torchvision.models.get_model(model), 64)
    called = [row for row in rows if row.index >= 0]
    assert [row.index for row in called] == list(range(len(called)))
    assert [row.path for row in called] == names(seen, "**", ".")
    for row in called:
        assert names(seen, row.path) == [row.path]
        for number in row.number.split():
            assert row.path in names(seen, number)
    silent = {row.path for row in rows if row.index < 0}
    assert silent == {path for path, _ in torchvision.models.get_model(model).named_modules()} - {
        row.path.partition(":")[0] for row in called
    } - {""}


DEFAULTS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "resnet": (
        torchvision.models.resnet18,
        ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool", "fc"],
    ),
    "vgg": (
        lambda: torchvision.models.VGG(torchvision.models.vgg.make_layers([512, "M"]), num_classes=5),
        [f"features.{i}" for i in range(3)] + ["avgpool"] + [f"classifier.{i}" for i in range(7)],
    ),
    "vit": (
        lambda: torchvision.models.VisionTransformer(32, 16, 2, 2, 16, 32, num_classes=5),
        ["conv_proj", "encoder.dropout", "encoder.layers", "encoder.ln", "heads"],
    ),
    "one": (lambda: nn.Conv2d(3, 3, 1), ["."]),
    "few": (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), ["0", "1"]),
}


@pytest.mark.parametrize("name", list(DEFAULTS))
def test_the_layers_of_a_run_that_names_none(name: str) -> None:
    build, expected = DEFAULTS[name]
    model = build()
    assert resolve.default_selectors(model, surveyed(model)) == expected


def test_children_without_tensors_are_no_default() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.note = Function(lambda x: "text")
            self.blocks = nn.ModuleList([nn.ReLU(), nn.Tanh()])
            self.unused = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            self.note(x)
            for block in self.blocks:
                x = block(x)
            return x

    model = Mixed()
    assert resolve.default_selectors(model, surveyed(model)) == ["blocks.0", "blocks.1"]


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


@pytest.mark.parametrize("wrapper", ["DataParallel", "OptimizedModule"])
def test_what_wrappers_hide_is_out_of_reach(wrapper: str) -> None:
    wrapped = type(wrapper, (nn.Sequential,), {})(nn.ReLU())
    with pytest.raises(LayerError, match=rf"^the model: it is wrapped in {wrapper}, where hooks miss .*: model\."):
        surveyed(wrapped)
    seen = surveyed(nn.Sequential(nn.ReLU(), wrapped))
    assert list(seen.missed) == ["1.0"]
    assert f"it is wrapped in {wrapper}, where hooks miss calls; use what it wraps: model.1." in seen.missed["1.0"]


def test_a_compiled_module_is_refused() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU()))
    model[1].compile()
    assert set(surveyed(model).missed) == {"1", "1.0"}
    with pytest.raises(LayerError, match=r"'1': it was compiled by its compile\(\), where hooks miss calls"):
        resolve.resolve(["1"], surveyed(model))
    model.compile()
    with pytest.raises(LayerError, match=r"the model: it was compiled by its compile\(\), where hooks miss calls"):
        surveyed(model)


def test_no_hook_is_left_when_a_survey_fails() -> None:
    model = nn.Sequential(nn.ReLU(), Function(lambda x: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        surveyed(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_where_a_pass_may_stop(resnet18: survey.Survey) -> None:
    def stop(*selectors: str) -> taps.Event | None:
        return resnet18.stop_before(resolve.resolve(selectors, resnet18))

    assert stop("conv1") == ("bn1", 1, "in")
    assert stop("layer1") == ("layer2", 1, "in")
    assert stop("layer1@in") == ("layer1.0", 1, "in")
    assert stop("layer1.0.relu:1") == ("layer1.1", 1, "in"), "all calls of a module that is used again are counted"
    assert stop("conv1", "avgpool") == ("fc", 1, "in")
    assert stop("fc") is None
    assert stop(".") is None


# ------------------------------------------------------------------------------------------------ layouts


def test_rows_are_taken_out_of_any_axis() -> None:
    x = torch.arange(24).reshape(2, 3, 4)
    assert torch.equal(RowLayout(0).rows_first(x, 2), x)
    assert torch.equal(RowLayout(1).rows_first(x, 3), x.permute(1, 0, 2))
    assert torch.equal(RowLayout(2, 2, outer=True).rows_first(x, 2), x.reshape(2, 3, 2, 2).permute(2, 0, 1, 3))
    assert torch.equal(RowLayout(2, 2, outer=False).rows_first(x, 2), x.reshape(2, 3, 2, 2).permute(3, 0, 1, 2))
    assert RowLayout(1).rows_first(x, 3).data_ptr() == x.data_ptr(), "a view"
    with pytest.raises(CaptureError, match="axis 2 is 4 long, expected 3 x 2"):
        RowLayout(2, 2).rows_first(x, 3)


@pytest.mark.parametrize(
    ("two", "three", "expected"),
    [
        ((2, 5), (3, 5), [RowLayout(0)]),
        ((5, 2), (5, 3), [RowLayout(1)]),
        ((8, 5), (12, 5), [RowLayout(0, 4, outer=True), RowLayout(0, 4, outer=False)]),
        ((2, 2), (3, 3), []),
        ((7, 5), (8, 5), []),
        ((2, 5), (2, 5), []),
        ((2, 5), (3, 5, 1), []),
        ((1, 5), (2, 5), []),
        ((), (), []),
    ],
)
def test_shapes_at_two_batch_sizes_propose_layouts(two: Any, three: Any, expected: list[RowLayout]) -> None:
    assert probe._proposed_layouts(two, three) == expected


# ------------------------------------------------------------------------------------------ a module of one's own


def test_a_module_is_described_by_default_as_by_its_name() -> None:
    module = torchvision.models.resnet18()
    assert [(row.path, row.shape) for row in fm.layers(module)] == [
        (row.path, row.shape) for row in fm.layers("resnet18")
    ]
    assert not any(parameter.grad_fn for parameter in module.parameters())


def test_a_module_says_by_itself_how_many_channels_it_takes() -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    assert fm.layers(module)[0].shape == (4, 222, 222)
    assert fm.layers(module, size="32")[0].shape == (4, 30, 30)


@pytest.mark.parametrize("given", [torchvision.models.resnet18, nn.ReLU, 7])
def test_what_is_no_model_is_refused_with_what_to_do(given: Any) -> None:
    with pytest.raises(fm.ModelError, match="expected a model's name or a torch module") as refused:
        fm.layers(given)
    assert ("Call it first" in str(refused.value)) == callable(given)
