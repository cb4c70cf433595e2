"""Keep chunks that hold more than was asked for, for the next reader."""

from __future__ import annotations

import threading
from collections import OrderedDict

from fmextract.reading.indexing import Array

RECENT_BYTES = 16 * 2**20
"""Chunks kept, so that a loop over single rows decodes a chunk of many images once."""


SEEK_BYTES = 32 * 2**10
"""What one more read within a chunk costs, in bytes read (3 µs at 10 GB/s, from the page cache)."""


# --------------------------------------------------------------------------------------------------- threads and torch


class Recent:
    """The chunks used last, decoded or as `codecs.unpack` gives them: up to `nbytes` of them, at least one."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._room = nbytes
        self._chunks: OrderedDict[tuple[str, tuple[int, ...]], Array | bytes] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, key: tuple[str, tuple[int, ...]]) -> bool:
        return key in self._chunks

    def get(self, key: tuple[str, tuple[int, ...]]) -> Array | bytes | None:
        with self._lock:
            if key in self._chunks:
                self._chunks.move_to_end(key)
            return self._chunks.get(key)

    def put(self, key: tuple[str, tuple[int, ...]], chunk: Array | bytes) -> None:
        with self._lock:
            self._room += _size(self._chunks.pop(key, b"")) - _size(chunk)
            self._chunks[key] = chunk
            while self._room < 0 and len(self._chunks) > 1:
                self._room += _size(self._chunks.popitem(last=False)[1])

    def clear(self) -> None:
        with self._lock:
            self._chunks.clear()
            self._room = self.nbytes


def _size(chunk: Array | bytes) -> int:
    return len(chunk) if isinstance(chunk, bytes) else chunk.nbytes
