"""`--config run.toml`: the options of a run in a file, and `plan --save-config`, which writes them.

The file holds what else stands on the command line, under the names of the options (`batch_size` or `batch-size`), and
means the same: a relative path begins at the current folder. The command line beats it.
"""

import difflib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from fmextract.common import strict_json
from fmextract.config import RENAMED, Config
from fmextract.errors import ConfigError, OutputError
from fmextract.storage import durable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_NEVER = frozenset({"help", "config_file", "save_config", "debug"})
"""Parameters that a file does not set."""
_MARK = "# fmextract extract --config"
"""The first line of what `save` writes, which may be replaced."""
_OF_EXTRACT = frozenset({"out", "plan"})
"""What a saved file says besides, that not every command with `--config` takes."""


def _given(context: typer.Context, file: Path | None) -> Path | None:
    """Let the options in `file` be the defaults of the command."""
    if file is not None:
        context.default_map = {**(context.default_map or {}), **read(file, context.command)}
    return file


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        callback=_given,
        is_eager=True,
        show_default=False,
        help="Options, SOURCE and OUT among them, from a TOML file; what stands on the command line beats it.",
    ),
]


def read(file: Path, command: Any) -> dict[str, Any]:
    """Return what a file says, by the parameters of a command. Raises ConfigError."""
    try:
        told = tomllib.loads(file.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {file}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise ConfigError(f"--config {file}: not valid TOML: {error}") from error
    known = dict(_keys(command))
    made: dict[str, Any] = {}
    for key, value in told.items():
        name = key.replace("-", "_")
        name = RENAMED.get(name, name)
        if name not in known:
            if name in _OF_EXTRACT:
                continue
            close = difflib.get_close_matches(name, [*known, *RENAMED], n=1)
            closest = f"; do you mean {close[0]}?" if close else f". There are {', '.join(sorted(known))}"
            raise ConfigError(f"--config {file}: there is no option {key!r}{closest}")
        parameter = known[name]
        if parameter.name in made:
            raise ConfigError(f"--config {file}: {name} is there twice, by two of its names")
        made[parameter.name] = _value(f"--config {file}: {key}", parameter, value)
    return made


def _keys(command: Any) -> Iterator[tuple[str, Any]]:
    """What a file may say of a command: its parameters by their names in Python and on the command line."""
    for parameter in command.params:
        if parameter.name not in _NEVER:
            words = [word[2:].replace("-", "_") for word in parameter.opts if word.startswith("--")]
            yield from ((name, parameter) for name in (parameter.name, *words))


def _value(where: str, parameter: Any, value: Any) -> Any:
    """A value of TOML as the command line would have it. Raises ConfigError for one that cannot stand there."""
    if getattr(parameter, "count", False):
        return value
    if getattr(parameter, "is_flag", False):
        if not isinstance(value, bool):
            raise ConfigError(f"{where}: expected true or false, got {value!r}")
        return value
    if parameter.multiple:
        return [_word(where, one) for one in (value if isinstance(value, list) else [value])]
    return _word(where, value)


def _word(where: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ConfigError(f"{where}: expected a text or a number, got {value!r}")
    return str(value)


def save(file: Path, source: str, model: str, out: Path, config: Config, plan: Path | None) -> None:
    """Write a file that `extract --config` takes for the same run. Raises ConfigError, OutputError, NoSpace."""
    told: dict[str, Any] = {
        "source": source,
        "model": model,
        "out": str(out),
        "plan": None if plan is None else str(plan),
    }
    told |= config.as_json()
    lines = [f"{name} = {_toml(file, value)}" for name, value in told.items() if value not in (None, [])]
    target = file.expanduser()
    if target.is_file():
        with target.open("rb") as earlier:
            if not earlier.readline(len(_MARK) + 2).startswith(_MARK.encode()):
                raise OutputError(f"--save-config {file} exists, and was not made by it: choose another name")
    durable.write_text(target, "\n".join([_MARK, *lines, ""]))


def _toml(file: Path, value: Any) -> str:
    """A value as TOML has it, which differs from JSON in one character."""
    try:
        said = strict_json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        said.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"--save-config {file}: {value!r} is not text in UTF-8, which TOML is") from error
    return said
