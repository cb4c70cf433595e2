"""`plan --save` and `extract --plan`: what was shown is done, for the same run, or nothing is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import OPTIONS, Notes, Tiny, extract, extract_until, make_photos
from torch import nn

import fmextract as fm
from fmextract.cli import app
from fmextract.config import Config
from fmextract.errors import ConfigError, FormatError, OutputError
from fmextract.planning import Plan
from fmextract.reading import activations
from fmextract.records import LayerSpec
from fmextract.run import autotune
from fmextract.run.extract import make_plan, run

AUTO = {**OPTIONS, "precision": "auto", "batch_size": "auto", "shard_size": None}


def planned(photos: Path, out: Path, model: nn.Module | None = None, **options: Any) -> Plan:
    return make_plan(photos, model or Tiny(), out, Config.of(**{**AUTO, **options}))


def follow(photos: Path, out: Path, plan: Any, model: nn.Module | None = None, **options: Any) -> Notes:
    notes = Notes()
    run(photos, model or Tiny(), out, Config.of(**{**AUTO, **options}), notes, plan=plan)
    return notes


def rounded(plan: Plan) -> tuple[LayerSpec, ...]:
    """Its layers, as a plan in bfloat16 has them."""
    return tuple(dataclasses.replace(layer, compute_dtype="bfloat16") for layer in plan.layers)


def decided(out: Path) -> tuple[Any, ...]:
    with activations.open(out) as acts:
        config = acts.config
        return acts.attrs["precision"], config["batch_size"], config["memory_format"], config["fused"]


def test_what_was_planned_is_done_whatever_would_be_measured_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = make_photos(tmp_path / "photos", 12)
    made = dataclasses.replace(
        planned(photos, tmp_path / "acts"), batch_size=2, shard_rows=16, memory_format="contiguous", fused=()
    )
    made = dataclasses.replace(made, precision=(other := "bf16"), prepacked=True, layers=rounded(made))
    made.save(tmp_path / "plan.json")

    def never(question: autotune.Question) -> autotune.Tuning:
        raise AssertionError("measured again")

    monkeypatch.setattr(autotune, "tune", never)
    for i, plan in enumerate((made, tmp_path / "plan.json", str(tmp_path / "plan.json"))):
        follow(photos, tmp_path / f"acts{i}", plan)
        assert decided(tmp_path / f"acts{i}") == (other, 2, "contiguous", [])
        assert len(list((tmp_path / f"acts{i}").glob("shard-*.h5"))) == 1
        with activations.open(tmp_path / f"acts{i}") as acts:
            assert acts.config["run_id"] != made.run_id
            assert acts["conv"].spec.compute_dtype == made.layers[0].compute_dtype
    again = follow(photos, tmp_path / "acts0", made)
    assert "complete already" in again


def test_values_are_those_of_the_planned_precision(tmp_path: Path) -> None:
    photos, model = make_photos(tmp_path / "photos", 4), Tiny()
    made = dataclasses.replace(planned(photos, tmp_path / "a.h5", model), precision="bf16", memory_format="contiguous")
    made = dataclasses.replace(made, layers=rounded(made))
    follow(photos, tmp_path / "a.h5", made, model)
    follow(photos, tmp_path / "b.h5", None, model, precision="bf16", memory_format="contiguous")
    with activations.open(tmp_path / "a.h5") as a, activations.open(tmp_path / "b.h5") as b:
        for name in a.layers:
            np.testing.assert_array_equal(a[name][:], b[name][:])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"layers": ["conv"]}, r"layers: \['conv', 'relu', 'fc'\] in the plan, \['conv'\] here"),
        ({"precision": "bf16"}, "precision: 'auto' in the plan, 'bf16' here"),
        ({"limit": 5}, "rows: 8 in the plan, 5 here"),
        ({"model": Tiny(seed=3)}, "weights: '"),
        ({"dtype": "float16"}, "dtype: 'float32' in the plan, 'float16' here"),
    ],
)
def test_a_plan_of_another_run_is_refused(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", 8)
    made = planned(photos, tmp_path / "acts.h5")
    with pytest.raises(ConfigError, match=f"(?s)made for another run .*{told}"):
        follow(photos, tmp_path / "acts.h5", made, **changes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]


def test_a_run_that_goes_on_or_is_there_is_that_of_the_plan(tmp_path: Path) -> None:
    photos, fixed = make_photos(tmp_path / "photos", 16), {"batch_size": 4, "shard_size": 1, "precision": "fp32"}
    made = planned(photos, tmp_path / "acts", **fixed)
    longer = dataclasses.replace(made, shard_rows=8)
    extract_until(8, photos, tmp_path / "acts")
    with pytest.raises(OutputError, match=r"by another plan \(.*shard_rows: 4 there, 8 in the plan\)"):
        follow(photos, tmp_path / "acts", longer, **fixed)
    assert "resuming" in follow(photos, tmp_path / "acts", made, **fixed)
    assert "complete already" in follow(photos, tmp_path / "acts", made, **fixed)
    rough = dataclasses.replace(made, precision="bf16", layers=rounded(made))
    with pytest.raises(OutputError, match=r"by another plan \(.*precision: 'fp32' there, 'bf16' in the plan"):
        follow(photos, tmp_path / "acts", rough, **fixed)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"precision": "bf16"}, r"conv: \('float32', \(4, 8, 8\)\) in the plan, \('bfloat16', \(4, 8, 8\)\) here"),
        ({"batch_size": 3}, "shards of 8 rows do not hold whole batches of 3"),
        ({"fused": (("conv", "relu"),)}, "does not have"),
        ({"keep_bits": 2}, "keep_bits: 2 in the plan, not set here"),
        ({"dtype": "float16"}, "dtype: 'float16' in the plan, 'float32' here"),
    ],
)
def test_a_plan_that_was_changed_by_hand_and_does_not_fit(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", 8)
    made = dataclasses.replace(planned(photos, tmp_path / "acts", precision="fp32"), shard_rows=8, batch_size=8)
    with pytest.raises((ConfigError, FormatError), match=told):
        follow(photos, tmp_path / "acts", dataclasses.replace(made, **changes), precision="fp32")
    assert not (tmp_path / "acts").exists()


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "keep_bits": lambda plan: plan.update(keep_bits=2),
    "bfloat16": lambda plan: plan.update(precision="bf16"),
    "device": lambda plan: plan.update(device="cuda:9"),
    "model": lambda plan: plan["info"].update(model="another"),
    "preprocess": lambda plan: plan["info"]["preprocess"].update(mean=[9.0, 9.0, 9.0]),
    "layers": lambda plan: plan["layers"].pop(),
    "dtype": lambda plan: plan["layers"][0].update(dtype="float16"),
    "axes": lambda plan: plan["layers"][0].update(axes=["channel", "x", "y"]),
    "offset": lambda plan: plan["layers"][0]["field"].update(offset=[7, 7]),
    "module": lambda plan: plan["layers"][0].update(module="another"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("done", [0, 8])
def test_a_plan_that_was_changed_where_it_lies_is_not_gone_on_with(tmp_path: Path, change: str, done: int) -> None:
    """Whatever it says is not what is asked for, the values of the rest among it: also where nothing is stored yet."""
    photos, out = make_photos(tmp_path / "photos", 12), tmp_path / "acts"
    extract_until(8, photos, out)
    if not done:
        for shard in out.glob("shard-*"):
            shard.unlink()
    plan = json.loads((out / "plan.json").read_text())
    CHANGES[change](plan)
    del plan["digest"]  # as in plans of earlier versions; else that shows it
    (out / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(OutputError, match=rf"plan.json is damaged or not of this run.*{change}.*--overwrite"):
        extract(photos, out)


def test_a_file_that_is_no_plan(tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", 4)
    with pytest.raises(OutputError, match="there is no file"):
        follow(photos, tmp_path / "acts", tmp_path / "nowhere.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(FormatError, match="not the plan"):
        follow(photos, tmp_path / "acts", tmp_path / "other.json")


def test_from_the_command_line_and_from_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos, plan = make_photos(tmp_path / "photos", 4), tmp_path / "kept.json"
    (tmp_path / "net.py").write_text("import torch\nmake = lambda: torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))\n")
    arguments = [str(photos), "-m", f"{tmp_path / 'net.py'}:make", "-l", "0", "--device", "cpu"]
    arguments += ["--preprocess", "size=8,crop=8,mean=0.5,std=0.5"]
    torch.manual_seed(0)
    assert app.main(["plan", *arguments, "--save", str(plan)]) == 0
    made = Plan.load(plan)
    dataclasses.replace(made, batch_size=2, shard_rows=4).save(plan)
    torch.manual_seed(0)
    assert app.main(["extract", *arguments, "-o", str(tmp_path / "acts"), "--plan", str(plan), "--dry-run"]) == 0
    assert "batch size 2" in capsys.readouterr().out
    torch.manual_seed(0)
    assert app.main(["extract", *arguments, "-o", str(tmp_path / "acts"), "--plan", str(plan)]) == 0
    assert decided(tmp_path / "acts")[1] == 2
    model = Tiny()
    options = {"layers": ["conv"], "preprocess": AUTO["preprocess"]}
    shown = fm.plan(photos, model, tmp_path / "b.h5", progress=False, **options)
    acts = fm.extract(photos, model, tmp_path / "b.h5", plan=shown, progress=Notes(), **options)
    assert acts.attrs["precision"] == shown.precision
    acts.close()
