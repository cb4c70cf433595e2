"""Remember a folder by its path and by its way from an output, so that both can be moved together."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

__all__ = ["base_of", "candidates", "common_folder", "local_name", "moved", "names_of", "remembered", "without_folders"]

# Behind a letter, a colon or a slash it is part of a word or of an address.
_BEFORE = r"(?<![\w/.:~-])"
_FOLDERS = re.compile(rf"{_BEFORE}(?:/(?:[^/\s'\"]+/)+|[A-Za-z]:\\(?:[^\\\s'\"]+\\)*)(?=[^\s/'\"])")


def base_of(output: Path) -> Path:
    """Return the folder from which an output (a file, or a directory of shards) says where things are."""
    base = output if output.is_dir() else output.parent
    return base.parent if base.suffix == ".partial" else base  # of a file that is being made


def remembered(folder: bytes, base: Path) -> dict[str, str]:
    """Return what is written down of an absolute folder: `absolute`, and `relative` to `base`.

    Bytes that are not UTF-8 show as `\\xHH`.
    """
    found = {"absolute": folder}
    with contextlib.suppress(ValueError):  # to another drive there is no relative path
        found["relative"] = os.path.relpath(os.path.realpath(folder), os.path.realpath(os.fsencode(base)))
    return {name: path.decode("utf-8", "backslashreplace") for name, path in found.items()}


def moved(folder: Mapping[str, str], base: Path, to: Path) -> dict[str, str]:
    """Return what an output below `to` says of the folder that one below `base` remembers."""
    if "relative" not in folder:
        return dict(folder)
    there = os.path.realpath(base / names_of(folder["relative"])[-1])
    return {**folder, "relative": remembered(os.fsencode(there), to).get("relative", there)}


def candidates(folder: Mapping[str, str], base: Path) -> Iterator[Path]:
    """Yield where it may be now: first its place as seen from the output, since both may have moved together."""
    for name in names_of(folder.get("relative", "")):
        yield Path(os.path.realpath(base), name)
    for name in names_of(folder.get("absolute", "")):
        yield Path(name)


def names_of(shown: str) -> list[str]:
    """Return the names that show as `shown`: that, or one with bytes that are not UTF-8 for each `\\xHH`."""
    if not shown or "\\x" not in shown:
        return [shown] if shown else []
    return [shown, os.fsdecode(re.sub(rb"\\x([0-9a-f]{2})", lambda m: bytes.fromhex(m[1].decode()), shown.encode()))]


def local_name(text: object) -> str:
    """Return a path for others to read: one that is absolute without the folders of the machine that it was made on."""
    name = str(text)
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(name).is_absolute():
            return kind(name).name
    return name


def without_folders(text: str, known: Iterable[str] = ()) -> str:
    """Return a sentence for others to read: only the names of absolute paths. `known` folders may hold blanks."""
    for folder in sorted({folder.rstrip("/") for folder in known} - {""}, key=len, reverse=True):
        text = re.sub(rf"{_BEFORE}{re.escape(folder)}/", "", text)
        text = re.sub(rf"{_BEFORE}{re.escape(folder)}(?![\w/])", lambda found: local_name(found[0]), text)
    return _FOLDERS.sub("", text)


def common_folder(paths: Iterable[str]) -> str:
    """Return the folder, with a slash at its end, that holds all absolute ones of `paths`; "" if there is none."""
    absolute = [path for path in paths if path.startswith("/")]
    if not absolute:
        return ""
    # All that lies between the two begins as they do.
    shared = os.path.commonprefix([min(absolute), max(absolute)])  # noqa: RUF071  cut to a folder below
    return shared[: shared.rfind("/") + 1]
