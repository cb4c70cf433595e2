"""What is stored is what the modules gave, for real and for odd networks; what cannot be stored is refused by name."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from runs import Notes
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import fmextract as fm

Tensor = torch.Tensor


def _load_sweep() -> ModuleType:
    """benchmarks/sweep.py, whose reference shares no code with the package."""
    spec = importlib.util.spec_from_file_location("sweep", Path(__file__).parents[2] / "benchmarks" / "sweep.py")
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sweep = _load_sweep()


def images(count: int = 5, shape: Sequence[int] = (3, 8, 8)) -> list[Tensor]:
    """Float inputs, all different."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(tuple(shape), generator=generator) for _ in range(count)]


def extract(
    model: nn.Module, out: Path, layers: Sequence[str], inputs: Sequence[Any] | None = None, **options: Any
) -> fm.Activations:
    chosen = {"precision": "fp32", "batch_size": 2, "memory_format": "contiguous", "num_workers": 2, "device": "cpu"}
    source = images() if inputs is None else inputs
    return fm.extract(source, model.eval(), out / "x.h5", layers=layers, progress=Notes(), **{**chosen, **options})


# ------------------------------------------------------------------------------------------ real networks


def vgg() -> nn.Module:
    features = torchvision.models.vgg.make_layers([8, "M", 16, "M"], batch_norm=True)
    model = torchvision.models.VGG(features, init_weights=False)
    model.classifier = nn.Sequential(nn.Linear(16 * 7 * 7, 8), nn.ReLU(True), nn.Dropout(), nn.Linear(8, 5))
    return model


def swin(block: Any, downsample: Any) -> nn.Module:
    return torchvision.models.SwinTransformer(
        [4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=5, block=block, downsample_layer=downsample
    )


def convnext() -> nn.Module:
    setting = torchvision.models.convnext.CNBlockConfig
    return torchvision.models.ConvNeXt([setting(16, 32, 2), setting(32, None, 1)], num_classes=5)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet": (
        lambda: torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5),
        (3, 32, 32),
    ),
    "vgg": (vgg, (3, 32, 32)),
    "densenet": (lambda: torchvision.models.DenseNet(8, (2, 2), 16, num_classes=5), (3, 32, 32)),
    "mobilenet_v2": (
        lambda: torchvision.models.MobileNetV2(5, 0.25, [[1, 8, 1, 1], [6, 16, 2, 2]]),
        (3, 32, 32),
    ),
    "mobilenet_v3": (lambda: torchvision.models.mobilenet_v3_small(num_classes=5), (3, 32, 32)),
    "efficientnet": (
        lambda: torchvision.models.EfficientNet(
            [torchvision.models.efficientnet.MBConvConfig(4, 3, s, 16, 16, 1, 0.5, 0.5) for s in (1, 2)],
            0.1,
            num_classes=5,
            last_channel=32,
        ),
        (3, 32, 32),
    ),
    "convnext": (convnext, (3, 32, 32)),
    "swin": (
        lambda: swin(
            torchvision.models.swin_transformer.SwinTransformerBlock, torchvision.models.swin_transformer.PatchMerging
        ),
        (3, 32, 32),
    ),
    "swin_v2": (
        lambda: swin(
            torchvision.models.swin_transformer.SwinTransformerBlockV2,
            torchvision.models.swin_transformer.PatchMergingV2,
        ),
        (3, 32, 32),
    ),
    "maxvit": (
        lambda: torchvision.models.MaxVit((32, 32), 16, 4, [16], [1], 8, 0.0, num_classes=5),
        (3, 32, 32),
    ),
    "vit": (lambda: torchvision.models.VisionTransformer(32, 16, 2, 2, 16, 32, num_classes=5), (3, 32, 32)),
    "googlenet": (lambda: torchvision.models.googlenet(init_weights=False, num_classes=5), (3, 64, 64)),
    "inception": (lambda: torchvision.models.inception_v3(init_weights=False, num_classes=5), (3, 96, 96)),
}


@pytest.fixture
def network(request: pytest.FixtureRequest) -> tuple[str, nn.Module, tuple[int, ...]]:
    build, shape = NETWORKS[request.param]
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)  # GoogLeNet and Inception announce changes
        model = build()
    for module in model.modules():  # batch norm that is not the identity
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return request.param, model.eval(), shape


@pytest.mark.parametrize(
    ("network", "memory_format"),
    [pytest.param(name, "contiguous", marks=pytest.mark.slow) for name in ("googlenet", "inception")]
    + [(name, "contiguous") for name in NETWORKS if name not in ("googlenet", "inception")]
    + [(name, "channels_last") for name in ("resnet", "densenet", "convnext", "swin")],
    indirect=["network"],
)
def test_every_module_is_stored_as_a_cloning_hook_sees_it(network: Any, memory_format: str) -> None:
    _, model, shape = network
    outcome = sweep.check(model, shape, memory_format)
    assert outcome["different"] == []
    assert outcome["missing"] == []
    of_no_image = [layer for layer in outcome["refused"] if "cpb_mlp" not in layer]  # a table of Swin v2's own
    assert of_no_image == []
    called = set(sweep.reference(model, torch.stack(images(2, shape))))
    leaves = {path for path, module in model.named_modules() if not list(module.children())}
    assert outcome["leaves"] == len((called & leaves) - set(outcome["refused"])) > 10


def test_the_check_itself_sees_a_changed_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    _, build = "resnet", NETWORKS["resnet"][0]
    whole = sweep.watch

    def off(model: nn.Module, batch: Tensor, see: Callable[[str, int, Any], None]) -> None:
        def changed(path: str, number: int, output: Any) -> None:
            if path == "layer1.0.conv1":
                output = output.clone()
                output.view(torch.int32)[1, 0, 0, 0] ^= 1
            see(path, number, output)

        whole(model, batch, changed)

    monkeypatch.setattr(sweep, "watch", off)
    assert sweep.check(build().eval(), (3, 32, 32))["different"] == ["layer1.0.conv1"]


@pytest.mark.parametrize("name", ["resnet", "vit", "convnext"])
def test_equal_to_torchvisions_extractor_where_nothing_is_overwritten(name: str, tmp_path: Path) -> None:
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    model, inputs = build().eval(), images(4, shape)
    with torch.no_grad():
        seen = sweep.reference(model, torch.stack(inputs[:2]))
    once = [path for path, calls in seen.items() if path and len(calls) == 1 and isinstance(calls[0], Tensor)]
    nodes = set(get_graph_node_names(model)[1])
    # A number at the end of its names counts nodes: `ln_1` is the second call of something called `ln`.
    named = [path for path in once if path in nodes and not re.search(r"_\d+$", path)]
    leaves = [path for path in named if not list(model.get_submodule(path).children())]
    extractor = create_feature_extractor(model, leaves)
    right = 0
    with extract(model, tmp_path, leaves, inputs) as acts, torch.no_grad():
        made = extractor(torch.stack(inputs[:2]))
        for path in leaves:
            is_equal = np.array_equal(acts[path][:2], made[path].numpy())
            assert is_equal or acts[path].attrs["copied"], path
            right += is_equal
    assert right > len(leaves) / 2


def test_batch_norm_before_a_relu_in_place_where_others_are_wrong(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("bn", nn.BatchNorm2d(3))
    model.add_module("relu", nn.ReLU(inplace=True))
    inputs = images(4)
    plain: list[Tensor] = []
    handle = model.eval()[0].register_forward_hook(lambda module, args, output: plain.append(output))
    with torch.no_grad():
        model(torch.stack(inputs[:2]))
        handle.remove()
        right = model[0](torch.stack(inputs[:2])).numpy()
        graph = create_feature_extractor(model, ["bn", "relu"])(torch.stack(inputs[:2]))["bn"].numpy()
    with extract(model, tmp_path, ["bn", "relu"], inputs) as acts:
        assert acts["bn"].attrs["copied"]
        assert np.array_equal(acts["bn"][:2], right)
        assert np.array_equal(acts["relu"][:2], right.clip(0))
    assert right.min() < 0
    assert np.array_equal(plain[0].numpy(), right.clip(0)), "a hook that does not clone is wrong here"
    assert np.array_equal(graph, right.clip(0)), "so is torchvision's extractor"


# ------------------------------------------------------------------------------------------- odd tensors


class Given(nn.Module):
    """`inner` does what a function says, then `head` what `after` says to its output, then `end` looks at the input.

    A pass that wants `end` runs through `head`: an early stop would hide what that does to the tensor before it.
    """

    def __init__(self, function: Callable[..., Any], after: Callable[[Any], Any] = lambda made: made) -> None:
        super().__init__()
        self.inner = Function(function)
        self.head = Function(after)
        self.end = nn.Flatten()

    def forward(self, x: Tensor) -> Any:
        made = self.head(self.inner(x))
        self.end(x)
        return made


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


TOKEN = nn.Parameter(torch.arange(4.0))

STORED: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "flipped views": (lambda x: torch.cat([x, x.flip(3)]), lambda x: torch.stack([x, x.flip(3)], 1)),
    "windows, image by image": (
        lambda x: x.unflatten(2, (2, 4)).permute(0, 2, 1, 3, 4).flatten(0, 1),
        lambda x: x.unflatten(2, (2, 4)).permute(0, 2, 1, 3, 4),
    ),
    "windows, window by window": (
        lambda x: x.unflatten(2, (2, 4)).permute(2, 0, 1, 3, 4).flatten(0, 1),
        lambda x: x.unflatten(2, (2, 4)).permute(0, 2, 1, 3, 4),
    ),
    "sequence first": (lambda x: x.flatten(2).permute(2, 0, 1), lambda x: x.flatten(2).permute(0, 2, 1)),
    "one number an image": (lambda x: x.flatten(1).max(1).values, lambda x: x.flatten(1).max(1).values),
    "integers": (lambda x: x.argmax(1), lambda x: x.argmax(1)),
    "small integers": (lambda x: (x * 9).to(torch.int8), lambda x: (x * 9).to(torch.int8)),
    "booleans": (lambda x: x > 0, lambda x: (x > 0).to(torch.uint8)),
    "float64": (lambda x: x.double() / 3, lambda x: x.double() / 3),
    "float16": (lambda x: x.half(), lambda x: x.half().float()),
    "bfloat16": (lambda x: x.bfloat16(), lambda x: x.bfloat16().float()),
    "every other pixel": (lambda x: x[..., ::2], lambda x: x[..., ::2]),
    "transposed": (lambda x: x.transpose(1, 3), lambda x: x.transpose(1, 3)),
    "quantized": (
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8).dequantize(),
    ),
    "a parameter for every image": (lambda x: TOKEN.expand(len(x), -1), lambda x: TOKEN.expand(len(x), -1)),
    "the input itself": (lambda x: x, lambda x: x),
    "not finite": (lambda x: torch.where(x > 1, x / 0, x), lambda x: torch.where(x > 1, x / 0, x)),
    "the same for every image": (torch.ones_like, torch.ones_like),
}


@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning", "ignore:.*quantized:DeprecationWarning")
@pytest.mark.parametrize("name", list(STORED))
def test_odd_tensors_are_stored_row_by_row(name: str, tmp_path: Path) -> None:
    function, rows = STORED[name]
    with extract(Given(function), tmp_path, ["inner"]) as acts:
        expected = rows(torch.stack(images())).detach().numpy()
        assert acts["inner"].dtype == expected.dtype
        assert np.array_equal(acts["inner"][:], expected, equal_nan=expected.dtype.kind == "f")


REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "the batch turned round": (lambda x: torch.cat([x, x.flip(0)]), "rows change with the other images"),
    "only turned round": (lambda x: x.flip(0), "rows change with the other images"),
    "the neighbour": (lambda x: torch.cat([x, x.roll(1, 0)]), "rows change with the other images"),
    "the mean of the batch": (lambda x: x - x.mean(0), "rows change with the other images"),
    "a little of the batch": (lambda x: x + 1e-4 * x.mean(0), "rows change with the other images"),
    "batch statistics": (
        lambda x: F.batch_norm(x, None, None, training=True),
        "rows change with the other images",
    ),
    "the number of images": (lambda x: x / len(x), "rows change with the other images"),
    "ranks": (lambda x: x.argsort(0), "rows change with the other images"),
    "chance": (lambda x: x + torch.randn_like(x), "or at random"),
    "no batch": (lambda x: x.mean(0), "does not follow the batch"),
    "one number": (lambda x: x.mean(), "does not follow the batch"),
    "all pairs": (lambda x: x.flatten(1) @ x.flatten(1).T, "does not follow the batch"),
    "some rows": (lambda x: x[x.flatten(1).std(1) > 1.2], "does not follow the batch"),
    "complex": (torch.fft.fft2, "complex"),
    "sparse": (lambda x: x.flatten(1).to_sparse(), "sparse"),
    "no values": (lambda x: x[:, :0], "no values"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_has_no_row_an_image_is_refused_by_name(name: str, tmp_path: Path) -> None:
    function, why = REFUSED[name]
    with pytest.raises(fm.LayerError, match=rf"layer 'inner' cannot be stored row by row: .*{why}"):
        extract(Given(function, after=lambda made: None), tmp_path, ["inner"])
    assert not (tmp_path / "x.h5").exists()


def test_a_pattern_leaves_out_what_is_refused_and_says_so(tmp_path: Path) -> None:
    notes = Notes()
    model = nn.Sequential(nn.Identity(), Function(lambda x: x - x.mean(0)), nn.Flatten())
    with extract(model, tmp_path, ["*"]) as acts:
        assert list(acts.layers) == ["0"]
    assert notes.notes == []


# ------------------------------------------------------------------------------ tensors overwritten later


def _by_numpy(x: Tensor) -> Tensor:
    x.numpy()[...] = 7
    return x


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "relu_": lambda x: x.relu_(),
    "a slice": lambda x: x[:, 1:].zero_(),
    "out=": lambda x: torch.add(x, 1, out=x),
    "copy_": lambda x: x.copy_(x.flip(1)),
    ".data": lambda x: x.data.mul_(3),
    "numpy": _by_numpy,
    "a view made before": lambda x: x.view(-1).add_(1),
    "index_put_": lambda x: x.index_put_((torch.tensor([0]),), torch.tensor(5.0)),
}


@pytest.mark.parametrize("name", list(WRITES))
def test_what_is_written_in_place_is_copied_before(name: str, tmp_path: Path) -> None:
    model = Given(lambda x: x * 2, WRITES[name]).eval()
    plain: list[Tensor] = []
    handle = model.inner.register_forward_hook(lambda module, args, output: plain.append(output))
    with torch.no_grad():
        model(torch.stack(images()))
    handle.remove()
    right = (torch.stack(images()) * 2).numpy()
    assert not np.array_equal(plain[0].numpy(), right), "this write must do harm where nothing is copied"
    with extract(model, tmp_path, ["inner", "inner=max", "end"]) as acts:
        assert acts["inner"].attrs["copied"]
        assert np.array_equal(acts["inner"][:], right)
        assert np.array_equal(acts["inner=max"][:], right.max((2, 3)))


def test_a_reducer_that_gives_a_view_is_copied_too(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Flatten(2), Function(lambda x: x.transpose(1, 2) * 2), nn.LayerNorm(3), nn.ReLU(True), nn.Flatten()
    )
    with extract(model, tmp_path, ["2=cls", "2", "4"]) as acts:
        assert acts["2"][:].min() < 0
        assert np.array_equal(acts["2=cls"][:], acts["2"][:, 0])


class Buffered(nn.Module):
    """Writes every result into memory of its own, which the next forward pass overwrites."""

    def __init__(self, by_size: bool) -> None:
        super().__init__()
        self.inner = Function(self._run)
        self.tail = nn.Flatten()
        self._memory: dict[int, Tensor] = {}
        self._by_size = by_size

    def _run(self, x: Tensor) -> Tensor:
        size = len(x) if self._by_size else 64
        memory = self._memory.setdefault(size, torch.empty(size, *x.shape[1:]))
        return torch.mul(x, 2, out=memory[: len(x)])

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.inner(x))


@pytest.mark.parametrize("by_size", [False, True])
def test_memory_that_the_next_pass_writes_is_copied(by_size: bool, tmp_path: Path) -> None:
    inputs = images(40)
    with extract(Buffered(by_size), tmp_path, ["inner", "tail"], inputs) as acts:
        assert acts["inner"].attrs["copied"]
        assert np.array_equal(acts["inner"][:], (torch.stack(inputs) * 2).numpy())
        assert np.array_equal(acts["tail"][:], (torch.stack(inputs) * 2).flatten(1).numpy())


def test_tensors_of_inference_mode_are_copied(tmp_path: Path) -> None:
    class Inference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True)

        @torch.inference_mode()
        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.conv(x))

    model = Inference()
    with extract(model, tmp_path, ["conv", "relu"]) as acts, torch.no_grad():
        first = model.conv(torch.stack(images(2)))
        assert np.array_equal(acts["conv"][:2], first.numpy())
        assert np.array_equal(acts["relu"][:2], first.relu().numpy())


def test_a_write_that_the_probe_did_not_see_stops_the_run(tmp_path: Path) -> None:
    def after(x: Tensor) -> Tensor:
        return x.zero_() if x.amax() > 100 else x * 1

    inputs = [*images(4), torch.full((3, 8, 8), 99.0)]
    with pytest.raises(fm.CaptureError, match="'inner' was overwritten in place after it was captured"):
        extract(Given(lambda x: x * 2, after), tmp_path, ["inner", "head"], inputs)
    assert not (tmp_path / "x.h5").exists()


# ------------------------------------------------------------------------------------- calls and early stop


class Loop(nn.Module):
    """Calls `step` twice, and once more for batches with an image that `more` picks."""

    def __init__(self, more: Callable[[Tensor], bool], last: nn.Module | None = None) -> None:
        super().__init__()
        self.step, self.more = nn.Hardtanh(-50, 50), more
        self.last = last or nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2 + self.more(x)):
            x = self.step(x * 1.5)
        return self.last(x)


@pytest.mark.parametrize("layers", [["step:1"], ["step:2"], ["step"], ["step@in"], ["last"], ["last", "step:1"]])
def test_a_module_that_is_called_more_often_than_in_the_probe_stops_the_run(layers: list[str], tmp_path: Path) -> None:
    model = Loop(lambda x: bool(x.amax() > 40))
    inputs = [*images(4), torch.full((3, 8, 8), 45.0)]
    if layers == ["last"]:  # called once, whatever happens before it
        with extract(model, tmp_path, layers, inputs) as acts:
            assert np.array_equal(acts["last"][4], np.full(3 * 8 * 8, 50.0, np.float32))
        return
    with pytest.raises(fm.CaptureError, match="'step' was called 3 times in a forward pass and 2 times in the probe"):
        extract(model, tmp_path, layers, inputs)
    assert not (tmp_path / "x.h5").exists()


def test_a_module_that_is_called_less_often_stops_the_run_though_the_wanted_number_is_there(tmp_path: Path) -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.tail = nn.Tanh(), nn.Flatten()

        def forward(self, x: Tensor) -> Tensor:
            if x.amax() < 40:
                x = self.act(x)
            return self.tail(self.act(x * 2))

    with extract(Skips(), tmp_path, ["act:1"]) as acts:
        assert np.array_equal(acts["act:1"][:], torch.stack(images()).tanh().numpy())
    with pytest.raises(fm.CaptureError, match=r"'act' was called 1 times .* and 2 times in the probe"):
        extract(Skips(), tmp_path, ["act:1"], [*images(2), torch.full((3, 8, 8), 45.0)], overwrite=True)


def test_a_varying_number_of_calls_is_refused_in_the_probe(tmp_path: Path) -> None:
    calls = iter([False, True] * 10)
    with pytest.raises(fm.LayerError, match=r"'step:1'.*varying number of times"):
        extract(Loop(lambda x: next(calls)), tmp_path, ["step:1"])


class Swallows(nn.Module):
    """Runs a block of two inside a `try` that catches what `kind` says, and falls back on the first alone."""

    def __init__(self, kind: type[BaseException], answer: type[Exception] | None = None) -> None:
        super().__init__()
        self.first, self.second, self.tail = nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1), nn.Flatten()
        self.kind, self.answer = kind, answer
        self.finished: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        try:
            y = self.second(self.first(x * 1))
        except self.kind as error:
            if self.answer is not None:
                raise self.answer("the block failed") from error
            y = self.first(x * 2).mul_(0)
        y = self.tail(y)
        self.finished.append(len(x))
        return y


@pytest.mark.parametrize(("kind", "answer"), [(Exception, None), (BaseException, None), (BaseException, RuntimeError)])
def test_an_early_stop_that_a_model_swallows(
    kind: type[BaseException], answer: type[Exception] | None, tmp_path: Path
) -> None:
    finished = []
    for count in (2, 8):
        model = Swallows(kind, answer)
        with extract(model, tmp_path, ["first"], images(count), overwrite=True) as acts:
            assert np.array_equal(acts["first"][:], torch.stack(images(count)).relu().numpy())
        finished.append(len(model.finished))
    assert (finished[0] == finished[1]) == (kind is Exception), "a swallowed stop is not tried again"


def test_a_pass_ends_after_the_last_wanted_call(tmp_path: Path) -> None:
    ran: list[int] = []
    model = nn.Sequential(nn.ReLU(), nn.Flatten(), Function(lambda x: ran.append(len(x)) or x), nn.Identity())
    passes = []
    for count in (2, 8):
        extract(model, tmp_path, ["0", "0@in"], images(count), overwrite=True).close()
        passes.append(len(ran))
    assert passes[1] == 2 * passes[0], "only what comes before a run goes further, however many images it has"


def test_calls_of_a_module_used_again(tmp_path: Path) -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu, self.conv = nn.ReLU(inplace=True), nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.conv(x))
            x = self.relu(self.conv(x) + x)
            return self.relu(self.conv(x)).sum((2, 3))

    model = Again()
    with extract(model, tmp_path, ["relu", "conv:2", "relu:2@in"]) as acts:
        assert list(acts.layers) == ["relu:1", "conv:2", "relu:2@in", "relu:2", "relu:3"]
        with torch.no_grad():
            one = model.conv(torch.stack(images(2))).relu()
            added = model.conv(one) + one
            assert np.array_equal(acts["relu:1"][:2], one.numpy())
            assert np.array_equal(acts["conv:2"][:2], model.conv(one).numpy())
            assert np.array_equal(acts["relu:2@in"][:2], added.numpy())
            assert np.array_equal(acts["relu:3"][:2], model.conv(added.relu()).relu().numpy())


def test_a_module_that_calls_itself(tmp_path: Path) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner: nn.Module = Function(lambda x, depth=0: self.inner(x + 1, depth=1) * 2 if not depth else x)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    x = torch.stack(images()).numpy()
    with extract(Nested(), tmp_path, ["inner", "inner@in[0]"]) as acts:
        assert list(acts.layers) == ["inner:1@in[0]", "inner:2@in[0]", "inner:1", "inner:2"]
        assert np.array_equal(acts["inner:1@in[0]"][:], x)
        assert np.array_equal(acts["inner:2@in[0]"][:], x + 1)
        assert np.array_equal(acts["inner:1"][:], x + 1), "the inner call ends first"
        assert np.array_equal(acts["inner:2"][:], (x + 1) * 2)


def test_a_shape_that_depends_on_the_image_never_shifts_a_row(tmp_path: Path) -> None:
    def cropped(x: Tensor) -> Tensor:
        return x[..., :4] if x.amax() > 40 else x

    inputs = [*images(4), torch.full((3, 8, 8), 45.0)]
    with pytest.raises(fm.CaptureError, match=r"'inner': one image gives \(3, 8, 4\), expected \(3, 8, 8\)"):
        extract(Given(cropped), tmp_path, ["inner"], inputs)
    with pytest.raises(fm.CaptureError, match="'inner': the model gives no plain tensor here"):
        extract(Given(lambda x: None if x.amax() > 40 else x), tmp_path, ["inner"], inputs, overwrite=True)
    rows = Given(lambda x: x[1:] if x.amax() > 40 else x)
    with pytest.raises(fm.CaptureError, match="'inner': axis 0 is 1 long, expected 2 x 1"):
        extract(rows, tmp_path, ["inner"], inputs, overwrite=True)
    assert not (tmp_path / "x.h5").exists()


# ------------------------------------------------------------------------------------------------- members


@dataclass
class Pair:
    maps: Tensor
    sums: Tensor | None


Fields = namedtuple("Fields", ["maps", "sums"])

CONTAINERS: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "tuple": (lambda a, b: (a, b), "[1]"),
    "list": (lambda a, b: [a, b], "[1]"),
    "dict": (lambda a, b: {"maps": a, "sums": b, "more": 3}, "[sums]"),
    "dict of odd keys": (lambda a, b: {0: a, 1: b}, "[1]"),
    "dataclass": (Pair, "[sums]"),
    "namedtuple": (Fields, "[sums]"),
    "namedtuple by number": (Fields, "[1]"),
    "nested": (lambda a, b: {"x": (None, [a, {"y": b}])}, "[x][1][1][y]"),
}


@pytest.mark.parametrize("name", list(CONTAINERS))
def test_members_of_outputs(name: str, tmp_path: Path) -> None:
    make, member = CONTAINERS[name]
    x = torch.stack(images())
    model = Given(lambda x: make(x * 2, x.sum((2, 3))))
    with extract(model, tmp_path, [f"inner{member}"]) as acts:
        (layer,) = acts.layers
        assert np.array_equal(acts[layer][:], x.sum((2, 3)).numpy())
    with extract(model, tmp_path, ["inner"], overwrite=True) as acts:
        assert len(acts.layers) == 2
        assert np.array_equal(acts[acts.layers[0]][:], (x * 2).numpy())


def test_a_member_that_is_not_there_says_what_is(tmp_path: Path) -> None:
    model = Given(lambda x: {"maps": x, "sums": x.sum((2, 3))})
    with pytest.raises(fm.LayerError, match=r"no such tensor in the output of 'inner'; it has '\[maps\]', '\[sums\]'"):
        extract(model, tmp_path, ["inner[map]"])
    with pytest.raises(fm.LayerError, match="no such tensor in the output of 'inner'; it has 'one tensor'"):
        extract(Given(lambda x: x), tmp_path, ["inner[0]"])
    with pytest.raises(fm.LayerError, match="no such tensor in the output of 'inner'; it has no tensor at all"):
        extract(Given(lambda x: "x"), tmp_path, ["inner"])


def test_inputs_by_position_and_by_name(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = Function(lambda x, *, mask: x * mask)

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(x, mask=x > 0)

    x = torch.stack(images()).numpy()
    with extract(Two(), tmp_path, ["mix@in[mask]", "mix@in[0]", "mix"]) as acts:
        assert sorted(acts.layers) == ["mix", "mix@in[0]", "mix@in[mask]"]
        assert np.array_equal(acts["mix@in[mask]"][:], x > 0)
        assert np.array_equal(acts["mix@in[0]"][:], x)
        assert np.array_equal(acts["mix"][:], x * (x > 0))


# --------------------------------------------------------------------------------- the caller's own module


class Own(nn.Module):
    """A module as a user has it: mixed modes, tied weights, odd strides, hooks, a frozen part."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.conv.weight.data = self.conv.weight.data.to(memory_format=torch.channels_last)
        self.one.bias.requires_grad_(False)
        self.raises: Callable[[Tensor], None] = lambda x: None
        self.heard: list[str] = []
        self.conv.register_forward_hook(lambda module, args, output: output + 1)
        self.bn.register_forward_pre_hook(lambda module, args: self.heard.append("bn"))
        self.train()
        self.bn.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.relu.train(not self.relu.training)
        made = self.bn(self.conv(x))
        self.raises(x)
        x = self.relu(made).mean((2, 3))
        return self.two(self.one(x))


def _state(model: nn.Module) -> dict[str, Any]:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {
        "tensors": [
            (name, id(t), t.data_ptr(), t.stride(), t.dtype, t.device, t.requires_grad, t.grad, t._version, t.tolist())
            for name, t in tensors
        ],
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {
            name: [list(hooks.items()) for key, hooks in vars(module).items() if "hook" in key and hooks is not None]
            for name, module in model.named_modules()
            if hasattr(module, "_forward_hooks")
        },
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "random": (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()),
        "torch": (
            torch.is_grad_enabled(),
            torch.get_num_threads(),
            torch.get_float32_matmul_precision(),
            torch.backends.cudnn.allow_tf32,
            torch.is_autocast_enabled("cpu"),
        ),
    }


def _raise(error: BaseException, after: int) -> Callable[[Tensor], None]:
    calls = iter(range(10**6))

    def raises(x: Tensor) -> None:
        if next(calls) >= after:
            raise error

    return raises


class Interrupted(list[Tensor]):
    def __getitem__(self, row: Any) -> Any:
        if row == 3:
            raise MemoryError("no memory for this picture")
        return super().__getitem__(row)


@pytest.mark.parametrize("options", [{"precision": "bf16", "memory_format": "channels_last"}, {"precision": "fp32"}])
@pytest.mark.parametrize("ending", ["done", "survey", "probe", "run", "interrupt", "image", "source", "selector"])
def test_the_callers_module_is_as_it_was_whatever_happens(ending: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, inputs = Own(), images(6)
    raising = {
        "survey": _raise(ValueError("no"), 0),
        "probe": _raise(ValueError("no"), 2),
        "run": _raise(ValueError("no"), 9),
        "interrupt": _raise(KeyboardInterrupt(), 9),
        "image": lambda x: _raise(ValueError("no"), 0)(x) if x.amax() > 40 else None,
    }
    model.raises = raising.get(ending, model.raises)
    if ending == "image":
        inputs[2] = torch.full((3, 8, 8), 200.0)
    if ending == "source":
        inputs = Interrupted(inputs)
    layers = ["nothing"] if ending == "selector" else ["conv", "bn", "relu", "two"]
    chosen = {"batch_size": 2, "num_workers": 2, "device": "cpu", "progress": Notes(), **options}
    before = _state(model)
    failed: list[int] | None = None
    with (
        contextlib.suppress(KeyboardInterrupt, fm.FmextractError),
        fm.extract(inputs, model, tmp_path / "x.h5", layers=layers, **chosen) as acts,
    ):
        failed = np.flatnonzero(acts.status).tolist()
    assert failed == {"done": [], "image": [2], "source": [3]}.get(ending)
    after = _state(model)
    for what, value in before.items():
        assert after[what] == value, what
    assert model.heard, "the user's own hooks ran"


def test_hooks_of_the_user_that_change_an_output_come_first(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten())
    model[0].register_forward_hook(lambda module, args, output: output * 0 + 4)
    with extract(model, tmp_path, ["0"]) as acts:
        assert np.array_equal(acts["0"][:], np.full((5, 4, 8, 8), 4, np.float32))


def test_a_model_that_writes_into_its_input(tmp_path: Path) -> None:
    def normalised(x: Tensor) -> Tensor:
        return x.sub_(1).div_(2)

    def fails(x: Tensor) -> Tensor:
        if x.amax() > 20:
            raise ValueError("too bright")
        return x

    inputs = [*images(4), torch.full((3, 8, 8), 99.0), *images(1)]
    model = nn.Sequential(Function(normalised), Function(fails), nn.Flatten())
    with extract(model, tmp_path, ["0", "2"], inputs) as acts:
        assert acts.status.tolist() == [0, 0, 0, 0, 3, 0]
        right = ((torch.stack(inputs) - 1) / 2).numpy()
        right[4] = np.nan
        assert np.array_equal(acts["0"][:], right, equal_nan=True)
    assert torch.equal(inputs[0], images(1)[0]), "the caller's images are not touched"


@pytest.mark.parametrize("images_shape", [(3, 4, 8, 8), (1, 8, 8), (5, 8, 8)])
def test_inputs_of_other_shapes(images_shape: tuple[int, ...], tmp_path: Path) -> None:
    conv = (nn.Conv3d if len(images_shape) == 4 else nn.Conv2d)(images_shape[0], 2, 3)
    inputs = images(3, images_shape)
    with extract(nn.Sequential(conv, nn.Flatten()), tmp_path, ["0"], inputs) as acts, torch.no_grad():
        assert np.array_equal(acts["0"][:2], conv(torch.stack(inputs[:2])).numpy())


def _outputs(model: nn.Module, inputs: Sequence[Tensor]) -> Iterator[Tensor]:
    with torch.no_grad():
        for i in range(0, len(inputs), 2):
            yield from model(torch.stack([*inputs[i : i + 2], torch.zeros_like(inputs[0])][:2]))


def test_a_short_last_batch_is_padded_with_black(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 3)).eval()
    inputs = images(7)
    with extract(model, tmp_path, ["."], inputs) as acts:
        assert np.array_equal(acts["(model)"][:], torch.stack(list(_outputs(model, inputs))[:7]).numpy())


def test_detection_models_get_their_list_of_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    build = partial(torchvision.models.detection.ssdlite320_mobilenet_v3_large, weights=None, weights_backbone=None)
    model = build(num_classes=3, width_mult=0.25).eval()
    inputs = [image.sigmoid() for image in images(2, (3, 64, 64))]
    seen = sweep.reference(model, torch.stack(inputs))
    with extract(model, tmp_path, ["backbone", "head", "conv#0"], inputs) as acts:
        assert "head[cls_logits]" in acts.layers
        expected = {f"head[{key}]": value for key, value in seen["head"][0].items()}
        expected |= {f"backbone[{key}]": value for key, value in seen["backbone"][0].items()}
        expected |= {acts.layers[0]: seen[acts.layers[0]][0]}
        for name in acts.layers:
            assert np.array_equal(acts[name][:], expected[name].numpy()), name
    with pytest.raises(fm.LayerError, match=r"anchor_generator\[0\]' cannot be stored row by row"):
        extract(model, tmp_path, ["anchor_generator"], inputs, overwrite=True)
