"""`--decode device`: which photos take that way, and what becomes of the others; a stand-in for torchcodec decodes."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch
from runs import Tiny, extract

from fmextract import demo, images, reader
from fmextract.errors import ConfigError, DeviceLost, MissingExtra
from fmextract.records import Preprocess

FIT = Preprocess(resize=40, crop=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
LEVELS = 2  # the stand-in decodes as Pillow does: only the resize may differ


def stand_in(device: torch.device) -> Callable[[list[bytes]], list[torch.Tensor]]:
    """As torchcodec does it: RGB, turned as EXIF says, RuntimeError for all of them where one is broken."""

    def decode(encoded: list[bytes]) -> list[torch.Tensor]:
        made = []
        for data in encoded:
            try:
                with PIL.Image.open(io.BytesIO(data)) as photo:
                    upright = PIL.ImageOps.exif_transpose(photo.convert("RGB"))
            except Exception as error:
                raise RuntimeError(f"cannot decode: {error}") from error
            made.append(torch.from_numpy(np.array(upright)).permute(2, 0, 1))
        return made

    return decode


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain JPEGs, and among them what must not be decoded there."""
    root = tmp_path_factory.mktemp("jpegs")
    shipped, folder = demo.copy_photos(root / "demo"), root / "photos"
    folder.mkdir()
    with PIL.Image.open(shipped / "astronaut.png") as photo:
        photo = photo.convert("RGB").resize((150, 110))
    for i in range(8):
        photo.rotate(40 * i).save(folder / f"plain{i}.jpg", quality=90)
    photo.save(folder / "a.png")
    photo.convert("L").save(folder / "grey.jpg")
    photo.convert("CMYK").save(folder / "cmyk.jpg")
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    photo.save(folder / "turned.jpg", exif=exif)
    whole = (folder / "plain0.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "broken.jpg").write_bytes(whole[:200] + b"\0" * 100 + whole[-2:])
    return folder


def here(data: bytes) -> torch.Tensor | None:
    try:
        return images.decode(data, FIT).pixels
    except Exception:
        return None


def test_each_photo_takes_its_way(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "device_decoder", stand_in)
    files = sorted(photos.iterdir())
    data = [file.read_bytes() for file in files]
    into = torch.full((len(data), 3, 32, 32), 7, dtype=torch.uint8)
    sizes = images.DeviceJpegs(torch.device("cpu")).decode(data, FIT, into)
    there = {file.name for file, size in zip(files, sizes, strict=True) if size is not None}
    assert there == {"grey.jpg", *(f"plain{i}.jpg" for i in range(8))}
    for file, size, row, encoded in zip(files, sizes, into, data, strict=True):
        if size is None:
            assert (row == 7).all(), file  # left for the CPU to fill
            continue
        assert size == (110, 150)
        expected = here(encoded)
        assert expected is not None
        assert int((row.int() - expected.int()).abs().max()) <= LEVELS, file


def values(out: Path) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    with reader.open(out) as acts:
        rows = dict(zip(acts.keys.tolist(), acts["conv"][:], strict=True))
        return rows, dict(zip(acts.keys.tolist(), acts.status.tolist(), strict=True))


def test_a_run_gives_the_others_as_the_cpu_does(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"preprocess": "size=40,crop=32,mean=0.5,std=0.5", "max_failures": 10}
    extract(photos, tmp_path / "cpu.h5", model=Tiny(), **options)
    monkeypatch.setattr(images, "device_decoder", stand_in)
    extract(photos, tmp_path / "device.h5", model=Tiny(), decode="device", **options)
    (cpu, status), (device, again) = values(tmp_path / "cpu.h5"), values(tmp_path / "device.h5")
    assert status == again
    assert {key for key, code in status.items() if code} == {"cut.jpg", "broken.jpg"}
    for key in ("a.png", "cmyk.jpg", "turned.jpg"):
        np.testing.assert_array_equal(device[key], cpu[key])
    for key in ("plain0.jpg", "grey.jpg"):
        np.testing.assert_allclose(device[key], cpu[key], atol=27 * LEVELS / 127.5)
    with reader.open(tmp_path / "device.h5") as acts:
        assert acts.config["options"]["decode"] == "device"


def test_a_device_without_memory_ends_the_run(monkeypatch: pytest.MonkeyPatch, photos: Path) -> None:
    def full(device: torch.device) -> Callable[[list[bytes]], list[torch.Tensor]]:
        def decode(encoded: list[bytes]) -> list[torch.Tensor]:
            raise torch.OutOfMemoryError("out of memory")

        return decode

    monkeypatch.setattr(images, "device_decoder", full)
    into = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(DeviceLost, match="--decode cpu"):
        images.DeviceJpegs(torch.device("cpu")).decode([(photos / "plain0.jpg").read_bytes()], FIT, into)


def test_what_cannot_be_is_said_before_anything_begins(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="on CUDA only, and this run is on cpu"):
        extract(photos, tmp_path / "a.h5", decode="device")
    with pytest.raises(ConfigError, match="--decode"):
        extract(photos, tmp_path / "a.h5", decode="gpu")
    monkeypatch.setitem(__import__("sys").modules, "torchcodec.decoders", None)
    with pytest.raises(MissingExtra, match="torchcodec"):
        images.device_decoder(torch.device("cuda"))
    monkeypatch.setattr(images, "device_decoder", stand_in)
    with pytest.raises(ConfigError, match="bilinear only"):
        extract(
            photos, tmp_path / "a.h5", decode="device",
            preprocess="size=40,crop=32,mean=0.5,std=0.5,interpolation=bicubic",
        )  # fmt: skip
    assert not (tmp_path / "a.h5").exists()


@pytest.mark.gpu
def test_torchcodec_is_near_pillow(photos: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no accelerator")
    pytest.importorskip("torchcodec")
    data = [file.read_bytes() for file in sorted(photos.glob("plain*.jpg"))]
    into = torch.zeros(len(data), 3, 32, 32, dtype=torch.uint8)
    sizes = images.DeviceJpegs(torch.device("cuda", 0)).decode(data, FIT, into)
    assert None not in sizes
    for row, encoded in zip(into, data, strict=True):
        expected = here(encoded)
        assert expected is not None
        assert float((row.float() - expected.float()).abs().mean()) < 2.0
