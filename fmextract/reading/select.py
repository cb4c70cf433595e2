"""Which of a file's layers a selector means: names, globs, and `conv#0` where the file can tell."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fmextract.errors import ConfigError

if TYPE_CHECKING:
    from fmextract.reading.activations import Activations
    from fmextract.reading.layer import Layer

_NUMBERED = re.compile(r"(conv|linear|norm|act|pool|trunk)#(-?\d+)")


_KINDS = {
    "conv": r"conv",
    "linear": r"linear",
    "norm": r"norm",
    "act": r"relu|gelu|silu|elu|swish|sigmoid|tanh|softmax|mish|hardtanh",
    "pool": r"pool",
    "trunk": r"conv",
}


_GLOB = {"**.": r"(?:.*\.)?", "**": r".*", "*": r"[^.]*", "?": r"[^.]"}


def select_layers(acts: Activations, selectors: Sequence[str], *, with_maps: bool = False) -> list[str]:
    """Return the names of the selected layers, in their order; without selectors all (`with_maps`: all that have maps).

    A selector is a name; a glob as in `extract`; `type:Conv2d`; `conv#20`, or `trunk#19` among the convolutions that
    lie on no shortcut; `conv#-1` if the run asked for it in these words or took every convolution: a file does not know
    the modules that it does not hold. Raises ConfigError.
    """
    if not selectors:
        found = [name for name in acts.layers if not with_maps or has_maps(acts[name])]
        if not found:
            raise ConfigError(f"{acts.path} has no layer with maps")
        return found
    wanted = {name for selector in selectors for name in _matching(acts, selector)}
    return [name for name in acts.layers if name in wanted]


def _matching(acts: Activations, selector: str) -> list[str]:
    if selector in acts:
        return [selector]
    if numbered := _NUMBERED.fullmatch(selector):
        return _numbered(acts, selector, numbered[1], int(numbered[2]))
    if selector.startswith("type:"):
        kind = selector.removeprefix("type:")
        found = [name for name in acts.layers if acts[name].module_type == kind]
    elif "*" in selector or "?" in selector:
        tokens = re.split(r"(\*\*\.|\*\*|\*|\?)", selector)
        pattern = re.compile("".join(_GLOB.get(token, re.escape(token)) for token in tokens))
        found = [name for name in acts.layers if pattern.fullmatch(name) or pattern.fullmatch(acts[name].module)]
    else:
        found = [name for name in acts.layers if acts[name].module == selector]
    if not found:
        acts[selector]  # raises, and names the closest
    return found


def _numbered(acts: Activations, selector: str, kind: str, number: int) -> list[str]:
    """Return the layer that is `conv#20`, or its several calls: a layer says which of its kind it is.

    From the end, and of files that do not say it: the layer that it was when the run asked for it. The selectors of
    the run, sorted as their modules run, are the stored layers of that kind one by one: if both are as many, each has
    found its layer.
    """
    words = {name: acts[name].numbers for name in acts.layers}
    if said := [name for name, own in words.items() if selector in own]:
        return said
    if number >= 0 and any(words.values()):
        there = ", ".join(word for own in words.values() for word in own if word.startswith(f"{kind}#"))
        raise ConfigError(f"{acts.path} has no layer that is {selector}; it has {there or f'none of the kind {kind}'}")
    stored = [name for name in acts.layers if _is_kind(acts[name].module_type, kind)]
    asked = acts.config.get("options", {}).get("layers", [])
    if kind == "conv" and "type:Conv2d" in asked and -len(stored) <= number < len(stored):
        return [stored[number]]
    numbers = list(dict.fromkeys(_numbers(asked, kind)))
    ordered = sorted(n for n in numbers if n >= 0) + sorted(n for n in numbers if n < 0)
    if number in ordered and len(ordered) == len(stored):
        return [stored[ordered.index(number)]]
    raise ConfigError(f"{acts.path} does not say which layer is {selector}: name one of {', '.join(acts.layers)}")


def _numbers(selectors: Sequence[str], kind: str) -> Iterator[int]:
    for selector in selectors:
        found = _NUMBERED.fullmatch(selector)
        if found and found[1] == kind:
            yield int(found[2])


def _is_kind(module_type: str, kind: str) -> bool:
    return re.search(_KINDS[kind], module_type, re.IGNORECASE) is not None


def has_maps(layer: Layer) -> bool:
    """Return whether the layer's axes are those of maps, or of tokens that may stand on a grid."""
    return set(layer.axes[1:]) in ({"channel", "y", "x"}, {"token", "feature"})
