"""Tell what a file is by its name and its first bytes: an image, or what else, and what to give instead. No torch."""

from __future__ import annotations

import os
import posixpath
import stat

__all__ = ["extension", "is_image", "is_surely_none", "kind_of", "needs_decoder"]

_FIRST_BYTES = 32


def extension(name: bytes) -> bytes:
    return posixpath.splitext(name)[1].lower()


def is_image(path: bytes) -> bool:
    """Return whether a file whose name does not say so is an image, by its first bytes."""
    first = _first_bytes(path)
    return (
        first.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"\0\0\0\x0cjP  \r\n\x87\n"))
        or (first[:4] == b"RIFF" and first[8:12] == b"WEBP")
        or first[4:12] in (b"ftypavif", b"ftypavis")
        or (first[:2] == b"BM" and first[6:10] == b"\0\0\0\0" and first[14:18] in _BMP_HEADERS)
        # Raw photos of many cameras begin as a TIFF does, and say what they are by their extension.
        or (not _looks_like_extension(path) and first[:4] in (b"II*\0", b"MM\0*"))
    )


_BMP_HEADERS = tuple(size.to_bytes(4, "little") for size in (12, 40, 52, 56, 64, 108, 124))


def _looks_like_extension(path: bytes) -> bool:
    """Return whether it may be an extension, as `.nef`; `.jpg?width=300`, `.2019` and "" are none."""
    return extension(path)[1:].isalpha()


def _first_bytes(path: bytes) -> bytes:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116  a device may be waited for
            return b""
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123  bytes: pathlib knows only str
            return file.read(_FIRST_BYTES)
    except OSError:
        return b""


def needs_decoder(path: bytes) -> str:
    """Return the name of a format of photos that is not decoded here, by extension or first bytes; else ""."""
    known = _PHOTOS.get(extension(path), "")
    if known or (_looks_like_extension(path) and extension(path) in _OTHERS):
        return known
    first = _first_bytes(path)
    return "HEIC" if first[4:8] == b"ftyp" and first[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"hevc") else ""


def is_surely_none(path: bytes) -> bool:
    """Return whether a file's name says that it is no image, so that its first bytes need not be read."""
    return extension(path) in _OTHERS or path.endswith(b"~")


def kind_of(path: bytes) -> tuple[str, str]:
    """Return what a file that is no image is, and what can be given instead."""
    ending = extension(path)
    if photo := needs_decoder(path):
        return f"a {photo} file, which is not decoded here", f"Give {_HOW_TO_CONVERT.get(photo, _CONVERT)}"
    for endings, kind, instead in _KINDS:
        if ending in endings:
            return kind, instead
    return "no image by its extension or its first bytes", ""


_CONVERT = "it as PNG, TIFF or JPEG"
_HOW_TO_CONVERT = {
    "HEIC": "it as JPEG or PNG; or, from Python, call pillow_heif.register_heif_opener() before (package pillow-heif)"
}
_PHOTOS = {
    **dict.fromkeys((b".heic", b".heif", b".hif"), "HEIC"),
    **dict.fromkeys(
        (b".cr2", b".cr3", b".nef", b".arw", b".dng", b".raf", b".orf", b".rw2", b".pef", b".srw", b".raw"),
        "camera raw",
    ),
    **dict.fromkeys((b".jxl",), "JPEG XL"),
    **dict.fromkeys((b".svg", b".svgz"), "SVG"),
    **dict.fromkeys((b".pdf",), "PDF"),
    **dict.fromkeys((b".eps", b".ps", b".ai"), "PostScript"),
    **dict.fromkeys((b".exr", b".hdr"), "high dynamic range"),
    **dict.fromkeys((b".dcm", b".nii", b".czi", b".nd2", b".lif", b".svs", b".ndpi"), "microscope or scanner"),
    **dict.fromkeys((b".xcf",), "GIMP"),
}
_KINDS: tuple[tuple[frozenset[bytes], str, str], ...] = (
    (
        frozenset({b".tar", b".tgz", b".gz", b".bz2", b".xz", b".zst", b".zip", b".7z", b".rar"}),
        "an archive",
        "Unpack it and give the folder",
    ),
    (
        frozenset({b".npy", b".npz", b".pt", b".pth", b".pkl", b".pickle", b".mat"}),
        "a file of arrays",
        "Give, from Python, the array itself, or the name of a function that returns it, as path/file.py:function",
    ),
    (
        frozenset(
            {b".parquet", b".arrow", b".feather", b".xlsx", b".xls", b".ods", b".json", b".yaml", b".yml", b".db"}
        ),
        "a table",
        "Give it as .csv, .tsv or .jsonl with a column `path`; or, from Python, a DataFrame",
    ),
    (
        frozenset({b".mp4", b".mov", b".avi", b".mkv", b".webm", b".m4v", b".mpg", b".mpeg", b".wmv"}),
        "a film",
        "Write its frames into a folder (ffmpeg -i film.mp4 frames/%06d.png), and give that",
    ),
    (
        frozenset({b".h5", b".hdf5", b".nc", b".zarr", b".tfrecord", b".lmdb", b".mdb"}),
        "a file of data",
        "Give a Dataset that reads it: module:callable, or path/file.py:callable",
    ),
    (
        frozenset({b".py", b".ipynb"}),
        "a program",
        "Name what in it gives a Dataset, as path/file.py:callable",
    ),
)
_OTHERS = frozenset(
    {ending for endings, *_ in _KINDS for ending in endings}
    | set(_PHOTOS)
    | {b".txt", b".csv", b".tsv", b".jsonl", b".md", b".html", b".htm", b".xml", b".ini", b".toml", b".log", b".rst"}
    | {b".wav", b".mp3", b".flac", b".ogg", b".db", b".lnk", b".exe", b".dll", b".so", b".pyc", b".c", b".h", b".js"}
    | {b".tmp", b".bak", b".part", b".crdownload", b".xmp", b".aae", b".thm", b".lock", b".doc", b".docx", b".ppt"}
)
"""Extensions of files that are surely no images to be decoded: they are not looked into."""
