"""What is shipped: a wheel and an sdist of the tracked files, installed where there is no compiler."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fmextract

ROOT = Path(__file__).parent.parent
PLAIN = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"CC": "false"}


def run(*words: object, cwd: Path) -> str:
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=PLAIN, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that is built of it by a machine without a compiler."""
    place = tmp_path_factory.mktemp("built")
    tree = place / "tree"
    tree.mkdir()
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():  # a file that is moved, but not yet committed
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    build = "from setuptools import build_meta as b; import sys; b.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, place, cwd=tree)
    (sdist,) = place.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(place / "unpacked", filter="data")
    (unpacked,) = (place / "unpacked").iterdir()
    build = "from setuptools import build_meta as b; import sys; b.build_wheel(sys.argv[1])"
    run(sys.executable, "-c", build, place, cwd=unpacked)
    return place


@pytest.fixture(scope="module")
def installed(built: Path) -> Path:
    """A new environment with the wheel; the libraries that it needs are those of this one."""
    (wheel,) = built.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", "clean", cwd=built)
    python = built / "clean" / "bin" / "python"
    (packages,) = (built / "clean" / "lib").glob("python*/site-packages")
    (packages / "libraries.pth").write_text("\n".join(site.getsitepackages()))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    assert run(python, "-c", "import fmextract; print(fmextract.__file__)", cwd=built).startswith(str(packages))
    return python


def test_the_version_stands_in_one_place(built: Path, installed: Path) -> None:
    assert [path.name.split("-")[1] for path in built.glob("*.whl")] == [fmextract.__version__]
    assert run(installed, "-m", "fmextract", "--version", cwd=built).split() == ["fmextract", fmextract.__version__]


def test_the_sdist_holds_the_tests_and_the_source_of_the_kernels(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"tests/test_distribution.py", "fmextract/_kernels.c", "docs/reference/format.md", "scripts/test"} <= names
    assert not any(name.endswith((".so", ".pyc")) for name in names)


def test_a_wheel_without_a_compiler_runs(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for i in range(2):
        Image.fromarray(np.full((32, 40, 3), 90 * i, np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    asked = ["photos", "-m", "squeezenet1_1", "-w", "random:0", "--size", "64", "-l", "conv#0", "-o", "a.h5"]
    asked += ["--device", "cpu", "--precision", "fp32", "--batch-size", "2", "--effective-fields", "never"]
    run(installed, "-m", "fmextract", "extract", *asked, cwd=tmp_path)
    assert "features.0" in run(installed, "-m", "fmextract", "info", "a.h5", cwd=tmp_path)
    run(installed, "-m", "fmextract", "verify", "a.h5", cwd=tmp_path)
    run(installed, "-m", "fmextract", "report", "a.h5", "-o", "report.html", cwd=tmp_path)
    assert "<html" in (tmp_path / "report.html").read_text(encoding="utf-8")[:200]
    assert "Usage" in run(installed, "-m", "fmextract", "--help", cwd=tmp_path)
    without = "from fmextract import kernels; print(kernels.are_there())"
    assert run(installed, "-c", without, cwd=tmp_path).strip() == "False"
