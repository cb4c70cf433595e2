"""`--like acts.h5`: the run that made a file, on other images; what the file names is data until it is trusted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import runs
import torch

import fmextract
from fmextract.cli import main

MODEL = f"{Path(runs.__file__)}:Tiny"
FIXED = [
    "--preprocess",
    "size=8,crop=8,mean=0.5,std=0.5",
    "--precision",
    "fp32",
    "--batch-size",
    "4",
    "--device",
    "cpu",
]
Say = Callable[..., tuple[int, str]]


@pytest.fixture
def say(capfd: pytest.CaptureFixture[str]) -> Say:
    def run(*words: object) -> tuple[int, str]:
        capfd.readouterr()
        code = main([str(word) for word in words])
        return code, capfd.readouterr().err

    return run


@pytest.fixture
def acts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of five photos by a named model, with odd options; beside them three other photos."""
    monkeypatch.chdir(tmp_path)
    runs.make_photos(tmp_path / "photos", 5)
    runs.make_photos(tmp_path / "others", 3)
    out = tmp_path / "acts.h5"
    odd = ["-l", "conv", "-l", "relu=max", "--dtype", "float16", "--top-k", "2", "--keep-bits", "6", "--level", "1"]
    assert main(["extract", "photos", "-m", MODEL, *FIXED, *odd, "-o", str(out)]) == 0
    return out


def said_by(file: Path) -> dict[str, Any]:
    with fmextract.open(file) as acts:
        told = dict(acts.config["options"])
        return {name: told[name] for name in ("dtype", "top_k", "keep_bits", "level", "preprocess", "precision")} | {
            "layers": acts.layers, "batch_size": acts.config["batch_size"],
        }  # fmt: skip


def test_the_same_run_on_other_images(say: Say, acts: Path, tmp_path: Path) -> None:
    assert say("extract", "others", "--like", acts, "-o", "new.h5", "-m", MODEL)[0] == 0
    assert said_by(tmp_path / "new.h5") == said_by(acts)
    assert say("extract", "photos", "--like", acts, "-o", "again.h5", "-m", MODEL)[0] == 0
    runs.same(acts, tmp_path / "again.h5")


def test_what_is_said_beats_the_file(say: Say, acts: Path, tmp_path: Path) -> None:
    words = ["--like", acts, "-m", MODEL, "-l", "fc", "--dtype", "float32", "--top-k", "0", "--precision", "bf16"]
    assert say("extract", "others", *words, "-o", "new.h5")[0] == 0
    told = said_by(tmp_path / "new.h5")
    assert (told["layers"], told["dtype"], told["top_k"], told["precision"]) == (("fc",), "float32", 0, "bf16")
    assert told["keep_bits"] == 6


def test_a_run_file_beats_it_too(say: Say, acts: Path, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(f'model = "{MODEL}"\nkeep_bits = 5\nlike = "acts.h5"\n')
    assert say("extract", "others", "--like", acts, "--config", "run.toml", "-o", "new.h5")[0] == 0
    told = said_by(tmp_path / "new.h5")
    assert (told["keep_bits"], told["dtype"]) == (5, "float16")


@pytest.mark.parametrize("command", ["extract", "plan"])
def test_code_that_a_file_names_is_not_run_until_it_is_said_again(
    say: Say, acts: Path, tmp_path: Path, command: str
) -> None:
    words = [command, "others", "--like", acts, "-o", "new.h5"]
    code, error = say(*words)
    assert code == 2
    assert "names code" in error
    assert f"-m {MODEL}" in error
    assert "--trust" in error
    assert not (tmp_path / "new.h5").exists()
    assert say(*words, "--trust")[0] == 0


def test_nothing_of_a_harmful_file_is_imported(say: Say, acts: Path, tmp_path: Path) -> None:
    """A reducer, a preprocessing, and layers whose names hold code; whatever else is given again."""
    (tmp_path / "harm.py").write_text(f"open({str(tmp_path / 'DONE')!r}, 'w')\ndef code(x=None): return x\n")
    for options in ({"layers": ["conv=harm.py:code"]}, {"preprocess": "harm.py:code"}, {"weights": "harm.pth"}):
        lying = tmp_path / "lying.h5"
        lying.write_bytes(acts.read_bytes())
        (tmp_path / "harm.pth").write_bytes(b"a pickle")
        with h5py.File(lying, "r+") as file:
            config = json.loads(file.attrs["fmextract_config"])
            config["options"] |= options
            file.attrs["fmextract_config"] = json.dumps(config)
            file.attrs["content_digest"] = ""
        code, error = say("extract", "others", "--like", lying, "-m", MODEL, "-o", "new.h5")
        assert code == 2
        assert str(lying) in error
    assert not (tmp_path / "DONE").exists()


def test_other_weights_are_refused_unless_they_are_meant(say: Say, acts: Path, tmp_path: Path) -> None:
    model = runs.Tiny(seed=1)
    (tmp_path / "other.py").write_text(
        "import sys\nsys.path.insert(0, " + repr(str(Path(runs.__file__).parent)) + ")\nimport runs\n"
        "def model(): return runs.Tiny(seed=1)\n"
    )
    words = ["extract", "others", "--like", acts, "-m", "other.py:model", "-o", "new.h5"]
    for trust in ([], ["--trust"]):
        code, error = say(*words, *trust)
        assert code == 2
        assert "the weights are not those of" in error
        assert "-w" in error
    assert not (tmp_path / "new.h5").exists()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    assert say(*words, "-w", "w.pth")[0] == 0
    with fmextract.open(tmp_path / "new.h5") as made, fmextract.open(acts) as before:
        assert made.attrs["weights_sha256"] != before.attrs["weights_sha256"]


def test_a_model_that_prepares_images_otherwise_now_is_refused(say: Say, acts: Path, tmp_path: Path) -> None:
    """Its weights are the same; the values would not be."""
    here = repr(str(Path(runs.__file__).parent))
    code = f"import sys\nsys.path.insert(0, {here})\nimport runs\nfrom fmextract import Preprocess\n"
    code += "def model(): return runs.Tiny(), Preprocess(resize=SIDE, crop=(8, 8))\n"
    own, fixed = tmp_path / "own.py", FIXED[2:]
    own.write_text(code.replace("SIDE", "8"))
    assert say("extract", "photos", "-m", "own.py:model", *fixed, "-l", "conv", "-o", "own.h5")[0] == 0
    words = ["extract", "others", "--like", "own.h5", "-m", "own.py:model"]
    assert say(*words, "-o", "same.h5")[0] == 0
    own.write_text(code.replace("SIDE", "9"))
    status, error = say(*words, "-o", "new.h5")
    assert status == 2
    assert "does not prepare images as in own.h5" in error
    assert not (tmp_path / "new.h5").exists()
    assert say(*words, "--preprocess", "model", "-o", "new.h5")[0] == 0


def test_a_model_that_was_an_object_has_to_be_given(say: Say, acts: Path, tmp_path: Path) -> None:
    runs.extract(tmp_path / "photos", tmp_path / "object.h5", layers=["conv"])
    code, error = say("extract", "others", "--like", "object.h5", "-o", "new.h5")
    assert (code, "was an object in a program" in error) == (2, True)
    assert say("extract", "others", "--like", "object.h5", "-m", MODEL, "-o", "new.h5")[0] == 0


def test_the_layers_that_a_run_chose_by_itself(say: Say, acts: Path, tmp_path: Path) -> None:
    assert say("extract", "photos", "-m", MODEL, *FIXED, "-o", "chosen.h5")[0] == 0
    assert say("extract", "others", "--like", "chosen.h5", "-m", MODEL, "-o", "new.h5")[0] == 0
    with fmextract.open(tmp_path / "chosen.h5") as chosen, fmextract.open(tmp_path / "new.h5") as new:
        assert new.layers == chosen.layers


def test_trust_alone_and_a_missing_file(say: Say, acts: Path) -> None:
    assert say("extract", "others", "-m", MODEL, "--trust", "-o", "new.h5")[0] == 2
    code, error = say("extract", "others", "--like", "missing.h5", "-o", "new.h5")
    assert (code, "missing.h5" in error) == (2, True)


def test_seed_zero_is_said(say: Say, acts: Path, tmp_path: Path) -> None:
    assert say("extract", "photos", "-m", MODEL, *FIXED, "-l", "conv", "--seed", "7", "-o", "seven.h5")[0] == 0
    assert say("extract", "others", "--like", "seven.h5", "-m", MODEL, "--seed", "0", "-o", "zero.h5")[0] == 0
    with fmextract.open(tmp_path / "zero.h5") as made:
        assert made.config["options"]["seed"] == 0
        assert np.isfinite(made["conv"][0]).all()


class Shifted(runs.Tiny):
    """The weights of the other, another forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.fc(self.relu(self.conv(x) + 1).mean((2, 3)))
        return made


def test_another_forward_under_the_same_weights_is_told(acts: Path, tmp_path: Path) -> None:
    for made, is_other in ((runs.Tiny(), False), (Shifted(), True)):
        notes = runs.Notes()
        fmextract.plan("others", made, like=acts, progress=notes)
        assert (f"not as in the run of {acts}: model" in notes) is is_other
        fmextract.extract("others", made, tmp_path / f"{is_other}.h5", like=acts, layers="conv", progress=notes).close()
        assert sum("not as in the run" in note for note in notes.notes) == 2 * is_other
