"""Decoding against Pillow, resize and crop against torchvision's own transforms on PIL images."""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import skimage.data
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from odd_images import encode, jpeg, odd_images, photo, png_claiming, sixteen_bit, with_orientation, write_all
from PIL import ImageOps
from torchvision import models
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms import functional as v1
from torchvision.transforms._presets import ImageClassification

from fmextract.errors import ConfigError, SampleError
from fmextract.inputs import decoding
from fmextract.inputs.decoding import decode
from fmextract.inputs.preprocessing import CustomPreprocess, apply_size, normalise, parse_preprocess
from fmextract.records import Preprocess, Status

# pytest turns warnings into errors after `decoding` has asked for Pillow's to be ignored, and so undoes that;
# test_nothing_leaks checks the real thing in a process of its own.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")

USUAL = Preprocess(resize=256, crop=(224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
NO_CHANGE = Preprocess(resize=None, crop=None)


def reference(image: PIL.Image.Image, preprocess: Preprocess) -> torch.Tensor:
    """uint8 (3, h, w) by torchvision's functions on a PIL image, as its presets apply them."""
    if preprocess.resize is not None:
        size = preprocess.resize if isinstance(preprocess.resize, tuple) else [preprocess.resize]
        image = v1.resize(image, list(size), interpolation=InterpolationMode(preprocess.interpolation))
    if preprocess.crop is not None:
        image = v1.center_crop(image, list(preprocess.crop))
    return v1.pil_to_tensor(image)


def levels(one: torch.Tensor, other: torch.Tensor) -> int:
    assert one.shape == other.shape
    return int((one.int() - other.int()).abs().max())


def opened(data: bytes) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(data))


# ------------------------------------------------------------------------------------------------- what decodes


@pytest.mark.parametrize("odd", odd_images(), ids=lambda odd: odd.name)
def test_odd_file_decodes_as_pillow_does_or_is_refused(odd):
    if not odd.decodes:
        with pytest.raises(SampleError) as caught:
            decode(odd.data, USUAL)
        assert caught.value.status == Status.UNDECODABLE
        assert 0 < len(str(caught.value)) < 300
        assert "0x" not in str(caught.value)
        return
    made = decode(odd.data, USUAL)
    image = opened(odd.data)
    image.load()  # before Pillow 11 a TIFF is turned, and has its size, only then
    assert made.decoder == odd.decoder
    assert (made.width, made.height) == image.size
    assert made.pixels.dtype == torch.uint8
    assert made.pixels.shape == (3, 224, 224)
    assert made.pixels.is_contiguous()
    if image.mode not in ("I;16", "I", "F"):
        assert levels(made.pixels, reference(image.convert("RGB"), USUAL)) <= 1


@pytest.mark.parametrize("name", ["chelsea", "astronaut", "coffee", "camera", "rocket"])
@pytest.mark.parametrize(
    "options", [{"quality": 75}, {"quality": 95, "subsampling": 0}, {"progressive": True}], ids=str
)
def test_fast_jpeg_gives_the_pixels_of_pillow(name, options):
    data = jpeg(PIL.Image.fromarray(getattr(skimage.data, name)()), **options)
    made = decode(data, NO_CHANGE)
    assert made.decoder == "simplejpeg"
    assert levels(made.pixels, v1.pil_to_tensor(opened(data).convert("RGB"))) <= 1


def test_damaged_jpegs_fare_as_pillow_has_it():
    """What the fast path accepts, Pillow accepts too, with the same pixels; what Pillow refuses is refused."""
    rng = random.Random(5)
    plain, progressive = jpeg(photo(90, 60)), jpeg(photo(90, 60), progressive=True, quality=60)
    seen = {"simplejpeg": 0, "pillow": 0, "refused": 0}
    for turn in range(1000):
        data = bytearray(plain if turn % 2 else progressive)
        for _ in range(rng.choice((1, 1, 3))):
            data[rng.randrange(2, len(data) if rng.random() < 0.5 else 700)] = rng.randrange(256)
        try:
            expected = v1.pil_to_tensor(opened(data).convert("RGB"))
        except Exception:
            expected = None
        try:
            made = decode(bytes(data), NO_CHANGE)
        except SampleError:
            assert expected is None
            seen["refused"] += 1
        else:
            seen[made.decoder] += 1
            assert expected is not None
            assert levels(made.pixels, expected) <= 1
    assert min(seen.values()) > 30, seen


@settings(deadline=None, max_examples=150, derandomize=True)
@given(st.data())
def test_no_bytes_raise_anything_but_a_sample_error(data):
    original = data.draw(st.sampled_from(odd_images())).data[:5000]
    start = data.draw(st.integers(0, len(original)))
    changed = original[:start] + data.draw(st.binary(max_size=40)) + original[start + data.draw(st.integers(0, 20)) :]
    try:
        made = decode(changed, USUAL)
    except SampleError:
        return
    assert made.pixels.shape == (3, 224, 224)


@pytest.mark.parametrize("data", [jpeg(photo(200, 100)), encode(photo(200, 100), "PNG")], ids=["jpeg", "png"])
def test_bombs_are_refused_at_the_limit(data, monkeypatch):
    small = Preprocess(resize=8, crop=(8, 8))
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 200 * 100)
    assert decode(data, small).width == 200
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 200 * 100 - 1)
    with pytest.raises(SampleError, match="200 x 100 pixels, more than the 19999 allowed"):
        decode(data, small)


@pytest.mark.parametrize("orientation", range(9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied_on_demand_only(orientation, kind):
    data = with_orientation(photo(90, 60), orientation, kind)
    image = opened(data)
    assert levels(decode(data, NO_CHANGE).pixels, v1.pil_to_tensor(image)) == 0
    upright = ImageOps.exif_transpose(image)
    made = decode(data, NO_CHANGE, exif=True)
    assert levels(made.pixels, v1.pil_to_tensor(upright)) == 0
    assert (made.width, made.height) == upright.size


def test_a_tiff_is_turned_once():
    data = with_orientation(photo(90, 60), 6, "TIFF")
    assert levels(decode(data, NO_CHANGE).pixels, decode(data, NO_CHANGE, exif=True).pixels) == 0


# ------------------------------------------------------------------------------------------------ pixel formats


@pytest.mark.parametrize("name", ["grey16.png", "grey16.tif", "grey16.pgm"])
def test_sixteen_bit_grey_keeps_its_levels(name):
    data = next(odd.data for odd in odd_images() if odd.name == name)
    expected = np.rint(sixteen_bit().astype(np.float64) / 257).astype(np.uint8)
    assert (decode(data, NO_CHANGE).pixels.numpy() == expected).all()
    assert expected.max() == 255
    assert len(np.unique(expected)) == 256


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 100.0, 255.0], [0, 100, 255]),
        ([float("nan"), 0.25, 1.0], [64, 64, 255]),
    ],
)
def test_float_images_are_those_from_0_to_1_or_to_255(values, expected):
    data = encode(PIL.Image.fromarray(np.array([values], np.float32)), "TIFF")
    assert decode(data, NO_CHANGE).pixels[0, 0].tolist() == expected


def test_integer_images_are_those_of_sixteen_bits():
    data = encode(PIL.Image.fromarray(np.array([[0, 257, 65535]], np.int32)), "TIFF")
    assert opened(data).mode == "I"
    assert decode(data, NO_CHANGE).pixels[0, 0].tolist() == [0, 1, 255]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.float32([-10, 0, 10]), "mode F lie from -10 to 10; expected 0 to 1, or 0 to 255. Scale all images alike"),
        (np.float32([0, 1000, 2000]), "mode F lie from 0 to 2000"),
        (np.float32([np.nan, np.inf, np.nan]), "mode F lie from inf"),
        (np.int32([0, 65536, 131072]), "mode I lie from 0 to 131072; expected 0 to 65535"),
        (np.int32([-128, 0, 127]), "mode I lie from -128 to 127"),
    ],
)
def test_no_image_gets_a_scale_of_its_own(values, message):
    """Two rows would not be comparable: refused, as an array of such values is."""
    with pytest.raises(SampleError, match=message) as caught:
        decode(encode(PIL.Image.fromarray(values[None]), "TIFF"), NO_CHANGE)
    assert caught.value.status == Status.UNDECODABLE


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_wide_grey_is_what_its_eight_bits_are(kind):
    """Pillow's convert("RGB"), and with it torchvision's loader, makes white of everything above 255, and black of
    fractions; so what is compared with is the picture that was made wide."""
    eight = np.random.default_rng(0).integers(0, 256, (6, 7), np.uint8)
    wide = PIL.Image.fromarray((eight / 255).astype(kind) if kind == np.float32 else eight.astype(kind) * kind(257))
    right = v1.pil_to_tensor(PIL.Image.fromarray(eight).convert("RGB"))
    assert torch.equal(decode(encode(wide, "TIFF"), NO_CHANGE).pixels, right)
    assert torch.equal(decode(wide, NO_CHANGE).pixels, right)
    assert levels(v1.pil_to_tensor(wide.convert("RGB")), right) > 200


# ------------------------------------------------------------------------------------------ arrays and tensors

HWC = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
CHW = HWC.transpose(2, 0, 1)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (HWC, CHW),
        (CHW, CHW),
        (torch.from_numpy(CHW.copy()), CHW),
        (torch.from_numpy(HWC), CHW),
        (PIL.Image.fromarray(HWC), CHW),
        (HWC[..., 0], np.repeat(CHW[:1], 3, 0)),
        (HWC[..., :1], np.repeat(CHW[:1], 3, 0)),
        (np.dstack([HWC, HWC[..., 0]]), CHW),
        (HWC.astype(np.uint16) * 257, CHW),
        (np.ascontiguousarray(HWC[::-1])[::-1], CHW),
        (HWC[:3], HWC[:3].transpose(2, 0, 1)),  # 3 x 30 x 3: an array's channels are its last axis
        (torch.from_numpy(CHW[:, :, :3].copy()), CHW[:, :, :3]),  # 3 x 20 x 3: a tensor's are its first
        (HWC / 255, CHW),
        ((HWC / 255).astype(np.float32), CHW),
        (CHW / 255, CHW),
        (HWC.astype(np.int64), CHW),
        (torch.from_numpy(CHW.astype(np.int32)), CHW),
        (HWC.astype(">u2") * 257, CHW),
        (HWC.astype(">i4"), CHW),
        (HWC > 99, (CHW > 99) * np.uint8(255)),
        (torch.from_numpy(CHW > 99), (CHW > 99) * np.uint8(255)),
        (np.zeros((5, 5)), np.zeros((3, 5, 5), np.uint8)),
    ],
)
def test_arrays_tensors_and_pil_images(data, expected):
    made = decode(data, NO_CHANGE)
    assert made.decoder == "array"
    assert not made.ready
    assert (made.pixels.numpy() == expected).all()
    assert (made.height, made.width) == expected.shape[1:]


def test_pixels_are_a_copy():
    array = HWC.copy()
    made = decode(array, NO_CHANGE)
    array[:] = 0
    assert (made.pixels.numpy() == CHW).all()
    array.setflags(write=False)  # torch warns of such arrays
    assert (decode(array, Preprocess(resize=8, crop=(8, 8))).pixels == 0).all()


@pytest.mark.parametrize(
    "data",
    [
        HWC.astype(np.float32),
        HWC.astype(np.float64) / 255 - 0.5,
        np.where(HWC > 3, HWC / 255, np.nan),
        HWC.astype(np.int64) + 1,
        HWC.astype(np.int16) - 1,
        HWC.astype(np.complex64),
        HWC.astype(object),
        HWC[None],
        np.zeros((5, 5, 2), np.uint8),
        np.zeros((0, 5, 3), np.uint8),
        torch.zeros(2, 5, 5, dtype=torch.uint8),
        "a.jpg",
        None,
        {"image": HWC},
    ],
    ids=lambda data: type(data).__name__,
)
def test_what_is_no_image_is_refused_with_its_shape_or_type(data):
    with pytest.raises(SampleError, match="expected") as caught:
        decode(data, USUAL)
    assert caught.value.status == Status.UNDECODABLE


def test_float_tensors_are_inputs_already():
    values = torch.randn(5, 224, 224, dtype=torch.float64)
    for preprocess in (USUAL, None):
        made = decode(values, preprocess)
        assert made.ready
        assert made.pixels.dtype == torch.float32
        assert torch.equal(made.pixels, values.float())
    with pytest.raises(SampleError, match=r"expected an input of 224 x 224 .* got 224 x 200"):
        decode(values[..., :200], USUAL)
    with pytest.raises(SampleError, match="expected a float tensor"):
        decode(values[None, None], USUAL)


def test_images_without_preprocessing_show_the_option():
    with pytest.raises(ConfigError, match="--preprocess"):
        decode(jpeg(), None)


def test_custom_preprocessing_gets_an_rgb_image():
    preset = ImageClassification(crop_size=64, resize_size=70)
    custom = CustomPreprocess(preset, "tests:preset", (64, 64))
    made = decode(jpeg(photo().convert("L")), custom)
    assert made.ready
    assert (made.height, made.width) == (300, 451)
    assert torch.equal(made.pixels, preset(opened(jpeg(photo().convert("L"))).convert("RGB")))
    with pytest.raises(SampleError, match="ZeroDivisionError"):
        decode(jpeg(), CustomPreprocess(lambda image: torch.zeros(1 // 0), "tests:lambda"))
    with pytest.raises(SampleError, match="expected an input of 64 x 64"):
        decode(jpeg(), CustomPreprocess(v1.to_tensor, "tests:to_tensor", (64, 64)))


# ---------------------------------------------------------------------------------------------- resize and crop


def torchvision_presets() -> list[Preprocess]:
    """Every combination of sizes and interpolation that torchvision's classification weights use."""
    found = {}
    for name in models.list_models(module=models):
        for weights in models.get_model_weights(name):
            preset = weights.transforms()
            if isinstance(preset, ImageClassification):
                resize, crop, kind = preset.resize_size[0], preset.crop_size[0], preset.interpolation.value
                found[resize, crop, kind] = Preprocess(resize=resize, crop=(crop, crop), interpolation=kind)
    return [found[key] for key in sorted(found)]


@pytest.mark.parametrize("preprocess", torchvision_presets(), ids=lambda p: f"{p.resize}-{p.crop[0]}-{p.interpolation}")
def test_torchvision_presets_within_one_level(preprocess):
    for image in (photo(451, 300), photo(200, 333)):
        assert levels(decode(image, preprocess).pixels, reference(image, preprocess)) <= 1


SIDES = st.integers(1, 200)
TARGETS = st.integers(1, 90)


@settings(deadline=None, max_examples=120, derandomize=True)
@given(
    width=SIDES,
    height=SIDES,
    resize=st.none() | TARGETS | st.tuples(TARGETS, TARGETS),
    crop=st.none() | st.tuples(TARGETS, TARGETS),
    interpolation=st.sampled_from(["bilinear", "bicubic", "nearest"]),
)
@example(width=2, height=400, resize=64, crop=(56, 56), interpolation="bilinear")
@example(width=400, height=3, resize=64, crop=(56, 57), interpolation="bicubic")
@example(width=300, height=4, resize=20, crop=(41, 56), interpolation="bilinear")
@example(width=300, height=200, resize=None, crop=(30, 51), interpolation="nearest")
def test_any_size_agrees_with_torchvision(width, height, resize, crop, interpolation):
    preprocess = Preprocess(resize=resize, crop=crop, interpolation=interpolation)
    image = photo(width, height)
    made = decode(image, preprocess).pixels
    assert made.is_contiguous()
    assert preprocess.size in (None, made.shape[1:])
    difference = (made.int() - reference(image, preprocess).int()).abs()
    assert difference.max() <= (2 if interpolation == "bilinear" else 0)
    assert (difference > 1).float().mean() < 1e-4


def test_a_part_of_a_gigantic_resize(monkeypatch):
    """The crop, computed by itself, is that of the whole, but for the rounding of the place where it begins."""
    monkeypatch.setattr(decoding, "HUGE", 0)
    for image, crop in ((photo(2, 400), (56, 56)), (photo(400, 3), (70, 57)), (photo(900, 40), (60, 60))):
        for interpolation in ("bilinear", "bicubic", "nearest"):
            preprocess = Preprocess(resize=64, crop=crop, interpolation=interpolation)
            difference = (decode(image, preprocess).pixels.int() - reference(image, preprocess).int()).abs()
            # Where a place falls on the border of two pixels, `nearest` may take the other one.
            assert (difference > 1).float().mean() <= (0.02 if interpolation == "nearest" else 0)


def test_without_antialias_as_the_video_preset_does():
    preprocess = Preprocess(resize=(128, 171), crop=(112, 112), antialias=False)
    image = photo(451, 300)
    resized = v1.resize(v1.pil_to_tensor(image), [128, 171], antialias=False)
    assert levels(decode(image, preprocess).pixels, v1.center_crop(resized, [112, 112])) <= 1
    assert levels(decode(image, preprocess).pixels, reference(image, preprocess)) > 10


def test_an_unbounded_result_is_refused():
    with pytest.raises(SampleError, match="520000 x 520 pixels, more than"):
        decode(photo(4000, 4), Preprocess(resize=520, crop=None))


def test_threads_give_what_one_thread_gives():
    data = [odd.data for odd in odd_images() if odd.decodes] * 3
    alone = [decode(item, USUAL).pixels for item in data]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda item: decode(item, USUAL).pixels, data))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_nothing_leaks(tmp_path):
    """In a process of its own: no warning even under -W error, no gigantic intermediate, no Ghostscript."""
    (tmp_path / "bomb.png").write_bytes(png_claiming(10_000, 10_000))
    (tmp_path / "taller.jpg").write_bytes(jpeg(photo(2, 4000)))
    files = write_all(tmp_path)
    spy = tmp_path / "bin" / "gs"
    spy.parent.mkdir()
    spy.write_text(f"#!/bin/sh\ntouch '{tmp_path}/started'\n")
    spy.chmod(0o755)
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from fmextract.inputs.decoding import decode\n"
        "from fmextract.records import Preprocess\n"
        "from fmextract.errors import SampleError\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "usual = Preprocess(resize=256, crop=(224, 224))\n"
        "decode(Path('plain.jpg').read_bytes(), usual); before = peak(); ok = 0\n"
        "for path in sorted(Path('.').glob('*.*')):\n"
        "    try: ok += decode(path.read_bytes(), usual).pixels.shape == (3, 224, 224)\n"
        "    except SampleError: pass\n"
        "print(ok, (peak() - before) // (1024 if sys.platform == 'linux' else 1 << 20))\n"
    )
    here = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(here), "PATH": f"{spy.parent}:{os.environ['PATH']}"}
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    decoded, megabytes = map(int, done.stdout.split())
    assert decoded == sum(odd.decodes for odd in files) + 1  # and taller.jpg
    assert megabytes < 120  # 2 x 4000 pixels alone would be 393 MB when resized to 256 x 512000
    assert "Warning" not in done.stderr
    assert not (tmp_path / "started").exists()


# ---------------------------------------------------------------------------------------------------- normalise


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_normalise_has_the_bits_of_torchvision(memory_format):
    batch = torch.randint(0, 256, (4, 3, 33, 47), dtype=torch.uint8).contiguous(memory_format=memory_format)
    expected = torch.stack(
        [v1.normalize(v1.to_tensor(p.permute(1, 2, 0).numpy()), USUAL.mean, USUAL.std) for p in batch]
    )
    made = normalise(batch, USUAL)
    assert made.dtype == torch.float32
    assert torch.equal(made, expected)
    assert made.is_contiguous(memory_format=memory_format)
    assert torch.equal(normalise(batch, USUAL, torch.bfloat16), expected.bfloat16())
    assert torch.equal(made, v2.functional.normalize(batch / 255, list(USUAL.mean), list(USUAL.std)))


def test_normalise_leaves_the_batch_alone():
    batch = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    assert torch.equal(normalise(batch, NO_CHANGE), torch.ones(1, 3, 2, 2))
    assert (batch == 255).all()


# ------------------------------------------------------------------------------------------- what users write


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("size=224", {"resize": 224, "crop": (224, 224)}),
        ("size=256,crop=224", {"resize": 256, "crop": (224, 224)}),
        ("size=192x256", {"resize": (192, 256), "crop": None}),
        ("size=192x256, crop=100x200", {"resize": (192, 256), "crop": (100, 200)}),
        ("mean=0.5,std=0.25/0.5/1", {"resize": 256, "crop": (224, 224), "mean": (0.5,) * 3, "std": (0.25, 0.5, 1.0)}),
        ("interpolation=bicubic", {"resize": 256, "crop": (224, 224), "interpolation": "bicubic"}),
        ("crop=64", {"resize": 256, "crop": (64, 64)}),
    ],
)
def test_inline_preprocessing(text, expected):
    made = parse_preprocess(text, USUAL)
    wanted = {"mean": USUAL.mean, "std": USUAL.std, "interpolation": "bilinear", **expected}
    assert {name: getattr(made, name) for name in wanted} == wanted
    assert text in made.origin


@pytest.mark.parametrize(
    ("text", "default", "message"),
    [
        ("size=0", USUAL, "expected a size"),
        ("size=12x", USUAL, "expected a size"),
        ("size=1x2x3", USUAL, "expected a size"),
        ("crop=-3", USUAL, "expected a size"),
        ("mean=0.5/0.5,std=1", USUAL, "one number or three"),
        ("mean=a", USUAL, "could not convert"),
        ("mean=nan", USUAL, "one number or three"),
        ("std=0", USUAL, "std must be positive"),
        ("interpolation=lanczos", USUAL, "unknown interpolation"),
        ("colour=red", USUAL, "got 'colour=red'"),
        ("size", USUAL, "got 'size'"),
        ("size=2,size=3", USUAL, "once each"),
        ("", USUAL, "got ''"),
        ("size=224", None, "mean= and std= are missing"),
        ("mean=0,std=1", None, "size= is missing"),
    ],
)
def test_inline_preprocessing_says_what_is_wrong(text, default, message):
    with pytest.raises(ConfigError, match=message):
        parse_preprocess(text, default)


@pytest.mark.parametrize(
    ("before", "size", "resize", "crop"),
    [
        ((232, (224, 224)), "288", 298, (288, 288)),
        ((256, (224, 224)), 224, 256, (224, 224)),
        ((256, (224, 224)), "112x224", 256, (112, 224)),
        ((224, (224, 224)), "100x300", 300, (100, 300)),
        ((520, None), "320x480", (320, 480), None),
        ((None, None), "320", (320, 320), None),
        (((128, 171), (112, 112)), "224", (256, 342), (224, 224)),
        ((None, (64, 64)), "32", None, (32, 32)),
    ],
)
def test_exact_input_size(before, size, resize, crop):
    made = apply_size(Preprocess(resize=before[0], crop=before[1]), size)
    assert (made.resize, made.crop) == (resize, crop)
    height, width = made.size
    for image in (photo(90, 60), photo(60, 90)):
        assert decode(image, made).pixels.shape == (3, height, width)


def test_a_wrong_size_says_what_is_expected():
    with pytest.raises(ConfigError, match="--size: expected a size as 224 or 192x256"):
        apply_size(USUAL, "big")


def test_pillow_is_quiet_but_not_for_others():
    """Only what Pillow says of images is silenced: a warning of the caller's own still shows."""
    with pytest.warns(UserWarning, match="mine"):
        warnings.warn("mine", UserWarning, stacklevel=1)


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [(torch.empty(3, 8, 8, device="meta"), "meta"), (torch.zeros(3, 8, 8).to_sparse(), "sparse_coo")],
    ids=["meta", "sparse"],
)
def test_a_tensor_without_pixels_is_one_failed_row(tensor: torch.Tensor, kind: str) -> None:
    with pytest.raises(SampleError, match=f"got a {kind} one"):
        decoding.snapshot(tensor)
