"""A bounded queue between two stages that can be closed from either side, so that no stage waits for a dead one."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class Closed(Exception):
    """The channel was closed: nothing more goes in, or nothing more comes out."""


class Channel(Generic[T]):
    """Items that wait take up at most `capacity`, but for a lone larger one; `put` and `get` block.

    Closing it, from any thread, wakes all that wait.
    """

    def __init__(self, capacity: int, items: Iterable[T] = ()) -> None:
        self._items: deque[tuple[T, int]] = deque((item, 1) for item in items)
        self._capacity = max(capacity, len(self._items))
        self._taken = len(self._items)
        self._changed = threading.Condition()
        self._closed = False

    def put(self, item: T, size: int = 1) -> None:
        """`size` is the part of the capacity that it takes up. Raises Closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._items or self._taken + size <= self._capacity)
            if self._closed:
                raise Closed
            self._items.append((item, size))
            self._taken += size
            self._changed.notify_all()

    def get(self) -> T:
        """Raises Closed, at once: what still lies in a closed channel is of no use to a run that ends."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or bool(self._items))
            if self._closed:
                raise Closed
            item, size = self._items.popleft()
            self._taken -= size
            self._changed.notify_all()
            return item

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
