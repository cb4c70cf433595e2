"""Provide the photos that the demo and the benchmark run on, from scikit-image."""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path

from fmextract.errors import MissingExtra, OutputError

PHOTOS = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png",
    "grass.png", "hubble_deep_field.jpg", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
"""Photos in scikit-image's wheel, free to use; its other pictures are fetched when asked for."""


def copy_photos(folder: Path) -> Path:
    """Put the photos into `folder` as files, and return it. Raises OutputError, MissingExtra."""
    try:
        shipped = resources.files("skimage") / "data"
    except ModuleNotFoundError as error:
        raise MissingExtra("scikit-image", "demo", "the photos of the demo") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in PHOTOS:
            with resources.as_file(shipped / name) as file:
                shutil.copyfile(file, folder / name)
    except OSError as error:
        raise OutputError(f"cannot put the photos into {folder}: {error.strerror or error}") from error
    return folder
