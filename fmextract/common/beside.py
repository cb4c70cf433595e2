"""Load a user's Python files. Each finds the files beside it, as a script there does, and no other code finds them.

A file becomes a module of a name that no import leads to, so that a random.py or torch.py of the user's hides no
other. Its own `import` statements, at the top or in functions that are called later, look beside it first. Those of the
modules found there do, too: two folders may have a blocks.py each. Python's own modules, and installed ones that were
imported already, are not looked for there.

While a file is executed, or what it defines is called for the first time (`importable_beside`), all code finds its
neighbours by their plain names, also through importlib and pickles. They are the modules that `import` gives.
"""

from __future__ import annotations

import builtins
import contextlib
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import sys
import sysconfig
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["importable_beside", "load_file", "plain_name"]

KEPT = 8
"""Modules of one file that stay findable by their names, for pickles: each request executes the file again."""

_runs: dict[Path, OrderedDict[str, None]] = {}
_numbers = itertools.count(1)


def load_file(path: Path, name: str = "") -> ModuleType:
    """Execute a file as a module with this or a new name. Raises FileNotFoundError, and what the file raises."""
    place = path.resolve()
    if not place.is_file():
        raise FileNotFoundError(path)
    folder = _folder_of(place.parent)
    name = name or f"{_package_of(place)}{place.stem.replace('.', '_')}_{folder.mark}_{next(_numbers)}"
    runs = _runs.setdefault(place, OrderedDict())
    runs[name] = None
    try:
        with folder.importable(place):
            module = folder.load(name, place)
    except BaseException:
        del runs[name]
        raise
    while len(runs) > KEPT:
        sys.modules.pop(runs.popitem(last=False)[0], None)
    return module


@contextlib.contextmanager
def importable_beside(path: Path) -> Iterator[None]:
    """Make the neighbours of a file importable by their plain names within the block, as while it is executed."""
    place = path.resolve()
    with _folder_of(place.parent).importable(place):
        yield


def plain_name(module: str) -> str:
    """Return what a person calls a module: its file's name for one loaded here, the same in every process."""
    loader = getattr(sys.modules.get(module), "__loader__", None)
    return Path(loader.path).stem if isinstance(loader, _Loader) else module


class _Folder:
    """One folder, and what was imported of it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.mark = hashlib.sha256(str(folder).encode("utf-8", "surrogateescape")).hexdigest()[:8]
        self.builtins = {**vars(builtins), "__import__": self._import}
        self._loaded: dict[str, tuple[int, int]] = {}

    @contextlib.contextmanager
    def importable(self, file: Path) -> Iterator[None]:
        """Give the modules of this folder their plain names within the block; `file` too, if its name is free."""
        first, last = _Neighbours(self, file), _Rest(self)
        tops = {name.partition(".")[0] for name in sys.modules}
        ours = {top for top in tops if self.beside(top) not in (None, file)}
        others = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in ours}
        for name in others:
            del sys.modules[name]
        sys.meta_path.insert(0, first)
        sys.meta_path.append(last)
        try:
            yield
        finally:
            sys.meta_path.remove(first)
            sys.meta_path.remove(last)
            for name in first.found | last.found:
                sys.modules.pop(name, None)
            sys.modules.update(others)

    def load(self, name: str, file: Path) -> ModuleType:
        if file.is_dir():
            return self._load_folder(name, file)
        inside = [str(file.parent)] if file.name == "__init__.py" else None
        loader = _Loader(name, str(file), self)
        spec = importlib.util.spec_from_file_location(name, file, loader=loader, submodule_search_locations=inside)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        self._loaded[name] = _stamp(file)
        _owners[name] = self
        sys.modules[name] = module  # dataclasses and pickles look their module up
        try:
            loader.exec_module(module)
        except BaseException:
            sys.modules.pop(name, None)
            raise
        return module

    def _load_folder(self, name: str, folder: Path) -> ModuleType:
        """Make a package without an __init__.py."""
        spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        module = importlib.util.module_from_spec(spec)
        self._loaded[name] = _stamp(folder)
        _owners[name] = self
        sys.modules[name] = module
        return module

    def _import(
        self,
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] = (),
        level: int = 0,
    ) -> ModuleType:
        """Return the `import` of the modules of this folder."""
        top, dot, below = name.partition(".")
        if level > 0:
            _load_package((globals or {}).get("__package__") or "", self.path)
            return builtins.__import__(name, globals, locals, fromlist, level)
        file = self.beside(top)
        if file is None or str(file) == (globals or {}).get("__file__"):
            return builtins.__import__(name, globals, locals, fromlist, level)
        return builtins.__import__(f"{self.neighbour(top, file)}{dot}{below}", globals, locals, fromlist, 0)

    def beside(self, top: str) -> Path | None:
        """Return the file, or folder, of a module in this folder that its files mean by this name."""
        if top in sys.stdlib_module_names or top == "fmextract" or _is_installed(sys.modules.get(top)):
            return None
        files = (self.path / top / "__init__.py", self.path / f"{top}.py")
        found = next((file for file in files if file.is_file()), None)
        folder = self.path / top
        return folder if found is None and folder.is_dir() and _is_nothing_else(top, folder) else found

    def neighbour(self, top: str, file: Path) -> str:
        """Return the name of a module of this folder, which is imported if it was not yet, or was changed since."""
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


class _Neighbours(importlib.abc.MetaPathFinder):
    """Finds the modules of a folder by their plain names, before all others do."""

    def __init__(self, folder: _Folder, file: Path) -> None:
        self.folder = folder
        self.file = file
        self.found: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        top, _, below = fullname.partition(".")
        file = self.folder.beside(top)
        if file is None:
            return None
        if file == self.file:  # which often imports another module that it is called like
            return None if below or not _is_nothing_else(top, file) else self._spec(fullname, self._itself)
        if below and importlib.util.find_spec(f"{self.folder.neighbour(top, file)}.{below}") is None:
            return None
        return self._spec(fullname, lambda: self._neighbour(top, file, below))

    def _spec(self, name: str, get: Callable[[], ModuleType]) -> importlib.machinery.ModuleSpec:
        self.found.add(name)
        return importlib.machinery.ModuleSpec(name, _Other(get))

    def _itself(self) -> ModuleType:
        return sys.modules[next(reversed(_runs[self.file]))]

    def _neighbour(self, top: str, file: Path, below: str) -> ModuleType:
        name = self.folder.neighbour(top, file)
        return importlib.import_module(f"{name}.{below}") if below else sys.modules[name]


class _Rest(importlib.abc.MetaPathFinder):
    """Finds what else lies in a folder, and nowhere else: compiled modules."""

    def __init__(self, folder: _Folder) -> None:
        self.folder = folder
        self.found: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if "." in fullname:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, [str(self.folder.path)], target)
        if spec is None or not isinstance(spec.loader, importlib.machinery.ExtensionFileLoader):
            return None
        self.found.add(fullname)
        return spec


class _Other(importlib.abc.Loader):
    """Gives a module that was imported before, under another name."""

    def __init__(self, get: Callable[[], ModuleType]) -> None:
        self.get = get

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = self.get()
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # an import has just set that of the other name


class _Packages(importlib.abc.MetaPathFinder):
    """Finds the modules within a package of a folder of the user's."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        folder = _owners.get(fullname.partition(".")[0])
        if "." not in fullname or folder is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(fullname, spec.loader.path, folder)
        return spec


_folders: dict[Path, _Folder] = {}
_owners: dict[str, _Folder] = {}
"""The folders of the modules that were loaded here."""


def _folder_of(path: Path) -> _Folder:
    if not any(isinstance(finder, _Packages) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Packages())
    return _folders.setdefault(path, _Folder(path))


def _is_installed(module: ModuleType | None) -> bool:
    places = sysconfig.get_paths()
    file = getattr(module, "__file__", None) or ""
    return file.startswith((places["purelib"], places["platlib"]))


def _is_nothing_else(top: str, place: Path) -> bool:
    """Return whether a name means this file, or folder without an __init__.py; other modules of that name go first."""
    if top in sys.modules:
        found = getattr(sys.modules[top], "__file__", None)
    else:
        spec = importlib.machinery.PathFinder.find_spec(top)
        found = spec.origin if spec is not None else None
    return found is None or Path(found) == place


def _package_of(file: Path) -> str:
    """Return the package that a file lies in, for its relative imports, with a dot at the end; "" outside of one."""
    above = list(itertools.takewhile(lambda folder: (folder / "__init__.py").is_file(), file.parents))
    if not above or file.name == "__init__.py":
        return ""
    root = _folder_of(above[-1].parent)
    return ".".join([f"{above[-1].name}_{root.mark}", *(folder.name for folder in above[-2::-1])]) + "."


def _load_package(package: str, folder: Path) -> None:
    """Load the topmost package of a file that was loaded by itself, before its first relative import."""
    top = package.partition(".")[0]
    for place in (folder, *folder.parents):
        root = _folders.get(place.parent)
        if root is not None and top == f"{place.name}_{root.mark}":
            root.neighbour(place.name, place / "__init__.py")
