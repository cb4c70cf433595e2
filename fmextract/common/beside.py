"""Python files of the user's, each of which finds the files beside it, as a script there does; nobody else finds them.

A file is a module of a name that no import leads to, so that one called random.py or torch.py stands in nobody's way.
Its own `import` statements, at the top or in functions that are called later, look beside it first, and those of the
modules found there do, too: two folders may have a blocks.py each. What Python itself brings along, and what is
installed and was imported already, is not looked for there.
"""

from __future__ import annotations

import builtins
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import sys
import sysconfig
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["load_file", "plain_name"]

KEPT = 8
"""Modules of one file that stay findable by their names, for pickles: it is executed anew each time it is asked for."""

_runs: dict[Path, OrderedDict[str, None]] = {}
_numbers = itertools.count(1)


def load_file(path: Path, name: str = "") -> ModuleType:
    """Execute a file as a module, of this name or of one of its own. Raises FileNotFoundError, and what it raises."""
    place = path.resolve()
    if not place.is_file():
        raise FileNotFoundError(path)
    folder = _folder_of(place.parent)
    name = name or f"{place.stem.replace('.', '_')}_{folder.mark}_{next(_numbers)}"
    module = folder.load(name, place)
    runs = _runs.setdefault(place, OrderedDict())
    runs[name] = None
    while len(runs) > KEPT:
        sys.modules.pop(runs.popitem(last=False)[0], None)
    return module


def plain_name(module: str) -> str:
    """What a person calls a module: of one that was loaded here the name of its file, the same in every process."""
    loader = getattr(sys.modules.get(module), "__loader__", None)
    return Path(loader.path).stem if isinstance(loader, _Loader) else module


class _Folder:
    """One folder, and what was imported of it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.mark = hashlib.sha256(str(folder).encode("utf-8", "surrogateescape")).hexdigest()[:8]
        self.builtins = {**vars(builtins), "__import__": self._import}
        self._loaded: dict[str, tuple[int, int]] = {}

    def load(self, name: str, file: Path) -> ModuleType:
        inside = [str(file.parent)] if file.name == "__init__.py" else None
        loader = _Loader(name, str(file), self)
        spec = importlib.util.spec_from_file_location(name, file, loader=loader, submodule_search_locations=inside)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        self._loaded[name] = _stamp(file)
        sys.modules[name] = module  # dataclasses and pickles look their module up
        try:
            loader.exec_module(module)
        except BaseException:
            sys.modules.pop(name, None)
            raise
        return module

    def _import(
        self,
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] = (),
        level: int = 0,
    ) -> ModuleType:
        """The `import` of the modules of this folder."""
        top, dot, below = name.partition(".")
        file = self._beside(top) if level == 0 else None
        if file is None or str(file) == (globals or {}).get("__file__"):
            return builtins.__import__(name, globals, locals, fromlist, level)
        return builtins.__import__(f"{self._neighbour(top, file)}{dot}{below}", globals, locals, fromlist, 0)

    def _beside(self, top: str) -> Path | None:
        """The file of a module in this folder that its files mean by this name."""
        if top in sys.stdlib_module_names or _is_installed(sys.modules.get(top)):
            return None
        files = (self.path / top / "__init__.py", self.path / f"{top}.py")
        return next((file for file in files if file.is_file()), None)

    def _neighbour(self, top: str, file: Path) -> str:
        """The name of a module of this folder, which is imported if it was not yet, or was changed since."""
        name = f"{top}_{self.mark}"
        if name not in sys.modules or self._loaded.get(name) != _stamp(file):
            for below in [other for other in sys.modules if other.startswith(f"{name}.")]:
                del sys.modules[below]
            self.load(name, file)
        return name


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_mtime_ns, status.st_size


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, folder: _Folder) -> None:
        super().__init__(name, path)
        self.folder = folder

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = self.folder.builtins
        super().exec_module(module)


class _Packages(importlib.abc.MetaPathFinder):
    """Finds the modules within a package of a folder of the user's."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        above = sys.modules.get(fullname.partition(".")[0])
        loader = getattr(above, "__loader__", None)
        if "." not in fullname or not isinstance(loader, _Loader):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(fullname, spec.loader.path, loader.folder)
        return spec


_folders: dict[Path, _Folder] = {}


def _folder_of(path: Path) -> _Folder:
    if not any(isinstance(finder, _Packages) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Packages())
    return _folders.setdefault(path, _Folder(path))


def _is_installed(module: ModuleType | None) -> bool:
    places = sysconfig.get_paths()
    file = getattr(module, "__file__", None) or ""
    return file.startswith((places["purelib"], places["platlib"]))
