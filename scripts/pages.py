"""Write the pages of docs/reference that come out of the code: the commands, the reducers, the refusals.

`--check` only says which of them are out of date.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import refusals
import typer

from fmextract.capture.reducer_help import REDUCER_HELP
from fmextract.cli.app import app

REFERENCE = Path(__file__).parents[1] / "docs" / "reference"

HEAD = """\
# Commands

Written by `scripts/docs` from the help texts of the commands.

Every command prints its result to stdout, as a table or, with `--json`, as JSON. Notes, progress and errors go to
stderr.

| exit code | meaning |
|--:|---|
| 0 | done |
| 1 | something unexpected: a bug |
| 2 | wrong usage or configuration: nothing was done |
| 3 | done, but some images failed; their rows hold NaN, a status and a message |
| 4 | stopped (too many failures, no space, lost device); what is done is kept, and the same command resumes |
| 5 | a file does not hold what was written |
| 130 | interrupted; the same command resumes |

`-l` takes [selectors](selectors.md), with [reducers](reducers.md) behind `=`. What a command refuses, and why:
[refusals](refused.md).
"""


REDUCERS = """\
# Reducers

Written by `scripts/docs` from `REDUCER_HELP`.

Put `=` and a reducer behind a selector to keep less of a layer: `-l 'layer4=mean'`. One run can keep several views of
the same layer. The reducer runs on the device, before anything is copied to the host. Shapes are those of one image.
Averages of half-precision and integer maps are computed and kept in float32.

| reducer | keeps | shape | needs |
|---|---|---|---|
"""


def reference() -> str:
    """Return the text of cli.md."""
    first, *others = commands().items()
    known = {_names(option): _text(option) for option in first[1].params}
    return "\n".join([HEAD, _section(*first, {}), *(_section(*other, known) for other in others)])


def reducers() -> str:
    """Return the text of reducers.md."""
    rows = [(f"`={help.usage}`".replace(" or ", "` or `="), *help[1:]) for help in REDUCER_HELP.values()]
    rows.append(
        ("`=module:callable`", "what your function makes of a tensor (B, …), as (B, …)", "as it gives", "nothing")
    )
    return REDUCERS + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def commands() -> dict[str, Any]:
    """Every command by the words that call it, as `info` and `show maps`."""
    found: dict[str, Any] = {}
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found |= {name: command} if inner is None else {f"{name} {word}": one for word, one in inner.items()}
    return found


def _section(name: str, command: Any, known: Mapping[str, str]) -> str:
    """One command. Where it shares most of its options with the first one (`known`), only its own are listed."""
    brief, _, rest = inspect.cleandoc(command.help).partition("\n")
    *prose, example = [part.strip() for part in rest.split("\n\n")]
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    options = [option for option in options if option.name != "help" and not option.hidden]
    shared = [option for option in options if known.get(_names(option)) == _text(option)]
    if len(shared) > 10:
        prose.append("Every other option is that of `extract`.")
        options = [option for option in options if option not in shared]
    words = " ".join(["fmextract", name, *(argument.metavar for argument in arguments), "[OPTIONS]"])
    lines = [f"- `{argument.metavar}`: {_text(argument)}" for argument in arguments]
    panels = _panels(options)
    for panel, of_panel in panels.items():
        lines += [
            *(["", f"**{panel}**", ""] if len(panels) > 1 else []),
            *(f"- {_names(o)}: {_text(o)}" for o in of_panel),
        ]
    return "\n".join([f"## {name}", "", f"`{words}`", "", brief, *prose, "", "```sh", example, "```", "", *lines, ""])


def _panels(options: Sequence[Any]) -> dict[str, list[Any]]:
    """Return the options under the heading that `--help` gives them, in its order; those without one come last."""
    found: dict[str, list[Any]] = {}
    for option in options:
        found.setdefault(option.rich_help_panel or "Also", []).append(option)
    return found if "Also" not in found else {**found, "Also": found.pop("Also")}


def _names(option: Any) -> str:
    names = ", ".join([*sorted(option.opts, key=len), *option.secondary_opts])
    return f"`{names} {option.metavar}`" if option.metavar else f"`{names}`"


def _text(parameter: Any) -> str:
    """The help, its stars escaped, which would set what is between them in italics."""
    text = parameter.help.replace("*", "\\*")
    return f"{text} **Required.**" if parameter.required and parameter.param_type_name == "option" else text


PAGES: dict[Path, Callable[[], str]] = {
    REFERENCE / "cli.md": reference,
    REFERENCE / "reducers.md": reducers,
    REFERENCE / "refused.md": refusals.refusals,
}


def main() -> int:
    stale = 0
    for target, text in PAGES.items():
        current = target.read_text(encoding="utf-8") if target.exists() else ""
        if current == text():
            continue
        stale = 1
        if sys.argv[1:] == ["--check"]:
            print(f"docs/reference/{target.name} is out of date: run scripts/docs", file=sys.stderr)
        else:
            target.write_text(text(), encoding="utf-8")
    return stale if sys.argv[1:] == ["--check"] else 0


if __name__ == "__main__":
    sys.exit(main())
