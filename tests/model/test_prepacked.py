"""Layers in bfloat16 whose weights are laid out once: what torch's public operators give, or nothing is packed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from fmextract.model import precision, prepacked, run_mode

CPU = torch.device("cpu")
PREPACKED = run_mode.Mode("channels_last", prepacked=True)

needs_bf16 = pytest.mark.skipif(not precision.bf16_on_cpu(), reason="this processor has no bfloat16")


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    prepacked._works.cache_clear()
    yield
    prepacked._works.cache_clear()


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def by_autocast(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return module(x)  # type: ignore[no-any-return]


@needs_bf16
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(16, 32, 3, padding=1),
        nn.Conv2d(16, 32, 1, bias=False),
        nn.Conv2d(16, 24, 5, stride=(2, 1), padding=(0, 2), dilation=2),
        nn.Conv2d(16, 16, 3, groups=16, padding=1),
        nn.Conv2d(16, 32, 3, groups=4),
    ],
)
def test_a_packed_convolution_gives_the_same_bits(conv: nn.Conv2d) -> None:
    assert prepacked.available()
    forward = prepacked.forward(conv)
    for batch in (4, 1, 7):  # packed for the first
        x = noise(batch, 16, 18, 20).contiguous(memory_format=torch.channels_last)
        expected = by_autocast(conv, x)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            made = forward(x)
        assert made.dtype == torch.bfloat16
        assert made.stride() == expected.stride()
        assert torch.equal(made, expected)


@needs_bf16
@pytest.mark.parametrize("shape", [(5, 64), (2, 7, 64), (2, 3, 5, 64), (64,), (8, 7, 7, 1536)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_linear_layer_gives_the_same_but_for_the_last_bit(shape: tuple[int, ...], bias: bool) -> None:
    module = nn.Linear(shape[-1], 48, bias=bias)
    x = noise(*shape)
    expected = by_autocast(module, x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        made = prepacked.forward(module)(x)
    assert (made.dtype, made.shape) == (expected.dtype, expected.shape)
    torch.testing.assert_close(made, expected, rtol=2**-7, atol=2**-9)


@needs_bf16
def test_one_image_without_a_batch_goes_the_usual_way() -> None:
    conv = nn.Conv2d(16, 8, 3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prepacked.forward(conv)(noise(16, 9, 9)), conv(noise(16, 9, 9)))


@pytest.mark.parametrize(
    ("module", "fits"),
    [
        (nn.Conv2d(3, 4, 3), True),
        (nn.Linear(3, 4), True),
        (nn.Conv2d(3, 4, 3, padding="same"), True),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), False),
        (nn.Conv2d(3, 4, 3).double(), False),
        (nn.Conv1d(3, 4, 3), False),
        (nn.modules.linear.NonDynamicallyQuantizableLinear(3, 4), False),
        (nn.ReLU(), False),
    ],
)
def test_what_fits(module: nn.Module, fits: bool) -> None:
    assert prepacked.fits(module) is fits


def test_what_has_a_kernel() -> None:
    conv, same = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3, padding="same")
    assert prepacked.has_kernel(conv, "channels_last")
    assert not prepacked.has_kernel(conv, "contiguous")
    assert not prepacked.has_kernel(same, "channels_last")
    assert prepacked.has_kernel(nn.Linear(3, 4), "contiguous")


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_weight_that_a_hook_computes_is_left_to_it() -> None:
    assert not prepacked.fits(nn.utils.weight_norm(nn.Linear(3, 4)))


class Asked:
    """Stands for torch.ops.mkldnn; some of its operators are given."""

    def __init__(self, **given: Any) -> None:
        self._given = given

    def __getattr__(self, name: str) -> Any:
        if name in self._given:
            return self._given[name]
        raise AttributeError(name)


def refusing(*args: Any) -> Any:
    raise TypeError("another number of arguments")


@pytest.mark.parametrize(
    "operators",
    [
        Asked(_is_mkldnn_bf16_supported=lambda: True),
        Asked(_is_mkldnn_bf16_supported=lambda: True, _convolution_pointwise=refusing),
        Asked(_is_mkldnn_bf16_supported=lambda: True, _convolution_pointwise=lambda x, *rest: x[:, :, :2, :2] + 1),
        Asked(_is_mkldnn_bf16_supported=lambda: False),
    ],
    ids=["gone", "other arguments", "other values", "no bfloat16"],
)
def test_operators_that_are_not_what_they_were_are_not_used(operators: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    expected = by_autocast(model, noise(2, 3, 8, 8))
    monkeypatch.setattr(torch.ops, "mkldnn", operators)
    assert not prepacked.available()
    with run_mode.RunMode(model, CPU, "bf16", run_mode.Mode(prepacked=True)), precision.numerics("bf16", CPU):
        assert torch.equal(model(noise(2, 3, 8, 8)), expected)


@needs_bf16
def test_nothing_is_packed_where_oneDNN_is_switched_off() -> None:  # noqa: N802
    assert prepacked.available()
    before = torch.backends.mkldnn.set_flags(_enabled=False)
    try:
        assert not prepacked.available()
    finally:
        torch.backends.mkldnn.set_flags(_enabled=before[0])


@needs_bf16
def test_a_lent_model_packs_and_lets_go() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    expected = by_autocast(model, noise(2, 3, 8, 8))
    with run_mode.RunMode(model, CPU, "bf16", PREPACKED), precision.numerics("bf16", CPU):
        assert {"forward"} <= vars(model[0]).keys() & vars(model[2]).keys()
        assert model[0].weight.dtype == torch.float32  # one copy of the weights in bfloat16 is enough
        torch.testing.assert_close(model(noise(2, 3, 8, 8)), expected, rtol=2**-7, atol=2**-9)
    assert not any("forward" in vars(module) for module in model)
