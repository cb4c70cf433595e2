"""Turn encoded bytes, arrays, tensors and PIL images into the input of a model.

`inputs.pictures` decodes; resize and crop agree with torchvision's transforms on a PIL image, bilinear within one level
of 255, the others exactly. Heavy work releases the GIL, so that threads scale.
"""

from __future__ import annotations

import math
import threading
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import PIL.ImageFile
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from fmextract.common.boxes import Span, crop_span, resized_size
from fmextract.errors import ConfigError, SampleError
from fmextract.inputs.files import OnDisk
from fmextract.inputs.pictures import Pixels, decode_file, eight_bits, from_pil, refuse_bomb, undecodable
from fmextract.inputs.preprocessing import PREPROCESS_HELP, CustomPreprocess, Preprocessing
from fmextract.records import FileStamp, Preprocess, Status

__all__ = ["Decoded", "Image", "decode", "snapshot"]


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
    """What a device decoded: the size of an image before it was resized, and the file that it was read from."""

    height: int
    width: int
    file: FileStamp


def decode(data: Any, preprocess: Preprocessing | None, *, exif: bool = False) -> Image:
    """Decode one image for a batch. Safe to call from several threads at once.

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
    """Return `data` as nothing can change it: a Dataset may use its buffer, or an open file, for the next item.

    Raises SampleError(Status.UNDECODABLE) for a picture that is read only now and is damaged, and for what is no image.
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


# ---------------------------------------------------------------------------------------------------- decoding


def _picture(data: Any, exif: bool) -> tuple[Pixels, str]:
    """Decode whatever a source may load: pixels (h, w, 3), and who decoded them."""
    if isinstance(data, (bytes, bytearray, memoryview)):
        return decode_file(data if isinstance(data, bytes) else bytes(data), exif)
    if isinstance(data, PIL.Image.Image):
        # A picture may be read only now, and share its open file, or all of itself, with another row.
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
    """Return (h, w, 3) of grey (h, w) or colour, whose channels are the first axis or the last."""
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
    """Return a float tensor (channels, height, width), or (channels, time, height, width), as the model's input."""
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
HUGE = 1 << 22


def _fit(picture: Pixels, preprocess: Preprocess) -> Tensor:
    """Resize and centre crop, as torchvision does with a PIL image: uint8 (3, h, w), contiguous."""
    resized = resized_size(picture.shape[0], picture.shape[1], preprocess.resize)
    crop = preprocess.crop or resized
    refuse_bomb(crop[1], crop[0])
    rows, columns = crop_span(resized[0], crop[0]), crop_span(resized[1], crop[1])
    if math.prod(resized) > max(HUGE, 4 * math.prod(crop)):
        part = _resize_part(picture, resized, rows, columns, preprocess.interpolation)
    else:
        part = _resize(picture, resized, preprocess)[rows[0] : rows[1], columns[0] : columns[1]]
    if part.shape[:2] != crop:
        part = _padded(part, crop, rows[2], columns[2])
    # By numpy: torch would start its own threads in each of ours for this copy.
    return torch.from_numpy(np.array(part.transpose(2, 0, 1), order="C"))


def _resize(picture: Pixels, size: tuple[int, int], preprocess: Preprocess) -> Pixels:
    """Resize the whole picture to (height, width).

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
    """Return some rows and columns of the picture at `size` (height, width), by Pillow: torch cannot resize a part."""
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
    """Pad an image that is smaller than the crop with black."""
    made = np.zeros((*size, 3), np.uint8)
    made[above : above + part.shape[0], before : before + part.shape[1]] = part
    return made
