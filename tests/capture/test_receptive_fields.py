"""Receptive fields of small networks against autograd, boxes against torchvision's, effective receptive fields."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from fmextract.capture import probe, resolve, survey, taps
from fmextract.capture.atoms import image_axes
from fmextract.capture.effective_fields import _square, effective_sizes
from fmextract.capture.receptive_fields import FieldTracer, trace_fields
from fmextract.capture.spans import Span
from fmextract.common.boxes import cell_box, photo_box
from fmextract.records import Field, Preprocess

MAP = ("batch", "channel", "y", "x")
Network = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small operations: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def field_of(network: Network, size: tuple[int, int] = (48, 40), names: tuple[str, ...] = MAP) -> Field | None:
    image = torch.rand(2, 3, *size, dtype=torch.float64)
    with torch.no_grad(), FieldTracer() as tracer:
        tracer.seed(image, image_axes(image.shape))
        return tracer.field(network(image), names)


def reached(network: Network, size: tuple[int, int], cell: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The first and the last + 1 pixel, along y and x, with a gradient of a cell of (batch, channel, y, x)."""
    image = torch.rand(1, 3, *size, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(image)[0, :, cell[0], cell[1]].sum(), image)
    seen = gradient[0].abs().amax(0)
    if not seen.any():
        return (0, 0), (0, 0)
    rows, columns = (seen.amax(axis).nonzero().flatten().tolist() for axis in (1, 0))
    return (rows[0], rows[-1] + 1), (columns[0], columns[-1] + 1)


def box_of(field: Field, cell: tuple[int, int]) -> tuple[tuple[float, float], tuple[float, float]]:
    y0, x0, y1, x1 = cell_box(field, cell)
    return (y0, y1), (x0, x1)


def positive(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for weights in module.parameters():
            weights.fill_(1 / max(1, weights[0].numel()) if weights.dim() > 1 else 1.0)
    return module.double().eval()


# ------------------------------------------------------------------------------------- random networks


class Residual(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Branches(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.last = nn.Conv2d(3 * len(branches), 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.last(torch.cat([branch(x) for branch in self.branches], 1))
        return made


class Function(nn.Module):
    def __init__(self, function: Network) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
odd = st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3, 5]))
paddings = st.tuples(st.integers(0, 2), st.integers(0, 2))


def same(kernel: tuple[int, int], dilation: int) -> nn.Conv2d:
    padding = tuple(dilation * (k - 1) // 2 for k in kernel)
    return nn.Conv2d(3, 3, kernel, padding=padding, dilation=dilation)  # type: ignore[arg-type]


def even(x: Tensor) -> Tensor:
    return x[:, :, : x.shape[2] // 2 * 2, : x.shape[3] // 2 * 2]


EXACT = st.one_of(
    st.builds(
        lambda k, s, p, d: nn.Conv2d(3, 3, k, s, p, d),
        pairs,
        st.sampled_from([(1, 1), (2, 1), (1, 2)]),
        paddings,
        pairs,
    ),
    st.builds(lambda k, d: nn.Conv2d(3, 3, k, dilation=d, groups=3), pairs, st.integers(1, 2)),
    st.builds(
        lambda k, s, c: nn.AvgPool2d(k, s, padding=0, ceil_mode=c), pairs, st.sampled_from([1, 2]), st.booleans()
    ),
    st.builds(lambda k, d: Residual(same(k, d)), odd, st.integers(1, 2)),
    st.builds(lambda k, d: Residual(nn.Sequential(same(k, 1), nn.BatchNorm2d(3), same(k, d))), odd, st.integers(1, 2)),
    st.builds(lambda a, b: Branches(same(a, 1), nn.Sequential(same(b, 2), nn.Identity())), odd, odd),
    st.builds(lambda k: nn.ConvTranspose2d(3, 3, k), pairs),
    st.builds(nn.ZeroPad2d, st.integers(0, 3)),
    st.builds(lambda a, b: Function(lambda x: x[:, :, a:, b:]), st.integers(0, 2), st.integers(0, 2)),
    st.just(Function(lambda x: x[:, :, 1::2, ::2])),
    st.just(nn.Sequential(Function(even), nn.PixelUnshuffle(2), nn.Conv2d(12, 3, 1))),
    st.just(Function(lambda x: x.view(len(x), 3, -1, x.shape[3]).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))),
)
BOUNDED = st.one_of(
    st.builds(
        lambda k, s, p: nn.ConvTranspose2d(3, 3, k, s, (min(p, k[0] - 1), min(p, k[1] - 1)), output_padding=s - 1),
        st.tuples(st.integers(2, 4), st.integers(2, 4)), st.integers(2, 3), st.integers(0, 1),
    ),
    st.builds(lambda d: nn.ConvTranspose2d(3, 3, 3, 2, dilation=d), st.integers(1, 2)),
    st.just(nn.Upsample(scale_factor=2)),
    st.just(nn.Upsample(scale_factor=1.5)),
    st.builds(lambda a: nn.Upsample(scale_factor=2, mode="bilinear", align_corners=a), st.booleans()),
    st.builds(lambda n: nn.Upsample(size=(n, n + 3), mode="bilinear"), st.integers(17, 60)),
    st.builds(lambda n: nn.Upsample(size=(n, n + 1), mode="nearest-exact"), st.integers(9, 40)),
    st.just(nn.Upsample(scale_factor=2, mode="bicubic")),
    st.builds(
        lambda n: Function(lambda x: functional.interpolate(x, (n, n), mode="bilinear", antialias=True)),
        st.integers(9, 30),
    ),
    st.builds(lambda n: nn.AdaptiveAvgPool2d((n, n + 2)), st.integers(5, 11)),
    st.just(nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.PixelShuffle(2))),
    st.just(Branches(nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), nn.Upsample((23, 29))), nn.Upsample((23, 29)))),
)  # fmt: skip


def middle(network: Network, size: tuple[int, int]) -> list[tuple[int, int]]:
    """The nine cells in the middle of a map, or what there is of them."""
    with torch.no_grad():
        height, width = network(torch.rand(1, 3, *size, dtype=torch.float64)).shape[-2:]
    cells = [(height // 2 + i, width // 2 + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    return [(y, x) for y, x in cells if 0 <= y < height and 0 <= x < width]


def runs_at(network: Network, size: tuple[int, int]) -> bool:
    try:
        with torch.no_grad():
            network(torch.rand(1, 3, *size, dtype=torch.float64))
    except RuntimeError:
        return False
    return True


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(EXACT, min_size=1, max_size=3))
def test_field_of_a_random_network_is_what_the_gradient_reaches(blocks: list[nn.Module]) -> None:
    network, size = positive(nn.Sequential(*blocks)), (176, 170)  # larger than any of these fields
    field = field_of(network, size)
    assert field is not None
    assert (field.bound, field.whole, field.has_global) == (False, False, False)
    for cell in middle(network, size)[::4]:
        assert reached(network, size, cell) == box_of(field, cell)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(EXACT, max_size=1), BOUNDED, st.lists(EXACT, max_size=1))
def test_uneven_windows_give_a_bound(before: list[nn.Module], block: nn.Module, after: list[nn.Module]) -> None:
    network, size = positive(nn.Sequential(*before, block, *after)), (46, 58)
    assume(runs_at(network, size))  # a small map may be smaller than the next kernel
    field = field_of(network, size)
    assert field is not None
    assert not field.whole
    widest = [0, 0]
    for cell in middle(network, size):
        for axis, (seen, box) in enumerate(zip(reached(network, size, cell), box_of(field, cell), strict=True)):
            if seen == (0, 0):
                continue
            assert box[0] - 1e-6 <= seen[0]
            assert seen[1] <= box[1] + 1e-6
            widest[axis] = max(widest[axis], seen[1] - seen[0])
    # Not a bound that holds because it is too wide: neighbours differ by a few cells at most (a dilated transposed
    # convolution by the most, since its phases see quite different cells).
    assert all(field.size[axis] <= 3 * widest[axis] + 6 * max(field.stride) for axis in (0, 1))


UNEVEN = [
    nn.AdaptiveAvgPool2d((5, 11)),
    nn.AdaptiveAvgPool2d((7, 25)),
    nn.Upsample(size=(24, 25), mode="nearest-exact"),  # 12.5 * 58 / 25 is 29, or nearly so
    nn.Upsample(size=(24, 25)),
    nn.Upsample(size=(92, 116), mode="bilinear"),
    nn.Upsample(size=(31, 90), mode="bicubic", align_corners=True),
    Function(lambda x: functional.interpolate(x, (11, 13), mode="bilinear", antialias=True)),
    nn.ConvTranspose2d(3, 3, 3, 2),
    nn.ConvTranspose2d(3, 3, 4, 3, padding=1, dilation=2),
    nn.Sequential(nn.Conv2d(3, 12, 1), nn.PixelShuffle(2)),
]


@pytest.mark.parametrize("module", UNEVEN)
def test_every_cell_lies_within_the_bound(module: nn.Module) -> None:
    network, size = positive(nn.Sequential(module)), (46, 58)
    field = field_of(network, size)
    assert field is not None
    assert field.bound
    height, width = network(torch.rand(1, 3, *size).double()).shape[-2:]
    for i in range(max(height, width)):
        cell = (min(i, height - 1), min(i, width - 1))
        for seen, box in zip(reached(network, size, cell), box_of(field, cell), strict=True):
            assert seen == (0, 0) or box[0] - 1e-6 <= seen[0] < seen[1] <= box[1] + 1e-6


@pytest.mark.parametrize(
    ("network", "field"),
    [
        (lambda x: functional.adaptive_avg_pool2d(x, (12, 8)), Field((4, 5), (4, 5), (2, 2.5))),
        (lambda x: functional.interpolate(x, scale_factor=0.5), Field((1, 1), (2, 2), (0.5, 0.5))),
        (lambda x: functional.interpolate(x, scale_factor=0.25, mode="bilinear"), Field((2, 2), (4, 4), (2, 2))),
        (
            lambda x: functional.conv_transpose2d(x, torch.ones(3, 3, 3, 3).double()),
            Field((3, 3), (1, 1), (-0.5, -0.5)),
        ),
        (lambda x: functional.avg_pool2d(x, (48, 40)), Field((48, 40), (48, 40), (24, 20))),
    ],
)
def test_even_windows_are_no_bound(network: Network, field: Field) -> None:
    assert field_of(network) == field


spans = st.builds(
    lambda low, size, stride: Span(low, low + size, stride, 9),
    st.floats(-20, 20), st.floats(1, 30), st.sampled_from([1.0, 1.5, 2.0, 3.0]),
)  # fmt: skip


@given(spans, spans)
def test_a_join_holds_both_branches(one: Span, other: Span) -> None:
    joined = one.joined(other)
    for i in range(9):
        for span in (one, other):
            assert joined.low + i * joined.stride <= span.low + i * span.stride + 1e-9
            assert joined.high + i * joined.stride >= span.high + i * span.stride - 1e-9
    assert joined.bound == (one.stride != other.stride)
    # No wider than it has to be: at one end or the other an edge is met.
    assert any(abs(joined.low - s.low + i * (joined.stride - s.stride)) < 1e-9 for i in (0, 8) for s in (one, other))
    assert any(abs(joined.high - s.high + i * (joined.stride - s.stride)) < 1e-9 for i in (0, 8) for s in (one, other))


# ------------------------------------------------------------------------------- one operation at a time

CONV = Field((3, 3), (1, 1), (0.5, 0.5))


def conv(x: Tensor, stride: int = 1, padding: int = 1) -> Tensor:
    return functional.conv2d(x, torch.ones(3, x.shape[1], 3, 3, dtype=x.dtype), stride=stride, padding=padding)


def channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


@pytest.mark.parametrize(
    "layer",
    [
        lambda x: x * torch.sigmoid(functional.adaptive_avg_pool2d(x, 1)),
        lambda x: x * x.mean((2, 3), keepdim=True),
        lambda x: x + x.amax((2, 3))[:, :, None, None].expand(x.shape),
        lambda x: torch.cat([x, functional.interpolate(functional.adaptive_avg_pool2d(x, 1), x.shape[2:])], 1),
        lambda x: functional.group_norm(x, 1),
        functional.instance_norm,
        lambda x: functional.layer_norm(x, x.shape[1:]),
        lambda x: x / x.norm(dim=(2, 3), keepdim=True),
        lambda x: functional.batch_norm(x, None, None, training=True),
    ],
)
def test_a_global_side_branch_is_left_out_and_flagged(layer: Network) -> None:
    assert field_of(lambda x: layer(conv(x))) == Field((3, 3), (1, 1), (0.5, 0.5), has_global=True)


@pytest.mark.parametrize(
    "layer",
    [
        lambda x: functional.layer_norm(channels_last(x), (3,)).permute(0, 3, 1, 2),
        lambda x: x.softmax(1),
        lambda x: functional.batch_norm(x, torch.zeros(3).double(), torch.ones(3).double()),
        lambda x: x * torch.rand(3, 1, 1).double() + torch.rand(x.shape[2:]).double(),
        lambda x: functional.linear(channels_last(x), torch.ones(5, 3).double()).permute(0, 3, 1, 2),
        lambda x: x.mean(1, keepdim=True),
        lambda x: torch.stack([x, x], 1).flatten(1, 2),
        lambda x: functional.hardswish(functional.gelu(functional.silu(x))),
        lambda x: x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).view(x.shape),
        lambda x: x.view(2, 3, 6, 8, 5, 8).permute(0, 2, 4, 1, 3, 5).permute(0, 3, 1, 4, 2, 5).reshape(x.shape),
        lambda x: x.clone().relu_().mul_(2),
    ],
)
def test_what_acts_on_each_position_alone_leaves_the_field(layer: Network) -> None:
    assert field_of(lambda x: layer(conv(x))) == CONV


def attend(x: Tensor) -> Tensor:
    """Self-attention over the axis before the last."""
    return functional.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize(
    "layer",
    [
        lambda x: attend(x.flatten(2).transpose(1, 2)).transpose(1, 2).view(x.shape),
        lambda x: ((t := x.flatten(2)).transpose(1, 2) @ t).softmax(-1).matmul(t.transpose(1, 2)).mT.reshape(x.shape),
        lambda x: x + functional.linear(x.flatten(2), torch.ones(1920, 1920).double()).view(x.shape),
    ],
)
def test_what_mixes_positions_sees_the_whole_image(layer: Network) -> None:
    field = field_of(lambda x: layer(conv(x, stride=1)))
    assert field == Field((48, 40), (1, 1), (0.5, 0.5), whole=True)


@pytest.mark.parametrize(
    "layer",
    [
        lambda x: attend(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),  # along x only
        lambda x: torch.roll(x, (3, 2), (2, 3)).roll((-3, -2), (2, 3)),
        lambda x: attend(x.view(2, 3, 6, 8, 40).permute(0, 2, 4, 3, 1)).permute(0, 4, 1, 3, 2).reshape(x.shape),
    ],
)
def test_part_of_the_image_is_bounded_by_all_of_it(layer: Network) -> None:
    assert field_of(lambda x: layer(conv(x))) == Field((48, 40), (1, 1), (0.5, 0.5), bound=True, whole=True)


def test_a_side_branch_says_nothing_where_all_is_seen_anyway() -> None:
    field = field_of(lambda x: attend((x * x.mean((2, 3), keepdim=True)).flatten(2).mT).mT.view(x.shape))
    assert field == Field((48, 40), (1, 1), (0.5, 0.5), whole=True)


def test_one_cell_that_is_spread_over_a_map_is_everywhere_the_same() -> None:
    everywhere = Field((48, 40), (1, 1), (0.5, 0.5), whole=True)
    assert field_of(lambda x: functional.avg_pool2d(x, (48, 40)).expand(x.shape)) == everywhere
    assert field_of(lambda x: functional.interpolate(functional.avg_pool2d(x, (48, 40)), (48, 40))) == everywhere


def test_attention_between_channels_is_a_global_side_branch() -> None:
    field = field_of(lambda x: attend(conv(x).flatten(2)[:, None]).view(x.shape))
    assert field == Field((3, 3), (1, 1), (0.5, 0.5), has_global=True)


@pytest.mark.parametrize(
    ("network", "names"),
    [
        (lambda x: conv(x).mean((2, 3)), ("batch", "feature")),
        (lambda x: functional.linear(conv(x).flatten(1), torch.ones(4, 3 * 48 * 40).double()), ("batch", "feature")),
        (lambda x: attend(conv(x).flatten(2).transpose(1, 2))[:, 0], ("batch", "feature")),
        (lambda x: functional.adaptive_avg_pool2d(x, 1), MAP),
    ],
)
def test_a_tensor_without_places_sees_the_whole_image(network: Network, names: tuple[str, ...]) -> None:
    assert field_of(network, names=names) == Field((48, 40), (48, 40), (24, 20), whole=True)


def spoiled(x: Tensor) -> Tensor:
    made = torch.zeros_like(x)
    made[:, :, 1:] = x[:, :, :-1]
    return made


def out_of_date(x: Tensor) -> Tensor:
    y = conv(x)
    view = y.view(y.shape)
    y.add_(conv(conv(x)))
    return view


def shuffled(x: Tensor) -> Tensor:
    return x.view(2, 3, 6, 8, 40).transpose(2, 3).reshape(x.shape)


@pytest.mark.parametrize(
    "network",
    [
        spoiled,
        out_of_date,
        shuffled,
        lambda x: conv(shuffled(x)),
        lambda x: conv(x.transpose(2, 3)),
        lambda x: x + x.transpose(2, 3)[:, :, :48, :40] if x.shape[2] == x.shape[3] else x.flip(3),
        lambda x: x.flip(2),
        lambda x: x.sort(2)[0],
        lambda x: x[:, :, torch.arange(48).flip(0)],
        lambda x: torch.cat([x[:, :, 24:], x[:, :, :24]], 2),
        lambda x: functional.grid_sample(x, torch.zeros(2, 5, 5, 2).double(), align_corners=False),
        lambda x: x.flatten(2).transpose(1, 2),
        lambda x: torch.rand(2, 3, 48, 40),
    ],
)
def test_what_cannot_be_followed_has_no_field(network: Network) -> None:
    assert field_of(network) is None


def test_transposed_axes_of_a_square_map_are_not_taken_for_each_other() -> None:
    assert field_of(lambda x: x + x.transpose(2, 3), (40, 40)) is None
    assert field_of(lambda x: conv(x.transpose(2, 3)).transpose(2, 3), (40, 40)) is None


def test_an_operation_in_place_changes_what_is_seen_from_then_on() -> None:
    def network(x: Tensor) -> Tensor:
        y = conv(x)
        before.append(tracer.field(y, MAP))
        y += conv(conv(x))
        return y

    before: list[Field | None] = []
    image = torch.rand(2, 3, 32, 32).double()
    with torch.no_grad(), FieldTracer() as tracer:
        tracer.seed(image, image_axes(image.shape))
        after = tracer.field(network(image), MAP)
    assert (before, after) == ([CONV], Field((5, 5), (1, 1), (0.5, 0.5)))


def test_merging_patches_by_a_view_is_a_convolution() -> None:
    def merge(x: Tensor) -> Tensor:
        patches = x.view(2, 3, 12, 4, 20, 2).permute(0, 2, 4, 1, 3, 5).flatten(3)
        return functional.linear(patches, torch.ones(7, 24).double())

    assert field_of(lambda x: merge(conv(x)), names=("batch", "y", "x", "channel")) == Field((6, 4), (4, 2), (2, 1))


def test_different_strides_meet_in_a_bound() -> None:
    def network(x: Tensor) -> Tensor:
        small = functional.max_pool2d(x, 2, ceil_mode=True)
        return functional.interpolate(small, x.shape[2:]) + x

    field = field_of(network, (45, 45))
    assert field is not None
    assert field.bound
    for cell in [(0, 0), (22, 22), (44, 44)]:
        for seen, box in zip(reached(network, (45, 45), cell), box_of(field, cell), strict=True):
            assert box[0] <= seen[0] < seen[1] <= box[1]


# --------------------------------------------------------------------------------------- taps of a model


def probed_taps(model: nn.Module, wanted: list[str], side: int) -> list[taps.Probed]:
    batch = torch.rand(2, 3, side, side)
    found = resolve.resolve(wanted, survey.survey(model, model, batch))
    probed, refused = probe.probe(model, model, found, (3, side, side), torch.device("cpu"))
    assert not refused
    return probed


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    body = (nn.Conv2d(3, 8, 5, 2, 2), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, 1, 1))
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()


def test_trace_fields_gives_one_a_tap_and_follows_reducers() -> None:
    model = small_model()
    probed = probed_taps(model, ["1", "3", "6"], 32)
    batch = torch.rand(2, 3, 32, 32)
    norm, last, head = trace_fields(model, model, probed, batch)
    assert norm == Field((5, 5), (2, 2), (0.5, 0.5))
    assert last == Field((9, 9), (2, 2), (0.5, 0.5))
    assert head == Field((32, 32), (32, 32), (16, 16), whole=True)
    reductions: list[Any] = [
        (lambda rows: functional.adaptive_avg_pool2d(rows, 4), ("channel", "y", "x")),
        (lambda rows: rows.mean((2, 3)), ("feature",)),
        None,
    ]
    pooled, mean, same_head = trace_fields(model, model, probed, batch, reductions)
    assert pooled == Field((11, 11), (8, 8), (3.5, 3.5))
    assert mean == head == same_head


# ----------------------------------------------------------------------------------------------- boxes


def test_cell_box_is_clipped_to_the_input() -> None:
    field = Field((11, 7), (8, 4), (3.5, 0.5))
    assert cell_box(field, (1, 2)) == (6, 5, 17, 12)
    assert cell_box(field, (0, 0)) == (-2, -3, 9, 4)
    assert cell_box(field, (0, 0), (16, 10)) == (0, 0, 9, 4)
    assert cell_box(field, (9, 9), (16, 10)) == (16, 10, 16, 10)
    assert cell_box(Field((16, 10), (8, 4), (4, 2), whole=True), (1, 1), (16, 10)) == (0, 0, 16, 10)


@pytest.mark.parametrize("size", [(300, 400), (411, 287), (64, 64), (90, 60)])
@pytest.mark.parametrize(
    "preprocess",
    [Preprocess(128, (112, 112)), Preprocess((96, 160), None), Preprocess(None, None), Preprocess(100, (150, 120))],
    ids=["resize and crop", "both sides", "as it is", "crop beyond the photo"],
)
def test_photo_box_finds_a_painted_rectangle(size: tuple[int, int], preprocess: Preprocess) -> None:
    painted = (size[0] // 3, size[1] // 4, size[0] * 2 // 3, size[1] // 2)
    photo = np.zeros((*size, 3), np.uint8)
    photo[painted[0] : painted[2], painted[1] : painted[3]] = 255
    image = PIL.Image.fromarray(photo)
    if preprocess.resize is not None:
        resize = list(preprocess.resize) if isinstance(preprocess.resize, tuple) else preprocess.resize
        image = transforms.resize(image, resize, InterpolationMode.BILINEAR)
    if preprocess.crop is not None:
        image = transforms.center_crop(image, list(preprocess.crop))
    # Grey levels at the edges say where within a pixel they are.
    values = np.asarray(image)[..., 0].astype(float) / 255
    rows, columns = values.max(1), values.max(0)
    y0, x0 = (float(np.argmax(line > 0.5)) for line in (rows, columns))
    box = (y0, x0, y0 + rows.sum(), x0 + columns.sum())
    recorded = {**asdict(preprocess), "kind": "standard"}
    found = photo_box(box, recorded, size)
    assert found is not None
    pixel = max(size[0] / len(rows), size[1] / len(columns), 1)  # of the input, in those of the photo
    assert np.abs(np.subtract(found, painted)).max() <= 1.5 * pixel


def test_photo_box_is_exact_and_stays_in_the_photo() -> None:
    recorded = {"kind": "standard", "resize": 256, "crop": [224, 224]}
    # 512 x 1024 becomes 256 x 512, of which rows 16 to 240 and columns 144 to 368 are seen.
    assert photo_box((0, 0, 224, 224), recorded, (512, 1024)) == (32, 288, 480, 736)
    assert photo_box((10, 20, 30, 40), recorded, (512, 1024)) == (52, 328, 92, 368)
    # 10 x 10 in a crop of 20 x 20: five pixels of padding all around.
    small = {"kind": "standard", "resize": None, "crop": [20, 20]}
    assert photo_box((0, 0, 20, 20), small, (10, 10)) == (0, 0, 10, 10)
    assert photo_box((6, 7, 8, 9), small, (10, 10)) == (1, 2, 3, 4)
    assert photo_box((0, 0, 5, 5), {"kind": "custom", "callable": "m:f", "size": [5, 5]}, (10, 10)) is None


def test_boxes_need_no_torch() -> None:
    code = "import sys, fmextract.common.boxes; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------- effective fields


def effective(model: nn.Module, wanted: list[str], images: int = 2, side: int = 64) -> list[float | None]:
    probed = probed_taps(model, wanted, side)
    batch = torch.rand(images, 3, side, side)
    return effective_sizes(model, model, probed, trace_fields(model, model, probed, batch[[0, 0]]), batch)


def test_effective_size_of_an_average_is_the_square_of_nine_tenths_of_its_area() -> None:
    model = positive(nn.Sequential(nn.Conv2d(3, 4, 41, padding=20), nn.Conv2d(4, 4, 1))).float()
    # Of 41 x 41 equal weights, 39 x 39 hold 90.5 %, 37 x 37 hold 81.4 %.
    assert effective(model, ["0", "1"], side=80) == [39, 39]


def test_images_that_would_take_too_long_are_left_out() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    probed = probed_taps(model, ["1"], 16)
    batch = torch.rand(4, 3, 16, 16)
    fields = trace_fields(model, model, probed, batch)
    passes: list[Any] = []
    model.register_forward_hook(lambda *_: passes.append(1))
    for seconds, images in ((0.0, 1), (60.0, 4)):
        passes.clear()
        assert effective_sizes(model, model, probed, fields, batch, seconds=seconds) == [3]
        assert len(passes) == images


def test_effective_size_of_what_a_reducer_keeps() -> None:
    model = positive(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))).float()
    probed = probed_taps(model, ["0", "1"], 64)
    batch = torch.rand(2, 3, 64, 64)
    reductions: list[Any] = [
        (lambda rows: functional.adaptive_avg_pool2d(rows, 4), ("channel", "y", "x")),
        (lambda rows: rows.mean((2, 3)), ("feature",)),
    ]
    fields = trace_fields(model, model, probed, batch, reductions)
    assert effective_sizes(model, model, probed, fields, batch, reductions=reductions) == [16, None]


def test_square_counts_pixels_around_a_centre_between_them() -> None:
    energy = np.zeros((10, 12))
    energy[4:6, 5:7] = 1
    assert _square(energy, (5.0, 6.0), 0.9) == 2
    energy[0, 0] = 4
    assert _square(energy, (5.0, 6.0), 0.5) == 2
    assert _square(energy, (5.0, 6.0), 0.9) == 12


class OnLastAxis(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pixels = nn.Conv2d(3, 8, 4, 4)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        made: Tensor = self.norm(self.pixels(x).permute(0, 2, 3, 1))
        return made.mul_(0).flatten(1)


def test_effective_size_with_operations_in_place_and_channels_last() -> None:
    assert effective(OnLastAxis().eval(), ["pixels", "norm", "."]) == [4, 4, None]
    overwritten = effective(small_model(), ["1", "2", "3", "6"])
    assert overwritten[:2] == [5, 5]
    assert overwritten[2] in (7, 9)
    assert overwritten[3] is None


class WithoutGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pixels = nn.Conv2d(3, 8, 4, 4)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.pixels(x)
        return made


class OverwritesWhatTheGradientNeeds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pixels = nn.Conv2d(3, 8, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        made = self.pixels(x).sigmoid()
        result = made * 2
        made.zero_()
        return result


@pytest.mark.parametrize("model", [WithoutGradient(), OverwritesWhatTheGradientNeeds()])
def test_effective_size_is_none_where_there_is_no_gradient(model: nn.Module) -> None:
    assert effective(model.eval(), ["."]) == [None]


def test_effective_sizes_leave_the_model_as_it_was() -> None:
    model = small_model()
    model[3].weight.requires_grad_(False)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    values = {name: value.clone() for name, value in model.state_dict().items()}
    effective(model, ["3"])
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
