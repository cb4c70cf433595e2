"""What a run and its worker processes say to each other, over a socket and shared memory."""

from __future__ import annotations

import mmap
import pickle
import socket
import struct
from dataclasses import dataclass
from typing import Any

import torch

from fmextract.inputs.files import OnDisk
from fmextract.records import Preprocess

_LENGTH = struct.Struct("=Q")


@dataclass(frozen=True, slots=True)
class Decode:
    data: list[bytes | OnDisk]
    preprocess: Preprocess
    exif: bool
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Lying:
    """A tensor in the shared memory: where it begins, in bytes, and how it lies there."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def of(self, room: mmap.mmap) -> torch.Tensor:
        count = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        flat = torch.frombuffer(room, dtype=self.dtype, count=count, offset=self.offset)
        return flat.as_strided(self.shape, self.stride)


class Unknown(Exception):
    """A process does not understand what it is asked: a class of the user's, which lives in this process alone."""


def packed(message: Any) -> bytes:
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return b"".join((_LENGTH.pack(len(data)), data))


def send(channel: socket.socket, message: bytes) -> None:
    channel.sendall(message, socket.MSG_NOSIGNAL)  # a worker that ended is no reason for a signal to the caller


def receive(channel: socket.socket) -> bytes:
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
