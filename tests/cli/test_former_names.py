"""Options that were renamed: the former names still do, and what files of before say under them is understood."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import runs

import fmextract
from fmextract.cli import main
from fmextract.config import RENAMED, Config
from fmextract.errors import ConfigError, OutputError
from fmextract.planning import Plan
from fmextract.run import packing
from fmextract.run.extract import make_plan
from fmextract.storage import writer
from fmextract.verification import verify

FORMER = {name: former for former, name in RENAMED.items()}
MODEL = f"{Path(runs.__file__)}:Tiny"
VALUES = {"decode": ("cpu", "cpu"), "store": ("float16", "float16"), "top": ("3", 3), "workers": ("1", 1)}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return runs.make_photos(tmp_path / "photos", 9)


def as_before(value: Mapping[str, Any]) -> dict[str, Any]:
    """Options, an identity or a plan as it was written before the names changed."""
    return {FORMER.get(name, name): one for name, one in value.items()}


@pytest.fixture
def writing_as_before(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Plans and files are written under the former names, until this is undone."""
    attrs, plan = writer._root_attrs, Plan.as_json

    def root_attrs(info: Any) -> dict[str, Any]:
        made = attrs(info)
        config = dict(made["fmextract_config"])
        config |= {part: as_before(config[part]) for part in ("options", "identity")}
        return {**made, "fmextract_config": config}

    def as_json(self: Plan) -> dict[str, Any]:
        made = plan(self)
        return as_before({**made, "config": as_before(made["config"]), "identity": as_before(made["identity"])})

    monkeypatch.setattr(writer, "_root_attrs", root_attrs)
    monkeypatch.setattr(Plan, "as_json", as_json)
    return monkeypatch


def words(photos: Path, out: Path) -> list[str]:
    fixed = ["--preprocess", "size=8,crop=8,mean=0.5,std=0.5", "--precision", "fp32", "--batch-size", "4"]
    return ["extract", str(photos), "-m", MODEL, "-l", "conv", "-o", str(out), *fixed, "--device", "cpu"]


# --------------------------------------------------------------------------------------------------- what is asked for


@pytest.mark.parametrize("former", RENAMED)
def test_a_former_name_is_taken(photos: Path, tmp_path: Path, former: str) -> None:
    given, value = VALUES[former]
    out = tmp_path / "out.h5"
    assert main([*words(photos, out), f"--{former}={given}"]) == 0
    with fmextract.open(out) as acts:
        assert acts.config["options"][RENAMED[former]] == value
        assert former not in acts.config["options"]
    assert getattr(Config.of(**{former: value}), RENAMED[former]) == value


def test_a_former_name_is_the_same_option_and_no_value(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    assert main([*words(photos, out), "--top", "3", "--top-k", "2", "--key=--top", "--store", "float16"]) == 0
    with fmextract.open(out) as acts:
        told = acts.config["options"]
    assert (told["top_k"], told["key"], told["dtype"]) == (2, "--top", "float16")


@pytest.mark.parametrize("former", RENAMED)
def test_both_keywords_are_refused(former: str) -> None:
    _, value = VALUES[former]
    name = RENAMED[former]
    with pytest.raises(ConfigError, match=f"{former} is the former name of {name}"):
        Config.of(**{former: value, name: value})


def test_the_keywords_of_before_do_in_python(photos: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {**runs.OPTIONS, "store": "float16", "top": 2}
    acts = fmextract.extract(photos, model=runs.Tiny(), out=tmp_path / "out.h5", workers=1, **without_workers(options))
    with acts:
        assert acts["conv"].dtype == "float16"
        assert acts["conv"].stats.top_value.shape == (4, 2)


def without_workers(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "num_workers"}


@pytest.mark.parametrize("command", ["extract", "plan", "bench"])
def test_help_knows_the_new_names_only(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([command, "--help"]) == 0
    said = capsys.readouterr().out.split()
    assert not {f"--{former}" for former in RENAMED} & set(said)
    assert {f"--{name.replace('_', '-')}" for name in RENAMED.values()} <= set(said)


# -------------------------------------------------------------------------------------------------- what was written so


def test_a_file_of_before_is_read_verified_and_complete(
    photos: Path, tmp_path: Path, writing_as_before: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.h5"
    options: dict[str, Any] = {"model": MODEL, "dtype": "float16", "top_k": 2}
    runs.extract(photos, out, **options)
    writing_as_before.undo()
    with fmextract.open(out) as acts:
        assert set(FORMER.values()) - {"workers"} <= set(json.loads(acts.attrs["fmextract_config"])["identity"])
        assert (acts.config["options"]["dtype"], acts.config["identity"]["top_k"]) == ("float16", 2)
    assert verify(out, rerun=3, trust=True).ok
    again = runs.Notes()
    assert runs.extract(photos, out, notes=again, **options).resumed_images == 9
    with pytest.raises(OutputError, match="dtype: 'float16' there, 'float32' now"):
        runs.extract(photos, out, **{**options, "dtype": "float32"})


def test_a_run_of_before_goes_on_and_is_packed(
    photos: Path, tmp_path: Path, writing_as_before: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    runs.extract_until(8, photos, out)
    written = json.loads((out / "plan.json").read_text())
    assert {"store", "top"} <= set(written)
    writing_as_before.undo()
    with pytest.raises(OutputError, match="top_k: 9 there, 2 now"):
        runs.extract(photos, out, top_k=2)
    assert runs.extract(photos, out, ignore=["decode"]).resumed_images >= 4
    assert verify(out).ok
    packing.pack(out, tmp_path / "one.h5")
    assert verify(tmp_path / "one.h5").ok


def test_a_plan_of_before_is_followed(photos: Path, tmp_path: Path, writing_as_before: pytest.MonkeyPatch) -> None:
    config = Config.of(**runs.OPTIONS)
    saved, out = tmp_path / "plan.json", tmp_path / "out.h5"
    make_plan(photos, MODEL, out, config, runs.Notes()).save(saved)
    assert "store" in json.loads(saved.read_text())
    writing_as_before.undo()
    assert fmextract.Plan.load(saved).dtype == "float32"
    runs.run(photos, MODEL, out, config, runs.Notes(), plan=saved)
    with fmextract.open(out) as acts:
        assert len(acts.status) == 9
