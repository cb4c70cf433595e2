"""What a shell completes, as the shells ask for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torchvision
from files import make_file

from fmextract.capture.reducers import REDUCERS
from fmextract.cli import completion


def completed(*words: str, shell: str = "zsh", folder: Path | None = None) -> str:
    """What the program answers to a shell that has these words on its line, the last of them begun."""
    line = " ".join(["fmextract", *words])
    asked = {"_FMEXTRACT_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": line, "COMP_WORDS": line}
    asked |= {"COMP_CWORD": str(len(words)), "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    code = "import sys; from fmextract.cli import main; sys.argv[0] = 'fmextract'; sys.exit(main())"
    command = [
        sys.executable,
        "-c",
        f"import atexit, sys; atexit.register(lambda: 'torch' in sys.modules and print('TORCH'))\n{code}",
    ]
    done = subprocess.run(
        command, env={**os.environ, **asked}, capture_output=True, text=True, check=False, timeout=60, cwd=folder
    )
    assert done.stderr == ""
    assert "TORCH" not in done.stdout
    return done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_choices_are_completed_without_torch(shell: str) -> None:
    said = completed("extract", "photos/", "--dtype", "float", shell=shell)
    assert "float16" in said
    assert "float32" in said


def test_the_words_of_a_metavar_are_completed() -> None:
    assert completion.choices("N|auto")("a") == ["auto"]  # type: ignore[misc]
    assert completion.choices("gzip|zstd|lz4|none")("") == ["gzip", "zstd", "lz4", "none"]  # type: ignore[misc]
    assert completion.choices("N|HxW") is None
    assert completion.choices(None) is None


def test_layers_of_a_file_are_completed(tmp_path: Path) -> None:
    values = np.zeros((2, 3, 4, 4), np.float32)
    make_file(tmp_path / "made.h5", {"conv1": values, "conv2": values, "fc": values[:, :, 0, 0]})
    said = completed("show", "top", "made.h5", "-l", "conv", folder=tmp_path)
    assert "conv1" in said
    assert "conv2" in said
    assert "fc" not in said
    assert "conv" not in completed("show", "top", "missing.h5", "-l", "conv", folder=tmp_path).replace("_files", "")


def test_models_are_those_that_the_libraries_list() -> None:
    assert set(completion.models("")) - {"timm:"} == set(torchvision.models.list_models())
    assert completion.models("resnet5") == ["resnet50"]
    found = {name.partition(":")[2] for name in completion.models("timm:")}
    assert found == set(timm.list_models())


def test_models_are_completed_without_torch() -> None:
    assert "resnet50" in completed("extract", "photos/", "-m", "resnet5")
    assert "resnet50" in completed("layers", "resnet5")


def test_reducers_are_completed_behind_a_selector() -> None:
    assert completion.reducers("layer*=m") == ["layer*=mean", "layer*=max"]
    assert completion.reducers("layer") == []
    assert {word.partition("=")[2] for word in completion.reducers("a=")} <= set(REDUCERS)


def test_the_script_for_a_shell_can_be_shown() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fmextract", "--show-completion", "bash"], capture_output=True, text=True, check=True
    )
    assert "_FMEXTRACT_COMPLETE=complete_bash" in done.stdout
