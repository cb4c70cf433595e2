"""Threads that do one kind of work. A thread that hangs in foreign code never keeps the process from ending."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, ParamSpec, TypeAlias, TypeVar

import torch

P = ParamSpec("P")


R = TypeVar("R")


Task: TypeAlias = tuple["Future[Any]", Callable[[], Any]]


class Pool:
    """Like a ThreadPoolExecutor, in the order of `submit`, but its threads can be left behind (see `close`)."""

    def __init__(self, name: str, threads: int, begin: Callable[[], None] = lambda: None) -> None:
        """`begin` runs once in every thread, and has done so when this returns."""
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        meet = threading.Barrier(threads + 1)

        def work() -> None:
            try:
                begin()
                meet.wait()
            except BaseException:  # the constructor raises for all of them
                meet.abort()
                return
            self._work()

        try:
            for i in range(threads):
                thread = threading.Thread(target=work, name=f"{name}-{i}", daemon=True)
                thread.start()
                self._threads.append(thread)
            meet.wait()
        except BaseException:
            meet.abort()
            raise

    def submit(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Run `function` on one of the threads."""
        future: Future[R] = Future()
        self._tasks.put((future, lambda: function(*args, **kwargs)))
        return future

    def close(self, patience: float) -> bool:
        """Cancel what has not begun and wait up to `patience` seconds for the rest; False where a thread hangs."""
        with contextlib.suppress(queue.Empty):
            while True:
                if (task := self._tasks.get_nowait()) is not None:
                    task[0].cancel()
        for _ in self._threads:
            self._tasks.put(None)
        end = time.monotonic() + patience
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, call = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:  # it is the waiting thread's to raise
                future.set_exception(error)
            del task, future, call  # nothing of a finished task stays while this thread waits for the next


def thread_pool(name: str, threads: int) -> Pool:
    """Threads whose torch operations do not start teams of threads of their own: the pool is the parallelism."""
    before = torch.get_num_threads()
    pool = Pool(name, threads, begin=one_torch_thread)
    # Each thread has its own number, but what is set last is what new threads begin with: say what holds for them.
    torch.set_num_threads(before)
    return pool


def one_torch_thread() -> None:
    """The operations of the thread that calls this start no team of threads."""
    # Asked first: a thread that torch has not seen yet takes, at its first operation, the number that was set last,
    # in whatever thread.
    torch.get_num_threads()
    torch.set_num_threads(1)
