"""Reducers: what they keep, of which shape and axes, and what they refuse."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d

from fmextract.capture.reducers import reduction
from fmextract.errors import LayerError

MAP, SWIN = ("channel", "y", "x"), ("y", "x", "channel")
CLIP, TOKENS, FEATURE = ("channel", "time", "y", "x"), ("token", "feature"), ("feature",)
UNKNOWN = ("axis_1", "axis_2")


@pytest.fixture
def users() -> Iterator[types.ModuleType]:
    module = types.ModuleType("a_users_module")
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize(
    ("text", "axes", "shape", "new_axes", "new_shape"),
    [
        ("mean", MAP, (8, 6, 5), FEATURE, (8,)),
        ("max", SWIN, (6, 5, 8), FEATURE, (8,)),
        ("mean", CLIP, (8, 4, 6, 5), FEATURE, (8,)),
        ("max", TOKENS, (17, 8), FEATURE, (8,)),
        ("pool:2", MAP, (8, 6, 5), MAP, (8, 2, 2)),
        ("pool:2", SWIN, (6, 5, 8), SWIN, (2, 2, 8)),
        ("pool:5", CLIP, (8, 4, 6, 5), CLIP, (8, 4, 5, 5)),
        ("flatten", SWIN, (6, 5, 8), FEATURE, (240,)),
        ("flatten", UNKNOWN, (6, 5), FEATURE, (30,)),
        ("cls", TOKENS, (17, 8), FEATURE, (8,)),
        ("tokens", TOKENS, (17, 8), TOKENS, (16, 8)),
        ("tokens", TOKENS, (201, 4), TOKENS, (196, 4)),
        ("tokens", TOKENS, (16, 8), TOKENS, (16, 8)),
        ("tokens:3", TOKENS, (17, 8), TOKENS, (14, 8)),
        ("channels:2-4", MAP, (8, 6, 5), MAP, (3, 6, 5)),
        ("channels:7", SWIN, (6, 5, 8), SWIN, (6, 5, 1)),
        ("channels:0-7", TOKENS, (17, 8), TOKENS, (17, 8)),
        ("top", MAP, (8, 6, 5), MAP, (8, 6, 5)),
    ],
)
def test_shape_and_axes_are_known_before_a_batch(
    text: str, axes: tuple[str, ...], shape: tuple[int, ...], new_axes: tuple[str, ...], new_shape: tuple[int, ...]
) -> None:
    reduced = reduction(text, shape, axes)
    assert (reduced.name, reduced.axes, reduced.shape) == (text, new_axes, new_shape)
    assert reduced.stores == (text != "top")
    for batch in (rows(*shape), rows(*shape)[:0]):
        assert reduced.apply(batch).shape == (len(batch), *new_shape)


@pytest.mark.parametrize("text", ["mean", "max", "pool:2", "flatten", "channels:1", "channels:0-7", "top"])
def test_no_result_shares_memory_with_the_map(text: str) -> None:
    batch = rows(8, 6, 5)
    out = reduction(text, (8, 6, 5), MAP).apply(batch)
    before = out.clone()
    batch.zero_()
    assert torch.equal(out, before)


def test_values() -> None:
    x, tokens = rows(8, 6, 5), rows(17, 8)
    swin = x.movedim(1, -1)
    clip = rows(8, 4, 6, 5)
    pooled = adaptive_avg_pool2d(x, 2)
    for text, batch, axes, expected in [
        ("mean", x, MAP, x.mean((2, 3))),
        ("max", swin, SWIN, x.amax((2, 3))),
        ("mean", tokens, TOKENS, tokens.mean(1)),
        ("pool:2", x, MAP, pooled),
        ("pool:2", swin, SWIN, pooled.movedim(1, -1)),
        ("pool:2", x[:, 0], ("y", "x"), pooled[:, 0]),
        ("pool:3", clip, CLIP, torch.stack([adaptive_avg_pool2d(clip[:, :, t], 3) for t in range(4)], 2)),
        ("flatten", swin, SWIN, swin.reshape(3, -1)),
        ("cls", tokens, TOKENS, tokens[:, 0]),
        ("tokens", tokens, TOKENS, tokens[:, 1:]),
        ("channels:2-4", swin, SWIN, swin[..., 2:5]),
        ("top", x, MAP, x),
    ]:
        torch.testing.assert_close(reduction(text, tuple(batch.shape[1:]), axes).apply(batch), expected)


@pytest.mark.parametrize("text", ["mean", "pool:2"])
def test_averages_of_half_precision_are_computed_in_float32(text: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        batch = rows(4, 40, 40, dtype=dtype) + 100
        got = reduction(text, (4, 40, 40), MAP).apply(batch)
        exact = reduction(text, (4, 40, 40), MAP).apply(batch.double())
        assert (got.dtype, exact.dtype) == (torch.float32, torch.float64)
        np.testing.assert_allclose(got, exact, rtol=1e-6)
    assert reduction(text, (4, 8, 8), MAP).apply(torch.ones(2, 4, 8, 8, dtype=torch.uint8)).dtype == torch.float32


def test_the_maximum_keeps_its_type() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int32):
        assert reduction("max", (4, 8, 8), MAP).apply(rows(4, 8, 8, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("text", "shape", "axes", "message"),
    [
        ("mena", (8, 6, 5), MAP, r"unknown reducer 'mena'. The closest: mean.* There are: mean, max, pool:k"),
        ("poool:4", (8, 6, 5), MAP, "The closest: pool:k"),
        ("", (8, 6, 5), MAP, "unknown reducer ''"),
        ("mean:3", (8, 6, 5), MAP, "takes no argument"),
        ("mean", (8,), FEATURE, "needs channels at positions .* axes of the layer are .*feature"),
        ("max", (8, 6), UNKNOWN, "needs channels at positions .*axis_1"),
        ("pool:2", (17, 8), TOKENS, "needs the axes y and x"),
        ("pool", (8, 6, 5), MAP, "expected pool:k with k from 1 to 5"),
        ("pool:0", (8, 6, 5), MAP, "expected pool:k"),
        ("pool:6", (8, 6, 5), MAP, "expected pool:k with k from 1 to 5"),
        ("cls", (8, 6, 5), MAP, "needs an axis of tokens"),
        ("tokens", (8, 6, 5), MAP, "needs an axis of tokens"),
        ("tokens", (141, 8), TOKENS, "no square grid"),
        ("tokens:17", (17, 8), TOKENS, "below 17"),
        ("tokens:x", (17, 8), TOKENS, "below 17"),
        ("channels", (8, 6, 5), MAP, "expected channels:A-B"),
        ("channels:3-8", (8, 6, 5), MAP, "channels from 0 to 7"),
        ("channels:4-3", (8, 6, 5), MAP, "expected channels:A-B"),
        ("channels:1", (8, 6), UNKNOWN, "needs an axis of channels"),
        ("top", (8, 6), UNKNOWN, "needs an axis of channels"),
        ("nowhere_at_all:f", (8, 6, 5), MAP, "nowhere_at_all"),
    ],
)
def test_what_cannot_be_done_is_said(text: str, shape: tuple[int, ...], axes: tuple[str, ...], message: str) -> None:
    with pytest.raises(LayerError, match=message):
        reduction(text, shape, axes)


def test_a_users_function(users: types.ModuleType) -> None:
    users.norms = lambda x: x.flatten(2).norm(dim=2)
    users.twice = lambda x: 2 * x
    users.gram = lambda x: torch.einsum("bchw,bdhw->bcd", x, x)
    users.view = lambda x: x[:, 0]
    for name, shape, axes in [
        ("norms", (8,), FEATURE),
        ("twice", (8, 6, 5), MAP),
        ("gram", (8, 8), UNKNOWN),
        ("view", (6, 5), UNKNOWN),
    ]:
        reduced = reduction(f"a_users_module:{name}", (8, 6, 5), MAP)
        assert (reduced.shape, reduced.axes, reduced.stores) == (shape, axes, True)
        batch = rows(8, 6, 5)
        expected = getattr(users, name)(batch).clone()
        got = reduced.apply(batch)
        batch.zero_()
        assert torch.equal(got, expected)


def test_a_users_function_that_does_not_keep_the_rows(users: types.ModuleType) -> None:
    users.total = lambda x: x.sum()
    users.turned = lambda x: x.movedim(1, 0)
    users.array = lambda x: x.numpy()
    users.complex = torch.fft.fft
    users.broken = lambda x: x.reshape(1, 2, 3)
    for name, message in [
        ("total", r"expected a real tensor \(2, …\)"),
        ("turned", r"expected a real tensor \(2, …\)"),
        ("array", "got ndarray"),
        ("complex", "complex"),
        ("broken", r"raised RuntimeError for zeros of shape \(2, 8, 6, 5\)"),
    ]:
        with pytest.raises(LayerError, match=message):
            reduction(f"a_users_module:{name}", (8, 6, 5), MAP)
