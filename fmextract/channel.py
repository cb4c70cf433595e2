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
    """At most `capacity` items wait in it; `put` and `get` block. Closing it, from any thread, wakes all that wait."""

    def __init__(self, capacity: int, items: Iterable[T] = ()) -> None:
        self._items: deque[T] = deque(items)
        self._capacity = max(capacity, len(self._items))
        self._changed = threading.Condition()
        self._closed = False

    def put(self, item: T) -> None:
        """Raises Closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._items) < self._capacity)
            if self._closed:
                raise Closed
            self._items.append(item)
            self._changed.notify_all()

    def get(self) -> T:
        """Raises Closed, at once: what still lies in a closed channel is of no use to a run that ends."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or bool(self._items))
            if self._closed:
                raise Closed
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
