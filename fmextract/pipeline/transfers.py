"""Between the host and the device: uploads, downloads, and when memory may be used again.

This is the only module that knows streams and events. It speaks torch's generic accelerator interface, so that CUDA,
XPU and every other device torch knows take one path; the CPU has a path of its own in which nothing is copied.

The rules it keeps (PyTorch's CUDA notes, `Tensor.copy_`, `Tensor.record_stream`, the pinned-memory tutorial):

 1. Pinned buffers are made once and checked: a copy into pageable memory would block.
 2. Source and destination of a copy have one dtype and are contiguous; casts and permutes happen on the device before.
 3. The copy stream waits for an event of the compute stream before it copies.
 4. The completion event is recorded on the copy stream, after the copy.
 5. The host reads only after that event.
 6. A source is marked with `record_stream`, so that the allocator keeps it until the copy is done.
 7. Nothing that one stream allocated is used by another without a wait.
 8. Captured tensors are not written again: the engine never writes into what it hands over.
 9. A staging buffer is filled again only after the event of its upload.
10. A slot goes back to the ring only when its last reader is done, and no view of it escapes.
11. Uploads run on the compute stream itself, so that no consumer has to wait (images are small beside a forward).
12. `.to("cpu", non_blocking=True)` is never used: it gives memory that is not finished.

MPS has neither a second stream nor `record_stream`: there every copy is waited for.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol, TypeVar

import torch

from fmextract.errors import ConfigError
from fmextract.pipeline.channel import Channel, Closed


class Download(Protocol):
    """Activations on their way to the host.

    `computing`: seconds that the device took from `reserve` to these tensors, `copying`: seconds of bringing them here.
    Both are known once `wait` has returned; asking for them waits for nothing.
    """

    computing: float
    copying: float

    def wait(self) -> list[torch.Tensor]:
        """The tensors in host memory, finished; valid until `release`."""

    def release(self) -> None:
        """The last reader is done: the memory may be used again."""


class Transfers(Protocol):
    """How batches get to the device and activations back, `depth` of them at a time.

    `ahead` is the number of batches worth decoding before they are needed.
    """

    ahead: int

    def input_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A host buffer that nothing else is using."""

    def upload(self, buffer: torch.Tensor) -> torch.Tensor:
        """The content of an `input_buffer` on the device. The buffer is handed back by this call."""

    def reserve(self) -> None:
        """Before a forward pass: wait until there is room for its activations; from then on its time counts.

        Without effect where room is reserved already. Raises channel.Closed after `close`.
        """

    def download(self, tensors: Sequence[torch.Tensor]) -> Download:
        """Start bringing `tensors` to the host, into the room that was reserved."""

    def close(self) -> None:
        """The run ends: whoever waits for a free slot stops waiting."""


class HostTransfers:
    """No copies beside the computing: a batch is there when `upload` returns, activations are when `download` does.

    On a CPU nothing is copied: a batch is used where it lies and activations are handed over. The forward pass and the
    codec share the cores, so they take turns: there is room for one batch, and a pass waits until the one before is
    encoded. Side by side they would take longer: the threads of a matrix product wait for each other at every step, so
    that one of them losing its core to the codec stops them all.

    On MPS, which has neither a second stream nor `record_stream`, both copy and wait.
    """

    def __init__(self, device: torch.device, depth: int) -> None:
        self._device = device
        self.ahead = depth
        self._room: Channel[int] = Channel(depth, range(depth))
        self._reserved = False
        self._began = 0.0
        self._buffers: list[torch.Tensor] = []

    def input_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        for i, buffer in enumerate(self._buffers):
            if tuple(buffer.shape) == tuple(shape):
                return self._buffers.pop(i)
        return torch.zeros(tuple(shape), dtype=dtype)

    def upload(self, buffer: torch.Tensor) -> torch.Tensor:
        # The caller normalises at once into new memory; the next batch may be decoded into this one.
        self._buffers.append(buffer)
        return buffer.to(self._device)

    def reserve(self) -> None:
        if not self._reserved:
            self._room.get()
            self._reserved, self._began = True, time.perf_counter()

    def download(self, tensors: Sequence[torch.Tensor]) -> Download:
        self.reserve()
        self._reserved = False
        here = [t.cpu() for t in tensors]  # MPS waits for its computing here, and for next to nothing else
        return _HostDownload(here, time.perf_counter() - self._began, self._room)

    def close(self) -> None:
        self._room.close()


class _HostDownload:
    copying = 0.0

    def __init__(self, tensors: list[torch.Tensor], computing: float, room: Channel[int]) -> None:
        self._tensors, self.computing, self._room = tensors, computing, room

    def wait(self) -> list[torch.Tensor]:
        return self._tensors

    def release(self) -> None:
        self._tensors = []
        _give_back(self._room, 0)


class DeviceTransfers:
    """An accelerator: pinned buffers, a copy stream, and a ring of `depth` slots for downloads."""

    ahead = 2

    def __init__(self, device: torch.device, depth: int) -> None:
        self._device = device
        self._copy = torch.Stream(device)
        self._slots: Channel[_Slot] = Channel(depth, [_Slot() for _ in range(depth)])
        self._reserved: _Slot | None = None
        self._began = torch.Event(device, enable_timing=True)
        self._free: list[torch.Tensor] = []
        self._uploading: list[tuple[torch.Event, torch.Tensor]] = []

    def input_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        still: list[tuple[torch.Event, torch.Tensor]] = []
        for event, buffer in self._uploading:  # rule 9
            if event.query():
                self._free.append(buffer)
            else:
                still.append((event, buffer))
        self._uploading = still
        for i, buffer in enumerate(self._free):
            if tuple(buffer.shape) == tuple(shape):
                return self._free.pop(i)
        return _pinned(tuple(shape), dtype)

    def upload(self, buffer: torch.Tensor) -> torch.Tensor:
        there = buffer.to(self._device, non_blocking=True)  # on the compute stream: rule 11
        event = torch.Event(self._device)
        event.record(torch.accelerator.current_stream(self._device))
        self._uploading.append((event, buffer))
        return there

    def reserve(self) -> None:
        if self._reserved is None:
            self._reserved = self._slots.get()
            self._began = self._record(torch.accelerator.current_stream(self._device))

    def download(self, tensors: Sequence[torch.Tensor]) -> Download:
        self.reserve()
        slot, self._reserved = self._reserved, None
        assert slot is not None
        sources = [t.contiguous() for t in tensors]  # rule 2, on the compute stream
        views = slot.views(sources)
        ready = self._record(torch.accelerator.current_stream(self._device))
        self._copy.wait_event(ready)  # rules 3 and 7
        copying = self._record(self._copy)
        with self._copy:
            for source, view in zip(sources, views, strict=True):
                view.copy_(source, non_blocking=True)
                source.record_stream(self._copy)  # rule 6
        done = self._record(self._copy)  # rule 4
        return _DeviceDownload(slot, views, (self._began, ready, copying, done), self._slots)

    def _record(self, stream: torch.Stream) -> torch.Event:
        """Happens when what is queued on `stream` so far is done; the device notes the time, and nobody waits."""
        event = torch.Event(self._device, enable_timing=True)
        event.record(stream)
        return event

    def close(self) -> None:
        self._slots.close()


class _Slot:
    """One pinned block that holds all activations of a batch. It grows to the largest batch and stays."""

    _ALIGN = 64

    def __init__(self) -> None:
        self._block: torch.Tensor | None = None

    def views(self, sources: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        sizes = [-(-t.numel() * t.element_size() // self._ALIGN) * self._ALIGN for t in sources]
        if self._block is None or self._block.numel() < sum(sizes):
            self._block = _pinned((sum(sizes),), torch.uint8)
        views, at = [], 0
        for source, size in zip(sources, sizes, strict=True):
            bytes_ = self._block[at : at + source.numel() * source.element_size()]
            views.append(bytes_.view(source.dtype).view(source.shape))
            at += size
        return views


class _DeviceDownload:
    def __init__(
        self, slot: _Slot, views: list[torch.Tensor], times: tuple[torch.Event, ...], ring: Channel[_Slot]
    ) -> None:
        """`times`: the pass began, its tensors were there, copying began, the copies are there."""
        self._slot, self._views, self._times, self._ring = slot, views, times, ring
        self.computing = self.copying = 0.0

    def wait(self) -> list[torch.Tensor]:
        began, ready, copying, done = self._times
        done.synchronize()  # rule 5; the other three happen before it
        self.computing, self.copying = began.elapsed_time(ready) / 1000, copying.elapsed_time(done) / 1000
        return self._views

    def release(self) -> None:
        self._views = []
        _give_back(self._ring, self._slot)  # rule 10


T = TypeVar("T")


def _give_back(ring: Channel[T], token: T) -> None:
    with suppress(Closed):  # the run has ended: nobody is waiting for it
        ring.put(token)


def _pinned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    # From torch's own pinned allocator: it gives nothing to others before the copies that were queued on it are done,
    # so that a run may end, and drop its buffers, with copies in flight.
    block = torch.zeros(shape, dtype=dtype, pin_memory=True)
    if not block.is_pinned():  # rule 1
        raise ConfigError(
            "this system gave no pinned memory; raise the locked-memory limit (ulimit -l) or use --device cpu"
        )
    return block


def transfers_for(device: torch.device, depth: int) -> Transfers:
    """The transfers for a device. `depth` batches of activations may be on the host at once, on a CPU one."""
    if device.type in ("cpu", "mps"):
        return HostTransfers(device, 1 if device.type == "cpu" else depth)
    return DeviceTransfers(device, depth)
