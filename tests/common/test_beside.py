"""A file of the user's finds its neighbours, as a script does; nothing else does, nothing is mistaken."""

from __future__ import annotations

import pickle
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch

import fmextract as fm
from fmextract.common.imports import import_object, importing_for
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


PLAIN = """
import importlib, pickle
import torch
from pathlib import Path
import blocks
HERE = Path(__file__).parent
by_name = importlib.import_module("blocks"), __import__("blocks"), importlib.import_module("nets.inner")
pickled = pickle.loads((HERE / "block.pickle").read_bytes())
class Own:
    pass
own = pickle.loads(b"cmodel\\nOwn\\n.")
def make():
    lazy = importlib.import_module("widths").WIDTH
    loaded = torch.load(HERE / "block.pt", weights_only=False)
    return blocks, by_name, pickled, loaded, lazy, own is Own
"""


def plain(folder: Path, factor: int) -> Path:
    """A file that asks for its neighbours by importlib, by pickles and by torch.load."""
    network(folder, factor, factor + 1)
    put(folder, model=PLAIN)
    put(folder / "nets", inner=f"VALUE = {factor}")  # a folder without __init__.py
    (folder / "block.pickle").write_bytes(b"cblocks\nBlock\n.")
    code = "import torch, blocks; torch.save(blocks.Block(), 'block.pt')"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    return folder / "model.py"


def test_importlib_and_pickles_find_the_neighbours_too(tmp_path):
    before, path, finders = set(sys.modules), list(sys.path), list(sys.meta_path)
    mine = types.ModuleType("blocks")  # of the caller's, which is another
    sys.modules["blocks"] = mine
    try:
        made = [(n, load(f"{plain(tmp_path / str(n), n)}:make")) for n in (1, 2)]
        for number, make in made:
            with importing_for(f"{tmp_path}/{number}/model.py:make"):
                blocks, by_name, pickled, loaded, lazy, own = make()
            assert by_name[0] is by_name[1] is blocks
            assert number == by_name[2].VALUE
            assert pickled is blocks.Block
            assert type(loaded) is blocks.Block
            assert lazy == number + 1
            assert own
            assert blocks.__spec__.name == blocks.__name__ != "blocks"
        assert sys.modules["blocks"] is mine
    finally:
        del sys.modules["blocks"]
    assert sys.path == path
    assert [finder for finder in sys.meta_path if type(finder).__name__ != "_Packages"] == [
        finder for finder in finders if type(finder).__name__ != "_Packages"
    ]
    assert not {"model", "widths", "factors", "nets", "nets.inner"} & (set(sys.modules) - before)


def test_a_run_of_a_model_that_is_unpickled(tmp_path):
    network(tmp_path / "code", 2, 2)
    put(
        tmp_path / "code",
        model="import torch\ndef make():\n    return torch.load(__file__[:-8] + 'net.pt', weights_only=False)",
    )
    code = "import torch, blocks; torch.save(torch.nn.Sequential(blocks.Block()), 'net.pt')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "code", check=True)
    photos = runs.make_photos(tmp_path / "photos", 2)
    runs.extract(photos, tmp_path / "a.h5", model=f"{tmp_path}/code/model.py:make", layers=["0"])
    with fm.open(tmp_path / "a.h5") as acts:
        assert acts["0"].shape == (2, 3, 8, 8)


def test_relative_imports_within_a_package(tmp_path):
    for n in (1, 2):
        put(tmp_path / str(n) / "pkg", __init__="TOP = 7", blocks=f"from .sub.deep import VALUE\nNUMBER = {n}")
        put(
            tmp_path / str(n) / "pkg" / "sub",
            __init__="",
            deep="VALUE = 5",
            model="from ..blocks import NUMBER\n"
            "from . import deep\nfrom .. import TOP\nfound = NUMBER, deep.VALUE, TOP",
        )
        put(
            tmp_path / str(n) / "pkg",
            model="from .blocks import NUMBER, VALUE\ndef make():\n"
            "    from . import sub\n    from .sub.deep import VALUE as late\n    return NUMBER, VALUE, late",
        )
    before = set(sys.modules)
    made = [load(tmp_path / str(n) / "pkg" / "model.py:make") for n in (1, 2)]
    assert [make() for make in made] == [(1, 5, 5), (2, 5, 5)]
    assert [load(tmp_path / str(n) / "pkg" / "sub" / "model.py:found") for n in (1, 2)] == [(1, 5, 7), (2, 5, 7)]
    assert "pkg" not in set(sys.modules) - before


def test_a_folder_without_init_is_a_package_where_nothing_else_has_its_name(tmp_path):
    put(
        tmp_path,
        model="from layers.deep.inner import X\nimport layers.deep.inner as i\nimport timm\n"
        "def found():\n    from layers.deep import inner\n    return X, i is inner, timm.__file__",
    )
    put(tmp_path / "layers" / "deep", inner="X = 3")
    put(tmp_path / "timm", nothing="")
    x, same, place = load(tmp_path / "model.py:found")()
    assert (x, same) == (3, True)
    assert not place.startswith(str(tmp_path))


def test_a_module_of_the_working_directory_imports_when_it_is_called(tmp_path, monkeypatch):
    put(
        tmp_path,
        fm_test_models="from torch import nn\ndef make():\n    import fm_test_blocks\n    return nn.Identity()",
        fm_test_blocks="",
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place and Path(place) != tmp_path])
    found = load("fm_test_models:make")
    with importing_for("fm_test_models:make"):
        found()
    for name in ("fm_test_models", "fm_test_blocks"):
        del sys.modules[name]
