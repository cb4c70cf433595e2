"""Find the layers of a file that a selector means: of those it holds, what the run would have taken by it."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from fmextract.common.text import some
from fmextract.errors import ConfigError, LayerError
from fmextract.records import LayerSpec
from fmextract.selector import KINDS, Module, Selector, meant

if TYPE_CHECKING:
    from fmextract.reading.activations import Activations
    from fmextract.reading.layer import Layer


MOST_TOLD = 12
"""Names that a message lists, where none is close to the one that was asked for."""


class UnknownName(ConfigError, KeyError):
    """A layer, or the key of an image, that is not in the file; the message names the closest ones."""

    __str__ = Exception.__str__  # KeyError's shows the message in quotes, with its line ends escaped


def select_layers(acts: Activations, selectors: Sequence[str], *, with_maps: bool = False) -> list[str]:
    """Return the names of the selected layers, in their order; without selectors all (`with_maps`: all that have maps).

    Raises UnknownName, a ConfigError, for a selector that means no stored layer, or if the file cannot tell.
    """
    if not selectors:
        found = [name for name in acts.layers if not with_maps or has_maps(acts[name])]
        if not found:
            raise ConfigError(f"{acts.path} has no layer with maps")
        return found
    return list(acts.select(*selectors))


def meant_layers(text: str, layers: Mapping[str, LayerSpec], file: object) -> list[str]:
    """Return the names of the layers of `file` that a name or selector means, in their order; at least one.

    It means what it meant to the run. One that may stand for several modules takes what is stored of them, reduced or
    not, unless it names a reducer. Raises UnknownName.
    """
    if text in layers:
        return [text]
    modules = {spec.module: _module(spec) for spec in layers.values()}
    try:
        selector = Selector.of(text, {path for module in modules.values() for path in module.paths})
    except LayerError as error:
        raise UnknownName(f"no layer {text!r} in {file}{closest(text, layers)}") from error
    if unsaid := _unsaid(selector, modules.values()):
        raise UnknownName(
            f"{file} does not say which layer is {text}, as it was written before files said {unsaid}: "
            f"name one of {', '.join(itertools.islice(layers, MOST_TOLD))}"
        )
    paths = set(meant(selector, modules.values()))
    stored = {name: spec for name, spec in layers.items() if spec.module in paths}
    found = [name for name, spec in stored.items() if _is_asked_for(selector, spec)]
    if stored and not found:
        raise UnknownName(f"{file} has no layer that is {text}; of what that means it has {some(list(stored))}")
    if not found:
        raise UnknownName(_why_none(selector, layers, modules.values(), file))
    return found


def _module(spec: LayerSpec) -> Module:
    return Module(spec.module, spec.further_paths, spec.classes, spec.number, spec.number_from_end)


def _is_asked_for(selector: Selector, spec: LayerSpec) -> bool:
    """Return whether a layer is the tensor of its module that a selector asks for."""
    member = tuple(re.findall(r"\[([^\[\]]+)\]", spec.member))
    return (
        selector.tap == spec.tap
        and selector.call in (None, spec.call)
        and selector.member == member[: len(selector.member)]
        and (selector.reducer == spec.reducer or (selector.is_pattern and not selector.reducer))
    )


def _unsaid(selector: Selector, modules: Collection[Module]) -> str:
    """Return what an older file does not say of its layers, so that it cannot tell which are meant; "" if it can."""
    if any(selector.base in module.paths for module in modules) or all(module.classes for module in modules):
        return ""
    if selector.numbered is not None:
        _, number = selector.numbered
        if number < 0:
            return "how many of a kind there are"
        return "" if any(module.number for module in modules) else "which of its kind each is"
    return "of which classes each is" if selector.base.startswith("type:") else ""


def _why_none(selector: Selector, layers: Collection[str], modules: Collection[Module], file: object) -> str:
    if selector.numbered is not None:
        kind, _ = selector.numbered
        if kind not in KINDS:
            return f"{selector.text}: unknown kind {kind!r}; expected one of {', '.join(KINDS)}"
        there = [word for module in modules for word in module.number.split() if word.startswith(f"{kind}#")]
        has = ", ".join(there[:MOST_TOLD]) or f"none of the kind {kind}"
        return f"{file} has no layer that is {selector.text}; it has {has}"
    classes = {name for module in modules for name in module.classes}
    known = sorted(classes) if selector.base.startswith("type:") else layers
    return f"no layer {selector.text!r} in {file}{closest(selector.wanted, known)}"


def closest(name: object, names: Iterable[str]) -> str:
    """Return the end of a message on a name that is not there: the closest names, or all where they are few."""
    some = [str(known) for known in itertools.islice(names, 10_000)]
    holding = [known for known in some if str(name).lower() in known.lower()]  # `tom` for `cats/tom.jpg`
    close = holding[:3] or difflib.get_close_matches(str(name), some, n=3, cutoff=0.5)
    if not close and 0 < len(some) <= MOST_TOLD:
        return f"; there are {', '.join(some)}"
    return f"; the closest are {', '.join(close)}" if close else ""


def has_maps(layer: Layer) -> bool:
    """Return whether the layer's axes are those of maps, or of tokens that may stand on a grid."""
    return set(layer.axes[1:]) in ({"channel", "y", "x"}, {"token", "feature"})
