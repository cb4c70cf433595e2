"""The ring between device and host, on a simulated accelerator and, where torch finds one, on a real one.

The faults made on purpose show that the simulated one sees them: each rule that `device` keeps is broken in turn.
"""

from __future__ import annotations

import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import simulated_device
import torch
from simulated_device import Event, Simulator, Stream, installed

from fmextract import errors
from fmextract.common.devices import is_out_of_memory
from fmextract.pipeline import transfers
from fmextract.pipeline.channel import Closed
from fmextract.pipeline.transfers import DeviceTransfers, HostTransfers, transfers_for

DELAYS = {
    "slow copies": {"copy": 0.004},
    "slow kernels": {"kernel": 0.004},
    "slow uploads": {"upload": 0.004},
    "jitter": {"jitter": 0.004},
}
SHAPE = (4, 3, 5, 5)
REAL = pytest.param(
    None,
    id="accelerator",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.accelerator.is_available(), reason="torch finds no accelerator here"),
    ],
)


@contextmanager
def machine(patch: pytest.MonkeyPatch, delays: dict[str, float] | None) -> Iterator[tuple[torch.device, Any]]:
    """(device, what computes on it): a simulated one with these delays, a real one for None."""
    if delays is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        assert found is not None
        yield torch.device(found.type, 0), lambda function, there: function(there)
    else:
        with installed(patch, delays) as simulator:
            yield simulated_device.DEVICE, simulator.compute


def expected(batch: int) -> list[torch.Tensor]:
    pixels = torch.full(SHAPE, batch % 251, dtype=torch.uint8)
    return [pixels.float() * 2, (pixels.to(torch.int32) + 1).transpose(1, 3), (pixels[:, :1].half() + 0.5)]


def stream_batches(moves: DeviceTransfers, compute: Callable[..., torch.Tensor], batches: int, patient: float) -> None:
    """Send batches through, as the engine does, to a reader that takes `patient` seconds for each. Asserts values."""
    arriving: queue.SimpleQueue[Any] = queue.SimpleQueue()
    wrong: list[int] = []

    def read() -> None:
        while (item := arriving.get()) is not None:
            batch, download = item
            for turn in range(2):
                views = download.wait()
                if not all(torch.equal(v, e) for v, e in zip(views, expected(batch), strict=True)):
                    wrong.append(batch)
                time.sleep(patient if not turn else 0.0)
            del views
            download.release()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for batch in range(batches):
            buffer = moves.input_buffer(SHAPE, torch.uint8)
            buffer.fill_(batch % 251)
            moves.reserve()
            there = moves.upload(buffer)
            del buffer
            made = [
                compute(lambda t: t.float() * 2, there),
                compute(lambda t: t.to(torch.int32) + 1, there).transpose(1, 3),  # to be made contiguous on the device
                compute(lambda t: t[:, :1].half() + 0.5, there),
            ]
            arriving.put((batch, moves.download(made)))
            del there, made
    finally:
        arriving.put(None)
        reader.join(30)
    assert not wrong, f"values of another batch, or unfinished ones, in batches {wrong}"


@pytest.mark.parametrize("patient", [0.0, 0.003], ids=["fast reader", "slow reader"])
@pytest.mark.parametrize("delays", [*(pytest.param(d, id=name) for name, d in DELAYS.items()), REAL])
def test_every_batch_arrives_as_it_was_computed(
    delays: dict[str, float] | None, patient: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    with machine(monkeypatch, delays) as (where, compute):
        stream_batches(DeviceTransfers(where, 2), compute, 25 if delays else 2000, patient if delays else 0.0)


def _no_host_wait(patch: pytest.MonkeyPatch, simulator: Simulator) -> None:
    patch.setattr(Event, "synchronize", lambda self: None)


def _event_on_the_wrong_stream(patch: pytest.MonkeyPatch, simulator: Simulator) -> None:
    record = Event.record
    patch.setattr(Event, "record", lambda self, stream: record(self, simulator.current[0]))


def _no_wait_between_streams(patch: pytest.MonkeyPatch, simulator: Simulator) -> None:
    patch.setattr(Stream, "wait_event", lambda self, event: None)


def _source_not_kept(patch: pytest.MonkeyPatch, simulator: Simulator) -> None:
    simulator.ignored.add("record_stream")


def _staging_refilled_early(patch: pytest.MonkeyPatch, simulator: Simulator) -> None:
    patch.setattr(Event, "query", lambda self: True)


def _slot_released_early(patch: pytest.MonkeyPatch, simulator: Simulator) -> None:
    wait, given = transfers._DeviceDownload.wait, set()

    def release_at_once(self: Any) -> list[torch.Tensor]:
        views = wait(self)
        if self not in given:
            given.add(self)
            transfers._give_back(self._ring, self._slot)
        return views

    patch.setattr(transfers._DeviceDownload, "wait", release_at_once)
    patch.setattr(transfers._DeviceDownload, "release", lambda self: None)


@pytest.mark.parametrize(
    "break_rule",
    [
        pytest.param(_no_wait_between_streams, id="3: the copy does not wait for the kernel"),
        pytest.param(_event_on_the_wrong_stream, id="4: completion recorded on the compute stream"),
        pytest.param(_no_host_wait, id="5: the host does not wait"),
        pytest.param(_source_not_kept, id="6: no record_stream"),
        pytest.param(_staging_refilled_early, id="9: a staging buffer refilled before its upload"),
        pytest.param(_slot_released_early, id="10: a slot released before its reader is done"),
    ],
)
def test_the_simulated_accelerator_sees_each_broken_rule(break_rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for name, delays in DELAYS.items():
        for patient in (0.0, 0.02):
            with monkeypatch.context() as patch, installed(patch, delays) as simulator:
                patch.setattr(Event, "elapsed_time", lambda self, end: 0.0)  # raises where one has not happened yet
                break_rule(patch, simulator)
                try:
                    stream_batches(DeviceTransfers(simulated_device.DEVICE, 2), simulator.compute, 10, patient)
                except AssertionError:
                    seen.append(name)
    assert seen


@pytest.mark.parametrize("delays", [pytest.param({"kernel": 0.05, "copy": 0.03}, id="simulated"), REAL])
def test_the_device_says_how_long_it_computed_and_copied(
    delays: dict[str, float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queueing takes no time here; what the host waits for before and after is not in either."""
    with machine(monkeypatch, delays) as (where, compute):
        moves = DeviceTransfers(where, 2)
        for _ in range(3):
            there = moves.upload(moves.input_buffer(SHAPE, torch.uint8))
            moves.reserve()
            made = [compute(lambda t: t + 1, there)]
            moves.reserve()  # room is reserved already: the pass has begun
            download = moves.download(made)
            download.wait()
            computing, copying = download.computing, download.copying
            time.sleep(0.2)
            download.wait()
            assert (download.computing, download.copying) == (computing, copying)
            download.release()
            if delays is None:
                assert computing > 0
                assert copying > 0
            else:
                assert 0.05 <= computing < 0.2
                assert 0.03 <= copying < 0.2


@pytest.mark.parametrize("delays", [pytest.param(DELAYS["jitter"], id="simulated"), REAL])
def test_a_fast_producer_is_held_back_until_a_slot_is_free_or_the_run_ends(
    delays: dict[str, float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with machine(monkeypatch, delays) as (where, compute):
        moves = DeviceTransfers(where, 2)
        there = moves.upload(moves.input_buffer(SHAPE, torch.uint8))
        first, _ = (moves.download([compute(lambda t: t + 1, there)]) for _ in range(2))
        through = threading.Event()
        waiting = threading.Thread(target=lambda: (moves.reserve(), through.set()))
        waiting.start()
        assert not through.wait(0.1)
        first.wait()
        first.release()
        assert through.wait(10)
        waiting.join()
        moves.download([compute(lambda t: t + 1, there)])
        moves.close()
        with pytest.raises(Closed):
            moves.reserve()


@pytest.mark.parametrize("delays", [pytest.param(DELAYS["jitter"], id="simulated"), REAL])
def test_buffers_are_pinned_and_used_again(delays: dict[str, float] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Tensor] = []
    pinned = transfers._pinned
    monkeypatch.setattr(transfers, "_pinned", lambda *a: made.append(pinned(*a)) or made[-1])
    with machine(monkeypatch, delays) as (where, compute):
        moves = DeviceTransfers(where, 2)
        stream_batches(moves, compute, 5, 0.0)
        after_five = len(made)
        stream_batches(moves, compute, 40, 0.0)
        assert all(block.is_pinned() for block in made)
    # Two slots; of input buffers one is filled, and one may be uploading for each slot and for the batch before.
    assert after_five <= len(made) <= 2 + 4


def test_memory_that_could_not_be_pinned_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed(monkeypatch, {}) as simulator:
        simulator.pins = type("Nothing", (set,), {"add": lambda self, item: None})()
        with pytest.raises(errors.ConfigError, match="no pinned memory"):
            DeviceTransfers(simulated_device.DEVICE, 2).input_buffer(SHAPE, torch.uint8)


def test_mps_copies_and_waits_since_it_has_no_second_stream() -> None:
    moves = transfers_for(torch.device("mps"), 2)
    assert isinstance(moves, HostTransfers)
    assert moves.ahead == 2
    assert transfers_for(torch.device("cpu"), 2).ahead == 1


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            True,
        ),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_libraries_say_out_of_memory_in_words_of_their_own(error: Exception, is_memory: bool) -> None:
    assert is_out_of_memory(error) == is_memory


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")
def test_nothing_but_the_ring_waits_for_the_device() -> None:
    """CUDA alone can tell: any call of the caller's thread that synchronises is an error here."""
    from fmextract.pipeline.running_stats import RunningStats
    from fmextract.pipeline.work import Nonfinite

    where = torch.device("cuda", 0)
    moves = DeviceTransfers(where, 2)
    network = torch.nn.Conv2d(3, 8, 3).to(where)
    stats = RunningStats((8, 30, 30), ("channel", "y", "x"), 3, where, 0.1)
    unknown = Nonfinite()
    for turn in range(3):
        buffer = moves.input_buffer((8, 3, 32, 32), torch.uint8)
        moves.reserve()
        with torch.no_grad(), _refusing_to_wait() if turn else nullcontext():
            maps = network(moves.upload(buffer).float())
            stats.update(maps, 8 * turn, [True] * 7 + [False])
            unknown.update(maps, 8 * turn, [True] * 7 + [False])
            download = moves.download([maps])
        download.wait()
        download.release()


@contextmanager
def _refusing_to_wait() -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that it does not see every wait
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
