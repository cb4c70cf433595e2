"""Makes files that image sets in the wild hold: every one with what must become of it. Nothing here is downloaded."""

from __future__ import annotations

import functools
import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
from PIL import Image


@dataclass(frozen=True)
class Odd:
    """A file's name and bytes, whether it must decode, and by whom where that is the point of it."""

    name: str
    data: bytes
    decodes: bool
    decoder: str = "pillow"


@functools.cache
def photo(width: int = 451, height: int = 300) -> Image.Image:
    """A real photo (scikit-image's chelsea, CC0)."""
    return Image.fromarray(skimage.data.chelsea()).resize((width, height))


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(image: Image.Image | None = None, **options: Any) -> bytes:
    return encode(image or photo(), "JPEG", **{"quality": 85, **options})


def with_orientation(data: Image.Image, orientation: int, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(data, kind, exif=exif)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is this large."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"\0" * 100)) + png_chunk(b"IEND", b"")


def jpeg_claiming(width: int, height: int) -> bytes:
    """A JPEG whose frame header says that it is this large."""
    data = bytearray(jpeg(photo(64, 48)))
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def twelve_bit() -> bytes:
    data = bytearray(jpeg(photo(64, 48)))
    data[data.index(b"\xff\xc0") + 4] = 12
    return bytes(data)


def sixteen_bit(width: int = 64, height: int = 48) -> np.ndarray:
    """A ramp through all of 0..65535."""
    return np.linspace(0, 65535, width * height).round().astype(np.uint16).reshape(height, width)


def _frames(count: int = 3) -> list[Image.Image]:
    return [photo(80, 60).rotate(90 * turn) for turn in range(count)]


def _animated(kind: str, mode: str = "RGB") -> bytes:
    first, *rest = [frame.convert(mode) for frame in _frames()]
    return encode(first, kind, save_all=True, append_images=rest)


def _transparent(mode: str) -> Image.Image:
    image = photo(90, 60).convert(mode)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def _palette_with_transparency() -> bytes:
    return encode(photo(90, 60).convert("P"), "PNG", transparency=bytes(range(256)))


def _broken_crc() -> bytes:
    data = bytearray(encode(photo(90, 60), "PNG"))
    data[data.index(b"IDAT") + 40] ^= 0xFF
    return bytes(data)


def _decoding() -> list[Odd]:
    grey16 = Image.fromarray(sixteen_bit())
    floats = Image.fromarray(np.asarray(photo(64, 48).convert("L"), np.float32) / 255)
    broken_exif = b"Exif\0\0II*\0\x08\0\0\0\xff\x7f\x12\x01\x03"
    return [
        Odd("plain.jpg", jpeg(), True, "simplejpeg"),
        Odd("progressive.jpg", jpeg(progressive=True), True, "simplejpeg"),
        Odd("444.jpg", jpeg(subsampling=0), True, "simplejpeg"),
        Odd("restarts.jpg", jpeg(restart_marker_rows=1), True, "simplejpeg"),
        Odd("grey.jpg", jpeg(photo().convert("L")), True, "simplejpeg"),
        Odd("broken_exif.jpg", jpeg(exif=broken_exif), True, "simplejpeg"),
        Odd("after_the_end.jpg", jpeg() + b"\0" * 100, True, "simplejpeg"),
        Odd("one_pixel.jpg", jpeg(photo(1, 1)), True, "simplejpeg"),
        Odd("tall.jpg", jpeg(photo(2, 700)), True, "simplejpeg"),
        Odd("cmyk.jpg", jpeg(photo().convert("CMYK")), True),
        Odd("junk_before_marker.jpg", jpeg().replace(b"\xff\xdb", b"junk\xff\xdb", 1), True),
        Odd("wide.png", encode(photo(700, 2), "PNG"), True),
        Odd("png_named.JPEG", encode(photo(90, 60), "PNG"), True),
        Odd("palette.png", encode(photo().quantize(32), "PNG"), True),
        Odd("palette_transparent.png", _palette_with_transparency(), True),
        Odd("alpha.png", encode(_transparent("RGB"), "PNG"), True),
        Odd("grey_alpha.png", encode(_transparent("L"), "PNG"), True),
        Odd("one_bit.png", encode(photo().convert("1"), "PNG"), True),
        Odd("grey16.png", encode(grey16, "PNG"), True),
        Odd("grey16.tif", encode(grey16, "TIFF"), True),
        Odd("grey16.pgm", encode(grey16.convert("I"), "PPM"), True),
        Odd("float.tif", encode(floats, "TIFF"), True),
        Odd("animated.gif", _animated("GIF"), True),
        Odd("animated.webp", _animated("WEBP"), True),
        Odd("animated.png", _animated("PNG"), True),
        Odd("alpha.webp", encode(_transparent("RGB"), "WEBP"), True),
        Odd("pages.tif", _animated("TIFF"), True),
        Odd("bilevel.tif", encode(photo().convert("1"), "TIFF", compression="group4"), True),
        Odd("plain.bmp", encode(photo(33, 20), "BMP"), True),
        Odd("oriented.tif", with_orientation(photo(90, 60), 6, "TIFF"), True),
    ]


def _refused() -> list[Odd]:
    made: dict[str, bytes] = {
        "empty.jpg": b"",
        "text_as.png": b"this is not an image\n" * 20,
        "half.jpg": jpeg()[: len(jpeg()) // 2],
        "no_end_marker.jpg": jpeg()[:-2],
        "half_progressive.jpg": jpeg(progressive=True)[:-3000],
        "twelve_bit.jpg": twelve_bit(),
        "half.png": encode(photo(), "PNG")[:-5000],
        "broken_crc.png": _broken_crc(),
        "short.bmp": encode(photo(33, 20), "BMP")[:-3],
        "huge.png": png_claiming(60_000, 60_000),
        "large.png": png_claiming(10_000, 10_000),
        "large.jpg": jpeg_claiming(10_000, 10_000),
        "negative.ppm": b"P6\n-5 10\n255\n" + b"\0" * 150,
        "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
        "hdf5.jpg": b"\x89HDF\r\n\x1a\n" + b"\0" * 100,
    }
    return [Odd(name, data, False) for name, data in made.items()]


@functools.cache
def odd_images() -> tuple[Odd, ...]:
    return (*_decoding(), *_refused())


def write_all(folder: Path) -> tuple[Odd, ...]:
    """All of them as files of the folder."""
    for odd in odd_images():
        (folder / odd.name).write_bytes(odd.data)
    return odd_images()
