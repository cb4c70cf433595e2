"""Decode the bytes of an image file, or a PIL image, to RGB pixels, for runs and for pictures alike. No torch.

Ordinary JPEGs are decoded by libjpeg-turbo (simplejpeg), everything else, and every JPEG with anything odd about it, by
Pillow, whose verdict then counts. Both give the same pixels. The list of formats is closed: a file's name does not
matter, and no other program is started for one.

What becomes of pixels that are not 8-bit RGB:

* grey, palette, bilevel, CMYK, YCbCr: as Pillow's `convert("RGB")`; alpha and transparency are dropped by it, like in
  torchvision's loader. Of an animation the first frame counts.
* 16-bit grey (modes I;16*): divided by 257, so that white stays white and nothing is clipped.
* 32-bit integers (mode I): 0..65535, what 16-bit files become, divided by 257; anything beyond is refused.
* floats (mode F): 0..1 times 255; else 0..255 as they are; anything beyond is refused, as each image would have a scale
  of its own. What is not finite counts as the lowest.
* arrays: bool black and white; whole numbers from 0 to 255 as they are; floats from 0 to 1 times 255.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
import PIL.Image
import simplejpeg
from numpy.typing import NDArray

from fmextract.errors import SampleError
from fmextract.inputs.files import NOT_DECODED
from fmextract.records import Status

Pixels: TypeAlias = NDArray[np.uint8]
"""(height, width, 3), RGB."""

# All plug-ins at once: Pillow otherwise imports them in the middle of the first odd file, in whichever thread has it.
PIL.Image.init()
# Pillow warns about metadata it cannot make sense of, and of large images, which are refused here anyway. Once, for the
# process: the list of filters belongs to all threads, and changing it for each image would not be safe.
for _category in (UserWarning, PIL.Image.DecompressionBombWarning):
    warnings.filterwarnings("ignore", category=_category, module=r"PIL\.")


def decode_file(data: bytes, exif: bool) -> tuple[Pixels, str]:
    """Return the pixels of an image file, and who decoded them: simplejpeg or pillow. `exif` turns them upright.

    Raises what a decoder raises; within `undecodable` only SampleError.
    """
    if not data:
        raise SampleError(Status.UNDECODABLE, "the file is empty")
    pixels = fast_jpeg(data)
    if pixels is not None:
        return _upright(pixels, orientation_of(data) if exif else 1), "simplejpeg"
    with PIL.Image.open(io.BytesIO(data), formats=_formats()) as image:
        return from_pil(image, exif), "pillow"


@contextlib.contextmanager
def undecodable() -> Iterator[None]:
    """Turn all errors within into a SampleError(Status.UNDECODABLE)."""
    try:
        yield
    except SampleError:
        raise
    except Exception as error:  # Pillow raises a dozen kinds for broken files, struct.error and SyntaxError among them
        raise SampleError(Status.UNDECODABLE, one_line(error)) from error


def fast_jpeg(data: bytes) -> Pixels | None:
    """Decode an ordinary JPEG; None for anything else: another colour space, damage, or only a warning."""
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    try:
        height, width, colour, _ = simplejpeg.decode_jpeg_header(data)
        if colour not in ("YCbCr", "Gray"):
            return None
        refuse_bomb(width, height)
        # Neither the fast DCT nor the fast upsampling: they are off by up to 28 levels.
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, strict=True)
    except SampleError:
        raise
    except Exception:  # ValueError for damage, KeyError for a subsampling that it does not know
        return None
    return pixels


def _formats() -> list[str]:
    """Return the formats, for every file again, as a plug-in for another format may be registered at any time."""
    return [name for name in PIL.Image.ID if name not in NOT_DECODED]


def from_pil(image: PIL.Image.Image, exif: bool) -> Pixels:
    refuse_bomb(*image.size)
    image.load()
    # After load: a TIFF has turned itself by then and says so.
    orientation = _tag(image) if exif else 1
    wide = _WIDE.get(image.mode)
    if wide is not None:
        image = PIL.Image.fromarray(wide(np.asarray(image)))
    return _upright(np.array(image.convert("RGB")), orientation)


def refuse_bomb(width: int, height: int) -> None:
    limit = PIL.Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise SampleError(Status.UNDECODABLE, f"{width} x {height} pixels, more than the {limit} allowed")


def sixteen_bit(values: NDArray[Any]) -> Pixels:
    scaled: Pixels = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return scaled


def eight_bits(values: NDArray[Any]) -> Pixels:
    """Take pixels as people have them: uint8, uint16, truth values, whole numbers to 255, floats from 0 to 1.

    Raises SampleError for all else, which would have to be guessed.
    """
    kind = values.dtype
    if kind == np.uint8:
        return values
    if kind.kind == "u" and kind.itemsize == 2:
        return sixteen_bit(values)
    if kind.kind == "b":
        return values.astype(np.uint8) * np.uint8(255)
    if kind.kind not in "iuf":
        raise SampleError(Status.UNDECODABLE, f"expected pixels of type uint8, uint16, float or bool, got {kind}")
    most = 1 if kind.kind == "f" else 255
    low, high = values.min(), values.max()
    if low >= 0 and high <= most:  # NaN is neither
        return np.rint(values * 255).astype(np.uint8) if kind.kind == "f" else values.astype(np.uint8)
    raise SampleError(
        Status.UNDECODABLE,
        f"pixels of type {kind} lie from {low:g} to {high:g}; expected 0 to {most}, or uint8 or uint16. "
        "A model's finished input is a float torch tensor (channels, height, width)",
    )


def _integers(values: NDArray[Any]) -> Pixels:
    low, high = values.min(), values.max()
    if low < 0 or high > 0xFFFF:
        raise _beyond("I", low, high, "0 to 65535")
    return sixteen_bit(values)


def _floats(values: NDArray[Any]) -> Pixels:
    finite = np.isfinite(values)
    values = np.where(finite, values, values.min(initial=math.inf, where=finite))
    low, high = values.min(), values.max()
    if low < 0 or high > 255:  # also where none is finite
        raise _beyond("F", low, high, "0 to 1, or 0 to 255")
    levels: Pixels = np.rint(values * (255 if values.max() <= 1 else 1)).astype(np.uint8)
    return levels


def _beyond(mode: str, low: Any, high: Any, expected: str) -> SampleError:
    return SampleError(
        Status.UNDECODABLE,
        f"pixels of mode {mode} lie from {low:g} to {high:g}; expected {expected}. Scale all images alike before:"
        " by its own range each would get another scale",
    )


_WIDE: dict[str, Callable[[NDArray[Any]], Pixels]] = {
    "I;16": sixteen_bit,
    "I;16L": sixteen_bit,
    "I;16B": sixteen_bit,
    "I;16N": sixteen_bit,
    "I": _integers,
    "F": _floats,
}
"""Modes that Pillow's convert clips to white: (h, w) values to (h, w) uint8."""


_TURNS: dict[int, Callable[[Pixels], Pixels]] = {
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: p[::-1].swapaxes(0, 1),
    7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
    8: lambda p: p[:, ::-1].swapaxes(0, 1),
}
"""EXIF orientation to what brings the picture upright."""


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    turn = _TURNS.get(orientation)
    return pixels if turn is None else np.ascontiguousarray(turn(pixels))


def orientation_of(data: bytes) -> int:
    with PIL.Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
        return _tag(image)


def _tag(image: PIL.Image.Image) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # a broken EXIF block says nothing about orientation, and is no reason to refuse the pixels
        return 1


def one_line(error: Exception) -> str:
    """Return an error's words on one line, the same in every run: without the address of the buffer."""
    text = re.sub(r"\s*<_io\.BytesIO object at 0x[0-9a-f]+>", "", str(error)).strip().partition("\n")[0][:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
