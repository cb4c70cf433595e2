"""What a worker process does: decode, encode, finish shards, as the thread that waits for it would."""

from __future__ import annotations

import gc
import math
import mmap
import os
import pickle
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import PIL.Image
import torch

from fmextract.inputs import decoding
from fmextract.inputs.files import OnDisk, stamp_of
from fmextract.pipeline import chunks
from fmextract.pipeline.worker_messages import Decode, Lying, Unknown, packed, receive, send
from fmextract.records import SampleTable
from fmextract.storage import durable, shards, writer
from fmextract.storage.layout import Stats


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
    send(channel, packed("here"))
    while True:
        message = receive(channel)
        answer: Any = None
        try:
            job, *what = pickle.loads(message)
        except Exception as error:
            send(channel, packed((Unknown(f"{type(error).__name__}: {error}"), None)))
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
                answer = _encode(encoder, room, *what)
            elif job == "finish":
                answer = finish_shard(*what)
            else:
                assert room is not None
                answer = _decode(room, *what)
        except Exception as error:  # for the thread that asked
            send(channel, packed((_portable(error), None)))
        else:
            send(channel, packed((None, answer)))


def _portable(error: Exception) -> Exception:
    """The error itself, where it can be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _encode(
    encoder: chunks.Encoder, room: mmap.mmap, described: Sequence[tuple[int, Sequence[int | Lying]]], end: int
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


def _decode(room: mmap.mmap, task: Decode, most_pixels: int | None) -> list[decoding.Decoded | None]:
    PIL.Image.MAX_IMAGE_PIXELS = most_pixels
    inputs = np.frombuffer(room, np.uint8, len(task.data) * math.prod(task.shape)).reshape(-1, *task.shape)
    decoded: list[decoding.Decoded | None] = []
    for item, pixels in zip(task.data, inputs, strict=True):
        one = None
        with suppress(Exception):  # the thread that asked decodes it once more, and says why
            data = item.read() if isinstance(item, OnDisk) else item
            image = decoding.decode(data, task.preprocess, exif=task.exif)
            if image.decoder == "simplejpeg" and tuple(image.pixels.shape) == task.shape:
                np.copyto(pixels, image.pixels.numpy())
                one = decoding.Decoded(image.height, image.width, stamp_of(data))
        decoded.append(one)
    return decoded
