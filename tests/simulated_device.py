"""An accelerator made of threads: streams that run what is queued on them later, with settable delays.

`installed` puts it in the place of torch's streams, events, pinned memory and asynchronous copies, so that
`device.DeviceTransfers` runs on it as it is. What real memory may hold at a bad moment, this one holds at once: fresh
memory, and memory that was given back, is filled with rubbish.
"""

from __future__ import annotations

import queue
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

DEVICE = torch.device("cuda", 0)  # a label: nothing is asked of it
RUBBISH = 0xDD


class Stream:
    """Runs what is queued on it in order, in a thread of its own."""

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator
        self._queue: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def queue(self, kind: str, task: Callable[[], object]) -> None:
        delay = self._simulator.delay(kind)
        self._queue.put(lambda: (time.sleep(delay), task())[1])

    def wait_event(self, event: Event) -> None:
        done = event.done
        self.queue("wait", lambda: done.wait() and None)

    def end(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (task := self._queue.get()) is not None:
            task()

    def __enter__(self) -> None:
        self._simulator.current.append(self)

    def __exit__(self, *error: object) -> None:
        self._simulator.current.pop()


class Event:
    def __init__(self, device: torch.device, *, enable_timing: bool = False) -> None:
        self.done = threading.Event()
        self.done.set()  # as torch's: one that was never recorded has happened
        self._timing, self._at = enable_timing, 0.0

    def record(self, stream: Stream) -> None:
        self.done = threading.Event()
        stream.queue("event", self._happen)

    def _happen(self) -> None:
        self._at = time.perf_counter()
        self.done.set()

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds; as torch's it raises where one has not happened, or was not made to take the time."""
        if not (self._timing and end._timing and self.query() and end.query()):
            raise RuntimeError("Both events must be recorded with timing, and have happened")
        return 1000 * (end._at - self._at)

    def query(self) -> bool:
        return self.done.is_set()

    def synchronize(self) -> None:
        assert self.done.wait(30)


class Simulator(TorchFunctionMode):
    """Delays in seconds by kind: copy, kernel, upload; `jitter` adds up to that much to each of them."""

    def __init__(self, delays: Mapping[str, float]) -> None:
        super().__init__()
        self._delays, self._random = delays, random.Random(0)
        self._streams: list[Stream] = []
        self._memory: dict[int, np.ndarray[Any, Any]] = {}  # of the device, by address
        self._recorded: dict[int, Stream] = {}
        self.current = [self.stream()]
        self.pinned = 0  # bytes, made so far
        self.pins: set[int] = set()
        self.ignored: set[str] = set()  # calls that do nothing, for tests of tests

    def delay(self, kind: str) -> float:
        jitter = self._delays.get("jitter", 0.0) if kind in ("copy", "kernel", "upload") else 0.0
        return self._delays.get(kind, 0.0) + self._random.random() * jitter

    def stream(self, device: torch.device | None = None) -> Stream:
        self._streams.append(Stream(self))
        return self._streams[-1]

    def end(self) -> None:
        for stream in self._streams:
            stream.end()

    def compute(self, function: Callable[[torch.Tensor], torch.Tensor], there: torch.Tensor) -> torch.Tensor:
        """What a kernel on the compute stream makes of `there`; its memory is rubbish until then."""
        like = function(there)
        return self._queued("kernel", like.shape, like.dtype, function, there)

    def record_stream(self, source: torch.Tensor, stream: Stream) -> None:
        if "record_stream" not in self.ignored:
            self._recorded[source.data_ptr()] = stream

    def _queued(
        self, kind: str, shape: Sequence[int], dtype: torch.dtype, function: Callable[[Any], Any], source: torch.Tensor
    ) -> torch.Tensor:
        memory = np.full(int(np.prod(shape)) * dtype.itemsize, RUBBISH, np.uint8)
        handle = memory[:]  # lives as long as a tensor does that torch knows of; what is queued holds the memory itself
        made = torch.from_numpy(handle).view(dtype).view(tuple(shape))
        self._memory[made.data_ptr()] = memory
        read, target = self._alias(source), self._alias(made)
        self.current[-1].queue(kind, lambda: target.copy_(function(read)))
        weakref.finalize(handle, self._freed, memory, self.current[-1])
        return made

    def _alias(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same values, without keeping the memory from being given to others."""
        memory = self._memory.get(tensor.untyped_storage().data_ptr())
        if memory is None:
            return tensor.detach()  # on the host
        flat = torch.from_numpy(memory).view(tensor.dtype)
        return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _freed(self, memory: np.ndarray[Any, Any], owner: Stream) -> None:
        """The allocator gives memory to the next one in its stream's order, or when a recorded stream is done."""
        self._memory.pop(memory.ctypes.data)
        self._recorded.pop(memory.ctypes.data, owner).queue("free", lambda: memory.fill(RUBBISH))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.zeros and kwargs.pop("pin_memory", False):
            made = torch.zeros(*args, **kwargs)
            self.pinned += made.nbytes
            self.pins.add(made.data_ptr())
            return made
        if func is torch.Tensor.is_pinned:
            return args[0].data_ptr() in self.pins
        if func is torch.Tensor.to and len(args) > 1 and args[1] == DEVICE:
            assert kwargs["non_blocking"]
            return self._queued("upload", args[0].shape, args[0].dtype, lambda t: t, args[0])
        if func is torch.Tensor.contiguous and not args[0].is_contiguous():
            return self._queued("kernel", args[0].shape, args[0].dtype, lambda t: t, args[0])
        if func is torch.Tensor.copy_ and kwargs.get("non_blocking"):
            into, source = args[0].detach(), self._alias(args[1])
            self.current[-1].queue("copy", lambda: into.copy_(source))
            return args[0]
        return func(*args, **kwargs)


@contextmanager
def installed(patch: pytest.MonkeyPatch, delays: Mapping[str, float]) -> Iterator[Simulator]:
    """The simulated accelerator in the place of torch's, for this thread."""
    simulator = Simulator(delays)

    def record_stream(source: torch.Tensor, stream: Stream) -> None:
        simulator.record_stream(source, stream)

    with patch.context() as inner, simulator:
        inner.setattr(torch, "Stream", simulator.stream)
        inner.setattr(torch, "Event", Event)
        inner.setattr(torch.Tensor, "record_stream", record_stream)
        inner.setattr(torch.accelerator, "current_stream", lambda device: simulator.current[-1])
        yield simulator
    simulator.end()
