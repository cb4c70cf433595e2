"""What a run is doing right now: for a person when it hangs, and for the next run when foreign code crashed it."""

from __future__ import annotations

import contextlib
import mmap
import struct
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

from fmextract.storage import durable

PATIENCE = 60.0
"""Seconds without any movement before a run says what it waits for; then after twice as long, and so on."""
_NAME = "in-flight"
_ROW = struct.Struct("=q")
_NONE = -1
_SLOTS = 512  # threads: more than any machine decodes with
_ROWS = 32  # that a thread may have in flight at once


class Watch:
    """A thread that speaks when nothing has moved for `PATIENCE` seconds. It ends nothing: a network may come back."""

    def __init__(self, moves: Callable[[], int], waits_for: Callable[[], str], say: Callable[[str], None]) -> None:
        """`moves` counts what has been done, `waits_for` says what is being waited for."""
        self._moves, self._waits_for, self._say = moves, waits_for, say
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="fmextract-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        seen, since, patience = self._moves(), time.monotonic(), PATIENCE
        while not self._over.wait(min(1.0, patience / 4)):
            now = time.monotonic()
            if (moved := self._moves()) != seen:
                seen, since, patience = moved, now, PATIENCE
            elif now - since >= patience:
                self._say(f"nothing has moved for {now - since:.0f} s: waiting for {self._waits_for()}")
                patience *= 2


class InFlight:
    """The rows that are being decoded, also in a file: it is still there when a decoder has crashed the process."""

    def __init__(self, directory: Path) -> None:
        self._path = durable.temporary_name(directory / _NAME)
        self._rows: dict[int, tuple[Sequence[int], float]] = {}
        self._slots: dict[int, int] = {}
        self._noted: mmap.mmap | None = None
        # A full disk is told by those who have to write. Room is taken now: memory without a place on the disk is no
        # error that could be caught.
        with contextlib.suppress(OSError):
            self._noted = _mapped(self._path)

    def begin(self, *rows: int) -> None:
        """This thread decodes `rows` from now on, in one go."""
        self._rows[threading.get_ident()] = rows, time.monotonic()
        self._note(rows)

    def end(self) -> None:
        """This thread is done with its rows."""
        rows, _ = self._rows.pop(threading.get_ident())
        self._note([_NONE] * len(rows))

    def rows(self) -> list[tuple[int, float]]:
        """(row, seconds so far), the longest first."""
        now = time.monotonic()
        held = [(row, now - since) for rows, since in self._rows.copy().values() for row in rows]
        return sorted(held, key=lambda item: -item[1])

    def close(self) -> None:
        """The file goes: this run has come to an end of its own."""
        noted, self._noted = self._noted, None
        if noted is not None:
            noted.close()
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _note(self, rows: Sequence[int]) -> None:
        slot = self._slots.setdefault(threading.get_ident(), len(self._slots))
        if self._noted is not None and slot < _SLOTS:
            noted, at = array("q", rows[:_ROWS]).tobytes(), slot * _ROWS * _ROW.size
            with contextlib.suppress(ValueError):  # the run has ended, and this thread was left behind
                self._noted[at : at + len(noted)] = noted


def _mapped(path: Path) -> mmap.mmap:
    """A file of _SLOTS times _ROWS rows, none of them in flight, as memory that outlives the process: a system call for
    every row would cost as much as decoding a tiny image.
    """
    path.write_bytes(_ROW.pack(_NONE) * _ROWS * _SLOTS)
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), 0)


def left_behind(directory: Path) -> list[int]:
    """The rows that were being decoded when an earlier run here ended without a word."""
    rows: set[int] = set()
    for path in directory.glob(f".{_NAME}.*"):
        with contextlib.suppress(OSError, ValueError):
            rows.update(row for row in array("q", path.read_bytes()) if row >= 0)
    return sorted(rows)
