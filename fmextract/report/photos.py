"""Small photos, as the network saw them: resized and cut as the file's preprocessing says."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps

from fmextract.boxes import crop_span, resized_size
from fmextract.reader import Activations

SIDE = 224
"""Pixels of a thumbnail's longer side."""
QUALITY = 75


class Photos:
    """The photos of a run, in the folder given, else in the one that the file names as its source.

    `geometry` is False where the preprocessing is the user's own: then nobody knows where a photo lies in the input.
    """

    def __init__(self, acts: Activations, folder: str | os.PathLike[str] | None) -> None:
        self._acts = acts
        self._preprocess = acts.preprocess
        self._given = folder is not None
        place = Path(folder if folder is not None else str(acts.attrs.get("source", "")) or ".")
        self._folder = place.parent if place.is_file() else place
        options = acts.config.get("options")
        self._upright = bool(options.get("exif")) if isinstance(options, Mapping) else False
        self.geometry = self._preprocess.get("kind", "standard") == "standard"
        self.missing: dict[int, str] = {}

    def thumbnail(self, row: int) -> dict[str, Any] | None:
        """JPEG as base64, and the (height, width) of the network's input that it shows; None where there is none."""
        file = self._file(str(self._acts.keys[row]))
        if file is None:
            self.missing[row] = "not found"
            return None
        try:
            with PIL.Image.open(file) as photo:
                made, size = self._seen(photo)
            held = io.BytesIO()
            made.save(held, "JPEG", quality=QUALITY, optimize=True)
        except Exception as error:  # Pillow raises a dozen kinds for damaged files; a report goes on without the photo
            self.missing[row] = f"{type(error).__name__}: {error}"
            return None
        return {"jpeg": base64.b64encode(held.getvalue()).decode("ascii"), "size": size}

    def told(self) -> str:
        """Where the missing photos were looked for, and what to do."""
        some = f"{len(self.missing):,} photo{'' if len(self.missing) == 1 else 's'}"
        unreadable = [why for why in self.missing.values() if why != "not found"]
        if unreadable:
            return f"{some} not found or not readable in {self._folder}, as {unreadable[0]}"
        return f"{some} not found in {self._folder}" + ("" if self._given else ": --images DIR says where they are now")

    def _file(self, key: str) -> Path | None:
        """The photo of a key, below the folder: a file is not trusted to name others."""
        parts = PurePosixPath(key).parts
        if not parts or ".." in parts or "\0" in key:
            return None
        inside = self._folder.joinpath(*(part for part in parts if part != "/"))
        for file in (inside, *([self._folder / parts[-1]] if self._given else [])):
            try:
                if file.is_file():
                    return file
            except OSError:  # a name too long for this file system
                continue
        return None

    def _seen(self, photo: PIL.Image.Image) -> tuple[PIL.Image.Image, tuple[int, int]]:
        """The thumbnail and the size of the input that it shows."""
        if self._upright:
            photo = PIL.ImageOps.exif_transpose(photo)
        original = photo.height, photo.width
        resize, crop = (_size(self._preprocess.get(step)) if self.geometry else None for step in ("resize", "crop"))
        resized = resized_size(*original, resize)
        size = crop if isinstance(crop, tuple) else resized
        scale = min(1.0, SIDE / max(size))
        # A JPEG is decoded at a half, a quarter or an eighth where that is enough.
        photo.draft("RGB", (max(1, round(resized[1] * scale)), max(1, round(resized[0] * scale))))
        photo = _rgb(photo)
        now = photo.height, photo.width
        part, place, box = [], [], []
        for axis in (0, 1):
            start, stop, padding = crop_span(resized[axis], size[axis])
            part.append(max(1, round((stop - start) * scale)))
            place.append(round(padding * scale))
            box.append((start * now[axis] / resized[axis], stop * now[axis] / resized[axis]))
        (top, bottom), (left, right) = box
        seen = photo.resize((part[1], part[0]), PIL.Image.Resampling.BICUBIC, (left, top, right, bottom))
        whole = PIL.Image.new("RGB", (max(1, round(size[1] * scale)), max(1, round(size[0] * scale))))
        whole.paste(seen, (place[1], place[0]))
        return whole, size


def _size(value: Any) -> int | tuple[int, int] | None:
    return (int(value[0]), int(value[1])) if isinstance(value, (list, tuple)) else value


def _rgb(photo: PIL.Image.Image) -> PIL.Image.Image:
    """Of any mode; 16 bits and floats, which Pillow would clip to white, are stretched to what the picture uses."""
    if photo.mode.startswith(("I", "F")):
        values = np.nan_to_num(np.asarray(photo, dtype=np.float64))
        low, high = values.min(), values.max()
        photo = PIL.Image.fromarray(np.rint(255 * (values - low) / ((high - low) or 1)).astype(np.uint8))
    return photo.convert("RGB")
