"""The boxes drawn by hand lie within their photos, and say something."""

from __future__ import annotations

from pathlib import Path

import PIL.Image
import pytest

from benchmarks.localize import DRAWN
from fmextract.common import sample_photos


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample_photos.copy_photos(tmp_path_factory.mktemp("localize") / "photos")


@pytest.mark.parametrize("name", DRAWN)
def test_a_box_lies_within_its_photo(photos: Path, name: str) -> None:
    top, left, bottom, right = DRAWN[name]
    with PIL.Image.open(photos / name) as photo:
        assert 0 <= top < bottom <= photo.height
        assert 0 <= left < right <= photo.width
        assert (bottom - top) * (right - left) < 0.95 * photo.width * photo.height
