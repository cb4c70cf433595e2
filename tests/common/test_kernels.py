"""The compiled loops: equal to numpy for every type, layout and size, also where a tile or a block is not full."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fmextract.common import kernels
from fmextract.storage import codecs

ROOT = Path(__file__).parents[2]
NEAR = float(np.float32(0.3))
SIZES = [
    *itertools.product((1, 2), (1, 3, 63, 64, 65, 130), (1, 2, 15, 16, 17, 49)),
    (1, 2, 16 * 1024 + 5),
    (1, 5, 2051),
    (3, 1, 1),
]


compiled = pytest.mark.skipif(not kernels.are_there(), reason="fmextract was installed without a C compiler")


def test_they_are_compiled_where_there_is_a_compiler() -> None:
    assert kernels.are_there() or not any(map(shutil.which, ("cc", "gcc", "clang")))


def test_without_them_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_library", None)
    assert not kernels.are_there()
    assert kernels.moments(np.ones((1, 2, 3), np.float32), None, None) is None
    assert kernels.places(np.ones((1, 2, 3), np.float32), np.zeros(1, int), np.zeros(1, int), np.ones(1)) is None
    assert not kernels.byte_planes(np.ones((1, 2, 3), np.float32), np.empty((4, 6), np.uint8))
    assert not codecs.takes_channels_last("gzip")


def lying(values: np.ndarray, how: str) -> np.ndarray:
    """`values` (images, channels, positions) in other memory."""
    if how == "channels_last":
        return np.ascontiguousarray(values.transpose(0, 2, 1)).transpose(0, 2, 1)
    if how == "some of more channels, last":
        return lying(np.concatenate([values, values], 1), "channels_last")[:, : values.shape[1]]
    if how == "every second image":
        return np.repeat(values, 2, 0)[::2]
    return values


def in_bfloat16(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(bit patterns, what they stand for)."""
    rounded = torch.from_numpy(values).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16), rounded.float().numpy()


@compiled
@pytest.mark.parametrize("how", ["contiguous", "channels_last", "some of more channels, last", "every second image"])
@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
def test_moments(how: str, bfloat16: bool, shifted: bool) -> None:
    generator = np.random.default_rng(0)
    for shape in SIZES:
        values = generator.normal(size=shape).astype(np.float32)
        values[generator.random(shape) < 0.3] = 0.0
        values = lying(values, how)
        values, given = in_bfloat16(values)[::-1] if bfloat16 else (values, values)
        shift = generator.normal(size=(shape[1], 2))[:, 0] if shifted else None
        found = kernels.moments(lying(given, how), shift, NEAR)
        assert found is not None
        wide = values.astype(np.float64)
        off = wide if shift is None else wide - shift[:, None]
        np.testing.assert_allclose(found.sums, off.sum(2), rtol=1e-12, atol=1e-11)
        np.testing.assert_allclose(found.squares, (off**2).sum((0, 2)), rtol=1e-12)
        np.testing.assert_array_equal(found.peaks, wide.max(2))
        np.testing.assert_array_equal(found.low, wide.min((0, 2)))
        np.testing.assert_array_equal(found.zeros, (values == 0).sum((0, 2)))
        np.testing.assert_array_equal(found.near, (np.abs(values) <= np.float32(NEAR)).sum((0, 2)))


@compiled
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("how", ["contiguous", "channels_last"])
def test_moments_are_of_finite_values_alone(bad: float, how: str) -> None:
    for at in itertools.product((0, 1), (0, 64), (0, 16, 18)):
        values = np.ones((2, 65, 19), np.float32)
        values[at] = bad
        assert kernels.moments(lying(values, how), None, None) is None
        assert kernels.moments(lying(in_bfloat16(values)[0], how), None, None) is None


@compiled
def test_moments_of_the_largest_values() -> None:
    values = np.full((1, 1, 100), np.finfo(np.float32).max, np.float32)
    found = kernels.moments(values, None, None)
    assert found is not None
    assert found.sums == pytest.approx(100 * float(values[0, 0, 0]), rel=1e-14)
    assert np.isfinite(found.squares).all()
    assert found.near == 0


@pytest.mark.parametrize(
    "other",
    [
        np.ones((1, 2, 3)),
        np.ones((1, 2, 3), np.int32),
        np.ones((0, 2, 3), np.float32),
        np.ones((1, 4, 6), np.float32)[:, ::2, ::2],
    ],
)
def test_moments_of_anything_else_are_left_to_others(other: np.ndarray) -> None:
    assert kernels.moments(other, None, None) is None


@compiled
@pytest.mark.parametrize("how", ["contiguous", "channels_last", "every second image"])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_places(how: str, bfloat16: bool) -> None:
    generator = np.random.default_rng(0)
    for shape in SIZES:
        values = generator.integers(-3, 4, shape).astype(np.float32)  # exact in bfloat16, and seldom once in a map
        images, channels = (generator.integers(0, size, 20) for size in shape[:2])
        peaks = values.max(2)[images, channels].astype(np.float64)
        found = kernels.places(lying(in_bfloat16(values)[0] if bfloat16 else values, how), images, channels, peaks)
        np.testing.assert_array_equal(found, values[images, channels].argmax(1))
    assert kernels.places(np.ones((1, 2, 3)), np.zeros(1, int), np.zeros(1, int), np.ones(1)) is None


@compiled
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
def test_byte_planes(dtype: Any) -> None:
    generator = np.random.default_rng(0)
    for images, channels, positions in SIZES:
        values = generator.integers(0, 256, (images, positions, channels, np.dtype(dtype).itemsize), np.uint8)
        room = np.full((values.shape[-1], values[..., 0].size + 6), 7, np.uint8)
        assert kernels.byte_planes(values.view(dtype)[..., 0], room[:, 2:-4])
        expected = values.transpose(3, 0, 2, 1).reshape(values.shape[-1], -1)
        np.testing.assert_array_equal(room[:, 2:-4], expected)
        part = values.view(dtype)[..., 0][::-1, ::-1, channels // 2 :]
        apart = np.empty((values.shape[-1], part.size), np.uint8)
        assert kernels.byte_planes(part, apart)
        expected = values[::-1, ::-1, channels // 2 :].transpose(3, 0, 2, 1).reshape(values.shape[-1], -1)
        np.testing.assert_array_equal(apart, expected)
        assert (room[:, :2] == 7).all()
        assert (room[:, -4:] == 7).all()


@compiled
def test_byte_planes_refuse_what_does_not_fit() -> None:
    values = np.ones((1, 4, 6), np.float32)
    for given, planes in (
        (values[:, :, ::2], np.empty((4, 12), np.uint8)),
        (values, np.empty((4, 23), np.uint8)),
        (values, np.empty((2, 24), np.uint8)),
        (values, np.empty((4, 48), np.uint8)[:, ::2]),
        (values, np.empty((4, 24), np.int16)),
    ):
        with pytest.raises(ValueError, match="planes"):
            kernels.byte_planes(given, planes)


@compiled
@pytest.mark.parametrize("codec", ["gzip", "zstd", "lz4"])
@pytest.mark.parametrize(
    ("dtype", "stored", "options"),
    [
        ("float32", "float32", {}),
        ("float32", "float32", {"keep_bits": 7}),
        ("float32", "float16", {}),
        ("float16", "float32", {}),
        ("bfloat16", "float32", {"bfloat16": True}),
        ("bfloat16", "float32", {"bfloat16": True, "keep_bits": 3}),
        ("bfloat16", "float16", {"bfloat16": True}),
        ("int64", "int64", {}),
        ("bool", "uint8", {}),
    ],
)
def test_a_chunk_is_the_same_in_any_layout(codec: str, dtype: str, stored: str, options: dict[str, Any]) -> None:
    rows = np.random.default_rng(0).normal(size=(2, 70, 81)).astype(np.float32)
    values = in_bfloat16(rows)[0] if dtype == "bfloat16" else rows.astype(dtype)
    settings: dict[str, Any] = {"codec": codec, "level": None, "dtype": stored, "values": 3 * 70 * 81, **options}
    expected = codecs.encode([values[:1], values[1:]], **settings)
    last = lying(values, "channels_last")
    assert not last.flags.c_contiguous
    assert codecs.encode([last[:1], values[1:]], **settings) == expected
    assert codecs.encode([last], **settings) == expected
    some = lying(values, "some of more channels, last")
    assert codecs.encode([some], **settings) == expected
    spread = np.broadcast_to(values[:, :, :1].copy(), values.shape)  # as of a vector that was expanded
    assert codecs.encode([spread], **settings) == codecs.encode([spread.copy()], **settings)
