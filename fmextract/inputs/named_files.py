"""Describe files that a Dataset names or holds open: its items may come from them, and they may change. No torch.

Few and small ones are described by their content, so that a copy or a touched one is the same; others by size and time.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from fmextract.storage.lock import NAME as LOCK

__all__ = ["Stamp", "facts_of_files", "folder_digest", "stamps_of"]

Stamp = tuple[int, int]
"""Size, and time of the last change in nanoseconds."""
MOST_READ = 64 << 20
"""Bytes of all files that are described by their content."""
MOST_NAMED = 20
"""Files that are described one by one, so that a message can name the one that differs."""
MOST_IN_FOLDERS = 10_000


def stamps_of(paths: Iterable[str]) -> dict[str, Stamp]:
    """Return those of `paths` that are files, by their names."""
    found = {}
    for path in sorted(set(paths)):
        status = _status(path)
        if status is not None and stat.S_ISREG(status.st_mode):
            found[path] = (status.st_size, status.st_mtime_ns)
    return found


def facts_of_files(paths: Iterable[str], before: Mapping[str, Stamp]) -> dict[str, Any]:
    """Return what `source` facts say of the files and folders among `paths`; as JSON.

    Files that changed since `before` the Dataset was used are left out: a log, a cache.
    """
    paths = set(paths)
    files = {path: stamp for path, stamp in stamps_of(paths).items() if before.get(path, stamp) == stamp}
    whole = sum(size for size, _ in files.values()) <= MOST_READ
    facts = {path: _content(path) if whole else f"{size} bytes, {time}" for path, (size, time) in files.items()}
    if len(facts) > MOST_NAMED:
        facts = {"all": _hex(f"{path}\n{fact}" for path, fact in facts.items())}
    return {"files": facts, "folders": {path: told for path in sorted(paths) if (told := folder_digest(path))}}


def _status(path: str) -> os.stat_result | None:
    try:
        return Path(path).stat()
    except (OSError, ValueError):
        return None


def _content(path: str) -> str:
    hashed = xxhash.xxh3_128()
    try:
        with Path(path).open("rb") as file:
            while part := file.read(1 << 20):
                hashed.update(part)
    except OSError:
        return "cannot be read"
    return hashed.hexdigest()[:16]


def folder_digest(path: str, leave_out: Iterable[Path] = ()) -> str:
    """Return a digest of the names, sizes and times of the files in a folder and below; "" where there is none.

    Hidden ones are passed over. Of very many files, only the first ones count.
    """
    others = {os.path.realpath(other) for other in leave_out}
    status = _status(path)
    if status is None or not stat.S_ISDIR(status.st_mode):
        return ""
    found: list[str] = []
    waiting = [Path(path)]
    while waiting and len(found) < MOST_IN_FOLDERS:
        try:
            entries = sorted(os.scandir(waiting.pop()), key=lambda entry: entry.name)
        except OSError:
            continue
        for entry in (entry for entry in entries if not _is_passed_over(entry, others)):
            if entry.is_dir(follow_symlinks=False):
                waiting.append(Path(entry.path))
            elif (told := _status(entry.path)) is not None:
                found.append(f"{entry.path} {told.st_size} {told.st_mtime_ns}")
    return _hex(found)


def _is_passed_over(entry: os.DirEntry[str], others: set[str]) -> bool:
    """Return whether it is hidden, or belongs to an output of ours, which another run may be writing."""
    ours = entry.name.endswith(".partial") or (entry.is_dir() and (Path(entry.path) / LOCK).exists())
    return entry.name.startswith(".") or ours or (bool(others) and os.path.realpath(entry.path) in others)


def _hex(lines: Iterable[str]) -> str:
    hashed = xxhash.xxh3_128()
    for line in lines:
        hashed.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return hashed.hexdigest()[:16]
