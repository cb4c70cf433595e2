"""JPEGs decoded on a device, against Pillow and torchvision, and odd files against the CPU's own path.

On the CPU the device's decoder is torchcodec's for the CPU where that is installed, else Pillow, turned by EXIF as
torchcodec does. On a GPU it is the real one.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import runs
import torch
from odd_images import jpeg, odd_images, photo, with_orientation
from PIL import ImageOps
from torchvision.transforms import functional as v1

from fmextract.errors import ConfigError, DeviceLost, MissingExtra, OutputError
from fmextract.inputs import device_jpegs
from fmextract.pipeline import decode
from fmextract.reading import activations
from fmextract.records import FileStamp, Preprocess
from fmextract.verification import verify

try:
    from torchcodec.decoders import decode_jpeg
except (ImportError, OSError, RuntimeError):
    decode_jpeg = None

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")

CPU = torch.device("cpu")
USUAL = Preprocess(resize=64, crop=(56, 56))
PADDED = Preprocess(resize=40, crop=(57, 65))  # not the same on both sides
SQUEEZED = Preprocess(resize=(56, 64), crop=None)


def stand_in(encoded: list[bytes]) -> list[torch.Tensor]:
    """What torchcodec gives for a list; RuntimeError for all of it where one is broken."""
    if decode_jpeg is not None:
        made: list[torch.Tensor] = decode_jpeg(encoded, mode="RGB")
        return made
    try:
        pictures = [ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(one))).convert("RGB") for one in encoded]
    except OSError as error:
        raise RuntimeError("Image is incomplete or truncated.") from error
    return [torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures]


@pytest.fixture
def jpegs(monkeypatch: pytest.MonkeyPatch) -> device_jpegs.DeviceJpegs:
    monkeypatch.setattr(device_jpegs, "device_decoder", lambda device: stand_in)
    return device_jpegs.DeviceJpegs(CPU)


def reference(data: bytes, preprocess: Preprocess) -> torch.Tensor:
    """uint8 (3, h, w) by Pillow and torchvision's functions on its image."""
    size = [preprocess.resize] if isinstance(preprocess.resize, int) else list(preprocess.resize)
    image = v1.resize(PIL.Image.open(io.BytesIO(data)).convert("RGB"), size)
    return v1.pil_to_tensor(v1.center_crop(image, preprocess.crop) if preprocess.crop else image)


def buffer(rows: int, preprocess: Preprocess) -> torch.Tensor:
    return torch.full((rows, 3, *preprocess.size), 77, dtype=torch.uint8)


def off(made: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return (made.to(torch.int16) - expected.to(torch.int16)).abs()


PLAIN = {
    "photo": jpeg(),
    "portrait": jpeg(photo(300, 451)),
    "small": jpeg(photo(30, 20)),
    "progressive": jpeg(progressive=True),
    "444": jpeg(subsampling=0),
    "grey": jpeg(photo().convert("L")),
    "exif that turns nothing": with_orientation(photo(), 1),
}


@pytest.mark.parametrize("preprocess", [USUAL, PADDED, SQUEEZED])
def test_plain_jpegs_are_within_two_levels_of_pillow(jpegs: device_jpegs.DeviceJpegs, preprocess: Preprocess) -> None:
    into = buffer(len(PLAIN), preprocess)
    sizes = jpegs.decode(list(PLAIN.values()), preprocess, into)
    for data, size, made in zip(PLAIN.values(), sizes, into, strict=True):
        assert size is not None
        assert size[:2] == PIL.Image.open(io.BytesIO(data)).size[::-1]
        assert off(made, reference(data, preprocess)).max() <= 2


ODD = {odd.name: odd.data for odd in odd_images()}
ODD |= {f"turned {turn}": with_orientation(photo(90, 60), turn) for turn in range(2, 9)}
LEFT = ("cmyk.jpg", "half.jpg", "no_end_marker.jpg", "half_progressive.jpg", "twelve_bit.jpg", "large.jpg")


def test_what_is_not_plain_is_left_untouched(jpegs: device_jpegs.DeviceJpegs) -> None:
    """Of all odd files the device takes JPEGs only, and none that is turned, cut short, huge or of other colours."""
    names = list(ODD)
    into = buffer(len(names), USUAL)
    sizes = dict(zip(names, jpegs.decode(list(ODD.values()), USUAL, into), strict=True))
    taken = {name for name, size in sizes.items() if size is not None}
    assert "plain.jpg" in taken
    assert all(name.endswith(".jpg") for name in taken)
    assert not taken & {*LEFT, *(name for name in names if name.startswith("turned"))}
    assert all((made == 77).all() for name, made in zip(names, into, strict=True) if name not in taken)


def test_one_that_the_device_refuses_leaves_the_others_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def refusing(encoded: list[bytes]) -> list[torch.Tensor]:
        calls.append(len(encoded))
        if PLAIN["444"] in encoded:
            raise RuntimeError("unsupported subsampling")
        return stand_in(encoded)

    monkeypatch.setattr(device_jpegs, "device_decoder", lambda device: refusing)
    sizes = device_jpegs.DeviceJpegs(CPU).decode(list(PLAIN.values()), USUAL, buffer(len(PLAIN), USUAL))
    assert [name for name, size in zip(PLAIN, sizes, strict=True) if size is None] == ["444"]
    assert calls == [len(PLAIN)] + [1] * len(PLAIN)


def test_half_a_photo_is_not_given_to_a_device_that_would_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def lenient(encoded: list[bytes]) -> list[torch.Tensor]:
        return [torch.zeros((3, 300, 451), dtype=torch.uint8) for _ in encoded]

    monkeypatch.setattr(device_jpegs, "device_decoder", lambda device: lenient)
    data = [jpeg(), ODD["half.jpg"], ODD["no_end_marker.jpg"], ODD["half_progressive.jpg"]]
    decoded = device_jpegs.DeviceJpegs(CPU).decode(data, USUAL, buffer(4, USUAL))
    assert decoded == [(300, 451, FileStamp()), None, None, None]


def test_a_device_without_memory_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(encoded: list[bytes]) -> list[torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(device_jpegs, "device_decoder", lambda device: full)
    with pytest.raises(DeviceLost, match="--jpeg-decoder cpu"):
        device_jpegs.DeviceJpegs(CPU).decode([jpeg()], USUAL, buffer(1, USUAL))


# ---------------------------------------------------------------------------------------------------- whole runs

OPTIONS: dict[str, Any] = {"preprocess": "size=64,crop=56,mean=0.5,std=0.5", "max_failures": 1000}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number, data in enumerate([*PLAIN.values(), *ODD.values()]):
        (folder / f"{number:03}.jpg").write_bytes(data)
    return folder


@pytest.mark.parametrize("exif", [False, True])
def test_a_mixed_run_gives_what_the_cpu_gives(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exif: bool
) -> None:
    """Statuses, messages and sizes are equal; pixels of odd rows equal, of plain ones within two levels."""
    seen: dict[str, dict[int, torch.Tensor]] = {"cpu": {}, "device": {}}
    taken: set[int] = set()
    plain = decode.Decoder._load_and_decode
    monkeypatch.setattr(device_jpegs, "device_decoder", lambda device: stand_in)
    for where in seen:

        def noting(self: Any, rows: range, into: torch.Tensor, where: str = where) -> Any:
            outcomes = plain(self, rows, into)
            seen[where].update({row: into[i].clone() for i, row in enumerate(rows)})
            if where == "device":
                sizes = self._work.jpegs.decode([self._loaded(r) for r in rows], self._work.preprocess, into.clone())
                taken.update(row for row, size in zip(rows, sizes, strict=True) if size is not None)
            return outcomes

        monkeypatch.setattr(decode.Decoder, "_load_and_decode", noting)
        options = {**OPTIONS, "jpeg_decoder": where, "exif": exif, "batch_size": 64}  # several rows a task
        runs.extract(mixed, tmp_path / f"{where}.h5", **options)
    with activations.open(tmp_path / "cpu.h5") as a, activations.open(tmp_path / "device.h5") as b:
        assert set(a.status) == {0, 2}
        for column in ("keys", "status", "messages", "heights", "widths"):
            np.testing.assert_array_equal(getattr(a, column), getattr(b, column))
    assert taken >= set(range(len(PLAIN)))
    for row, expected in seen["cpu"].items():
        assert off(seen["device"][row], expected).max() <= (2 if row in taken else 0)


def test_a_source_that_cannot_load_a_row_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Photos:
        def __len__(self) -> int:
            return 8

        def __getitem__(self, row: int) -> bytes:
            if row == 3:
                raise OSError("the disk is on fire")
            return jpeg()

    monkeypatch.setattr(device_jpegs, "device_decoder", lambda device: stand_in)
    result = runs.extract(Photos(), tmp_path / "out.h5", jpeg_decoder="device", **OPTIONS)
    assert [message for _, message in result.failures] == ["OSError: the disk is on fire"]


def test_files_that_a_dataset_names_are_decoded_there_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Paths:
        def __len__(self) -> int:
            return 8

        def __getitem__(self, row: int) -> Path:
            return tmp_path / ("missing.jpg" if row == 5 else "photo.jpg")

    there: list[bytes] = []

    def counting(data: list[bytes]) -> list[torch.Tensor]:
        there.extend(data)
        return stand_in(data)

    (tmp_path / "photo.jpg").write_bytes(jpeg())
    monkeypatch.setattr(device_jpegs, "device_decoder", lambda device: counting)
    result = runs.extract(Paths(), tmp_path / "out.h5", jpeg_decoder="device", **OPTIONS)
    assert len(there) == 7
    assert [message for _, message in result.failures] == ["No such file or directory"]


def test_a_resume_with_the_other_decoder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_jpegs, "device_decoder", lambda device: stand_in)
    photos = runs.make_photos(tmp_path / "photos", 12, bad=dict.fromkeys(range(12), PLAIN["photo"]))
    runs.extract_until(8, photos, tmp_path / "out", jpeg_decoder="device")
    with pytest.raises(OutputError, match="jpeg_decoder"):
        runs.extract(photos, tmp_path / "out", jpeg_decoder="cpu")
    assert runs.extract(photos, tmp_path / "out", jpeg_decoder="device").resumed_images >= 4


def test_a_verification_decodes_as_the_run_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def counting(encoded: list[bytes]) -> list[torch.Tensor]:
        asked.append(len(encoded))
        return stand_in(encoded)

    monkeypatch.setattr(device_jpegs, "device_decoder", lambda device: counting)
    photos = runs.make_photos(tmp_path / "photos", 12, bad=dict.fromkeys(range(12), PLAIN["photo"]))
    runs.extract(photos, tmp_path / "out.h5", jpeg_decoder="device")
    before = len(asked)
    report = verify(tmp_path / "out.h5", rerun=12, source=photos, model=runs.Tiny())
    assert (report.rerun, report.largest_error) == (12, 0.0)
    assert sum(asked[before:]) >= 12


# ------------------------------------------------------------------------------------------------------ messages


def test_without_a_gpu_it_says_so_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--jpeg-decoder device: .*CUDA only.*cpu"):
        runs.extract([jpeg()], tmp_path / "out.h5", jpeg_decoder="device", model="no such model")
    assert not (tmp_path / "out.h5").exists()


def test_without_the_library_it_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchcodec.decoders", None)
    with pytest.raises(MissingExtra, match=r"fmextract\[torchcodec\]"):
        device_jpegs.device_decoder(torch.device("cuda"))


def test_a_bicubic_resize_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_jpegs, "device_decoder", lambda device: stand_in)
    preprocess = "size=8,mean=0.5,std=0.5,interpolation=bicubic"
    with pytest.raises(ConfigError, match="interpolation=bilinear"):
        runs.extract([jpeg()], tmp_path / "out.h5", jpeg_decoder="device", preprocess=preprocess)


def test_an_unknown_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="--jpeg-decoder 'gpu': expected one of cpu, device"):
        runs.Config.of(jpeg_decoder="gpu")


# --------------------------------------------------------------------------------------------------- on a real GPU


@pytest.mark.gpu
@pytest.mark.skipif(decode_jpeg is None, reason="torchcodec is not installed beside the CUDA device")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")
@pytest.mark.parametrize("preprocess", [USUAL, PADDED, SQUEEZED])
def test_on_cuda_plain_jpegs_are_near_pillow(preprocess: Preprocess) -> None:
    """On average within two levels; a pixel within 32, as chroma upsampling is the device's own."""
    into = buffer(len(PLAIN), preprocess)
    sizes = device_jpegs.DeviceJpegs(torch.device("cuda", 0)).decode(list(PLAIN.values()), preprocess, into)
    assert None not in sizes
    for data, made in zip(PLAIN.values(), into, strict=True):
        wrong = off(made, reference(data, preprocess)).float()
        assert wrong.mean() <= 2
        assert wrong.max() <= 32
