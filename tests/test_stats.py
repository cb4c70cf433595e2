"""Running statistics: equal to numpy on the full maps, whatever the batches, the layout, the type and the split."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fmextract import stats as module
from fmextract.stats import MOMENTS, TOP, RunningStats, merge

CPU = torch.device("cpu")
LAYOUTS = [
    ((3, 4, 5), ("channel", "y", "x")),
    ((4, 5, 3), ("y", "x", "channel")),
    ((3, 2, 2, 3), ("channel", "time", "y", "x")),
    ((7, 3), ("token", "feature")),
    ((5,), ("feature",)),
    ((1, 1, 1), ("channel", "y", "x")),
]


def running(
    rows: torch.Tensor, axes: tuple[str, ...], top: int = 3, cuts: list[int] | None = None, **options: Any
) -> RunningStats:
    """Statistics of `rows`, given in batches that end at `cuts`."""
    first, valid, ask = options.get("first", 0), options.get("valid"), options.get("ask", True)
    stats = RunningStats(tuple(rows.shape[1:]), axes, top, CPU)
    stats._may_ask = ask
    edges = [0, *sorted(cuts or []), len(rows)]
    for a, b in itertools.pairwise(edges):
        stats.update(rows[a:b], first + a, None if valid is None else valid[a:b])
    return stats


def brute(
    rows: torch.Tensor, axes: tuple[str, ...], top: int, first: int = 0, valid: list[bool] | None = None
) -> dict[str, np.ndarray]:
    """The same in numpy, from the whole array in float64 and with plain loops."""
    role = "channel" if "channel" in axes else "feature"
    others = [a for a in axes if a != role]
    full = np.moveaxis(rows.double().numpy(), 1 + axes.index(role), 1)
    sizes = full.shape[2:] or (1,)
    full = full.reshape(*full.shape[:2], math.prod(sizes))
    numbers = [i for i in range(len(rows)) if valid is None or valid[i]]
    out: dict[str, list[Any]] = {name: [] for name in (*MOMENTS, *TOP)}
    for channel in range(full.shape[1]):
        values = full[numbers, channel]
        good = values[np.isfinite(values)]
        some = good if len(good) else np.array([np.nan])
        moments = (
            *(len(good), some.mean(), some.std(), some.min(), some.max()),
            *((good == 0).mean() if len(good) else np.nan, values.size - len(good)),
        )
        entries = []
        for i in numbers:
            finite = np.where(np.isfinite(full[i, channel]), full[i, channel], -np.inf)
            if finite.max() > -np.inf:
                place = dict(zip(others, np.unravel_index(finite.argmax(), sizes), strict=False))
                at = place.get("y", place.get("token", -1)), place.get("x", -1)
                entries.append((finite.max(), first + i, *at))
        entries.sort(key=lambda entry: (-entry[0], entry[1]))
        entries = (entries + [(np.nan, -1, -1, -1)] * top)[:top]
        for name, value in zip(MOMENTS, moments, strict=True):
            out[name].append(value)
        for name, column in zip(TOP, zip(*entries, strict=True), strict=True):
            out[name].append(column)
    return {name: np.array(values) for name, values in out.items()}


def check(got: dict[str, np.ndarray], expected: dict[str, np.ndarray], rtol: float = 1e-12) -> None:
    assert list(got) == list(expected)
    for name, values in expected.items():
        assert got[name].dtype == (np.int64 if values.dtype.kind == "i" else np.float64), name
        if name in ("mean", "std"):
            scale = np.nanmax(np.abs([expected["max"], expected["min"]]), initial=0)
            np.testing.assert_allclose(got[name], values, rtol=rtol, atol=1e-14 * scale, err_msg=name)
        else:
            np.testing.assert_array_equal(got[name], values, err_msg=name)


def laid_out(rows: torch.Tensor, how: str) -> torch.Tensor:
    """The same values in other memory."""
    if how == "channels_last" and rows.ndim > 2:
        return rows.movedim(1, -1).contiguous().movedim(-1, 1)
    if how == "strided":
        return torch.stack([rows, rows], -1)[..., 0]
    return rows


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    shape, axes = draw(st.sampled_from(LAYOUTS))
    n = draw(st.integers(0, 9))
    dtype = draw(
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.uint8])
    )
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    # Few distinct values: ties, zeros and constant channels are the rule.
    values = generator.choice([-2.5, -0.0, 0.0, 1.0, 1.5, 3.0, 7.25], size=(n, *shape))
    if draw(st.booleans()):
        values = generator.normal(size=(n, *shape)) + draw(st.sampled_from([0.0, 100.0]))
    if dtype.is_floating_point and draw(st.booleans()):
        share = draw(st.sampled_from([0.05, 0.5, 1.0]))
        bad = generator.choice([np.nan, np.inf, -np.inf], size=values.shape)
        values = np.where(generator.random(values.shape) < share, bad, values)
    rows = torch.from_numpy(np.abs(values) if dtype == torch.uint8 else values).to(dtype)
    return {
        "rows": laid_out(rows, draw(st.sampled_from(["plain", "channels_last", "strided"]))),
        "axes": axes,
        "top": draw(st.sampled_from([1, 3, 12])),
        "cuts": draw(st.lists(st.integers(0, n), max_size=3)),
        "valid": draw(st.none() | st.lists(st.booleans(), min_size=n, max_size=n)),
        "first": draw(st.sampled_from([0, 10**9])),
        "ask": draw(st.booleans()),
    }


@settings(deadline=None, max_examples=100)
@given(case=cases(), size=st.sampled_from([1, 7, 40, 1 << 17]))
def test_equal_to_numpy_whatever_the_batches(case: dict[str, Any], size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CPU_BLOCK", size)
        patch.setattr(module, "_DEVICE_BLOCK", size)
        got = running(**case).result()
    check(got, brute(case["rows"], case["axes"], case["top"], case["first"], case["valid"]))


@settings(deadline=None, max_examples=50)
@given(case=cases(), order=st.randoms(use_true_random=False))
def test_merging_equals_one_run(case: dict[str, Any], order: Any) -> None:
    rows, axes, top, first, valid = (case[name] for name in ("rows", "axes", "top", "first", "valid"))
    edges = [0, *sorted(case["cuts"]), len(rows)]
    parts = [
        running(rows[a:b], axes, top, first=first + a, valid=None if valid is None else valid[a:b]).result()
        for a, b in itertools.pairwise(edges)
    ]
    order.shuffle(parts)
    check(merge(parts), brute(rows, axes, top, first, valid), rtol=1e-9)
    check(merge([merge(parts[:2]), *parts[2:]]), merge(parts), rtol=1e-9)


def test_a_large_offset_leaves_the_deviation_exact() -> None:
    rows = 1e6 + 1e-3 * torch.randn(40, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = brute(rows, ("channel", "y", "x"), 2)
    got = running(rows, ("channel", "y", "x"), 2, cuts=[8, 16, 33]).result()
    np.testing.assert_allclose(got["std"], expected["std"], rtol=1e-6)  # x itself is known to 1e-10 / 1e-3
    np.testing.assert_allclose(got["mean"], expected["mean"], rtol=1e-15)
    parts = [running(rows[i : i + 10], ("channel", "y", "x"), 2, first=i).result() for i in range(0, 40, 10)]
    np.testing.assert_allclose(merge(parts)["std"], expected["std"], rtol=1e-6)


def test_a_large_offset_in_float32_and_an_unlucky_first_batch() -> None:
    rows = 1e6 + torch.randn(40, 2, 9, 9, generator=torch.Generator().manual_seed(0))
    rows[0] = 0.0
    rows[:8, 1] = torch.nan
    check(running(rows, ("channel", "y", "x"), 2, cuts=[8, 16]).result(), brute(rows, ("channel", "y", "x"), 2), 1e-9)


def test_a_constant_channel_has_no_deviation() -> None:
    got = running(torch.full((6, 2, 3, 3), 0.1), ("channel", "y", "x"), cuts=[2]).result()
    np.testing.assert_array_equal(got["std"], 0.0)
    np.testing.assert_array_equal(got["mean"], np.float64(np.float32(0.1)))
    np.testing.assert_array_equal(got["top_sample"], [[0, 1, 2]] * 2)
    np.testing.assert_array_equal(got["top_y"], 0)


def test_the_first_rows_with_nonfinite_values_are_named() -> None:
    rows = torch.zeros(40, 2, 3, 3)
    rows[5, 1, 0, 0], rows[6, 0, 2, 2], rows[30] = torch.nan, torch.inf, -torch.inf
    for ask in (True, False):
        valid = [i != 6 for i in range(40)]
        stats = running(rows, ("channel", "y", "x"), cuts=[10, 20], first=100, valid=valid, ask=ask)
        assert stats.nonfinite_rows() == [105, 130]
        assert stats.result()["nonfinite"].tolist() == [9, 10]
    rows[:] = torch.nan
    assert running(rows, ("channel", "y", "x"), cuts=[10]).nonfinite_rows() == list(range(8))


def test_without_top_there_are_no_entries() -> None:
    result = running(torch.ones(3, 2), ("feature",), top=0, cuts=[1]).result()
    assert tuple(result) == MOMENTS
    assert tuple(merge([result, result])) == MOMENTS


def test_merging_keeps_as_many_places_as_are_sure() -> None:
    parts = [running(torch.rand(5, 2), ("feature",), top=k, first=i).result() for k, i in ((4, 0), (2, 5))]
    assert merge(parts)["top_value"].shape == (2, 2)


def test_bools_count_as_numbers() -> None:
    rows = torch.tensor([[[True, False]], [[False, False]]])
    check(running(rows, ("feature", "token"), 2).result(), brute(rows, ("feature", "token"), 2))


class _NoQuestions(TorchDispatchMode):
    """Refuse every operation whose result the host has to wait for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        waits = {"_local_scalar_dense", "nonzero", "_unique2", "masked_select", "equal", "is_nonzero"}
        assert name not in waits, f"{name} waits for the device"
        if name in ("index", "index_put_"):
            assert all(i is None or i.dtype == torch.int64 for i in args[1]), "a mask as index waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("shape", "axes"), LAYOUTS)
def test_an_accelerator_is_never_asked(shape: tuple[int, ...], axes: tuple[str, ...]) -> None:
    rows = torch.randn(6, *shape)
    rows[1] = torch.nan
    with _NoQuestions():
        stats = running(rows, axes, 4, cuts=[3], valid=[True] * 4 + [False] * 2, ask=False)
    check(stats.result(), brute(rows, axes, 4, valid=[True] * 4 + [False] * 2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_accelerator_gives_what_the_cpu_gives(dtype: torch.dtype) -> None:
    device = torch.accelerator.current_accelerator(check_available=True)
    assert device is not None
    rows = torch.relu(torch.randn(64, 16, 14, 14)).to(dtype)
    rows[3, 2, 1, 1] = torch.inf
    stats = RunningStats((16, 14, 14), ("channel", "y", "x"), 9, device)
    for i in range(0, 64, 16):
        stats.update(rows[i : i + 16].to(device, memory_format=torch.channels_last), i, [j != 3 for j in range(16)])
    rtol = 1e-5 if device.type == "mps" else 1e-12
    check(stats.result(), brute(rows, ("channel", "y", "x"), 9, valid=[j % 16 != 3 for j in range(64)]), rtol)


def test_what_is_not_understood_is_refused() -> None:
    with pytest.raises(ValueError, match="expected an axis 'channel' or 'feature'"):
        RunningStats((3, 4), ("axis_1", "axis_2"), 3, CPU)
    stats = running(torch.ones(4, 2), ("feature",))
    with pytest.raises(ValueError, match="expected rows of shape"):
        stats.update(torch.ones(4, 3), 4)
    with pytest.raises(ValueError, match="expected rows from 4 on, got row 2"):
        stats.update(torch.ones(4, 2), 2)
    with pytest.raises(ValueError, match="no statistics"):
        merge([])
    with pytest.raises(ValueError, match="the same channels"):
        merge([stats.result(), running(torch.ones(4, 3), ("feature",)).result()])


def test_merging_needs_no_torch() -> None:
    code = "import sys, fmextract.moments; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
