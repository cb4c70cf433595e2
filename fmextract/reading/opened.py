"""An output, however it is given: by its path, or open."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fmextract.errors import ConfigError
from fmextract.reading import activations
from fmextract.reading.activations import Activations


@contextmanager
def opened(acts: str | os.PathLike[str] | Activations) -> Iterator[Activations]:
    """The output, open; closed afterwards where this opened it. Raises ConfigError for what is none."""
    if isinstance(acts, Activations):
        yield acts
        return
    with activations.open(place(acts)) as found:
        yield found


def place(acts: str | os.PathLike[str] | Activations) -> Path:
    """Where it is, whatever the working directory is by now. Raises ConfigError for what is none."""
    if isinstance(acts, Activations):
        return acts.place
    if not isinstance(acts, (str, os.PathLike)):
        raise ConfigError(
            f"expected the path of an output, or what open() returned, got {type(acts).__name__} {acts!r:.80}"
        )
    return Path(acts).expanduser()
