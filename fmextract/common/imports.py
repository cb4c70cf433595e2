"""An object by the name that a user gives it: `module:name` or `path/file.py:name`."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from fmextract.common import trust
from fmextract.errors import ConfigError

__all__ = ["import_object"]


def import_object(text: str, error: type[ConfigError], purpose: str) -> Any:
    """What `module:name` or `path/file.py:name` names; `name` may have dots. `purpose` begins the error's message.

    A module is looked for where Python does, and in the working directory. Where names come out of a file, only what
    the user gave again is imported (`trust`).
    """
    trust.check_import(text, purpose)
    place, _, name = text.rpartition(":")
    if not place or not name:
        raise error(f"{purpose}: expected module:name or path/file.py:name, got {text!r}")
    try:
        module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
        return functools.reduce(getattr, name.split("."), module)
    except FileNotFoundError as missing:
        raise error(f"{purpose}: there is no file {place!r}") from missing
    except AttributeError as missing:
        raise error(f"{purpose}: {place!r} has no {name!r} ({missing})") from missing
    except Exception as cause:  # the module is the user's: it may raise anything while it is imported
        raise error(f"{purpose}: importing {place!r} raised {type(cause).__name__}: {cause}") from cause


def _import_module(name: str) -> Any:
    here = str(Path.cwd())
    if here in sys.path or "" in sys.path:
        return importlib.import_module(name)
    sys.path.append(here)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(here)


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses and pickles look their module up
    spec.loader.exec_module(module)
    return module
