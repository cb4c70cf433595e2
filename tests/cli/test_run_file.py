"""`--config run.toml` and `plan --save-config`: the same run as with the options on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs

import fmextract
from fmextract.cli import main, run_file
from fmextract.config import Config
from fmextract.errors import ConfigError, OutputError

MODEL = f"{Path(runs.__file__)}:Tiny"
RUN = f"""
model = "{MODEL}"
layers = ["conv", "fc"]
preprocess = "size=8,crop=8,mean=0.5,std=0.5"
precision = "fp32"
batch-size = 4
device = "cpu"
"""
Say = Callable[..., tuple[int, str, str]]


@pytest.fixture
def say(capfd: pytest.CaptureFixture[str]) -> Say:
    def run(*words: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([str(word) for word in words])
        return (code, *capfd.readouterr())

    return run


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return runs.make_photos(tmp_path / "photos", 6)


def of_run(out: Path) -> dict[str, Any]:
    """What decides the values of a stored run, and what it was asked for."""
    with fmextract.open(out) as acts:
        return {"identity": acts.config["identity"], "options": acts.config["options"]}


def test_a_file_says_everything_and_the_command_line_beats_it(say: Say, photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(f'source = "photos"\nout = "one.h5"\nlimit = 5\nexif = true\n{RUN}')
    assert say("extract", "--config", file)[0] == 0
    told = of_run(tmp_path / "one.h5")["options"]
    assert (told["layers"], told["batch_size"], told["limit"], told["exif"]) == (["conv", "fc"], 4, 5, True)
    assert say("extract", "--config", file, "--limit", "3", "-l", "relu", "-o", "two.h5")[0] == 0
    told = of_run(tmp_path / "two.h5")["options"]
    assert (told["layers"], told["limit"], told["exif"]) == (["relu"], 3, True)
    with fmextract.open(tmp_path / "two.h5") as acts:
        assert len(acts.status) == 3


def test_a_saved_file_is_the_same_run(say: Say, photos: Path, tmp_path: Path) -> None:
    asked = ["photos", "-m", MODEL, "-l", "conv", "-l", "relu=mean", "--preprocess", "size=8,crop=8,mean=0.5,std=0.5"]
    asked += ["--precision", "fp32", "--batch-size", "4", "--device", "cpu", "--dtype", "float16", "--clip"]
    asked += ["--keep-bits", "7", "--max-failures", "2", "--no-recheck", "--shard-size", "1KiB", "--seed", "3"]
    assert say("extract", *asked, "-o", "by-words.h5")[0] == 0
    assert say("plan", *asked, "-o", "by-file.h5", "--save-config", "run.toml")[0] == 0
    assert say("extract", "--config", "run.toml")[0] == 0
    assert of_run(tmp_path / "by-file.h5") == of_run(tmp_path / "by-words.h5")
    runs.same(tmp_path / "by-file.h5", tmp_path / "by-words.h5")


def test_with_a_saved_plan_the_file_names_it(say: Say, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "asked.toml").write_text(f'source = "photos"\n{RUN}'.replace("batch-size = 4", ""))
    words = ("--config", "asked.toml", "--save-config", "run.toml", "--save", "plan.json", "-o", "out.h5")
    code, out, _ = say("plan", *words, "--json")
    assert code == 0
    assert 'plan = "plan.json"' in (tmp_path / "run.toml").read_text()
    assert say("extract", "--config", "run.toml")[0] == 0
    with fmextract.open(tmp_path / "out.h5") as acts:
        assert acts.config["batch_size"] == json.loads(out)["batch_size"]
    assert say("bench", "--config", "run.toml", "--repeats", "1", "--limit", "2")[0] == 0  # which has no OUT, no plan


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("batch_sise = 4", ["no option 'batch_sise'", "batch_size"]),
        ("frobnicate = 1", ["no option 'frobnicate'", "layers"]),
        ("exif = 1", ["exif", "true or false"]),
        ("limit = true", ["limit", "a text or a number"]),
        ("size = [8, 8]", ["size", "a text or a number"]),
        ("[extract]", ["no option 'extract'"]),
        ("seed = 1\nseed = 2", ["not valid TOML"]),
        ('layer = "conv"', ["twice"]),
        ("dtype = 'float16'\nstore = 'float32'", ["dtype", "twice"]),
        ("limit = 'ten'", ["--limit"]),
        ("codec = 'rar'", ["rar", "gzip"]),
    ],
)
def test_what_a_file_cannot_say(say: Say, photos: Path, tmp_path: Path, line: str, parts: list[str]) -> None:
    (tmp_path / "run.toml").write_text(f"{RUN}{line}\n")
    code, out, error = say("extract", "photos", "-o", "out.h5", "--config", "run.toml")
    assert (code, out) == (2, "")
    assert "Traceback" not in error
    for part in parts:
        assert part in error
    assert not (tmp_path / "out.h5").exists()


def test_former_names_are_read_and_a_missing_file_is_said(say: Say, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(f'{RUN}store = "float16"\ntop = 2\n')
    assert say("extract", "photos", "-o", "out.h5", "--config", "run.toml", "--dtype", "float32")[0] == 0
    told = of_run(tmp_path / "out.h5")["options"]
    assert (told["dtype"], told["top_k"]) == ("float32", 2)
    code, _, error = say("extract", "photos", "-o", "out.h5", "--config", "missing.toml")
    assert (code, "missing.toml" in error) == (2, True)


def test_what_nobody_says_is_still_missing(say: Say, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(RUN)
    code, _, error = say("extract", "photos", "--config", "run.toml")
    assert (code, "--out" in error) == (2, True)


def test_odd_texts_come_back(tmp_path: Path) -> None:
    odd = 'a "b" \\ \x7f\x01\n\tü 日本'
    file = tmp_path / "run.toml"
    run_file.save(file, odd, "m", Path(odd), Config.of(layers=[odd], key=odd), None)
    told = run_file.tomllib.loads(file.read_text(encoding="utf-8"))
    assert (told["source"], told["out"], told["layers"], told["key"]) == (odd, odd, [odd], odd)
    with pytest.raises(ConfigError, match="UTF-8"):
        run_file.save(file, "\udcff", "m", Path("o"), Config(), None)


def test_only_a_file_that_was_saved_is_replaced(tmp_path: Path) -> None:
    saved = tmp_path / "run.toml"
    for _ in range(2):
        run_file.save(saved, "photos", "m", Path("o"), Config(), None)
    for content in (b"batch_size = 3\n", b"\x89PNG\n", b""):
        (tmp_path / "mine").write_bytes(content)
        with pytest.raises(OutputError, match="mine exists, and was not made by it"):
            run_file.save(tmp_path / "mine", "photos", "m", Path("o"), Config(), None)
        assert (tmp_path / "mine").read_bytes() == content
