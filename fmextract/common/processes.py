"""Mark what a process makes, so that another one can tell whether that process still runs."""

from __future__ import annotations

import functools
import hashlib
import os
import secrets
import socket
from pathlib import Path

__all__ = ["is_dead", "mark", "started"]


def started(pid: int) -> str | None:
    """Return when a process began, in the kernel's words; "" if the system does not say, None if there is none."""
    try:
        # The name in parentheses may hold anything; the state follows it, the start is field 22 of all.
        state, *rest = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if state in "ZX" else rest[18]
    except (OSError, ValueError, IndexError):
        pass
    try:
        if pid < 1:
            return None
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:  # it is there and somebody else's
        pass
    return ""


def mark() -> str:
    """Return 32 hex digits that no other call gives, and that say which process made them: see `is_dead`."""
    pid = os.getpid()
    return f"{_here()}{pid & 0xFFFFFF:06x}{_ticks(started(pid)):012x}{secrets.token_hex(3)}"


def is_dead(mark: str) -> bool:
    """Return whether the process that made a mark has surely ended: only those of this machine can be looked at."""
    if mark[:8] != _here():
        return False
    now = started(int(mark[8:14], 16))
    return now is None or (now != "" and _ticks(now) != int(mark[14:26], 16))


def _ticks(started: str | None) -> int:
    return int(started or 0) & 0xFFFFFFFFFFFF


@functools.cache
def _here() -> str:
    """Return 8 hex digits of the host, its last start and the container: there process numbers mean the same."""
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    except OSError:  # not Linux
        pass
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]
