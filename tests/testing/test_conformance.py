"""The checks of `fmextract.testing` pass what is ours, and see each way in which somebody else's may be broken."""

from __future__ import annotations

import dataclasses
import doctest
import random
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import make_photos

import fmextract.testing
from fmextract.errors import ConfigError, DamagedError, SampleError
from fmextract.inputs.sources import open_source
from fmextract.records import Status
from fmextract.storage.codecs import CODECS, Codec
from fmextract.testing import check_codec, check_reader, check_reducer, check_source, codecs, readers, reducers, sources
from fmextract.testing.readers import SHAPES


def test_the_examples_in_the_docstrings() -> None:
    """Run with torch there already: `check_reducer` needs it."""
    for module in (fmextract.testing, codecs, readers, reducers, sources):
        failed, tried = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
        assert (failed, tried > 0) == (0, True), module


# -------------------------------------------------------------------------------------------------------------- codecs


@pytest.mark.parametrize("name", CODECS)
def test_our_codecs_keep_their_promises(name: str) -> None:
    check_codec(CODECS[name])


def bounded(stream: bytes, nbytes: int) -> bytes:
    """What a decompressor of zlib streams must do."""
    inflater = zlib.decompressobj()
    try:
        raw = inflater.decompress(stream, nbytes + 1)
    except zlib.error as error:
        raise DamagedError(str(error)) from error
    if len(raw) <= nbytes and (not inflater.eof or inflater.unused_data):
        raise DamagedError("cut, or longer")
    return raw


def compress(planes: Any, level: int, zeros: int) -> bytes:
    planes = planes.copy()
    planes[:zeros] = 0
    return zlib.compress(planes.tobytes(), level)


def codec(**changes: Any) -> Codec:
    """A codec of somebody else's, by the zlib of Python, with something changed."""
    mine = Codec("mine", 1, 1, range(1, 10), compress, bounded, lambda level: (level,))
    return dataclasses.replace(mine, **changes)


def test_a_codec_of_somebody_else() -> None:
    check_codec(codec())


def quiet_nans(planes: Any, level: int, zeros: int) -> bytes:
    """As many libraries do that convert floats: the payload of a NaN is lost."""
    values = np.ascontiguousarray(planes.T).view(f"f{len(planes)}" if len(planes) > 1 else "u1").copy()
    if len(planes) > 1:
        values[np.isnan(values)] = np.nan
    return compress(np.ascontiguousarray(values.view(np.uint8).reshape(-1, len(planes)).T), level, zeros)


def in_place(planes: Any, level: int, zeros: int) -> bytes:
    made = compress(planes, level, zeros)
    planes[-1] = 0
    return made


class Counting:
    """Keeps state: the stream depends on what was compressed before."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, planes: Any, level: int, zeros: int) -> bytes:
        self.calls += 1
        return compress(planes, 1 + self.calls % 9, zeros)


class SharedRoom:
    """Not thread safe: one buffer for all calls."""

    def __init__(self) -> None:
        self.room = b""

    def __call__(self, planes: Any, level: int, zeros: int) -> bytes:
        self.room = compress(planes, level, zeros)
        time.sleep(1e-4)
        return self.room


def trusting(stream: bytes, nbytes: int) -> bytes:
    """Makes as many bytes as the stream holds, be they gigabytes."""
    bounded(stream, 1 << 30)
    return zlib.decompress(stream)


def ignoring_the_rest(stream: bytes, nbytes: int) -> bytes:
    try:
        return zlib.decompressobj().decompress(stream, nbytes + 1)
    except zlib.error as error:
        raise DamagedError(str(error)) from error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "must have a name"),
        ({"default_level": 77}, "usual level"),
        ({"compress": quiet_nans}, r"bit by bit; of random bits.* values of float.*\(nan\) came back as"),
        ({"compress": in_place}, "must not change the values"),
        ({"compress": Counting()}, "same bytes each time"),
        ({"compress": SharedRoom()}, "several threads at once"),
        ({"compress": lambda planes, level, zeros: zlib.compress(planes.tobytes(), level)}, "first `zeros` planes"),
        ({"compress": lambda planes, level, zeros: b"\0" * 9999 + compress(planes, level, zeros)}, "may be stored"),
        ({"decompress": lambda stream, nbytes: zlib.decompress(stream)}, "must raise DamagedError; it raised error"),
        ({"decompress": trusting}, "one byte too many may be made"),
        ({"decompress": ignoring_the_rest}, "cut to .* bytes must raise|more bytes must raise"),
        ({"decompress": lambda stream, nbytes: bounded(stream, nbytes)[:-1]}, "bytes of"),
        ({"filter": 2, "options": lambda level: ()}, "libhdf5 must read"),
        ({"compress": lambda planes, level, zeros: 1 / 0}, "raised ZeroDivisionError"),
    ],
)
def test_what_is_wrong_with_a_codec_is_seen(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_codec(codec(**changes))


# ------------------------------------------------------------------------------------------------------------- sources


def test_our_sources_keep_their_promises(tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", 12, {5: b"no image"})
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(f"photos/{n:04}.png,{n % 3}\n" for n in range(12)))
    (tmp_path / "lost.txt").write_text("photos/0001.png\nphotos/nowhere.png\n")
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    given: list[Any] = [photos, tmp_path / "list.csv", tmp_path / "lost.txt", photos / "0001.png", images]
    given += [list(images), [Image.fromarray(image) for image in images], torch.from_numpy(images)]
    for source in given:
        check_source(lambda source=source: open_source(source))
        check_source(lambda source=source: open_source(source, limit=1))


class Mine:
    """A source of somebody else's, with something changed below."""

    name = "mine"

    def __len__(self) -> int:
        return 40

    def key(self, row: int) -> str:
        return f"{row:03}"

    def label(self, row: int) -> Any:
        return row % 3

    def load(self, row: int) -> Any:
        return np.random.default_rng(row).integers(0, 256, (6, 6, 3), np.uint8)

    def fingerprint(self) -> dict[str, Any]:
        return {"count": 40}


def test_a_source_of_somebody_else() -> None:
    check_source(Mine)


class Shuffled(Mine):
    """As os.listdir on some file systems: each time in another order."""

    def __init__(self) -> None:
        self.order = random.sample(range(40), 40)

    def key(self, row: int) -> str:
        return f"{self.order[row]:03}"


class Growing(Mine):
    """`len` reads on: it is another number each time."""

    count = 40

    def __len__(self) -> int:
        self.count += 1
        return self.count


class Twice(Mine):
    def key(self, row: int) -> str:
        return f"{row // 2:03}"


class Augmented(Mine):
    """Random crops: another image each time."""

    def load(self, row: int) -> Any:
        return np.random.default_rng().integers(0, 256, (6, 6, 3), np.uint8)


class Sequential(Mine):
    """Keeps a position in a stream: right only in the order of the rows."""

    at = -1

    def load(self, row: int) -> Any:
        self.at += 1
        return super().load(self.at % 40)


class OneHandle(Mine):
    """Says that it is thread safe, and seeks in one file for all threads."""

    thread_safe = True
    at = 0

    def load(self, row: int) -> Any:
        self.at = row
        time.sleep(1e-4)
        return super().load(self.at)


class Raising(Mine):
    def load(self, row: int) -> Any:
        if row == 7:
            raise FileNotFoundError(row)
        return super().load(row)


class Failing(Raising):
    """As it should be."""

    def load(self, row: int) -> Any:
        try:
            return super().load(row)
        except FileNotFoundError as error:
            raise SampleError(Status.UNREADABLE, "gone") from error


class Counted(Mine):
    loaded = 0

    def load(self, row: int) -> Any:
        self.loaded += 1
        return super().load(row)

    def fingerprint(self) -> dict[str, Any]:
        return {"loaded": self.loaded}


class Odd(Mine):
    def label(self, row: int) -> Any:
        return object()


class Restless(Mine):
    def label(self, row: int) -> Any:
        return random.random()


class Today(Mine):
    def fingerprint(self) -> Any:
        return {"opened": id(self)}


def test_a_source_whose_images_fail_as_they_should() -> None:
    check_source(Failing)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Shuffled, "rows must keep their order, opened again; row"),
        (Growing, "number of rows must stay the same"),
        (Twice, "rows 0 and 1 both have '000'"),
        (Augmented, "must be the same image, asked again"),
        (Sequential, "must be the same image, asked again"),
        (OneHandle, "several threads at once; row"),
        (Raising, "row 7: .* must be a SampleError; it raised FileNotFoundError"),
        (Counted, "must not depend on what was loaded"),
        (Odd, "label of row 0 must be what JSON can hold"),
        (Restless, "must keep its label"),
        (Today, "fingerprint must be the same when opened again"),
        (object, "lacks"),
        (type("Empty", (Mine,), {"key": lambda self, row: ""}), "not empty"),
        (type("Words", (Mine,), {"load": lambda self, row: ["a.png"]}), "must be its encoded bytes"),
        (type("Notes", (Mine,), {"notes": "passed over 3"}), "list of texts"),
    ],
)
def test_what_is_wrong_with_a_source_is_seen(source: Callable[[], Any], message: str) -> None:
    made = []  # kept: the ids of what is gone are given again

    def opened() -> Any:
        made.append(source())
        return made[-1]

    with pytest.raises(AssertionError, match=message):
        check_source(opened)


# ------------------------------------------------------------------------------------------------------------ reducers


@pytest.mark.parametrize(
    ("reducer", "shape"),
    [
        *((name, (6, 8, 8)) for name in ("mean", "max", "pool:3", "flatten", "channels:1-3", "top")),
        *((name, (17, 6)) for name in ("cls", "tokens", "mean")),
    ],
)
def test_our_reducers_keep_their_promises(reducer: str, shape: tuple[int, ...]) -> None:
    check_reducer(reducer, shape)


def test_a_reducer_of_somebody_else() -> None:
    check_reducer(lambda maps: maps.float().std((2, 3)))
    check_reducer(lambda maps: maps[:, :2])


class Smoothed:
    """Keeps state: a running mean over batches."""

    mean: Any = 0.0

    def __call__(self, maps: torch.Tensor) -> torch.Tensor:
        self.mean = 0.9 * self.mean + 0.1 * float(maps.float().mean())
        return maps.mean((2, 3)) - self.mean


def in_place_relu(maps: torch.Tensor) -> torch.Tensor:
    return maps.relu_().mean((2, 3))


@pytest.mark.parametrize(
    ("reducer", "message"),
    [
        (lambda maps: maps - maps.mean(), "alone and beside others"),
        (lambda maps: maps.mean((2, 3)).flip(0), "images must keep their order|alone and beside others"),
        (lambda maps: maps.squeeze(0).mean((-2, -1)), "a row per image"),
        (lambda maps: maps.mean(), "a row per image"),
        (lambda maps: maps.numpy().mean((2, 3)), "must return a tensor"),
        (lambda maps: torch.from_numpy(maps.numpy().mean((2, 3))), "must take torch.bfloat16 maps"),
        (lambda maps: torch.fft.fft(maps.float()), "real numbers"),
        (lambda maps: maps.double() if len(maps) == 1 else maps, "type must not depend on how many images"),
        (lambda maps: maps + torch.rand(()), "the same for the same maps"),
        (lambda maps: maps.view(len(maps), -1)[:, :3], "must take channels-last maps"),
        (Smoothed(), "the same for the same maps|keep nothing"),
        (in_place_relu, "must not change its input"),
        (lambda maps: maps[:, :, maps[0, 0, :, 0] > 0], "shape must not depend|alone and beside others"),
    ],
)
def test_what_is_wrong_with_a_reducer_is_seen(reducer: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_reducer(reducer)


# ------------------------------------------------------------------------------------------------------------- readers


def test_our_reader_keeps_its_promises() -> None:
    check_reader(fmextract.open, ("gzip", "none", "zstd", "lz4"))


class Reader:
    """A reader over ours, with something changed by those below."""

    def __init__(self, path: Path) -> None:
        self.acts = fmextract.open(path)
        self.layers: Any = self.acts.layers
        self.keys: Any = self.acts.keys
        self.status: Any = self.acts.status

    def row(self, key: str) -> int:
        return self.acts.row(key)

    def __getitem__(self, name: str) -> Any:
        return self.layer(self.acts[name])

    def layer(self, layer: Any) -> Any:
        return layer


class OfLayer:
    """A layer over ours."""

    def __init__(self, layer: Any) -> None:
        self.stored = layer
        self.shape, self.dtype = layer.shape, layer.dtype

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, key: Any) -> Any:
        return self.stored[key]

    def batches(self, size: int) -> Any:
        return self.stored.batches(size)


def reader(**methods: Any) -> Callable[[Path], Reader]:
    layer = type("Changed", (OfLayer,), methods)
    return type("ChangedReader", (Reader,), {"layer": lambda self, stored: layer(stored)})


class Sorted(Reader):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.layers = sorted(self.layers)


class Blind(Reader):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.status = np.zeros_like(self.status)


class GlobalRows(Reader):
    def row(self, key: str) -> int:
        return int(key[4:9])


def without_payloads(self: Any, key: Any) -> Any:
    values = np.array(self.stored[key])
    if values.dtype.kind == "f":
        values[np.isnan(values)] = np.nan
    return values


def cached(self: Any, key: Any) -> Any:
    if not isinstance(key, int):
        return self.stored[key]
    kept = self.stored.acts.__dict__.setdefault("kept", {})
    return kept.setdefault((self.stored.name, key), self.stored[key])


def one_cursor(self: Any, key: Any) -> Any:
    self.at = key
    time.sleep(1e-4)
    return self.stored[self.at]


def all_rows(self: Any, size: int) -> Any:
    return self.stored.batches(size, include_failed=True)


def wrapping(self: Any, key: Any) -> Any:
    return self.stored[key % len(self)] if isinstance(key, int) else self.stored[key]


@pytest.mark.parametrize(
    ("opened", "message"),
    [
        (Sorted, "in the order they ran"),
        (Blind, "the status must be"),
        (GlobalRows, "must count from the first row"),
        (reader(__getitem__=without_payloads), r"bit by bit; at .* \(0x"),
        (reader(__getitem__=lambda self, key: self.stored[key].astype(np.float32)), "must be float16|must be int16"),
        (reader(__getitem__=cached), "somebody wrote into the array"),
        (reader(__getitem__=one_cursor), "several threads at once"),
        (reader(__getitem__=wrapping), "must be an IndexError"),
        (reader(__getitem__=lambda self, key: self.stored[key].tolist()), "must be numpy's"),
        (reader(__len__=lambda self: len(SHAPES)), "len must count rows"),
        (reader(batches=all_rows), "the rows that did not fail"),
        (reader(batches=lambda self, size: reversed(list(self.stored.batches(size)))), "in order"),
        (reader(batches=lambda self, size: self.stored.batches(2 * size)), "5 rows at most"),
        (lambda path: fmextract.open(path / "x"), "must open; it raised FormatError"),
    ],
)
def test_what_is_wrong_with_a_reader_is_seen(opened: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_reader(opened, ("gzip",))


def test_a_codec_that_the_reader_does_not_know() -> None:
    with pytest.raises(ConfigError, match="expected one of gzip"):
        check_reader(fmextract.open, ("zip",))
