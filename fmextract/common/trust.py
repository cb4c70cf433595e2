"""Treat what a file names as data until the user says otherwise: import, download and unpickle nothing of it.

The sender of a file may put any name into it, and code or pickles beside it. Everything that builds something from
names in a file does so within `names_from_a_file`. Where names become code (`imports.import_object`), weights from a
network or the content of a file, `model` asks here first; what is added later is refused until it asks, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from fmextract.errors import ConfigError

__all__ = [
    "check_download",
    "check_import",
    "check_weights",
    "check_weights_file",
    "downloads_are_allowed",
    "names_from_a_file",
    "weights_of_a_file",
]


@dataclass(frozen=True, slots=True)
class _Limits:
    file: Path
    given: frozenset[str]
    downloads: bool
    weights_file_sha256: str


_weights: ContextVar[tuple[Path, str] | None] = ContextVar("weights_of_a_file", default=None)
_limits: ContextVar[_Limits | None] = ContextVar("names_from_a_file", default=None)


@contextlib.contextmanager
def names_from_a_file(
    file: Path, given: Collection[str], *, downloads: bool = False, weights_file_sha256: str = ""
) -> Iterator[None]:
    """Treat names within the block as those in `file`, except those that the user has `given` again.

    `downloads`: the user named the model, whose published weights may come from the network as ever. A weight file that
    `file` names is read if it has the digest `weights_file_sha256`, which the run wrote down.
    """
    names = frozenset([*given, *(str(Path(name)) for name in given)])
    before = _limits.set(_Limits(file, names, downloads, weights_file_sha256))
    try:
        yield
    finally:
        _limits.reset(before)


@contextlib.contextmanager
def weights_of_a_file(file: Path, sha256: str | None) -> Iterator[None]:
    """While the block lasts, a model must have the weights with this digest, which `file` names; None: any."""
    before = _weights.set(None if sha256 is None else (file, sha256))
    try:
        yield
    finally:
        _weights.reset(before)


def check_weights(sha256: str) -> None:
    """Raise ConfigError where a model has other weights than the run of a file had."""
    expected = _weights.get()
    if expected is not None and sha256 != expected[1]:
        raise ConfigError(
            f"the weights are not those of {expected[0]} (SHA-256 {sha256[:12]}…, there {expected[1][:12]}…): give that"
            " model and its weights, or say which others are meant with -w (weights=)"
        )


def check_import(text: str, purpose: str) -> None:
    """Raise ConfigError where `module:callable` is what a file names."""
    limits = _limits.get()
    if limits is not None and text not in limits.given:
        raise ConfigError(
            f"{purpose}: {limits.file} names the code {text!r}. What a file names is not run unless you say so: give it"
            " again yourself, or say --trust (trust=True) if you know where the file is from"
        )


def downloads_are_allowed() -> bool:
    limits = _limits.get()
    return limits is None or limits.downloads


def check_download(what: str) -> None:
    """Raise ConfigError for weights that are not on this disk, where a file names them."""
    limits = _limits.get()
    if limits is not None and not limits.downloads:
        raise ConfigError(
            f"{limits.file} names {what}, whose weights are not on this disk. Nothing is downloaded because a file"
            " names it: give the model again with -m (model=), or say --trust (trust=True)"
        )


def check_weights_file(path: str, sha256: str) -> None:
    """Raise ConfigError for a weight file that a file names, unless its digest is that of the run's."""
    limits = _limits.get()
    if limits is None or path in limits.given:
        return
    wanted = limits.weights_file_sha256
    if not wanted or sha256 != wanted:
        why = "is not the one of the run" if wanted else "cannot be told from another, as its digest was not recorded"
        raise ConfigError(
            f"{limits.file} names the weight file {path!r}, which {why}: give the weights again with -w (weights=), or"
            " say --trust (trust=True)"
        )
