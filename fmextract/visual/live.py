"""Get activations of a few images to look at, by a run into a temporary file. Imports torch."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from fmextract.common.progress import Quiet
from fmextract.config import Config
from fmextract.errors import SourceError
from fmextract.reading import activations
from fmextract.run.extract import run
from fmextract.visual.maps import MapPicture, show_maps


@contextmanager
def activations_of(
    inputs: Sequence[str | PathLike[str]], model: Any, layers: Sequence[str] | str = (), **options: Any
) -> Iterator[activations.Activations]:
    """Give the activations of image files in `layers` of a model, within the block; their keys are the paths.

    Options are those of `extract`. It runs in full precision unless told otherwise. Raises SourceError for a file that
    is no image, and what `extract` raises.
    """
    plain = {"precision": "fp32", "batch_size": len(inputs)} | options
    config = Config.of(layers=layers, **plain)
    with tempfile.TemporaryDirectory(prefix="fmextract-") as folder:
        out = Path(folder) / "acts.h5"
        for path in inputs:
            if not Path(path).is_file():
                raise SourceError(f"no such image: {fspath(path)!r}")
        run([fspath(path) for path in inputs], model, out, config, Quiet())
        with activations.open(out) as acts:
            yield acts


def show_maps_of(
    model: Any,
    image: str | PathLike[str],
    out: str | PathLike[str],
    *,
    layers: Sequence[str] = (),
    weights: str = "default",
    preprocess: Any = "model",
    size: str | int | None = None,
    **drawing: Any,
) -> list[MapPicture]:
    """Draw the maps that a model makes of an image file, one picture per layer into the folder `out`, with no output.

    `layers` are selectors as in `extract`, `drawing` the options of `show_maps`. Raises as `extract` and `show_maps`.
    """
    options = {"weights": weights, "preprocess": preprocess, "size": size}
    with activations_of([image], model, layers, **options) as acts:
        return show_maps(acts, str(acts.keys[0]), out, **drawing)
