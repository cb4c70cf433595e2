"""Rows, keys and labels against what the file system, the csv module and torchvision's ImageFolder say."""

from __future__ import annotations

import csv
import json
import os
import random
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from privilege import without_privilege
from torchvision.datasets import FakeData, ImageFolder

from fmextract.common.imports import import_object
from fmextract.errors import ConfigError, SampleError, SourceError
from fmextract.inputs import files
from fmextract.inputs.files import image_extensions
from fmextract.inputs.sources import open_source
from fmextract.records import Source, Status


def put(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return folder


def keys(source: Source) -> list[str]:
    return [source.key(row) for row in range(len(source))]


def labels(source: Source) -> list[int | str | None]:
    return [source.label(row) for row in range(len(source))]


# ------------------------------------------------------------------------------------------------------ folder


def test_folder_lists_images_recursively_in_the_order_of_keys(tmp_path):
    names = ["b/z.png", "b.jpg", "b/a.JPEG", "a/deep/er/x.webp", "B.tif", "b-1.jpg", "a.b.jpg", "a.c.jpg", "ü.jpg"]
    put(tmp_path, *names, "notes.txt", "noextension", ".jpg", "b/archive.h5", "b/paper.pdf", "x.eps")
    source = open_source(tmp_path)
    assert keys(source) == sorted(names)
    assert isinstance(source, Source)
    assert labels(source) == [None] * len(names)
    assert [source.load(row).decode() for row in range(len(source))] == sorted(names)


def test_walking_directory_by_directory_gives_sorted_keys(tmp_path):
    """Names that sort differently alone and with the slash after them: "a-b" < "a/" < "a0" < "aé"."""
    rng = random.Random(2)
    parts = ["a", "a-", "a.b", "a0", "aé", "B", "-", "a b", "~"]
    wanted = {"/".join(rng.choices(parts, k=rng.randint(1, 3))) + ".jpg" for _ in range(300)}
    put(tmp_path, *wanted)
    assert keys(open_source(tmp_path)) == sorted(wanted)


def test_every_extension_that_pillow_decodes_is_looked_for():
    assert {b".jpg", b".jpeg", b".png", b".webp", b".tif", b".gif", b".bmp", b".jp2"} <= image_extensions()
    assert not {b".h5", b".pdf", b".eps", b".mpg"} & image_extensions()
    known = {extension.encode() for extension in PIL.Image.registered_extensions()}
    assert (b".avif" in known) == (b".avif" in image_extensions()), "Pillow has it from 11.3 on"
    assert image_extensions() < known


def test_limit_keeps_the_first_rows(tmp_path):
    put(tmp_path, "c.jpg", "a.jpg", "b.jpg")
    assert keys(open_source(tmp_path, limit=2)) == ["a.jpg", "b.jpg"]
    assert keys(open_source(tmp_path, limit=9)) == ["a.jpg", "b.jpg", "c.jpg"]
    with pytest.raises(ConfigError, match="--limit must be 1 or more"):
        open_source(tmp_path, limit=0)


def test_links_are_followed_and_loops_end(tmp_path):
    put(tmp_path / "real", "x.jpg", "sub/y.jpg")
    (tmp_path / "real" / "up").symlink_to(tmp_path)
    (tmp_path / "real" / "self").symlink_to(tmp_path / "real")
    (tmp_path / "again").symlink_to(tmp_path / "real" / "sub")
    (tmp_path / "file.jpg").symlink_to(tmp_path / "real" / "x.jpg")
    source = open_source(tmp_path)
    assert keys(source) == ["again/y.jpg", "file.jpg", "real/sub/y.jpg", "real/x.jpg"]
    assert source.load(1) == b"x.jpg"


def test_a_link_to_a_folder_above_brings_in_no_neighbours(tmp_path):
    put(tmp_path, "mine/a.jpg", "neighbour/b.jpg", "elsewhere/c.jpg")
    (tmp_path / "mine" / "up").symlink_to("..")
    (tmp_path / "mine" / "top").symlink_to("/")
    (tmp_path / "mine" / "more").symlink_to(tmp_path / "elsewhere")
    source = open_source(tmp_path / "mine")
    assert keys(source) == ["a.jpg", "more/c.jpg"]
    assert any("2 links to a folder above" in note for note in source.notes)


def test_what_is_not_a_file_is_a_row_that_fails(tmp_path, monkeypatch):
    put(tmp_path, "good.jpg", "folder.jpg/inside.jpg")
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "broken.jpg").symlink_to("nowhere")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(tmp_path)  # the path of a socket must be short
        listener.bind("socket.jpg")
        source = open_source(tmp_path)
        assert keys(source) == ["broken.jpg", "fifo.jpg", "folder.jpg/inside.jpg", "good.jpg", "loop.jpg", "socket.jpg"]
        for row in (0, 1, 4, 5):
            start = time.monotonic()
            with pytest.raises(SampleError) as caught:
                source.load(row)
            assert caught.value.status == Status.UNREADABLE
            assert time.monotonic() - start < 5
        with pytest.raises(SampleError, match="not a regular file"):
            source.load(1)
        with pytest.raises(SampleError, match="No such file"):
            source.load(0)


def test_a_file_that_vanishes_or_is_too_large_fails_alone(tmp_path, monkeypatch):
    put(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    source = open_source(tmp_path)
    before = source.fingerprint()
    (tmp_path / "a.jpg").unlink()
    (tmp_path / "b.jpg").write_bytes(b"x" * 100)
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 99)
    for row, message in ((0, "No such file"), (1, "100 bytes, more than the 99 allowed")):
        with pytest.raises(SampleError, match=message):
            source.load(row)
    assert source.load(2) == b"c.jpg"
    assert source.fingerprint()["sizes"] != before["sizes"]


def test_names_that_are_not_utf8_are_shown_and_loaded(tmp_path):
    raw = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    try:
        Path(os.fsdecode(raw)).write_bytes(b"data")
    except OSError:
        pytest.skip("this file system wants UTF-8 names")
    source = open_source(tmp_path)
    assert keys(source) == ["caf\\xe9.jpg"]
    assert source.load(0) == b"data"
    put(tmp_path, "caf\\xe9.jpg")
    with pytest.raises(SourceError, match=r"two files .* the same key"):
        open_source(tmp_path)


def test_folders_without_images_say_what_was_looked_for(tmp_path):
    put(tmp_path, "a.txt", "sub/b.md")
    with pytest.raises(SourceError, match=r"no images .* 2 other files.*known by their extension"):
        open_source(tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "nowhere/", "nowhere.csv", "nowhere.jpg"])
def test_missing_sources_name_what_is_missing(tmp_path, name):
    with pytest.raises(SourceError, match="nowhere"):
        open_source(str(tmp_path / name))


def test_a_folder_that_may_not_be_read_is_an_error(tmp_path):
    put(tmp_path, "a/x.jpg", "b/y.jpg")
    (tmp_path / "b").chmod(0)
    try:
        with without_privilege(), pytest.raises(SourceError, match="cannot list the folder"):
            open_source(tmp_path)
    finally:
        (tmp_path / "b").chmod(0o755)


def test_listing_failure_names_the_folder(tmp_path, monkeypatch):
    put(tmp_path, "a/x.jpg")

    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(SourceError, match=r"cannot list the folder .*Permission denied"):
        open_source(tmp_path)


def test_one_image_file_is_a_source(tmp_path):
    put(tmp_path, "x.jpg")
    source = open_source(tmp_path / "x.jpg")
    assert len(source) == 1
    assert source.load(0) == b"x.jpg"


def test_fingerprint_follows_keys_and_sizes(tmp_path):
    first = open_source(put(tmp_path / "1", "a.jpg", "bc.jpg")).fingerprint()
    same = open_source(put(tmp_path / "2", "a.jpg", "bc.jpg")).fingerprint()
    other = open_source(put(tmp_path / "3", "ab.jpg", "c.jpg")).fingerprint()
    assert {**json.loads(json.dumps(first)), "times": same["times"]} == same
    assert first["count"] == 2
    assert first["keys"] != other["keys"]
    (tmp_path / "1" / "a.jpg").write_bytes(b"longer than before")
    assert open_source(tmp_path / "1").fingerprint() == {
        **first,
        "sizes": open_source(tmp_path / "1").fingerprint()["sizes"],
        "times": open_source(tmp_path / "1").fingerprint()["times"],
    }
    assert open_source(tmp_path / "1").fingerprint() != first


def test_threads_load_what_one_thread_loads(tmp_path):
    names = [f"{row:03}.jpg" for row in range(200)]
    source = open_source(put(tmp_path, *names))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.load, range(200))) == [name.encode() for name in names]


def test_many_names_are_held_compactly():
    names = files.Names(f"folder/{row:08}.jpg".encode() for row in range(50_000))
    assert len(names) == 50_000
    assert names[49_999] == b"folder/00049999.jpg"
    held = sys.getsizeof(names._blob) + sys.getsizeof(names._ends)
    assert held < 50_000 * (19 + 8) * 1.2
    with pytest.raises(IndexError, match="expected a row from 0 to 49999, got -1"):
        names[-1]
    assert files.Names([b"ab", b"c"]).digest() != files.Names([b"a", b"bc"]).digest()


def test_no_torch_is_imported():
    code = "import sys, fmextract.inputs.files as s; s.image_extensions(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


# --------------------------------------------------------------------------------------------------- manifests


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_csv_with_keys_and_labels_in_the_order_of_the_file(tmp_path):
    put(tmp_path, "z.jpg", "sub/a.jpg")
    manifest = write_csv(
        tmp_path / "m.csv",
        [
            {"key": "second, one", "label": "10", "path": "z.jpg"},
            {"key": "a\nkey", "label": "", "path": "./sub//a.jpg"},
            {"key": "third", "label": "7", "path": "missing.jpg"},
        ],
    )
    source = open_source(manifest)
    assert keys(source) == ["second, one", "a\nkey", "third"]
    assert labels(source) == [10, None, 7]
    assert source.load(1) == b"sub/a.jpg"
    with pytest.raises(SampleError, match="No such file"):
        source.load(2)
    assert keys(open_source(manifest, limit=1)) == ["second, one"]


def test_labels_are_text_unless_all_are_integers(tmp_path):
    for given_labels, expected in ((["1", "2"], [1, 2]), (["1", "x"], ["1", "x"]), (["007", "1"], ["007", "1"])):
        rows = [{"path": f"{row}.jpg", "label": label} for row, label in enumerate(given_labels)]
        assert labels(open_source(write_csv(tmp_path / "m.csv", rows))) == expected


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("m.csv", ["path", "b.jpg", "ä/a.jpg", ""]),
        ("m.txt", ["b.jpg", "", "ä/a.jpg"]),
        ("m.jsonl", ['{"path": "b.jpg"}', '{"path": "\\u00e4/a.jpg", "label": null}', ""]),
    ],
)
def test_byte_order_marks_line_ends_and_blank_lines(tmp_path, name, lines, mark, end):
    (tmp_path / name).write_bytes((mark + end.join(lines)).encode())
    assert keys(open_source(tmp_path / name)) == ["b.jpg", "ä/a.jpg"]


def test_jsonl_keeps_types(tmp_path):
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"path": "a.jpg", "key": "k", "label": 3}\n{"path": "b.jpg", "label": 4, "more": [1]}\n')
    assert keys(open_source(manifest)) == ["k", "b.jpg"]
    assert labels(open_source(manifest)) == [3, 4]


def test_manifest_names_that_are_not_utf8(tmp_path):
    (tmp_path / "m.txt").write_bytes(b"caf\xe9.jpg\n")
    assert keys(open_source(tmp_path / "m.txt")) == ["caf\\xe9.jpg"]


@pytest.mark.parametrize("path", ["../x.jpg", "a/../../x.jpg", "/etc/passwd", ".."])
def test_paths_that_lead_outside_are_refused_unless_allowed(tmp_path, path):
    put(tmp_path, "x.jpg")
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "m.txt").write_text(f"ok.jpg\n{path}\n")
    with pytest.raises(SourceError, match=r"m\.txt, line 2: .* leads out of the manifest's folder.*--allow-outside"):
        open_source(inner / "m.txt")
    source = open_source(inner / "m.txt", allow_outside=True)
    assert len(source) == 2
    if path.endswith("x.jpg"):
        assert source.load(1) == b"x.jpg"
    (inner / "m.txt").write_text("a/../b.jpg\n..b.jpg\n")
    assert keys(open_source(inner / "m.txt")) == ["b.jpg", "..b.jpg"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.csv", "", "line 1: expected a column named `path`, found nothing"),
        ("m.csv", "file,label\na,b\n", "line 1: expected a column named `path`, found file, label"),
        ("m.csv", "path,label\na.jpg,1\nb.jpg\n", "line 3: expected 2 cells, got 1"),
        ("m.csv", 'path\n"a.jpg\n', "line 2: unexpected end of data"),
        ("m.csv", 'path\n"two\nlines.jpg"\n\n,,\n', "line 5: expected 1 cells, got 3"),
        ("m.csv", "path\n", "names no images"),
        ("m.txt", "\n\n", "names no images"),
        ("m.txt", "a.jpg\nb.jpg\n./a.jpg\n", "line 3: the key 'a.jpg' stands in line 1 already.*`key` column"),
        ("m.txt", "a\0.jpg\n", "line 1: expected a file's path"),
        ("m.csv", 'path,key\na.jpg,"k"\nb.jpg,k\n', "line 3: the key 'k' stands in line 2 already"),
        ("m.csv", "path,label\n,x\n", "line 2: expected a file's path, got ''"),
        ("m.jsonl", '{"path": "a.jpg"}\n{path}\n', "line 2: not JSON"),
        ("m.jsonl", "[" * 100_000, "line 1: not JSON"),
        ("m.jsonl", '["a.jpg"]\n', "line 1: expected an object with a text `path`"),
        ("m.jsonl", '{"path": 3}\n', "line 1: expected an object with a text `path`"),
        ("m.jsonl", '{"path": "a", "key": 3}\n', "line 1: expected a text `key`"),
        ("m.jsonl", '{"path": "\\ud800.jpg"}\n', "line 1: .* half a character"),
    ],
)
def test_manifest_errors_name_the_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(SourceError, match=message) as caught:
        open_source(tmp_path / name)
    assert len(str(caught.value)) < 600


# ------------------------------------------------------------------------------------------------------ Python


class Pairs:
    """A Dataset without lists of keys or labels, which counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __len__(self) -> int:
        return 3

    def __getitem__(self, row: int):
        self.asked += 1
        if row == 1:
            raise RuntimeError("disk on fire")
        return np.full((2, 2, 3), row, np.uint8), np.int64(row * 10)


def test_dataset_items_labels_and_failures():
    data = Pairs()
    source = open_source(data)
    assert isinstance(source, Source)
    assert keys(source) == ["000000", "000001", "000002"]
    assert (source.load(2) == 2).all()
    with pytest.raises(SampleError, match="RuntimeError: disk on fire") as caught:
        source.load(1)
    assert caught.value.status == Status.UNREADABLE
    asked = data.asked
    assert source.label(2) == 20
    assert data.asked == asked  # the label came with the image
    assert labels(source) == [0, None, 20]
    with pytest.raises(IndexError):
        source.load(3)


@pytest.mark.parametrize(
    "data",
    [
        np.zeros((4, 5, 5, 3), np.uint8),
        torch.zeros(4, 3, 5, 5),
        [b"bytes", np.zeros((5, 5), np.uint8), PIL.Image.new("RGB", (5, 5)), torch.zeros(3, 5, 5)],
        [{"image": b"a"}, {"image": b"b", "label": "cat"}, {"image": b"c", "label": 3}, {"image": b"d"}],
        FakeData(4, (3, 8, 8)),
    ],
    ids=["array", "tensor", "mixed", "dicts", "FakeData"],
)
def test_sequences_of_images(data):
    source = open_source(data)
    assert len(source) == 4
    assert keys(source)[3] == "000003"
    for row in range(4):
        assert source.load(row) is not None
    assert len(keys(open_source(data, limit=2))) == 2
    assert json.dumps(source.fingerprint())
    if isinstance(data, list) and isinstance(data[0], dict):
        assert labels(source) == [None, "cat", 3, None]
        assert source.load(0) == b"a"


def test_image_folder_keys_and_labels(tmp_path):
    for name in ("dog/b.png", "cat/x/a.png", "dog/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (4, 4)).save(tmp_path / name)
    dataset = ImageFolder(str(tmp_path))
    source = open_source(dataset)
    assert keys(source) == [os.path.relpath(path, tmp_path) for path, _ in dataset.samples]
    assert labels(source) == [label for _, label in dataset.samples]
    assert source.load(0).size == (4, 4)


def test_keys_of_the_dataset():
    class Named(list):
        ids = ("x", 7, "a\0b")
        targets = torch.tensor([1, 2, 3])

    source = open_source(Named([b"1", b"2", b"3"]))
    assert keys(source) == ["x", "7", "a\\x00b"]
    assert labels(source) == [1, 2, 3]
    for ids in (("x", "y", "x"), ("x",), ("x", None, "y"), (1.5, 2.5, 3.5)):
        Named.ids = ids  # another's meaning of the word: rows are numbered, and this is said
        source = open_source(Named([b"1", b"2", b"3"]))
        assert keys(source) == ["000000", "000001", "000002"]
        assert labels(source) == [1, 2, 3]
        assert "Named.ids does not give each item" in source.notes[0]


def test_a_list_of_paths(tmp_path, monkeypatch):
    put(tmp_path, "b.jpg", "a.jpg")
    monkeypatch.chdir(tmp_path)
    source = open_source(["b.jpg", tmp_path / "a.jpg"])
    monkeypatch.chdir("/")
    assert keys(source) == ["b.jpg", str(tmp_path / "a.jpg")]
    assert [source.load(0), source.load(1)] == [b"b.jpg", b"a.jpg"]
    with pytest.raises(SourceError, match="same key"):
        open_source(["b.jpg", "b.jpg"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (iter([1]), "expected a map-style Dataset"),
        ({"a": b"1"}, "expected a map-style Dataset"),
        (b"bytes", "expected a map-style Dataset"),
        (3, "expected a map-style Dataset"),
        ([], "is empty"),
    ],
)
def test_what_is_no_source_is_refused(data, message):
    with pytest.raises(SourceError, match=message):
        open_source(data)


def test_a_source_passes_through(tmp_path):
    source = open_source(put(tmp_path, "a.jpg", "b.jpg"))
    assert open_source(source) is source
    first = open_source(source, limit=1)
    assert keys(first) == ["a.jpg"]
    assert isinstance(first, Source)
    assert first.load(0) == b"a.jpg"
    assert first.fingerprint() != source.fingerprint()


# ------------------------------------------------------------------------------------------------------ import


def test_module_and_file_callables(tmp_path, monkeypatch):
    (tmp_path / "my_photos.py").write_text(
        "class Set(list):\n    pass\n"
        "def make():\n    return Set([b'1', b'2'])\n"
        "ready = make()\n"
        "def broken():\n    raise ValueError('no disk')\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    for text in ("my_photos:make", "my_photos:ready", "my_photos.py:make", f"{tmp_path}/my_photos.py:make"):
        assert open_source(text).load(1) == b"2", text
        assert open_source(text, limit=1).name == text
    assert sys.path == before
    with pytest.raises(SourceError, match="my_photos:broken raised ValueError: no disk"):
        open_source("my_photos:broken")
    with pytest.raises(SourceError, match="'my_photos' has no 'nothing'"):
        open_source("my_photos:nothing")
    with pytest.raises(SourceError, match=r"no file 'none.py'"):
        open_source("none.py:make")
    with pytest.raises(SourceError, match="importing 'no_such_module' raised ModuleNotFoundError"):
        open_source("no_such_module:make")


def test_import_object_follows_dots_and_wraps_errors(tmp_path):
    assert import_object("os:path.join", ConfigError, "it") is os.path.join
    (tmp_path / "bad.py").write_text("1 / 0\n")
    with pytest.raises(ConfigError, match=r"it: importing .* raised ZeroDivisionError"):
        import_object(f"{tmp_path}/bad.py:x", ConfigError, "it")
    with pytest.raises(ConfigError, match="expected module:name"):
        import_object(":x", ConfigError, "it")


def test_an_item_of_a_dataset_is_asked_for_once() -> None:
    """Its label comes with its image; one without a label, or that failed, is not asked for again."""

    class Counting:
        def __init__(self) -> None:
            self.asked: list[int] = []

        def __len__(self) -> int:
            return 3

        def __getitem__(self, row: int) -> Any:
            self.asked.append(row)
            if row == 2:
                raise ValueError("broken")
            image = np.zeros((2, 2, 3), np.uint8)
            return (image, 7) if row == 0 else image

    data = Counting()
    source = open_source(data)
    for row in range(2):
        source.load(row)
    with pytest.raises(SampleError, match="broken"):
        source.load(2)
    assert [source.label(row) for row in range(3)] == [7, None, None]
    assert data.asked == [0, 1, 2]
