"""What a command is to typer: options in panels, options that every command has, and options by their former names."""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand

from fmextract.cli.options import _option, word_of
from fmextract.cli.verbosity import verbosity
from fmextract.config import RENAMED

FEW = 2
"""Panels, that are shown as one list."""

_COMMON = {
    "quiet": Annotated[bool, _option("--quiet", "-q", help="Show no progress and no notes, only warnings and errors.")],
    "verbose": Annotated[
        int, typer.Option("--verbose", "-v", count=True, help="Show the log; -vv more of it.", show_default=False)
    ],
    "debug": Annotated[bool, _option("--debug", help="Show the traceback of an error.")],
}


class Command(TyperCommand):
    """A command as this program has them. Its help needs nothing but typer."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options, those of a panel together."""
        arguments: list[tuple[str, str]] = []
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            panel = getattr(parameter, "rich_help_panel", None) or "Options"
            (arguments if parameter.param_type_name == "argument" else panels.setdefault(panel, [])).append(record)
        if len(panels) <= FEW:
            panels = {"Options": [record for records in panels.values() for record in records]}
        panels["Options"] = panels.pop("Options", [])  # to the end
        for title, records in {"Arguments": arguments, **panels}.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take options by their former names, too."""
        names = {parameter.name for parameter in self.params}
        former = {f"--{old}": f"--{word_of(new)}" for old, new in RENAMED.items() if new in names and old not in names}
        end = args.index("--") if "--" in args else len(args)
        words = [argument.partition("=") for argument in args[:end]]
        present = ["".join((former.get(word, word), *value)) for word, *value in words]
        whole = [*present, *args[end:]]
        if ctx.resilient_parsing and whole and whole[-1].startswith("-"):
            # For completion: an option whose value is yet to come would end the parsing, before arguments have theirs.
            whole.pop()
        return super().parse_args(ctx, whole)


Function = TypeVar("Function", bound=Callable[..., int])


def command(
    group: typer.Typer, name: str | None = None, *, epilog: str | None = None
) -> Callable[[Function], Function]:
    """Make a function a command of `group`, with the options that every command has."""

    def register(function: Function) -> Function:
        @functools.wraps(function)
        def called(*, quiet: bool, verbose: int, debug: bool, **given: Any) -> int:
            given.pop("config_file", None)  # which has set defaults
            with verbosity(quiet, verbose):
                return function(**given)

        own = inspect.signature(function)
        signature = own.replace(parameters=[*own.parameters.values(), *_common()])
        called.__signature__ = signature  # type: ignore[attr-defined]
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in signature.parameters.values()}
        group.command(name, cls=Command, epilog=epilog)(called)
        return function

    return register


def _common() -> Iterator[inspect.Parameter]:
    for name, kind in _COMMON.items():
        default = 0 if name == "verbose" else False
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default)
