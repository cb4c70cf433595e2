"""Import an object by the name that a user gives: `module:name` or `path/file.py:name`."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fmextract.common import trust
from fmextract.common.beside import importable_beside, load_file
from fmextract.errors import ConfigError

__all__ = ["import_object", "importing_for"]


def import_object(text: str, error: type[ConfigError], purpose: str) -> Any:
    """Return the object that `module:name` or `path/file.py:name` names; `name` may have dots.

    `purpose` begins the message of an error.

    A module is looked for where Python does, and in the working directory; a file finds what lies beside it
    (`beside`). Where names come out of a file, only what the user gave again is imported (`trust`).
    """
    trust.check_import(text, purpose)
    place, _, name = text.rpartition(":")
    if not place or not name:
        raise error(f"{purpose}: expected module:name or path/file.py:name, got {text!r}")
    try:
        module = load_file(Path(place)) if place.endswith(".py") else _import_module(place)
        return functools.reduce(getattr, name.split("."), module)
    except FileNotFoundError as missing:
        raise error(f"{purpose}: there is no file {place!r}") from missing
    except AttributeError as missing:
        raise error(f"{purpose}: {place!r} has no {name!r} ({missing})") from missing
    except Exception as cause:  # the module is the user's: it may raise anything while it is imported
        raise error(f"{purpose}: importing {place!r} raised {type(cause).__name__}: {cause}") from cause


@contextlib.contextmanager
def importing_for(text: str) -> Iterator[None]:
    """Find modules within the block as while `import_object(text)` ran, so that what it gave may be called."""
    place = text.rpartition(":")[0]
    with importable_beside(Path(place)) if place.endswith(".py") else _working_directory():
        yield


def _import_module(name: str) -> Any:
    with _working_directory():
        return importlib.import_module(name)


@contextlib.contextmanager
def _working_directory() -> Iterator[None]:
    """Find modules in the working directory too, within the block."""
    here = str(Path.cwd())
    if here in sys.path or "" in sys.path:
        yield
        return
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)
