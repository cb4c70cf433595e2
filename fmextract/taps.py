"""Taps: which tensors of a forward pass are wanted, what the probe learns of them, and how they are taken.

1. `survey` runs the model once and writes down every call of every module, in the order in which the calls end.
2. `resolve` turns selectors (`layer4.*.conv1`, `conv#20`, `relu:2@in[0]=mean`) into taps.
3. `probe` runs the model on batches of two sizes and decides by values where the batch is in each tap's tensor, which
   tensors are overwritten later, and what each axis means. A tap whose rows would not belong to one image is refused.
4. `tapped` puts hooks on the model for as long as a `with` block lasts and ends each forward after the last wanted tap.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fmextract.axes import AxisTracer, image_axes, name_axes, without_batch
from fmextract.errors import CaptureError, LayerError

ROOT = "(model)"  # how the model itself is called as a layer; as a selector it is "."

# ------------------------------------------------------------------------------------------ selectors

_SELECTOR = re.compile(
    r"(?P<base>type:[\w.]+|[^:@\[=]+)"
    r"(?::(?P<call>\d+))?(?P<input>@in)?(?P<member>(?:\[[^\[\]]+\])*)(?:=(?P<reducer>[^=]+))?"
)


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


@dataclass(frozen=True, slots=True)
class Selector:
    """One `-l` option, taken apart. `call` counts from 1; `member` is a path of keys and indices."""

    text: str
    base: str
    call: int | None
    tap: str
    member: tuple[str, ...]
    reducer: str

    @classmethod
    def parse(cls, text: str) -> Selector:
        """Raises LayerError with the grammar when `text` is no selector."""
        match = _SELECTOR.fullmatch(text.strip())
        if match is None:
            raise LayerError(
                f"{text!r} is not a layer selector. Expected a module path, a glob, type:Class or conv#N, "
                "then in this order, each optional: ':2' (call), '@in' (input), '[1]' or '[key]' (member), '=mean'."
            )
        call = match["call"]
        if call == "0":
            raise LayerError(f"{text!r}: calls count from 1, so ':1' is the first")
        return cls(
            text=text.strip(),
            base=match["base"],
            call=int(call) if call else None,
            tap="in" if match["input"] else "out",
            member=tuple(re.findall(r"\[([^\[\]]+)\]", match["member"])),
            reducer=match["reducer"] or "",
        )

    @property
    def is_pattern(self) -> bool:
        """Whether it may stand for several modules."""
        return self.base.startswith("type:") or any(c in self.base for c in "*?")


def module_kind(module: nn.Module) -> str:
    """`conv`, `linear`, `norm`, `act`, `pool`, or "" for anything else; quantized twins count too."""
    names = {cls.__name__ for cls in type(module).__mro__}
    return next((kind for kind, bases in _MODULE_KINDS.items() if names & bases), "")


def _glob(pattern: str) -> re.Pattern[str]:
    """`*` and `?` stay within one name, `**` crosses dots; `**.x` is every x, the top-level one included."""
    parts = {"**.": r"(?:.*\.)?", "**": r".*", "*": r"[^.]*", "?": r"[^.]"}
    tokens = re.split(r"(\*\*\.|\*\*|\*|\?)", pattern)
    return re.compile("".join(parts.get(token, re.escape(token)) for token in tokens))


# --------------------------------------------------------------------------------------------- survey


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape (batch included) and type of one tensor in the output or input of a call; `path` leads to it."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module: its number among the calls of that module (from 1), its tensors."""

    module: str
    number: int
    outputs: tuple[TensorInfo, ...]
    inputs: tuple[TensorInfo, ...]


Event = tuple[str, int, str]


@dataclass(frozen=True, slots=True)
class Survey:
    """Every call of one forward pass, in the order in which the calls ended.

    `events` are the starts and ends of the calls as they came: (path, number, "in" or "out").
    `types`, `kinds` and `lineage` (names of the classes it descends from) are of every module, called or not.
    """

    calls: tuple[Call, ...]
    events: tuple[Event, ...]
    counts: Mapping[str, int]
    types: Mapping[str, str]
    kinds: Mapping[str, str]
    lineage: Mapping[str, frozenset[str]]

    @property
    def order(self) -> list[str]:
        """Paths of the modules that were called, in order of their first call's end."""
        return list(dict.fromkeys(call.module for call in self.calls))

    def numbered(self, kind: str) -> list[str]:
        """Paths of the modules of a kind (`conv`, …) in the order of execution: `conv#N` is the N-th."""
        return [path for path in self.order if self.kinds[path] == kind]

    def stop_before(self, taps: Sequence[Tap]) -> Event | None:
        """The first start of a call after the last wanted tap: a forward may end there. None: it runs to its end.

        Stopping there and not in the tap itself leaves time to notice a module that is called once more than expected.
        """
        position = {event: i for i, event in enumerate(self.events)}
        last = max(position[tap.module, tap.number, tap.tap] for tap in taps)
        return next((event for event in self.events[last + 1 :] if event[2] == "in"), None)


def members(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    """Every tensor in nested tuples, lists, dicts and dataclass-like outputs, with the keys that lead to it."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from members(item, (*path, str(key)))
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from members(item, (*path, str(i)))
    elif is_dataclass(value):
        for entry in fields(value):
            yield from members(getattr(value, entry.name), (*path, entry.name))


def _member(value: Any, path: tuple[str, ...]) -> Any:
    for step in path:
        if isinstance(value, Mapping):
            value = value[step]
        elif isinstance(value, (tuple, list)):
            value = value[int(step)]
        else:
            value = getattr(value, step)
    return value


def _inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {**{str(i): arg for i, arg in enumerate(args)}, **kwargs}


def _infos(value: Any) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(path, tuple(t.shape), t.dtype) for path, t in members(value))


def check_hookable(model: nn.Module) -> None:
    """Refuse wrappers whose forward would pass our hooks by, or split the batch between replicas."""
    wrappers = {"DataParallel": "module", "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}
    name = type(model).__name__
    if name in wrappers:
        raise LayerError(
            f"the model is wrapped in {name}, where hooks miss calls; pass what it wraps: model.{wrappers[name]}"
        )


def _named_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {path or ROOT: module for path, module in model.named_modules()}


Forward = Callable[[torch.Tensor], Any]


def survey(model: nn.Module, forward: Forward, batch: torch.Tensor) -> Survey:
    """Run `forward(batch)`, which calls `model`, and write down every call of every module.

    `batch` is (b, channel, y, x). Raises whatever the forward raises; hooks are gone on every way out.
    """
    check_hookable(model)
    modules = _named_modules(model)
    calls: list[Call] = []
    events: list[Event] = []
    started: Counter[str] = Counter()
    counts: Counter[str] = Counter()

    def before(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            started[path] += 1
            events.append((path, started[path], "in"))

        return hook

    def after(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            counts[path] += 1
            events.append((path, counts[path], "out"))
            calls.append(Call(path, counts[path], _infos(output), _infos(_inputs(args, kwargs))))

        return hook

    handles = [m.register_forward_pre_hook(before(path)) for path, m in modules.items()]
    handles += [m.register_forward_hook(after(path), with_kwargs=True) for path, m in modules.items()]
    try:
        with torch.no_grad():
            forward(batch)
    finally:
        for handle in handles:
            handle.remove()
    return Survey(
        calls=tuple(calls),
        events=tuple(events),
        counts=dict(counts),
        types={path: type(m).__name__ for path, m in modules.items()},
        kinds={path: module_kind(m) for path, m in modules.items()},
        lineage={path: frozenset(cls.__name__ for cls in type(m).__mro__) for path, m in modules.items()},
    )


# -------------------------------------------------------------------------------------------- resolve


@dataclass(frozen=True, slots=True)
class Tap:
    """One wanted tensor: the `number`-th call of `module`, its output or input, the member at `path`."""

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
    explicit: bool  # named by path or number, not by a pattern: refused aloud rather than left out


def resolve(selectors: Sequence[str], seen: Survey) -> list[Tap]:
    """The taps that `selectors` stand for, without repeats, in the order of execution.

    Raises LayerError for a selector that matches nothing, naming the closest matches.
    """
    found: dict[str, Tap] = {}
    for text in selectors:
        selector = Selector.parse(text)
        for module in _matching_modules(selector, seen):
            for tap in _taps_of(selector, module, seen):
                found.setdefault(tap.name, tap)
    position = {(c.module, c.number): i for i, c in enumerate(seen.calls)}
    # The input of a call exists before its output, and both stand where the call ends.
    return sorted(found.values(), key=lambda t: (position[t.module, t.number], t.tap == "out"))


def _matching_modules(selector: Selector, seen: Survey) -> list[str]:
    base = selector.base
    numbered = re.fullmatch(r"(\w+)#(-?\d+)", base)
    if numbered:
        return [_numbered_module(selector, numbered[1], int(numbered[2]), seen)]
    if base.startswith("type:"):
        wanted = base[len("type:") :].rpartition(".")[2]
        matches = [path for path, names in seen.lineage.items() if wanted in names and path != ROOT]
        known = sorted({name for names in seen.lineage.values() for name in names})
    elif selector.is_pattern:
        pattern = _glob(base)
        matches = [path for path in seen.types if path != ROOT and pattern.fullmatch(path)]
        known = list(seen.types)
    else:
        wanted = ROOT if base in (".", ROOT) else base
        matches = [wanted] if wanted in seen.types else []
        known = list(seen.types)
    if not matches:
        raise LayerError(f"no layer matches {selector.text!r}.{_closest(base, known)} `fmextract layers` lists all.")
    called = [path for path in matches if path in seen.counts]
    if not called:
        raise LayerError(
            f"{selector.text!r} matches {_some(matches)}, which the forward pass never calls"
            " (its parent may use the weights directly, or it is a part of another mode)."
            f"{_closest(base, [path for path in seen.order if path != ROOT])}"
        )
    return sorted(called, key=seen.order.index)


def _numbered_module(selector: Selector, kind: str, number: int, seen: Survey) -> str:
    if kind not in _MODULE_KINDS:
        raise LayerError(f"{selector.text!r}: unknown kind {kind!r}; expected one of {', '.join(_MODULE_KINDS)}")
    paths = seen.numbered(kind)
    if not -len(paths) <= number < len(paths):
        span = f"{kind}#0 to {kind}#{len(paths) - 1}" if paths else "none at all"
        raise LayerError(f"{selector.text!r}: this model has {span} in the order of execution")
    return paths[number]


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(repr(n) for n in names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _closest(wanted: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(wanted, known, n=4, cutoff=0.5)
    close += [name for name in known if wanted.strip("*?") and wanted.strip("*?") in name and name not in close][:4]
    return f" Closest: {_some(close)}." if close else ""


def _taps_of(selector: Selector, module: str, seen: Survey) -> Iterator[Tap]:
    total = seen.counts[module]
    if selector.call is not None and selector.call > total:
        raise LayerError(f"{selector.text!r}: {module!r} is called {total} time{'s' * (total != 1)} in a forward pass")
    for call in seen.calls:
        if call.module != module or selector.call not in (None, call.number):
            continue
        infos = call.inputs if selector.tap == "in" else call.outputs
        chosen = [info for info in infos if info.path[: len(selector.member)] == selector.member]
        if not chosen:
            there = _some(["".join(f"[{p}]" for p in info.path) for info in infos]) or "no tensor at all"
            raise LayerError(
                f"{selector.text!r}: no such tensor in the {_side(selector.tap)} of {module!r}; it has {there}"
            )
        for info in chosen:
            # A member is spelled out where it was asked for or where there are several.
            shown = info.path if len(chosen) > 1 else selector.member
            yield _tap(selector, call, total, info, shown, seen)


def _side(tap: str) -> str:
    return "input" if tap == "in" else "output"


def _tap(selector: Selector, call: Call, total: int, info: TensorInfo, shown: tuple[str, ...], seen: Survey) -> Tap:
    member = "".join(f"[{key}]" for key in shown)
    number = f":{call.number}" if total > 1 else ""
    reducer = f"={selector.reducer}" if selector.reducer else ""
    side = "@in" if selector.tap == "in" else ""
    return Tap(
        name=f"{call.module}{number}{side}{member}{reducer}",
        module=call.module,
        module_type=seen.types[call.module],
        number=call.number,
        calls=total,
        tap=selector.tap,
        path=info.path,
        member=member,
        reducer=selector.reducer,
        selector=selector.text,
        explicit=not selector.is_pattern,
    )


def default_selectors(model: nn.Module, seen: Survey) -> list[str]:
    """The model's children, a container with several children replaced by them, until there are 4 or more."""
    level = dict(model.named_children())
    while True:
        # A ModuleList is never called itself: it stands for its children whatever their number.
        opened = {n for n, m in level.items() if n not in seen.counts and len(list(m.children()))}
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
    return [name for name in level if name in seen.counts] or ["."]


def _is_container(name: str, module: nn.Module) -> bool:
    several = len(list(module.children())) > 1
    listed = isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
    return several and (listed or name.rpartition(".")[2] == "encoder")


# ---------------------------------------------------------------------------------------------- probe


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
            return tensor.movedim(self.axis, 0)
        split = (batch, self.k) if self.outer else (self.k, batch)
        tensor = tensor.unflatten(self.axis, split)
        return tensor.movedim(self.axis if self.outer else self.axis + 1, 0)


@dataclass(frozen=True, slots=True)
class Probed:
    """What the probe learned of a tap. `shape` and `axes` are those of one image, before the reducer."""

    tap: Tap
    layout: RowLayout
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    dtype: torch.dtype
    overwritten: bool


@dataclass(frozen=True, slots=True)
class Refused:
    """A tap that cannot be stored row by row, and why."""

    tap: Tap
    why: str


_SAMPLED = 1 << 16  # values of a row that are compared: more than enough to tell two images apart


class _Watch:
    """Keep every wanted tensor of one forward pass as the hooks see it, to look at it again when the pass has ended."""

    def __init__(self) -> None:
        self.seen: dict[int, torch.Tensor] = {}
        self.before: dict[int, torch.Tensor] = {}
        self.version: dict[int, int] = {}
        self.counts: Mapping[tuple[str, str], int] = {}

    def __call__(self, index: int, tensor: torch.Tensor) -> None:
        self.seen[index] = tensor
        self.before[index] = _sampled(tensor)
        self.version[index] = -1 if tensor.is_inference() else tensor._version

    def overwritten(self) -> set[int]:
        """Taps whose tensor was written after the hook saw it: by its version counter, or by its values.

        The values also show writes through `.data` or foreign memory, which leave the counter as it was.
        """
        return {
            i
            for i, tensor in self.seen.items()
            if tensor.is_inference()
            or tensor._version != self.version[i]
            or not torch.equal(_sampled(tensor).nan_to_num(), self.before[i].nan_to_num())
        }


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.dequantize() if tensor.is_quantized else tensor


def _sampled(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of about _SAMPLED values spread over the tensor, in float32 or wider."""
    flat = _plain(tensor.detach()).reshape(-1)
    flat = flat[:: max(1, flat.numel() // _SAMPLED)]
    return flat.to(torch.float64 if flat.dtype == torch.float64 else torch.float32, copy=True)


def probe(
    model: nn.Module, forward: Forward, taps: Sequence[Tap], image_shape: Sequence[int], device: torch.device
) -> tuple[list[Probed], list[Refused]]:
    """Decide for each tap where its rows are, what its axes mean and whether it is overwritten later.

    Three noise images A, B, C run as (A, B) and as (B, C, A): shapes at the two batch sizes propose the axis, values
    decide, since A and B must come out the same among other neighbours. `image_shape` is (channel, y, x).
    The model must already be in the mode in which it will run. Everything happens in its own precision under `no_grad`.
    """
    noise = _distinct_noise(image_shape, device)
    small, large = noise[[0, 1]], noise[[1, 2, 0]]
    first = _watch(model, forward, taps, small)
    with AxisTracer() as tracer:
        tracer.seed(large, image_axes(large.shape))
        second = _watch(model, forward, taps, large)
    hazards = first.overwritten() | second.overwritten()
    probed: list[Probed] = []
    refused: list[Refused] = []
    for i, tap in enumerate(taps):
        outcome = _judge(tap, first, second, i)
        if isinstance(outcome, Refused):
            refused.append(outcome)
            continue
        tensor = second.seen[i]
        shape = tuple(outcome.rows_first(tensor, 3).shape[1:])
        per_image = without_batch(tracer.axes(tensor), outcome.axis, outcome.k, outcome.outer)
        probed.append(
            Probed(
                tap=tap,
                layout=outcome,
                shape=shape,
                axes=name_axes(per_image, len(shape)),
                dtype=tensor.dtype,
                overwritten=i in hazards,
            )
        )
    return probed, refused


def _distinct_noise(image_shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """Three images that even a network of random weights keeps apart: other noise, contrast, colour and gradient."""
    generator = torch.Generator().manual_seed(20_240_229)
    noise = torch.randn((3, *image_shape), generator=generator)
    ramp = torch.linspace(-1, 1, image_shape[-1])
    for i, (contrast, tilt) in enumerate([(0.4, 1.5), (1.0, -1.0), (1.6, 0.2)]):
        noise[i] = noise[i] * contrast + tilt * ramp
        noise[i, i % image_shape[0]] += 1.5
    return noise.to(device)


def _watch(model: nn.Module, forward: Forward, taps: Sequence[Tap], batch: torch.Tensor) -> _Watch:
    watch = _Watch()
    hooks = _Hooks(taps, watch, stop=None, done=lambda: False)
    with hooks.on(model), torch.no_grad():
        forward(batch)
    watch.counts = hooks.counts
    return watch


def overwritten(model: nn.Module, forward: Forward, taps: Sequence[Tap], batch: torch.Tensor) -> set[int]:
    """Indices of the taps whose tensor is written in place after the hook saw it, in a pass over `batch`.

    Asked again in the precision of the run: what autocast copies in one precision it may not in another.
    """
    return _watch(model, forward, taps, batch).overwritten()


def _judge(tap: Tap, first: _Watch, second: _Watch, i: int) -> RowLayout | Refused:
    """The layout of one tap's rows, from what it was in a batch of (A, B) and in one of (B, C, A)."""
    key = (tap.module, tap.tap)
    if first.counts[key] != tap.calls or second.counts[key] != tap.calls:
        return Refused(
            tap,
            f"{tap.module!r} is called a varying number of times: {tap.calls}, {first.counts[key]} and "
            f"{second.counts[key]} times in three forward passes",
        )
    a, b = first.seen[i], second.seen[i]
    if a.is_complex():
        return Refused(tap, "its values are complex")
    if a.is_sparse or a.is_nested or b.is_sparse or b.is_nested:
        return Refused(tap, "it is a sparse or nested tensor")
    layouts = _proposed_layouts(tuple(a.shape), tuple(b.shape))
    if not layouts:
        return Refused(
            tap,
            f"its shape does not follow the batch: {tuple(a.shape)} for 2 images and {tuple(b.shape)} for 3",
        )
    for layout in layouts:
        if _rows_agree(layout.rows_first(_plain(a), 2), layout.rows_first(_plain(b), 3)):
            return layout
    return Refused(tap, "its rows change with the other images of the batch: no row belongs to one image alone")


def _proposed_layouts(two: tuple[int, ...], three: tuple[int, ...]) -> list[RowLayout]:
    differing = [axis for axis, (m, n) in enumerate(zip(two, three, strict=False)) if m != n]
    if len(two) != len(three) or len(differing) != 1:
        return []
    axis = differing[0]
    k = two[axis] // 2
    if k == 0 or (2 * k, 3 * k) != (two[axis], three[axis]):
        return []
    return [RowLayout(axis)] if k == 1 else [RowLayout(axis, k, outer=True), RowLayout(axis, k, outer=False)]


def _rows_agree(two: torch.Tensor, three: torch.Tensor) -> bool:
    """Whether A and B, rows 0 and 1 of `two`, are rows 2 and 0 of `three`: by far closer to themselves than to others.

    The batch size changes the last bits of a forward pass, so equality is no test; and rows of an untrained network may
    be nearly alike, so that a fixed tolerance is none either.
    """
    two_rows = [_sampled_row(row) for row in two]
    three_rows = [_sampled_row(row) for row in three]
    for own, same in ((0, 2), (1, 0)):
        row = two_rows[own]
        scale = float(row.norm())
        to_self = float((row - three_rows[same]).norm())
        to_others = min(float((row - three_rows[j]).norm()) for j in range(3) if j != same)
        if to_self > 1e-3 * scale or to_self > max(0.25 * to_others, 1e-5 * scale):
            return False
    return True


def _sampled_row(row: torch.Tensor) -> torch.Tensor:
    return _sampled(row).double().nan_to_num(nan=0.0, posinf=1e30, neginf=-1e30)


# --------------------------------------------------------------------------------------------- capture


class _StopForward(BaseException):
    """Ends a forward pass after the last wanted tap. Not an Exception, since models swallow those."""


Take = Callable[[int, torch.Tensor], None]


class _Hooks:
    """Hooks that call `take(i, tensor)` whenever the tensor of tap i comes by, and count calls."""

    def __init__(self, taps: Sequence[Tap], take: Take, stop: Event | None, done: Callable[[], bool]) -> None:
        self._taps: dict[tuple[str, str], list[tuple[int, Tap]]] = {}
        for i, tap in enumerate(taps):
            self._taps.setdefault((tap.module, tap.tap), []).append((i, tap))
        self._take, self._stop, self._done = take, stop, done
        self.counts: Counter[tuple[str, str]] = Counter()
        self._stop_seen = 0

    def reset(self) -> None:
        """Before every forward pass."""
        self.counts.clear()
        self._stop_seen = 0

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Hooked for as long as the block lasts."""
        modules = _named_modules(model)
        handles = []
        try:
            # The stop comes before the taps of the same module: it would be their next call.
            if self._stop is not None:
                handles.append(modules[self._stop[0]].register_forward_pre_hook(self._maybe_stop))
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
        self.counts[key] += 1
        for i, tap in self._taps[key]:
            if tap.number == self.counts[key]:
                self._take(i, _member(value, tap.path))

    def _maybe_stop(self, module: nn.Module, args: Any) -> None:
        assert self._stop is not None
        self._stop_seen += 1
        if self._stop_seen >= self._stop[1] and self._done():
            raise _StopForward


Reduce = Callable[[torch.Tensor], torch.Tensor]


class Capture:
    """The hooks of one run; `forward` runs one batch and gives the wanted tensors, rows first.

    Made by `tapped`. Tensors that are overwritten later are copied or reduced in the hook; the others are kept by
    reference, and their version counters are compared when the pass has ended.
    """

    def __init__(self, taps: Sequence[Probed], reducers: Sequence[Reduce | None], stop: Event | None) -> None:
        self._taps = taps
        self._reducers = reducers
        self._hooks = _Hooks([p.tap for p in taps], self._take, stop, self._complete)
        self._kept: dict[int, torch.Tensor] = {}
        self._watched: dict[int, tuple[torch.Tensor, int]] = {}
        self._batch = 0
        self._error: CaptureError | None = None

    def forward(self, forward: Forward, batch: torch.Tensor) -> list[torch.Tensor]:
        """One forward pass over `batch` (B, …); one tensor (B, …) a tap, in the order of the taps.

        The tensors may share memory with the model's own: use them before the next pass.
        Raises CaptureError when the pass does something else than the probe saw, and whatever the model raises.
        """
        self._hooks.reset()
        self._batch, self._error = batch.shape[0], None
        try:
            with suppress(_StopForward):
                forward(batch)
            if self._error is not None:
                raise self._error
            self._check_counts()
            self._check_versions()
            return [self._kept[i] for i in range(len(self._taps))]
        finally:
            self._kept.clear()
            self._watched.clear()

    def _complete(self) -> bool:
        return len(self._kept) == len(self._taps)

    def _take(self, i: int, tensor: torch.Tensor) -> None:
        """Called by the hooks. Never raises an Exception: a model could swallow it and go on."""
        if self._error is None and i not in self._kept:
            try:
                self._kept[i] = self._taken(i, tensor)
            except CaptureError as error:
                name = self._taps[i].tap.name
                self._error = CaptureError(f"layer {name!r}: {error}, unlike in the probe; its rows cannot be trusted")
        if self._error is not None:
            raise _StopForward

    def _taken(self, i: int, tensor: torch.Tensor) -> torch.Tensor:
        probed = self._taps[i]
        rows = probed.layout.rows_first(_plain(tensor), self._batch)
        if tuple(rows.shape[1:]) != probed.shape:
            raise CaptureError(f"one image gives {tuple(rows.shape[1:])}, expected {probed.shape}")
        reduce = self._reducers[i]
        if reduce is not None:
            return reduce(rows)
        if probed.overwritten or tensor.is_inference():
            return rows.clone()
        if not tensor.is_quantized:
            self._watched[i] = (tensor, tensor._version)
        return rows

    def _check_counts(self) -> None:
        for i, probed in enumerate(self._taps):
            tap = probed.tap
            called = self._hooks.counts[tap.module, tap.tap]
            if i not in self._kept or called > tap.calls:
                raise CaptureError(
                    f"module {tap.module!r} was called {called} times in a forward pass and {tap.calls} times in the"
                    " probe. A model whose path depends on the image cannot be stored row by row."
                )

    def _check_versions(self) -> None:
        for i, (tensor, version) in self._watched.items():
            if tensor._version != version:
                raise CaptureError(
                    f"layer {self._taps[i].tap.name!r} was overwritten in place after it was captured, unlike in the"
                    " probe: its values are lost. A model that does this only for some images cannot be stored."
                )


@contextmanager
def tapped(
    model: nn.Module,
    taps: Sequence[Probed],
    reducers: Sequence[Reduce | None] | None = None,
    stop: Event | None = None,
) -> Iterator[Capture]:
    """Hooks on `model` for as long as the block lasts; they are gone on every way out.

    `reducers[i]` maps the (B, …) tensor of tap i to what is kept of it, on its device, before anything is copied.
    `stop` (from `Survey.stop_before`) is the call before which a forward pass may end.
    """
    capture = Capture(taps, reducers or [None] * len(taps), stop)
    with capture._hooks.on(model):
        yield capture
