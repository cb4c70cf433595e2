"""Make small photos, as the network saw them, for a page that is passed on."""

from __future__ import annotations

import base64
import io
import os
from typing import Any

import PIL.Image

from fmextract.errors import ConfigError
from fmextract.reading.activations import Activations
from fmextract.visual.photos import Listing, as_seen, load_photo

SIDE = 224
"""Pixels of a thumbnail's longer side."""
QUALITY = 75


class Photos:
    """The photos of a run, in the folder `images`, else where the run found them.

    `geometry` is False for a user's own preprocessing: it is unknown where a photo lies in the input.
    `missing` holds, by row, why there is no photo.
    """

    def __init__(self, acts: Activations, images: str | os.PathLike[str] | None) -> None:
        self._acts = acts
        self._images = images
        self._listing = Listing(acts, images)
        self.geometry = acts.preprocess.get("kind", "standard") == "standard"
        self.missing: dict[int, str] = {}

    def thumbnail(self, row: int) -> dict[str, Any] | None:
        """Return a JPEG as base64, and the (height, width) of the input that it shows; None without a photo."""
        try:
            photo = as_seen(load_photo(self._acts, row, self._images, self._listing), self._acts.preprocess)
        except ConfigError as error:
            self.missing[row] = str(error)
            return None
        size = photo.height, photo.width
        photo.thumbnail((SIDE, SIDE), PIL.Image.Resampling.BICUBIC)
        held = io.BytesIO()
        photo.save(held, "JPEG", quality=QUALITY, optimize=True)
        return {"jpeg": base64.b64encode(held.getvalue()).decode("ascii"), "size": size}

    def told(self) -> str:
        """Return how many photos are missing, and why the first is."""
        first = next(iter(self.missing.values()))
        return f"{len(self.missing):,} photo{'' if len(self.missing) == 1 else 's'} missing: {first}"
