"""Selectors to taps: which tensors of which calls the words of a user mean, in the order of execution."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Sequence

from torch import nn

from fmextract.capture.reach import UNREADY
from fmextract.capture.survey import Survey
from fmextract.capture.taps import Event, Tap, TensorInfo
from fmextract.common.text import some
from fmextract.errors import LayerError
from fmextract.selector import KINDS, ROOT, Selector, meant


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
            made = _of_selector(Selector.of(text, seen.paths), seen)
        except LayerError as error:
            errors.append(error)
            continue
        for tap in made:
            other = taps.get(tap.name, tap)
            if (other.module, other.number, other.tap, other.path) != (tap.module, tap.number, tap.tap, tap.path):
                errors.append(_of_one_name(other, tap))
            elif tap.name not in taps or tap.explicit:
                taps[tap.name] = tap
    position = {event: i for i, event in enumerate(seen.tensors)}
    return sorted(taps.values(), key=lambda tap: position[Event(tap.module, tap.number, tap.tap)]), errors


def _of_one_name(one: Tap, other: Tap) -> LayerError:
    """Two layers of one name: the path of a module may end as a call, a member or a reducer does (`a:2`, `a[0]`)."""
    both = " and ".join(f"of call {tap.number} of {tap.module!r}" for tap in (one, other))
    return LayerError(f"two layers would be called {one.name!r}, {both}: take one of them, or rename the module")


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
    matches = meant(selector, seen.modules.values())
    if not matches:
        raise _no_match(selector, seen)
    order = {path: i for i, path in enumerate(seen.order)}
    called = set(matches) & set(order)
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


def _no_match(selector: Selector, seen: Survey) -> LayerError:
    if selector.numbered:
        kind, _ = selector.numbered
        if kind not in KINDS:
            return LayerError(f"{selector.text!r}: unknown kind {kind!r}; expected one of {', '.join(KINDS)}")
        count = len(seen.numbered(kind))
        span = f"{kind}#0 to {kind}#{count - 1}" if count else "none at all"
        return LayerError(f"{selector.text!r}: this model has {span} in the order of execution")
    classes = {name for names in seen.lineage.values() for name in names}
    paths = [path for path in (*seen.types, *seen.aliases) if path != ROOT]
    close = _closest(selector.wanted, sorted(classes) if selector.base.startswith("type:") else paths)
    if "#" in selector.base:
        close += " After # stands one number, as in conv#0 or conv#-1; type:Conv2d takes all convolutions."
    return LayerError(f"no layer matches {selector.text!r}.{close} `fmextract layers` lists all.")


def left_out(selectors: Sequence[str], seen: Survey) -> dict[str, str]:
    """Why modules that patterns mean are not taken, by path; without selectors, of all. Of a module and those within it
    the outermost.
    """
    wanted = set(seen.missed)
    if selectors:
        parsed = [Selector.of(text, seen.paths) for text in selectors]
        wanted &= {path for one in parsed if one.is_pattern for path in meant(one, seen.modules.values())}
    return {path: seen.missed[path] for path in seen.missed if path in wanted and path.rpartition(".")[0] not in wanted}


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
        meant_by=seen.modules[event.module],
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
