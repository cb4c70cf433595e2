"""Encode a chunk of values to bytes and decode it. Each codec equals an HDF5 filter pipeline, so libhdf5 can undo it.

The way of a chunk: pieces of arrays → the words of the type on disk (widened, narrowed, rounded) → byte planes (what
HDF5 calls shuffle: first byte of every value, then second byte of every value, …) → one compressed stream. Where the
channels of a piece lie side by side in memory, they are put in their order on the way to the planes. Nothing here calls
HDF5; `writer` writes the stream as it is. All heavy steps release the GIL: numpy on whole planes, `kernels`, and the
compressors.
"""

from __future__ import annotations

import functools
import math
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from isal import igzip_lib, isal_zlib

from fmextract.common import kernels
from fmextract.errors import ConfigError, DamagedError, MissingExtra

Array: TypeAlias = npt.NDArray[Any]
Stored: TypeAlias = bytes | memoryview
"""The bytes of an encoded chunk."""

SHUFFLE, DEFLATE, LZ4, ZSTD = 2, 1, 32004, 32015
"""Numbers of the HDF5 filters: the first two are built into every libhdf5, the others are registered plugins."""
FLETCHER32, LZF = 3, 32000
"""Filters of h5py that fmextract does not write, and leaves to libhdf5."""
MOST_CHUNK_BYTES = 1 << 30
"""Bytes of the values of a chunk, at most."""

MANTISSA = {"float16": 10, "float32": 23, "float64": 52}
BFLOAT16_MANTISSA = 7
_IsalError: type[Exception] = isal_zlib.error  # type: ignore[assignment]
_WORDS: dict[int, np.dtype[Any]] = {1: np.dtype("u1"), 2: np.dtype("u2"), 4: np.dtype("u4"), 8: np.dtype("u8")}


@dataclass(frozen=True, slots=True)
class Codec:
    """A compressor and the HDF5 filter that undoes it.

    `compress(planes, level, zeros)` takes the byte planes, uint8 (itemsize, values), of which the first `zeros` count
    as zeros, whatever is in them, and returns the stream.
    `decompress(stream, nbytes)` returns what it holds, and never makes more than `nbytes + 1` bytes of it.
    `options(level)` are the client data of the filter.
    """

    name: str
    filter: int | None
    default_level: int
    levels: range
    compress: Callable[[Array, int, int], bytes]
    decompress: Callable[[bytes, int], bytes]
    options: Callable[[int], tuple[int, ...]]

    @property
    def shuffled(self) -> bool:
        """Whether the stream holds byte planes; without a compressor shuffling gains nothing."""
        return self.filter is not None

    def filters(self, itemsize: int, level: int | None = None) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Return the HDF5 pipeline, in the order of writing: (filter number, client data), for values of `itemsize`
        bytes.
        """
        if self.filter is None:
            return ()
        return (SHUFFLE, (itemsize,)), (self.filter, self.options(self.checked_level(level)))

    def checked_level(self, level: int | None) -> int:
        """Return `level`, or the default for None. Raises ConfigError for a level that the codec does not have."""
        if level is None:
            return self.default_level
        if level not in self.levels:
            raise ConfigError(
                f"--level {level}: codec {self.name} has levels {self.levels.start} to {self.levels.stop - 1}"
            )
        return level


FLOAT16_MAX = float(np.finfo(np.float16).max)


def codec_named(name: str) -> Codec:
    """Return the codec of that name; raises ConfigError that lists the names there are."""
    try:
        return CODECS[name]
    except KeyError:
        raise ConfigError(f"--codec {name!r}: expected one of {', '.join(CODECS)}") from None


def filters_to_codec(plist: Any, itemsize: int) -> str | None:
    """Return the codec behind an HDF5 dataset creation property list, for values of `itemsize` bytes.

    None where the pipeline is not one of ours: such chunks are left to libhdf5.
    """
    stages = [plist.get_filter(i) for i in range(plist.get_nfilters())]
    numbers = tuple(stage[0] for stage in stages)
    for codec in CODECS.values():
        if numbers == tuple(number for number, _ in codec.filters(itemsize)):
            shuffled_right = not stages or tuple(stages[0][2]) == (itemsize,)
            return codec.name if shuffled_right else None
    return None


def filters_flaw(plist: Any, itemsize: int) -> str | None:
    """Return why libhdf5 should not be given a pipeline of filters, None where it may be.

    Their code takes client data and the stream for what they themselves wrote (n-bit divides by zero), and what several
    of the same kind unpack has no bound.
    """
    stages = [plist.get_filter(i) for i in range(plist.get_nfilters())]
    numbers = [stage[0] for stage in stages]
    for number, _, given, *_ in stages:
        if number not in (SHUFFLE, DEFLATE, FLETCHER32, LZF, LZ4, ZSTD):
            return f"the filter {number}"
        if numbers.count(number) > 1:
            return f"the filter {number} more than once"
        # h5repack gives a shuffle of texts no client data. libhdf5 skips such a stage, or refuses what went through it.
        odd_shuffle = number == SHUFFLE and tuple(given) not in ((), (itemsize,))
        if odd_shuffle or (number == LZF and max(given, default=0) > MOST_CHUNK_BYTES):
            return f"the filter {number} with the client data {tuple(given)}"
    return None


def most_stored(nbytes: int) -> int:
    """Return the most bytes that a compressor makes of `nbytes` of values; of more, libhdf5 would unpack gigabytes."""
    return nbytes + nbytes // 16 + 4096


# --------------------------------------------------------------------------------------------------- chunk to bytes


def encode(
    pieces: Sequence[Array],
    *,
    codec: str,
    level: int | None,
    dtype: str,
    values: int,
    keep_bits: int | None = None,
    bfloat16: bool = False,
) -> Stored:
    """Return the stored bytes of one chunk of `values` values of type `dtype`.

    The `pieces`, one after the other, are the start of the chunk; the rest is the fill value (NaN, or 0 for integers).
    They are C-contiguous, or, if `takes_channels_last`, (images, channels, positions) in which channels lie side by
    side. They have the type of the disk, or are float16 to widen to
    float32, float32 to narrow to float16 (what overflows becomes infinite: count it before), or with `bfloat16` the
    uint16 bit patterns of bfloat16. `keep_bits` rounds floats to that many mantissa bits. The pieces are not modified.

    Raises ValueError for pieces that do not fit, ConfigError for an unknown codec or level, MissingExtra.
    """
    chosen = codec_named(codec)
    level = chosen.checked_level(level)
    kind = np.dtype(dtype)
    planes = np.empty((kind.itemsize, values), np.uint8) if chosen.shuffled else None
    words = np.empty(values if planes is None else 0, _WORDS[kind.itemsize])
    # The lower half of a widened bfloat16 is zero: it is neither written here nor read by the compressor.
    zeros = kind.itemsize - 2 if bfloat16 else 0
    end = 0
    for piece in pieces:
        start, end = end, end + piece.size
        if end > values:
            raise ValueError(f"expected at most {values} values in a chunk, got {end} or more")
        by_pixels = piece.ndim == 3 and not piece.flags.c_contiguous and takes_channels_last(codec)
        if not (by_pixels or piece.flags.c_contiguous):
            raise ValueError("expected C-contiguous pieces")
        part = _words(piece.transpose(0, 2, 1) if by_pixels else piece.reshape(-1), kind, keep_bits, bfloat16)
        if planes is None:
            _join(part, words[start:end])
        elif by_pixels:
            kernels.byte_planes(part, planes[zeros:, start:end])
        else:
            _scatter(part, planes[zeros:, start:end])
    if end < values:
        fill = fill_value(kind).view(words.dtype)
        if planes is None:
            words[end:] = fill
        else:
            planes[:, end:] = np.frombuffer(fill.tobytes(), np.uint8)[:, None]
    if planes is None:
        return words.view(np.uint8).data  # the memory itself: a copy would take as long as all else without a codec
    return chosen.compress(planes, level, zeros)


def takes_channels_last(codec: str) -> bool:
    """Return whether `encode` brings channels that lie side by side in their order."""
    return codec_named(codec).shuffled and kernels.are_there()


def fill_value(dtype: npt.DTypeLike) -> Any:
    """Return what stands where there is no value: NaN, or 0 for integers, as a scalar of `dtype`."""
    kind = np.dtype(dtype)
    return np.full((), np.nan if kind.kind == "f" else 0, kind)[()]


def _words(values: Array, kind: np.dtype[Any], keep_bits: int | None, bfloat16: bool) -> Array:
    """Return the bit patterns of `values` as `kind`, unsigned, same shape; narrower words are their upper parts."""
    if bfloat16:
        if values.dtype != np.uint16 or kind.name not in ("float32", "float16"):
            raise ValueError(f"expected bfloat16 as uint16 for float32 or float16, got {values.dtype} for {kind}")
        if keep_bits is not None and keep_bits < BFLOAT16_MANTISSA:
            values = _round_words(values, BFLOAT16_MANTISSA, keep_bits)
        if kind.name == "float32":
            return values
        wide = np.empty(values.shape, np.uint32)
        _join(values, wide)
        values = wide.view(np.float32)
    elif values.dtype == kind or (values.dtype == bool and kind == np.uint8):
        pass
    elif {values.dtype.name, kind.name} != {"float16", "float32"}:
        raise ValueError(f"expected a piece of {kind}, got {values.dtype}")
    # Round where the type is wider: before narrowing (one rounding, not two), after widening.
    if values.dtype.itemsize > kind.itemsize and keep_bits is not None:
        values = round_mantissa(values, keep_bits)
    given = MANTISSA.get(values.dtype.name, 0)
    if values.dtype.kind == "f" and values.dtype != kind:
        with np.errstate(over="ignore", under="ignore"):
            values = values.astype(kind, order="C")
    if keep_bits is not None and keep_bits < given and values.dtype.kind == "f":
        values = round_mantissa(values, keep_bits)
    return values.view(_WORDS[kind.itemsize])


def _scatter(words: Array, planes: Array) -> None:
    """Write the bytes of `words`, unsigned (n,), to `planes`, uint8 (itemsize, n), low byte first.

    Halving the word each time keeps every pass a contiguous, vectorised cast: twice the speed of a transposed copy
    (benchmark: 7.6 against 3.5 GB/s for float32). Where the word is narrower than the planes are many, the low planes
    are zero.
    """
    low = len(planes) - words.itemsize
    planes[:low] = 0
    if words.itemsize == 1:
        planes[low] = words
    elif words.itemsize == 2:
        np.copyto(planes[low], words, casting="unsafe")
        np.right_shift(words, words.dtype.type(8), out=planes[low + 1], casting="unsafe", dtype=words.dtype)
    else:
        half = words.itemsize // 2
        narrow = _WORDS[half]
        _scatter(words.astype(narrow), planes[low : low + half])
        _scatter((words >> words.dtype.type(8 * half)).astype(narrow), planes[low + half :])


def _join(words: Array, out: Array) -> None:
    """Copy `words` to `out`, unsigned and of the same shape, as the upper part of each value."""
    np.copyto(out, words)
    if words.itemsize < out.itemsize:
        out <<= out.dtype.type(8 * (out.itemsize - words.itemsize))


def round_mantissa(array: Array, bits: int) -> Array:
    """Return a copy of a float array with its mantissas rounded to `bits` explicit bits, ties to even.

    NaN and infinities keep their bits. A finite value becomes infinite only where the rounded value is out of range.
    """
    if bits < 1:
        raise ConfigError(f"expected at least 1 mantissa bit to keep, got {bits}")
    mantissa = MANTISSA[array.dtype.name]
    if bits >= mantissa:
        return array.copy()
    words = np.ascontiguousarray(array).view(_WORDS[array.itemsize])
    rounded: Array = _round_words(words, mantissa, bits).view(array.dtype)
    return rounded


def _round_words(words: Array, mantissa: int, bits: int) -> Array:
    """Round the bit patterns of floats with `mantissa` explicit bits to `bits` of them, into a new array."""
    if bits < 1:
        raise ConfigError(f"expected at least 1 mantissa bit to keep, got {bits}")
    word = words.dtype.type
    drop = mantissa - bits
    # Add just under half a unit, or just half where the last kept bit is odd; a carry into the exponent is right.
    rounded = words >> word(drop)
    rounded &= word(1)
    rounded += word((1 << (drop - 1)) - 1)
    rounded += words
    rounded &= word((1 << (8 * words.itemsize)) - (1 << drop))
    exponent = word((1 << (8 * words.itemsize - 1)) - (1 << mantissa))
    special = (words & exponent) == exponent
    np.copyto(rounded, words, where=special)
    return rounded  # type: ignore[no-any-return]


# --------------------------------------------------------------------------------------------------- bytes to chunk


def decode(payload: bytes, *, codec: str, dtype: str, values: int, out: Array | None = None) -> Array:
    """Return the `values` values of a stored chunk, 1-d of type `dtype`, in `out` (C-contiguous, same size) if given.

    Raises DamagedError for a stream that is broken or does not hold exactly so many bytes; never inflates past them.
    Raises ConfigError for an unknown codec, MissingExtra.
    """
    kind = np.dtype(dtype)
    result = np.empty(values, kind) if out is None else out.reshape(-1)
    if result.size != values or result.dtype != kind or (out is not None and not out.flags.c_contiguous):
        raise ValueError(
            f"expected C-contiguous room for {values} values of {kind}, got {result.size} of {result.dtype}"
        )
    raw = unpack(payload, codec=codec, nbytes=values * kind.itemsize)
    if codec_named(codec).shuffled and kind.itemsize > 1:
        _gather(np.frombuffer(raw, np.uint8).reshape(kind.itemsize, values), result.view(_WORDS[kind.itemsize]))
    else:
        result.view(np.uint8)[:] = np.frombuffer(raw, np.uint8)
    return result


def unpack(payload: bytes, *, codec: str, nbytes: int) -> bytes:
    """Do the first half of `decode`: return the `nbytes` of byte planes or values. Raises what `decode` does."""
    raw = codec_named(codec).decompress(payload, nbytes)
    if len(raw) != nbytes:
        raise DamagedError(f"a {codec} chunk of {nbytes} bytes holds {'more' if len(raw) > nbytes else len(raw)}")
    return raw


def pick(raw: bytes, *, codec: str, dtype: str, shape: Sequence[int], at: tuple[Any, ...] = ()) -> Array:
    """Do the second half of `decode`: return the values at the index `at` of a chunk of `shape`, from `unpack`'s bytes.

    For a row or two it costs little; joining the bytes of all values would take as long as lz4 does.
    """
    kind = np.dtype(dtype)
    if not codec_named(codec).shuffled or kind.itemsize == 1:
        values: Array = np.frombuffer(raw, kind).reshape(shape)[at]
        return values
    planes = np.ascontiguousarray(np.frombuffer(raw, np.uint8).reshape(kind.itemsize, *shape)[(slice(None), *at)])
    result = np.empty(planes.shape[1:], kind)
    _gather(planes.reshape(kind.itemsize, result.size), result.reshape(-1).view(_WORDS[kind.itemsize]))
    return result


def _gather(planes: Array, words: Array) -> None:
    """Undo `_scatter`: join planes, uint8 (itemsize, n), to unsigned words (n,)."""
    if len(planes) == 1:
        words[:] = planes[0]
        return
    half = len(planes) // 2
    part = np.empty(words.size, _WORDS[half])
    _gather(planes[half:], part)
    np.copyto(words, part)
    words <<= words.dtype.type(8 * half)
    _gather(planes[:half], part)
    words |= part


# ------------------------------------------------------------------------------------------------------- the codecs


_ZLIB_HEADER = b"\x78\x01"
_LOOK_BACK_BITS = 2
"""ISA-L looks for repetitions 4 bytes back, not 32 KiB: for runs. What else repeats in activations does so by
chance, and a long distance costs bits. The header states the full window, which every reader has."""
_BLOCKS = igzip_lib.MEM_LEVEL_MEDIUM
"""Room for the symbols of a block, which decides how often new Huffman codes are made: often enough that each plane of
a chunk has its own, not so often that it costs time (docs/measurements)."""
_STRETCH_BITS = 9  # the least that ISA-L's streams allow
_STORED_MOST = 65535
_STORED_BLOCK = struct.Struct("<BHH")
_SAMPLE = 4096
_FEW = 256
_NOISE_ENTROPY = 7.85
"""Bits per byte from which deflate gains under 2 %; the low mantissa bytes of dense maps measure 7.9 to 8.0."""
_NOISE_NONZERO = 0.9
"""With a tenth of zeros the entropy is at most 0.9 · log2(255) + 0.47 = 7.66 bits."""


def _deflate(planes: Array, level: int, zeros: int = 0) -> bytes:
    """Compress to a zlib stream by ISA-L; planes of noise become stored blocks, planes of zeros are known streams.

    The low mantissa bytes of dense activations do not compress, yet would cost as much time as those that do
    (benchmark on smooth dense maps, same ratio: float32 1.9 times, bfloat16 1.5 times as fast; inflating 2 to 3 times).
    Those of a narrower type that was widened are zero.
    """
    while zeros < len(planes) and not _any(planes[zeros]):
        zeros += 1
    rest = planes[zeros:]
    noise = [_is_noise(plane) for plane in rest]
    length = zeros * planes.shape[1]
    parts: list[bytes | memoryview] = [_ZLIB_HEADER, _zeros(length, level)]
    for stored, run in groupby(range(len(rest)), key=noise.__getitem__):
        rows = list(run)
        part = rest[rows[0] : rows[-1] + 1].reshape(-1)
        if stored:
            parts += _stored_blocks(part.data)
        elif rows[-1] < len(rest) - 1:
            parts += _stretch(part, level)
    if noise and not noise[-1]:  # the last stretch ends the stream; in one call, which needs no room to grow
        parts.append(deflate(part, level))
    else:
        parts.append(_stored_header(0, last=True))
    # The checksum of zeros is known: its lower half stays 1, its upper half counts them.
    checksum = isal_zlib.adler32(rest.reshape(-1), length % 65521 << 16 | 1)
    stream = b"".join((*parts, checksum.to_bytes(4, "big")))
    if len(stream) <= most_stored(planes.size):
        return stream
    # Level 0 makes bytes that look random a quarter longer, of planes that are too small to be asked before.
    parts = [_ZLIB_HEADER, _zeros(length, level), *_stored_blocks(rest.reshape(-1).data), _stored_header(0, last=True)]
    return b"".join((*parts, checksum.to_bytes(4, "big")))


def deflate(data: Any, level: int) -> bytes:
    """Return the raw deflate stream over `data`, a buffer, as ISA-L makes it of activations; `level` 0 to 3."""
    stream: bytes = igzip_lib.compress(data, level, igzip_lib.COMP_DEFLATE, _BLOCKS, _LOOK_BACK_BITS)
    return stream


def _any(plane: Array) -> bool:
    """Return whether a byte is not zero. The first bytes mostly suffice; numpy looks at few with the GIL held."""
    return bool(plane[:_FEW].any() or plane.view(bool).any())


def _stretch(data: Any, level: int) -> tuple[bytes, bytes]:
    """Return a stretch of a raw deflate stream; the sync flush ends it on a byte, where another may follow."""
    deflater = isal_zlib.compressobj(level, isal_zlib.DEFLATED, -_STRETCH_BITS)
    return deflater.compress(data), deflater.flush(isal_zlib.Z_SYNC_FLUSH)


@functools.lru_cache(maxsize=256)
def _zeros(length: int, level: int) -> bytes:
    """Return `length` zeros as such a stretch; the chunks of a run have few lengths."""
    return b"".join(_stretch(bytes(length), level)) if length else b""


def _is_noise(plane: Array) -> bool:
    """Return whether deflate would gain next to nothing, judged by the entropy of evenly spread bytes."""
    step = plane.size // _SAMPLE | 1  # odd: not in step with rows of 2^k values
    if step < 3:  # too small to gain from asking
        return False
    sample = plane[::step].copy()
    if len(sample) - np.count_nonzero(sample) > (1 - _NOISE_NONZERO) * len(sample):
        return False  # as after a ReLU: known without the entropy
    counts = np.bincount(sample, minlength=256)
    entropy = math.log2(len(sample)) - _weights().take(counts).sum() / len(sample)
    return bool(entropy > _NOISE_ENTROPY)


@functools.lru_cache(maxsize=1)
def _weights() -> Array:
    """Return n log2(n) for each number of times that a byte can stand in a sample: an entropy is then one sum."""
    counts = np.arange(2 * _SAMPLE, dtype=np.float64)
    return counts * np.log2(np.maximum(counts, 1))


def _stored_blocks(data: memoryview) -> list[bytes | memoryview]:
    blocks: list[bytes | memoryview] = []
    for at in range(0, len(data), _STORED_MOST):
        block = data[at : at + _STORED_MOST]
        blocks += (_stored_header(len(block), last=False), block)
    return blocks


def _stored_header(length: int, *, last: bool) -> bytes:
    return _STORED_BLOCK.pack(last, length, length ^ 0xFFFF)


def _inflate(stream: bytes, nbytes: int) -> bytes:
    inflater = isal_zlib.decompressobj()
    try:
        # Asking for one byte more than there may be reaches the end of the stream, and shows one that is too long.
        raw = inflater.decompress(stream, nbytes + 1)
    except _IsalError as error:
        raise DamagedError(f"a gzip chunk does not inflate: {error}") from error
    if len(raw) <= nbytes and (not inflater.eof or inflater.unused_data):
        raise DamagedError("a gzip chunk " + ("has bytes after its end" if inflater.eof else "is cut short"))
    return bytes(raw)


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise MissingExtra("zstandard", "zstd", "The codec zstd") from error
    return zstandard


_per_thread = threading.local()
"""Contexts of zstandard must not be shared between threads, and take long to make for every chunk."""


def _zstd_compress(planes: Array, level: int, zeros: int = 0) -> bytes:
    planes[:zeros] = 0
    contexts = _per_thread.__dict__.setdefault("zstd", {})
    if level not in contexts:
        contexts[level] = _zstandard().ZstdCompressor(level=level)
    return bytes(contexts[level].compress(planes))


def _zstd_decompress(stream: bytes, nbytes: int) -> bytes:
    zstandard = _zstandard()
    try:
        # The library believes the size that a frame states, despite `max_output_size`: look first.
        stated = zstandard.get_frame_parameters(stream).content_size
        if stated not in (nbytes, zstandard.CONTENTSIZE_UNKNOWN):
            raise DamagedError(f"a zstd chunk of {nbytes} bytes says that it holds {stated}")
        frame = zstandard.ZstdDecompressor().decompress(stream, max_output_size=nbytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise DamagedError(f"a zstd chunk does not decompress: {error}") from error
    return bytes(frame)


def _lz4_block() -> Any:
    try:
        import lz4.block
    except ImportError as error:
        raise MissingExtra("lz4", "lz4", "The codec lz4") from error
    return lz4.block


_LZ4_HEADER = struct.Struct(">qi")
_LZ4_LENGTH = struct.Struct(">i")


def _lz4_compress(planes: Array, level: int, zeros: int = 0) -> bytes:
    """Frame as HDF5 filter 32004 does: total size, block size, then each block with its length; here one block."""
    planes[:zeros] = 0
    raw = planes.reshape(-1).data
    block = _lz4_block().compress(raw, store_size=False)
    if len(block) >= len(raw):  # a length equal to the block size says: not compressed
        block = raw.tobytes()
    return b"".join((_LZ4_HEADER.pack(len(raw), len(raw)), _LZ4_LENGTH.pack(len(block)), block))


def _lz4_decompress(stream: bytes, nbytes: int) -> bytes:
    library = _lz4_block()
    blocks: list[bytes] = []
    view = memoryview(stream)  # slices of it are no copies
    try:
        total, block_size = _LZ4_HEADER.unpack_from(stream)
        if total != nbytes or (nbytes and block_size < 1):
            raise DamagedError(f"an lz4 chunk of {nbytes} bytes says that it holds {total} in blocks of {block_size}")
        at = _LZ4_HEADER.size
        for start in range(0, nbytes, block_size):
            size = min(block_size, nbytes - start)
            (stored,) = _LZ4_LENGTH.unpack_from(stream, at)
            at += _LZ4_LENGTH.size
            block = view[at : at + stored] if stored >= 0 else view[:0]
            blocks.append(bytes(block) if stored == size else library.decompress(block, uncompressed_size=size))
            at += stored
    except (struct.error, library.LZ4BlockError) as error:
        raise DamagedError(f"an lz4 chunk does not decompress: {error}") from error
    if at != len(stream):
        raise DamagedError(f"an lz4 chunk has {len(stream)} bytes where {at} were expected")
    return b"".join(blocks)


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        # ISA-L's levels 2 and 3 gain nothing on activations, and level 0 can expand (field measurements).
        Codec("gzip", DEFLATE, 1, range(4), _deflate, _inflate, lambda level: (level,)),
        Codec("zstd", ZSTD, 1, range(1, 20), _zstd_compress, _zstd_decompress, lambda level: (level,)),
        Codec("lz4", LZ4, 1, range(1, 2), _lz4_compress, _lz4_decompress, lambda level: (0,)),
        Codec("none", None, 0, range(1), lambda planes, *_: planes.tobytes(), lambda raw, nbytes: raw, lambda _: ()),
    )
}
"""By name. `gzip` opens in every HDF5 reader; `zstd` and `lz4` need the reader to have hdf5plugin."""
