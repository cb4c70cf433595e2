"""What a codec must keep to: every bit comes back, in any thread, and a damaged stream is refused."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from fmextract.errors import ConfigError, DamagedError
from fmextract.storage.codecs import Codec, most_stored
from fmextract.storage.through_hdf5 import values_by_libhdf5
from fmextract.testing.promises import attempt, broken, in_threads, keeps, unless

Array = npt.NDArray[Any]

TYPES = ("float32", "float16", "float64", "int8", "int16")
SIZES = (1, 7, 4099)
"""Values of a chunk; the last is more than a sample of one, and no multiple of anything."""


def check_codec(codec: Codec) -> None:
    """Check that a codec keeps every bit, keeps no state, bears threads, and refuses streams that are damaged.

    Values of several types are tried at its lowest, usual and highest level: random bits (NaN payloads among them),
    zeros, runs, smooth maps. What it wrote is read through libhdf5, too, where that has its filter.

    Args:
        codec: what stands in `fmextract.storage.codecs.CODECS`, or would.

    Raises:
        AssertionError: which promise it breaks, and for which values.

    >>> import zlib
    >>> from fmextract.storage.codecs import Codec
    >>> lossy = Codec("lossy", 1, 1, range(10), lambda planes, level, zeros: zlib.compress(bytes(planes.size), level),
    ...               lambda stream, nbytes: zlib.decompress(stream), lambda level: (level,))
    >>> check_codec(lossy)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    AssertionError: codec lossy: what was compressed must come back bit by bit; of random bits, 1 values of float32 ...
    """
    name = f"codec {codec.name}"
    _check_levels(codec, name)
    levels = sorted({codec.levels[0], codec.default_level, codec.levels[-1]})
    for dtype in TYPES:
        for what, values in _samples(dtype):
            for level in levels:
                _check_values(codec, name, what, values, level)
    _check_threads(codec, name)
    if codec.shuffled:  # else what is stored are the values themselves, and there is nothing to tell damage by
        _check_zeros(codec, name)
        _check_damage(codec, name)


def _check_levels(codec: Codec, name: str) -> None:
    keeps(bool(codec.name) and codec.name.isprintable(), "a codec must have a name", f"it is {codec.name!r}")
    keeps(
        codec.default_level in codec.levels, f"{name}: its usual level must be one of {codec.levels}", "it is another"
    )
    for level in (codec.levels.start - 1, codec.levels.stop):
        promise = f"{name}: a level that it does not have must be a ConfigError"
        error = unless(ConfigError, partial(codec.checked_level, level), promise)
        keeps(isinstance(error, ConfigError), promise, f"{level} was taken")


def _samples(dtype: str) -> Iterator[tuple[str, Array]]:
    """What to compress, and a word for it."""
    dice, kind = np.random.default_rng(0), np.dtype(dtype)
    for size in SIZES:
        bits = dice.integers(0, 256, size * kind.itemsize, np.uint8).view(kind)
        yield "random bits", bits
        yield "zeros", np.zeros(size, kind)
        yield "runs", np.repeat(bits, 16)[:size]
        yield "smooth maps", (np.sin(np.arange(size) / 20) * 100).astype(kind)


def _planes(values: Array) -> Array:
    """The byte planes of values, uint8 (itemsize, values)."""
    return np.ascontiguousarray(values.view(np.uint8).reshape(values.size, values.itemsize).T)


def _compress(codec: Codec, values: Array, level: int, name: str) -> bytes:
    planes = _planes(values)
    before = planes.copy()
    stream = bytes(attempt(lambda: codec.compress(planes, level, 0), f"{name}: any values must be compressed"))
    keeps(np.array_equal(planes, before), f"{name}: compressing must not change the values", "it does")
    return stream


def _check_values(codec: Codec, name: str, what: str, values: Array, level: int) -> None:
    stream = _compress(codec, values, level, name)
    of = f"of {what}, {values.size} values of {values.dtype} at level {level}"
    most = most_stored(values.nbytes)
    keeps(len(stream) <= most, f"{name}: at most {most} bytes may be stored {of}", f"it made {len(stream)}")
    expected = _planes(values).tobytes()
    raw = bytes(attempt(lambda: codec.decompress(stream, len(expected)), f"{name}: what it made must be read {of}"))
    if raw != expected:
        broken(f"{name}: what was compressed must come back bit by bit", f"{of} {_first_difference(raw, values)}")
    keeps(
        _compress(codec, values, level, name) == stream,
        f"{name}: the same values must give the same bytes each time",
        f"they do not, {of}",
    )
    if codec.shuffled:
        read = attempt(
            lambda: values_by_libhdf5(stream, codec, values.dtype.name, values.size),
            f"{name}: libhdf5 must read what it made by its filter {codec.filter} {of}",
        )
        same = read is None or read.tobytes() == values.tobytes()
        keeps(same, f"{name}: libhdf5 must read the same values by its filter {codec.filter}", f"it does not, {of}")


def _first_difference(raw: bytes, values: Array) -> str:
    if len(raw) != values.nbytes:
        return f"came back as {len(raw)} bytes of {values.nbytes}"
    came = np.ascontiguousarray(np.frombuffer(raw, np.uint8).reshape(values.itemsize, -1).T).view(values.dtype)[:, 0]
    word = f"u{values.itemsize}"
    at = int(np.flatnonzero(came.view(word) != values.view(word))[0])
    return f"0x{int(values.view(word)[at]):x} ({values[at]}) came back as 0x{int(came.view(word)[at]):x} ({came[at]})"


def _check_zeros(codec: Codec, name: str) -> None:
    """The first planes may be said to be zeros, whatever they hold."""
    planes = np.random.default_rng(1).integers(0, 256, (4, 999), np.uint8)
    expected = bytes(2 * 999) + planes[2:].tobytes()
    raw = bytes(codec.decompress(codec.compress(planes, codec.default_level, 2), planes.size))
    keeps(raw == expected, f"{name}: the first `zeros` planes are zeros whatever they hold", "other bytes came back")


def _check_threads(codec: Codec, name: str) -> None:
    """Each thread has values and levels of its own, so that a context that is shared shows."""
    values = [np.random.default_rng(n).normal(size=1000 + n).astype(np.float32).round(n % 4) for n in range(64)]
    levels = [codec.levels[n % len(codec.levels)] for n in range(64)]
    alone = [_compress(codec, one, level, name) for one, level in zip(values, levels, strict=True)]

    def both_ways(number: int) -> tuple[bytes, bytes]:
        stream = bytes(codec.compress(_planes(values[number]), levels[number], 0))
        return stream, bytes(codec.decompress(alone[number], values[number].nbytes))

    promise = f"{name}: several threads at once must give what one gives"
    together = attempt(lambda: in_threads(both_ways, list(range(64))), promise)
    expected = [(stream, _planes(one).tobytes()) for stream, one in zip(alone, values, strict=True)]
    keeps(together == expected, promise, "they gave other bytes")


def _check_damage(codec: Codec, name: str) -> None:
    """Cut short, longer, changed and foreign streams raise DamagedError, or give no more bytes than allowed."""
    values = np.repeat(np.random.default_rng(2).normal(size=500).astype(np.float32), 4)
    stream, nbytes = _compress(codec, values, codec.default_level, name), values.nbytes
    dice = np.random.default_rng(3)
    damaged = {f"cut to {end} bytes": stream[:end] for end in (0, 1, len(stream) // 2, len(stream) - 1)}
    damaged |= {"followed by more bytes": stream + stream, "of random bytes": bytes(dice.bytes(len(stream)))}
    changed = {f"with byte {at} changed": at for at in dice.integers(0, len(stream), 40).tolist()}
    for how, at in changed.items():
        damaged[how] = stream[:at] + bytes([stream[at] ^ 0xFF]) + stream[at + 1 :]
    for how, given in damaged.items():
        promise = f"{name}: a stream {how} must raise DamagedError"
        raw = unless(DamagedError, partial(codec.decompress, given, nbytes), promise)
        if not isinstance(raw, DamagedError):
            keeps(len(raw) <= nbytes + 1, f"{promise}, or make {nbytes + 1} bytes at most", f"it made {len(raw)}")
            keeps(len(raw) != nbytes or how in changed, promise, "it passed for a whole one")
    promise = f"{name}: of a stream of too many values one byte too many may be made, and no more"
    raw = unless(DamagedError, partial(codec.decompress, stream, nbytes // 2), promise)
    if not isinstance(raw, DamagedError):
        keeps(len(raw) == nbytes // 2 + 1, promise, f"it made {len(raw)} bytes where {nbytes // 2} were expected")
