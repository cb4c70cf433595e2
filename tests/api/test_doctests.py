"""Every public name is described, and its example does what it says."""

from __future__ import annotations

import dataclasses
import doctest
import importlib.util
import inspect
import pkgutil
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

import fmextract as fm
from fmextract import benchmark
from fmextract.options import MapOptions, RunOptions

FUNCTIONS = {name: getattr(fm, name) for name in fm.__all__ if inspect.isfunction(getattr(fm, name))}
CLASSES = {name: getattr(fm, name) for name in fm.__all__ if inspect.isclass(getattr(fm, name))}
EXAMPLES = [
    pytest.param(example, id=example.name)
    for name in sorted({**FUNCTIONS, **CLASSES})
    for example in doctest.DocTestFinder(exclude_empty=True).find(
        getattr(fm, name), name, module=sys.modules[getattr(fm, name).__module__]
    )
    if example.examples
]


def sections(text: str) -> dict[str, str]:
    """What stands under each heading of a docstring in Google's style."""
    parts = re.split(
        r"^(Args|Attributes|Returns|Yields|Raises|Examples):\n", inspect.cleandoc(text), flags=re.MULTILINE
    )
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four photos and a small output; every submodule has been imported."""
    for module in pkgutil.walk_packages(fm.__path__, "fmextract."):
        spec = importlib.util.find_spec(module.name)
        if spec is not None and str(spec.origin).endswith(".py"):  # the kernels are loaded by ctypes
            importlib.import_module(module.name)
    folder = tmp_path_factory.mktemp("examples")
    (folder / "photos").mkdir()
    random = np.random.default_rng(0)
    for name in "abcd":
        pixels = random.integers(0, 256, (240, 320, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / "photos" / f"{name}.png")
    fm.extract(
        folder / "photos",
        "shufflenet_v2_x0_5",
        folder / "acts.h5",
        layers=["conv1", "conv5"],
        weights="random:0",
        progress=False,
    ).close()
    return folder


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_example(example: doctest.DocTest, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(benchmark, "STAGE_SECONDS", 0.01)
    said: list[str] = []
    example.globs = {"fm": fm, "np": np}
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    doctest.DocTestRunner(optionflags=flags).run(example, out=said.append, clear_globs=False)
    for made in example.globs.values():
        if isinstance(made, fm.Activations):
            made.close()
    assert not said, "".join(said)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_a_function_is_described(name: str) -> None:
    function = FUNCTIONS[name]
    doc = inspect.getdoc(function)
    assert doc
    assert re.match(r"[A-Z][a-z]+ ", doc), "a verb comes first"
    found = sections(doc)
    assert {"Args", "Returns", "Raises", "Examples"} <= set(found)
    described = set(re.findall(r"^    \*{0,2}(\w+):", found["Args"], flags=re.MULTILINE))
    own = inspect.signature(function, follow_wrapped=False).parameters
    code = function.__code__
    spelled = set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
    assert described - {"options"} == spelled
    assert spelled <= set(own)
    assert ">>> " in found["Examples"]


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_a_class_is_described(name: str) -> None:
    doc = inspect.getdoc(CLASSES[name])
    assert doc
    if dataclasses.is_dataclass(CLASSES[name]) and name != "Config":  # whose options are described as `RunOptions`
        described = re.findall(r"^    (\w+):", sections(doc)["Attributes"], flags=re.MULTILINE)
        assert described == [field.name for field in dataclasses.fields(CLASSES[name]) if field.name[0] != "_"]


@pytest.mark.parametrize("options", [RunOptions, MapOptions])
def test_every_option_is_described(options: Any) -> None:
    described = re.findall(r'^    (\w+): .+\n    """', inspect.getsource(options), flags=re.MULTILINE)
    assert described == list(options.__annotations__)
