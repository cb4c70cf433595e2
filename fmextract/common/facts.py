"""Describe Python objects by facts that are equal in another process, on another machine, after an edit of a comment.

Code is described by its instructions, with the names and constants they use; values by their content. Nothing depends
on `repr`, on addresses, or on the order of sets and plain dicts. Code of installed libraries is described by its name:
which version is installed is for the reader to compare. What cannot be described is named.
"""

from __future__ import annotations

import csv
import datetime
import decimal
import dis
import enum
import fractions
import functools
import importlib.util
import operator
import os
import pathlib
import re
import struct
import sys
import sysconfig
import types
import uuid
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

CHANGES = "changes while it runs"
"""Stands for a value that a run itself changes (a counter, a cache): it says nothing of what a run is."""
MOST_FACTS = 250
"""More facts become one: those of a run stand in an attribute of its file."""
SHORT = 60  # characters of a text that stands among the facts as it is
MOST_DEPTH = 50
MOST_OF_PATH = 1024  # characters
SAMPLED_BYTES = 1 << 30
"""A larger file that is mapped into memory is read in parts."""

_DYNAMIC = frozenset({"getattr", "vars", "__dict__", "eval", "exec", "locals"})
_OF_CLASS_BODIES = frozenset({"__doc__", "__firstlineno__", "__static_attributes__", "__module__", "__qualname__"})
_SILENT = ("logging", "warnings", "threading", "_thread", "contextvars", "typing", "abc", "weakref", "tqdm")
"""Packages whose objects decide no value."""
_STANDARD = ("argparse", "collections", "types")
"""Packages of Python's own whose objects are what their attributes say."""
LARGE = ("torch", "torchvision", "torchaudio", "functorch", "triton", "timm", "numpy", "scipy", "pandas", "PIL")
"""Libraries wherever they lie: to read all code of torch would take minutes."""


def interpreter() -> str:
    """Return which instructions code is made of: code is comparable where this is the same."""
    return f"{sys.implementation.cache_tag}-{importlib.util.MAGIC_NUMBER.hex()}"


@dataclass(frozen=True, slots=True)
class Told:
    """Facts, the installed libraries that were met, and what could not be described: `name (why)`."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    packages: frozenset[str] = frozenset()
    unknown: tuple[str, ...] = ()
    paths: frozenset[str] = frozenset()
    """Texts that may be the paths of files, and the files that objects hold open for reading."""


def changing(facts: Mapping[str, Any]) -> list[str]:
    """Return the facts that say nothing, as a run itself changes them."""
    return [f"{name} ({CHANGES})" for name, fact in facts.items() if fact == CHANGES]


def settled(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts `now`, with CHANGES in place of those that differ from `before`."""
    names = [*now, *(name for name in before if name not in now)]
    return {name: now[name] if name in now and before.get(name) == now[name] else CHANGES for name in names}


class Facts:
    """Collects facts of objects, and of all code and data that they use."""

    def __init__(self, places: Mapping[int, str] | None = None) -> None:
        """Begin with no facts. `places` name objects, by `id`, that are described elsewhere."""
        self.names: set[str] = set()
        """Attributes that code names: one that no code names decides nothing."""
        self._packages: set[str] = set()
        self._unknown_parts: dict[str, str] = {}
        self._paths: set[str] = set()
        self._dynamic = False
        self._places = dict(places or {})
        self._told: dict[str, list[Any]] = {}
        self._numbers: dict[int, int] = {}
        self._named: Counter[str] = Counter()
        self._kept: list[Any] = []  # what has a number: no `id` is used twice
        self._functions: deque[types.FunctionType] = deque()
        self._methods: dict[type, set[str]] = {}
        self._open: dict[type, bool] = {}
        self._subject = ""
        self._stack: set[int] = set()

    # ---- what can be asked for

    def value(self, name: str, value: Any) -> None:
        """Describe `value` under `name`: as it is where it is short and plain, else by a digest of its content."""
        self._tell(name, self._shown(name, value))

    def cannot_tell(self, name: str, value: Any) -> None:
        """Name `value` as what cannot be described."""
        self._unknown_parts[name] = f"an object of type {type(value).__qualname__}"

    def methods(self, cls: type, names: Iterable[str]) -> None:
        """Describe these methods of a class, and the other methods of it that described code uses."""
        known = self._methods.setdefault(cls, set())
        self._keep(cls)
        for name in names:
            if name not in known:
                known.add(name)
                for owner, found in _defined(cls, name):
                    self._method(owner, name, found)

    def drain(self) -> None:
        """Describe everything that was met so far, and what that uses."""
        while True:
            while self._functions:
                self._function(self._functions.popleft())
            before = sum(map(len, self._methods.values()))
            for cls in list(self._methods):
                everything = self._open.get(cls, False)
                self.methods(cls, sorted(_own_names(cls) if everything else _own_names(cls) & self.names))
            if not self._functions and before == sum(map(len, self._methods.values())):
                return

    def objects(self, groups: Mapping[type, Sequence[tuple[str, Mapping[str, Any]]]], entries: Sequence[str]) -> None:
        """Describe objects by class, given as (place, attributes): the methods `entries`, what these use, and the
        attributes that any code names.
        """
        for cls in groups:
            self.methods(cls, entries)
        self.names |= set(entries)
        done: set[tuple[type, str]] = set()
        while True:
            self.drain()
            fresh = [
                (cls, name)
                for cls, members in groups.items()
                for name in sorted({name for _, attributes in members for name in attributes})
                if (cls, name) not in done and (self._dynamic or name in self.names)
            ]
            if not fresh:
                return
            for cls, name in fresh:
                done.add((cls, name))
                self._attribute(cls, name, [(place, held[name]) for place, held in groups[cls] if name in held])

    def _attribute(self, cls: type, name: str, values: Sequence[tuple[str, Any]]) -> None:
        """Describe an attribute of all objects of a class: by its value, where all have the same."""
        label = f"{_local(cls)}.{name}"
        if is_library(cls.__module__):
            self._tell(f"settings of {_local(cls)}", (name, self.digest(label, values)))
            return
        shown = [self._shown(label, value) for _, value in values]
        same = all(type(other) is type(shown[0]) and other == shown[0] for other in shown)
        self._tell(label, shown[0] if same else self.digest(label, values))

    def told(self) -> Told:
        """Return all facts, as JSON."""
        self.drain()
        made = {name: found[0] if len(found) == 1 else _hex(*map(_plain, found)) for name, found in self._told.items()}
        made = {name: _hex(_plain(fact)) if isinstance(fact, tuple) else fact for name, fact in made.items()}
        if len(made) > MOST_FACTS:
            names = sorted(made)
            rest = [_plain((name, made[name])) for name in names[MOST_FACTS:]]
            made = {name: made[name] for name in names[:MOST_FACTS]} | {"everything else": _hex(*rest)}
        unknown = tuple(f"{name} ({why})" for name, why in self._unknown_parts.items())
        packages = frozenset(self._packages - sys.stdlib_module_names - {"fmextract"})
        return Told(made, packages, unknown, frozenset(self._paths))

    # ---- code

    def _tell(self, name: str, fact: Any) -> None:
        self._told.setdefault(name, []).append(fact)

    def _method(self, owner: type, name: str, found: Any) -> None:
        for function in _functions_in(found):
            self._queue(function)
        if not _functions_in(found) and not _is_descriptor(found) and not is_library(owner.__module__):
            self.value(f"class {_local(owner)}.{name}", found)

    def _queue(self, function: types.FunctionType) -> int:
        known = id(function) in self._numbers
        number = self._keep(function)
        if not known:
            self._functions.append(function)
        return number

    def _keep(self, thing: Any) -> int:
        """Return the number of a function or class: as many of its name as were met before it."""
        if id(thing) not in self._numbers:
            self._numbers[id(thing)] = self._named[thing.__name__]
            self._named[thing.__name__] += 1
            self._kept.append(thing)
        return self._numbers[id(thing)]

    def _function(self, function: types.FunctionType) -> None:
        read = _read(function.__code__)
        self.names |= read.names
        home = function.__globals__.get("__name__") or ""
        name = _local(function)
        if is_library(home):
            self._package(home)
        else:
            self._tell(name, read.digest)
            self._dynamic |= read.dynamic
            for chain in read.chains:
                self._global(function, chain)
            for parameter, default in _defaults(function):
                self.value(f"{name}({parameter}=)", default)
            for attribute, value in sorted(vars(function).items()):
                if attribute != "__wrapped__":
                    self.value(f"{name}.{attribute}", value)
        # What a library's decorator wraps is what its function closes over.
        for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
            try:
                value = cell.cell_contents
            except ValueError:  # not assigned yet
                continue
            if variable != "__class__":
                self.value(f"{name}:{variable}", value)

    def _global(self, function: types.FunctionType, chain: tuple[str, ...]) -> None:
        """Describe a global that code uses; `chain` is its name and the attributes that are taken of it."""
        first, *rest = chain
        if first.startswith("import "):
            self._imported(first.removeprefix("import "))
            return
        if first not in function.__globals__:
            return  # a builtin, by its name; or nothing yet
        value, names, home = function.__globals__[first], [first], ""
        while isinstance(value, types.ModuleType) and rest:
            names.append(rest.pop(0))
            home = value.__name__
            value = vars(value).get(names[-1])
        if value is os.environ or value is os.getenv:
            self._unknown_parts["os.environ"] = "the environment"
        if isinstance(value, types.ModuleType):
            if is_library(value.__name__):
                self._package(value.__name__)
        elif isinstance(value, types.FunctionType):
            self._queue(value)
        elif home and is_library(home):
            self._package(home)  # whose values are its own affair: arguments, environment, settings
        elif not (
            isinstance(value, (type, types.BuiltinFunctionType))
            and is_library(getattr(value, "__module__", None) or "builtins")
        ):
            self.value(".".join(names), value)

    def _imported(self, name: str) -> None:
        """Describe a module that is imported while code runs, by the code in its file."""
        if is_library(name):
            self._package(name)
            return
        if name.rpartition(".")[0] and name.rpartition(".")[0] not in sys.modules:
            return
        try:
            spec = importlib.util.find_spec(name)
            source = pathlib.Path(spec.origin or "").read_bytes() if spec is not None else None
            if source is not None and (spec.origin or "").endswith(".py"):  # type: ignore[union-attr]
                self._tell(f"module {name}", _read(compile(source, name, "exec")).digest)
        except (ImportError, ValueError, OSError, SyntaxError):
            self._unknown_parts[f"module {name}"] = "a module without source"

    def _package(self, module: str) -> None:
        self._packages.add(module.partition(".")[0])

    # ---- data

    def _shown(self, name: str, value: Any) -> Any:
        if type(value) is str:
            self._may_be_path(value)
        if value is None or isinstance(value, (bool, int)) or (isinstance(value, str) and len(value) <= SHORT):
            return int(value) if isinstance(value, int) and not isinstance(value, bool) else value
        if type(value) is float and value == value and abs(value) != float("inf"):
            return value
        if type(value) in (tuple, list) and 0 < len(value) <= 4 and all(type(v) in (int, float, bool) for v in value):
            return [self._shown(name, v) for v in value]
        return self.digest(name, value)

    def digest(self, name: str, value: Any) -> str:
        """Return a digest of the content of `value`; parts that cannot be described are named after `name`."""
        before, self._subject = self._subject, name
        hashed = xxhash.xxh3_128()
        self._put(hashed, value, 0)
        self._subject = before
        return hashed.hexdigest()[:16]

    def _put(self, hashed: Any, value: Any, depth: int) -> None:
        kind = type(value)
        if kind in _PLAIN:
            if kind is str:
                self._may_be_path(value)
            hashed.update(_plain(value))
        elif id(value) in self._places:
            hashed.update(_plain(("place", self._places[id(value)])))
        elif id(value) in self._stack or depth > MOST_DEPTH:
            hashed.update(b"again" if id(value) in self._stack else self._unknown(value))
        else:
            self._stack.add(id(value))
            try:
                self._put_object(hashed, value, depth + 1)
            finally:
                self._stack.discard(id(value))

    def _put_object(self, hashed: Any, value: Any, depth: int) -> None:
        if isinstance(value, np.ndarray):
            self._put_array(hashed, value, depth)
        elif (tensor := _tensor(value)) is not None:
            hashed.update(_plain(("tensor", *_tensor_kind(value))))
            if isinstance(tensor, np.ndarray):
                hashed.update(np.ascontiguousarray(tensor).reshape(-1).data)
            else:
                hashed.update(self._unknown(value))
        elif isinstance(value, type):
            self._put_class(hashed, value)
        elif isinstance(value, enum.Enum):
            hashed.update(_plain(("enum", _local(type(value)), value.name)))
        elif isinstance(value, (str, bytes, int, float)):
            base: Any = next(kind for kind in (str, bytes, int, float) if isinstance(value, kind))
            hashed.update(_plain(base(value)))
        elif type(value).__module__ == "os":
            hashed.update(self._unknown(value))  # the environment
        elif isinstance(value, Mapping):
            self._put_mapping(hashed, value, depth)
        elif isinstance(value, (list, tuple, deque)):
            self._put_sequence(hashed, value, depth)
        elif isinstance(value, (set, frozenset)):
            parts = sorted(self._part(item, depth) for item in value)
            hashed.update(_plain(("set", len(parts))) + b"".join(parts))
        elif isinstance(value, types.FunctionType):
            hashed.update(_plain(("function", value.__name__, self._queue(value))))
        elif isinstance(value, types.MethodType):
            hashed.update(b"method")
            self._put(hashed, value.__func__, depth)
            self._put(hashed, value.__self__, depth)
        elif isinstance(value, (functools.partial, functools.partialmethod)):
            hashed.update(b"partial")
            for part in (value.func, value.args, dict(value.keywords)):
                self._put(hashed, part, depth)
        elif isinstance(value, types.ModuleType):
            hashed.update(_plain(("module", value.__name__)))
        else:
            self._put_instance(hashed, value, depth)

    def _part(self, value: Any, depth: int) -> bytes:
        hashed = xxhash.xxh3_128()
        self._put(hashed, value, depth)
        return bytes(hashed.digest())

    def _put_array(self, hashed: Any, array: np.ndarray[Any, Any], depth: int) -> None:
        hashed.update(_plain(("array", array.dtype.str, *array.shape)))
        if array.dtype.hasobject:
            self._put(hashed, array.tolist(), depth)
        elif isinstance(array, np.memmap) and array.nbytes > SAMPLED_BYTES and len(array):
            for row in range(0, len(array), max(1, len(array) // 500)):
                hashed.update(np.ascontiguousarray(array[row]).reshape(-1).view(np.uint8).data)
            self._unknown_parts[self._subject] = "a file mapped into memory, of which parts were looked at"
        elif array.size:
            hashed.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def _put_mapping(self, hashed: Any, value: Mapping[Any, Any], depth: int) -> None:
        hashed.update(_plain(("mapping", len(value))))
        items: Iterable[tuple[bytes, Any]] = ((self._part(key, depth), item) for key, item in value.items())
        if not isinstance(value, OrderedDict):
            items = sorted(items, key=lambda item: item[0])
        for key, item in items:
            hashed.update(key)
            self._put(hashed, item, depth)

    def _put_sequence(self, hashed: Any, value: Sequence[Any], depth: int) -> None:
        hashed.update(_plain(("tuple" if isinstance(value, tuple) else "list", len(value))))
        kinds = set(map(type, value))
        if len(value) > 100 and kinds <= _PLAIN:
            hashed.update(b"".join(map(_plain, value)))
            for item in value if str in kinds else ():
                self._may_be_path(item)
        else:
            for item in value:
                self._put(hashed, item, depth)

    def _put_class(self, hashed: Any, cls: type) -> None:
        library = is_library(cls.__module__)
        hashed.update(_plain(("class", f"{cls.__module__}." * library + _local(cls))))
        if library:
            self._package(cls.__module__)
        else:
            hashed.update(_plain(self._keep(cls)))
            self._open[cls] = True
            self.methods(cls, ())

    def _put_instance(self, hashed: Any, value: Any, depth: int) -> None:
        cls = type(value)
        top = (cls.__module__ or "").partition(".")[0]
        self._may_be_path(_open_file(value, top))
        if (image := _image(value)) is not None:
            hashed.update(_plain(("image", *image[0])))
            hashed.update(image[1])
        elif isinstance(value, pathlib.PurePath):
            self._may_be_path(str(value))
            hashed.update(_plain(("path", str(value))))
        elif isinstance(value, re.Pattern):
            hashed.update(_plain(("pattern", value.pattern, value.flags)))
        elif isinstance(value, (slice, range)):
            hashed.update(_plain(("range", cls.__name__, value.start, value.stop, value.step)))
        elif isinstance(value, (bytearray, memoryview)):
            hashed.update(_plain(bytes(value)))
        elif isinstance(value, np.generic):
            hashed.update(_plain((cls.__name__, value.tobytes())))
        elif isinstance(value, _WORDS) or _is_word(value):
            hashed.update(_plain((cls.__name__, str(value))))
        elif isinstance(value, (operator.itemgetter, operator.attrgetter, operator.methodcaller)):
            hashed.update(_plain(cls.__name__))
            self._put(hashed, value.__reduce__()[1], depth)
        elif isinstance(value, functools._lru_cache_wrapper):
            self._put(hashed, value.__wrapped__, depth)
        elif top == "pandas" and hasattr(value, "to_numpy"):
            for part in _columns(value):
                self._put(hashed, part, depth)
        elif top == "datasets" and isinstance(getattr(value, "_fingerprint", None), str):
            hashed.update(_plain(value._fingerprint))
        elif isinstance(value, (types.BuiltinFunctionType, types.MethodWrapperType, np.ufunc)):
            hashed.update(_plain(("builtin", str(getattr(value, "__module__", "")), value.__name__)))
            owner = getattr(value, "__self__", None)
            if owner is not None and not isinstance(owner, types.ModuleType):
                self._put(hashed, owner, depth)
        elif top in _SILENT or cls is object or isinstance(value, weakref.ReferenceType):
            hashed.update(b"silent")
        elif top in sys.stdlib_module_names and top not in _STANDARD and top != "__main__":
            hashed.update(self._unknown(value))
        else:
            self._put_class(hashed, cls)
            state = attributes_of(value)
            if state is None:
                hashed.update(self._unknown(value))
            else:
                self._put_mapping(hashed, state, depth)

    def _may_be_path(self, text: Any) -> None:
        if type(text) is not str or len(text) >= MOST_OF_PATH or "\0" in text:
            return
        if (os.sep in text or "." in text) and text.strip("./"):  # "/" and "." are words as often as folders
            self._paths.add(text)

    def _unknown(self, value: Any) -> bytes:
        kind = type(value).__qualname__
        self._unknown_parts.setdefault(self._subject, f"an object of type {kind}")
        return _plain(("unknown", kind))


# ------------------------------------------------------------------------------------------------------------ code


@dataclass(frozen=True, slots=True)
class _Code:
    """What a code object and those within it use: globals as `chains` of a name and the attributes taken of it."""

    digest: str
    names: frozenset[str]
    chains: tuple[tuple[str, ...], ...]
    dynamic: bool


_NAMING = re.compile("ATTR|METHOD|NAME|GLOBAL|SUPER|CONST|IMPORT")
"""Instructions whose text is no local variable."""


@functools.lru_cache(4096)
def _read(code: types.CodeType) -> _Code:
    parts: list[bytes] = [
        _plain((code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags & 0x2FF)),
        _plain(tuple(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])),
        getattr(code, "co_exceptiontable", b""),
    ]
    names: set[str] = set()
    chains: dict[tuple[str, ...], None] = {}
    dynamic = False
    instructions = list(dis.get_instructions(code))
    for at, (instruction, after) in enumerate(zip(instructions, [*instructions[1:], None], strict=True)):
        if after is not None and after.opname == "STORE_NAME" and after.argval in _OF_CLASS_BODIES:
            continue  # a docstring, or the line that a class begins on
        value = instruction.argval
        if isinstance(value, types.CodeType):
            inner = _read(value)
            names |= inner.names
            chains |= dict.fromkeys(inner.chains)
            dynamic |= inner.dynamic
            value = ("code", inner.digest)
        elif isinstance(value, str) and _NAMING.search(instruction.opname):
            names.add(value)
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            chains[_chain(instructions, at)] = None
        elif instruction.opname == "IMPORT_NAME" and value:
            chains[(f"import {value}",)] = None
        parts.append(_plain((instruction.opname, value)))
    dynamic |= not names.isdisjoint(_DYNAMIC)
    return _Code(_hex(*parts), frozenset(names), tuple(chains), dynamic)


def _chain(instructions: Sequence[dis.Instruction], at: int) -> tuple[str, ...]:
    chain = [str(instructions[at].argval)]
    for instruction in instructions[at + 1 :]:
        if instruction.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
            break
        chain.append(str(instruction.argval))
    return tuple(chain)


def _defaults(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    given = function.__defaults__ or ()
    count = function.__code__.co_argcount
    yield from zip(function.__code__.co_varnames[count - len(given) : count], given, strict=True)
    yield from sorted((function.__kwdefaults__ or {}).items())


def _defined(cls: type, name: str) -> Iterator[tuple[type, Any]]:
    """Yield every class in the order of inheritance that defines `name`, as the first may call the others."""
    for owner in cls.__mro__:
        if name in vars(owner) and owner is not object:
            yield owner, vars(owner)[name]


@functools.lru_cache(4096)
def _own_names(cls: type) -> frozenset[str]:
    """Return the names that a class and its bases define, libraries' classes among them."""
    found: set[str] = set()
    for owner in cls.__mro__:
        if owner.__module__ not in ("builtins", "typing", "abc", "torch.nn.modules.module"):
            found |= vars(owner).keys() - {"__dict__", "__weakref__", "__doc__", "__init__", "__new__"}
            found -= {"__module__", "__qualname__", "__annotations__", "__orig_bases__", "__parameters__"}
            found -= {"__abstractmethods__", "_abc_impl", "__slots__", "__firstlineno__", "__static_attributes__"}
            found -= {"__dataclass_fields__", "__dataclass_params__", "__repr__", "__str__"}
            found -= {"__annotate__", "__annotate_func__", "__annotations_cache__", "__classcell__", "__match_args__"}
    return frozenset(found)


def _functions_in(found: Any) -> list[types.FunctionType]:
    """Return the functions of what stands in a class: a method, a static or class method, a property."""
    if isinstance(found, types.FunctionType):
        return [found]
    if isinstance(found, (staticmethod, classmethod)):
        return _functions_in(found.__func__)
    if isinstance(found, property):
        return [f for f in (found.fget,) if isinstance(f, types.FunctionType)]
    if isinstance(found, functools.cached_property):
        return _functions_in(found.func)
    if isinstance(found, functools.partialmethod):
        return _functions_in(found.func)
    return []


def _is_descriptor(found: Any) -> bool:
    return hasattr(type(found), "__get__")


def _local(named: Any) -> str:
    """Return the name of a class or function, without those of the functions that it was defined in."""
    return str(named.__qualname__).rpartition("<locals>.")[2]


@functools.lru_cache(4096)
def is_library(module: str) -> bool:
    """Return whether a module belongs to Python or to an installed package, whose version says what it is.

    A package is installed where its folder is one of Python's for packages, or where a distribution lies beside it
    that lists it (as `pip install --target` leaves it). One that a user develops in place is the user's own code,
    unless it is one of LARGE.
    """
    top = module.partition(".")[0]
    if top == "__main__" or not top:
        return False
    if top in LARGE or top == "fmextract" or top in sys.stdlib_module_names or top in sys.builtin_module_names:
        return True
    path = _path_of(top)
    return path is not None and any(map(_is_installed, {path, path.resolve()}))


@functools.cache
def source_digest(package: str) -> str | None:
    """Return a digest of the source of a library that is developed in place, whose version tells too little.

    None of one that is installed, and of one without source.
    """
    path = _path_of(package)
    if package not in LARGE or path is None or any(map(_is_installed, {path, path.resolve()})):
        return None
    hashed = xxhash.xxh3_128()
    for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
        if file.is_file():  # no broken link
            hashed.update(_plain((str(file.relative_to(path)), file.read_bytes())))
    return hashed.hexdigest()[:16]


def _path_of(top: str) -> pathlib.Path | None:
    """Return the folder of a package, or the file of a module that is none; imported or not, the answer is the same."""
    module = sys.modules.get(top)
    if module is not None:
        folders, file = getattr(module, "__path__", None), getattr(module, "__file__", None)
    else:
        spec = importlib.util.find_spec(top)
        folders, file = (spec.submodule_search_locations, spec.origin) if spec is not None else (None, None)
    place = next(iter(folders or ()), file)
    return pathlib.Path(place) if isinstance(place, str) else None


def _is_installed(path: pathlib.Path) -> bool:
    if {"site-packages", "dist-packages"} & set(path.parts) or path.is_relative_to(sysconfig.get_paths()["stdlib"]):
        return True
    return path.name.partition(".")[0] in _installed_in(path.parent)


@functools.lru_cache(256)
def _installed_in(folder: pathlib.Path) -> frozenset[str]:
    """Return the packages and modules that the distributions in a folder list as theirs."""
    found: set[str] = set()
    for record in folder.glob("*.dist-info/RECORD"):
        rows = csv.reader(record.read_text(encoding="utf-8", errors="replace").splitlines())
        found |= {row[0].partition("/")[0].partition(".")[0] for row in rows if row}
    return frozenset(found)


# ------------------------------------------------------------------------------------------------------------ data

_WORDS = (np.dtype, datetime.date, datetime.time, datetime.timedelta, decimal.Decimal, fractions.Fraction, uuid.UUID)
"""Objects that are what they are called."""
_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes, type(Ellipsis)})


def _plain(value: Any) -> bytes:
    """Return a constant, or a tuple or frozenset of such, as bytes that no other one has."""
    kind = type(value)
    if kind is str:
        raw = value.encode("utf-8", "surrogatepass")
        return b"s%d:" % len(raw) + bytes(raw)
    if kind is bytes:
        return b"b%d:" % len(value) + bytes(value)
    if kind is int:
        return b"i%x;" % value if value >= 0 else b"n%x;" % -value
    if kind is float:
        return b"f" + struct.pack("<d", value)
    if kind is complex:
        return b"c" + struct.pack("<dd", value.real, value.imag)
    if kind in (bool, type(None), type(Ellipsis)):
        return str(value)[:1].encode()
    if isinstance(value, (tuple, list)):
        return b"(%d:" % len(value) + b"".join(map(_plain, value)) + b")"
    if isinstance(value, frozenset):
        return b"{%d:" % len(value) + b"".join(sorted(map(_plain, value))) + b"}"
    if isinstance(value, dict):
        return b"<" + b"".join(sorted(_plain(item) for item in value.items())) + b">"
    if isinstance(value, slice):
        return b"slice" + _plain((value.start, value.stop, value.step))
    return b"o" + _plain(str(getattr(value, "__qualname__", type(value).__qualname__)))


def _hex(*parts: bytes) -> str:
    hashed = xxhash.xxh3_128()
    for part in parts:
        hashed.update(_plain(part))
    return hashed.hexdigest()[:16]


def attributes_of(value: Any) -> dict[str, Any] | None:
    """Return the attributes of an object; None of one that keeps its state where Python does not see it."""
    found: dict[str, Any] = {}
    for slot in (slot for cls in type(value).__mro__ for slot in _slots(cls)):
        if hasattr(value, slot):
            found[slot] = getattr(value, slot)
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict):
        found |= attributes
    if _is_module(value):
        return _state_of_module(found)
    # An object without a place for attributes is of C code, which may keep anything.
    python = isinstance(attributes, dict) or any("__slots__" in vars(cls) for cls in type(value).__mro__)
    return found if python else None


def _slots(cls: type) -> list[str]:
    slots = vars(cls).get("__slots__", ())
    names = [slots] if isinstance(slots, str) else list(slots)
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def _columns(table: Any) -> list[Any]:
    """Return the index, names and values of what pandas holds."""
    if not hasattr(table, "columns"):
        return [str(getattr(table, "name", "")), table.to_numpy(), getattr(table, "index", table).to_numpy()]
    columns = [table.iloc[:, at].to_numpy() for at in range(table.shape[1])]
    return [list(table.columns), table.index.to_numpy(), *columns]


def _is_module(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)


_OF_MODULES = re.compile(r"_.*hooks(_with_kwargs|_always_called)?|training|_is_full_backward_hook|_compiled_call_impl")


def _state_of_module(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of a torch module within an object: hooks without their keys, which differ by process."""
    kept = {name: value for name, value in found.items() if not _OF_MODULES.fullmatch(name)}
    hooks = {name: found.get(name, {}) for name in ("_forward_hooks", "_forward_pre_hooks")}
    return kept | {name: list(hook.values()) for name, hook in hooks.items() if hook}


def _tensor(value: Any) -> Any:
    """Return the bytes of a tensor as an array, True where it has none that can be read, None for what is no tensor."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        return None
    try:
        plain = value.detach()
        if plain.is_quantized:
            plain = plain.dequantize()
        if plain.layout is not torch.strided:
            plain = plain.to_dense()
        plain = plain.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        return plain.view(torch.uint8).numpy() if plain.numel() else np.zeros(0, np.uint8)
    except (RuntimeError, TypeError, ValueError, NotImplementedError):  # lazy, meta, opaque, a subclass of its own
        return True


def _tensor_kind(value: Any) -> tuple[Any, ...]:
    try:
        return str(value.dtype), *map(int, value.shape)
    except (RuntimeError, TypeError, ValueError):
        return ("of no shape",)


_OPEN = ("io", "_io", "zipfile", "tarfile", "h5py", "gzip", "bz2", "lzma", "tempfile")
"""Packages whose objects may be an open file."""


def _open_file(value: Any, package: str) -> Any:
    """Return the name of the file that an object reads; None where it is none, or writes."""
    if package not in _OPEN:
        return None
    try:
        if not str(getattr(value, "mode", "r")).startswith("r") or "+" in str(getattr(value, "mode", "r")):
            return None
        if package == "h5py":
            return value.file.filename
        name: Any = getattr(value, "filename", None) or getattr(value, "name", None)
        return os.fspath(name)
    except (ValueError, RuntimeError, AttributeError, TypeError):  # one that is closed, or has no name
        return None


def _is_word(value: Any) -> bool:
    """Return types, devices, layouts and operators of torch."""
    torch = sys.modules.get("torch")
    words = (torch.dtype, torch.device, torch.layout, torch.memory_format) if torch is not None else ()
    return isinstance(value, words) or type(value).__module__ == "torch._ops"


def _image(value: Any) -> tuple[tuple[Any, ...], bytes] | None:
    """Return mode, size and pixels of a picture of Pillow; None for anything else."""
    pillow = sys.modules.get("PIL.Image")
    if pillow is None or not isinstance(value, pillow.Image):
        return None
    palette = value.getpalette() if value.mode == "P" else None
    try:
        return (value.mode, *value.size, tuple(palette or ())), value.tobytes()
    except Exception as error:  # a broken file: a decoder of Pillow may raise anything
        return (value.mode, *value.size, type(error).__name__), b""
