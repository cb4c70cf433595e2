"""The one grammar of selectors, and what they mean of modules: a run and a file read them alike. No torch.

    Selector.of(text, paths)    taken apart: which modules, and which of their tensors
    meant(selector, modules)    the modules that its first part means

A run knows every module, a file those that it holds, each with all that a selector can mean it by (`Module`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from fmextract.errors import LayerError

KINDS = ("conv", "linear", "norm", "act", "pool", "trunk")
"""What modules are numbered among."""
TRUNK = "trunk"
"""Convolutions that lie on no shortcut, as texts on feature maps number them."""
ROOT = "(model)"
"""How the model itself is called as a layer; as a selector it is "."."""

_SELECTOR = re.compile(
    r"(?P<base>type:[\w.]+|[^:@\[=]+)"
    r"(?::(?P<call>\d+))?(?P<input>@in)?(?P<member>(?:\[[^\[\]]+\])*)(?:=(?P<reducer>[^=]+))?"
)


_NUMBERED = re.compile(r"(\w+)#(-?\d+)")


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

    @classmethod
    def of(cls, text: str, paths: Collection[str]) -> Selector:
        """`text` itself where it is one of the module paths, however odd its letters; else taken apart."""
        return cls(text, text, None, "out", (), "") if text in paths else cls.parse(text)

    @property
    def wanted(self) -> str:
        """The name of the class, of `type:torch.nn.ReLU`; of anything else the base."""
        return self.base.rpartition(".")[2].removeprefix("type:") if self.base.startswith("type:") else self.base

    @property
    def is_pattern(self) -> bool:
        """Whether it may stand for several modules."""
        return self.base.startswith("type:") or any(c in self.base for c in "*?")

    @property
    def numbered(self) -> tuple[str, int] | None:
        """Return (kind, number) of `conv#20`, None for anything else."""
        match = _NUMBERED.fullmatch(self.base)
        return (match[1], int(match[2])) if match else None


@dataclass(frozen=True, slots=True)
class Module:
    """All that a selector can mean a module by.

    `path` in the model, and further ones of a module that has several; the names of the classes that it descends from,
    its own first; its numbers among its kinds, from the first to run and from the last: `conv#20 trunk#19` and
    `conv#-33 trunk#-30`.
    """

    path: str
    further_paths: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    number: str = ""
    number_from_end: str = ""

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path, *self.further_paths)

    @property
    def numbers(self) -> list[str]:
        return [*self.number.split(), *self.number_from_end.split()]


def meant(selector: Selector, known: Iterable[Module]) -> list[str]:
    """Return the paths of the modules that a selector means: by path, number, class or glob, in this order."""
    modules = list(known)
    base = ROOT if selector.base == "." else selector.base
    if named := [module.path for module in modules if base in module.paths]:
        return named
    if selector.numbered:
        number = "{}#{}".format(*selector.numbered)  # conv#007 is conv#7
        return [module.path for module in modules if number in module.numbers]
    below = [module for module in modules if module.path != ROOT]
    if base.startswith("type:"):
        return [module.path for module in below if selector.wanted in module.classes]
    pattern = _glob(base)
    return [module.path for module in below if any(pattern.fullmatch(path) for path in module.paths)]


def _glob(pattern: str) -> re.Pattern[str]:
    """`*` and `?` stay within one name, `**` crosses dots; `**.x` is every x, the top-level one included."""
    parts = {"**.": r"(?:.*\.)?", "**": r".*", "*": r"[^.]*", "?": r"[^.]"}
    tokens = re.split(r"(\*\*\.|\*\*|\*|\?)", pattern)
    return re.compile("".join(parts.get(token, re.escape(token)) for token in tokens))
