"""A model and the process as they were found: what a forward pass leaves behind, and how it is undone.

A forward may count, keep averages in buffers, register hooks and patch methods. What one that ends early leaves of that
and a whole one does not shows that it tidies up behind itself, so that it has to run to its end.
"""

from __future__ import annotations

import random
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import nn
from torch.backends import cudnn, mkldnn
from torch.nn import functional
from torch.nn.modules import module as global_hooks
from torch.nn.parameter import is_lazy

from fmextract.capture.writes import Writes, digest, memory

Key = tuple[str, str]
"""Where something is, and its name there."""
_SMALL = 32 << 20  # bytes of parameters of which a copy is cheaper than watching every operation
RANDOM = "random numbers"
"""Where the generators are."""


class _Unit(NamedTuple):
    """Something that may change: whether it is not as it was, and what makes it so again."""

    key: Key
    differs: Callable[[], bool]
    restore: Callable[[], None]


class State:
    """What a model and the process are at one moment.

    Of the model: attributes, hooks, children and buffers of every module, by identity and buffers by value; of lists
    and the like in attributes what is in them; of parameters the memory they lie in. Of the process: patched classes
    and functions of torch, its settings, and the random generators. The values of parameters are too large to be kept
    in case: `guarded` keeps those that are written.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        modules = {p or "(model)": m for p, m in model.named_modules() if not isinstance(m, torch.jit.ScriptModule)}
        self._places: list[_Module | _Names] = [_Module(path, module) for path, module in modules.items()]
        self._places += [
            _Names(cls.__qualname__, vars(cls), partial(setattr, cls)) for cls in _classes(modules.values())
        ]
        for space in (torch, functional):
            self._places.append(_Names(space.__name__, vars(space), partial(setattr, space)))
        self._units = [*_of_buffers(model), *_of_parameters(model), *_of_global_hooks(), *_of_process()]
        self._written: list[tuple[torch.Tensor, torch.Tensor]] = []

    def changed(self) -> set[Key]:
        """What is not as it was."""
        found = {(place.where, name) for place in self._places for name in place.changed()}
        return found | {unit.key for unit in self._units if unit.differs()}

    def restore(self, only: set[Key] | None = None) -> None:
        """Undo what has changed, but for what is in lists of the model's own; of `only` all."""
        for place in self._places:
            for name in place.changed():
                if (place.where, name) in only if only is not None else place.is_torchs(name):
                    place.restore(name)
        for unit in self._units:
            if (only is None or unit.key in only) and unit.differs():
                unit.restore()
        if only is None:
            for data, saved in self._written:
                if digest(data) != digest(saved):  # what is as it was is not written: it may be a file's own memory
                    data.copy_(saved)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Whatever parameter is written while the block lasts is known to `restore` as it was.

        Of a small model all of them are kept; of a large one each just before it is written, for which every operation
        is watched: that costs little beside what it computes.
        """
        parameters = [parameter.data for parameter in self._model.parameters() if _is_dense(parameter)]
        if sum(data.numel() * data.element_size() for data in parameters) <= _SMALL:
            self._written += [(data, data.clone()) for data in parameters]
            yield
            return
        own: dict[int, list[torch.Tensor]] = {}
        for data in parameters:
            own.setdefault(memory(data), []).append(data)

        def keep(tensor: torch.Tensor) -> None:
            self._written += [(data, data.clone()) for data in own.pop(memory(tensor), ())]

        with Writes(keep):
            yield


@contextmanager
def untouched(model: nn.Module) -> Iterator[State]:
    """The model and the process are as before on every way out of the block."""
    found, filters = State(model), list(warnings.filters)
    try:
        yield found
    finally:
        found.restore()
        if list(warnings.filters) != filters:  # by the model, or by a library that it imported
            warnings.resetwarnings()
            cast("list[Any]", warnings.filters).extend(filters)


# ----------------------------------------------------------------------------------------------- the model


_REGISTRIES = frozenset(name for name, value in vars(nn.Module()).items() if isinstance(value, dict))
_COLLECTIONS = (dict, type(nn.Module()._forward_hooks), set, list, deque)
_GONE = object()


class _Module:
    """The attributes of a module, and what is in those that are a dict, a set or a list."""

    def __init__(self, where: str, module: nn.Module) -> None:
        self.where = where
        self._module, self._kind, self._now = module, type(module), vars(module)
        self._saved = dict(self._now)
        self._content = {name: _items(value) for name, value in self._saved.items() if type(value) in _COLLECTIONS}

    def changed(self) -> list[str]:
        """Names of attributes; one that is put in brackets is the same, but not what is in it."""
        if type(self._module) is not self._kind:  # it has become another (a lazy one at its first call), and stays it
            return []
        found = [name for name, value in self._saved.items() if _unlike(self._now.get(name, _GONE), value)]
        found += [name for name in self._now if name not in self._saved]
        for name, content in self._content.items():
            value = self._saved[name]
            if len(value) or content:
                items = _items(value)
                if len(items) != len(content) or any(map(_unlike, items, content)):
                    found.append(f"[{name}]")
        return found

    def is_torchs(self, name: str) -> bool:
        """What a model has put into collections of its own is its own affair; torch's are hooks, buffers, children."""
        return not name.startswith("[") or name[1:-1] in _REGISTRIES

    def restore(self, name: str) -> None:
        if name.startswith("["):
            value, content = self._saved[name[1:-1]], self._content[name[1:-1]]
            value.clear()
            if isinstance(value, dict):
                value.update(zip(content[::2], content[1::2], strict=True))
            else:
                (value.update if isinstance(value, set) else value.extend)(content)
        elif name in self._saved:
            self._now[name] = self._saved[name]
        else:
            del self._now[name]


def _items(value: Any) -> list[Any]:
    """What is in a collection; of a dict keys and values in turn."""
    return [part for pair in value.items() for part in pair] if isinstance(value, dict) else list(value)


def _unlike(one: Any, other: Any) -> bool:
    if one is other:
        return False
    return type(one) is not type(other) or not isinstance(one, (int, float, str, bytes)) or one != other


def _is_dense(tensor: torch.Tensor) -> bool:
    return not is_lazy(tensor) and tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_nested


def _of_buffers(model: nn.Module) -> list[_Unit]:
    def unit(path: str, buffer: torch.Tensor) -> _Unit:
        data = buffer.data
        saved, before = data.clone(), digest(data)

        def restore() -> None:
            if memory(buffer) != memory(data):
                buffer.data = data
            data.copy_(saved)

        return _Unit((path, "values"), lambda: memory(buffer) != memory(data) or digest(data) != before, restore)

    return [unit(path, buffer) for path, buffer in model.named_buffers() if _is_dense(buffer)]


def _of_parameters(model: nn.Module) -> list[_Unit]:
    def unit(path: str, parameter: nn.Parameter) -> _Unit:
        data, trained = parameter.data, parameter.requires_grad

        def differs() -> bool:
            return (memory(parameter), parameter.dtype, parameter.requires_grad) != (memory(data), data.dtype, trained)

        def restore() -> None:
            parameter.data = data
            parameter.requires_grad_(trained)

        return _Unit((path, "parameter"), differs, restore)

    return [unit(path, parameter) for path, parameter in model.named_parameters() if _is_dense(parameter)]


# --------------------------------------------------------------------------------------------- the process


def _classes(modules: Iterable[nn.Module]) -> list[type]:
    """Those of the modules, and what they descend from in torch and in the model's own code."""
    return [cls for cls in dict.fromkeys(c for m in modules for c in type(m).__mro__) if cls is not object]


class _Names:
    """The functions and methods that stand under names of a class or a module; new ones are imports, and no harm."""

    def __init__(self, where: str, now: Mapping[str, Any], put: Callable[[str, Any], None]) -> None:
        self.where = where
        self._now, self._put = now, put
        self._saved = {n: v for n, v in now.items() if callable(v) or isinstance(v, (classmethod, property))}

    def changed(self) -> list[str]:
        return [name for name, value in self._saved.items() if self._now.get(name) is not value]

    def is_torchs(self, name: str) -> bool:
        return True

    def restore(self, name: str) -> None:
        self._put(name, self._saved[name])


def _of_global_hooks() -> list[_Unit]:
    def unit(name: str, hooks: dict[Any, Any]) -> _Unit:
        saved = dict(hooks)

        def restore() -> None:
            hooks.clear()
            hooks.update(saved)

        return _Unit(("all modules", name), lambda: hooks != saved, restore)

    found = {name: value for name, value in vars(global_hooks).items() if name.startswith("_global_")}
    return [unit(name, hooks) for name, hooks in found.items() if isinstance(hooks, dict)]


def _alike(one: Any, other: Any) -> bool:
    """Whether two states of a generator are the same: tensors, arrays and numbers in tuples and lists."""
    if isinstance(one, (tuple, list)):
        return all(map(_alike, one, other))
    return bool(np.all(np.asarray(one) == np.asarray(other)))


_OF_CUDNN = ("enabled", "benchmark", "deterministic", "allow_tf32")


def _of_process() -> list[_Unit]:
    def setting(name: str, get: Callable[[], Any], put: Callable[[Any], Any]) -> _Unit:
        was = get()
        return _Unit(("process", name), lambda: get() != was, lambda: put(was))

    def generator(name: str, get: Callable[[], Any], put: Callable[[Any], Any]) -> _Unit:
        was = get()
        return _Unit((RANDOM, name), lambda: not _alike(get(), was), lambda: put(was))

    units = [
        setting("default dtype", torch.get_default_dtype, torch.set_default_dtype),
        setting("gradients", torch.is_grad_enabled, torch.set_grad_enabled),
        setting("autocast", lambda: torch.is_autocast_enabled("cpu"), lambda on: torch.set_autocast_enabled("cpu", on)),
        setting("deterministic", torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
        setting("anomalies", torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
        *(setting(f"cudnn {name}", partial(getattr, cudnn, name), partial(setattr, cudnn, name)) for name in _OF_CUDNN),
        setting("mkldnn", partial(getattr, mkldnn, "enabled"), partial(setattr, mkldnn, "enabled")),
        setting("floating point", np.geterr, lambda was: np.seterr(**was)),
        setting("threads", torch.get_num_threads, torch.set_num_threads),
        setting("matmul", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        generator("torch", torch.get_rng_state, torch.set_rng_state),
        generator("numpy", partial(np.random.get_state, legacy=True), np.random.set_state),
        generator("random", random.getstate, random.setstate),
    ]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        units.append(generator("cuda", torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all))
    return units
