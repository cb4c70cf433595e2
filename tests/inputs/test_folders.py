"""Folders as computers leave them, patterns and single files: what is taken, what is passed over and said so."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import PIL.Image
import pytest

from fmextract.errors import SourceError
from fmextract.inputs.sources import open_source
from fmextract.records import Source


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (4, 4), (1, 2, 3)).save(file, kind)
    return file.getvalue()


def put(folder: Path, *names: str, data: bytes = b"anything") -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def keys(source: Source) -> list[str]:
    return [source.key(row) for row in range(len(source))]


HIDDEN = (
    ".ipynb_checkpoints/a-checkpoint.jpg",
    ".Trash-1000/files/b.jpg",
    "@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg",
    "sub/.hidden.jpg",
)


def test_what_computers_put_beside_photos_is_counted_not_taken(tmp_path):
    put(tmp_path, "a.jpg", "sub/b.jpg", *HIDDEN, "__MACOSX/._a.jpg", "Thumbs.db", ".DS_Store")
    put(tmp_path, "c.heic", "d.nef", "notes.txt", "table.csv", "more.txt")
    source = open_source(tmp_path)
    assert keys(source) == ["a.jpg", "sub/b.jpg"]
    note = source.notes[0]
    assert note.startswith(f"{tmp_path}: passed over 7 hidden files or folders (.DS_Store, .Trash-1000/, ")
    assert "--hidden takes them" in note
    assert "1 HEIC file, which is not decoded here" in note
    assert "1 camera raw file, which is not decoded here" in note
    assert "3 other files (.txt 2, .csv 1)" in note


def test_hidden_takes_them(tmp_path):
    put(tmp_path, "a.jpg", *HIDDEN, "__MACOSX/._a.jpg", "Thumbs.db")
    source = open_source(tmp_path, hidden=True)
    assert keys(source) == sorted(["a.jpg", *HIDDEN])
    assert "2 other files" in source.notes[0]  # Thumbs.db, and what macOS keeps beside a.jpg: neither is an image


def test_hidden_takes_what_a_pattern_leaves_out(tmp_path, monkeypatch):
    put(tmp_path, "a.jpg", ".b.jpg")
    monkeypatch.chdir(tmp_path)
    pattern = "*.jpg"
    assert keys(open_source(pattern)) == ["a.jpg"]
    if sys.version_info >= (3, 11):
        assert sorted(keys(open_source(pattern, hidden=True))) == [".b.jpg", "a.jpg"]
    else:
        with pytest.raises(SourceError, match=r"needs Python 3\.11"):
            open_source(pattern, hidden=True)


def test_a_hidden_folder_that_is_named_is_read(tmp_path):
    put(tmp_path / ".photos", "a.jpg")
    assert keys(open_source(tmp_path / ".photos")) == ["a.jpg"]
    assert open_source(tmp_path / ".photos").notes == []


PIL.Image.init()
KINDS = [kind for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000") if kind in PIL.Image.SAVE]
"""Pillow writes AVIF from 11.3 on."""


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_recognised_by_their_first_bytes(tmp_path, kind):
    put(tmp_path, "noextension", "c.jpg?width=300", "d.2019", data=encoded(kind))
    put(tmp_path, "e", "f.jpg?width=300")
    os.mkfifo(tmp_path / "pipe")
    source = open_source(tmp_path)
    assert keys(source) == ["c.jpg?width=300", "d.2019", "noextension"]
    assert any("3 images without an image's extension" in note for note in source.notes)
    assert any("3 other files" in note for note in source.notes)
    assert keys(open_source(tmp_path / "noextension")) == [str(tmp_path / "noextension")]


def test_only_files_of_unknown_extensions_are_looked_into(tmp_path):
    put(tmp_path, "a.txt", "b.tar", "c.bak", "d.jpg~", "e.nef", "f.xyz", data=encoded("JPEG"))
    put(tmp_path, "raw.xyz", data=encoded("TIFF"))  # as raw photos of many cameras begin
    assert keys(open_source(tmp_path)) == ["f.xyz"]


def test_a_heic_without_its_extension_is_none_that_is_decoded(tmp_path):
    put(tmp_path, "a.jpg", data=encoded("JPEG"))
    put(tmp_path, "IMG_1", data=b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    assert "1 HEIC file" in open_source(tmp_path).notes[0]


def test_a_folder_of_nothing_to_take_says_what_there_is(tmp_path):
    put(tmp_path, ".ipynb_checkpoints/a.jpg", "b.heic", "c.heic")
    with pytest.raises(SourceError, match=r"no images .* but 1 hidden file or folder .*, 2 HEIC files, which are not"):
        open_source(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"no images .*: there are no files at all$"):
        open_source(tmp_path / "empty")


# ------------------------------------------------------------------------------------------------------ patterns


def test_a_quoted_pattern_is_expanded(tmp_path, monkeypatch):
    put(tmp_path, "few/b.png", "few/a.png", "few/.c.png", "few/notes.txt", "more/deep/d.png", "e[1].png")
    monkeypatch.chdir(tmp_path)
    assert keys(open_source("few/*.png")) == ["few/a.png", "few/b.png"]
    assert keys(open_source("**/*.png")) == ["e[1].png", "few/a.png", "few/b.png", "more/deep/d.png"]
    assert keys(open_source(f"{tmp_path}/few/?.png", limit=1)) == [f"{tmp_path}/few/a.png"]
    assert keys(open_source("e[1].png")) == ["e[1].png"]  # a file's own name, not a pattern
    assert "1 other file (.txt 1)" in open_source("few/*").notes[0]
    with pytest.raises(SourceError, match=r"'\[fm\]\*' matches no images, but 2 folders"):
        open_source("[fm]*")
    with pytest.raises(SourceError, match=r"no file that it matches: 'few/\*\.jpg'"):
        open_source("few/*.jpg")


# ------------------------------------------------------------------------------------------------- no image at all


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.tar", "is an archive. Unpack it"),
        ("x.tar.gz", "is an archive. Unpack it"),
        ("x.ZIP", "is an archive. Unpack it"),
        ("x.npy", "is a file of arrays. Give, from Python, the array itself"),
        ("x.parquet", r"is a table. Give it as \.csv"),
        ("x.json", r"is a table. Give it as \.csv"),
        ("x.mp4", "is a film. Write its frames into a folder"),
        ("x.h5", "is a file of data. Give a Dataset"),
        ("x.py", r"is a program. .*path/file\.py:callable"),
        ("x.heic", "HEIC file, which is not decoded here. .*register_heif_opener"),
        ("x.nef", "camera raw file, which is not decoded here. Give it as PNG"),
        ("x.unknown", "no image by its extension or its first bytes. A source is a folder"),
        ("x", "no image by its extension or its first bytes. A source is a folder"),
    ],
)
def test_a_file_that_is_no_image_says_what_it_is(tmp_path, name, message):
    put(tmp_path, name)
    with pytest.raises(SourceError, match=message):
        open_source(str(tmp_path / name))


@pytest.mark.parametrize("address", ["s3://bucket/photos", "https://example.org/a.jpg", "file:///tmp/a.jpg", "gs://b"])
def test_an_address_is_no_file(address):
    with pytest.raises(SourceError, match=r"is an address: images are read from files\. Download them"):
        open_source(address)
