"""Chunks against what we did not write: libhdf5's own filters, zlib, exact arithmetic."""

from __future__ import annotations

import struct
import sys
import threading
import time
import tracemalloc
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from isal import isal_zlib

from fmextract.errors import ConfigError, DamagedError, MissingExtra
from fmextract.storage.codecs import CODECS, codec_named, decode, encode, filters_to_codec, pick, round_mantissa, unpack

TYPES = ("float16", "float32", "float64", "uint8", "int16", "int32", "int64")


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def expected_chunk(given: np.ndarray, count: int) -> np.ndarray:
    """What stands on disk for these values of a chunk: them, then the fill value."""
    rest = np.full(count - given.size, np.nan if given.dtype.kind == "f" else 0, given.dtype)
    return np.concatenate([given.reshape(-1), rest])


def read_by_hdf5(path: Path, payload: bytes, codec: str, dtype: str, count: int) -> np.ndarray:
    """The chunk as libhdf5's own filters undo it."""
    kwargs: dict[str, Any] = {
        "gzip": {"shuffle": True, "compression": "gzip", "compression_opts": 1},
        "zstd": {"shuffle": True, **hdf5plugin.Zstd(clevel=1)},
        "lz4": {"shuffle": True, **hdf5plugin.LZ4()},
        "none": {},
    }[codec]
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("x", (count,), dtype, chunks=(count,), **kwargs)
        dataset.id.write_direct_chunk((0,), payload)
    with h5py.File(path) as file:
        assert filters_to_codec(file["x"].id.get_create_plist(), np.dtype(dtype).itemsize) == codec
        return file["x"][:]


def written_by_hdf5(path: Path, array: np.ndarray, **filters: Any) -> bytes:
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("x", data=array, chunks=array.shape, **filters)
        return dataset.id.read_direct_chunk((0,))[1]


@pytest.mark.parametrize("codec", CODECS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_bits_come_back(codec: str, data: st.DataObject) -> None:
    dtype = np.dtype(data.draw(st.sampled_from(TYPES)))
    count = data.draw(st.integers(1, 300))
    there = data.draw(st.integers(0, count))
    raw = data.draw(st.binary(min_size=there * dtype.itemsize, max_size=there * dtype.itemsize))
    whole = np.frombuffer(raw, dtype)
    cuts = sorted(data.draw(st.lists(st.integers(0, there), max_size=3)))
    pieces = np.split(whole, cuts)
    payload = encode(pieces, codec=codec, level=None, dtype=dtype.name, values=count)
    assert same_bits(decode(payload, codec=codec, dtype=dtype.name, values=count), expected_chunk(whole, count))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("codec", CODECS)
def test_hdf5_reads_what_we_encode(tmp_path: Path, codec: str, dtype: str) -> None:
    array = (np.random.default_rng(1).standard_normal(3000) * 40).astype(dtype)
    payload = encode([array], codec=codec, level=None, dtype=dtype, values=4096)
    assert same_bits(read_by_hdf5(tmp_path / "x.h5", payload, codec, dtype, 4096), expected_chunk(array, 4096))


@pytest.mark.parametrize("level", CODECS["gzip"].levels)
def test_every_gzip_level_is_a_zlib_stream(level: int) -> None:
    array = np.linspace(-1, 1, 5000, dtype=np.float32)
    payload = encode([array], codec="gzip", level=level, dtype="float32", values=5000)
    assert zlib.decompress(payload) == array.view(np.uint8).reshape(-1, 4).T.tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_maps_after_a_relu_take_less_than_a_full_window_makes_of_them(dtype: str) -> None:
    rng = np.random.default_rng(0)
    maps = np.maximum(rng.standard_normal((64, 28, 28), np.float32), 0)
    words = maps.view(np.uint32) >> 16 if dtype == "bfloat16" else maps.view(np.uint32)
    array = words.astype(np.uint16) if dtype == "bfloat16" else maps
    payload = encode([array], codec="gzip", level=None, dtype="float32", values=maps.size, bfloat16=dtype == "bfloat16")
    wide = np.ascontiguousarray(words << 16 if dtype == "bfloat16" else words)
    planes = wide.reshape(-1).view(np.uint8).reshape(-1, 4).T.tobytes()
    assert zlib.decompress(payload) == planes
    assert len(payload) < 0.97 * len(isal_zlib.compress(planes, 1))


@pytest.mark.parametrize("count", [12288, 65535, 65536, 140_000])
@pytest.mark.parametrize("noisy", [(0, 1, 2), (0, 3), (1, 2), (3,), (0, 1, 2, 3), ()])
def test_planes_of_noise_are_stored_within_a_valid_stream(tmp_path: Path, noisy: tuple[int, ...], count: int) -> None:
    rng = np.random.default_rng(count)
    planes = rng.integers(0, 3, (4, count), np.uint8)
    for plane in noisy:
        planes[plane] = rng.integers(0, 256, count, np.uint8)
    array = np.ascontiguousarray(planes.T).view(np.uint32).reshape(-1)
    payload = encode([array], codec="gzip", level=None, dtype="uint32", values=count)
    assert zlib.decompress(payload) == planes.tobytes()
    assert len(payload) < len(noisy) * count * 1.001 + (4 - len(noisy)) * count * 0.3 + 200
    if noisy:  # every value of a stored plane can be found in the stream as it is
        assert planes[noisy[0]][:1000].tobytes() in payload
    assert same_bits(read_by_hdf5(tmp_path / "x.h5", payload, "gzip", "uint32", count), array)
    assert same_bits(decode(payload, codec="gzip", dtype="uint32", values=count), array)
    with pytest.raises(DamagedError):
        decode(payload[:-1], codec="gzip", dtype="uint32", values=count)


@pytest.mark.parametrize(
    ("codec", "filters"),
    [
        ("gzip", {"shuffle": True, "compression": "gzip", "compression_opts": 9}),
        ("zstd", {"shuffle": True, **hdf5plugin.Zstd(clevel=5)}),
        ("lz4", {"shuffle": True, **hdf5plugin.LZ4(nbytes=1000)}),  # several blocks, the last one short
        ("none", {}),
    ],
)
@pytest.mark.parametrize("dtype", TYPES)
def test_we_decode_what_hdf5_writes(tmp_path: Path, codec: str, filters: dict[str, Any], dtype: str) -> None:
    array = (np.random.default_rng(2).standard_normal(3333) * 40).astype(dtype)
    array[1000:2000] = 0
    payload = written_by_hdf5(tmp_path / "x.h5", array, **filters)
    assert same_bits(decode(payload, codec=codec, dtype=dtype, values=3333), array)


@pytest.mark.parametrize("codec", CODECS)
def test_decode_into_given_room(codec: str) -> None:
    array = np.arange(24, dtype=np.float32)
    payload = encode([array], codec=codec, level=None, dtype="float32", values=24)
    room = np.zeros((2, 3, 4), np.float32)
    result = decode(payload, codec=codec, dtype="float32", values=24, out=room)
    assert np.shares_memory(result, room)
    assert result.shape == (24,)
    assert same_bits(room.reshape(-1), array)
    for wrong in (np.zeros(23, np.float32), np.zeros(24, np.int32), np.zeros((4, 12), np.float32)[:, ::2]):
        with pytest.raises(ValueError, match="room for 24"):
            decode(payload, codec=codec, dtype="float32", values=24, out=wrong)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", TYPES)
def test_values_picked_of_a_chunk(codec: str, dtype: str) -> None:
    array = (np.random.default_rng(3).standard_normal((6, 5, 4)) * 40).astype(dtype)
    payload = encode([array], codec=codec, level=None, dtype=dtype, values=array.size)
    raw = unpack(payload, codec=codec, nbytes=array.nbytes)
    for at in (
        (),
        (slice(2, 3),),
        (slice(None, None, -2), slice(1, 4)),
        (slice(0, 0),),
        (np.array([5, 0, 5]),),
        np.ix_([1, 0], [4, 4, 2], range(4)),
    ):
        assert same_bits(pick(raw, codec=codec, dtype=dtype, shape=array.shape, at=at), array[at])
    with pytest.raises(DamagedError):
        unpack(payload, codec=codec, nbytes=array.nbytes - 1)


# --------------------------------------------------------------------------------------------- widening and narrowing


@pytest.mark.parametrize("codec", ["gzip", "none"])
def test_every_bfloat16_widens_exactly(codec: str) -> None:
    words = np.arange(1 << 16, dtype=np.uint16)
    payload = encode(
        [words[:1000], words[1000:]], codec=codec, level=None, dtype="float32", values=70000, bfloat16=True
    )
    result = decode(payload, codec=codec, dtype="float32", values=70000)
    assert np.array_equal(result[: 1 << 16].view(np.uint32), words.astype(np.uint32) << 16)
    assert np.isnan(result[1 << 16 :]).all()


def test_every_float16_widens_exactly() -> None:
    words = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    payload = encode([words], codec="gzip", level=None, dtype="float32", values=1 << 16)
    assert same_bits(decode(payload, codec="gzip", dtype="float32", values=1 << 16), words.astype(np.float32))


def test_narrowing_rounds_once_and_overflows_to_infinity() -> None:
    wide = np.array([1.0, 1 + 2**-11, 1 + 3 * 2**-11, 65519.0, 65520.0, -1e30, 1e-30, np.nan], np.float32)
    payload = encode([wide], codec="gzip", level=None, dtype="float16", values=8)
    result = decode(payload, codec="gzip", dtype="float16", values=8)
    expected = [1.0, 1.0, 1 + 2**-9, 65504.0, np.inf, -np.inf, 0.0, np.nan]
    np.testing.assert_array_equal(result, np.array(expected, np.float16))
    # 1 + 2**-6 + 2**-12 is just over half way between two values of 5 bits; narrowed first, it would look half way.
    over_half = np.array([1 + 2**-6 + 2**-12], np.float32)
    payload = encode([over_half], codec="none", level=None, dtype="float16", values=1, keep_bits=5)
    assert decode(payload, codec="none", dtype="float16", values=1)[0] == 1 + 2**-5


def test_bfloat16_narrows_to_float16() -> None:
    words = np.array([0x3F80, 0xC2F6, 0x7F7F], np.uint16)
    payload = encode([words], codec="gzip", level=None, dtype="float16", values=3, bfloat16=True)
    assert decode(payload, codec="gzip", dtype="float16", values=3).tolist() == [1.0, -123.0, np.inf]


@pytest.mark.parametrize(("piece", "dtype"), [(np.zeros(3, np.float64), "float32"), (np.zeros(3, np.int32), "float32")])
def test_other_conversions_are_refused(piece: np.ndarray, dtype: str) -> None:
    with pytest.raises(ValueError, match="expected a piece of float32"):
        encode([piece], codec="gzip", level=None, dtype=dtype, values=3)


def test_pieces_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 5 values"):
        encode([np.zeros(3, np.float32)] * 2, codec="gzip", level=None, dtype="float32", values=5)
    with pytest.raises(ValueError, match="C-contiguous"):
        encode([np.zeros((3, 4), np.float32).T], codec="gzip", level=None, dtype="float32", values=12)
    with pytest.raises(ValueError, match="bfloat16 as uint16"):
        encode([np.zeros(3, np.float32)], codec="gzip", level=None, dtype="float32", values=3, bfloat16=True)


# ------------------------------------------------------------------------------------------------------------ rounding

LEAST_EXPONENT = {"float16": -14, "float32": -126, "float64": -1022}


def rounded_exactly(value: Any, bits: int, dtype: str) -> Any:
    """Rounding in exact arithmetic: to the nearest multiple of the unit of the last kept bit, ties to even."""
    exact = Fraction(float(value))
    if exact == 0:
        return value
    exponent = max(np.frexp(np.float64(value))[1] - 1, LEAST_EXPONENT[dtype])
    unit = Fraction(2) ** int(exponent - bits)
    result = round(exact / unit) * unit
    largest = Fraction(float(np.finfo(dtype).max))
    if abs(result) > largest:
        return np.copysign(np.inf, value)
    return np.copysign(np.dtype(dtype).type(float(result)), value)


def test_rounding_of_every_float16() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    for bits in (1, 2, 5, 9):
        expected = np.array([rounded_exactly(value, bits, "float16") for value in finite[::7]], np.float16)
        assert same_bits(round_mantissa(finite[::7], bits), expected), bits
        special = every[~np.isfinite(every)]
        assert same_bits(round_mantissa(special, bits), special), bits


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_rounding_is_exact(dtype: str, data: st.DataObject) -> None:
    width = np.dtype(dtype).itemsize * 8
    value = np.dtype(dtype).type(data.draw(st.floats(width=width, allow_nan=False, allow_infinity=False)))
    bits = data.draw(st.integers(1, np.finfo(dtype).nmant))
    assert same_bits(round_mantissa(np.array([value]), bits), np.array([rounded_exactly(value, bits, dtype)], dtype))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_rounding_leaves_nan_payloads_and_overflows_only_past_the_largest(dtype: str) -> None:
    info, word = np.finfo(dtype), np.dtype(f"u{np.dtype(dtype).itemsize}")
    # A signalling NaN whose only mantissa bit is one that rounding drops: cleared, it would be an infinity.
    nan = np.array([np.array([np.inf], dtype).view(word)[0] + word.type(1)], word).view(dtype)
    assert same_bits(round_mantissa(nan, 3), nan)
    largest_of_3_bits = np.array([(2 - 2**-3) * 2.0 ** (info.maxexp - 1)], dtype)
    assert same_bits(round_mantissa(largest_of_3_bits, 3), largest_of_3_bits)
    assert round_mantissa(np.array([info.max], dtype), 3)[0] == np.inf


@pytest.mark.parametrize("codec", ["gzip", "none"])
def test_keep_bits_rounds_what_is_stored_and_not_the_piece(codec: str) -> None:
    piece = np.random.default_rng(3).standard_normal(500).astype(np.float32)
    before = piece.tobytes()
    piece.flags.writeable = False
    payload = encode([piece], codec=codec, level=None, dtype="float32", values=512, keep_bits=7)
    result = decode(payload, codec=codec, dtype="float32", values=512)
    assert same_bits(result[:500], round_mantissa(piece, 7))
    assert not same_bits(result[:500], piece)
    assert piece.tobytes() == before


def test_keep_bits_of_bfloat16_float16_and_integers() -> None:
    words = np.arange(0, 1 << 16, 3, dtype=np.uint16)
    wide = (words.astype(np.uint32) << 16).view(np.float32)
    options: dict[str, Any] = {"codec": "gzip", "level": None, "dtype": "float32", "values": words.size}
    few = decode(
        encode([words], keep_bits=3, bfloat16=True, **options), codec="gzip", dtype="float32", values=words.size
    )
    assert same_bits(few, round_mantissa(wide, 3))
    half = words.view(np.float16)
    few = decode(encode([half], keep_bits=3, **options), codec="gzip", dtype="float32", values=words.size)
    assert same_bits(few, round_mantissa(half.astype(np.float32), 3))
    options["dtype"] = "uint16"
    assert same_bits(
        decode(encode([words], keep_bits=3, **options), codec="gzip", dtype="uint16", values=words.size), words
    )
    with pytest.raises(ConfigError, match="at least 1"):
        encode([half], keep_bits=0, codec="gzip", level=None, dtype="float32", values=words.size)


# -------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("codec", CODECS)
def test_stored_bytes_are_no_view_of_the_pieces(codec: str) -> None:
    """The buffer that a piece lies in is filled anew while its chunk waits for the disk."""
    piece = np.random.default_rng(5).standard_normal(1000).astype(np.float32)
    before = piece.copy()
    payload = encode([piece], codec=codec, level=None, dtype="float32", values=1000)
    piece[:] = -1
    assert np.array_equal(decode(bytes(payload), codec=codec, dtype="float32", values=1000), before)


@pytest.mark.parametrize("codec", CODECS)
def test_wrong_lengths_are_damage(codec: str) -> None:
    array = np.random.default_rng(4).standard_normal(1000).astype(np.float32)
    payload = bytes(encode([array], codec=codec, level=None, dtype="float32", values=1000))
    for stream, count in (
        (payload[:-1], 1000),
        (payload[:5], 1000),
        (b"", 1000),
        (payload + b"\0", 1000),
        (payload, 999),
        (payload, 1001),
        (payload, 10),
    ):
        with pytest.raises(DamagedError):
            decode(stream, codec=codec, dtype="float32", values=count)


@pytest.mark.parametrize("codec", ["gzip", "zstd", "lz4"])
@given(stream=st.binary(max_size=60))
@settings(max_examples=150, deadline=None)
def test_noise_is_damage_and_nothing_else(codec: str, stream: bytes) -> None:
    with pytest.raises(DamagedError):
        decode(stream, codec=codec, dtype="float64", values=1000)


def test_a_flipped_bit_of_a_gzip_chunk_is_seen_wherever_zlib_sees_it() -> None:
    array = np.maximum(np.random.default_rng(5).standard_normal(300), 0).astype(np.float32)
    payload = encode([array], codec="gzip", level=None, dtype="float32", values=300)
    seen = 0
    for bit in range(8 * len(payload)):
        flipped = bytearray(payload)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            planes = zlib.decompress(flipped)
        except zlib.error:
            seen += 1
            with pytest.raises(DamagedError):
                decode(bytes(flipped), codec="gzip", dtype="float32", values=300)
        else:  # bits that deflate does not use, and the rare collision of Adler-32: what `content_digest` is for
            result = decode(bytes(flipped), codec="gzip", dtype="float32", values=300)
            assert result.tobytes() == np.frombuffer(planes, np.uint8).reshape(4, 300).T.tobytes()
    assert seen > 0.99 * 8 * len(payload)


ZEROS = bytes(100 << 20)
BOMBS = {
    "gzip": lambda: zlib.compress(ZEROS, 9),
    "zstd, size stated": lambda: zstandard.ZstdCompressor().compress(ZEROS),
    "zstd, size not stated": lambda: zstandard.ZstdCompressor(write_content_size=False).compress(ZEROS),
    "lz4": lambda: struct.pack(">qii", len(ZEROS), 1 << 30, 4) + b"\0" * 4,
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_not_inflated(bomb: str) -> None:
    stream = BOMBS[bomb]()
    codec = bomb.split(",")[0]
    tracemalloc.start()
    try:
        with pytest.raises(DamagedError):
            decode(stream, codec=codec, dtype="float32", values=1000)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


# --------------------------------------------------------------------------------------------------- names and threads


def test_unknown_names_and_levels_say_what_there_is() -> None:
    with pytest.raises(ConfigError, match="gzip, zstd, lz4, none"):
        codec_named("lzma")
    with pytest.raises(ConfigError, match="--level 9: codec gzip has levels 0 to 3"):
        encode([], codec="gzip", level=9, dtype="float32", values=1)


@pytest.mark.parametrize(("codec", "module"), [("zstd", "zstandard"), ("lz4", "lz4.block")])
def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch, codec: str, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=rf"fmextract\[{codec}\]"):
        decode(b"", codec=codec, dtype="float32", values=1)


def test_pipelines_that_are_not_ours_are_left_to_hdf5(tmp_path: Path) -> None:
    data = np.zeros(100, np.float32)
    foreign: list[dict[str, Any]] = [
        {"compression": "gzip"},
        {"compression": "lzf"},
        {"shuffle": True, "compression": "gzip", "fletcher32": True},
        {"shuffle": True},
        # Not Blosc: netCDF4's wheel brings another build of it, and whichever was loaded first serves both.
        dict(hdf5plugin.Bitshuffle()),
    ]
    with h5py.File(tmp_path / "x.h5", "w") as file:
        for number, filters in enumerate(foreign):
            plist = file.create_dataset(str(number), data=data, chunks=(50,), **filters).id.get_create_plist()
            assert filters_to_codec(plist, 4) is None, filters
        ours = file.create_dataset("ours", data=data, chunks=(50,), shuffle=True, compression="gzip")
        assert filters_to_codec(ours.id.get_create_plist(), 4) == "gzip"
        assert filters_to_codec(ours.id.get_create_plist(), 8) is None


@pytest.mark.parametrize("codec", ["gzip", "zstd", "lz4"])
def test_compressors_release_the_gil(codec: str) -> None:
    planes = np.random.default_rng(6).integers(0, 40, (4, 8 << 20), np.uint8)
    CODECS[codec].compress(planes[:, :100].copy(), 1)
    started, turns = threading.Event(), 0
    interval = sys.getswitchinterval()
    # With so long an interval nothing takes the GIL from a thread that does not give it away.
    sys.setswitchinterval(100)
    try:
        # Several times: on a busy machine a quick codec would be done before anybody had a turn.
        worker = threading.Thread(target=lambda: (started.set(), [CODECS[codec].compress(planes, 1) for _ in range(8)]))
        worker.start()
        started.wait()
        while worker.is_alive():
            time.sleep(0.001)
            turns += 1
    finally:
        sys.setswitchinterval(interval)
        worker.join()
    assert turns > 5


@pytest.mark.parametrize("codec", CODECS)
def test_threads_do_not_disturb_each_other(codec: str) -> None:
    arrays = [np.random.default_rng(seed).standard_normal(20000).astype(np.float32) for seed in range(4)]
    wrong: list[int] = []

    def work(seed: int) -> None:
        for _ in range(10):
            payload = encode([arrays[seed]], codec=codec, level=None, dtype="float32", values=20000)
            if not same_bits(decode(payload, codec=codec, dtype="float32", values=20000), arrays[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
