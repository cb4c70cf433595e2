"""From encoded bytes, arrays, tensors and PIL images to the input of a model.

`inputs.pictures` decodes; resize and crop agree with torchvision's transforms on a PIL image, bilinear within one level
of 255, the others exactly. Heavy work releases the GIL, so that threads scale.
"""

from __future__ import annotations

import functools
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageFile
import simplejpeg
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from fmextract.common.boxes import Span, crop_span, resized_size
from fmextract.common.devices import is_out_of_memory
from fmextract.errors import ConfigError, DeviceLost, MissingExtra, SampleError
from fmextract.inputs.files import OnDisk, stamp_of
from fmextract.inputs.pictures import (
    Pixels,
    decode_file,
    eight_bits,
    from_pil,
    one_line,
    orientation_of,
    refuse_bomb,
    undecodable,
)
from fmextract.records import FileStamp, Preprocess, Status

__all__ = [
    "CustomPreprocess",
    "Decoded",
    "DeviceJpegs",
    "Image",
    "Preprocessing",
    "apply_size",
    "check_fits_on_device",
    "decode",
    "device_decoder",
    "normalise",
    "parse_preprocess",
    "snapshot",
]


_LOADING = threading.Lock()


@dataclass(frozen=True, slots=True)
class Image:
    """One decoded image.

    `pixels` is uint8 (3, height, width), contiguous, of the size that the preprocessing gives; or, where `ready`, the
    float32 input of the model itself, any channels, already normalised. `height` and `width` are those of the image
    before it was resized (turned upright, where EXIF counts). `decoder` is simplejpeg, pillow or array.
    """

    pixels: Tensor
    height: int
    width: int
    decoder: str
    ready: bool = False


class Decoded(NamedTuple):
    """What was decoded elsewhere: the size of an image before it was resized, and the file that it was read from."""

    height: int
    width: int
    file: FileStamp


@dataclass(frozen=True, slots=True)
class CustomPreprocess:
    """A user's own preprocessing: RGB PIL image to float tensor (channels, height, width), the model's input.

    `size` is the (height, width) that it gives, None where that is not known. `thread_safe`: several threads may call
    it at once.
    """

    function: Callable[[PIL.Image.Image], Tensor]
    origin: str
    size: tuple[int, int] | None = None
    thread_safe: bool = False


Preprocessing = Preprocess | CustomPreprocess


def decode(data: Any, preprocess: Preprocessing | None, *, exif: bool = False) -> Image:
    """One image, ready for a batch. Safe to call from several threads at once.

    `data` is the bytes of a file; a PIL image; an array or tensor, grey or with 1, 3 or 4 channels, of uint8, uint16,
    bool, whole numbers from 0 to 255, or, as an array, floats from 0 to 1; or a float tensor (channels, height, width),
    for a clip (channels, time, height, width), which is taken as the model's input, as it is. Channels are the last
    axis of an array and the first of a tensor; the other end is tried where that
    axis cannot be channels. `exif` turns the picture upright as its EXIF orientation says. `preprocess` may be None
    where all data are float tensors.

    Raises SampleError(Status.UNDECODABLE) for anything wrong with the data, ConfigError where preprocessing is missing.
    """
    if isinstance(data, Tensor) and data.is_floating_point():
        return _ready(data, preprocess, "array")
    if preprocess is None:
        raise ConfigError(f"the images need preprocessing, and the model brings none. {PREPROCESS_HELP}")
    with undecodable():
        picture, decoder = _picture(data, exif)
        height, width = picture.shape[:2]
        if isinstance(preprocess, CustomPreprocess):
            made = _ready(preprocess.function(PIL.Image.fromarray(picture)), preprocess, decoder)
            return replace(made, height=height, width=width)
        return Image(_fit(picture, preprocess), height, width, decoder)


def snapshot(data: Any) -> Any:
    """`data` as nothing can change it any more: a Dataset may use its buffer, or an open file, for the next item.

    Raises SampleError(Status.UNDECODABLE) for a picture that only now is read, and cannot be, and what is no image.
    """
    if isinstance(data, PIL.Image.Image):
        with undecodable():
            refuse_bomb(*data.size)
            return data.copy()  # reads it, where that was left for later
    if isinstance(data, np.ndarray):
        if data.dtype.hasobject:
            raise _no_image(data)
        return np.array(data)
    if isinstance(data, Tensor):
        if data.is_meta or data.layout is not torch.strided:
            kind = "meta" if data.is_meta else str(data.layout).removeprefix("torch.")
            raise SampleError(Status.UNDECODABLE, f"expected a dense tensor, with values, got a {kind} one")
        return data.detach().clone()
    if isinstance(data, (bytearray, memoryview)):
        return bytes(data)
    if isinstance(data, (bytes, OnDisk)):
        return data
    raise _no_image(data)


def normalise(batch: Tensor, preprocess: Preprocess, dtype: torch.dtype = torch.float32) -> Tensor:
    """(pixel / 255 - mean) / std of a uint8 batch (B, 3, H, W), on its device, in its memory format.

    Computed in float32, with the very bits that torchvision's to_tensor and normalize give, then cast to `dtype`.
    """
    mean, std = _constants(preprocess.mean, preprocess.std, batch.device)
    return batch.to(torch.float32).div_(255).sub_(mean).div_(std).to(dtype)


@functools.lru_cache(maxsize=32)
def _constants(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and std as (C, 1, 1) on the device: made once, for each upload would wait for the device."""
    made = torch.tensor([mean, std], dtype=torch.float32).to(device)[..., None, None]
    return made[0], made[1]


# ---------------------------------------------------------------------------------------------------- decoding


def _picture(data: Any, exif: bool) -> tuple[Pixels, str]:
    """Pixels (h, w, 3) of whatever a source may load, and who decoded them."""
    if isinstance(data, (bytes, bytearray, memoryview)):
        return decode_file(data if isinstance(data, bytes) else bytes(data), exif)
    if isinstance(data, PIL.Image.Image):
        # One may be read only now, and share its open file, or all of itself, with another row.
        with _LOADING if isinstance(data, PIL.ImageFile.ImageFile) else nullcontext():
            return from_pil(data, exif), "array"
    if isinstance(data, Tensor):
        return _from_array(data.detach().cpu().numpy(), first=True), "array"
    if isinstance(data, np.ndarray):
        return _from_array(data, first=False), "array"
    raise _no_image(data)


def _no_image(data: Any) -> SampleError:
    return SampleError(Status.UNDECODABLE, f"expected bytes, an array, a tensor or a PIL image, got {_kind(data)}")


def _from_array(values: NDArray[Any], *, first: bool) -> Pixels:
    """(h, w, 3) of grey (h, w) or colour, whose channels are the first axis or the last."""
    if values.ndim == 2:
        values = values[..., None]
    ends = (0, -1) if first else (-1, 0)
    axis = next((end for end in ends if values.ndim == 3 and values.shape[end] in (1, 3, 4)), None)
    if axis is None or 0 in values.shape:
        raise SampleError(Status.UNDECODABLE, f"expected an image with 1, 3 or 4 channels, got shape {values.shape}")
    pixels = eight_bits(np.moveaxis(values, axis, -1)[..., :3])
    # A copy in any case: the caller's array may be read-only or written to again.
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else np.array(pixels, order="C")


def _ready(values: Any, preprocess: Preprocessing | None, decoder: str) -> Image:
    """A float tensor (channels, height, width), or a clip (channels, time, height, width), as the model's input."""
    if not isinstance(values, Tensor) or not values.is_floating_point() or values.ndim not in (3, 4):
        raise SampleError(Status.UNDECODABLE, f"expected a float tensor (channels, height, width), got {_kind(values)}")
    height, width = values.shape[-2:]
    size = preprocess.size if preprocess is not None else None
    if size is not None and size != (height, width):
        raise SampleError(
            Status.UNDECODABLE, f"expected an input of {size[0]} x {size[1]} (height x width), got {height} x {width}"
        )
    if values.requires_grad or values.device.type != "cpu" or values.dtype != torch.float32:
        values = values.detach().cpu().to(torch.float32)
    return Image(values.contiguous(), height, width, decoder, ready=True)


def _kind(value: Any) -> str:
    shape = f" {tuple(value.shape)} of {value.dtype}" if isinstance(value, (Tensor, np.ndarray)) else ""
    return type(value).__name__ + shape


# ---------------------------------------------------------------------------------------------- resize and crop

# Resized pixels beyond which only those in the crop are computed: 2 x 4000 pixels would become 256 x 512000.
_HUGE = 1 << 22


def _fit(picture: Pixels, preprocess: Preprocess) -> Tensor:
    """Resize and centre crop, as torchvision does with a PIL image: uint8 (3, h, w), contiguous."""
    resized = resized_size(picture.shape[0], picture.shape[1], preprocess.resize)
    crop = preprocess.crop or resized
    refuse_bomb(crop[1], crop[0])
    rows, columns = crop_span(resized[0], crop[0]), crop_span(resized[1], crop[1])
    if math.prod(resized) > max(_HUGE, 4 * math.prod(crop)):
        part = _resize_part(picture, resized, rows, columns, preprocess.interpolation)
    else:
        part = _resize(picture, resized, preprocess)[rows[0] : rows[1], columns[0] : columns[1]]
    if part.shape[:2] != crop:
        part = _padded(part, crop, rows[2], columns[2])
    # By numpy: torch would start its own threads in each of ours for this copy.
    return torch.from_numpy(np.array(part.transpose(2, 0, 1), order="C"))


def _resize(picture: Pixels, size: tuple[int, int], preprocess: Preprocess) -> Pixels:
    """The whole picture at (height, width).

    Bilinear by torch, four times faster than Pillow and at most one level off (two for about one value in 10^8).
    Bicubic and nearest by Pillow itself: torch is up to 28 levels off at hard edges, as Pillow clips between its two
    passes and has, from version 13, either of them first. Without antialias there is only torch.
    """
    if size == picture.shape[:2]:
        return picture
    if preprocess.antialias and preprocess.interpolation != "bilinear":
        kind = PIL.Image.Resampling[preprocess.interpolation.upper()]
        return np.asarray(PIL.Image.fromarray(picture).resize(size[::-1], kind))
    made = transforms.resize(
        torch.from_numpy(picture).permute(2, 0, 1),
        list(size),
        interpolation=InterpolationMode(preprocess.interpolation),
        antialias=preprocess.antialias,
    )
    pixels: Pixels = made.permute(1, 2, 0).numpy()
    return pixels


def _resize_part(picture: Pixels, size: tuple[int, int], rows: Span, columns: Span, interpolation: str) -> Pixels:
    """Some rows and columns of the picture at `size` (height, width), by Pillow: torch cannot resize a part."""
    height, width = picture.shape[:2]
    scale_y, scale_x = height / size[0], width / size[1]
    box = (
        columns[0] * scale_x,
        rows[0] * scale_y,
        min(columns[1] * scale_x, width),
        min(rows[1] * scale_y, height),
    )
    kind = PIL.Image.Resampling[interpolation.upper()]
    shape = (columns[1] - columns[0], rows[1] - rows[0])
    return np.asarray(PIL.Image.fromarray(picture).resize(shape, kind, box=box))


def _padded(part: Pixels, size: tuple[int, int], above: int, before: int) -> Pixels:
    """Black around an image that is smaller than the crop."""
    made = np.zeros((*size, 3), np.uint8)
    made[above : above + part.shape[0], before : before + part.shape[1]] = part
    return made


# ------------------------------------------------------------------------------------------------ on the device

DeviceDecode = Callable[[list[bytes]], list[Tensor]]
"""Encoded JPEGs to uint8 (3, height, width) tensors on a device, turned as EXIF says. Raises RuntimeError."""

# A larger photo is left to the CPU, and of smaller ones no more are decoded at once than have so many pixels.
_LARGE = 1 << 25


def device_decoder(device: torch.device) -> DeviceDecode:
    """torchcodec's decoder of JPEGs on `device`. Raises ConfigError where there is none, MissingExtra without it."""
    if device.type != "cuda":
        raise ConfigError(f"--decode device: JPEGs are decoded on CUDA only, and this run is on {device}; --decode cpu")
    try:
        from torchcodec.decoders import decode_jpeg
    except ImportError as error:
        raise MissingExtra("torchcodec", "torchcodec", "--decode device") from error
    except (OSError, RuntimeError) as error:  # its native part does not go with this torch or system
        raise ConfigError(f"--decode device: torchcodec does not load ({one_line(error)}); --decode cpu") from error
    return functools.partial(decode_jpeg, mode="RGB", device=device)


def check_fits_on_device(preprocess: Preprocessing | None) -> None:
    """Raises ConfigError for preprocessing that only the CPU can do as it is meant."""
    if isinstance(preprocess, Preprocess) and (
        preprocess.resize is None or preprocess.interpolation == "bilinear" or not preprocess.antialias
    ):
        return
    # Bicubic by torch is up to 28 levels off at hard edges (see _resize).
    raise ConfigError(
        "--decode device: images are resized on the device too, which is right for interpolation=bilinear only;"
        " use --decode cpu, or --preprocess interpolation=bilinear"
    )


class DeviceJpegs:
    """Decodes, resizes and crops the plain JPEGs among some rows on the device. Safe to call from several threads.

    Values are a few levels of 255 from the CPU's: the device has an inverse DCT and chroma upsampling of its own. What
    it decodes at all counts as decoded, even where the CPU's stricter decoder would have found damage in the middle.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._decode = device, device_decoder(device)
        self._own = threading.local()

    def decode(self, data: Sequence[Any], preprocess: Preprocessing | None, into: Tensor) -> list[Decoded | None]:
        """Fill the rows of `into`, uint8 (at least len(data), 3, h, w) on the host, that are plain JPEGs.

        Gives for each of `data` what was decoded, or None where the CPU is to decode it: anything else,
        what EXIF would turn, and what the device refuses; such rows of `into` are not touched. Raises DeviceLost where
        the memory of the device does not suffice: falling back would make values depend on what else runs there.
        """
        if not isinstance(preprocess, Preprocess):
            return [None] * len(data)
        sizes = [_plain_jpeg(item, preprocess, tuple(into.shape[2:])) for item in data]
        plain = [i for i, size in enumerate(sizes) if size is not None]
        try:
            with self._stream():
                fitted: dict[int, Tensor] = {}
                for some in _by_pixels(plain, sizes):
                    for i, picture in zip(some, self._pictures([data[i] for i in some]), strict=True):
                        if picture is not None and tuple(picture.shape[1:]) == sizes[i]:
                            fitted[i] = _fit_there(picture, preprocess, tuple(into.shape[2:]))
                # One copy for all of them; it waits for this thread's stream alone.
                there = torch.stack(list(fitted.values())).cpu() if fitted else into[:0]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise DeviceLost(
                f"the device has no memory left to decode JPEGs in ({one_line(error)}). The same command resumes,"
                " with fewer --workers perhaps; with --overwrite, --decode cpu or a smaller --batch-size needs less."
            ) from error
        for i, pixels in zip(fitted, there, strict=True):
            into[i].copy_(pixels)
        return [
            Decoded(*size, stamp_of(data[i])) if size is not None and i in fitted else None
            for i, size in enumerate(sizes)
        ]

    def _pictures(self, encoded: list[bytes]) -> list[Tensor | None]:
        """All at once; where that is refused, one by one, to know which."""
        if not encoded:
            return []
        try:
            return list(self._decode(encoded))
        except Exception as error:
            if is_out_of_memory(error):
                raise
        return [None] if len(encoded) == 1 else [self._pictures([one])[0] for one in encoded]

    def _stream(self) -> AbstractContextManager[Any]:
        """This thread's own stream, made once: the decoder waits for all of a stream, and the forward has another."""
        if self._device.type == "cpu":
            return nullcontext()
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.Stream(self._device)
        stream: AbstractContextManager[Any] = self._own.stream
        return stream


def _by_pixels(rows: Sequence[int], sizes: Sequence[tuple[int, int] | None]) -> Iterator[list[int]]:
    """`rows` in groups of at most _LARGE pixels: so much lies on the device at once, for each thread."""
    some: list[int] = []
    pixels = 0
    for row in rows:
        one = math.prod(sizes[row] or ())
        if some and pixels + one > _LARGE:
            yield some
            some, pixels = [], 0
        some.append(row)
        pixels += one
    if some:
        yield some


def _plain_jpeg(data: Any, preprocess: Preprocess, size: tuple[int, ...]) -> tuple[int, int] | None:
    """(height, width) of a JPEG that needs nothing but decoding, and gives an input of `size` without an odd resize."""
    # The end marker: a device may decode half a photo without a word.
    if not isinstance(data, bytes) or not data.startswith(b"\xff\xd8\xff") or not data.endswith(b"\xff\xd9"):
        return None
    try:
        height, width, colour, _ = simplejpeg.decode_jpeg_header(data)
        if colour not in ("YCbCr", "Gray") or height * width > min(_LARGE, PIL.Image.MAX_IMAGE_PIXELS or _LARGE):
            return None
        if b"Exif" in data and orientation_of(data) != 1:  # the device's decoder would turn it, asked or not
            return None
    except Exception:  # as in fast_jpeg
        return None
    resized = resized_size(height, width, preprocess.resize)
    fits = (preprocess.crop or resized) == size and math.prod(resized) <= max(_HUGE, 4 * math.prod(size))
    return (height, width) if fits else None


def _fit_there(picture: Tensor, preprocess: Preprocess, size: tuple[int, ...]) -> Tensor:
    """What _fit does, where `picture` (3, height, width) lies: uint8 (3, *size)."""
    height, width = picture.shape[1:]
    resized = resized_size(height, width, preprocess.resize)
    if resized != (height, width):
        kind = InterpolationMode(preprocess.interpolation)
        picture = transforms.resize(picture, list(resized), interpolation=kind, antialias=preprocess.antialias)
    rows, columns = crop_span(resized[0], size[0]), crop_span(resized[1], size[1])
    part = picture[:, rows[0] : rows[1], columns[0] : columns[1]]
    after, below = size[1] - columns[2] - part.shape[2], size[0] - rows[2] - part.shape[1]
    return torch.nn.functional.pad(part, (columns[2], after, rows[2], below))


# --------------------------------------------------------------------------------------------- what users write

PREPROCESS_HELP = (
    "Say how with --preprocess (preprocess=): the name of a model whose preprocessing to take, module:callable, "
    "none (the images are the model's inputs already), or as in "
    "size=256,crop=224,mean=0.485/0.456/0.406,std=0.229/0.224/0.225,interpolation=bilinear"
)


def parse_preprocess(text: str, default: Preprocess | None = None) -> Preprocess:
    """The inline form of --preprocess: `key=value` separated by commas, the parts of a value by slashes.

    size: N, the shorter side, or HxW, both sides. crop: N or HxW; where it is not given, N x N after size=N, none after
    size=HxW. mean and std: one number, or one a channel, on the scale 0..1. interpolation: nearest, bilinear, bicubic.
    What is not given but size and crop is taken from `default`. Raises ConfigError.
    """
    fields = _fields(text)
    if "resize" not in fields and default is None:
        raise ConfigError(f"--preprocess {text!r}: size= is missing. {PREPROCESS_HELP}")
    if default is None and not {"mean", "std"} <= fields.keys():
        raise ConfigError(f"--preprocess {text!r}: mean= and std= are missing (mean=0,std=1 for the plain 0..1 scale)")
    base = default or Preprocess(resize=None, crop=None)
    try:
        changes = {name: _READERS[name](value) for name, value in fields.items()}
        if "resize" in changes and "crop" not in changes:
            size = changes["resize"]
            changes["crop"] = (size, size) if isinstance(size, int) else None
        return replace(base, **changes, origin=f"--preprocess {text}")
    except ValueError as error:
        raise ConfigError(f"--preprocess {text!r}: {error}") from error


def _fields(text: str) -> Mapping[str, str]:
    names = {"size": "resize"}
    fields: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        name = names.get(key, key)
        if not equals or name not in _READERS or name in fields:
            raise ConfigError(
                f"--preprocess {text!r}: expected size, crop, mean, std, interpolation, once each, got {part!r}"
            )
        fields[name] = value
    return fields


def _read_size(text: str) -> int | tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    sides = [int(side) for side in match.groups() if side is not None] if match else []
    if not sides or min(sides) < 1:
        raise ValueError(f"expected a size as 224 or 192x256 (height x width), got {text!r}")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def _read_crop(text: str) -> tuple[int, int]:
    size = _read_size(text)
    return size if isinstance(size, tuple) else (size, size)


def _read_numbers(text: str) -> tuple[float, ...]:
    values = tuple(float(part) for part in text.split("/"))
    if len(values) not in (1, 3) or not all(map(math.isfinite, values)):
        raise ValueError(f"expected one number or three as 0.5/0.5/0.5, got {text!r}")
    return values * 3 if len(values) == 1 else values


_READERS: dict[str, Callable[[str], Any]] = {
    "resize": _read_size,
    "crop": _read_crop,
    "mean": _read_numbers,
    "std": _read_numbers,
    "interpolation": str,
}


def apply_size(preprocess: Preprocess, size: str | int) -> Preprocess:
    """The same preprocessing with inputs of exactly `size`: N (square) or HxW.

    Where there is a centre crop, the shorter side grows in the same proportion (232 and 224 become 298 and 288); where
    there is none, the image is resized to that size, whatever its own proportions. Raises ConfigError.
    """
    try:
        height, width = _read_crop(str(size))
    except ValueError as error:
        raise ConfigError(f"--size: {error}") from error
    if preprocess.crop is None:
        return replace(preprocess, resize=(height, width))
    factor = max(height / preprocess.crop[0], width / preprocess.crop[1])
    resize = preprocess.resize
    if isinstance(resize, tuple):
        resize = (round(resize[0] * height / preprocess.crop[0]), round(resize[1] * width / preprocess.crop[1]))
    elif resize is not None:
        # An image as long as it is wide must still cover the crop's longer side.
        resize = max(round(resize * factor), height, width)
    return replace(preprocess, resize=resize, crop=(height, width))
