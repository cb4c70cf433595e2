"""A look at the places where HDF5 keeps strings, before libhdf5 does.

libhdf5 (2.0 and before) walks a global heap by adding up the sizes that stand in it, and walks for ever where one is
wrong: one flipped bit is enough, and no timeout of Python's reaches into it.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from fmextract.errors import DamagedError

HEAP = b"GCOL\x01\0\0\0"
EDGE = 8 * 2**20
"""Bytes looked at from both ends. The writers put strings before the first and after the last chunk of activations; in
a larger file only a heap put elsewhere on purpose, or one of 10^5 keys, is not seen."""
_SIZE = struct.Struct("<Q")
_OBJECT = struct.Struct("<HHIQ")


def check_heaps(fd: int, path: Path) -> None:
    """Raise DamagedError where a global heap in the open file would make libhdf5 walk for ever."""
    nbytes = os.fstat(fd).st_size
    for start in {0, max(0, nbytes - EDGE)}:
        window = os.pread(fd, EDGE, start)
        at = window.find(HEAP)
        while at >= 0:
            if not _walkable(window, at):
                raise DamagedError(f"{path} is damaged: the strings at byte {start + at} are broken")
            at = window.find(HEAP, at + 1)


def _walkable(window: bytes, heap: int) -> bool:
    """Whether every object ends where the next one can begin. What lies outside the window is not looked at."""
    at, limit = heap + len(HEAP) + _SIZE.size, len(window) - _OBJECT.size
    if at > len(window):
        return True
    end = heap + _SIZE.unpack_from(window, heap + len(HEAP))[0]
    last = min(end - _OBJECT.size, limit)
    unpack, header = _OBJECT.unpack_from, _OBJECT.size  # looked up once: a file of 10^5 keys has as many objects
    while at <= last:
        index, _, _, size = unpack(window, at)
        # Object 0 is the free space, and its size counts its own header.
        step = size if index == 0 else header + -(-size // 8) * 8
        if not header <= step <= end - at:
            return False
        at += step
    return True
