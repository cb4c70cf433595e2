"""Every row says which content of a file it was made of: by whatever way its bytes were read, and only once."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import netCDF4
import numpy as np
import pytest
import runs
import xarray
import xxhash
from odd_images import jpeg
from test_device_jpegs import stand_in

from fmextract.inputs import decoding, device_jpegs, files, preprocessing
from fmextract.inputs.files import FileBytes
from fmextract.pipeline import workers
from fmextract.reading import activations
from fmextract.run import extract
from fmextract.run.packing import pack
from fmextract.storage import digest
from fmextract.verification import verify

NONE = (-1, "")


def expected(paths: Sequence[Path]) -> list[tuple[int, str]]:
    """Size and XXH3 of files, by the library itself; of one that is not there, that it is none."""
    contents = [path.read_bytes() if path.is_file() else None for path in paths]
    return [NONE if data is None else (len(data), xxhash.xxh3_128(data).hexdigest()) for data in contents]


def stamps(out: Path) -> list[tuple[int, str]]:
    with activations.open(out) as acts:
        assert acts.file_sizes.dtype == np.int64
        return list(zip(acts.file_sizes.tolist(), acts.file_digests.tolist(), strict=True))


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """PNGs and JPEGs; the third is no picture, and the last but one was cut short."""
    folder = tmp_path / "photos"
    runs.make_photos(folder, 4, bad={2: b"no picture at all"})
    (folder / "0004.jpg").write_bytes(jpeg())
    (folder / "0005.jpg").write_bytes(jpeg()[:400])
    (folder / "0006.jpg").write_bytes(jpeg())
    return sorted(folder.iterdir())


class Paths:
    """A Dataset whose items are paths, one of which leads nowhere."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = [*paths, paths[0].parent / "gone.png"]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[Path, int]:
        return self.paths[row], row


@pytest.mark.parametrize("kind", ["folder", "manifest", "paths", "dataset"])
def test_rows_of_files_have_size_and_digest(photos: list[Path], tmp_path: Path, kind: str) -> None:
    manifest = tmp_path / "photos.csv"
    manifest.write_text("path\n" + "".join(f"photos/{path.name}\n" for path in photos), encoding="utf-8")
    source: Any = {"folder": photos[0].parent, "manifest": manifest, "paths": photos, "dataset": Paths(photos)}[kind]
    runs.extract(source, tmp_path / "a.h5", max_failures="100%")
    wanted = expected(source.paths if kind == "dataset" else photos)
    assert stamps(tmp_path / "a.h5") == wanted
    with activations.open(tmp_path / "a.h5") as acts:
        assert {int(row) for row in np.flatnonzero(acts.status)} == {2, 5} | ({7} if kind == "dataset" else set())
    assert verify(tmp_path / "a.h5").ok


def test_rows_of_no_file_say_so(tmp_path: Path) -> None:
    mixed = [np.zeros((8, 8, 3), np.uint8), runs.picture(1)]  # bytes of a program are no file
    runs.extract(mixed, tmp_path / "a.h5")
    assert stamps(tmp_path / "a.h5") == [NONE, NONE]
    assert verify(tmp_path / "a.h5").ok


@pytest.fixture
def by_processes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many photos processes decoded, which a run here waits for, short as it is."""
    decoded: list[int] = []
    real = workers._Worker.decode

    @contextmanager
    def waited_for(*how: Any) -> Iterator[workers.Workers | None]:
        with workers.hired(*how) as hired:
            assert hired is None or hired.wait()
            yield hired

    def counting(self: Any, *args: Any) -> Any:
        made = real(self, *args)
        decoded.append(sum(one is not None for one in made))
        return made

    monkeypatch.setattr(workers._Worker, "decode", counting)
    monkeypatch.setattr(extract, "hired", waited_for)
    return decoded


@pytest.mark.parametrize("how", ["processes", "device", "threads"])
def test_whoever_decodes_and_nothing_is_read_twice(
    photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_processes: list[int], how: str
) -> None:
    read: list[bytes] = []
    plain = files.read_file

    def noting(path: bytes) -> FileBytes:
        if threading.current_thread().name.startswith("fmextract-decode"):  # not the probe, which looks at some
            read.append(os.path.basename(path))  # noqa: PTH119
        return plain(path)

    monkeypatch.setattr(files, "read_file", noting)
    monkeypatch.setattr(device_jpegs, "device_decoder", lambda device: stand_in)
    options = {"processes": {"worker_kind": "processes"}, "device": {"jpeg_decoder": "device"}, "threads": {}}[how]
    runs.extract(photos[0].parent, tmp_path / "a.h5", max_failures="100%", **options)
    assert stamps(tmp_path / "a.h5") == expected(photos)
    there = [os.fsencode(photo.name) for photo in photos]
    if how == "processes":
        assert sum(by_processes) == 2
        there = [name for name in there if name not in (b"0004.jpg", b"0006.jpg")]
    assert sorted(read) == there


def test_a_row_on_which_the_model_fails_still_says(photos: list[Path], tmp_path: Path) -> None:
    class Fussy(runs.Tiny):
        def forward(self, x: Any) -> Any:
            if x.shape[0] and (x[:, :, 0, 0] == self.bad).all(1).any():
                raise ValueError("not this one")
            return super().forward(x)

    model = Fussy()
    model.bad = preprocessing.normalise(
        decoding.decode(photos[1].read_bytes(), preprocessing.parse_preprocess(runs.OPTIONS["preprocess"])).pixels[
            None
        ],
        preprocessing.parse_preprocess(runs.OPTIONS["preprocess"]),
    )[0, :, 0, 0]
    runs.extract(photos[0].parent, tmp_path / "a.h5", model=model, max_failures="100%")
    with activations.open(tmp_path / "a.h5") as acts:
        assert acts.status[1] == 3
    assert stamps(tmp_path / "a.h5") == expected(photos)


def test_they_outlast_a_resume_and_packing(tmp_path: Path) -> None:
    photos = runs.make_photos(tmp_path / "photos", 12)
    runs.extract_until(8, photos, tmp_path / "shards")
    runs.extract(photos, tmp_path / "shards")
    wanted = expected(sorted(photos.iterdir()))
    assert stamps(tmp_path / "shards") == wanted
    assert verify(tmp_path / "shards").ok
    pack(tmp_path / "shards", tmp_path / "one.h5")
    assert stamps(tmp_path / "one.h5") == wanted
    assert verify(tmp_path / "one.h5").ok


def test_another_digest_is_another_content(tmp_path: Path) -> None:
    runs.extract(runs.make_photos(tmp_path / "photos", 3), tmp_path / "a.h5")
    before = digest.content_digest(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["file_digest"][1] = "0" * 32
    assert digest.content_digest(tmp_path / "a.h5") != before
    assert not verify(tmp_path / "a.h5").ok
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["file_digest"][1] = "nonsense"
    assert "/file_digest" in str(verify(tmp_path / "a.h5").problems[0])


def test_netcdf_and_xarray_read_them(photos: list[Path], tmp_path: Path) -> None:
    runs.extract(photos[0].parent, tmp_path / "a.h5", max_failures="100%")
    wanted = expected(photos)
    with netCDF4.Dataset(tmp_path / "a.h5") as file:
        assert file["file_size"].dimensions == file["file_digest"].dimensions == ("sample",)
        assert list(zip(file["file_size"][:].tolist(), file["file_digest"][:], strict=True)) == wanted
    with xarray.open_dataset(tmp_path / "a.h5", engine="h5netcdf") as data:
        assert data["file_digest"].dims == ("sample",)
        assert data["file_size"].values.tolist() == [size for size, _ in wanted]


def test_files_of_before_can_be_read_resumed_with_and_packed(tmp_path: Path) -> None:
    photos = runs.make_photos(tmp_path / "photos", 8)
    runs.extract(photos, tmp_path / "shards")
    old = tmp_path / "shards" / "shard-00000.h5"
    with h5py.File(old, "r+") as file:
        del file["file_size"], file["file_digest"]
    wanted = [NONE] * 4 + expected(sorted(photos.iterdir())[4:])
    assert stamps(tmp_path / "shards") == wanted
    pack(tmp_path / "shards", tmp_path / "one.h5")
    assert stamps(tmp_path / "one.h5") == wanted
