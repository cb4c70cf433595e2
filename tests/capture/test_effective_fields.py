"""When effective receptive fields are measured: `--effective-fields`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Notes, Tiny, extract, make_photos

from fmextract.errors import ConfigError
from fmextract.reading import activations
from fmextract.run import make_plan


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("fields") / "photos", 4)


def measured(photos: Path, out: Path, **options: Any) -> tuple[dict[str, Any], Notes]:
    notes = Notes()
    extract(photos, out, notes=notes, **options)
    with activations.open(out) as acts:
        return {name: acts[name].attrs.get("erf_size") for name in acts.layers}, notes


def test_auto_measures_what_is_quickly_measured(photos: Path, tmp_path: Path) -> None:
    found, notes = measured(photos, tmp_path / "acts.h5")
    assert found == {"conv": 3.0, "relu": 3.0, "fc": None}  # a 3 x 3 kernel
    assert "--effective-fields" not in notes


def test_auto_leaves_out_what_would_be_much_of_the_run(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_plan, "EFFECTIVE_SECONDS", 0.0)
    found, notes = measured(photos, tmp_path / "acts.h5")
    assert set(found.values()) == {None}
    assert "--effective-fields always" in notes
    found, notes = measured(photos, tmp_path / "always.h5", effective_fields="always")
    assert found["conv"] == 3.0
    assert "--effective-fields" not in notes


class NoGradient(Tiny):
    """Its ReLU and what follows have no gradient."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.fc(self.relu(self.conv(x).detach()).mean((2, 3)))
        return made


def test_what_has_no_gradient_is_named(photos: Path, tmp_path: Path) -> None:
    found, notes = measured(photos, tmp_path / "acts.h5", model=NoGradient())
    assert found == {"conv": 3.0, "relu": None, "fc": None}
    assert "no effective receptive field of 'relu': the model has no gradient there" in notes


class WithoutGradients(Tiny):
    """Fails where a gradient is asked for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError("for inference alone")
        return super().forward(x)


def test_why_a_model_fails_for_a_gradient_is_said(photos: Path, tmp_path: Path) -> None:
    found, notes = measured(photos, tmp_path / "acts.h5", model=WithoutGradients())
    assert set(found.values()) == {None}
    assert "no effective receptive field of 'conv', 'relu': RuntimeError: for inference alone" in notes


def test_never(photos: Path, tmp_path: Path) -> None:
    found, notes = measured(photos, tmp_path / "acts.h5", effective_fields="never")
    assert set(found.values()) == {None}
    assert "--effective-fields" not in notes


def test_another_word_is_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--effective-fields"):
        extract(photos, tmp_path / "acts.h5", effective_fields="often")
