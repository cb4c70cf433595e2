"""Find the photo of a row again, and show it as the network saw it. Needs no torch.

An unknown sender's file must not put other pictures of this machine onto a page. So the paths in it only say where to
look: a photo is shown if its content has the digest that the row holds. Where the row holds none, the user has to name
the folder, and the photo has to lie in it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image

from fmextract.common.boxes import crop_span, resized_size
from fmextract.common.folders import base_of, candidates, names_of
from fmextract.errors import ConfigError, SampleError
from fmextract.inputs.files import FileBytes, read_file
from fmextract.inputs.pictures import decode_file, undecodable
from fmextract.records import FileStamp

if TYPE_CHECKING:
    from fmextract.reading.activations import Activations

_FILTERS = {"nearest": PIL.Image.Resampling.NEAREST, "bicubic": PIL.Image.Resampling.BICUBIC}


MOST_LISTED = 200_000
"""Files of a folder whose sizes are looked at."""
MOST_READ = 32
"""Files of the right size that are read for one photo."""


class Listing:
    """The files in the folder of photos and below, by their size: listed once, when first needed."""

    def __init__(self, acts: Activations, images: str | os.PathLike[str] | None) -> None:
        self._folders = [Path(images)] if images is not None else candidates(acts.images, base_of(acts.path))
        self._by_size: dict[int, list[Path]] | None = None

    def of_size(self, size: int) -> list[Path]:
        """Return at most MOST_READ files of a size."""
        if self._by_size is None:
            self._by_size = {}
            each = (found for folder in self._folders for found in _files(folder))
            for path, held in itertools.islice(each, MOST_LISTED):
                self._by_size.setdefault(held, []).append(path)
        return self._by_size.get(size, [])[:MOST_READ]


def _files(folder: Path) -> Iterator[tuple[Path, int]]:
    """Yield every file in a folder and below, in the order of names, and its size. Enters no folder that is a link."""
    waiting = [folder]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                found = sorted(itertools.islice(entries, MOST_LISTED), key=lambda entry: entry.name)
        except (OSError, ValueError):  # it is not there, or may not be read: then no photo is found in it
            continue
        for entry in found:
            with contextlib.suppress(OSError):  # a link that leads nowhere
                if entry.is_file():
                    yield Path(entry.path), entry.stat().st_size
        waiting += [Path(entry.path) for entry in reversed(found) if entry.is_dir(follow_symlinks=False)]


def load_photo(
    acts: Activations, row: int, images: str | os.PathLike[str] | None = None, listing: Listing | None = None
) -> PIL.Image.Image:
    """Return the photo of a row, RGB, turned upright where the run did so, by the decoder of the run.

    It is looked for in `images`, a folder, or where the run found it: by its key, and then, as a key need not be the
    name of a file, by its size and digest. `listing` saves listing the folder for each of several photos. Raises
    ConfigError where it is missing, or is another photo now, or no picture at all.
    """
    path, data = _find(acts, row, images, listing or Listing(acts, images))
    try:
        with undecodable():
            pixels, _ = decode_file(data, bool(acts.config.get("options", {}).get("exif")))
    except SampleError as error:
        raise ConfigError(f"{path} cannot be shown: {error}") from error
    return PIL.Image.fromarray(np.ascontiguousarray(pixels))


def _find(
    acts: Activations, row: int, images: str | os.PathLike[str] | None, listing: Listing
) -> tuple[Path, FileBytes]:
    """Return a photo's file and what is in it."""
    key, stamp = str(acts.keys[row]), FileStamp(int(acts.file_sizes[row]), str(acts.file_digests[row]))
    if images is None and not stamp.digest:
        raise ConfigError(
            f"{acts.path} does not hold the digest of the photo {key!r}, without which any picture could be taken for"
            " it: say with --images DIR (images=) where the photos are"
        )
    others: list[str] = []
    for path in _places(acts, key, images):
        with contextlib.suppress(OSError, ValueError):  # a key may be no possible name of a file
            size = path.stat().st_size
            found = _content(path, size, stamp, images)
            if isinstance(found, FileBytes):
                return path, found
            others.append(f"{path} {found}")
    for path in listing.of_size(stamp.size) if stamp.digest else ():
        found = _content(path, stamp.size, stamp, images)
        if isinstance(found, FileBytes):
            return path, found
    if others:
        raise ConfigError(f"photo {key!r}: {others[0]}")
    where = images if images is not None else "the folder where the run found it"
    raise ConfigError(f"no photo {key!r} in {where}: say with --images DIR (images=) where the photos are now")


def _content(path: Path, size: int, stamp: FileStamp, images: str | os.PathLike[str] | None) -> FileBytes | str:
    """Return what is in the file of a photo, or why that is not shown."""
    another = "is not the photo that was extracted (its size or content is another)"
    if stamp.digest and size != stamp.size:
        return another
    if not stamp.digest and not _lies_in(path, Path(images or "")):
        return f"leads out of {images}"
    try:
        data = read_file(os.fsencode(path))
    except SampleError as error:
        return f"cannot be read: {error}"
    return data if not stamp.digest or data.stamp() == stamp else another


def _lies_in(path: Path, folder: Path) -> bool:
    """Return whether a path leads into a folder, links followed."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _places(acts: Activations, key: str, images: str | os.PathLike[str] | None) -> Iterator[Path]:
    """Yield the paths that the photo of a key may have."""
    for name in names_of(key):
        if images is None:
            yield from (folder / name for folder in candidates(acts.images, base_of(acts.path)))
            continue
        if not PurePath(name).is_absolute() and ".." not in PurePath(name).parts:
            yield Path(images) / name
        yield Path(images) / PurePath(name).name


def check_traceable(acts: Activations) -> None:
    """Raise ConfigError if it is unknown which part of a photo became the input: nothing can be laid over it."""
    if acts.preprocess.get("kind", "standard") != "standard":
        raise ConfigError(
            f"{acts.path}: the preprocessing was the user's own, so that where its input lies in a photo is not known"
        )


def as_seen(photo: PIL.Image.Image, preprocess: Mapping[str, Any]) -> PIL.Image.Image:
    """Return the part of a photo that became the network's input: resized and cut as the file's `preprocess` says.

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
