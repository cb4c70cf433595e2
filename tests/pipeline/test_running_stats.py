"""Running statistics: equal to numpy on the full maps, whatever the batches, the layout, the type and the split."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fmextract.common import kernels
from fmextract.pipeline import running_stats
from fmextract.pipeline.running_stats import RunningStats
from fmextract.storage import layer_stats
from fmextract.storage.layer_stats import (
    COVARIANCE,
    MOMENTS,
    NEAR_ZERO,
    TOP,
    EffectiveDimension,
    effective_dimension,
    merge,
    settled,
)

CPU = torch.device("cpu")
BELOW = float(np.float32(1.2))
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
    stats = RunningStats(tuple(rows.shape[1:]), axes, top, CPU, options.get("near_zero", BELOW))
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
    out: dict[str, list[Any]] = {name: [] for name in (*MOMENTS, NEAR_ZERO, *TOP)}
    for channel in range(full.shape[1]):
        values = full[numbers, channel]
        good = values[np.isfinite(values)]
        some = good if len(good) else np.array([np.nan])
        found = (
            *(len(good), some.mean(), some.std(), some.min(), some.max()),
            *((good == 0).mean() if len(good) else np.nan, values.size - len(good)),
            (np.abs(good) <= BELOW).mean() if len(good) else np.nan,
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
        for name, value in zip((*MOMENTS, NEAR_ZERO), found, strict=True):
            out[name].append(value)
        for name, column in zip(TOP, zip(*entries, strict=True), strict=True):
            out[name].append(column)
    return {name: np.array(values) for name, values in out.items()} | covariance(full[numbers])


def covariance(maps: np.ndarray) -> dict[str, np.ndarray]:
    """COVARIANCE of maps (n, channels, positions), of the images without a value that is not finite."""
    vectors = maps[np.isfinite(maps).all((1, 2))].mean(2)
    channels = maps.shape[1]
    found = np.full((channels, channels), np.nan), np.full(channels, np.nan)
    if len(vectors):
        found = np.cov(vectors.T, bias=True).reshape(channels, channels), vectors.mean(0)
    return dict(zip(COVARIANCE, (*found, np.full(channels, len(vectors))), strict=True))


def check(got: dict[str, np.ndarray], expected: dict[str, np.ndarray], rtol: float = 1e-12) -> None:
    assert list(got) == list(expected)
    for name, values in expected.items():
        assert got[name].dtype == (np.int64 if values.dtype.kind == "i" else np.float64), name
        scale = np.nanmax(np.abs([expected["max"], expected["min"]]), initial=0)
        if name in ("covariance", "covariance_mean"):
            room = scale**2 if name == "covariance" else scale
            np.testing.assert_allclose(got[name], values, rtol=max(rtol, 1e-11), atol=1e-14 * room, err_msg=name)
        elif name in ("mean", "std"):
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
        "kernels": draw(st.booleans()),
    }


@settings(deadline=None, max_examples=100)
@given(case=cases(), size=st.sampled_from([1, 7, 40, 1 << 17]), at_once=st.sampled_from([1, 3, 256]))
def test_equal_to_numpy_whatever_the_batches(case: dict[str, Any], size: int, at_once: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running_stats, "_CPU_BLOCK", size)
        patch.setattr(running_stats, "_DEVICE_BLOCK", size)
        patch.setattr(running_stats, "_COVARIANCE_ROWS", at_once)
        patch.setattr(running_stats, "_COLUMNS", at_once)
        if not case["kernels"]:
            patch.setattr(kernels, "_library", None)
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


@pytest.mark.parametrize("ask", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_rows_are_left_as_they_were(dtype: torch.dtype, ask: bool) -> None:
    rows = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype) + 9
    rows[3, 1] = torch.nan
    before = rows.clone()
    running(rows, ("channel", "y", "x"), cuts=[2], ask=ask).result()
    assert torch.equal(rows.view(torch.uint8), before.view(torch.uint8))


def test_without_top_there_are_no_entries() -> None:
    result = running(torch.ones(3, 2), ("feature",), top=0, cuts=[1]).result()
    assert tuple(result) == (*MOMENTS, NEAR_ZERO, *COVARIANCE)
    assert tuple(merge([result, result])) == (*MOMENTS, NEAR_ZERO, *COVARIANCE)


def test_merging_keeps_as_many_places_as_are_sure() -> None:
    parts = [running(torch.rand(5, 2), ("feature",), top=k, first=i).result() for k, i in ((4, 0), (2, 5))]
    assert merge(parts)["top_value"].shape == (2, 2)


# ----------------------------------------------------------------------------------------------- effective dimension


def participation(vectors: np.ndarray) -> float:
    """(sum λ)² / sum λ² by numpy's eigenvalues."""
    found = np.linalg.eigvalsh(np.cov(vectors.T))
    return float(found.sum() ** 2 / (found**2).sum())


def dimension(rows: torch.Tensor, axes: tuple[str, ...], **options: Any) -> EffectiveDimension:
    found = effective_dimension(running(rows, axes, 0, **options).result())
    assert found is not None
    return found


@pytest.mark.parametrize(("shape", "axes"), [one for one in LAYOUTS if one[0] != (1, 1, 1)])
def test_the_effective_dimension_is_that_of_numpys_eigenvalues(shape: tuple[int, ...], axes: tuple[str, ...]) -> None:
    random = np.random.default_rng(0)
    rows = random.normal(size=(700, *shape)) * random.lognormal(size=shape) + 100
    rows[[3, 400]] = np.nan
    rows[500].flat[0] = np.inf
    valid = [i != 600 for i in range(700)]
    found = dimension(torch.from_numpy(rows), axes, cuts=[7, 300, 301], valid=valid)
    good = np.array([i for i in range(700) if i not in (3, 400, 500, 600)])
    role = 1 + axes.index("channel" if "channel" in axes else "feature")
    others = tuple(axis for axis in range(1, rows.ndim) if axis != role)
    exact = participation(rows[good].mean(others))
    assert found == EffectiveDimension(pytest.approx(exact, rel=1e-10), len(good), False)
    assert 1 < exact < rows.shape[role]


def test_an_effective_dimension_that_nothing_is_known_of_is_nan() -> None:
    rows = torch.randn(40, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    for some in (rows[:1], torch.full_like(rows, torch.nan), rows[:1].expand(40, -1, -1, -1)):
        assert math.isnan(dimension(some, ("channel", "y", "x"), cuts=[3]).value)
    found = dimension(rows[:2], ("channel", "y", "x"))
    assert found == EffectiveDimension(pytest.approx(1.0, rel=1e-12), 2, False)  # of two images there is one direction


def test_identical_images_have_no_dimension_over_shards_either() -> None:
    rows = torch.rand(1, 6, 3, 3, generator=torch.Generator().manual_seed(0)).expand(9, -1, -1, -1)
    parts = [running(rows[i : i + 3], ("channel", "y", "x"), 0, first=i).result() for i in (0, 3, 6)]
    assert math.isnan(effective_dimension(merge(parts)).value)


def spectra(channels: int, rows: int = 300) -> dict[str, np.ndarray]:
    """Rows of many channels: as many directions as there are rows, few, many of falling size, channels apart."""
    random = np.random.default_rng(0)

    def mixed(sizes: np.ndarray) -> np.ndarray:
        return random.normal(size=(rows, len(sizes))) * sizes @ random.normal(size=(len(sizes), channels))

    return {
        "white": random.normal(size=(rows, channels)),
        "few": mixed(np.ones(5)),
        "falling": mixed(np.arange(1, 200) ** -0.5),
        "one": mixed(np.ones(1)),
        "relu": np.maximum(random.normal(size=(rows, channels)) * random.lognormal(size=channels), 0),
    }


@pytest.mark.parametrize(("channels", "most"), [(1030, 0.005), (2048, 0.1), (5000, 0.15)])
def test_of_many_channels_the_effective_dimension_is_estimated_within_a_bound(channels: int, most: float) -> None:
    for name, rows in spectra(channels).items():
        found = dimension(torch.from_numpy(rows), ("feature",), cuts=[100, 290])
        rows = rows - rows.mean(0)
        gram = rows @ rows.T  # the same eigenvalues, in a smaller matrix
        exact = np.trace(gram) ** 2 / (gram**2).sum()
        assert found.estimated
        assert found.rows == len(rows)
        assert found.value == pytest.approx(exact, rel=1e-9 if name == "one" else most), name


def test_the_estimate_is_unbiased(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the mean over many foldings, of 45 channels into 10 components, both traces are the exact ones."""
    monkeypatch.setattr(layer_stats, "MOST_COMPONENTS", 10)
    random = np.random.default_rng(0)
    rows = np.maximum(random.normal(size=(30, 7)) @ random.normal(size=(7, 45)), 0) * random.lognormal(size=45)
    rows -= rows.mean(0)
    covariance = rows.T @ rows / len(rows)
    exact = (covariance**2).sum(), np.trace(covariance) ** 2
    estimates = []
    for seed in range(20_000):
        some = np.random.default_rng(seed)
        padded = np.zeros((30, 50))
        padded[:, :45] = rows[:, some.permutation(45)] * some.choice([-1, 1], 45)
        folded = padded.reshape(30, 5, 10).sum(1)
        s = folded.T @ folded / len(rows)
        estimates.append(layer_stats._unfolded((s**2).sum(), np.trace(s) ** 2, (np.diag(s) ** 2).sum(), 45))
    means, errors = np.mean(estimates, 0), np.std(estimates, 0) / math.sqrt(len(estimates))
    assert (np.abs(means - exact) < 4 * errors).all()
    assert (errors < 0.02 * np.array(exact)).all()


def test_the_folding_never_changes() -> None:
    """Shards of one run, made by other versions on other machines, are merged component by component."""
    order, signs = layer_stats.folding(1500)
    assert sorted(order) == list(range(1500))
    assert order[:5].tolist() == [471, 9, 1499, 54, 1411]
    assert signs[:5].tolist() == [-1.0, 1.0, -1.0, 1.0, -1.0]


def test_what_an_earlier_version_did_not_keep_is_left_out_of_the_whole() -> None:
    rows = torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    new = running(rows, ("channel", "y", "x"), 2).result()
    old = {name: values for name, values in new.items() if name in (*MOMENTS, *TOP)}
    for parts in ([old, old], [new, old], [old, new]):
        merged = merge(parts)
        assert tuple(merged) == (*MOMENTS, *TOP)
        assert effective_dimension(merged) is None
        assert settled(merged) == (merged, {})
    kept, attrs = settled(merge([new, new]))
    assert tuple(kept) == (*MOMENTS, NEAR_ZERO, *TOP)
    assert EffectiveDimension.of_attrs(attrs) == effective_dimension(merge([new, new]))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("how", ["contiguous", "channels_last"])
def test_what_lies_below_zero_may_come_late_or_in_a_later_block(
    how: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(kernels, "_library", None)
    rows = torch.randn(6, 8, 60, 60, generator=torch.Generator().manual_seed(0)).relu_()
    rows[3, 5, 59] = -5.0  # far from zero, and not above the bound either
    rows[5, 2, 7] = -BELOW / 2
    rows = laid_out(rows, how)
    with mock.patch.object(running_stats, "_CPU_BLOCK", 1 << 12):
        check(running(rows, ("channel", "y", "x"), cuts=[2, 4]).result(), brute(rows, ("channel", "y", "x"), 3))


def test_more_values_of_a_map_than_float32_counts() -> None:
    rows = torch.zeros(1, 1, (1 << 24) + 3, dtype=torch.float16)
    assert running(rows, ("channel", "x"), top=0).result()["zero_fraction"] == 1.0


def test_a_view_that_is_negated_when_it_is_read() -> None:
    rows = torch._neg_view(torch.randn(4, 8, 64, 64))
    check(running(rows, ("channel", "y", "x")).result(), brute(rows.resolve_neg(), ("channel", "y", "x"), 3))


def test_without_a_threshold_nothing_is_near_zero() -> None:
    assert NEAR_ZERO not in running(torch.ones(3, 2), ("feature",), near_zero=None).result()


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
    stats = RunningStats((16, 14, 14), ("channel", "y", "x"), 9, device, BELOW)
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
    code = "import sys, fmextract.storage.layer_stats; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
