"""Taps: which tensors of a forward pass are wanted, what the probe learns of them, and how they are taken.

1. `survey` runs the model once and writes down every call of every module, in the order in which the calls end.
2. `resolve` turns selectors (`layer4.*.conv1`, `conv#20`, `relu:2@in[0]=mean`) into taps.
3. `capture.probe` decides where the rows of each tap's tensor are (a `RowLayout`), and what it is (a `Probed`).
4. `tapped` puts hooks on the model for as long as a `with` block lasts and ends each forward after the last wanted tap.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property, partial
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn

from fmextract.capture.independence import kinds, leaking, same
from fmextract.capture.reach import UNREADY, out_of_reach
from fmextract.capture.trunk import ShortcutTracer
from fmextract.common.text import some
from fmextract.errors import CaptureError, LayerError
from fmextract.selector import TRUNK, Selector, _glob

ROOT = "(model)"  # how the model itself is called as a layer; as a selector it is "."


def _classes_in(module: ModuleType) -> frozenset[str]:
    return frozenset(
        name for name, value in vars(module).items() if isinstance(value, type) and value.__module__ == module.__name__
    )


_MODULE_KINDS: dict[str, frozenset[str]] = {
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
    return next((kind for kind, bases in _MODULE_KINDS.items() if names & bases), "")


# --------------------------------------------------------------------------------------------- survey


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape (batch included) and type of one tensor in the output or input of a call; `path` leads to it.

    `names` is the same path with the field names of named tuples in place of their indices.
    """

    path: tuple[str, ...]
    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype


class Event(NamedTuple):
    """The start ("in") or end ("out") of a call: the `number`-th start or end of that module, from 1."""

    module: str
    number: int
    side: str


@dataclass(frozen=True)
class Survey:
    """What one forward pass did: the starts and ends of all calls as they came, with the tensors in and out.

    `types`, `kinds` and `lineage` (names of the classes it descends from) are of every module, called or not.
    `aliases` are further paths of modules that have several, with the path that the others know them by. `missed` says
    of modules whose calls hooks do not see why that is. `shortcuts` are the convolutions that only make a block's input
    fit what is added to it.
    """

    tensors: Mapping[Event, tuple[TensorInfo, ...]]
    types: Mapping[str, str]
    kinds: Mapping[str, str]
    lineage: Mapping[str, frozenset[str]]
    aliases: Mapping[str, str]
    missed: Mapping[str, str]
    shortcuts: frozenset[str] = frozenset()

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
        found: dict[str, str] = {}
        for kind in (*_MODULE_KINDS, TRUNK):
            for i, path in enumerate(self.numbered(kind)):
                found[path] = f"{found[path]} {kind}#{i}" if path in found else f"{kind}#{i}"
        return found

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


def _member(value: Any, path: tuple[str, ...]) -> torch.Tensor | None:
    """The tensor at `path`; None where this value has none."""
    for step in path:
        value = next((item for key, _, item in _parts(value) if key == step), None)
    return value if isinstance(value, torch.Tensor) else None


def _inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {**{str(i): arg for i, arg in enumerate(args)}, **kwargs}


def _named_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {path or ROOT: module for path, module in model.named_modules()}


Forward = Callable[[torch.Tensor], Any]


def survey(model: nn.Module, forward: Forward, batch: torch.Tensor) -> Survey:
    """Run `forward(batch)`, which calls `model`, and write down every call of every module.

    `batch` is (2, channel, y, x). Raises whatever the forward raises; hooks are gone on every way out.
    """
    missed = out_of_reach(model)
    modules = _named_modules(model)
    tensors: dict[Event, tuple[TensorInfo, ...]] = {}
    counts: Counter[tuple[str, str]] = Counter()

    def note(path: str, side: str, value: Any) -> None:
        counts[path, side] += 1
        tensors[Event(path, counts[path, side], side)] = tuple(_tensors_in(value))

    def before(path: str) -> Callable[..., None]:
        return lambda module, args, kwargs: note(path, "in", _inputs(args, kwargs))

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
        lineage={path: frozenset(cls.__name__ for cls in type(m).__mro__) for path, m in modules.items()},
        aliases={
            path: known_by[id(module)]
            for path, module in model.named_modules(remove_duplicate=False)
            if path and path not in modules and id(module) in known_by
        },
        missed=missed,
        shortcuts=frozenset(tracer.shortcuts),
    )


# -------------------------------------------------------------------------------------------- resolve


@dataclass(frozen=True, slots=True)
class Tap:
    """One wanted tensor: the `number`-th call of `module`, its output or input, the member at `path`.

    `shape` is what it was for the two images of the survey.
    """

    name: str
    module: str
    module_type: str
    number: int
    calls: int
    tap: str
    path: tuple[str, ...]
    member: str
    reducer: str
    selector: str
    shape: tuple[int, ...]
    explicit: bool  # named by path or number, not by a pattern: refused aloud rather than left out
    numbers: str = ""  # the selectors by number that mean its module


def resolve(selectors: Sequence[str], seen: Survey) -> list[Tap]:
    """The taps that `selectors` stand for, without repeats, in the order of execution.

    Raises LayerError for selectors that match nothing, naming the closest matches. Of the modules that a pattern
    matches, those that give no such tensor are left out.
    """
    taps, errors = found(selectors, seen)
    if errors:
        raise at_once(errors)
    return taps


def found(selectors: Sequence[str], seen: Survey) -> tuple[list[Tap], list[LayerError]]:
    """(what `resolve` gives, without the selectors that stand for nothing; what is wrong with each of those)."""
    taps: dict[str, Tap] = {}
    errors: list[LayerError] = []
    for text in selectors:
        try:
            made = _of_selector(Selector.of(text, seen.types), seen)
        except LayerError as error:
            errors.append(error)
            continue
        for tap in made:
            if tap.name not in taps or tap.explicit:
                taps[tap.name] = tap
    position = {event: i for i, event in enumerate(seen.tensors)}
    return sorted(taps.values(), key=lambda tap: position[Event(tap.module, tap.number, tap.tap)]), errors


def at_once(errors: Sequence[LayerError]) -> LayerError:
    """One error that says what is wrong with every layer."""
    if len(errors) == 1:
        return errors[0]
    return LayerError("\n- ".join([f"{len(errors)} of the layers cannot be had:", *map(str, errors)]))


def _of_selector(selector: Selector, seen: Survey) -> list[Tap]:
    made: list[Tap] = []
    errors: list[LayerError] = []
    for module in _matching_modules(selector, seen):
        try:
            made += _taps_of(selector, module, seen)
        except LayerError as error:
            errors.append(error)
    if errors and not (made and selector.is_pattern):
        raise errors[0]
    return made


def _matching_modules(selector: Selector, seen: Survey) -> list[str]:
    numbered = re.fullmatch(r"(\w+)#(-?\d+)", selector.base)
    if numbered and selector.base not in seen.types:
        return [_numbered_module(selector, numbered[1], int(numbered[2]), seen)]
    matches, known = _matches(selector, seen)
    if not matches:
        close = _closest(selector.wanted, known)
        if "#" in selector.base:
            close += " After # stands one number, as in conv#0 or conv#-1; type:Conv2d takes all convolutions."
        raise LayerError(f"no layer matches {selector.text!r}.{close} `fmextract layers` lists all.")
    order = {path: i for i, path in enumerate(seen.order)}
    called = {seen.aliases.get(path, path) for path in matches} & set(order)
    if not called:
        why = next((f"{path!r}: {seen.missed[path]}" for path in matches if path in seen.missed), "")
        ends = next((path for path, why in seen.missed.items() if why == UNREADY), "")
        if ends and not why:
            why = f"The forward pass ends at {ends!r}: {UNREADY}"
        if why:
            raise LayerError(f"{selector.text!r} cannot be taken. {why}")
        raise LayerError(
            f"{selector.text!r} matches {some(matches)}, which the forward pass never calls"
            " (its parent may use the weights directly, or it is a part of another mode)."
            f"{_closest(selector.base, list(order))}"
        )
    return sorted(called, key=lambda path: order[path])


def _matches(selector: Selector, seen: Survey) -> tuple[list[str], Sequence[str]]:
    """Paths of the modules, called or not, that a selector means by path, class or pattern; and what there is."""
    base = selector.base
    paths = [path for path in (*seen.types, *seen.aliases) if path != ROOT]
    if base in paths:
        return [base], paths
    if base.startswith("type:"):
        matches = [path for path, names in seen.lineage.items() if selector.wanted in names and path != ROOT]
        return matches, sorted({name for names in seen.lineage.values() for name in names})
    if base in (".", ROOT):
        return [ROOT], paths
    pattern = _glob(base)
    return [path for path in paths if pattern.fullmatch(path)], paths


def left_out(selectors: Sequence[str], seen: Survey) -> dict[str, str]:
    """Why modules that patterns mean are not taken, by path; without selectors, of all. Of a module and those within it
    the outermost.
    """
    meant = set(seen.missed)
    if selectors:
        parsed = [Selector.of(text, seen.types) for text in selectors]
        meant &= {path for selector in parsed if selector.is_pattern for path in _matches(selector, seen)[0]}
    return {path: seen.missed[path] for path in seen.missed if path in meant and path.rpartition(".")[0] not in meant}


def _numbered_module(selector: Selector, kind: str, number: int, seen: Survey) -> str:
    known_kinds = (*_MODULE_KINDS, TRUNK)
    if kind not in known_kinds:
        raise LayerError(f"{selector.text!r}: unknown kind {kind!r}; expected one of {', '.join(known_kinds)}")
    paths = seen.numbered(kind)
    if not -len(paths) <= number < len(paths):
        span = f"{kind}#0 to {kind}#{len(paths) - 1}" if paths else "none at all"
        raise LayerError(f"{selector.text!r}: this model has {span} in the order of execution")
    return paths[number]


def _closest(wanted: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(wanted, known, n=4, cutoff=0.5)
    close += [name for name in known if wanted.strip("*?") and wanted.strip("*?") in name and name not in close][:4]
    return f" Closest: {some(close)}." if close else ""


def _taps_of(selector: Selector, module: str, seen: Survey) -> list[Tap]:
    """The tensors of one module that the selector asks for. Raises LayerError where there is none."""
    numbers = (Event(module, number, selector.tap) for number in itertools.count(1))
    events = list(itertools.takewhile(lambda event: event in seen.tensors, numbers))
    if selector.call is not None and selector.call > len(events):
        times = f"{len(events)} time{'s' * (len(events) != 1)}"
        raise LayerError(f"{selector.text!r}: {module!r} is called {times} in a forward pass")
    made: list[Tap] = []
    for event in events:
        if selector.call not in (None, event.number):
            continue
        infos = seen.tensors[event]
        depth = len(selector.member)
        chosen = [info for info in infos if selector.member in (info.path[:depth], info.names[:depth])]
        if not chosen:
            there = some([_bracketed(info.names) or "one tensor" for info in infos]) if infos else "no tensor at all"
            side = "input" if selector.tap == "in" else "output"
            raise LayerError(f"{selector.text!r}: no such tensor in the {side} of {module!r}; it has {there}")
        for info in chosen:
            # A member is spelled out where it was asked for or where there are several.
            shown = info.path if len(chosen) > 1 else info.path[:depth]
            made.append(_tap(selector, event, len(events), info, _bracketed(shown), seen))
    return made


def _bracketed(path: Sequence[str]) -> str:
    return "".join(f"[{key}]" for key in path)


def _tap(selector: Selector, event: Event, calls: int, info: TensorInfo, member: str, seen: Survey) -> Tap:
    number = f":{event.number}" if calls > 1 else ""
    reducer = f"={selector.reducer}" if selector.reducer else ""
    side = "@in" if event.side == "in" else ""
    return Tap(
        name=f"{event.module}{number}{side}{member}{reducer}",
        module=event.module,
        module_type=seen.types[event.module],
        number=event.number,
        calls=calls,
        tap=event.side,
        path=info.path,
        member=member,
        reducer=selector.reducer,
        selector=selector.text,
        shape=info.shape,
        explicit=not selector.is_pattern,
        numbers=seen.numbers.get(event.module, ""),
    )


def default_selectors(model: nn.Module, seen: Survey) -> list[str]:
    """The model's children, a container with several children replaced by them, until there are 4 or more."""
    level = dict(model.named_children())
    called = seen.counts
    while True:
        # A ModuleList is never called itself: it stands for its children whatever their number.
        opened = {n for n, m in level.items() if n not in called and len(list(m.children()))}
        if len(level) - len(opened) < 4:
            opened |= {n for n, m in level.items() if _is_container(n, m)}
        if not opened:
            break
        expanded: dict[str, nn.Module] = {}
        for name, module in level.items():
            if name in opened:
                expanded |= {f"{name}.{child}": m for child, m in module.named_children()}
            else:
                expanded[name] = module
        level = expanded
    giving = {event.module for event, infos in seen.tensors.items() if event.side == "out" and infos}
    return [name for name in level if name in giving] or ["."]


def _is_container(name: str, module: nn.Module) -> bool:
    several = len(list(module.children())) > 1
    listed = isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
    return several and (listed or name.rpartition(".")[2] == "encoder")


# ------------------------------------------------------------------------------- what a tap's tensor is


@dataclass(frozen=True, slots=True)
class RowLayout:
    """Where the batch is in a tensor: in `axis`, with `k` values of that axis belonging to one image.

    `outer`: the images are the slow index (image 0 has the first k), otherwise the fast one (image 0 has every B-th).
    """

    axis: int
    k: int = 1
    outer: bool = True

    def rows_first(self, tensor: torch.Tensor, batch: int) -> torch.Tensor:
        """(batch, …): a view where the strides allow. Raises CaptureError when the axis is not batch x k long."""
        if tensor.shape[self.axis] != batch * self.k:
            raise CaptureError(f"axis {self.axis} is {tensor.shape[self.axis]} long, expected {batch} x {self.k}")
        if self.k == 1:
            return tensor.movedim(self.axis, 0) if self.axis else tensor
        split = (batch, self.k) if self.outer else (self.k, batch)
        tensor = tensor.unflatten(self.axis, split)
        return tensor.movedim(self.axis if self.outer else self.axis + 1, 0)


@dataclass(frozen=True, slots=True)
class Probed:
    """What the probe learned of a tap. `shape` and `axes` are those of one image, before the reducer.

    `alone`: a batch of one image gives what it gives in a larger one. `undecided`: it was the same for every image, so
    that nothing told whether its rows are of one image each: a run asks again when they are not the same any more.
    """

    tap: Tap
    layout: RowLayout
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    dtype: torch.dtype
    overwritten: bool
    alone: bool = True
    undecided: bool = False

    def rows(self, tensor: torch.Tensor, batch: int) -> torch.Tensor:
        """What the tap saw of `batch` images as (batch, …). Raises CaptureError for another shape than the probe's."""
        rows = self.layout.rows_first(plain(tensor), batch)
        if tuple(rows.shape[1:]) != self.shape:
            raise CaptureError(f"one image gives {tuple(rows.shape[1:])}, expected {self.shape}")
        return rows


@dataclass(frozen=True, slots=True)
class Refused:
    """A tap that cannot be stored row by row, and why."""

    tap: Tap
    why: str


def plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.dequantize() if tensor.is_quantized else tensor


def is_transformed(tensor: torch.Tensor) -> bool:
    """Whether it stands for another one within torch.vmap or the like."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def is_plain(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_nested


# --------------------------------------------------------------------------------------------- capture


class _StopForward(BaseException):
    """Ends a forward pass after the last wanted tap. Not an Exception, since models swallow those."""


class Hooks:
    """Hooks that call `take(i, tensor)` whenever the tensor of tap i comes by, and count calls.

    `take` gets None where the value has no such member. Before `stop`, a pass ends once every call has been counted.
    """

    def __init__(
        self, taps: Sequence[Tap], take: Callable[[int, torch.Tensor | None], None], stop: Event | None = None
    ) -> None:
        self._taps: dict[tuple[str, str], list[tuple[int, Tap]]] = {}
        for i, tap in enumerate(taps):
            self._taps.setdefault((tap.module, tap.tap), []).append((i, tap))
        self._calls = {(tap.module, tap.tap): tap.calls for tap in taps}
        self._take, self._stop = take, stop
        self._stop_seen = 0
        self._over = False
        self.counts: Counter[tuple[str, str]] = Counter()

    def run(self, forward: Forward, batch: torch.Tensor) -> None:
        """One forward pass, to the stop or to its end. Raises whatever the model raises."""
        self.counts = Counter()
        self._stop_seen, self._over = 0, False
        try:
            forward(batch)
        except _StopForward:
            return
        except Exception:
            if not self._over:
                raise
        if self._over:  # the model swallows even a BaseException: let its next passes run to their end
            self._stop = None

    def end(self) -> NoReturn:
        """Called in `take`: nothing more of this pass is wanted. A model that swallows this is not listened to."""
        self._over = True
        raise _StopForward

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Hooked for as long as the block lasts."""
        modules = _named_modules(model)
        handles = []
        try:
            if self._stop is not None:
                handles.append(modules[self._stop.module].register_forward_pre_hook(self._maybe_stop))
            for path, side in self._taps:
                if side == "in":
                    handles.append(modules[path].register_forward_pre_hook(self._before(path), with_kwargs=True))
                else:
                    handles.append(modules[path].register_forward_hook(self._after(path)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, path: str) -> Callable[..., None]:
        return lambda module, args, kwargs: self._fire((path, "in"), _inputs(args, kwargs))

    def _after(self, path: str) -> Callable[..., None]:
        return lambda module, args, output: self._fire((path, "out"), output)

    def _fire(self, key: tuple[str, str], value: Any) -> None:
        if self._over:
            return
        self.counts[key] += 1
        for i, tap in self._taps[key]:
            if tap.number == self.counts[key]:
                self._take(i, _member(value, tap.path))

    def _maybe_stop(self, module: nn.Module, args: Any) -> None:
        if self._stop is None or self._over:
            return
        self._stop_seen += 1
        complete = all(self.counts[key] >= calls for key, calls in self._calls.items())
        if complete and self._stop_seen >= self._stop.number:
            self.end()


Reduce = Callable[[torch.Tensor], torch.Tensor]
"""What is kept of (B, …) rows, in memory of its own: what it was given may be overwritten later."""


class Capture:
    """The hooks of one run; `forward` runs one batch and gives the wanted tensors, rows first.

    Made by `tapped`. Tensors that are overwritten later are copied or reduced in the hook; the others are kept by
    reference, and their version counters are compared when the pass has ended.
    """

    def __init__(
        self, taps: Sequence[Probed], reducers: Sequence[Reduce | None], stop: Event | None, asking: bool = False
    ) -> None:
        self._taps = taps
        self._reducers = reducers
        self._hooks = Hooks([p.tap for p in taps], self._take, stop)
        self._kept: dict[int, torch.Tensor] = {}
        self._watched: dict[int, tuple[torch.Tensor, int]] = {}
        self._batch = self._wanted = 0
        self._gradients = False
        self._error: Exception | None = None
        self._pads = not all(p.alone for p in taps)
        self._undecided = {i for i, p in enumerate(taps) if asking and p.undecided}
        self._usual: dict[int, torch.Tensor] = {}
        self._asked: Counter[int] = Counter()

    def forward(self, forward: Forward, batch: torch.Tensor) -> list[torch.Tensor]:
        """One forward pass over `batch` (B, …); one tensor (B, …) a tap, in the order of the taps.

        The tensors may be the model's own: read them only. The next pass leaves them as they are. A single image is run
        twice side by side where the probe says that the model does something else with one.
        Raises CaptureError when the pass does something else than the probe saw, and whatever the model raises.
        """
        asked = batch.clone() if self._undecided and len(batch) > 1 else None  # a model may write into its input
        rows = self._rows(forward, batch)
        if asked is not None:
            self._ask_again(forward, asked, rows)
        return rows

    def _rows(self, forward: Forward, batch: torch.Tensor) -> list[torch.Tensor]:
        self._wanted = len(batch)
        if self._pads and len(batch) == 1:
            batch = torch.cat([batch, batch])
        self._batch, self._gradients = len(batch), torch.is_grad_enabled()
        with torch.set_grad_enabled(self._gradients):  # as it is, also after a model that sets it for good
            return self._run(forward, batch)

    def _run(self, forward: Forward, batch: torch.Tensor) -> list[torch.Tensor]:
        self._error = None
        try:
            self._hooks.run(forward, batch)
            if self._error is not None:
                raise self._error
            self._check_counts(self._hooks.counts)
            self._check_versions()
            return [self._kept[i] for i in range(len(self._taps))]
        finally:
            self._kept.clear()
            self._watched.clear()

    def _ask_again(self, forward: Forward, batch: torch.Tensor, rows: Sequence[torch.Tensor]) -> None:
        """Whether the rows of undecided layers are of one image each, once they are not what they were all the time.

        Raises CaptureError where they are not.
        """
        changed = {i: rows[i] for i in self._undecided if not self._is_usual(i, rows[i])}
        if not changed:
            return
        leaks = leaking(partial(self._rows, forward), batch, batch.roll(1, 0), changed)
        if leaks:
            raise CaptureError(
                f"layer {self._taps[min(leaks)].tap.name!r} was the same for every image that the probe tried; now it"
                " is not, and its rows change with the other images of the batch, or at random: they cannot be stored"
                f"{_without([self._taps[n].tap.name for n in sorted(leaks)], len(self._taps))}"
            )
        for i, values in changed.items():
            found = kinds(values)
            self._asked[i] += found > 1
            # A single image that is unlike the others may stand where it shows nothing: in the middle, say.
            if found >= min(3, len(values)) or self._asked[i] >= 4:
                self._undecided.discard(i)
            elif found == 1:
                self._usual[i] = values[:1].clone()

    def _is_usual(self, i: int, rows: torch.Tensor) -> bool:
        return i in self._usual and same(rows, self._usual[i].expand_as(rows))

    def _take(self, i: int, tensor: torch.Tensor | None) -> None:
        """Called by the hooks. Never raises an Exception: a model could swallow it and go on."""
        try:
            self._kept[i] = self._taken(i, tensor)
        except CaptureError as error:
            name = self._taps[i].tap.name
            self._error = CaptureError(
                f"layer {name!r}: {error}, unlike in the probe; its rows cannot be trusted"
                f"{_without([name], len(self._taps))}"
            )
        except Exception as error:  # a reducer's, or no memory for a copy: for the caller, not for the model
            self._error = error
        if self._error is not None:
            self._hooks.end()

    def _taken(self, i: int, tensor: torch.Tensor | None) -> torch.Tensor:
        probed, reduce = self._taps[i], self._reducers[i]
        if tensor is None or not is_plain(tensor):
            raise CaptureError("the model gives no plain tensor here")
        with torch.set_grad_enabled(self._gradients):  # a model may have enabled gradients that nobody asked for
            rows = self._own_rows(probed, tensor)
            if reduce is not None:
                return reduce(rows)
            if tensor.is_quantized:  # made plain: a copy already
                return rows
            if probed.overwritten or tensor.is_inference():
                return rows.clone()
        self._watched[i] = (tensor, tensor._version)
        return rows

    def _own_rows(self, probed: Probed, tensor: torch.Tensor) -> torch.Tensor:
        """The rows of the images that were asked for, without gradients unless the caller wants them.

        A tensor of our own over the same memory, since the model may give its own another shape or memory later.
        """
        tensor = tensor.view_as(tensor) if self._gradients else tensor.detach()
        rows = probed.rows(tensor, self._batch)
        return rows if self._wanted == self._batch else rows[: self._wanted]

    def _check_counts(self, counts: Mapping[tuple[str, str], int]) -> None:
        others = [p.tap for p in self._taps if counts.get((p.tap.module, p.tap.tap), 0) != p.tap.calls]
        if others:
            first = others[0]
            raise CaptureError(
                f"module {first.module!r} was called {counts.get((first.module, first.tap), 0)} times in a forward pass"
                f" and {first.calls} times in the probe. What a model calls for some images alone cannot be stored row"
                f" by row{_without([tap.name for tap in others], len(self._taps))}"
            )

    def _check_versions(self) -> None:
        for i, (tensor, version) in self._watched.items():
            if tensor._version != version:
                raise CaptureError(
                    f"layer {self._taps[i].tap.name!r} was overwritten in place after it was captured, unlike in the"
                    " probe: its values are lost. A layer that this happens to only for some images cannot be stored"
                    f"{_without([self._taps[i].tap.name], len(self._taps))}"
                )


def _without(names: Sequence[str], count: int) -> str:
    """How a run goes on without these of its `count` layers."""
    if len(names) == count:
        return "."
    others = "the other layer" if count - len(names) == 1 else f"the other {count - len(names)} layers"
    return f". Leave out {some(names)}: name {others} by -l, with --overwrite or another -o."


@contextmanager
def tapped(
    model: nn.Module,
    taps: Sequence[Probed],
    reducers: Sequence[Reduce | None] | None = None,
    stop: Event | None = None,
    kind: type[Capture] = Capture,
    asking: bool = False,
) -> Iterator[Capture]:
    """Hooks on `model` for as long as the block lasts; they are gone on every way out.

    `reducers[i]` maps the (B, …) tensor of tap i to what is kept of it, on its device, before anything is copied.
    `stop` (from `Survey.stop_before`) is the call before which a forward pass may end. `kind` is how passes are run.
    `asking`: of undecided layers it is asked whether their rows are of one image each as soon as they are unlike.
    """
    capture = kind(taps, reducers or [None] * len(taps), stop, asking)
    with capture._hooks.on(model):
        yield capture
