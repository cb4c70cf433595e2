"""A file of the user's finds its neighbours, as a script does; nothing else does, nothing is mistaken."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch

import fmextract as fm
from fmextract.common.imports import import_object
from fmextract.errors import ModelError

MODEL = """
import torch
from torch import nn
from blocks import Block
def make():
    torch.manual_seed(0)
    import widths
    return nn.Sequential(Block(), nn.Conv2d(3, widths.WIDTH, 1))
"""
BLOCKS = """
import torch
from dataclasses import dataclass
from torch import nn
@dataclass
class Setting:
    factor: float
class Block(nn.Module):
    def forward(self, x):
        from factors import FACTOR
        return x * Setting(FACTOR).factor
"""


def put(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def load(text: Path | str) -> Any:
    return import_object(str(text), ModelError, "--model")


def network(folder: Path, factor: float, width: int) -> Path:
    return put(folder, model=MODEL, blocks=BLOCKS, factors=f"FACTOR = {factor}", widths=f"WIDTH = {width}")


def test_neighbours_are_found_now_and_later_and_never_those_of_another_folder(tmp_path, monkeypatch):
    before, path = set(sys.modules), list(sys.path)
    makers = [load(network(tmp_path / str(n), n, n + 1) / "model.py:make") for n in range(1, 4)]
    nets = [make() for make in makers]
    x = torch.ones(1, 3, 2, 2)
    for _ in range(2):
        for number, net in enumerate(nets, 1):
            assert net[1].out_channels == number + 1
            assert (net[0](x) == number).all()  # imports when it is called
    assert sys.path == path
    assert not {"model", "blocks", "factors", "widths"} & (set(sys.modules) - before)
    with pytest.raises(ModuleNotFoundError):
        import blocks  # noqa: F401


def test_a_run_of_such_a_model(tmp_path):
    network(tmp_path / "code", 0.5, 2)
    photos = runs.make_photos(tmp_path / "photos", 3)
    runs.extract(photos, tmp_path / "a.h5", model=f"{tmp_path}/code/model.py:make", layers=["0", "1"])
    with fm.open(tmp_path / "a.h5") as acts:
        assert acts["1"].shape == (3, 2, 8, 8)


@pytest.mark.parametrize("name", ["random", "torch", "json", "fmextract", "timm", "numpy"])
def test_files_with_the_names_of_others(tmp_path, name):
    """The file imports what it is called like, and the process goes on with what it had."""
    known = sys.modules.get(name)
    put(tmp_path, **{name: f"import {name} as other\nMINE = True\ndef make():\n    return other"})
    other = load(tmp_path / f"{name}.py:make")()
    assert not hasattr(other, "MINE")
    assert sys.modules[name] is other
    assert known is None or other is known


def test_a_neighbour_does_not_stand_for_what_is_installed(tmp_path):
    put(tmp_path, model="import torch, random\nfound = torch, random", torch="1 / 0", random="1 / 0")
    assert load(tmp_path / "model.py:found") == (torch, sys.modules["random"])


def test_packages_beside_a_file(tmp_path):
    put(
        tmp_path,
        model="import nets.deep.inner\nimport nets.deep.inner as inner\nfrom nets import deep, VALUE\n"
        "found = nets.deep.inner.SUM, inner.SUM, deep.inner.SUM, VALUE",
        other="FOUR = 4",
    )
    put(tmp_path / "nets", __init__="VALUE = 1", common="THREE = 3")
    (tmp_path / "nets" / "deep").mkdir()
    (tmp_path / "nets" / "deep" / "__init__.py").write_text("from . import inner")
    (tmp_path / "nets" / "deep" / "inner.py").write_text(
        "from nets.common import THREE\nfrom ..common import THREE as also\nimport other\n"
        "SUM = THREE + also + other.FOUR"
    )
    assert load(tmp_path / "model.py:found") == (10, 10, 10, 1)


def test_an_edited_neighbour_is_read_anew(tmp_path):
    network(tmp_path, 1, 2)
    assert load(tmp_path / "model.py:make")()[1].out_channels == 2
    (tmp_path / "widths.py").write_text("WIDTH = 55")
    assert load(tmp_path / "model.py:make")()[1].out_channels == 55


def test_what_is_missing_or_broken_is_the_files_own_error(tmp_path):
    put(tmp_path, model="import nowhere_at_all", broken="import worse", worse="1 / 0")
    with pytest.raises(ModelError, match="raised ModuleNotFoundError: No module named 'nowhere_at_all'"):
        load(tmp_path / "model.py:make")
    for _ in range(2):
        with pytest.raises(ModelError, match="raised ZeroDivisionError"):
            load(tmp_path / "broken.py:make")


def test_classes_of_files_are_pickled(tmp_path):
    put(tmp_path, data="import base\nclass Data(base.Base):\n    pass", base="class Base:\n    x = 3")
    kinds = [load(tmp_path / "data.py:Data") for _ in range(3)]
    assert all(type(pickle.loads(pickle.dumps(kind()))) is kind for kind in kinds)


def test_processes_that_read_a_dataset_find_the_neighbours(tmp_path):
    put(
        tmp_path / "code",
        data="import numpy as np\nfrom sizes import SIDE\nclass Data:\n    def __len__(self):\n        return 5\n"
        "    def __getitem__(self, row):\n        import levels\n"
        "        return np.full((SIDE, SIDE, 3), levels.STEP * row, np.uint8), row\n",
        sizes="SIDE = 8",
        levels="STEP = 20",
    )
    for workers in (0, 1):
        runs.extract(f"{tmp_path}/code/data.py:Data", tmp_path / f"{workers}.h5", dataset_workers=workers)
    with fm.open(tmp_path / "0.h5") as one, fm.open(tmp_path / "1.h5") as other:
        assert one.listed() == other.listed() == list(range(5))
        np.testing.assert_array_equal(one["conv"][:], other["conv"][:])
