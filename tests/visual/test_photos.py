"""A photo is shown only if it is the one that the row was made of, whatever a file says; and by the decoder of runs."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import PIL.EpsImagePlugin
import PIL.Image
import pytest
import runs
from files import INFO, make_file
from odd_images import jpeg, photo, with_orientation

import fmextract
from fmextract.errors import ConfigError
from fmextract.inputs import decoding
from fmextract.reading import activations
from fmextract.records import FileStamp
from fmextract.run import packing
from fmextract.visual import maps
from fmextract.visual.photos import load_photo
from fmextract.visual.report.photos import Photos
from fmextract.visual.report.report import write_report

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n0 0 8 8 rectfill\nshowpage\n"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    runs.extract(runs.make_photos(tmp_path / "here" / "photos", 4), tmp_path / "here" / "acts.h5")
    return tmp_path / "here" / "acts.h5"


def pixels(out: Path, row: int = 0, folder: Path | None = None) -> np.ndarray:
    with activations.open(out) as acts:
        return np.asarray(load_photo(acts, row, folder))


def refused(out: Path, row: int = 0, folder: Path | None = None) -> str:
    with activations.open(out) as acts, pytest.raises(ConfigError) as said:
        load_photo(acts, row, folder)
    return str(said.value)


def original(row: int) -> np.ndarray:
    return np.random.default_rng(row).integers(0, 256, (8, 8, 3), np.uint8)


# ---- found again


def test_photos_are_found_from_any_working_directory(out: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(out.parent)
    runs.extract("photos", Path("there.h5"))  # named relative to the working directory
    monkeypatch.chdir(tmp_path)
    assert (pixels(out.parent / "there.h5", 2) == original(2)).all()
    assert (pixels(out, 2) == original(2)).all()


def test_photos_and_output_move_together(out: Path, tmp_path: Path) -> None:
    out.parent.rename(tmp_path / "there")
    assert (pixels(tmp_path / "there" / "acts.h5", 1) == original(1)).all()


def test_the_output_moves_alone(out: Path, tmp_path: Path) -> None:
    (tmp_path / "deep" / "down").mkdir(parents=True)
    moved = out.rename(tmp_path / "deep" / "down" / "acts.h5")
    assert (pixels(moved, 1) == original(1)).all()


@pytest.mark.parametrize("made", ["shards", "packed", "netcdf", "several shards in one file"])
def test_every_kind_of_output_knows_where_they_are(out: Path, tmp_path: Path, made: str) -> None:
    photos, place = out.parent / "photos", tmp_path / "here" / "sub"
    place.mkdir()
    runs.make_photos(photos.parent / "more", 8)
    folder, one = place / "acts", place / "one.h5"
    if made == "several shards in one file":
        runs.extract(photos.parent / "more", one)
    elif made == "netcdf":
        one = one.with_suffix(".nc")
        fmextract.export(out, to="netcdf", out=one)
    else:
        runs.extract(photos, folder)
        if made == "packed":
            (place / "deeper").mkdir()
            one = place / "deeper" / "one.h5"
            packing.pack(folder, one)
        else:
            one = folder
    (tmp_path / "here").rename(tmp_path / "there")
    assert (pixels(tmp_path / "there" / one.relative_to(tmp_path / "here"), 3) == original(3)).all()


def test_lists_of_paths_and_manifests(out: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(out.parent)
    (out.parent / "rows.csv").write_text("path,key\nphotos/0001.png,photos/0001.png\n")
    for name, source in (
        ("list.h5", ["photos/0001.png"]),
        ("absolute.h5", [str(out.parent / "photos" / "0001.png")]),
        ("manifest.h5", "rows.csv"),
    ):
        runs.extract(source, tmp_path / name)
        with monkeypatch.context() as there:
            there.chdir("/")
            assert (pixels(tmp_path / name) == original(1)).all()


def test_photos_whose_key_is_not_their_path(out: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Of a manifest they are found in its folder; of a Dataset of paths, whose rows are numbered, with --images."""
    photos = out.parent / "photos"
    (photos / "deep" / "er").mkdir(parents=True)
    (photos / "0002.png").rename(photos / "deep" / "er" / "0002.png")
    (photos / "loop").symlink_to(photos)
    (photos / "nowhere.png").symlink_to("nothing")
    (photos / "same size.png").write_bytes(b"0" * (photos / "0001.png").stat().st_size)
    names = ["0001.png", "deep/er/0002.png"]
    (photos / "rows.csv").write_text("path,key\n" + "".join(f"{name},cat {i}\n" for i, name in enumerate(names)))
    runs.extract(photos / "rows.csv", tmp_path / "manifest.h5")

    class Paths:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, row: int) -> str:
            return str(photos / names[row])

    runs.extract(Paths(), tmp_path / "dataset.h5")
    for row in range(2):
        assert (pixels(tmp_path / "manifest.h5", row) == original(row + 1)).all()
        for made in ("manifest.h5", "dataset.h5"):
            assert (pixels(tmp_path / made, row, photos) == original(row + 1)).all()
        assert "--images" in refused(tmp_path / "dataset.h5", row)
    assert write_report(tmp_path / "manifest.h5").photos == 2
    (photos / "0001.png").write_bytes(b"0" * (photos / "0001.png").stat().st_size)
    assert "no photo 'cat 0'" in refused(tmp_path / "manifest.h5", 0)
    monkeypatch.setattr("fmextract.visual.photos.MOST_LISTED", 1)
    assert "no photo 'cat 1'" in refused(tmp_path / "manifest.h5", 1, photos)


def test_a_folder_whose_name_is_no_utf8(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    try:
        runs.make_photos(folder, 2)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    runs.extract(folder, tmp_path / "acts.h5")
    assert (pixels(tmp_path / "acts.h5", 1) == original(1)).all()


# ---- and only if it is the one


def test_another_photo_under_the_same_name_is_named_and_not_shown(out: Path, tmp_path: Path) -> None:
    photo = out.parent / "photos" / "0002.png"
    data = bytearray(photo.read_bytes())
    for changed in (bytes([*data[:-20], data[-20] ^ 1, *data[-19:]]), runs.picture(9)):
        photo.write_bytes(changed)
        assert "0002.png is not the photo that was extracted" in refused(out, 2)
        assert "is not the photo that was extracted" in refused(out, 2, photo.parent)
    with activations.open(out) as acts:
        seen = Photos(acts, None)
        assert seen.thumbnail(2) is None
        assert seen.thumbnail(1) is not None
        assert "is not the photo that was extracted" in seen.told()
        maps.show_maps(acts, "0001.png", tmp_path / "maps", layers=["conv"])
        with pytest.raises(ConfigError, match="is not the photo that was extracted"):
            maps.show_maps(acts, "0002.png", tmp_path / "maps", layers=["conv"])


@contextmanager
def no_ghostscript(monkeypatch: Any) -> Iterator[None]:
    def started(*args: Any, **how: Any) -> None:
        raise AssertionError(f"a program was started: {args}")

    with monkeypatch.context() as watched:
        watched.setattr(PIL.EpsImagePlugin, "Ghostscript", started)
        watched.setattr(subprocess, "Popen", started)
        yield


@pytest.mark.parametrize("old", [False, True])
def test_postscript_starts_no_program(out: Path, monkeypatch: Any, old: bool) -> None:
    photo = out.parent / "photos" / "0000.png"
    photo.write_bytes(POSTSCRIPT)
    if old:
        without_digests(out)
    with no_ghostscript(monkeypatch):
        said = refused(out, 0, photo.parent)
    assert ("cannot be shown" if old else "is not the photo that was extracted") in said


def without_digests(out: Path) -> None:
    with h5py.File(out, "r+") as file:
        del file["file_size"], file["file_digest"]


def test_a_folder_that_a_file_names_gives_no_photo_without_its_digest(tmp_path: Path) -> None:
    """The victim's own pictures, in any folder that somebody else's file may name, and by any name."""
    secret = runs.make_photos(tmp_path / "secret", 2)
    keys = ["0000.png", "../secret/0000.png", str(secret / "0000.png"), "0001.png"]
    size = (secret / "0001.png").stat().st_size
    claimed = [FileStamp()] * 3 + [FileStamp(size, "0" * 32)]
    (tmp_path / "sent").mkdir()
    sent = tmp_path / "sent" / "acts.h5"
    for place in (
        {"absolute": str(secret), "relative": "../secret"},
        {"absolute": "/", "relative": "../" * 20},
        {"relative": str(secret)},
    ):
        make_file(
            sent, {"fc": np.ones((4, 3), np.float32)}, keys=keys, files=claimed,
            info=replace(INFO, source=str(secret), extra={"images": place}),
        )  # fmt: skip
        with activations.open(sent) as acts:
            seen = Photos(acts, None)
            assert [seen.thumbnail(row) for row in range(4)] == [None] * 4
        assert write_report(sent).photos == 0
        sent.unlink()
        (tmp_path / "sent" / "report.html").unlink()


@pytest.mark.parametrize("escape", ["..", "absolute", "link", "folder that is a link"])
def test_without_digests_photos_lie_in_the_folder_that_the_user_names(tmp_path: Path, escape: str) -> None:
    secret = runs.make_photos(tmp_path / "secret", 1)
    folder = runs.make_photos(tmp_path / "photos", 1)
    (folder / "link.png").symlink_to(secret / "0000.png")
    (folder / "down").symlink_to(secret)
    key = {
        "..": "../secret/hidden.png",
        "absolute": str(secret / "hidden.png"),
        "link": "link.png",
        "folder that is a link": "down/hidden.png",
    }[escape]
    (secret / "0000.png").rename(secret / "hidden.png")
    (folder / "link.png").unlink()
    (folder / "link.png").symlink_to(secret / "hidden.png")
    make_file(tmp_path / "acts.h5", {"fc": np.ones((2, 3), np.float32)}, keys=[key, "0000.png"])
    said = refused(tmp_path / "acts.h5", 0, folder)
    assert "leads out of" in said or "no photo" in said
    assert (pixels(tmp_path / "acts.h5", 1, folder) == original(0)).all()
    assert "--images" in refused(tmp_path / "acts.h5", 1)


def test_keys_that_cannot_be_names_of_files(tmp_path: Path) -> None:
    keys = ["a\0b.png", "x" * 5000, "..", "/", ""]
    for files in (None, [FileStamp(5, "0" * 32)] * 5):
        make_file(tmp_path / "acts.h5", {"fc": np.ones((5, 3), np.float32)}, keys=keys, files=files)
        for row in range(5):
            assert "--images" in refused(tmp_path / "acts.h5", row)
            assert "photo" in refused(tmp_path / "acts.h5", row, tmp_path)
        (tmp_path / "acts.h5").unlink()


def test_links_are_followed_where_the_digest_fits(out: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "0001.png").symlink_to(out.parent / "photos" / "0001.png")
    assert (pixels(out, 1, linked) == original(1)).all()


def test_fifos_and_devices_are_not_waited_for(out: Path) -> None:
    photo = out.parent / "photos" / "0001.png"
    photo.unlink()
    os.mkfifo(photo)
    assert "0001.png" in refused(out, 1)
    without_digests(out)
    assert "not a regular file" in refused(out, 1, photo.parent)


# ---- by one decoder


@pytest.mark.parametrize(
    "make",
    [
        jpeg,
        lambda: with_orientation(photo(90, 60), 6),
        lambda: encoded(PIL.Image.fromarray(np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)), "PNG"),
        lambda: encoded(PIL.Image.fromarray(np.linspace(0, 255, 64).astype(np.float32).reshape(8, 8)), "TIFF"),
        lambda: encoded(PIL.Image.new("CMYK", (9, 9), (1, 80, 200, 9)), "JPEG"),
    ],
)
@pytest.mark.parametrize("exif", [False, True])
def test_pictures_show_the_pixels_that_the_run_saw(tmp_path: Path, make: Callable[[], bytes], exif: bool) -> None:
    (tmp_path / "photos").mkdir()
    data = make()
    (tmp_path / "photos" / "a.png").write_bytes(data)
    runs.extract(tmp_path / "photos", tmp_path / "a.h5", exif=exif)
    seen, _ = decoding._picture(data, exif)
    np.testing.assert_array_equal(pixels(tmp_path / "a.h5"), seen)


def encoded(picture: PIL.Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def test_a_copy_of_the_folder_will_do(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out.parent / "photos", tmp_path / "copy")
    shutil.rmtree(out.parent / "photos")
    assert "no photo '0001.png'" in refused(out, 1)
    assert (pixels(out, 1, tmp_path / "copy") == original(1)).all()
