"""Hostile input, end to end: keys, sources, weights, files. What one module refuses by itself its own tests show."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import runs
import torch
from runs import extract, extract_until, make_photos, picture

from fmextract.cli import app
from fmextract.errors import FmextractError, FormatError, ModelError, OutputError, SampleError
from fmextract.reading import activations
from fmextract.run import packing
from fmextract.storage import digest
from fmextract.verification import verify

KEYS = [
    "plain",
    "two\nlines",
    "tab\tand \x1b[31mred\x1b[0m",
    "../../etc/passwd",
    "/absolute",
    "x" * 4000,
    "né 猫 \N{OGHAM LETTER BEITH}",
    "half \udcff a byte",
    "nul\0inside",
    "'; drop table --",
]


class Named:
    """A Dataset that names its images."""

    ids = KEYS

    def __len__(self) -> int:
        return len(KEYS)

    def __getitem__(self, row: int) -> np.ndarray:  # type: ignore[type-arg]
        if row == 1:
            raise SampleError(1, "cannot be read: \x1b]0;title\x07\nsecond line")
        return np.full((8, 8, 3), row, np.uint8)


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("hostile")
    extract(Named(), place / "named")
    packing.pack(place / "named", place / "named.h5")
    return place / "named.h5"


def test_keys_come_back_as_they_can_be_written(named: Path) -> None:
    with activations.open(named) as acts:
        for key, stored in zip(KEYS, acts.keys, strict=True):
            if "\udcff" in key or "\0" in key:
                assert stored == key.replace("\udcff", "\\udcff").replace("\0", "\\x00")
            else:
                assert stored == key
        assert acts.row("../../etc/passwd") == 3
        assert acts.row("x" * 4000) == 5
    assert verify(named).ok
    assert sorted(path.name for path in named.parent.iterdir()) == ["named", "named.h5"]


def test_nothing_of_them_reaches_the_terminal(named: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["info", str(named)], ["info", str(named), "--json"], ["verify", str(named)]):
        assert app.main(arguments) == 0
        said = "".join(capsys.readouterr())
        assert "\x1b" not in said
        assert "\x07" not in said
    assert "\nsecond line" not in said


def test_file_names_that_are_no_text(tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", 2)
    for name in (b"a\nb.png", b"caf\xe9.png", b"-rf.png"):
        try:
            Path(os.fsdecode(os.fsencode(photos) + b"/" + name)).write_bytes(picture(7))
        except OSError:
            pytest.skip("this file system holds no such names")
    extract(photos, tmp_path / "out")
    with activations.open(tmp_path / "out") as acts:
        assert set(acts.keys) == {"0000.png", "0001.png", "a\nb.png", "caf\\xe9.png", "-rf.png"}
        assert not acts.status.any()


def test_links_that_lead_in_circles_end(tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", 3)
    (photos / "up").symlink_to(photos)
    (photos / "self.png").symlink_to("self.png")
    assert extract(photos, tmp_path / "out").failed == 1
    with activations.open(tmp_path / "out") as acts:
        assert acts.keys.tolist() == ["0000.png", "0001.png", "0002.png", "self.png"]


def test_a_manifest_stays_in_its_folder(tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", 2)
    (tmp_path / "secret.png").write_bytes(picture(9))
    (photos / "list.csv").write_text("path\n0000.png\n../secret.png\n")
    with pytest.raises(FmextractError, match="leads out of the manifest's folder"):
        extract(photos / "list.csv", tmp_path / "out")
    assert extract(photos / "list.csv", tmp_path / "out", allow_outside=True).failed == 0


def test_a_crafted_weights_file_runs_no_code(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"conv.weight": Bomb()}, tmp_path / "bomb.pth")
    photos = make_photos(tmp_path / "photos", 1)
    with pytest.raises(ModelError):
        extract(photos, tmp_path / "out", model=f"{Path(runs.__file__)}:Tiny", weights=str(tmp_path / "bomb.pth"))
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------- files of a run


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("files") / "photos", 10)


@pytest.fixture(scope="module")
def begun(photos: Path) -> Path:
    extract_until(9, photos, photos.parent / "begun")
    return photos.parent / "begun"


def test_mutated_runs_raise_only_our_errors(photos: Path, begun: Path, tmp_path: Path) -> None:
    """Whatever stands in the files of a run that is taken up: it goes on rightly, or says what is wrong."""
    dice = random.Random(0)
    extract(photos, tmp_path / "whole")
    resumed = 0
    for number in range(15):
        out = Path(shutil.copytree(begun, tmp_path / f"out{number}"))
        victim = dice.choice(sorted(out.iterdir()))
        content = bytearray(victim.read_bytes())
        for _ in range(dice.choice([1, 3])):
            content[dice.randrange(len(content))] = dice.randrange(256)
        victim.write_bytes(content[: dice.choice([len(content), len(content) // 2])])
        try:
            extract(photos, out)
        except FmextractError:
            continue
        resumed += 1
        if victim.suffix == ".h5":
            runs.same(out, tmp_path / "whole")
            assert verify(out).ok
        else:  # a record may still say something wrong that only verify looks at, as a digest
            activations.open(out).close()
    assert resumed


def test_a_plan_that_leads_elsewhere_removes_nothing(photos: Path, begun: Path, tmp_path: Path) -> None:
    """--overwrite removes shards by their numbers: no name out of a file is ever joined to a path."""
    out = Path(shutil.copytree(begun, tmp_path / "out"))
    (tmp_path / "precious.h5").write_text("mine")
    for name in ("index.json", "shard-00000.json"):
        record = json.loads((out / "shard-00000.json").read_text()) | {"name": "../precious.h5"}
        (out / name).write_text(json.dumps(record if name != "index.json" else {"shards": [record]}))
    with pytest.raises(FormatError):
        activations.open(out)
    extract(photos, out, overwrite=True)
    assert (tmp_path / "precious.h5").read_text() == "mine"
    runs.same(out, out)


def test_links_in_an_output_are_not_followed_out_of_it(photos: Path, begun: Path, tmp_path: Path) -> None:
    """A temporary name is new each time: nobody can have put a link there to write through."""
    out = Path(shutil.copytree(begun, tmp_path / "out"))
    (tmp_path / "precious").write_text("mine")
    (out / "index.json").symlink_to(tmp_path / "precious")
    (out / f".shard-00002.h5.{'0' * 32}").symlink_to(tmp_path / "precious")
    try:
        extract(photos, out)
    except FmextractError:
        extract(photos, out, overwrite=True)
    assert (tmp_path / "precious").read_text() == "mine"


def crafted(path: Path, kind: str) -> None:
    with h5py.File(path, "r+", locking=False) as file:
        layer = file["layers/conv"]
        if kind == "external link":
            layer["more"] = h5py.ExternalLink("/etc/passwd", "/")
        elif kind == "soft link":
            file["layers/again"] = h5py.SoftLink("/layers/conv")
        elif kind == "cycle":
            layer["up"] = file["layers"]
        elif kind == "virtual":
            made = h5py.VirtualLayout(shape=(10, 4), dtype="f4")
            made[:] = h5py.VirtualSource("elsewhere.h5", "x", shape=(10, 4))
            file["layers"].create_group("v").create_virtual_dataset("activation", made)
        elif kind == "external storage":
            file["layers"].create_group("e").create_dataset("activation", (4,), "u1", external=[("/etc/passwd", 0, 4)])
        elif kind == "wrong shape":
            del file["status"]
            file["status"] = np.zeros(3, np.uint8)
        else:
            file["layers"].create_group("big").create_dataset("activation", (10, 2**40), "f4", chunks=(1, 2**28))


@pytest.mark.parametrize(
    "kind", ["external link", "soft link", "cycle", "virtual", "external storage", "wrong shape", "huge chunks"]
)
def test_crafted_files_are_refused_everywhere(named: Path, photos: Path, tmp_path: Path, kind: str) -> None:
    path = Path(shutil.copy(named, tmp_path / "out.h5"))
    crafted(path, kind)
    with pytest.raises(FormatError):
        activations.open(path)
    with pytest.raises(FormatError):
        digest.content_digest(path)
    assert not verify(path).ok
    content = path.read_bytes()
    with pytest.raises(OutputError):  # nor is it replaced: it is not one of ours any more
        extract(photos, path, overwrite=True)
    assert path.read_bytes() == content
