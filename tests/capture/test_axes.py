"""What axes mean, at sizes where shapes cannot tell: feature maps as high and wide as they have channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F  # noqa: N812

from fmextract.capture import atoms, probe, resolve, survey

Tensor = torch.Tensor
CHANNEL_FIRST, CHANNEL_LAST = ("channel", "y", "x"), ("y", "x", "channel")


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def axes_of(model: nn.Module, shape: tuple[int, ...] = (3, 8, 8)) -> dict[str, tuple[str, ...]]:
    """Name of the tap → its axes, for every module."""
    model.eval()
    with torch.no_grad():
        seen = survey.survey(model, model, torch.randn(2, *shape))
        found, _refused = probe.probe(model, model, resolve.resolve(["**", "."], seen), shape, torch.device("cpu"))
    return {probed.tap.name: probed.axes for probed in found}


def after(function: Callable[[Tensor], Tensor], stem: nn.Module | None = None) -> tuple[str, ...]:
    """The axes of what `function` makes of a convolution's (B, 8, 8, 8): every axis as long as the others."""
    torch.manual_seed(0)
    return axes_of(nn.Sequential(stem or nn.Conv2d(3, 8, 3, padding=1), Function(function)))["1"]


# ------------------------------------------------------------------------------------------ real networks


def test_swin_keeps_the_channel_last_where_shapes_lie() -> None:
    model = torchvision.models.SwinTransformer([4, 4], 8, [2, 2], [2, 2], [4, 4], num_classes=8)
    found = axes_of(model, (3, 32, 32))
    assert found["features.0.0"] == CHANNEL_FIRST, "the convolution that cuts patches, (8, 8, 8)"
    assert found["features.0"] == found["features.0.1"] == found["features.0.2"] == CHANNEL_LAST
    blocks = [name for name in found if name.startswith(("features.1", "features.2", "features.3"))]
    assert len(blocks) > 40
    assert {found[name] for name in blocks} == {CHANNEL_LAST}
    assert found["norm"] == CHANNEL_LAST
    assert found["permute"] == CHANNEL_FIRST
    assert found["avgpool"] == CHANNEL_FIRST
    assert found["flatten"] == found["head"] == ("feature",)


def test_convnext_is_channel_last_inside_its_blocks() -> None:
    setting = torchvision.models.convnext.CNBlockConfig
    model = torchvision.models.ConvNeXt([setting(8, 32, 1), setting(32, None, 1)], num_classes=8)
    found = axes_of(model, (3, 32, 32))
    block = "features.1.0.block."
    assert found[f"{block}0"] == CHANNEL_FIRST, "the depthwise convolution, (8, 8, 8)"
    for inner in "12345":  # permute, layer norm, linear to 32, GELU, linear back to 8
        assert found[f"{block}{inner}"] == CHANNEL_LAST, inner
    assert found[f"{block}6"] == found["features.1.0"] == found["features.1"] == CHANNEL_FIRST
    assert found["features.2.0"] == found["features.2.1"] == CHANNEL_FIRST, "LayerNorm2d permutes there and back"


def test_vit_has_tokens_and_features() -> None:
    # 16 patches of 16 features, and a class token.
    found = axes_of(torchvision.models.VisionTransformer(16, 4, 2, 2, 16, 32, num_classes=16), (3, 16, 16))
    assert found["conv_proj"] == CHANNEL_FIRST
    inside = [name for name in found if name.startswith("encoder.") and "self_attention[1]" not in name]
    assert len(inside) > 15
    assert {found[name] for name in inside} == {("token", "feature")}
    assert found["heads"] == ("feature",)


def test_mixers_keep_their_tokens() -> None:
    """Two layers over the positions, and the sum with what is still in place."""
    model = timm.models.mlp_mixer.MlpMixer(img_size=16, patch_size=4, num_blocks=2, embed_dim=16, num_classes=5)
    found = axes_of(model, (3, 16, 16))
    blocks = {found[f"blocks.{i}{inner}"] for i in (0, 1) for inner in ("", ".norm1", ".norm2", ".mlp_channels")}
    assert blocks | {found["norm"]} == {("token", "feature")}
    assert found["blocks.1.mlp_tokens.fc1"] == ("axis_1", "axis_2"), "features, and sums of tokens"


def test_networks_of_convolutions() -> None:
    model = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=4)
    found = axes_of(model, (3, 32, 32))
    assert {found[name] for name in found if name not in ("fc", "(model)")} == {CHANNEL_FIRST}
    assert found["fc"] == ("feature",)
    dense = axes_of(torchvision.models.DenseNet(4, (2, 2), 8, num_classes=4), (3, 32, 32))
    assert {dense[name] for name in dense if name not in ("classifier", "(model)")} == {CHANNEL_FIRST}
    squeeze = axes_of(torchvision.models.mobilenet_v3_small(num_classes=4), (3, 32, 32))
    assert {squeeze[name] for name in squeeze if name.startswith(("features", "avgpool"))} == {CHANNEL_FIRST}


def test_maxvit_through_its_windows_and_back() -> None:
    found = axes_of(torchvision.models.MaxVit((32, 32), 16, 4, [16], [1], 8, 0.0, num_classes=5), (3, 32, 32))
    windows = [name for name in found if name.endswith(("window_attention", "grid_attention", "MBconv"))]
    assert len(windows) == 3
    assert {found[name] for name in windows} == {CHANNEL_FIRST}


def test_video() -> None:
    model = torchvision.models.video.VideoResNet(
        torchvision.models.video.resnet.BasicBlock,
        [torchvision.models.video.resnet.Conv3DSimple] * 4,
        [1, 1, 1, 1],
        torchvision.models.video.resnet.BasicStem,
        num_classes=4,
    )
    found = axes_of(model, (3, 8, 16, 16))
    assert {found[name] for name in found if name.startswith("layer")} == {("channel", "time", "y", "x")}
    assert found["fc"] == ("feature",)


def test_signals() -> None:
    model = nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten())
    found = axes_of(model, (3, 8))
    assert [found[name] for name in "0123"] == [("channel", "x")] * 4
    assert found["4"] == ("feature",)
    assert axes_of(nn.Sequential(nn.Linear(5, 3)), (5,))["0"] == ("feature",)


# ------------------------------------------------------------------------------------------ operations


def _windows(x: Tensor) -> Tensor:
    """(B, 8, 8, 8) → (B·4, 16, 8): windows of 4 x 4, position by position, channel last."""
    x = x.permute(0, 2, 3, 1).reshape(-1, 2, 4, 2, 4, 8)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, 8)


def _and_back(x: Tensor) -> Tensor:
    x = _windows(x).reshape(-1, 2, 2, 4, 4, 8).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, 8, 8, 8)


TOKENS = ("token", "feature")
UNKNOWN = ("axis_1", "axis_2", "axis_3")
WEIGHT = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))

OPERATIONS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[str, ...]]] = {
    "nothing": (lambda x: x, CHANNEL_FIRST),
    "element by element": (lambda x: torch.where(x > 0, x.exp() * 2, x.sigmoid()), CHANNEL_FIRST),
    "in place": (lambda x: x.clone().mul_(2).relu_(), CHANNEL_FIRST),
    "permute": (lambda x: x.permute(0, 2, 3, 1), CHANNEL_LAST),
    "permute to x, y": (lambda x: x.transpose(2, 3), ("channel", "x", "y")),
    "transposes": (lambda x: x.transpose(1, 2).transpose(2, 3), CHANNEL_LAST),
    "transpose in place": (lambda x: x.clone().transpose_(1, 3), ("x", "y", "channel")),
    "movedim": (lambda x: x.movedim(1, -1), CHANNEL_LAST),
    "linear after permute": (lambda x: F.linear(x.permute(0, 2, 3, 1), WEIGHT), CHANNEL_LAST),
    "linear over x": (lambda x: F.linear(x, WEIGHT), UNKNOWN),
    "matmul after permute": (lambda x: x.permute(0, 2, 3, 1) @ WEIGHT, CHANNEL_LAST),
    "einsum": (lambda x: torch.einsum("bcyx,dc->byxd", x, WEIGHT), CHANNEL_LAST),
    "layer norm over channels last": (lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (8,)), CHANNEL_LAST),
    "layer norm over maps": (lambda x: F.layer_norm(x, (8, 8, 8)), CHANNEL_FIRST),
    "batch norm": (lambda x: F.batch_norm(x, torch.zeros(8), torch.ones(8)), CHANNEL_FIRST),
    "group norm": (lambda x: F.group_norm(x, 2), CHANNEL_FIRST),
    "pooling": (lambda x: F.max_pool2d(F.avg_pool2d(x, 3, 1, 1), 3, 1, 1), CHANNEL_FIRST),
    "pooling of channels last": (lambda x: F.avg_pool2d(x.permute(0, 3, 2, 1), 3, 1, 1), ("x", "y", "channel")),
    "pooling to one size": (lambda x: F.adaptive_avg_pool2d(x, 8), CHANNEL_FIRST),
    "upsampling": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")[..., ::2, ::2], CHANNEL_FIRST),
    "pixel shuffle": (lambda x: F.pixel_shuffle(F.conv2d(x, WEIGHT.repeat(4, 1)[..., None, None]), 2), CHANNEL_FIRST),
    "flatten to tokens": (lambda x: x.flatten(2).transpose(1, 2), TOKENS),
    "class token": (lambda x: torch.cat([WEIGHT[:1].expand(len(x), 1, 8), x.flatten(2).mT], 1), TOKENS),
    "without its class token": (
        lambda x: torch.cat([WEIGHT[:1].expand(len(x), 1, 8), x.flatten(2).mT], 1)[:, 1:],
        TOKENS,
    ),
    "flatten all": (lambda x: x.flatten(1), ("feature",)),
    "mean over places": (lambda x: x.mean((2, 3)), ("feature",)),
    "mean, kept": (lambda x: x.mean((2, 3), keepdim=True) * x, CHANNEL_FIRST),
    "mean over channels": (lambda x: x.mean(1), ("y", "x")),
    "norm over channels": (lambda x: x.norm(dim=1), ("y", "x")),
    "largest channel": (lambda x: x.max(1).values, ("y", "x")),
    "variance": (lambda x: x.var(1), ("y", "x")),
    "one channel": (lambda x: x[:, 0], ("y", "x")),
    "some channels": (lambda x: x[:, torch.arange(7, -1, -1)], CHANNEL_FIRST),
    "a slice": (lambda x: x[:, 1:, ::2], CHANNEL_FIRST),
    "padding": (lambda x: F.pad(x, (1, 1, 1, 1)), CHANNEL_FIRST),
    "channels side by side": (lambda x: torch.cat([x, x * 2], 1), CHANNEL_FIRST),
    "halves": (lambda x: x.chunk(2, 1)[1], CHANNEL_FIRST),
    "gate": (lambda x: F.glu(x, 1), CHANNEL_FIRST),
    "flip and roll": (lambda x: x.flip(3).roll(2, 2), CHANNEL_FIRST),
    "views": (lambda x: x.reshape(-1, 64, 8).reshape(-1, 8, 8, 8), CHANNEL_FIRST),
    "windows": (_windows, ("axis_1", "axis_2", "channel")),
    "windows and back": (_and_back, CHANNEL_LAST),
    "space to depth": (
        lambda x: x.reshape(-1, 8, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(-1, 4, 4, 32),
        CHANNEL_LAST,
    ),
    "attention": (lambda x: _attended(x.flatten(2).mT), TOKENS),
    "attention by hand": (
        lambda x: (x.flatten(2).mT @ x.flatten(2)).softmax(-1) @ x.flatten(2).mT,
        TOKENS,
    ),
    "weights of attention": (lambda x: (x.flatten(2).mT @ x.flatten(2)).softmax(-1), ("axis_1", "axis_2")),
    "heads": (lambda x: x.flatten(2).mT.unflatten(2, (2, 4)).transpose(1, 2), UNKNOWN),
    "two views of an image": (lambda x: torch.cat([x, x.flip(3)]), ("axis_1", "channel", "axis_3", "axis_4")),
    "sequence first": (lambda x: x.flatten(2).permute(2, 0, 1), TOKENS),
    "patches by unfold": (lambda x: F.unfold(x, 2), ("axis_1", "axis_2")),
    "scattered": (lambda x: x[torch.arange(len(x))[:, None], torch.arange(8)], UNKNOWN),
    "convolution over channels": (lambda x: F.conv1d(x.mean((2, 3))[:, None], WEIGHT[:4, None, :3]), UNKNOWN[:2]),
    "convolution over tokens": (lambda x: F.conv1d(x.flatten(2), WEIGHT[..., None]), ("feature", "token")),
    "convolution in windows": (
        lambda x: F.conv2d(x.reshape(-1, 8, 2, 4, 8).transpose(1, 2).reshape(-1, 8, 4, 8), WEIGHT[..., None, None]),
        ("axis_1", "channel", "axis_3", "axis_4"),
    ),
}


def _attended(tokens: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(tokens[:, None], tokens[:, None], tokens[:, None])[:, 0]


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_axes_are_followed(name: str) -> None:
    function, expected = OPERATIONS[name]
    assert after(function) == expected


def test_lists_of_images_lose_the_batch_and_the_values_find_it() -> None:
    conv = nn.Conv2d(3, 8, 3, padding=1)
    assert axes_of(nn.Sequential(Function(lambda x: torch.stack(list(x))), conv))["1"] == CHANNEL_FIRST

    def padded(x: Tensor) -> Tensor:  # as torchvision's detection models collect their images
        made = x.new_full(x.shape, 0.0)
        for image, place in zip(x, made, strict=True):
            place[:, :8, :8].copy_(image)
        return made

    assert axes_of(nn.Sequential(Function(padded), conv))["1"] == CHANNEL_FIRST


def test_nothing_is_known_by_shape_alone() -> None:
    def from_nowhere(x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy().copy())

    assert after(from_nowhere) == UNKNOWN
    assert after(lambda x: F.relu(from_nowhere(x))) == UNKNOWN
    defined = ("channel", "axis_2", "axis_3")
    assert after(lambda x: F.conv2d(from_nowhere(x), WEIGHT[..., None, None])) == defined
    assert after(lambda x: F.batch_norm(from_nowhere(x), torch.zeros(8), torch.ones(8))) == defined
    assert after(lambda x: F.max_pool2d(from_nowhere(x), 2)) == defined
    assert after(lambda x: from_nowhere(x) + x) == CHANNEL_FIRST, "a residual knows"


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.fft.irfft2(torch.fft.rfft2(x)),
        lambda x: x.unfold(2, 4, 4).unfold(3, 4, 4),
        lambda x: torch.max(x, x * 2),
        lambda x: x.sort(1).values.cumsum(2).topk(2, 1).values,
        lambda x: torch.tensordot(x, WEIGHT, ([1], [0])),
        lambda x: F.grid_sample(x, torch.zeros(len(x), 8, 8, 2), align_corners=False),
        lambda x: torch.stack([x, x], 1).squeeze().unsqueeze(0).squeeze(0),
        lambda x: x.reshape(len(x), -1, 1).repeat_interleave(2, 1),
        lambda x: torch.outer(x.flatten(), torch.ones(1)).reshape(x.shape),
        lambda x: torch.cdist(x, x),
        lambda x: x.view(torch.int32),
        lambda x: x[:, :, :1].expand(-1, -1, 8, -1),
        lambda x: F.pixel_unshuffle(x, 2),
        lambda x: torch.cat([x[:0], x]),
        lambda x: torch.as_strided(x, (len(x), 8), (512, 1)),
    ],
)
def test_no_operation_can_make_the_trace_fail(function: Callable[[Tensor], Tensor]) -> None:
    after(function)


@pytest.mark.parametrize(
    ("strides", "axes"),
    [((512, 64, 8, 1), CHANNEL_FIRST), ((512, 64, 1, 8), UNKNOWN), ((512, 1, 64, 8), UNKNOWN)],
)
def test_strides_of_ones_own_say_nothing_of_the_axes(strides: tuple[int, ...], axes: tuple[str, ...]) -> None:
    assert after(lambda x: x.contiguous().as_strided(x.shape, strides)) == axes


# ---------------------------------------------------------------------------------------------- the parts


def test_views_merge_and_split() -> None:
    maps = atoms.image_axes((2, 6, 4, 8))
    batch, channel, y, x = maps
    tokens = atoms.regroup(maps, (2, 6, 32))
    assert tokens is not None
    assert tokens[2] == (*y, *x)
    assert atoms.regroup(tokens, (2, 6, 4, 8)) == maps
    parted = atoms.regroup(maps, (2, 6, 2, 2, 8))
    assert parted is not None
    coarse, fine = parted[2:4]
    assert [atoms.role_of(axis) for axis in (coarse, fine)] == ["y", ""]
    assert atoms.regroup(parted, (2, 6, 4, 8)) == maps
    swapped = atoms.regroup((batch, channel, fine, coarse, x), (2, 6, 4, 8))
    assert swapped is not None
    assert atoms.role_of(swapped[2]) == "", "the rows of the picture, but in another order"
    assert atoms.regroup(maps, (12, 4, 8)) == ((*batch, *channel), y, x)
    assert atoms.regroup(maps, (4, 3, 4, 8)) is not None
    assert atoms.regroup(maps, (2, 6, 1, 4, 8)) == (batch, channel, atoms.plain("", 1), y, x)
    assert atoms.regroup(atoms.image_axes((2, 6, 1, 1)), (2, 6)) == (batch, channel)
    assert atoms.regroup(maps, (0, 3)) is None


@pytest.mark.parametrize("shape", [(2, 6, 4, 8), (2, 6, 3, 4, 8), (2, 6, 8), (2, 6)])
def test_inputs(shape: tuple[int, ...]) -> None:
    roles = [axis[0].role for axis in atoms.image_axes(shape)]
    assert (
        roles
        == {
            4: ["batch", "channel", "y", "x"],
            5: ["batch", "channel", "time", "y", "x"],
            3: ["batch", "channel", "x"],
            2: ["batch", "channel"],
        }[len(shape)]
    )


def test_one_unknown_axis_leaves_the_channel_alone() -> None:
    channel, y, x, unknown = (atoms.plain(role, 4) for role in ("channel", "y", "x", ""))
    assert atoms.name_axes((channel, y, x), 3) == CHANNEL_FIRST
    assert atoms.name_axes((channel, unknown), 2) == ("channel", "axis_2")
    assert atoms.name_axes((channel, y, y), 3) == ("channel", "axis_2", "axis_3")
    assert atoms.name_axes((channel, y, channel), 3) == UNKNOWN
    assert atoms.name_axes(((*y, *x), channel), 2) == TOKENS
    assert atoms.name_axes(((*x, *y), channel), 2) == ("axis_1", "channel"), "columns of the picture, not rows"
    assert atoms.name_axes(((*y, *x, *channel),), 1) == ("feature",)
    assert atoms.name_axes((atoms.plain("", 1), channel), 2) == TOKENS
    heads = (atoms.split(channel[0], 2)[0],)
    assert atoms.name_axes((heads, unknown, unknown), 3) == UNKNOWN, "heads are no channels"
    assert atoms.name_axes(((),), 1) == ("axis_1",)
    assert atoms.name_axes(None, 2) == ("axis_1", "axis_2")
    assert atoms.name_axes((), 0) == ()
