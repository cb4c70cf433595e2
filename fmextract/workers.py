"""Processes that decode JPEGs, encode chunks and finish shards for the threads of a run.

Decoding and compressing release the interpreter's lock, but what lies between two such calls needs it, and threads that
hand it to each other wait: sixteen do no more together than five (docs/measurements). Each of these processes has a
lock of its own. A thread of the run hands one of them a task and sleeps until it is done; activations, pixels and
payloads lie in memory that both see. What a process does is what the thread would do, by the same code, so that no bit
depends on it; and the thread does it itself where there is no process: while they start, and after they ended.

One process imports what is needed and forks the others, which share that memory. They end when their sockets do, in
whatever way this process ends.
"""

from __future__ import annotations

import ctypes
import gc
import math
import mmap
import os
import pickle
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import PIL.Image
import torch

from fmextract import chunks
from fmextract.errors import OutputLost
from fmextract.inputs import decoding, preprocessing
from fmextract.inputs.files import OnDisk, stamp_of
from fmextract.planning import Plan
from fmextract.records import LayerSpec, Preprocess, SampleTable
from fmextract.storage import durable, shards, writer
from fmextract.storage.layout import Stats

ENOUGH = 5
"""Workers from which `auto` means processes."""
WORTH = 20.0
"""Seconds of a run from which it does: they take some seconds to start, of a core that the run could have."""

_SERVE = (
    "import sys; n = int(sys.argv[1]); fds = [int(fd) for fd in sys.argv[2 : 2 + n]]; sys.path[:] = sys.argv[2 + n :];"
    "from fmextract import workers; workers.serve(fds)"
)
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_PATIENCE = 60.0, 2.0  # seconds for them to start, and to end by themselves
_ALIGNMENT = 64
_SLACK = 4096  # bytes that a stream may need beyond the values in it; a longer one comes back in the answer
_LENGTH = struct.Struct("=Q")

T = TypeVar("T")


def are_processes(count: int, kind: str, seconds: float) -> bool:
    """Whether the `count` workers of a run that takes `seconds` are processes. `kind`: threads, processes or auto."""
    if kind == "auto":
        return count >= ENOUGH and seconds >= WORTH and _possible()
    return kind == "processes" and _possible()


def _possible() -> bool:
    """Whether this is a Python that can be started again, on a system with memory that needs no name."""
    return bool(sys.executable) and not getattr(sys, "frozen", False) and hasattr(os, "memfd_create")


@contextmanager
def hired(count: int, kind: str, seconds: float, say: Callable[[str], None]) -> Iterator[Workers | None]:
    """`count` processes while the block lasts; None where threads are to do the work, or have to.

    As `are_processes`. `say` takes a note on processes that cannot be had, or end too early, from any thread.
    """
    workers = None
    if are_processes(count, kind, seconds):
        try:
            workers = Workers(count, say)
        except OSError as error:
            say(f"worker processes cannot be started ({error}); threads do their work")
    elif kind == "processes":
        say("this system cannot start worker processes; threads do their work")
    try:
        yield workers
    finally:
        if workers is not None:
            workers.close()


class Workers:
    """The processes, for any number of threads; a task has one of them for itself, and waits until one is free."""

    def __init__(self, count: int, say: Callable[[str], None]) -> None:
        """Returns before they are there: until then threads do the work."""
        pairs = list[tuple[socket.socket, socket.socket]]()
        try:
            for _ in range(count):
                pairs.append(socket.socketpair())
            for end in chain(*pairs):
                end.settimeout(None)  # whatever the caller's default
            fds = [theirs.fileno() for _, theirs in pairs]
            path = [entry for entry in map(str, sys.path) if "\0" not in entry]  # notebooks put a Path there
            self._server = subprocess.Popen(
                [sys.executable, "-c", _SERVE, str(count), *map(str, fds), *path],
                stdin=subprocess.DEVNULL,
                pass_fds=fds,
                start_new_session=True,  # Ctrl-C is this process's, which then ends them
                env={**os.environ, **_ONE_THREAD, "CUDA_VISIBLE_DEVICES": ""},
            )
        except BaseException:
            for ours, _ in pairs:
                ours.close()
            raise
        finally:
            for _, theirs in pairs:
                theirs.close()
        self._all = [_Worker(ours) for ours, _ in pairs]
        self._free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._say, self._closed = say, False
        self._misunderstood = False  # said once: it is the same every time
        self._there = threading.Event()
        threading.Thread(target=self._greet, name="fmextract-workers", daemon=True).start()

    def encoder(self, plan: Plan) -> Callable[[Sequence[chunks.Chunk]], list[chunks.Encoded]]:
        """What encodes chunks as `chunks.Encoder` does, several at once. Raises what that does."""
        here = chunks.Encoder(plan)

        def encode(task: Sequence[chunks.Chunk]) -> list[chunks.Encoded]:
            made = self._do(lambda worker: worker.encode(task, plan))
            return made if made is not None else here.all(task)

        return encode

    def jpegs(self, exif: bool) -> Jpegs:
        """What decodes JPEGs as `images.decode` does."""
        return Jpegs(self._do, exif)

    def finish(self, shard: writer.Unfinished, *what: Any) -> tuple[str, str]:
        """(content digest, SHA-256 or "") of a shard that is finished with `what`, as `finish_shard` does it.

        Raises what that raises; OutputLost where the process ended in the middle of it.
        """
        made = self._do(lambda worker: worker.finish(shard, what), halfway=_refuse)
        return made if made is not None else finish_shard(shard, *what)

    def wait(self) -> bool:
        """Wait until they are there, a minute at most; False where they could not be started."""
        return self._there.wait(_PATIENCE[0]) and any(worker.alive for worker in self._all)

    def close(self) -> None:
        """End them. Nothing is lost: what they make is here before a task is done."""
        self._closed = True
        for worker in self._all:
            worker.close()
        try:
            # By themselves: the one that forked them waits for their end. One that still starts has nothing to end.
            self._server.wait(_PATIENCE[1] if self._there.is_set() else 0)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait()

    def _do(self, task: Callable[[_Worker], T], halfway: Callable[[], None] = lambda: None) -> T | None:
        """What `task` makes of a free worker. Raises what the worker raised.

        None where there is none, or what is asked means nothing to it. `halfway` is called where it ended with the
        task in its hands.
        """
        if not self._there.is_set():
            return None
        worker = self._free.get()
        try:
            return task(worker) if worker.alive else None
        except _Unknown as unknown:
            if not self._misunderstood:
                self._misunderstood = True
                self._say(f"worker processes do not understand what they are asked ({unknown}); threads do that work")
            return None
        except _Ended as ended:
            worker.alive = False
            if not self._closed:
                self._say("a worker process ended before its time; a thread of the run does its work from now on")
            if ended.had_begun:
                halfway()
            return None
        finally:
            self._free.put(worker)  # one that ended, too: whoever gets it does the work itself

    def _greet(self) -> None:
        for worker in self._all:
            worker.greet()
            self._free.put(worker)
        self._there.set()
        if not self._closed and not all(worker.alive for worker in self._all):
            self._say("worker processes did not start; threads do their work")


def _refuse() -> None:
    raise OutputLost(
        "a worker process ended while it finished a shard. What is done is kept: the same command goes on from there."
    )


def finish_shard(
    shard: writer.Unfinished,
    samples: SampleTable,
    stats: Stats,
    layer_attrs: Mapping[str, Mapping[str, Any]],
    root_attrs: Mapping[str, Any],
    checksum: bool,
) -> tuple[str, str]:
    """Write what stands beside the chunks and make the file durable: (its content digest, its SHA-256 or "")."""
    digest = shard.finish(samples, stats, layer_attrs, root_attrs)
    if not checksum:
        durable.make_durable(shard.path)
        return digest, ""
    with ThreadPoolExecutor(1) as beside:  # reading it does not wait for the disk
        sha256 = beside.submit(shards.file_sha256, shard.path)
        durable.make_durable(shard.path)
        return digest, sha256.result()


class Jpegs:
    """Decodes the JPEGs among some rows, as `images.DeviceJpegs` does, to the pixels that `images.decode` gives."""

    def __init__(self, do: Callable[[Callable[[_Worker], Any]], Any], exif: bool) -> None:
        self._do, self._exif = do, exif

    def decode(
        self, data: Sequence[Any], preprocess: preprocessing.Preprocessing | None, into: torch.Tensor
    ) -> list[decoding.Decoded | None]:
        """Fill the rows of `into`, uint8 (at least len(data), 3, h, w) on the host, that are ordinary JPEGs, given as
        bytes or as files.

        Gives for each of `data` what was decoded, or None for whatever else there is, which the caller
        decodes: other formats, whose plug-ins this process may have, and what is wrong, so that one place says why.
        """
        decoded: list[decoding.Decoded | None] = [None] * len(data)
        plain = [i for i, item in enumerate(data) if isinstance(item, OnDisk) or _is_jpeg(item)]
        if plain and isinstance(preprocess, Preprocess):
            task = _Decode([data[i] for i in plain], preprocess, self._exif, tuple(into.shape[1:]))
            found = self._do(lambda worker: worker.decode(task, into[plain[0] : plain[-1] + 1], plain))
            for i, one in zip(plain, found or (), strict=False):
                decoded[i] = one
        return decoded


@dataclass(frozen=True, slots=True)
class _Decode:
    data: list[bytes | OnDisk]
    preprocess: Preprocess
    exif: bool
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Lying:
    """A tensor in the shared memory: where it begins, in bytes, and how it lies there."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def of(self, room: mmap.mmap) -> torch.Tensor:
        count = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        flat = torch.frombuffer(room, dtype=self.dtype, count=count, offset=self.offset)
        return flat.as_strided(self.shape, self.stride)


class _Layout:
    """Where tensors come to lie in the shared memory. Those that follow each other in memory are copied as one."""

    def __init__(self) -> None:
        self.end = 0
        self.copies: list[tuple[int, int, int]] = []  # from which address, to which offset, how many bytes
        self._held: list[torch.Tensor] = []  # copies of our own, until they are there

    def place(self, piece: torch.Tensor) -> _Lying:
        if not (piece.is_contiguous() or (piece.ndim == 4 and piece.is_contiguous(memory_format=torch.channels_last))):
            piece = piece.contiguous()
            self._held.append(piece)
        address, nbytes = piece.data_ptr(), piece.numel() * piece.element_size()
        source, offset, before = self.copies[-1] if self.copies else (0, 0, 0)
        if address == source + before and self.end == offset + before:
            self.copies[-1] = source, offset, before + nbytes
        else:
            self.end = -(-self.end // _ALIGNMENT) * _ALIGNMENT
            self.copies.append((address, self.end, nbytes))
        lying = _Lying(self.end, piece.dtype, tuple(piece.shape), piece.stride())
        self.end += nbytes
        return lying


class _Ended(Exception):
    """The process is no more; `had_begun`: it may have had the task."""

    def __init__(self, had_begun: bool) -> None:
        super().__init__(had_begun)
        self.had_begun = had_begun


class _Unknown(Exception):
    """A process does not understand what it is asked: a class of the user's, which lives in this process alone."""


class _Worker:
    """One process, as the thread sees it that has it. Everything that asks it something raises _Ended."""

    def __init__(self, channel: socket.socket) -> None:
        self.alive = True
        self._channel = channel
        self._room: mmap.mmap | None = None
        self._address = 0
        self._plan: Plan | None = None

    def greet(self) -> None:
        try:
            _receive(self._channel)
        except (EOFError, OSError):
            self.alive = False

    def encode(self, task: Sequence[chunks.Chunk], plan: Plan) -> list[chunks.Encoded]:
        if self._plan is not plan:
            self._ask("plan", plan)
            self._plan = plan
        layout = _Layout()
        described = [(c.layer, [p if isinstance(p, int) else layout.place(p) for p in c.pieces]) for c in task]
        end = layout.end
        room = self._room_of(end + sum(_SLACK + _bytes_on_disk(plan.layers[chunk.layer]) for chunk in task))
        for source, offset, nbytes in layout.copies:
            ctypes.memmove(self._address + offset, source, nbytes)
        answers, stop = self._ask("encode", described, end)
        # A copy, since the next task writes over it. One for all: each gives the interpreter's lock away, and waits.
        made = np.array(np.frombuffer(room, np.uint8, stop - end, end)).data
        return [
            chunks.Encoded(made[where[0] - end : where[1] - end] if isinstance(where, tuple) else where, digest, over)
            for where, digest, over in answers
        ]

    def finish(self, shard: writer.Unfinished, what: tuple[Any, ...]) -> tuple[str, str]:
        found: tuple[str, str] = self._ask("finish", shard, *what)
        return found

    def decode(self, task: _Decode, into: torch.Tensor, plain: Sequence[int]) -> list[decoding.Decoded | None]:
        one = math.prod(task.shape)
        room = self._room_of(len(task.data) * one)
        decoded: list[decoding.Decoded | None] = self._ask("decode", task, PIL.Image.MAX_IMAGE_PIXELS)
        made = np.frombuffer(room, np.uint8, len(task.data) * one).reshape(-1, *task.shape)
        if len(made) == len(into) and None not in decoded:
            np.copyto(into.numpy(), made)
            return decoded
        for row, found, pixels in zip(plain, decoded, made, strict=True):
            if found is not None:
                np.copyto(into[row - plain[0]].numpy(), pixels)
        return decoded

    def close(self) -> None:
        with suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits for an answer
        self._channel.close()

    def _room_of(self, nbytes: int) -> mmap.mmap:
        """Memory that the process sees too. It grows to the largest task and stays."""
        if self._room is None or len(self._room) < nbytes:
            nbytes = max(nbytes, 1)  # a map of nothing is an error
            try:
                fd = os.memfd_create("fmextract")
                try:
                    os.ftruncate(fd, nbytes)
                    room = mmap.mmap(fd, nbytes)
                    self._ask("room", nbytes, fd=fd)
                finally:
                    os.close(fd)
            except OSError as error:  # there is no memory, here or there: it is of no use
                raise _Ended(False) from error
            self._room, self._address = room, ctypes.addressof(ctypes.c_char.from_buffer(room))
        return self._room

    def _ask(self, job: str, *what: Any, fd: int | None = None) -> Any:
        begun = False
        try:
            message = _packed((job, *what))
        except Exception as error:  # a class that is defined in a function, and whatever else cannot be sent
            raise _Unknown(f"{type(error).__name__}: {error}") from error
        try:
            _send(self._channel, message)
            if fd is not None:
                socket.send_fds(self._channel, [b"\0"], [fd], socket.MSG_NOSIGNAL)
            begun = True
            raised, made = pickle.loads(_receive(self._channel))  # from a process of ours, which none else can reach
        except (EOFError, OSError) as gone:
            raise _Ended(begun) from gone
        if raised is not None:
            raise raised
        return made


def _is_jpeg(item: Any) -> bool:
    return isinstance(item, bytes) and item.startswith(b"\xff\xd8\xff")


def _bytes_on_disk(layer: LayerSpec) -> int:
    """Of one chunk, before it is compressed."""
    return math.prod(layer.chunk) * np.dtype(layer.dtype).itemsize


def _packed(message: Any) -> bytes:
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return b"".join((_LENGTH.pack(len(data)), data))


def _send(channel: socket.socket, message: bytes) -> None:
    channel.sendall(message, socket.MSG_NOSIGNAL)  # a worker that ended is no reason for a signal to the caller


def _receive(channel: socket.socket) -> bytes:
    """A pickled message. Raises EOFError where the other side is gone."""
    (length,) = _LENGTH.unpack(_exactly(channel, _LENGTH.size))
    return _exactly(channel, length)


def _exactly(channel: socket.socket, count: int) -> bytes:
    parts = []
    while count:
        part = channel.recv(count, socket.MSG_WAITALL)
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


# --------------------------------------------------------------------------------------------- in the other processes


def serve(fds: Sequence[int]) -> None:
    """The process that forks one worker for each of the sockets `fds`, and waits for their end."""
    torch.set_num_threads(1)
    gc.freeze()  # what is there already stays shared: collecting garbage would write to all of it
    for fd in fds:
        if os.fork() == 0:
            try:
                for other in fds:
                    if other != fd:
                        os.close(other)
                with suppress(EOFError, OSError):
                    _work(socket.socket(fileno=fd))
            finally:
                os._exit(0)
    for fd in fds:
        os.close(fd)
    with suppress(ChildProcessError):
        while True:
            os.wait()


def _work(channel: socket.socket) -> None:
    """Tasks, one after the other, until the socket closes."""
    room: mmap.mmap | None = None
    encoder: chunks.Encoder | None = None
    _send(channel, _packed("here"))
    while True:
        message = _receive(channel)
        made: Any = None
        try:
            job, *what = pickle.loads(message)
        except Exception as error:
            _send(channel, _packed((_Unknown(f"{type(error).__name__}: {error}"), None)))
            continue
        try:
            if job == "room":
                _, fds, _, _ = socket.recv_fds(channel, 1, 1)
                room = mmap.mmap(fds[0], *what)
                os.close(fds[0])
            elif job == "plan":
                encoder = chunks.Encoder(*what)
            elif job == "encode":
                assert room is not None
                assert encoder is not None
                made = _encode(encoder, room, *what)
            elif job == "finish":
                made = finish_shard(*what)
            else:
                assert room is not None
                made = _decode(room, *what)
        except Exception as error:  # for the thread that asked
            _send(channel, _packed((_portable(error), None)))
        else:
            _send(channel, _packed((None, made)))


def _portable(error: Exception) -> Exception:
    """The error itself, where it can be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _encode(
    encoder: chunks.Encoder, room: mmap.mmap, described: Sequence[tuple[int, Sequence[int | _Lying]]], end: int
) -> tuple[list[tuple[tuple[int, int] | bytes, bytes, int]], int]:
    """(for each chunk where its payload lies, its digest, and how many values overflowed; where the last one ends)."""
    answers: list[tuple[tuple[int, int] | bytes, bytes, int]] = []
    for layer, pieces in described:
        chunk = chunks.Chunk(layer, (), [p if isinstance(p, int) else p.of(room) for p in pieces])
        encoded = encoder(chunk)
        start, length = end, len(encoded.payload)
        if start + length <= len(room):
            room[start : start + length] = encoded.payload
            end = start + length
            answers.append(((start, end), encoded.digest, encoded.overflowed))
        else:
            answers.append((bytes(encoded.payload), encoded.digest, encoded.overflowed))
    return answers, end


def _decode(room: mmap.mmap, task: _Decode, most_pixels: int | None) -> list[decoding.Decoded | None]:
    PIL.Image.MAX_IMAGE_PIXELS = most_pixels
    made = np.frombuffer(room, np.uint8, len(task.data) * math.prod(task.shape)).reshape(-1, *task.shape)
    decoded: list[decoding.Decoded | None] = []
    for item, pixels in zip(task.data, made, strict=True):
        one = None
        with suppress(Exception):  # the thread that asked decodes it once more, and says why
            data = item.read() if isinstance(item, OnDisk) else item
            image = decoding.decode(data, task.preprocess, exif=task.exif)
            if image.decoder == "simplejpeg" and tuple(image.pixels.shape) == task.shape:
                np.copyto(pixels, image.pixels.numpy())
                one = decoding.Decoded(image.height, image.width, stamp_of(data))
        decoded.append(one)
    return decoded
