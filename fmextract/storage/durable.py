"""Write files that appear whole or not at all: a temporary name, fsync, rename. Explain the errors of a disk."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fmextract.common import processes, strict_json
from fmextract.errors import FmextractError, FormatError, NoSpace, OutputError
from fmextract.storage import schema

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}")


# ----------------------------------------------------------------------------------------------------- durable writing


def publish(temporary: Path, final: Path) -> None:
    """Make `temporary` durable and give it its final name, over what stood there. Raises NoSpace, OutputError."""
    make_durable(temporary)
    try:
        temporary.replace(final)
        fsync(final.parent)
    except OSError as error:
        raise disk_error(final, error) from error


def make_durable(path: Path) -> None:
    """Wait until the bytes of a file are on the disk. Raises NoSpace, OutputError."""
    try:
        fsync(path)
    except OSError as error:
        raise disk_error(path, error) from error


def write_json(path: Path, obj: Any) -> None:
    """Write `obj` so that `path` holds either what it held or all of `obj`, durably. Raises NoSpace, OutputError."""
    write_text(path, strict_json.dumps(obj, indent=1, sort_keys=True) + "\n")


def write_text(path: Path, said: str) -> None:
    """Write `said`, as UTF-8, so that `path` holds either what it held or all of it. Raises NoSpace, OutputError."""
    temporary = temporary_name(path)
    try:
        temporary.write_text(said, encoding="utf-8")
        publish(temporary, path)
    except OSError as error:
        raise disk_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """Return a new name beside `path`, which `is_temporary` knows: for a file that is not whole yet."""
    return path.with_name(f".{path.name}.{processes.mark()}")


def is_temporary(name: str) -> bool:
    """Return whether a name is that of a file that a dead run left unfinished."""
    return _TEMPORARY.fullmatch(name) is not None


def fsync(path: Path) -> None:
    """Make a file's bytes, or a directory's names, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> Any:
    """Return what `path` holds. Raises OutputError where it is not there, FormatError where it is not JSON."""
    try:
        return schema.load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise OutputError(f"there is no file {path}") from error
    except OSError as error:
        raise OutputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise FormatError(f"{path} is not valid JSON: {error}") from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise disk_error(path, error) from error


def disk_error(path: Path, error: BaseException) -> FmextractError:
    """Turn an error of the operating system or of libhdf5 while writing `path` into one for the user."""
    code = getattr(error, "errno", None)
    if code is None and (stated := re.search(r"errno = (\d+)", str(error))):
        code = int(stated[1])
    if code in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(
            f"{path.parent} is full: {path.name} was not finished. Make room and run the same command again."
        )
    reason = os.strerror(code) if code else str(error)
    return OutputError(f"cannot write {path}: {reason}")


class SteadyFile:
    """A file as h5py takes one, in which writing never fails: the first error is kept, and what follows is dropped.

    libhdf5 writes when it closes an object, where an error cannot be raised; and once that has failed, as on a full
    disk, it goes on with freed memory and crashes the process (measured, HDF5 2.0). So it is not told.
    """

    def __init__(self, path: Path, mode: str = "w+b") -> None:
        self._raw = path.open(mode, buffering=0)
        self._at = 0  # kept here, since each call to the system gives the interpreter's lock away and waits for it
        self.error: OSError | None = None
        self._dropping = False

    def write(self, data: memoryview) -> int:
        view = memoryview(data)
        done = 0
        try:
            while not self._dropping and done < len(view):
                done += os.pwrite(self._raw.fileno(), view[done:], self._at + done)
        except OSError as error:
            self.error, self._dropping = error, True
        self._at += len(view)
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        if not self._dropping:
            try:
                return self._raw.truncate(self._at if size is None else size)
            except OSError as error:
                self.error, self._dropping = error, True
        return size or 0

    def read(self, size: int = -1) -> bytes:
        rest = max(0, os.fstat(self._raw.fileno()).st_size - self._at)
        data = os.pread(self._raw.fileno(), size if size >= 0 else rest, self._at)
        self._at += len(data)
        return data

    def readinto(self, buffer: memoryview) -> int:
        count = os.preadv(self._raw.fileno(), [buffer], self._at)
        self._at += count
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at}
        self._at = offset + (start[whence] if whence in start else os.fstat(self._raw.fileno()).st_size)
        return self._at

    def tell(self) -> int:
        return self._at

    def flush(self) -> None: ...

    def check(self) -> None:
        """Raise the OSError that stopped the writing, if one did."""
        if self.error is not None:
            raise self.error

    def drop(self) -> None:
        """Write nothing from now on."""
        self._dropping = True

    def close(self) -> None:
        self._raw.close()
