"""Threads that decode chunks side by side."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from fmextract.common.system import cores


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """Return the threads that all readers of this process share."""
    return ThreadPoolExecutor(cores(), thread_name_prefix="fmextract-read")


def in_parallel(work: Callable[[Any], None], tasks: Iterable[Any], count: int, threads: int) -> None:
    """Call work(task) for each of `count` tasks, on this thread and `threads` - 1 shared ones.

    Returns, or raises the first error, when all threads are done. This thread takes tasks too: a pool that is busy for
    others costs only time, and a single task needs no pool.
    """
    todo = iter(tasks)
    lock = threading.Lock()
    stopped = False

    def drain() -> None:
        nonlocal stopped
        while True:
            with lock:
                task = None if stopped else next(todo, None)
            if task is None:
                return
            try:
                work(task)
            except BaseException:
                stopped = True
                raise

    helpers = [_pool().submit(drain) for _ in range(min(threads, count) - 1)]
    if not helpers:
        drain()
        return
    try:
        drain()
    except BaseException:
        stopped = True  # an interrupt may also come between two tasks
        raise
    finally:
        wait([helper for helper in helpers if not helper.cancel()])
    for helper in helpers:
        if not helper.cancelled():
            helper.result()
