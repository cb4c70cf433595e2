"""Which modules a forward pass calls, how often, in which order, and what tensors go in and come out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fmextract.capture.reach import out_of_reach
from fmextract.capture.taps import Event, Forward, Tap, TensorInfo
from fmextract.capture.trunk import ShortcutTracer
from fmextract.selector import KINDS, ROOT, TRUNK, Module


def _classes_in(module: ModuleType) -> frozenset[str]:
    return frozenset(
        name for name, value in vars(module).items() if isinstance(value, type) and value.__module__ == module.__name__
    )


MODULE_KINDS: dict[str, frozenset[str]] = {
    "conv": frozenset({"_ConvNd"}),
    "linear": frozenset({"Linear", "Bilinear"}),
    "norm": frozenset(
        {"_NormBase", "LayerNorm", "GroupNorm", "RMSNorm", "LocalResponseNorm", "CrossMapLRN2d", "FrozenBatchNorm2d"}
    ),
    "act": _classes_in(nn.modules.activation) - {"MultiheadAttention"},
    "pool": _classes_in(nn.modules.pooling),
}


def module_kind(module: nn.Module) -> str:
    """`conv`, `linear`, `norm`, `act`, `pool`, or "" for anything else; quantized twins count too."""
    names = {cls.__name__ for cls in type(module).__mro__}
    return next((kind for kind, bases in MODULE_KINDS.items() if names & bases), "")


def _lineage(cls: type[nn.Module]) -> tuple[str, ...]:
    """Names of the classes that a selector can ask for: a name made by `type()` may hold a space."""
    return tuple(base.__name__ for base in cls.__mro__ if base.__name__.split() == [base.__name__])


@dataclass(frozen=True)
class Survey:
    """What one forward pass did: the starts and ends of all calls as they came, with the tensors in and out.

    `types`, `kinds` and `lineage` (names of the classes it descends from, its own first) are of every module, called or
    not.
    `aliases` are further paths of modules that have several, with the path that the others know them by. `missed` says
    of modules whose calls hooks do not see why that is. `shortcuts` are the convolutions that only make a block's input
    fit what is added to it.
    """

    tensors: Mapping[Event, tuple[TensorInfo, ...]]
    types: Mapping[str, str]
    kinds: Mapping[str, str]
    lineage: Mapping[str, tuple[str, ...]]
    aliases: Mapping[str, str]
    missed: Mapping[str, str]
    shortcuts: frozenset[str] = frozenset()

    @cached_property
    def paths(self) -> frozenset[str]:
        """All paths of all modules, called or not."""
        return frozenset({*self.types, *self.aliases})

    @cached_property
    def counts(self) -> Counter[str]:
        """How many calls of each module ended."""
        return Counter(event.module for event in self.tensors if event.side == "out")

    @property
    def order(self) -> list[str]:
        """Paths of the modules that were called, in order of their first call's end."""
        return list(self.counts)

    def numbered(self, kind: str) -> list[str]:
        """Paths of the modules of a kind (`conv`, …) in the order of execution: `conv#N` is the N-th.

        Of the kind `trunk` are the convolutions that lie on no shortcut.
        """
        if kind == TRUNK:
            return [path for path in self.numbered("conv") if path not in self.shortcuts]
        return [path for path in self.order if self.kinds[path] == kind]

    @cached_property
    def numbers(self) -> Mapping[str, str]:
        """Of each module, the selectors by number that mean it: `conv#20 trunk#19`."""
        return self._counted(from_end=False)

    @cached_property
    def modules(self) -> Mapping[str, Module]:
        """Of each module, called or not, all that a selector can mean it by."""
        further: dict[str, list[str]] = {}
        for path, known_by in self.aliases.items():
            further.setdefault(known_by, []).append(path)
        from_end = self._counted(from_end=True)
        return {
            path: Module(
                path, tuple(further.get(path, ())), classes, self.numbers.get(path, ""), from_end.get(path, "")
            )
            for path, classes in self.lineage.items()
        }

    def _counted(self, from_end: bool) -> Mapping[str, str]:
        """`kind#N` of each module that has a kind, without what is also a path, which goes before a number."""
        found: dict[str, list[str]] = {}
        for kind in KINDS:
            paths = self.numbered(kind)
            for i, path in enumerate(paths, -len(paths) if from_end else 0):
                if f"{kind}#{i}" not in self.paths:
                    found.setdefault(path, []).append(f"{kind}#{i}")
        return {path: " ".join(words) for path, words in found.items()}

    def stop_before(self, taps: Sequence[Tap]) -> Event | None:
        """The first start of a call after the last call of every tapped module. None: the forward runs to its end.

        Not after the last wanted call: of a module that is called several times, every call has to be counted before
        it is certain that the wanted one is what it was in the probe.
        """
        events = list(self.tensors)
        position = {event: i for i, event in enumerate(events)}
        last = max(position[Event(tap.module, tap.calls, tap.tap)] for tap in taps)
        return next((event for event in events[last + 1 :] if event.side == "in"), None)


def _parts(value: Any) -> list[tuple[str, str, Any]]:
    """(key, name, item) of everything in a tuple, list, mapping or dataclass; nothing for anything else."""
    if isinstance(value, Mapping):
        return [(str(key), str(key), item) for key, item in value.items()]
    if isinstance(value, (tuple, list)):
        names = getattr(value, "_fields", None) or range(len(value))
        return [(str(i), str(name), item) for i, (name, item) in enumerate(zip(names, value, strict=True))]
    if is_dataclass(value):
        return [(entry.name, entry.name, getattr(value, entry.name)) for entry in fields(value)]
    return []


def _tensors_in(value: Any, path: tuple[str, ...] = (), names: tuple[str, ...] = ()) -> Iterator[TensorInfo]:
    """Every tensor in nested tuples, lists, dicts and dataclasses."""
    if isinstance(value, torch.Tensor):
        yield TensorInfo(path, names, () if value.is_nested else tuple(value.shape), value.dtype)
        return
    for key, name, item in _parts(value):
        yield from _tensors_in(item, (*path, key), (*names, name))


def member_of(value: Any, path: tuple[str, ...]) -> torch.Tensor | None:
    """The tensor at `path`; None where this value has none."""
    for step in path:
        value = next((item for key, _, item in _parts(value) if key == step), None)
    return value if isinstance(value, torch.Tensor) else None


def inputs_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {**{str(i): arg for i, arg in enumerate(args)}, **kwargs}


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {path or ROOT: module for path, module in model.named_modules()}


def survey(model: nn.Module, forward: Forward, batch: torch.Tensor) -> Survey:
    """Run `forward(batch)`, which calls `model`, and write down every call of every module.

    `batch` is (2, channel, y, x). Raises whatever the forward raises; hooks are gone on every way out.
    """
    missed = out_of_reach(model)
    modules = named_modules(model)
    tensors: dict[Event, tuple[TensorInfo, ...]] = {}
    counts: Counter[tuple[str, str]] = Counter()

    def note(path: str, side: str, value: Any) -> None:
        counts[path, side] += 1
        tensors[Event(path, counts[path, side], side)] = tuple(_tensors_in(value))

    def before(path: str) -> Callable[..., None]:
        return lambda module, args, kwargs: note(path, "in", inputs_of(args, kwargs))

    def after(path: str) -> Callable[..., None]:
        return lambda module, args, output: note(path, "out", output)

    def convolved(path: str) -> Callable[..., None]:
        return lambda module, args, output: tracer.passed(path, output)

    tracer = ShortcutTracer()
    handles = []
    try:
        for path, module in modules.items():
            if path in missed:
                continue
            try:
                handles.append(module.register_forward_pre_hook(before(path), with_kwargs=True))
                handles.append(module.register_forward_hook(after(path)))
                if module_kind(module) == "conv":
                    handles.append(module.register_forward_hook(convolved(path)))
            except Exception as error:  # a class may forbid it, in ways of its own
                missed[path] = f"it takes no hooks ({type(error).__name__}: {error})"
        with torch.no_grad(), tracer:
            forward(batch)
    finally:
        for handle in handles:
            handle.remove()
    for event in [event for event in tensors if event.module in missed]:  # it took one of the two
        del tensors[event]
    called = {event.module for event in tensors}
    for path, module in modules.items():
        if path not in called and path not in missed and type(module).__call__ is not nn.Module.__call__:
            missed[path] = f"its class {type(module).__name__} has a __call__ of its own, which passes hooks by"
    known_by = {id(module): path for path, module in modules.items()}
    return Survey(
        tensors=tensors,
        types={path: type(m).__name__ for path, m in modules.items()},
        kinds={path: module_kind(m) for path, m in modules.items()},
        lineage={path: _lineage(type(m)) for path, m in modules.items()},
        aliases={
            path: known_by[id(module)]
            for path, module in model.named_modules(remove_duplicate=False)
            if path and path not in modules and id(module) in known_by
        },
        missed=missed,
        shortcuts=frozenset(tracer.shortcuts),
    )
