"""Imports go one way, from room to room; what only reads needs no torch; one room writes HDF5."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import numpy as np
import pytest
from files import make_file
from torch import nn

PACKAGE = Path(__file__).parent.parent / "fmextract"

# A room may import those that stand before it; inputs and capture do not know each other.
ROOMS = [
    "errors",
    "records",
    "options",
    "common",
    "config",
    "selector",
    "storage",
    "planning",
    "reading",
    "inputs",
    "capture",
    "model",
    "pipeline",
    "run",
    "verification",
    "testing",
    "benchmark",
    "comparison",
    "exporting",
    "visual",
    "demo",
    "api",
    "__init__",
    "cli",
    "__main__",
]
STRANGERS = {"inputs": "capture", "capture": "inputs"}


def modules() -> dict[str, ast.Module]:
    """Every module of the package by its name, `visual` for visual/__init__.py."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


MODULES = modules()


def room(name: str) -> str:
    return name.partition(".")[0]


def at_runtime(tree: ast.Module) -> ast.Module:
    """Without what is imported for type checkers alone."""
    body = [n for n in tree.body if not (isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")]
    return ast.Module(body, [])


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
    assert room(name) in ROOMS, f"give {room(name)} its place in ROOMS, and on docs/explanation/architecture.md"
    before = ROOMS[: ROOMS.index(room(name)) + 1]
    upward = {other for other in imported(MODULES[name]) if room(other) not in before}
    assert not upward, f"{name} imports {upward}, whose rooms stand after it"
    strangers = {other for other in imported(MODULES[name]) if room(other) == STRANGERS.get(room(name))}
    assert not strangers, f"{name} imports {strangers}"


def test_there_are_no_circles() -> None:
    graph = {name: set(imported(at_runtime(tree))) - {name} for name, tree in MODULES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names them


def private_names(tree: ast.Module) -> set[str]:
    """What begins with an underscore and belongs to a class of this module: its attributes, methods and fields."""
    found = set()
    for cls in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        for node in ast.walk(cls):
            if isinstance(node, ast.FunctionDef):
                found.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
    return {name for name in found if name.startswith("_") and not name.endswith("__")}


PRIVATE = {name: private_names(tree) for name, tree in MODULES.items()}


@pytest.mark.parametrize("name", MODULES)
def test_what_is_private_is_used_at_home(name: str) -> None:
    """What a class keeps to itself, in its module; what a module keeps to itself, in its room."""
    torchs = {attribute for attribute in vars(nn.Module()) if attribute.startswith("_")}
    foreign = set().union(*(names for other, names in PRIVATE.items() if other != name)) - PRIVATE[name] - torchs
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("fmextract."):
            private = [alias.name for alias in node.names if alias.name.startswith("_")]
            at_home = room(str(node.module).removeprefix("fmextract.")) == room(name)
            assert at_home or not private, f"{name}.py line {node.lineno} imports {private} from {node.module}"
        elif isinstance(node, ast.Attribute) and node.attr in foreign:
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            assert own, f"{name}.py line {node.lineno} uses .{node.attr} of another module's class"


def test_no_module_at_the_top_has_the_name_of_a_function() -> None:
    """Importing it would put the module in the place of the function."""
    import fmextract

    names = set(map(room, MODULES)) - {"__init__", "__main__"}
    assert not {name for name in names if callable(getattr(fmextract, name, None))}


def test_only_one_module_writes_json() -> None:
    """Which knows no NaN and no infinity."""
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in ("dumps", "dump") and ast.unparse(node.value) == "json":
                assert name == "common.strict_json", f"{name}.py line {node.lineno} writes JSON by itself"


def test_only_storage_writes_hdf5() -> None:
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("h5py.File", "File"):
                mode = [*node.args[1:2], *(word.value for word in node.keywords if word.arg == "mode")]
                reads = not mode or (isinstance(mode[0], ast.Constant) and mode[0].value == "r")
                assert reads or room(name) == "storage", f"{name} line {node.lineno} opens a file for writing"
            elif isinstance(node, ast.Attribute) and node.attr in ("create_dataset", "write_direct_chunk"):
                assert room(name) == "storage", f"{name} line {node.lineno} writes HDF5"


def test_only_storage_and_reading_read_hdf5() -> None:
    """So that nothing is read of a file that the schema has not checked."""
    for name, tree in MODULES.items():
        names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        assert "h5py" not in names or room(name) == "storage" or name == "reading.files", f"{name} imports h5py"
        methods = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert "hdf5" not in methods or room(name) == "reading", f"{name} opens a file in HDF5"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stored") / "acts.h5"
    make_file(path, {"layer": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2)})
    return path


WITHOUT_TORCH = {
    "import": "import fmextract; fmextract.Config; dir(fmextract)",
    "help": "from fmextract.cli import main; assert main(['--help']) == 0",
    "help of extract": "from fmextract.cli import main; assert main(['extract', '--help']) == 0",
    "info": "from fmextract.cli import main; assert main(['info', FILE]) == 0",
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
    code = "import time; t = time.process_time(); from fmextract.cli import main; main(['--help'])"
    code += "; import sys; print(time.process_time() - t, file=sys.stderr)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert float(ended.stderr) < 0.5


def test_no_test_needs_a_top_level_package_of_tests() -> None:
    """Some dependencies install one (thingsvision does): it must not come in place of ours."""
    folder = Path(__file__).parent
    assert not list(folder.rglob("__init__.py"))
    for path in [*folder.rglob("*.py"), *folder.parent.glob("benchmarks/**/*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        names += [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert "tests" not in {name.partition(".")[0] for name in names}, path
