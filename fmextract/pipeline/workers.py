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
import math
import mmap
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import PIL.Image
import torch

from fmextract.errors import OutputLost
from fmextract.inputs import decoding, preprocessing
from fmextract.inputs.files import OnDisk
from fmextract.pipeline import chunks
from fmextract.pipeline.worker_messages import Decode, Lying, Unknown, packed, receive, send
from fmextract.pipeline.worker_process import finish_shard
from fmextract.planning import Plan
from fmextract.records import LayerSpec, Preprocess
from fmextract.storage import writer

ENOUGH = 5
"""Workers from which `auto` means processes."""


WORTH = 20.0
"""Seconds of a run from which it does: they take some seconds to start, of a core that the run could have."""


_SERVE = (
    "import sys; n = int(sys.argv[1]); fds = [int(fd) for fd in sys.argv[2 : 2 + n]]; sys.path[:] = sys.argv[2 + n :];"
    "from fmextract.pipeline import worker_process; worker_process.serve(fds)"
)


_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


_PATIENCE = 60.0, 2.0  # seconds for them to start, and to end by themselves


_ALIGNMENT = 64


_SLACK = 4096  # bytes that a stream may need beyond the values in it; a longer one comes back in the answer


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
            answer = self._do(lambda worker: worker.encode(task, plan))
            return answer if answer is not None else here.all(task)

        return encode

    def jpegs(self, exif: bool) -> Jpegs:
        """What decodes JPEGs as `images.decode` does."""
        return Jpegs(self._do, exif)

    def finish(self, shard: writer.Unfinished, *what: Any) -> tuple[str, str]:
        """(content digest, SHA-256 or "") of a shard that is finished with `what`, as `finish_shard` does it.

        Raises what that raises; OutputLost where the process ended in the middle of it.
        """
        answer = self._do(lambda worker: worker.finish(shard, what), halfway=_refuse)
        return answer if answer is not None else finish_shard(shard, *what)

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
        except Unknown as unknown:
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
            task = Decode([data[i] for i in plain], preprocess, self._exif, tuple(into.shape[1:]))
            found = self._do(lambda worker: worker.decode(task, into[plain[0] : plain[-1] + 1], plain))
            for i, one in zip(plain, found or (), strict=False):
                decoded[i] = one
        return decoded


class _Layout:
    """Where tensors come to lie in the shared memory. Those that follow each other in memory are copied as one."""

    def __init__(self) -> None:
        self.end = 0
        self.copies: list[tuple[int, int, int]] = []  # from which address, to which offset, how many bytes
        self._held: list[torch.Tensor] = []  # copies of our own, until they are there

    def place(self, piece: torch.Tensor) -> Lying:
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
        lying = Lying(self.end, piece.dtype, tuple(piece.shape), piece.stride())
        self.end += nbytes
        return lying


class _Ended(Exception):
    """The process is no more; `had_begun`: it may have had the task."""

    def __init__(self, had_begun: bool) -> None:
        super().__init__(had_begun)
        self.had_begun = had_begun


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
            receive(self._channel)
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
        payloads = np.array(np.frombuffer(room, np.uint8, stop - end, end)).data
        return [
            chunks.Encoded(
                payloads[where[0] - end : where[1] - end] if isinstance(where, tuple) else where, digest, over
            )
            for where, digest, over in answers
        ]

    def finish(self, shard: writer.Unfinished, what: tuple[Any, ...]) -> tuple[str, str]:
        found: tuple[str, str] = self._ask("finish", shard, *what)
        return found

    def decode(self, task: Decode, into: torch.Tensor, plain: Sequence[int]) -> list[decoding.Decoded | None]:
        one = math.prod(task.shape)
        room = self._room_of(len(task.data) * one)
        decoded: list[decoding.Decoded | None] = self._ask("decode", task, PIL.Image.MAX_IMAGE_PIXELS)
        inputs = np.frombuffer(room, np.uint8, len(task.data) * one).reshape(-1, *task.shape)
        if len(inputs) == len(into) and None not in decoded:
            np.copyto(into.numpy(), inputs)
            return decoded
        for row, found, pixels in zip(plain, decoded, inputs, strict=True):
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
            message = packed((job, *what))
        except Exception as error:  # a class that is defined in a function, and whatever else cannot be sent
            raise Unknown(f"{type(error).__name__}: {error}") from error
        try:
            send(self._channel, message)
            if fd is not None:
                socket.send_fds(self._channel, [b"\0"], [fd], socket.MSG_NOSIGNAL)
            begun = True
            raised, answer = pickle.loads(receive(self._channel))  # from a process of ours, which none else can reach
        except (EOFError, OSError) as gone:
            raise _Ended(begun) from gone
        if raised is not None:
            raise raised
        return answer


def _is_jpeg(item: Any) -> bool:
    return isinstance(item, bytes) and item.startswith(b"\xff\xd8\xff")


def _bytes_on_disk(layer: LayerSpec) -> int:
    """Of one chunk, before it is compressed."""
    return math.prod(layer.chunk) * np.dtype(layer.dtype).itemsize
