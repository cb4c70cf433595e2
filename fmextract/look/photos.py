"""The photo behind a row: found again, and shown as the network saw it. Needs no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import PIL.ImageOps

from fmextract.boxes import crop_span, resized_size
from fmextract.errors import ConfigError

if TYPE_CHECKING:
    from fmextract.reader import Activations

_FILTERS = {"nearest": PIL.Image.Resampling.NEAREST, "bicubic": PIL.Image.Resampling.BICUBIC}


def load_photo(acts: Activations, row: int, images: str | os.PathLike[str] | None = None) -> PIL.Image.Image:
    """The photo of a row, RGB, turned upright where the run did so.

    It is looked for in `images`, a folder, or where the run found it. Raises ConfigError where it is not, or is no
    picture any more.
    """
    path = _find(acts, row, images)
    try:
        with PIL.Image.open(path) as file:
            file.load()
            photo: PIL.Image.Image = file
            if acts.config.get("options", {}).get("exif"):
                photo = PIL.ImageOps.exif_transpose(photo)
            if photo.mode.startswith("I;16"):  # Pillow would turn nearly all of it white
                photo = PIL.Image.fromarray((np.asarray(photo) // 257).astype(np.uint8))
            return photo.convert("RGB")
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise ConfigError(f"{path} cannot be shown: {error}") from error


def _find(acts: Activations, row: int, images: str | os.PathLike[str] | None) -> Path:
    key = str(acts.keys[row])
    for path in _candidates(acts, key, images):
        try:
            if path.is_file():
                return path
        except (OSError, ValueError):  # a key may be no possible name of a file
            continue
    where = images if images is not None else acts.attrs.get("source", "its source")
    raise ConfigError(f"no photo {key!r} in {where}: say with --images DIR (images=) where the photos are now")


def _candidates(acts: Activations, key: str, images: str | os.PathLike[str] | None) -> Iterator[Path]:
    """Where the photo of a key may be. Bytes of a name that are no UTF-8 stand in a key as `\\xHH`."""
    names = [key]
    if "\\x" in key:
        names.append(os.fsdecode(re.sub(rb"\\x([0-9a-f]{2})", lambda m: bytes.fromhex(m[1].decode()), key.encode())))
    for name in names:
        if images is not None:
            yield Path(images) / name
            yield Path(images) / Path(name).name
        else:
            source = Path(str(acts.attrs.get("source", "")))
            yield source / name
            yield source.parent / name  # a manifest names photos relative to its own folder
            yield Path(name)


def input_size(acts: Activations) -> tuple[int, int] | None:
    """(height, width) of the network's input, None where the file does not say."""
    shape = acts.config.get("identity", {}).get("input_shape")
    if isinstance(shape, list) and len(shape) == 3:
        return int(shape[1]), int(shape[2])
    return acts.input_size


def check_traceable(acts: Activations) -> None:
    """Raise ConfigError where nobody knows which part of a photo became the input: nothing can be laid over it then."""
    if acts.preprocess.get("kind", "standard") != "standard":
        raise ConfigError(
            f"{acts.path}: the preprocessing was the user's own, so that where its input lies in a photo is not known"
        )


def as_seen(photo: PIL.Image.Image, preprocess: Mapping[str, Any]) -> PIL.Image.Image:
    """The part of a photo that became the network's input: resized and cut as the file's `preprocess` says.

    A photo is left whole where the preprocessing is the user's own.
    """
    photo = photo.convert("RGB")
    if preprocess.get("kind", "standard") != "standard":
        return photo
    resize, crop = preprocess.get("resize"), preprocess.get("crop")
    height, width = resized_size(photo.height, photo.width, tuple(resize) if isinstance(resize, list) else resize)
    if (width, height) != photo.size:
        how = _FILTERS.get(str(preprocess.get("interpolation")), PIL.Image.Resampling.BILINEAR)
        photo = photo.resize((width, height), how)
    if not crop:
        return photo
    top, bottom, above = crop_span(height, crop[0])
    left, right, before = crop_span(width, crop[1])
    seen = PIL.Image.new("RGB", (crop[1], crop[0]))
    seen.paste(photo.crop((left, top, right, bottom)), (before, above))
    return seen
