"""Seed the random numbers of a row: the user's code draws from (seed, row), wherever and whenever it runs."""

from __future__ import annotations

import functools
import random
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

OWN = (torch.Generator, np.random.Generator, np.random.BitGenerator, np.random.RandomState, random.Random)
"""Generators of random numbers that an object may keep."""
_LOOKED_AT = 2000  # objects, when generators are looked for
_MEMBERS = 100  # of a container
_LEAVES = (str, bytes, bytearray, int, float, complex, type, types.ModuleType, np.ndarray, torch.Tensor)


@dataclass(slots=True)
class Draws:
    """Says, after a watched `seeded` block, whether code in it drew from a global generator."""

    any: bool = False


@contextmanager
def seeded(seed: int, row: int, part: int = 0, watch: bool = False) -> Iterator[Draws]:
    """Seed the global generators of torch (on the CPU), numpy and random by (seed, row, part) within the block.

    `part` tells one use of a row from another. Afterwards they are as before. They belong to the process: no other
    thread may draw from them meanwhile.
    """
    kept, draws = _states(), Draws()
    # Words of 32 bits, as many for every row: numpy takes (1, 2) and (1, 2, 0) for the same.
    place = [word for number in (seed, row, part) for word in (number & 0xFFFFFFFF, number >> 32 & 0xFFFFFFFF)]
    words = np.random.SeedSequence(place).generate_state(6, np.uint32)
    torch.default_generator.manual_seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(words[2:4])
    random.seed(int(words[4]) << 32 | int(words[5]))
    began = _states() if watch else None
    try:
        yield draws
    finally:
        if began is not None:
            draws.any = not _same(began, _states())
        torch.default_generator.set_state(kept[0])
        np.random.set_state(kept[1])
        random.setstate(kept[2])


def _states() -> tuple[torch.Tensor, Any, Any]:
    return torch.default_generator.get_state(), np.random.get_state(legacy=True), random.getstate()


def _same(one: tuple[torch.Tensor, Any, Any], other: tuple[torch.Tensor, Any, Any]) -> bool:
    numpy = all(np.array_equal(a, b) for a, b in zip(one[1], other[1], strict=True))
    return numpy and torch.equal(one[0], other[0]) and one[2] == other[2]


def own_generators(thing: Any) -> list[str]:
    """Find where `thing`, a Dataset or a function, keeps generators: paths of attributes, as `transform.rng`.

    Looks into attributes, containers, closures, and at the global names that its functions use.
    """
    found: dict[int, str] = {}
    seen: set[int] = set()
    waiting = [("", thing)]
    while waiting and len(seen) < _LOOKED_AT:
        path, item = waiting.pop(0)
        if isinstance(item, OWN):
            found.setdefault(id(item), path or type(item).__name__)
        elif id(item) not in seen and not isinstance(item, _LEAVES):
            seen.add(id(item))
            waiting += ((f"{path}{name}", member) for name, member in _members(item, path))
    return list(found.values())


def _members(item: Any, path: str) -> Iterator[tuple[str, Any]]:
    dot = "." if path else ""
    if isinstance(item, Mapping):
        yield from ((f"[{key!r}]", value) for key, value in islice(item.items(), _MEMBERS))
    elif isinstance(item, (list, tuple, set, frozenset)):
        yield from ((f"[{i}]", value) for i, value in enumerate(islice(item, _MEMBERS)))
    elif isinstance(item, functools.partial):
        yield from ((f"{dot}{name}", getattr(item, name)) for name in ("func", "args", "keywords"))
    elif isinstance(item, types.MethodType):
        yield f"{dot}__self__", item.__self__
    elif isinstance(item, types.FunctionType):
        yield from ((f"{dot}{name}", value) for name, value in _used(item))
    else:
        yield from ((f"{dot}{name}", value) for name, value in _attributes(item))
        for function in _methods(type(item)):
            yield from ((f"{dot}{name}", value) for name, value in _used(function) if isinstance(value, OWN))


def _attributes(item: Any) -> Iterator[tuple[str, Any]]:
    yield from getattr(item, "__dict__", {}).items()
    for kind in type(item).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(item, name):
                yield name, getattr(item, name)


def _methods(kind: type) -> Iterator[types.FunctionType]:
    for one in kind.__mro__:
        yield from (value for value in vars(one).values() if isinstance(value, types.FunctionType))


def _used(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield what a function closes over, has as defaults, and the generators among the global names it uses."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if cell != types.CellType():
            yield name, cell.cell_contents
    yield from ((f"default {i}", value) for i, value in enumerate(function.__defaults__ or ()))
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if isinstance(value, OWN):
            yield name, value
