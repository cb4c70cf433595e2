"""Imports go one way; what only reads needs no torch; one module writes HDF5."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from files import make_file

PACKAGE = Path(__file__).parent.parent / "fmextract"

# A module may import those that stand before it.
ORDER = re.findall(
    r"\S+",
    """
    errors records common.strict_json
    text config progress channel pool selection heaps moments boxes kernels common.facts common.processes
    codecs
    storage.schema storage.columns storage.objects storage store index lock watch feeding reader
    device
    common.folders common.trust common.beside common.imports common.streams common.relative_error common
    inputs.named_files inputs.tables inputs.arrays inputs.contents inputs.files inputs.pictures inputs.labels
    inputs.items
    inputs.kinds inputs.given inputs.folders inputs.manifests inputs.attributes inputs.datasets inputs.sources inputs
    capture.reducer_help capture.atoms capture.reach capture images
    inputs.seeding inputs.thread_safety inputs.dataset_workers inputs.reading
    models capture.writes capture.independence capture.untouched capture.blame
    axes capture.trunk taps capture.probe geometry effective reducers stats
    packed fusion planning chunks workers compiled precision model.modes model.structure model.randomness model choose
    engine estimate provenance prepare resume following replay output
    run rerun verify launch
    similarity dissimilarity comparison
    look.canvas look.photos look.places look.select look.maps look.live look.filters look.top look.where look.depth
    look.differences
    look
    report.numbers report.photos report.views report
    demo bench look.stages exporting
    __init__ tables cli __main__
    """,
)


def modules() -> dict[str, ast.Module]:
    """Every module of the package by its name, `look` for look/__init__.py."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


MODULES = modules()


def imported(tree: ast.Module) -> Iterator[str]:
    """The modules of this package that `tree` imports anywhere, in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            # `from fmextract.visual import canvas` is about the module, not about what the package itself offers.
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [n if n.removeprefix("fmextract.") in MODULES else str(node.module) for n in inner]
        else:
            continue
        for name in names:
            module = name.removeprefix("fmextract.")
            if name.startswith("fmextract.") and module in MODULES:
                yield module


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name: str) -> None:
    assert name in ORDER, f"give {name} its place in ORDER, and in docs/architecture.md"
    later = {other for other in imported(MODULES[name]) if ORDER.index(other) >= ORDER.index(name)}
    assert not later, f"{name} imports {later}, which stand after it"


def test_the_list_of_rooms_is_complete() -> None:
    rooms = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## Rooms")[2]
    named = {name for line in rooms.splitlines() if line.startswith("|") for name in re.findall(r"`(\w+)`", line)}
    plain = {name.partition(".")[0] for name in MODULES} - {"__init__", "__main__"}
    assert plain <= named


def test_only_one_module_writes_json() -> None:
    """Which knows no NaN and no infinity."""
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in ("dumps", "dump") and ast.unparse(node.value) == "json":
                assert name == "common.strict_json", f"{name}.py line {node.lineno} writes JSON by itself"


def test_only_store_writes_hdf5() -> None:
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("h5py.File", "File"):
                mode = [*node.args[1:2], *(word.value for word in node.keywords if word.arg == "mode")]
                reads = not mode or (isinstance(mode[0], ast.Constant) and mode[0].value == "r")
                assert reads or name == "store", f"{name}.py line {node.lineno} opens a file for writing"
            elif isinstance(node, ast.Attribute) and node.attr in ("create_dataset", "write_direct_chunk"):
                assert name == "store", f"{name}.py line {node.lineno} writes HDF5"


def test_only_storage_and_the_reader_read_hdf5() -> None:
    """So that nothing is read of a file that the schema has not checked."""
    for name, tree in MODULES.items():
        names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        assert "h5py" not in names or name in ("store", "reader", "storage.schema", "storage.objects"), (
            f"{name} imports h5py"
        )
        methods = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert "hdf5" not in methods or name == "reader", f"{name} opens a file in HDF5"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stored") / "acts.h5"
    make_file(path, {"layer": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2)})
    return path


WITHOUT_TORCH = {
    "import": "import fmextract; fmextract.Config; dir(fmextract)",
    "help": "from fmextract.cli.commands import main; assert main(['--help']) == 0",
    "help of extract": "from fmextract.cli.commands import main; assert main(['extract', '--help']) == 0",
    "info": "from fmextract.cli.commands import main; assert main(['info', FILE]) == 0",
    "read": "import fmextract; a = fmextract.open(FILE); a.keys, a['layer'][1, 2], a.info(), list(a.batches())",
    "look": "import fmextract.visual",
    "export": "import fmextract; [fmextract.export(FILE, to=to, out=FILE + end) for to, end in EXPORTS]",
}


EXPORTS = [
    ("npy", "-npy"),
    ("safetensors", ".safetensors"),
    ("parquet", ".parquet"),
    ("netcdf", ".nc"),
    ("rdm", ".hdf5"),
]


@pytest.mark.parametrize("what", WITHOUT_TORCH)
def test_needs_no_torch(what: str, stored: Path) -> None:
    code = f"FILE, EXPORTS = {str(stored)!r}, {EXPORTS}; {WITHOUT_TORCH[what]}; import sys"
    code += "; assert 'torch' not in sys.modules"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_help_answers_at_once() -> None:
    """Measured 0.11 s; the limit is what a person does not notice, with room for a busy machine."""
    code = "import time; t = time.process_time(); from fmextract.cli.commands import main; main(['--help'])"
    code += "; import sys; print(time.process_time() - t, file=sys.stderr)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert float(ended.stderr) < 0.5
