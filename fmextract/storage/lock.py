"""Let one run at a time work on an output: a file in its directory names the process at work there.

The processes of one launch carry the same FMEXTRACT_RUN_ID and share the lock of the first of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from fmextract.common import strict_json
from fmextract.common.processes import started
from fmextract.errors import OutputError
from fmextract.storage.durable import disk_error

NAME = "lock.json"
RUN_ID = "FMEXTRACT_RUN_ID"


@dataclass(frozen=True, slots=True)
class Owner:
    """A process that works on an output. `started` tells it from a later process with the same number."""

    pid: int
    host: str
    started: str
    run_id: str
    since: str

    @classmethod
    def myself(cls) -> Owner:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        pid = os.getpid()
        return cls(pid, socket.gethostname(), started(pid) or "", os.environ.get(RUN_ID, ""), now)

    @classmethod
    def read(cls, path: Path) -> Owner | None:
        """Return who holds the lock; None where there is none. The owner of an invalid file is unknown."""
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            return cls(int(said["pid"]), *(str(said[name]) for name in ("host", "started", "run_id", "since")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            return cls(-1, "an unknown host", "", "", "an unknown time")

    @property
    def is_here(self) -> bool:
        return self.host == socket.gethostname()

    def is_dead(self) -> bool:
        """Return whether it has surely ended: only this host's processes can be looked at."""
        return self.is_here and started(self.pid) != self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class Lock:
    """A lock, held from `acquire` to `release`. A process that dies leaves it behind, and the next takes it over."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / NAME
        self._me: Owner | None = None

    @property
    def is_held(self) -> bool:
        """Whether it was acquired, and not released since."""
        return self._me is not None

    def acquire(self, *, break_lock: bool) -> Owner | None:
        """Take the lock, and return the dead owner that it was taken from, if any.

        Raises OutputError, naming the other process, where that one is alive, or of another host and not `break_lock`.
        """
        me = Owner.myself()
        with _alone(self._path.parent):
            owner = Owner.read(self._path)
            if owner is not None and not owner.is_dead():
                if me.run_id and owner.run_id == me.run_id:
                    return None
                if owner.is_here or not break_lock:
                    raise OutputError(_refusal(self._path.parent, owner))
            try:
                self._path.unlink(missing_ok=True)
                _create(self._path, me)
            except FileExistsError:
                raise OutputError(_refusal(self._path.parent, Owner.read(self._path) or me)) from None
            except OSError as error:
                raise disk_error(self._path, error) from error
        self._me = me
        return owner

    def release(self) -> None:
        """Give the lock back, if it is still ours. Never raises for a disk that is gone."""
        if self._me is not None and Owner.read(self._path) == self._me:
            with contextlib.suppress(OSError):
                self._path.unlink()
        self._me = None


def _refusal(directory: Path, owner: Owner) -> str:
    if owner.is_here:
        way = "Wait for it, or end it first."
    else:
        way = "If that one is surely dead, --break-lock takes over."
    return f"{directory} is in use by another run: {owner}. {way}"


def _create(path: Path, owner: Owner) -> None:
    """Create the lock with its content or not at all, and never over another. Raises FileExistsError."""
    content = strict_json.dumps(asdict(owner)).encode()
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(content)
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            with path.open("xb") as file:
                file.write(content)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Keep other processes of this host from looking at a lock and taking it over, as far as the system can."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems know no such lock
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
