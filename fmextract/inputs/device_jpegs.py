"""Decode, resize and crop plain JPEGs on the device (`--jpeg-decoder device`), in one call per task.

The CPU decodes everything else, so that what a row becomes depends on its bytes alone.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import PIL.ImageFile
import simplejpeg
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from fmextract.common.boxes import crop_span, resized_size
from fmextract.common.devices import is_out_of_memory
from fmextract.errors import ConfigError, DeviceLost, MissingExtra
from fmextract.inputs.decoding import HUGE, Decoded
from fmextract.inputs.files import stamp_of
from fmextract.inputs.pictures import one_line, orientation_of
from fmextract.inputs.preprocessing import Preprocessing
from fmextract.records import Preprocess

# ------------------------------------------------------------------------------------------------ on the device

DeviceDecode = Callable[[list[bytes]], list[Tensor]]
"""Encoded JPEGs to uint8 (3, height, width) tensors on a device, turned as EXIF says. Raises RuntimeError."""


# The CPU decodes larger photos; smaller ones are decoded in groups of at most so many pixels.
_LARGE = 1 << 25


def device_decoder(device: torch.device) -> DeviceDecode:
    """Return torchcodec's decoder of JPEGs on `device`. Raises ConfigError if it has none, MissingExtra without it."""
    if device.type != "cuda":
        raise ConfigError(
            f"--jpeg-decoder device: JPEGs are decoded on CUDA only, and this run is on {device}; --jpeg-decoder cpu"
        )
    try:
        from torchcodec.decoders import decode_jpeg
    except ImportError as error:
        raise MissingExtra("torchcodec", "torchcodec", "--jpeg-decoder device") from error
    except (OSError, RuntimeError) as error:  # its native part does not fit this torch or system
        raise ConfigError(
            f"--jpeg-decoder device: torchcodec does not load ({one_line(error)}); --jpeg-decoder cpu"
        ) from error
    return functools.partial(decode_jpeg, mode="RGB", device=device)


def check_fits_on_device(preprocess: Preprocessing | None) -> None:
    """Raise ConfigError for preprocessing that only the CPU can do as it is meant."""
    if isinstance(preprocess, Preprocess) and (
        preprocess.resize is None or preprocess.interpolation == "bilinear" or not preprocess.antialias
    ):
        return
    # Bicubic by torch is up to 28 levels off at hard edges (see _resize).
    raise ConfigError(
        "--jpeg-decoder device: images are resized on the device too, which is right for interpolation=bilinear only;"
        " use --jpeg-decoder cpu, or --preprocess interpolation=bilinear"
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

        Returns for each of `data` what was decoded, or None where the CPU is to decode it: anything else, what EXIF
        would turn, and what the device refuses; such rows of `into` are not touched. Raises DeviceLost where the device
        has too little memory: decoding on the CPU instead would make values depend on what else runs there.
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
                " with fewer --num-workers perhaps; with --overwrite, --jpeg-decoder cpu or a smaller --batch-size"
                " needs less."
            ) from error
        for i, pixels in zip(fitted, there, strict=True):
            into[i].copy_(pixels)
        return [
            Decoded(*size, stamp_of(data[i])) if size is not None and i in fitted else None
            for i, size in enumerate(sizes)
        ]

    def _pictures(self, encoded: list[bytes]) -> list[Tensor | None]:
        """Decode all at once; where that is refused, one by one, to know which."""
        if not encoded:
            return []
        try:
            return list(self._decode(encoded))
        except Exception as error:
            if is_out_of_memory(error):
                raise
        return [None] if len(encoded) == 1 else [self._pictures([one])[0] for one in encoded]

    def _stream(self) -> AbstractContextManager[Any]:
        """Return this thread's own stream, made once: the decoder waits for a whole stream; the forward has another."""
        if self._device.type == "cpu":
            return nullcontext()
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.Stream(self._device)
        stream: AbstractContextManager[Any] = self._own.stream
        return stream


def _by_pixels(rows: Sequence[int], sizes: Sequence[tuple[int, int] | None]) -> Iterator[list[int]]:
    """Yield `rows` in groups of at most _LARGE pixels: so much lies on the device at once, for each thread."""
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
    """Return (height, width) of a JPEG that only needs decoding, and gives an input of `size` without an odd resize."""
    # The end marker: a device may decode half a photo and report no error.
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
    fits = (preprocess.crop or resized) == size and math.prod(resized) <= max(HUGE, 4 * math.prod(size))
    return (height, width) if fits else None


def _fit_there(picture: Tensor, preprocess: Preprocess, size: tuple[int, ...]) -> Tensor:
    """Return what _fit does, where `picture` (3, height, width) lies: uint8 (3, *size)."""
    height, width = picture.shape[1:]
    resized = resized_size(height, width, preprocess.resize)
    if resized != (height, width):
        kind = InterpolationMode(preprocess.interpolation)
        picture = transforms.resize(picture, list(resized), interpolation=kind, antialias=preprocess.antialias)
    rows, columns = crop_span(resized[0], size[0]), crop_span(resized[1], size[1])
    part = picture[:, rows[0] : rows[1], columns[0] : columns[1]]
    after, below = size[1] - columns[2] - part.shape[2], size[0] - rows[2] - part.shape[1]
    return torch.nn.functional.pad(part, (columns[2], after, rows[2], below))
