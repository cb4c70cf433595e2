"""The one grammar of selectors: paths, globs, types and numbers, as a run and a file read them. No torch."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from fmextract.errors import LayerError

# ------------------------------------------------------------------------------------------ selectors

_SELECTOR = re.compile(
    r"(?P<base>type:[\w.]+|[^:@\[=]+)"
    r"(?::(?P<call>\d+))?(?P<input>@in)?(?P<member>(?:\[[^\[\]]+\])*)(?:=(?P<reducer>[^=]+))?"
)


TRUNK = "trunk"  # convolutions that lie on no shortcut, as texts on feature maps number them


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


def _glob(pattern: str) -> re.Pattern[str]:
    """`*` and `?` stay within one name, `**` crosses dots; `**.x` is every x, the top-level one included."""
    parts = {"**.": r"(?:.*\.)?", "**": r".*", "*": r"[^.]*", "?": r"[^.]"}
    tokens = re.split(r"(\*\*\.|\*\*|\*|\?)", pattern)
    return re.compile("".join(parts.get(token, re.escape(token)) for token in tokens))
