"""Models in half, bfloat16 or double: inputs are cast to their type, values are those of the model itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import Notes, Tiny, extract, make_photos
from torch import nn

from fmextract.errors import ConfigError
from fmextract.reading import activations
from fmextract.verification import verify

LAYERS = ["conv", "fc"]
TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


@pytest.fixture
def default_double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def inputs_of(photos: Path, folder: Path) -> torch.Tensor:
    """What a run gives the model, before it is cast."""
    extract(photos, folder / "inputs.h5", model=nn.Sequential(nn.Identity()), layers=["0"])
    with activations.open(folder / "inputs.h5") as acts:
        assert acts["0"].dtype == np.float32
        return torch.from_numpy(acts["0"][:])


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("kind", ["auto", "fp32"])
def test_values_are_those_of_the_model_itself(name: str, kind: str, tmp_path: Path) -> None:
    photos, model, notes = make_photos(tmp_path / "photos", 4), Tiny().to(TYPES[name]), Notes()
    options = {"layers": LAYERS, "precision": kind, "batch_size": 4, "memory_format": "contiguous"}
    extract(photos, tmp_path / "out.h5", model=model, notes=notes, **options)
    assert f"the model is in {name}: its inputs are cast to it" in notes
    with torch.no_grad():
        inputs = inputs_of(photos, tmp_path).to(TYPES[name])
        expected = {"conv": model.conv(inputs), "fc": model(inputs)}
    with activations.open(tmp_path / "out.h5") as acts:
        assert acts.config["input_dtype"] == name
        for layer in LAYERS:
            assert acts[layer].spec.compute_dtype == name
            assert acts[layer].spec.rel_error == 0.0
            assert acts[layer].dtype == (np.float64 if name == "float64" else np.float32)
            wide = expected[layer].to(torch.float64).numpy()
            np.testing.assert_array_equal(acts[layer][:].astype(np.float64), wide)
        assert acts["conv"].axes[1:] == ("channel", "y", "x")
        assert acts["conv"].spec.field is not None
        assert acts["conv"].spec.field.size == (3.0, 3.0)
    assert {p.dtype for p in model.parameters()} == {TYPES[name]}
    again = verify(tmp_path / "out.h5", rerun=2, model=model, source=photos)
    assert (again.ok, again.largest_error) == (True, 0.0)


def test_a_model_in_half_of_which_only_a_part_is_float32(tmp_path: Path) -> None:
    """The first parameter tells what the inputs are."""

    class Mixed(Tiny):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.relu(self.conv(x)).float().mean((2, 3)))  # type: ignore[no-any-return]

    model = Mixed()
    model.conv.bfloat16()
    extract(make_photos(tmp_path / "photos", 4), tmp_path / "out.h5", model=model, layers=LAYERS, precision="auto")
    with activations.open(tmp_path / "out.h5") as acts:
        assert [acts[name].spec.compute_dtype for name in LAYERS] == ["bfloat16", "float32"]


def test_autocast_of_a_model_in_half_is_measured_against_itself(tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", 4)
    extract(photos, tmp_path / "out.h5", model=Tiny().half(), layers=LAYERS, precision="bf16")
    with activations.open(tmp_path / "out.h5") as acts:
        assert acts["conv"].spec.compute_dtype == "bfloat16"
        assert 0.0 < acts["conv"].spec.rel_error < 0.02


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float64, "bf16")])
def test_a_precision_that_changes_nothing_is_refused(dtype: torch.dtype, precision: str, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", 4)
    with pytest.raises(ConfigError, match="--precision bf16: the model is in float64, which it does not change"):
        extract(photos, tmp_path / "out.h5", model=Tiny().to(dtype), layers=LAYERS, precision=precision)


def test_another_default_type_changes_nothing(tmp_path: Path, default_double: None) -> None:
    photos, made_in_double = make_photos(tmp_path / "photos", 4), Tiny()
    options: dict[str, Any] = {"layers": [*LAYERS, "relu=mean"], "effective_fields": "always"}
    torch.set_default_dtype(torch.float32)
    model = Tiny()
    extract(photos, tmp_path / "single.h5", model=model, **options)
    torch.set_default_dtype(torch.float64)
    extract(photos, tmp_path / "double.h5", model=model, **options)
    extract(photos, tmp_path / "own.h5", model=made_in_double, layers=LAYERS)
    assert torch.get_default_dtype() == torch.float64
    with activations.open(tmp_path / "double.h5") as double, activations.open(tmp_path / "single.h5") as single:
        for name in single.layers:
            np.testing.assert_array_equal(double[name][:], single[name][:])
            assert double[name].dtype == np.float32
            assert double[name].spec == single[name].spec
            for statistic in single[name].stats.names:
                np.testing.assert_array_equal(
                    getattr(double[name].stats, statistic), getattr(single[name].stats, statistic)
                )
    with activations.open(tmp_path / "own.h5") as acts:
        assert acts["conv"].dtype == np.float64
