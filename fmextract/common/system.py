"""Ask the machine for its CPUs and its memory, as far as this process may use them."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


def host_memory() -> int:
    """Return the bytes of memory that the host has, or the container on it."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no control groups; or "max", no limit
        memory = min(memory, int(CONTAINER_LIMIT.read_text()))
    return memory


def cores() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
