"""Receptive fields of every torchvision CNN family against the gradient of one cell.

A network is made linear (activations removed, maximum pooling made average pooling, squeeze-excitation left out, norms
over channels left out, positive weights): then the pixels with a gradient are just those that the cell can see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import SqueezeExcitation

from fmextract.capture import probe, resolve, survey
from fmextract.capture.atoms import image_axes
from fmextract.capture.receptive_fields import FieldTracer, trace_fields
from fmextract.records import Field


@dataclass(frozen=True)
class Case:
    """`sizes` are those of the fields of some layers, in pixels, the last layer last.

    `length` is that of an image to see the largest in, `width` the least that the network takes in the other direction.
    """

    model: str
    sizes: dict[str, int]
    length: int
    width: int = 32
    has_global: bool = False


CASES = [
    Case("alexnet", {"features.12": 195}, 320, 64),
    Case("vgg16", {"features.30": 212}, 320),
    Case("resnet18", {"layer4": 435}, 520),
    Case("resnet50", {"layer2": 91, "layer3": 267, "layer4": 427}, 520),
    Case("resnext50_32x4d", {"layer3": 267}, 352),
    Case("wide_resnet50_2", {"layer2": 91}, 160),
    Case("densenet121", {"features.denseblock2": 255}, 320),
    Case("mobilenet_v2", {"features.10": 171, "features.18": 491}, 576),
    Case("mobilenet_v3_small", {"features.12": 639}, 736, has_global=True),
    Case("mobilenet_v3_large", {"features.9": 179}, 256, has_global=True),
    Case("efficientnet_b0", {"features.5": 339}, 416, has_global=True),
    Case("efficientnet_v2_s", {"features.3": 95}, 160),
    Case("googlenet", {"inception4d": 203}, 288),
    Case("inception_v3", {"Mixed_5d": 127, "Mixed_6b": 351}, 480, 96),
    Case("squeezenet1_0", {"features.12": 155}, 256),
    Case("squeezenet1_1", {"features.12": 207}, 256),
    Case("shufflenet_v2_x0_5", {"stage3": 303}, 384),
    Case("mnasnet0_5", {"layers.10": 267}, 352),
    Case("regnet_x_400mf", {"trunk_output.block2": 31}, 128),
    Case("regnet_y_400mf", {"trunk_output.block3": 223}, 320, has_global=True),
    Case("convnext_tiny", {"features.3": 224}, 320),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small operations: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(name: str) -> nn.Module:
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None, **options).eval()


class Enough(BaseException):
    """The rest of a network is of no interest."""


def outputs(model: nn.Module, image: Tensor, layers: Sequence[str], take: Callable[[str, Tensor], None]) -> None:
    """Call `take(layer, output)` as the layers end, and stop after the last."""

    def hook(layer: str) -> Callable[..., None]:
        def ended(module: nn.Module, args: Any, output: Tensor) -> None:
            take(layer, output)
            if layer == layers[-1]:
                raise Enough

        return ended

    handles = [model.get_submodule(layer).register_forward_hook(hook(layer)) for layer in layers]
    with suppress(Enough):
        model(image)
    for handle in handles:
        handle.remove()


def traced(model: nn.Module, layers: Sequence[str], side: int = 96) -> dict[str, Field]:
    """The fields of `layers`, (…, channel, y, x); they are the same whatever the size of the image."""
    found: dict[str, Field | None] = {}
    image = torch.rand(2, 3, side, side)
    names = ("batch", "channel", "y", "x")
    with torch.no_grad(), FieldTracer() as tracer:
        tracer.seed(image, image_axes(image.shape))
        outputs(model, image, layers, lambda layer, out: found.update({layer: tracer.field(out, names)}))
    fields = {layer: field for layer, field in found.items() if field is not None}
    assert fields.keys() == set(layers)
    return fields


Reached = tuple[list[tuple[int, int]], tuple[int, int]]


def reached(model: nn.Module, layers: Sequence[str], height: int, width: int) -> dict[str, Reached]:
    """For each layer, the first and the last + 1 pixel with a gradient along y and x, of the middle cell; that cell."""
    image = torch.rand(1, 3, height, width, requires_grad=True)
    found: dict[str, Reached] = {}

    def take(layer: str, output: Tensor) -> None:
        cell = (output.shape[-2] // 2, output.shape[-1] // 2)
        (gradient,) = torch.autograd.grad(output[0, :, cell[0], cell[1]].sum(), image, retain_graph=True)
        seen = gradient[0].abs().amax(0)
        rows, columns = (seen.amax(axis).nonzero().flatten().tolist() for axis in (1, 0))
        found[layer] = ([(rows[0], rows[-1] + 1), (columns[0], columns[-1] + 1)], cell)

    outputs(model, image * 1, layers, take)
    return found


def interval(field: Field, cell: tuple[int, int], axis: int) -> tuple[float, float]:
    centre = field.offset[axis] + cell[axis] * field.stride[axis]
    return centre - field.size[axis] / 2, centre + field.size[axis] / 2


def make_linear(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def average(
        x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, **kw: Any
    ) -> Tensor:
        return functional.avg_pool2d(x, kernel_size, stride, padding, kw.get("ceil_mode", False))

    monkeypatch.setattr(functional, "max_pool2d", average)
    for name in ("relu", "hardtanh", "relu6", "silu", "hardswish", "gelu", "layer_norm"):
        monkeypatch.setattr(functional, name, lambda x, *args, **kwargs: x)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, SqueezeExcitation):
                setattr(module, name, nn.Identity())
    with torch.no_grad():
        for weights in model.parameters():
            # Twice the average: what goes through the edges alone shrinks with depth, and must not vanish.
            weights.fill_(2 / weights[0].numel() if weights.dim() > 1 else 1.0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.model)
def test_field_is_what_the_gradient_of_a_linear_network_reaches(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model, layers = build(case.model), list(case.sizes)
    fields = traced(model, layers)
    assert {layer: field.size for layer, field in fields.items()} == {n: (s, s) for n, s in case.sizes.items()}
    for field in fields.values():
        assert (field.bound, field.whole, field.has_global) == (False, False, case.has_global)
    make_linear(model, monkeypatch)
    # Long and narrow both ways: as telling as a square, and a fraction of the work.
    for axis, (height, width) in enumerate([(case.length, case.width), (case.width, case.length)]):
        for layer, (edges, cell) in reached(model, layers, height, width).items():
            assert edges[axis] == interval(fields[layer], cell, axis)


@pytest.mark.parametrize(
    ("name", "layer", "side"),
    [("resnet18", "layer2", 128), ("googlenet", "inception3b", 96), ("convnext_tiny", "features.1", 128)],
)
def test_field_bounds_the_gradient_of_the_network_as_it_is(name: str, layer: str, side: int) -> None:
    model = build(name)
    field = traced(model, [layer])[layer]
    edges, cell = reached(model, [layer], side, side)[layer]
    for axis in (0, 1):
        low, high = interval(field, cell, axis)
        assert low <= edges[axis][0]
        assert edges[axis][1] <= high
        assert edges[axis][1] - edges[axis][0] > field.size[axis] / 2


def all_fields(model: nn.Module, wanted: list[str], side: int) -> list[Field | None]:
    """As a run has them: by probing the taps."""
    batch = torch.rand(2, 3, side, side)
    found = resolve.resolve(wanted, survey.survey(model, model, batch))
    probed, refused = probe.probe(model, model, found, (3, side, side), torch.device("cpu"))
    assert not refused
    return trace_fields(model, model, probed, batch)


@pytest.mark.parametrize(
    ("name", "layer", "side"),
    [("swin_t", "features.3", 112), ("swin_v2_t", "features.3", 128), ("maxvit_t", "blocks.1", 224)],
)
def test_windowed_attention_is_bounded_by_the_whole_image(name: str, layer: str, side: int) -> None:
    (field,) = all_fields(build(name), [layer], side)
    assert field is not None
    assert (field.size, field.whole, field.bound) == ((side, side), True, True)
    assert field.stride == (8, 8)


def test_tokens_see_the_whole_image_from_the_first_attention_on() -> None:
    wanted = ["conv_proj", "encoder.dropout", "encoder.layers.encoder_layer_0", "heads"]
    patches, before, attended, head = all_fields(build("vit_b_32"), wanted, 224)
    assert patches == Field((32, 32), (32, 32), (16, 16))
    assert before is None  # a patch each, but no axes y and x to say which
    assert attended == head == Field((224, 224), (224, 224), (112, 112), whole=True)


def test_field_of_a_tensor_that_a_join_overwrites_is_that_before_the_join() -> None:
    norm, block = all_fields(build("resnet50"), ["layer1.1.bn3", "layer1.1"], 64)
    assert norm is not None
    assert norm == block  # the shortcut sees less
    shortcut, joined = all_fields(build("resnet50"), ["layer2.0.downsample.1", "layer2.0"], 64)
    assert shortcut is not None
    assert joined is not None
    assert shortcut.size < joined.size
