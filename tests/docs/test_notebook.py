"""The notebook runs from top to bottom, and its cells show what a reader is told they do."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import h5py
import nbformat
import numpy as np
import pytest
import torch
import torchvision
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs/notebooks/start.ipynb"
KEYS = ["cats/max.jpg", "cats/tom.jpg", "dogs/bo.jpg", "dogs/ida.jpg"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder in which the notebook ran, and its cells: with four photos, and random weights where a download would
    have put trained ones."""
    folder = tmp_path_factory.mktemp("notebook")
    dice = np.random.default_rng(0)
    for key in KEYS:
        (folder / "photos" / key).parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(dice.integers(0, 256, (6, 8, 3), np.uint8))
        coarse.resize((320, 240), Image.Resampling.BICUBIC).save(folder / "photos" / key)
    weights = folder / "home/hub/checkpoints" / torchvision.models.ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    weights.parent.mkdir(parents=True)
    with torch.random.fork_rng(devices=[]), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(0)
        torch.save(torchvision.models.resnet18().state_dict(), weights)
        patch.setenv("TORCH_HOME", str(folder / "home"))
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})
        client.execute()
    return folder, [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cells: list[dict[str, Any]], start: str) -> dict[str, Any]:
    """What the cell that begins so shows: by type, and what it printed as `printed`; notes on stderr as `notes`."""
    (cell,) = [cell for cell in cells if cell["source"].startswith(start)]
    found: dict[str, Any] = {"printed": "", "notes": ""}
    for output in cell["outputs"]:
        if output["output_type"] == "stream":
            found["printed" if output["name"] == "stdout" else "notes"] += output["text"]
        else:
            found |= output.get("data", {})
    return found


def test_the_notebook_is_stored_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
    assert NOTEBOOK.stat().st_size < 20_000


def test_every_cell_runs_without_a_warning(ran: tuple[Path, list[dict[str, Any]]]) -> None:
    _, cells = ran
    for cell in cells:
        assert not [output for output in cell["outputs"] if output["output_type"] == "error"]
        assert "Warning" not in "".join(o["text"] for o in cell["outputs"] if o["output_type"] == "stream")


def test_the_plan_and_the_output_are_tables(ran: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, cells = ran
    plan = shown(cells, "fm.plan")["text/html"]
    assert "4 images" in plan
    for name, size in {"conv1": "64×112×112", "layer1": "64×56×56", "layer4": "512×7×7"}.items():
        assert re.search(rf"{name}\b.*{size}", plan), plan
        assert re.search(rf"{name}<.*4×{size}<", shown(cells, "acts = fm.extract")["text/html"])
    with h5py.File(folder / "acts.h5") as file:
        assert [key.decode() for key in file["key"]] == KEYS
        maps = file["layers/layer1/activation"][1]
    printed = shown(cells, 'maps = acts["layer1"]')["printed"]
    assert printed.splitlines() == [
        f"(64, 56, 56) {float(maps.mean())}",
        "(3, 7, 7)",
        "(4, 512, 7, 7) of 4 photos",
    ]
    assert shown(cells, 'acts = fm.open("acts.h5")')["printed"].splitlines()[-1] == "layer4 (4, 512, 7, 7) float32"


def test_a_layer_is_a_strip_of_maps(ran: tuple[Path, list[dict[str, Any]]]) -> None:
    html = shown(ran[1], 'acts["layer1"]')["text/html"]
    assert "data:image/png;base64," in html
    assert "cats/max.jpg" in html


def test_numbers_agree_with_the_file(ran: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, cells = ran
    with h5py.File(folder / "acts.h5") as file:
        zeros = {name: np.mean(group["activation"][:] == 0) for name, group in file["layers"].items()}
        strongest = file["layers/layer3/activation"][:, 17].max(axis=(1, 2))
    lines = shown(cells, "for name, layer in acts.items():\n    stats")["printed"].splitlines()
    for line, (name, share) in zip(lines, zeros.items(), strict=True):
        assert line.startswith(f"{name}: mean ")
        assert line.endswith(f"{share:.0%} zeros")
    top = shown(cells, 'for top in acts["layer3"]')["printed"].splitlines()
    order = np.argsort(-strongest)[:3]
    assert [line.split()[:2] for line in top] == [[KEYS[row], str(round(float(strongest[row]), 2))] for row in order]


@pytest.mark.parametrize("name", ["maps", "depth", "top", "where"])
def test_pictures_are_shown(ran: tuple[Path, list[dict[str, Any]]], name: str) -> None:
    assert shown(ran[1], f"fm.show_{name}")["image/png"]
    with Image.open(ran[0] / f"{name}.png") as picture:
        assert len(set(picture.convert("L").resize((64, 64)).tobytes())) > 16


def test_precisions_are_compared_and_the_output_is_whole(ran: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, cells = ran
    with h5py.File(folder / "acts.h5") as right, h5py.File(folder / "half.h5") as other:
        for line, name in zip(shown(cells, "half =")["printed"].splitlines(), right["layers"], strict=True):
            a, b = (file["layers"][name]["activation"][:].astype(np.float64) for file in (right, other))
            error, _, cka = line.partition(", CKA ")
            assert error == f"{name}: error {np.linalg.norm(b - a) / np.linalg.norm(a):.2%}"
            assert 0.99 < float(cka) <= 1
        chunks = sum(group["activation"].id.get_num_chunks() for group in right["layers"].values())
    assert shown(cells, "checked =")["printed"] == f"True: {chunks} chunks\n"
    assert shown(cells, "page =")["printed"] == "report.html with 4 photos\n"
    assert "layer4" in (folder / "report.html").read_text(encoding="utf-8")
