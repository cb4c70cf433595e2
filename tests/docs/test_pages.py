"""Every page does what it says: its blocks run in order, in a folder with a few photos.

- A block of `python` is executed. Each of its `print` lines says in a comment what it prints (`…` stands for anything).
- A block of `sh` is a list of commands. `fmextract` runs in this process; `pip install` has to name extras that exist.
- Blocks of any other kind (`text`, `py`) are shown, not run.

Pages use networks by their names, with trained weights. Those are in the caches that a download would have filled; here
they are random, so nothing is fetched.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save

from fmextract.cli import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "docs/start.md", *sorted((ROOT / "docs/how-to").glob("*.md"))]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")[2]
EXTRAS = re.findall(r"^(\w+) = \[", PROJECT.partition("\n[")[0], flags=re.MULTILINE)
PHOTOS = [f"{kind}/{name}.jpg" for kind in ("cats", "dogs") for name in ("bo", "ida", "max", "tom")]


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where downloaded weights are kept, with random ones of the two networks that pages name."""
    home = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.setenv("TORCH_HOME", str(home))
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        torch.manual_seed(0)
        weights = torchvision.models.get_model_weights("resnet18").DEFAULT
        kept = home / "hub/checkpoints" / weights.url.rpartition("/")[2]
        kept.parent.mkdir(parents=True)
        torch.save(torchvision.models.resnet18().state_dict(), kept)
        network = timm.create_model("vit_tiny_patch16_224")
        repository = home / f"models--{network.pretrained_cfg['hf_hub_id'].replace('/', '--')}"
        for path, content in {"refs/main": b"0", "snapshots/0/model.safetensors": save(network.state_dict())}.items():
            (repository / path).parent.mkdir(parents=True)
            (repository / path).write_bytes(content)
        yield


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caches: None) -> Path:
    """The working directory of a page: photos/ with four photos in each of two folders."""
    random = np.random.default_rng(0)
    for number, key in enumerate(PHOTOS):
        path = tmp_path / "photos" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), np.uint8))
        coarse.resize((320 + 16 * number, 240), Image.Resampling.BICUBIC).save(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_page_does_what_it_says(page: Path, folder: Path) -> None:
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert any(kind in ("python", "sh") for kind, _ in blocks)
    for kind, block in blocks:
        if kind == "python":
            execute(block, names)
        elif kind == "sh":
            for line in block.replace("\\\n", " ").splitlines():
                command(line)


def execute(block: str, names: dict[str, Any]) -> None:
    """Run a block of Python, and compare what it prints with what its comments say."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, "block", "exec"), names)
    expected = re.findall(r"^ *print\(.*\)  # (.*)$", block, flags=re.MULTILINE)
    lines = printed.getvalue().splitlines()
    assert len(lines) == len(expected), lines
    for line, pattern in zip(lines, expected, strict=True):
        assert fnmatchcase(line, pattern.replace("[", "[[]").replace("…", "*")), (line, pattern)


def command(line: str) -> None:
    """Run one line of a shell block."""
    words = shlex.split(line, comments=True)
    if words[:1] == ["fmextract"]:
        assert main(words[1:]) == 0, line
    elif words[:2] == ["pip", "install"]:
        named = re.findall(r"\[([\w,]+)\]", line)
        assert set(",".join(named).split(",")) <= {"", *EXTRAS}, line
    elif words and words[0].startswith("scripts/"):
        assert (ROOT / words[0]).is_file(), line
    else:
        assert not words, f"do not know how to run: {line}"
