"""What is shipped: a wheel and an sdist of the tracked files, each installed where there is no compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from importlib.metadata import requires
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image

import fmextract

ROOT = Path(__file__).parent.parent
PLAIN = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"CC": "false"}
DEPENDENCIES = [wanted.name for wanted in map(Requirement, requires("fmextract") or ()) if wanted.marker is None]


def run(*words: object, cwd: Path) -> str:
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=PLAIN, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel of the tracked files, built by a machine without a compiler."""
    place = tmp_path_factory.mktemp("built")
    tree = place / "tree"
    tree.mkdir()
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():  # a file that is moved, but not yet committed
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    for kind in ("sdist", "wheel"):
        build = f"from setuptools import build_meta as b; import sys; b.build_{kind}(sys.argv[1])"
        run(sys.executable, "-c", build, place, cwd=tree)
    return place


@pytest.fixture(scope="module", params=["*.whl", "*.tar.gz"], ids=["wheel", "sdist"])
def installed(request: pytest.FixtureRequest, built: Path) -> Path:
    """The programs of a new environment where pip installed it, and that has what it says it needs and nothing else."""
    (package,) = built.glob(request.param)
    clean = built / f"clean-{package.suffix[1:]}"
    run(sys.executable, "-m", "venv", "--without-pip", clean, cwd=built)
    python = clean / "bin" / "python"
    (packages,) = (clean / "lib").glob("python*/site-packages")
    libraries = clean / "libraries" / "site-packages"  # by its name, what a run takes for libraries
    (packages / "libraries.pth").write_text(str(libraries))
    run(sys.executable, ROOT / ".ci" / "link_installed.py", libraries, *DEPENDENCIES, "setuptools", cwd=built)
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install", "--quiet"]
    run(*pip, "--no-index", "--no-deps", "--no-build-isolation", package, cwd=built)
    assert run(python, "-c", "import fmextract; print(fmextract.__file__)", cwd=built).startswith(str(packages))
    return clean / "bin"


def test_the_version_stands_in_one_place(built: Path, installed: Path) -> None:
    assert [path.name.split("-")[1] for path in built.glob("*.whl")] == [fmextract.__version__]
    assert run(installed / "fmextract", "--version", cwd=built).split() == ["fmextract", fmextract.__version__]


def test_the_sdist_holds_the_tests_and_the_source_of_the_kernels(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"tests/test_distribution.py", "fmextract/common/_kernels.c", "docs/reference/format.md", "scripts/test"}
    assert wanted <= names
    assert not any(name.endswith((".so", ".pyc")) for name in names)


def test_it_runs_without_a_compiler(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for i in range(2):
        Image.fromarray(np.full((32, 40, 3), 90 * i, np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    asked = ["photos", "-m", "squeezenet1_1", "-w", "random:0", "--size", "64", "-l", "conv#0", "-o", "a.h5"]
    asked += ["--device", "cpu", "--precision", "fp32", "--batch-size", "2", "--effective-fields", "never"]
    run(installed / "fmextract", "extract", *asked, cwd=tmp_path)
    assert "features.0" in run(installed / "fmextract", "info", "a.h5", cwd=tmp_path)
    run(installed / "fmextract", "verify", "a.h5", cwd=tmp_path)
    run(installed / "fmextract", "report", "a.h5", "-o", "report.html", cwd=tmp_path)
    assert "<html" in (tmp_path / "report.html").read_text(encoding="utf-8")[:200]
    assert "Usage" in run(installed / "fmextract", "--help", cwd=tmp_path)
    without = "from fmextract.common import kernels; print(kernels.are_there())"
    assert run(installed / "python", "-c", without, cwd=tmp_path).strip() == "False"
