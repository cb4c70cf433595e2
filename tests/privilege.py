"""Root is never refused a file: tests of what may not be read do without that privilege for a while."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_privilege() -> Iterator[None]:
    """Root reads what it may not: this thread, and those it starts, go without that privilege for a while."""
    if os.geteuid():
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    before, now = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()
    assert not libc.capget(header, before)
    now[:] = before[:]
    now[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, of the effective ones
    assert not libc.capset(header, now)
    try:
        yield
    finally:
        assert not libc.capset(header, before)
