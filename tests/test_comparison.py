"""Two outputs compared: against numpy on the stored values, rows by key, layers by name, in batches."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from files import make_file, make_shards
from hypothesis import given, settings
from hypothesis import strategies as st

import fmextract as fm
from fmextract import comparison
from fmextract.cli import main
from fmextract.errors import ConfigError


def kornblith(x: np.ndarray, y: np.ndarray) -> float:
    """Linear CKA by its definition."""
    x, y = (one.reshape(len(one), -1).astype(np.float64) for one in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    cross, own_x, own_y = (np.linalg.norm(a.T @ b) for a, b in ((x, y), (x, x), (y, y)))
    return float(cross**2 / (own_x * own_y))


@given(st.integers(3, 60), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99), st.floats(0, 1e4))
@settings(max_examples=40, deadline=None)
def test_cka_is_its_definition_whatever_the_batches(n: int, p: int, q: int, seed: int, offset: float) -> None:
    random = np.random.default_rng(seed)
    x, y = random.normal(size=(n, p)) + offset, random.normal(size=(n, q))
    y[:, 0] += x[:, 0]
    cka = comparison.LinearCKA(p, q)
    for start in range(0, n, 7):
        cka.update(x[start : start + 7], y[start : start + 7])
    assert cka.result() == pytest.approx(kornblith(x, y), rel=1e-6)
    assert fm.linear_cka(x, y) == pytest.approx(kornblith(x, y), rel=1e-6)


def test_wide_features_in_one_batch_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(20, 3, 30, 30)).astype(np.float32)
    y = x + random.normal(size=x.shape)
    assert fm.linear_cka(x, y) == pytest.approx(kornblith(x, y), rel=1e-9)
    assert fm.linear_cka(x, 3 * x + 1) == pytest.approx(1)


def test_wide_features_in_many_batches_are_a_good_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "WIDEST", 8)
    monkeypatch.setattr(comparison, "BATCH_BYTES", 50 * 8 * 400)
    random = np.random.default_rng(0)
    hidden = random.normal(size=(2000, 5))
    x, y = (hidden @ random.normal(size=(5, 200)) + random.normal(size=(2000, 200)) * s for s in (0.2, 1.0))
    assert fm.linear_cka(x, y) == pytest.approx(kornblith(x, y), abs=0.02)
    unrelated = random.normal(size=(2000, 200))
    assert abs(fm.linear_cka(x, unrelated)) < 0.05


def test_cka_of_nothing_that_varies_and_of_broken_rows() -> None:
    x = np.random.default_rng(0).normal(size=(9, 4))
    assert math.isnan(fm.linear_cka(x, np.ones((9, 4))))
    broken = np.vstack([x, np.full((1, 4), np.nan)])
    assert fm.linear_cka(broken, np.vstack([x, np.ones((1, 4))])) == pytest.approx(1)
    with pytest.raises(ConfigError, match="as many rows"):
        fm.linear_cka(x, x[1:])


@given(st.integers(0, 5000), st.integers(1, 1 << 30))
def test_batches_are_all_rows_once_and_bounded(rows: int, row_bytes: int) -> None:
    made = list(comparison.batches(rows, row_bytes))
    assert [row for start, stop in made for row in range(start, stop)] == list(range(rows))
    for start, stop in made:
        assert stop - start <= max(comparison.FEWEST, comparison.BATCH_BYTES // row_bytes)


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """`b` is `a` with noise, in another order, in shards, with one image more, one less and one that failed."""
    random = np.random.default_rng(0)
    a = {
        "conv": random.normal(size=(7, 3, 4, 4)).astype(np.float32),
        "fc": random.normal(size=(7, 5)).astype(np.float32),
    }
    keys = [f"{i}.png" for i in range(7)]
    make_file(tmp_path / "a.h5", {**a, "old": a["fc"]}, keys=keys)
    order = [6, 5, 4, 3, 2, 1]
    b = {name: values[order] + 0.1 * random.normal(size=values[order].shape) for name, values in a.items()}
    b["conv"][2] += 1  # 4.png is the worst
    b = {name: np.vstack([values, values[:1]]).astype(np.float32) for name, values in b.items()}
    b["fc"][0, 0] = np.nan
    status = [0, 0, 0, 0, 0, 2, 0]
    names = [keys[i] for i in order] + ["new.png"]
    extra = {"new": b["fc"]}
    chunk = {"conv": (2, 3, 4, 4), "fc": (2, 5), "new": (2, 5)}
    make_shards(tmp_path / "b", {**b, **extra}, [4], keys=names, status=status, chunk=chunk)
    return tmp_path / "a.h5", tmp_path / "b"


def test_every_figure_is_numpys(two: tuple[Path, Path]) -> None:
    with fm.open(two[0]) as a, fm.open(two[1]) as b:
        found = fm.compare(a, b, worst=2)
        assert (found.images, found.images_only_a, found.images_only_b, found.failed) == (5, 1, 1, 1)
        assert (found.only_a, found.only_b, found.unlike) == (("old",), ("new",), ())
        conv, fc = found.layers
        keys = [f"{i}.png" for i in (2, 3, 4, 5, 6)]
        x, y = (np.stack([acts["conv"][acts.row(key)] for key in keys]).astype(np.float64) for acts in (a, b))
    assert conv.error == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x))
    each = [np.linalg.norm(q - p) / np.linalg.norm(p) for p, q in zip(x, y, strict=True)]
    assert conv.median_error == pytest.approx(np.median(each))
    assert conv.max_error == pytest.approx(max(each))
    assert [key for key, _ in conv.worst] == [keys[i] for i in np.argsort(each)[::-1][:2]]
    assert conv.worst[0][0] == "4.png"
    assert conv.cosine == pytest.approx((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))
    assert conv.cka == pytest.approx(kornblith(x, y))
    assert (conv.nonfinite, fc.nonfinite) == (0, 1)
    assert math.isfinite(fc.error)


def test_a_file_is_itself(two: tuple[Path, Path]) -> None:
    with fm.open(two[0]) as a:
        for layer in fm.compare(a, a).layers:
            assert (layer.error, layer.max_error) == (0, 0)
            assert layer.cosine == pytest.approx(1)
            assert layer.cka == pytest.approx(1)


def test_what_cannot_be_compared(two: tuple[Path, Path], tmp_path: Path) -> None:
    values = np.ones((2, 9), np.float32)
    make_file(tmp_path / "c.h5", {"fc": values})
    make_file(tmp_path / "d.h5", {"other": values}, keys=["0.png", "1.png"])
    with fm.open(two[0]) as a, fm.open(tmp_path / "c.h5") as c, fm.open(tmp_path / "d.h5") as d:
        with pytest.raises(ConfigError, match="the shapes of fc differ"):
            fm.compare(a, c)
        with pytest.raises(ConfigError, match="no layer in common: conv, fc, old; other"):
            fm.compare(a, d)
        with pytest.raises(ConfigError, match="no image in common"):
            fm.compare(c, _named_fc(tmp_path))
        with pytest.raises(ConfigError, match="no layer 'fcc'"):
            fm.compare(a, a, layers=["fcc"])


def _named_fc(folder: Path) -> fm.Activations:
    make_file(folder / "e.h5", {"fc": np.ones((1, 9), np.float32)}, keys=["else.png"])
    return fm.open(folder / "e.h5")


def test_the_command(two: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    a, b = map(str, two)
    assert main(["compare", a, b, "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert [layer["layer"] for layer in said["layers"]] == ["conv", "fc"]
    assert main(["compare", a, b, "-l", "conv", "-o", str(tmp_path / "d.png")]) == 0
    out = capfd.readouterr().out
    assert "4.png" in out
    assert "left out: old, new are layers of one only" in out
    assert (tmp_path / "d.png").stat().st_size > 5000
