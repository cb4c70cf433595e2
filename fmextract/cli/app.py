"""The program around the commands: exit codes, messages instead of tracebacks, streams, signals.

stdout holds the result and nothing else; notes, progress and errors go to stderr. torch is imported by the commands
that need it, so that `--help` and `info` answer at once.
"""

import contextlib
import faulthandler
import gc
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, TextIO, cast

import typer

from fmextract import __version__
from fmextract.cli.options import _option
from fmextract.common import streams, strict_json, text
from fmextract.errors import FmextractError

USAGE = 2


SOME_FAILED = 3


MISMATCH = 5


INTERRUPTED = 130


# What every mistake in the usage is. Newer versions of typer bring a click of their own: it has no fixed address.
ClickError: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


class Interrupted(FmextractError):
    """Ctrl-C while a command worked."""

    exit_code = INTERRUPTED


app = typer.Typer(
    name="fmextract",
    help="Stream images through a PyTorch model and keep the activations of its layers in HDF5.",
    epilog="Begin with `fmextract demo`, or list the layers of a model: `fmextract layers resnet50`. "
    "Exit codes: 0 done, 2 usage or configuration, 3 done but some images failed, 4 stopped early "
    "(the same command resumes), 5 damaged file, 130 interrupted, 1 anything unexpected.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. No traceback, unless --debug is given."""
    arguments = [_at_home(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    streams.ensure_open()
    try:
        return _run(arguments)
    finally:
        for stream in (sys.stdout, sys.stderr):
            streams.settle(stream)


def _at_home(argument: str) -> str:
    """`~/x.h5` as a shell would have given it, had it not been quoted, or behind `--out=`."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return f"{option}{equals}{Path(value).expanduser()}" if value.startswith("~/") else argument


ARGUMENTS: ContextVar[Sequence[str]] = ContextVar("arguments of the command line")


def _run(arguments: list[str]) -> int:
    ARGUMENTS.set(arguments)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # a stream that a test or an embedding program put there
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        return app(arguments, prog_name="fmextract", standalone_mode=False) or 0
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    except ClickError as error:
        return _complain(f"{error.format_message()}{_where_help_is(error)}", USAGE)
    except FmextractError as error:
        _trace(arguments)
        return _complain("\n".join([str(error), *getattr(error, "__notes__", ())]), error.exit_code)
    except Exception as error:  # whatever escaped: a bug, said as one
        _trace(arguments)
        hint = "" if "--debug" in arguments else "; --debug shows the traceback, which helps to mend it"
        return _complain(f"this is a bug in fmextract: {type(error).__name__}: {error}{hint}", 1)


def _complain(message: str, code: int) -> int:
    with contextlib.suppress(OSError):
        print("error:", "\n".join(map(text.printable, message.splitlines())), file=sys.stderr)
    return code


def _where_help_is(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return f"\nSee: {context.command_path} --help" if context is not None else ""


def _trace(arguments: Sequence[str]) -> None:
    if "--debug" in arguments:
        traceback.print_exc()


# ---------------------------------------------------------------------------------------------------- commands


@app.callback(invoke_without_command=True)
def _fmextract(
    context: typer.Context,
    version: Annotated[bool, _option("--version", help="Print the version.")] = False,
) -> int:
    if version:
        _print(f"fmextract {__version__}")
    elif context.invoked_subcommand is None:
        _print(context.get_help())
        return USAGE
    return 0


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """For torch: the garbage collector, which would walk its many objects over and over while it loads, waits."""
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


@contextlib.contextmanager
def working(hint: Callable[[], str] = str) -> Iterator[None]:
    """Around the one public function of a command: what libraries and models' own code print goes to stderr.

    SIGTERM ends it as Ctrl-C does, in order; a crash in native code shows where it was.
    """
    if not faulthandler.is_enabled():
        with contextlib.suppress(OSError, ValueError, AttributeError, RuntimeError):  # a stderr that is no file
            faulthandler.enable()
    heard = cast("TextIO", streams.Tolerant(sys.stderr))
    try:
        with contextlib.redirect_stderr(heard), contextlib.redirect_stdout(heard), _terminated_as_interrupted():
            yield
    except KeyboardInterrupt:
        raise Interrupted("; ".join(["interrupted", *filter(None, [hint()])])) from None


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    try:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:  # not the main thread: its signals are the embedding program's
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ----------------------------------------------------------------------------------------------------- showing


def _show(data: Any, render: Callable[[], str], as_json: bool) -> None:
    _print(strict_json.dumps(data, indent=2) if as_json else render())


def _print(lines: str) -> None:
    """To stdout. A reader that has seen enough (`| head`) closes it, a disk is full: the work is done all the same."""
    try:
        print(lines, flush=True)
    except BrokenPipeError:
        pass
    except OSError as error:
        with contextlib.suppress(OSError):
            print(f"the result could not be printed: {error.strerror}", file=sys.stderr)
    streams.settle(sys.stdout)
