"""Treat what a file names as data until the user says otherwise: import, download and unpickle nothing of it.

The sender of a file may put any name into it, and code or pickles beside it. Everything that builds something from
names in a file does so within `names_from_a_file`. Where names become code (`imports.import_object`), weights from a
network or the content of a file, `model` asks here first; what is added later is refused until it asks, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmextract.errors import ConfigError

__all__ = [
    "check_download",
    "check_import",
    "check_model",
    "check_weights_file",
    "downloads_are_allowed",
    "model_of_a_file",
    "names_from_a_file",
]


@dataclass(frozen=True, slots=True)
class _Limits:
    file: Path
    given: frozenset[str]
    downloads: bool
    weights_file_sha256: str


_model: ContextVar[tuple[Path, str | None, Mapping[str, Any] | None] | None] = ContextVar(
    "model_of_a_file", default=None
)
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
def model_of_a_file(file: Path, weights: str | None, preprocess: Mapping[str, Any] | None) -> Iterator[None]:
    """While the block lasts, a model must be what `file` says: the digest of its weights, how its images are prepared.

    None: whatever it is.
    """
    before = _model.set((file, weights, preprocess))
    try:
        yield
    finally:
        _model.reset(before)


def check_model(weights: str, preprocess: Mapping[str, Any]) -> None:
    """Raise ConfigError where a model has other weights, or prepares images otherwise, than the run of a file."""
    file, known, prepared = _model.get() or (None, None, None)
    if known is not None and weights != known:
        raise ConfigError(
            f"the weights are not those of {file} (SHA-256 {weights[:12]}…, there {known[:12]}…): give that model and"
            " its weights, or say which others are meant with -w (weights=)"
        )
    if any(preprocess.get(name) != value for name, value in (prepared or {}).items()):
        raise ConfigError(
            f"the model does not prepare images as in {file} ({preprocess} now, {dict(prepared or {})} there): give"
            " --preprocess (preprocess=), as it was or as it is meant now"
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
