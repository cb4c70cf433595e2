"""`__all__` is what the package really offers."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import fmextract

PACKAGE = Path(fmextract.__file__).parent


def test_all_is_sorted_and_has_no_twins() -> None:
    assert fmextract.__all__ == sorted(set(fmextract.__all__))


@pytest.mark.parametrize("name", fmextract.__all__)
def test_everything_in_all_is_there(name: str) -> None:
    assert getattr(fmextract, name) is not None


def test_all_is_everything_public() -> None:
    tree = ast.parse(Path(fmextract.__file__).read_text(encoding="utf-8"))
    offered = {"__version__", *fmextract._LAZY}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("fmextract."):
            offered |= {alias.asname or alias.name for alias in node.names}
    assert set(fmextract.__all__) == offered
    assert set(dir(fmextract)) == offered


def test_every_error_is_exported() -> None:
    errors = importlib.import_module("fmextract.errors")
    raised = {name for name, thing in vars(errors).items() if isinstance(thing, type) and issubclass(thing, Exception)}
    assert raised <= set(fmextract.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'extrakt'"):
        fmextract.extrakt  # noqa: B018


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_all_of_every_module_names_what_is_defined_there(path: Path) -> None:
    name = ".".join(("fmextract", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    if name == "fmextract.__main__":
        return
    module = importlib.import_module(name)
    for member in getattr(module, "__all__", ()):
        assert hasattr(module, member), f"{name}.__all__ names {member}"
