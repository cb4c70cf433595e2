"""How a broken promise is told, and calls from several threads at once."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, TypeVar

THREADS = 8
HASTE = 1e-5
"""Seconds after which the interpreter passes on to another thread, so that what is not safe fails soon."""

T = TypeVar("T")
E = TypeVar("E", bound=Exception)


def broken(promise: str, seen: str = "") -> NoReturn:
    """Raise AssertionError: what was promised, and what was seen instead."""
    raise AssertionError(f"{promise}; {seen}" if seen else promise)


def keeps(holds: bool, promise: str, seen: str = "") -> None:
    """Raise AssertionError unless it `holds`."""
    if not holds:
        broken(promise, seen)


def attempt(call: Callable[[], T], promise: str) -> T:
    """Return what a call gives; where it raises, that breaks the promise."""
    try:
        return call()
    except Exception as error:
        raise AssertionError(f"{promise}; it raised {type(error).__name__}: {error}") from error


def unless(error: type[E], call: Callable[[], T], promise: str) -> T | E:
    """Return what a call gives, or the `error` that it may raise; any other breaks the promise."""
    try:
        return call()
    except error as raised:
        return raised
    except Exception as other:
        raise AssertionError(f"{promise}; it raised {type(other).__name__}: {other}") from other


def in_threads(call: Callable[[int], Any], tasks: Sequence[int]) -> list[Any]:
    """Return what `call` gives for each task, in order, called from several threads that begin together."""
    before, start = sys.getswitchinterval(), threading.Barrier(THREADS)

    def share(number: int) -> list[tuple[int, Any]]:
        start.wait()
        return [(place, call(tasks[place])) for place in range(number, len(tasks), THREADS)]

    sys.setswitchinterval(HASTE)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            done = dict(pair for pairs in pool.map(share, range(THREADS)) for pair in pairs)
    finally:
        sys.setswitchinterval(before)
    return [done[place] for place in range(len(tasks))]
