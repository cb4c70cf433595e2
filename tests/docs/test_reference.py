"""Commands, options and documentation say the same."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer

from fmextract import errors
from fmextract.cli.app import app
from fmextract.config import Config

ROOT = Path(__file__).parents[2]
COMMANDS: dict[str, Any] = {}
for _name, _command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
    _inner = getattr(_command, "commands", None)
    COMMANDS |= {_name: _command} if _inner is None else {f"{_name} {word}": one for word, one in _inner.items()}
OPTIONS = [
    pytest.param(name, parameter, id=f"{name} {parameter.opts[0]}")
    for name, command in COMMANDS.items()
    for parameter in command.params
]
REFERENCE = (ROOT / "docs/reference/cli.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(command: str) -> str:
    return REFERENCE.partition(f"\n## {command}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_is_documented(name: str) -> None:
    assert COMMANDS[name].help
    assert section(name)


@pytest.mark.parametrize(("command", "parameter"), OPTIONS)
def test_every_option_has_help_and_is_documented(command: str, parameter: Any) -> None:
    assert parameter.help
    assert parameter.help.endswith((".", "]"))
    words = parameter.opts if parameter.param_type_name == "option" else [parameter.metavar]
    wanted = section(command)
    if "Every other option is that of `extract`" in wanted:
        wanted += section("extract")
    assert all(word in wanted for word in words)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json_and_debug(name: str) -> None:
    offered = {word for parameter in COMMANDS[name].params for word in parameter.opts}
    assert {"--json", "--debug"} <= offered


@pytest.mark.parametrize("name", COMMANDS)
def test_the_short_help_of_a_command_is_not_cut(name: str) -> None:
    assert not COMMANDS[name].get_short_help_str(limit=68).endswith("...")


@pytest.mark.parametrize("field", [field.name for field in fields(Config)])
def test_every_field_of_config_is_an_option_that_states_its_default(field: str) -> None:
    (option,) = (parameter for parameter in COMMANDS["extract"].params if parameter.name == field)
    default = getattr(Config(), field)
    shown = {"max_error": "2%", "max_failures": "5%", "recheck": "recheck"}.get(field, str(default))
    if default not in (None, False, ()):
        assert f"[default: {shown}]" in option.help


@pytest.fixture(scope="module")
def generate() -> Iterator[Any]:
    """scripts/pages.py, which imports what lies beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        yield importlib.import_module("pages")


@pytest.mark.parametrize("page", ["cli.md", "reducers.md", "refused.md"])
def test_the_references_are_what_the_generator_writes(generate: Any, page: str) -> None:
    (text,) = (text for target, text in generate.PAGES.items() if target.name == page)
    assert (ROOT / "docs/reference" / page).read_text(encoding="utf-8") == text(), "run scripts/docs"


def test_every_error_that_is_raised_stands_in_the_list_of_refusals(generate: Any) -> None:
    known = {kind for _, kinds in generate.refusals.SECTIONS.values() for kind in kinds}
    ours = {
        name for name, error in vars(errors).items() if inspect.isclass(error) and error.__module__ == errors.__name__
    }
    assert ours - known == {"FmextractError"}


def commands_shown(text: str) -> list[list[str]]:
    """The words of every line in a ```sh block."""
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    lines = (shlex.split(line, comments=True) for block in blocks for line in block.splitlines())
    return [words for words in lines if words]


SHOWN = [words for words in commands_shown(README + REFERENCE) if words[0] == "fmextract"]


@pytest.mark.parametrize("words", SHOWN, ids=" ".join)
def test_every_command_shown_exists_and_parses(words: list[str]) -> None:
    name, rest = (words[1], words[2:]) if words[1] in COMMANDS else (" ".join(words[1:3]), words[3:])
    COMMANDS[name].make_context(name, rest).close()


@pytest.mark.parametrize("script", re.findall(r"scripts/\w+", README))
def test_every_script_shown_exists(script: str) -> None:
    path = ROOT / script
    assert path.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_the_program_runs_as_a_module() -> None:
    ended = subprocess.run([sys.executable, "-m", "fmextract", "--version"], capture_output=True, text=True, check=True)
    assert ended.stdout.startswith("fmextract ")
