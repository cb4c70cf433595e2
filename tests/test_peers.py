"""The comparison with other tools sees what is right and what is wrong: `benchmarks/peers.py` on four photos."""

from __future__ import annotations

import mmap
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from benchmarks import contenders, peers
from fmextract.common import sample_photos

# The script's loader forks, which newer Pythons warn about in a process with threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

CASE = peers.Case("", "resnet18", ("bn1", "layer4"), batch=4)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peers")
    (folder / "photos").mkdir()
    (folder / "truths").mkdir()
    sample_photos.copy_photos(folder / "demo")
    import PIL.Image

    for name in ("astronaut.png", "chelsea.png", "coffee.png", "camera.png"):
        with PIL.Image.open(folder / "demo" / name) as photo:
            photo.convert("RGB").save(folder / "photos" / f"{Path(name).stem}.jpg")
    return folder


def carried_out(work: Path, name: str) -> Path:
    out = work / name
    if not out.exists():
        out.mkdir()
        said = peers.one(CASE, name, work / "photos", out)
        assert said["done"] > said["ready"]
        assert said["peak"] >= 0  # four small photos may fit into memory that an earlier test gave back
    return out


def test_memory_that_is_taken_and_given_back_is_in_the_peak() -> None:
    peers._reset_peak()
    before = peers._memory("VmRSS")
    with mmap.mmap(-1, 64 << 20) as taken:  # not from the heap, which may have kept as much from earlier tests
        for at in range(0, len(taken), mmap.PAGESIZE):
            taken[at] = 1
    assert peers._memory("VmHWM") - before > 60 << 20
    peers._reset_peak()
    assert peers._memory("VmHWM") - before < 30 << 20


def errors(work: Path, name: str, out: Path) -> dict[str, float]:
    found = peers.check(CASE, name, work / "photos", out, work / "truths")
    return {layer: said["stored"][0]["error"] for layer, said in found["layers"].items()}


def test_fmextract_is_exact_and_the_script_is_not_behind_an_in_place_relu(work: Path) -> None:
    assert errors(work, "fmextract-fp32", carried_out(work, "fmextract-fp32")) == {"bn1": 0.0, "layer4": 0.0}
    script = errors(work, "script", carried_out(work, "script"))
    assert script["layer4"] == 0.0
    assert script["bn1"] > 0.1  # the output of the ReLU, which wrote into it


def test_bf16_is_near(work: Path) -> None:
    found = errors(work, "fmextract-bf16", carried_out(work, "fmextract-bf16"))
    assert all(0 < error < 0.05 for error in found.values())


def test_wrong_values_and_swapped_rows_are_seen(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "script"
    shutil.copytree(carried_out(work, "script"), out)
    (stored,) = out.glob("*.h5")
    with h5py.File(stored, "r+") as file:
        data = file["layer4"]
        rows = data[:]
        data[:] = rows[[1, 0, 2, 3]]
    found = peers.check(CASE, "script", work / "photos", out, work / "truths")
    assert not found["order"]
    assert found["layers"]["layer4"]["stored"][0]["error"] > peers.EXACT_ENOUGH
    with h5py.File(stored, "r+") as file:
        file["layer4"][:] = rows * np.float32(1.001)
    found = peers.check(CASE, "script", work / "photos", out, work / "truths")
    assert found["order"]
    assert found["layers"]["layer4"]["stored"][0]["error"] == pytest.approx(1e-3, rel=1e-2)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert contenders.missing("fmextract-fp32") == []
    monkeypatch.setattr(contenders.CONTENDERS["captum"], "packages", ("captum_that_is_not_there",))
    assert contenders.missing("captum") == ["captum_that_is_not_there"]
