"""How much a command tells on stderr: `-q` leaves progress and notes out, `-v` shows the log of the package, too."""

import contextlib
import logging
from collections.abc import Iterator
from contextvars import ContextVar

import typer

from fmextract.common.progress import Quiet, TerminalProgress, log
from fmextract.records import Progress

_QUIET: ContextVar[bool] = ContextVar("quiet", default=False)
_LINES: ContextVar["_Lines | None"] = ContextVar("lines of the log", default=None)


@contextlib.contextmanager
def verbosity(quiet: bool, verbose: int) -> Iterator[None]:
    """For one command. Raises BadParameter where it is to be quiet and verbose."""
    if quiet and verbose:
        raise typer.BadParameter("-q and -v contradict each other: give one of them")
    told = _QUIET.set(quiet)
    try:
        with _log(logging.INFO if verbose == 1 else logging.DEBUG) if verbose else contextlib.nullcontext():
            yield
    finally:
        _QUIET.reset(told)


@contextlib.contextmanager
def _log(level: int) -> Iterator[None]:
    """The log goes to stderr, one line a record."""
    lines, before = _Lines(), log.level
    shown = _LINES.set(lines)
    log.addHandler(lines)
    log.setLevel(level)
    try:
        yield
    finally:
        log.removeHandler(lines)
        log.setLevel(before)
        _LINES.reset(shown)


def progress(unit: str = "image") -> Progress:
    """What a command tells how far it is: nobody, the terminal, or the terminal with notes in the log."""
    lines = _LINES.get()
    if _QUIET.get():
        return Quiet()
    if lines is None:
        return TerminalProgress(unit=unit)
    lines.terminal = _Logged(unit=unit)
    return lines.terminal


class _Logged(TerminalProgress):
    """A terminal whose notes are records of the log."""

    def note(self, text: str) -> None:
        log.info("%s", text)

    def show(self, line: str) -> None:
        super().note(line)


class _Lines(logging.Handler):
    """Writes records as lines that do not run into a bar."""

    def __init__(self) -> None:
        super().__init__()
        self.terminal = _Logged()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        self.terminal.show(self.format(record))
