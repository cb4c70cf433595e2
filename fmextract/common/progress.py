"""Show the progress of a run: a bar on a terminal or in a notebook, a line every half minute in a log."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import warnings
from typing import Any, TextIO

from fmextract.common.text import count, duration, printable, rate
from fmextract.errors import ConfigError
from fmextract.records import Progress

log = logging.getLogger("fmextract")
"""INFO is what a person is told as well; DEBUG is more. Handlers are the program's that uses this package."""
log.addHandler(logging.NullHandler())

BAR = "{percentage:3.0f}% {bar} {n:,}/{total:,}{unit}, {rate_noinv_fmt}, {remaining} left, ends {eta:%H:%M}{postfix}"
FIRST_BAR = "{percentage:3.0f}% {bar} {n:,}/{total:,}{unit}{postfix}"  # tqdm calls an end that is not known 00:00
LOG_SECONDS = 30.0  # between two lines in a log
FIRST_LOG_SECONDS = 10.0  # until the first one


class Quiet:
    """A `records.Progress` that says nothing."""

    def note(self, text: str) -> None: ...
    def step(self, what: str, done: int, total: int) -> None: ...
    def start(self, total: int, done: int) -> None: ...
    def advance(self, images: int, failed: int) -> None: ...
    def finish(self) -> None: ...


def shown(progress: bool | Progress, unit: str = "image") -> Progress:
    """What `progress=` of a public function stands for: True is a bar and notes on stderr, False nothing.

    The logger `fmextract` hears the notes either way. Raises ConfigError for what is no Progress.
    """
    if isinstance(progress, bool):
        return Logged(TerminalProgress(unit=unit) if progress else Quiet())
    if not isinstance(progress, Progress):
        raise ConfigError(f"progress={progress!r:.80}: expected True, False, or an object with the methods of Progress")
    return Logged(progress)


class Logged:
    """A `records.Progress` that tells another one, and the logger."""

    def __init__(self, told: Progress) -> None:
        self._told = told
        self.step, self.start, self.advance, self.finish = told.step, told.start, told.advance, told.finish

    def note(self, text: str) -> None:
        log.info("%s", text)
        self._told.note(text)


class TerminalProgress:
    """A `records.Progress` on stderr: images/s, the expected end, failures.

    On a terminal and in a notebook a bar. In a log a line after ten seconds, then every half minute, and a last one,
    which say the same. A closed or full stderr never ends a run.
    """

    def __init__(self, stream: TextIO | None = None, unit: str = "image") -> None:
        self._stream, self._unit = stream or sys.stderr, unit
        self._bar: Any = None
        self._total = self._done = self._new = self._failed = 0
        self._began: float | None = None
        self._next_line = time.monotonic() + FIRST_LOG_SECONDS

    def note(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
            if self._bar is not None:
                self._bar.clear()
            self._stream.write("\n".join(map(printable, text.splitlines())) + "\n")
            self._stream.flush()
            if self._bar is not None:
                self._bar.refresh()

    def step(self, what: str, done: int, total: int) -> None:
        if self._is_time():
            self.note(f"{what}: {done:,} of {total:,}")

    def _is_time(self) -> bool:
        """Return whether a log gets its next line now."""
        now = time.monotonic()
        if now < self._next_line:
            return False
        self._next_line = now + LOG_SECONDS
        return True

    def start(self, total: int, done: int) -> None:
        self._total, self._done, self._new, self._failed = total, done, 0, 0
        self._began = time.monotonic()
        self._next_line = self._began + FIRST_LOG_SECONDS
        with contextlib.suppress(OSError, ValueError):
            self._bar = self._new_bar(total, done)

    def _new_bar(self, total: int, done: int) -> Any:
        """Return a bar of tqdm where there is something to draw it on, else None."""
        in_notebook = self._stream is sys.stderr and _in_notebook()
        if not in_notebook and not self._stream.isatty():
            return None
        # tqdm not at the top: `--help` and `info` answer without it.
        with warnings.catch_warnings():  # without ipywidgets it warns, and draws a bar of letters, which will do
            warnings.simplefilter("ignore")
            from tqdm.auto import tqdm

        if in_notebook:
            return tqdm(total=total, initial=done, unit=f" {self._unit}s", smoothing=0)
        self._stream.write("")  # raises where it is closed; tqdm would leave half a bar, which complains at its end
        # smoothing 0: the rate since the start. The first batches warm up and the last drain; a moving average would
        # swing with both.
        return tqdm(
            total=total,
            initial=done,
            file=self._stream,
            unit=f" {self._unit}s",
            smoothing=0,
            bar_format=FIRST_BAR,
            dynamic_ncols=True,
            leave=False,
        )

    def advance(self, images: int, failed: int) -> None:
        self._new += images
        self._failed = failed
        if self._bar is None and self._is_time():
            self.note(self._line())
        if self._bar is not None:
            with contextlib.suppress(OSError, ValueError):
                if images and getattr(self._bar, "bar_format", None) == FIRST_BAR:  # which a notebook's has not
                    self._bar.bar_format = BAR
                if failed:
                    self._bar.set_postfix_str(f"{failed:,} failed", refresh=False)
                self._bar.update(images)

    def finish(self) -> None:
        if self._began is None:
            return
        seconds = time.monotonic() - self._began
        self._began = None
        if self._bar is not None:
            with contextlib.suppress(OSError, ValueError):
                self._bar.close()
            self._bar = None
        self.note(self._last_line(seconds))

    def _line(self) -> str:
        """Return what a bar would show, for a log."""
        assert self._began is not None
        seconds, reached = time.monotonic() - self._began, self._done + self._new
        parts = [f"{reached:,} of {self._total:,} {self._unit}s"]
        if self._new and seconds > 0:
            speed = self._new / seconds
            parts.append(f"{rate(speed)} {self._unit}s/s, {duration((self._total - reached) / speed)} left")
        if self._failed:
            parts.append(f"{self._failed:,} failed")
        return ", ".join(parts)

    def _last_line(self, seconds: float) -> str:
        reached = self._done + self._new
        said = count(self._total, self._unit)
        if reached < self._total:
            said = f"{reached:,} of {self._total:,} {self._unit}s"
        parts = [f"{said} in {duration(seconds)}"]
        if self._done:
            parts.append(f"{self._done:,} of them were there before")
        if self._failed:
            parts.append(f"{self._failed:,} failed")
        return ", ".join(parts)


def _in_notebook() -> bool:
    """Return whether this process is a Jupyter kernel, whose stderr is no terminal but can show a bar."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")
