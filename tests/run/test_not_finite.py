"""NaN and infinities in a layer: stored as they are, counted, told, left out of errors, and in no JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import Notes, extract, make_photos
from torch import nn

from fmextract.cli import app
from fmextract.common import strict_json
from fmextract.common.relative_error import relative_error
from fmextract.reading import activations
from fmextract.run import autotune


class Odd(nn.Module):
    """Behind a convolution with a batch norm: a log of negatives, a masked softmax, a row without a value."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.more = nn.Conv2d(4, 4, 3, padding=1)
        self.log, self.softmax, self.all_masked, self.none = (nn.Identity() for _ in range(4))
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x))
        self.log(x.log())
        masked = x.masked_fill(x < 0, -math.inf)
        self.softmax(masked)
        self.all_masked(torch.full_like(x, -math.inf).softmax(1))
        self.none(torch.zeros_like(x))
        return self.more(x)  # type: ignore[no-any-return]


NAMES = ["log", "softmax", "all_masked", "none", "more"]


def strictly(said: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in JSON")

    return json.loads(said, parse_constant=refuse)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "auto"])
@pytest.mark.parametrize("fusing", [1, 400])
@pytest.mark.parametrize("memory_format", ["channels_last", "contiguous"])
def test_layers_that_are_not_finite_are_stored(
    kind: str, fusing: int, memory_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autotune, "FUSING_PAYS", fusing)
    photos, notes, out = make_photos(tmp_path / "photos", 4), Notes(), tmp_path / "acts"
    options = {"precision": kind, "layers": NAMES, "memory_format": memory_format, "notes": notes}
    result = extract(photos, out, model=Odd(), **options)
    assert "of the sample are not finite, in fp32 already" in notes
    assert "layer 'all_masked' holds 1,024 values that are not finite" in notes
    assert not any("nan" in note or "inf%" in note for note in notes.notes)
    strictly(strict_json.dumps(result.as_json()))
    for path in out.glob("*.json"):
        strictly(path.read_text())
    with activations.open(out) as acts:
        assert np.isnan(acts["all_masked"][:]).all()
        assert np.isneginf(acts["softmax"][:]).any()
        errors = {name: acts[name].spec.rel_error for name in NAMES}
    assert errors["all_masked"] is None
    assert all(0.0 <= errors[name] < 0.1 for name in ("log", "softmax", "more"))
    assert errors["none"] == 0.0


def test_every_json_of_the_command_line_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "odd.py").write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_not_finite import Odd as make\n"
    )
    photos, out = make_photos(tmp_path / "photos", 4), tmp_path / "acts.h5"
    shape = ["--preprocess", "size=8,crop=8,mean=0.5,std=0.5", "--device", "cpu"]
    run = [str(photos), "-m", f"{tmp_path / 'odd.py'}:make", *shape, "-o", str(out), "--json"]
    for name in NAMES:
        run += ["-l", name]
    for command in (["plan", *run, "--precision", "bf16"], ["extract", *run, "--precision", "bf16"]):
        assert app.main(command) == 0
        strictly(capsys.readouterr().out)
    assert app.main(["extract", *run, "--precision", "fp32", "-o", str(tmp_path / "b.h5")]) == 0
    capsys.readouterr()
    for command in (["info", str(out)], ["verify", str(out)], ["compare", str(out), str(tmp_path / "b.h5")]):
        app.main([*command, "--json"])
        strictly(capsys.readouterr().out)
    assert app.main(["export", str(out), "--to", "npy", "-o", str(tmp_path / "exported")]) == 0
    for path in tmp_path.rglob("*.json"):
        strictly(path.read_text())


def test_errors_are_those_of_what_is_finite_in_both() -> None:
    exact = torch.tensor([1.0, torch.nan, torch.inf, 2.0, -torch.inf, 2.0])
    rough = torch.tensor([1.0, 5.0, torch.inf, 2.0, torch.nan, 2.3])
    assert relative_error(rough, exact) == pytest.approx(0.1, rel=1e-5)
    assert relative_error(rough, torch.full((6,), torch.nan)) is None
    assert relative_error(rough[:1], torch.zeros(1)) == math.inf
    assert relative_error(torch.zeros(1), torch.zeros(1)) == 0.0
    assert relative_error(torch.zeros(2), torch.zeros(2, dtype=torch.int64)) is None


class Zeros(nn.Module):
    """What is zero in fp32 and rounding in half precision."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.rest = nn.Conv2d(3, 4, 3), nn.Identity()
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.conv(x)
        with torch.autocast("cpu", enabled=False):
            exact = nn.functional.conv2d(x, self.conv.weight, self.conv.bias)
        return self.rest(made.float() - exact)  # type: ignore[no-any-return]


def test_a_layer_of_zeros_has_no_relative_error(tmp_path: Path) -> None:
    options = {"model": Zeros(), "layers": ["rest"], "memory_format": "contiguous"}
    for kind, error in (("bf16", None), ("fp32", 0.0), ("auto", 0.0)):
        extract(make_photos(tmp_path / kind, 4), tmp_path / f"{kind}.h5", precision=kind, **options)
        with activations.open(tmp_path / f"{kind}.h5") as acts:
            assert acts["rest"].spec.rel_error == error


def test_json_holds_null_for_what_is_not_finite() -> None:
    odd = {"a": math.nan, 1: [np.float32(np.inf), (np.int64(3), -math.inf)], "b": np.array([1.0, np.nan])}
    assert strictly(strict_json.dumps(odd)) == {"a": None, "1": [None, [3, None]], "b": [1.0, None]}
    with pytest.raises(TypeError):
        strict_json.dumps({"a": object()})
