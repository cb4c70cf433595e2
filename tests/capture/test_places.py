"""An axis that is called y follows the image's y, however the model moves it about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from moving import misnamed, probed
from torch import nn
from torch.nn import functional as F  # noqa: N812

from fmextract.capture import receptive_fields

Tensor = torch.Tensor


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def after(*functions: Callable[[Tensor], Tensor] | nn.Module) -> tuple[str, ...]:
    """The axes of what comes last of a convolution's (B, 8, 8, 8) and what follows it."""
    torch.manual_seed(0)
    parts = [part if isinstance(part, nn.Module) else Function(part) for part in functions]
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *parts).eval()
    return probed(model, (3, 8, 8))[str(len(parts))].axes


SMALL: dict[str, dict[str, Any]] = {
    "mobilevitv2_050": {},
    "efficientformerv2_s0": {"img_size": 64, "depths": (1, 1, 2, 2)},
    "swin_tiny_patch4_window7_224": {
        "img_size": 64, "window_size": 4, "depths": (2, 2), "num_heads": (2, 2), "embed_dim": 16,
    },
    "davit_tiny": {"embed_dims": (16, 32), "depths": (1, 1), "num_heads": (2, 2)},
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_y_moves_with_the_image(name: str) -> None:
    torch.manual_seed(0)
    wrong, told = misnamed(timm.create_model(name, pretrained=False, **SMALL[name]), (3, 64, 64))
    assert not wrong
    assert told > 20


def test_what_is_no_place_of_the_image_is_not_called_one() -> None:
    torch.manual_seed(0)
    vit = probed(timm.create_model("mobilevitv2_050", pretrained=False).eval(), (3, 64, 64))
    unfolded = {name: one for name, one in vit.items() if ".transformer." in name}
    assert len(unfolded) > 50
    assert {one.axes for one in unfolded.values() if len(one.shape) == 3} == {("channel", "axis_2", "axis_3")}
    assert vit["stages.2.1.conv_proj.conv"].axes == ("channel", "y", "x"), "folded back"
    options = {"img_size": 128, "depths": (1, 1, 1, 2)}
    former = probed(timm.create_model("efficientformerv2_s0", pretrained=False, **options).eval(), (3, 128, 128))
    heads = {name: one for name, one in former.items() if "talking_head" in name}
    assert len(heads) >= 2
    assert {one.axes for one in heads.values()} == {("channel", "axis_2", "axis_3")}


class Expert(nn.Module):
    """A CondConv: the weights of its convolution are mixed for each image."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.routing = nn.Linear(8, 4)
        self.conv = timm.layers.CondConv2d(8, 8, 3, padding=1, num_experts=4, **options)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x, self.routing(x.mean((2, 3))).sigmoid())
        return y


@pytest.mark.parametrize("options", [{}, {"groups": 8}, {"bias": True}])
def test_weights_of_their_own_for_each_image(options: dict[str, Any]) -> None:
    assert after(Expert(**options)) == after(Expert(**options), nn.BatchNorm2d(8), nn.ReLU()) == MAPS


def _shuffled(x: Tensor) -> Tensor:
    """Rows 0, 4, 1, 5, 2, 6, 3, 7."""
    return x.unflatten(2, (2, 4)).transpose(2, 3).flatten(2, 3)


def _patches(x: Tensor) -> Tensor:
    """(B, 8, 8, 8) → (B, channel, 4 places in a patch, 16 patches)."""
    return x.reshape(-1, 8, 4, 2, 4, 2).permute(0, 1, 3, 5, 2, 4).reshape(-1, 8, 4, 16)


def _from_patches(x: Tensor) -> Tensor:
    return x.reshape(-1, 8, 2, 2, 4, 4).permute(0, 1, 4, 2, 5, 3).reshape(-1, 8, 8, 8)


def _by_buffer(x: Tensor) -> Tensor:
    made = x.new_zeros(x.shape)
    for image, place in zip(x, made, strict=True):
        place.copy_(image)
    return made


def conv(channels: int = 8) -> nn.Module:
    return nn.Conv2d(channels, 8, 1)


MAPS, DEFINED = ("channel", "y", "x"), ("channel", "axis_2", "axis_3")
MOVED: dict[str, tuple[list[Any], tuple[str, ...]]] = {
    "rows in another order": ([_shuffled], DEFINED),
    "and a convolution": ([_shuffled, conv()], DEFINED),
    "patches": ([_patches, conv()], DEFINED),
    "patches and back": ([_patches, conv(), _from_patches], MAPS),
    "patches by einsum": (
        [lambda x: torch.einsum("bchpwq->bcpqhw", x.reshape(-1, 8, 4, 2, 4, 2)).flatten(2, 3).flatten(3), conv()],
        DEFINED,
    ),
    "within a window": ([lambda x: x.unflatten(2, (2, 4)).mean(2)], DEFINED),
    "coarse rows": ([lambda x: x.unflatten(2, (4, 2)).mean(3)], MAPS),
    "one place of each window": ([lambda x: x.unflatten(2, (4, 2))[:, :, :, 0]], MAPS),
    "windows in the channels": ([lambda x: x.unflatten(2, (2, 4)).flatten(1, 2), conv(16)], DEFINED),
    "space in the channels": (
        [lambda x: x.reshape(-1, 8, 4, 2, 4, 2).permute(0, 1, 3, 5, 2, 4).reshape(-1, 32, 4, 4), conv(32)],
        MAPS,
    ),
    "windows by unfold": ([lambda x: x.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3).flatten(3), conv()], DEFINED),
    "coarse places by unfold": ([lambda x: x.unfold(2, 4, 2)[..., 0]], MAPS),
    "columns of patches": ([lambda x: F.unfold(x, 2, stride=2)], ("feature", "token")),
    "and folded": ([lambda x: F.fold(F.unfold(x, 3, padding=1), (8, 8), 3, padding=1), conv()], MAPS),
    "attention over places": (
        [lambda x: (x.flatten(2).mT @ x.flatten(2)).softmax(-1)[:, None].expand(-1, 8, -1, -1), conv()],
        DEFINED,
    ),
    "tokens by columns": ([lambda x: x.mT.flatten(2).mT], ("axis_1", "channel")),
    "class token last": (
        [lambda x: torch.cat([x.flatten(2).mT, x.mean((2, 3))[:, None]], 1)],
        ("axis_1", "channel"),
    ),
    "maps of what a class token stood before": (
        [lambda x: torch.cat([x.mean((2, 3))[:, None], x.flatten(2).mT], 1)[:, 1:].mT.unflatten(2, (8, 8)), conv()],
        MAPS,
    ),
    "and of a split": (
        [lambda x: torch.cat([x[:, :, 0, :2].mT, x.flatten(2).mT], 1).split([2, 64], 1)[1].mT.unflatten(2, (8, 8))],
        MAPS,
    ),
    "some tokens": ([lambda x: x.flatten(2).mT[:, torch.arange(60, 0, -7)]], ("axis_1", "channel")),
    "rows at random": ([lambda x: x[:, :, torch.tensor([3, 1, 7, 0, 2, 5, 4, 6])]], DEFINED),
    "rows in order": ([lambda x: x[:, :, torch.tensor([0, 1, 1, 2, 5, 7])]], MAPS),
    "sorted rows": ([lambda x: x.sort(2).values], DEFINED),
    "halves changed over": ([lambda x: torch.cat([x[:, :, 4:], x[:, :, :4]], 2)], DEFINED),
    "a border of its own": ([lambda x: torch.cat([x[..., :1], x, x[..., -1:]], 3)], MAPS),
    "y and x in one": ([lambda x: x + x.mT], DEFINED),
    "one row for all": ([lambda x: x.mean(2, keepdim=True).expand(-1, -1, 8, -1)], DEFINED),
    "gated by one row": ([lambda x: x * x.mean(2, keepdim=True).expand(-1, -1, 8, -1)], MAPS),
    "frequencies": ([lambda x: torch.fft.rfft2(x).abs()], DEFINED),
    "frequencies and back": ([lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * 2, s=(8, 8)), conv()], MAPS),
    "distances": ([lambda x: torch.cdist(x, x)], ("axis_1", "axis_2", "axis_3")),
    "sampled": ([lambda x: F.grid_sample(x, torch.zeros(len(x), 8, 8, 2), align_corners=False)], DEFINED),
    "copied into a buffer": ([_by_buffer, conv()], MAPS),
    "circular padding": ([lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"), conv()], MAPS),
    "weights of the image": (
        [
            lambda x: F.conv2d(
                x.reshape(1, -1, 8, 8), torch.ones(4, 8, 3, 3).repeat(len(x), 1, 1, 1), groups=len(x), padding=1
            ).reshape(len(x), 4, 8, 8)
        ],
        MAPS,
    ),
    "a convolution as a product": (
        [lambda x: torch.einsum("oc,bcyx->boyx", torch.ones(4, 8), x), torch.relu],
        MAPS,
    ),
    "places mixed, and a residual": (
        [lambda x: x + F.linear(x.flatten(2), torch.ones(64, 64)).unflatten(2, (8, 8))],
        MAPS,
    ),
    "batch norm of what is lost": (
        [lambda x: torch.from_numpy(x.numpy().copy()).mT, nn.BatchNorm2d(8)],
        DEFINED,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVED)
def test_places_are_followed(name: str) -> None:
    functions, expected = MOVED[name]
    assert after(*functions) == expected


@pytest.mark.parametrize(
    ("layer", "bound"),
    [
        (nn.ReflectionPad2d(4), True),
        (nn.ReplicationPad2d((4, 0, 0, 0)), True),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), True),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="replicate"), True),
        (nn.ZeroPad2d(4), False),
        (nn.Conv2d(3, 4, 3, padding=1), False),
    ],
)
def test_behind_padding_by_pixels_a_field_is_a_bound(layer: nn.Module, bound: bool) -> None:
    model = nn.Sequential(layer, nn.ReLU())
    found = list(probed(model, (3, 16, 16)).values())
    fields = receptive_fields.trace_fields(model, model, found, torch.zeros(2, 3, 16, 16))
    assert [field is not None and field.bound for field in fields] == [bound] * len(fields)
