"""Files that a Dataset reads by itself: written anew, they make another run; touched or copied, they do not."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from runs import Notes, extract

from fmextract.errors import OutputError

ROWS = 8
PIXELS = np.random.default_rng(0).integers(0, 255, (ROWS, 8, 8, 3)).astype(np.uint8)
WHERE = [Path()]


class Items:
    def __len__(self) -> int:
        return ROWS


class Listed(Items):
    def __init__(self, folder: Path) -> None:
        self.files = sorted(map(str, folder.glob("*.npy")))

    def __getitem__(self, row: int) -> Any:
        return np.load(self.files[row])


class Nested(Items):
    def __init__(self, folder: Path) -> None:
        self.parts = {"train": [{"file": path} for path in sorted(folder.glob("*.npy"))]}

    def __getitem__(self, row: int) -> Any:
        return np.load(self.parts["train"][row]["file"])


class InFolder(Items):
    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __getitem__(self, row: int) -> Any:
        return np.load(f"{self.folder}/{row}.npy")


class InGlobalFolder(Items):
    def __init__(self, folder: Path) -> None:
        WHERE[0] = folder

    def __getitem__(self, row: int) -> Any:
        return np.load(WHERE[0] / f"{row}.npy")


class OneFile(Items):
    def __init__(self, folder: Path) -> None:
        self.path = folder / "all.h5"

    def __getitem__(self, row: int) -> Any:
        with h5py.File(self.path) as file:
            return file["pixels"][row]


class OpenFile(Items):
    def __init__(self, folder: Path) -> None:
        self.file = h5py.File(folder / "all.h5")

    def __getitem__(self, row: int) -> Any:
        return self.file["pixels"][row]


class RawFile(Items):
    def __init__(self, folder: Path) -> None:
        self.file = (folder / "all.raw").open("rb")

    def __del__(self) -> None:
        self.file.close()

    def __getitem__(self, row: int) -> Any:
        self.file.seek(row * PIXELS[0].nbytes)
        return np.frombuffer(self.file.read(PIXELS[0].nbytes), np.uint8).reshape(8, 8, 3)


KINDS = [Listed, Nested, InFolder, InGlobalFolder, OneFile, OpenFile, RawFile]


def write(folder: Path, pixels: np.ndarray[Any, Any]) -> None:
    for row, image in enumerate(pixels):
        np.save(folder / f"{row}.npy", image)
    with h5py.File(folder / "all.h5", "w") as file:
        file.create_dataset("pixels", data=pixels, track_times=False)
    (folder / "all.raw").write_bytes(pixels.tobytes())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_one_image_in_the_middle_that_is_another(kind: Callable[[Path], Any], tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out.h5"
    data.mkdir()
    write(data, PIXELS)
    extract(kind(data), out)
    changed = PIXELS.copy()
    changed[4] = 255 - changed[4]
    write(data, changed)
    with pytest.raises(OutputError, match=r"\(row 4\) differs"):
        extract(kind(data), out)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_files_that_were_only_touched_are_the_same(kind: Callable[[Path], Any], tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write(data, PIXELS)
    extract(kind(data), tmp_path / "out.h5")
    for path in data.iterdir():
        os.utime(path, ns=(1, 1))
    notes = Notes()
    extract(kind(data), tmp_path / "out.h5", notes=notes)
    assert "is complete already" in notes


class Logging(InFolder):
    """Writes a log beside its images."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.log = folder / "log.txt"

    def __getitem__(self, row: int) -> Any:
        with self.log.open("a") as file:
            file.write(f"{row}\n")
        return super().__getitem__(row)


@pytest.mark.parametrize("out", ["out.h5", "out"])
def test_what_a_dataset_and_the_run_write_beside_the_images_is_no_other_run(out: str, tmp_path: Path) -> None:
    write(tmp_path, PIXELS)
    (tmp_path / "log.txt").touch()
    extract(Logging(tmp_path), tmp_path / out)
    notes = Notes()
    extract(Logging(tmp_path), tmp_path / out, notes=notes)
    assert "is complete already" in notes
    notes = Notes()
    extract(InFolder(tmp_path), tmp_path / "quiet.h5")
    extract(InFolder(tmp_path), tmp_path / "quiet.h5", notes=notes)
    assert "is complete already" in notes
    assert "is not as it was" not in notes


class Labelled(Items):
    def __init__(self, path: Path) -> None:
        self.folder = path.parent

    def __getitem__(self, row: int) -> Any:
        return PIXELS[row], (self.folder / "labels.txt").read_text()[row]


def test_labels_out_of_a_file_that_is_another(tmp_path: Path) -> None:
    labels, out = tmp_path / "labels.txt", tmp_path / "out.h5"
    labels.write_text("abcdefgh")
    extract(Labelled(labels), out)
    labels.write_text("abcdxfgh")
    with pytest.raises(OutputError, match="'000004' had the label 'e', and has 'x' now"):
        extract(Labelled(labels), out)


def test_another_function_takes_the_labels_out_of_the_items(tmp_path: Path) -> None:
    def label(share: int) -> Any:
        return lambda row, item: int(item.sum()) % share

    extract(InMemory(), tmp_path / "out.h5", label=label(7))
    notes = Notes()
    extract(InMemory(), tmp_path / "out.h5", label=label(7), notes=notes)
    assert "is complete already" in notes
    with pytest.raises(OutputError, match="share: 7 there, 5 now"):
        extract(InMemory(), tmp_path / "out.h5", label=label(5))


class InMemory(Items):
    def __getitem__(self, row: int) -> Any:
        return PIXELS[row]


class ByEnvironment(Items):
    def __getitem__(self, row: int) -> Any:
        return PIXELS[row] // int(os.environ.get("FMEXTRACT_TEST_SHARE", "1"))


def test_the_environment_is_named_as_not_compared(tmp_path: Path) -> None:
    extract(ByEnvironment(), tmp_path / "out.h5")
    notes = Notes()
    extract(ByEnvironment(), tmp_path / "out.h5", notes=notes)
    assert "source: os.environ (the environment)" in notes
