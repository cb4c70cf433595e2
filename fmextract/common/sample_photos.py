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


def make_photos(folder: Path, count: int, width: int = 500, height: int = 375) -> Path:
    """Put `count` JPEGs of quality 85 into `folder`, crops of the demo's photos at many scales, of ImageNet's size."""
    import numpy as np
    import PIL.Image

    folder.mkdir(parents=True, exist_ok=True)
    originals: list[PIL.Image.Image] = []
    for path in sorted(copy_photos(folder / "originals").iterdir()):
        with PIL.Image.open(path) as photo:
            if min(photo.size) >= 300:
                originals.append(photo.convert("RGB"))
        path.unlink()
    (folder / "originals").rmdir()
    random = np.random.default_rng(0)
    for i in range(count):
        original = originals[i % len(originals)]
        scale = random.uniform(0.4, 1.0) * min(original.width / width, original.height / height)
        w, h = int(width * scale), int(height * scale)
        x, y = (int(random.integers(0, side - part + 1)) for side, part in ((original.width, w), (original.height, h)))
        crop = original.resize((width, height), PIL.Image.Resampling.BICUBIC, box=(x, y, x + w, y + h))
        crop.save(folder / f"{i:05}.jpg", quality=85)
    return folder
