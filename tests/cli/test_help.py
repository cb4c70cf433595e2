"""`--help`: options in panels, with or without rich, and one word for what is read and one for what is written."""

from __future__ import annotations

import re
from typing import Any

import pytest
import typer

from fmextract.cli import main
from fmextract.cli.app import app
from fmextract.cli.options import _OPTIONS

COMMANDS: dict[str, Any] = {}
for _name, _command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
    _inner = getattr(_command, "commands", None)
    COMMANDS |= {_name: _command} if _inner is None else {f"{_name} {word}": one for word, one in _inner.items()}
WRITTEN = ("out", "save", "save_config", "page", "plot")
READ = ("acts", "plan_file", "config_file", "like", "directory", "image_file", "input")


def sections(said: str) -> dict[str, str]:
    """The help by its headings."""
    parts = re.split(r"^(\w[\w ]*):\n", said, flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


@pytest.mark.parametrize("command", ["extract", "plan", "bench"])
def test_the_options_of_a_run_stand_in_panels(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([command, "--help"]) == 0
    said = sections(capsys.readouterr().out)
    assert [name for name in said if name != "Arguments"] == [*_OPTIONS, "Options"]
    for panel, options in _OPTIONS.items():
        for name in options:
            homes = [title for title, text in said.items() if re.search(rf"--{name.replace('_', '-')}\b(?!-)", text)]
            assert panel in homes
    assert "--json" in said["Options"]
    assert "--model" in said["What"]


def test_few_options_stand_in_one_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layers", "--help"]) == 0
    assert [name for name in sections(capsys.readouterr().out) if name != "Arguments"] == ["Options"]


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_read_is_called_file_and_what_is_written_out(name: str) -> None:
    words = {parameter.name: (parameter.metavar or "").strip("[]") for parameter in COMMANDS[name].params}
    for parameter, word in words.items():
        if parameter in WRITTEN and not (parameter == "out" and name == "info"):
            assert word == "FILE" if name in ("info", "verify", "report") and parameter == "out" else word == "OUT"
        if parameter in READ:
            assert word == "FILE"


@pytest.mark.parametrize("name", COMMANDS)
def test_options_with_choices_show_them(name: str) -> None:
    shown = {parameter.name: parameter.metavar for parameter in COMMANDS[name].params}
    for option in ("dtype", "precision", "theme", "scale", "to", "worker_kind"):
        if option in shown:
            assert "|" in shown[option]
