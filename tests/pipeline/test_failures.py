"""Bad images keep their rows and harm no others; the budget; stages that raise, stall or hang end a run in order."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
from privilege import without_privilege
from runs import LAYERS, Notes, Tiny, extract, make_photos, picture

from fmextract.config import FailureBudget
from fmextract.errors import CaptureError, DeviceLost, FmextractError, NoSpace, SampleError, TooManyFailures
from fmextract.pipeline import pipeline, storing, watch
from fmextract.pipeline.channel import Channel, Closed
from fmextract.pipeline.chunks import Chunk
from fmextract.pipeline.threads import Pool
from fmextract.reading import activations
from fmextract.records import Status
from fmextract.storage import durable


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("fmextract")}


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No thread and no open file of a run survives it."""
    before = threads()
    yield
    assert threads() <= before | {name for name in threads() if name.startswith("fmextract-read")}


# ---------------------------------------------------------------------------------------------------------- bad images


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in a few hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    side = (60_000).to_bytes(4, "big")
    header = chunk(b"IHDR", side + side + bytes([8, 2, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")


BAD = {
    1: picture(1)[:120],  # cut off
    2: picture(2)[:60] + bytes(40) + picture(2)[100:],  # broken inside
    4: b"this is no image",
    5: b"",
    9: bomb(),
}
UNREADABLE = (6, 7, 10)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run over the same rows with nothing wrong with them."""
    place = tmp_path_factory.mktemp("sound")
    extract(make_photos(place / "photos", 14), place / "out")
    return place / "out"


def make_bad_photos(folder: Path) -> Path:
    photos = make_photos(folder, 14, BAD)
    for row in UNREADABLE:
        (photos / f"{row:04}.png").unlink()
    os.mkfifo(photos / "0006.png")
    (photos / "0007.png").symlink_to("nowhere.png")
    (photos / "0010.png").symlink_to("0010.png")
    return photos


def test_bad_images_keep_their_rows_and_harm_no_others(sound: Path, tmp_path: Path) -> None:
    photos = make_bad_photos(tmp_path / "photos")
    notes = Notes()
    result = extract(photos, tmp_path / "out", notes=notes)
    wrong = sorted([*BAD, *UNREADABLE])
    assert (result.images, result.failed) == (14, len(wrong))
    assert len(result.failures) == len(wrong)
    with activations.open(tmp_path / "out") as acts, activations.open(sound) as good:
        assert acts.keys.tolist() == good.keys.tolist()
        assert np.flatnonzero(acts.status).tolist() == wrong
        for row in wrong:
            expected = Status.UNREADABLE if row in UNREADABLE else Status.UNDECODABLE
            assert acts.status[row] == expected
            assert acts.messages[row]
        for name in acts.layers:
            values, reference = acts[name][:], good[name][:]
            fine = np.setdiff1d(np.arange(14), wrong)
            # The same bits, although their batches had black images in them.
            np.testing.assert_array_equal(values[fine].view(np.uint32), reference[fine].view(np.uint32))
            assert np.isnan(values[wrong]).all()
            assert acts[name].stats.count.sum() == np.isfinite(values).sum()


@pytest.mark.skipif(sys.platform != "linux", reason="takes the privileges of Linux away")
def test_a_directory_named_like_an_image_and_a_file_without_permission(tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", 4)
    (photos / "0001.png").chmod(0)
    (photos / "0002.png").unlink()
    (photos / "0002.png").mkdir()
    (photos / "manifest.txt").write_text("".join(f"{row:04}.png\n" for row in range(4)))
    with without_privilege():
        extract(photos / "manifest.txt", tmp_path / "out")
    with activations.open(tmp_path / "out") as acts:
        assert acts.status.tolist() == [0, 1, 1, 0]
        assert "Permission denied" in acts.messages[1]
        assert "directory" in acts.messages[2] or "regular file" in acts.messages[2]


def test_a_file_that_disappears_or_changes_during_the_run_is_a_failed_row(tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", 14)

    def meddle(done: int) -> None:
        if done == 4:
            (photos / "0012.png").unlink()
            (photos / "0013.png").write_bytes(b"not any more")

    assert extract(photos, tmp_path / "out", notes=Notes(meddle)).failed == 2
    with activations.open(tmp_path / "out") as acts:
        assert acts.status[12:].tolist() == [Status.UNREADABLE, Status.UNDECODABLE]
        assert "No such file" in acts.messages[12]


class Choosy(Tiny):
    """Raises for any batch with an image that is brighter than the others."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (x.mean((1, 2, 3)) > 0.9).any():
            raise ValueError("too bright")
        return super().forward(x)


def with_one_too_bright() -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (8, 8, 3), np.uint8) for _ in range(10)]
    images[6] = np.full((8, 8, 3), 255, np.uint8)
    return images


def test_an_image_that_the_model_refuses_fails_alone(tmp_path: Path) -> None:
    images = with_one_too_bright()
    extract(images, tmp_path / "sound")
    assert extract(images, tmp_path / "out", model=Choosy()).failures == (("000006", "ValueError: too bright"),)
    with activations.open(tmp_path / "out") as acts, activations.open(tmp_path / "sound") as good:
        assert acts.status.tolist() == [0] * 6 + [Status.FORWARD_FAILED] + [0] * 3
        fine = acts.rows()
        np.testing.assert_array_equal(acts["conv"][fine], good["conv"][fine])


class Unlucky(Choosy):
    """Choosy, and among black images it once meets an error of the device."""

    def __init__(self, error: RuntimeError) -> None:
        super().__init__()
        self.errors = [error]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lit = (x > x.min()).flatten(1).any(1)  # black is the least value there is
        if self.errors and len(x) == 4 and lit.sum() == 1:
            raise self.errors.pop()
        return super().forward(x)


def test_no_image_is_to_blame_where_memory_runs_out(tmp_path: Path) -> None:
    model = Unlucky(torch.OutOfMemoryError("out of memory"))
    result = extract(with_one_too_bright(), tmp_path / "out", model=model)
    assert not model.errors
    assert result.failures == (("000006", "ValueError: too bright"),)
    assert result.batch_size == 2


class Dying(Choosy):
    """Its device fails at the bright image, and at all that it is asked from then on."""

    dead = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        try:
            if not self.dead:
                return super().forward(x)
        except ValueError:
            self.dead = True
        raise RuntimeError("CUDA error: an illegal memory access")


def test_a_device_that_fails_for_good_is_not_told_as_a_model_that_does(tmp_path: Path) -> None:
    with pytest.raises(DeviceLost, match=r"^the device failed: CUDA error: an illegal memory access"):
        extract(with_one_too_bright(), tmp_path / "out", model=Dying())


def test_no_image_is_to_blame_where_the_device_fails(tmp_path: Path) -> None:
    model = Unlucky(RuntimeError("CUDA error: an illegal memory access"))
    with pytest.raises(DeviceLost, match="illegal memory access"):
        extract(with_one_too_bright(), tmp_path / "out", model=model)
    assert extract(with_one_too_bright(), tmp_path / "out", model=model).failures == (
        ("000006", "ValueError: too bright"),
    )


# -------------------------------------------------------------------------------------------------------------- budget


@pytest.mark.parametrize(
    ("budget", "failed", "seen", "exceeded"),
    [
        ("5%", 199, 199, False),
        ("5%", 11, 200, True),
        ("5%", 10, 200, False),
        ("0", 1, 1, True),
        ("3", 3, 9, False),
        ("3", 4, 9, True),
        ("100%", 300, 300, False),
    ],
)
def test_the_budget(budget: str, failed: int, seen: int, exceeded: bool) -> None:
    assert FailureBudget.parse(budget).exceeded(failed, seen) is exceeded


def test_over_budget_stops_and_resumes(tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", 12, {5: b"", 6: b"", 7: b""})
    with pytest.raises(TooManyFailures, match=r"3 of 8 images failed.*'0005.png'") as caught:
        extract(photos, tmp_path / "out", max_failures=2)
    assert caught.value.exit_code == 4
    with pytest.raises(TooManyFailures):  # the same command again is no way around it
        extract(photos, tmp_path / "out", max_failures=2)
    assert extract(photos, tmp_path / "out", max_failures=3).failed == 3


def test_a_share_is_judged_from_200_images_on(tmp_path: Path) -> None:
    images: list[Any] = [np.full((8, 8, 3), row % 256, np.uint8) for row in range(220)]
    images[:30] = [b""] * 30
    with pytest.raises(TooManyFailures, match="30 of 200 images failed"):
        extract(images, tmp_path / "out", batch_size=20)
    assert extract(images[:199], tmp_path / "short", batch_size=20).failed == 30


@pytest.mark.parametrize("budget", ["5%", "100%", 99])
@pytest.mark.parametrize("name", ["out", "out.h5"])
def test_all_failed_is_never_done(tmp_path: Path, name: str, budget: Any) -> None:
    photos = make_photos(tmp_path / "photos", 6, dict.fromkeys(range(6), b""))
    for _ in range(2):  # nor by running it again
        with pytest.raises(TooManyFailures, match=r"every one of the 6 images failed\. The first: '0000\.png'"):
            extract(photos, tmp_path / name, max_failures=budget)
    with pytest.raises(FmextractError):
        activations.open(tmp_path / name)


# ---------------------------------------------------------------------------------------------- stages that raise


class Broken(Exception):
    """Raised where nothing is expected."""


def _raise(error: Exception) -> Callable[..., Any]:
    def broken(*_: Any, **__: Any) -> Any:
        raise error

    return broken


def _after(calls: int, function: Callable[..., Any], error: Exception) -> Callable[..., Any]:
    """`function`, which raises from its `calls`th call on."""
    count = iter(range(10**9))

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(count) >= calls:
            raise error
        return function(*args, **kwargs)

    return counted


STAGES = {
    "decode": "fmextract.inputs.decoding:decode",
    "normalise": "fmextract.inputs.preprocessing:normalise",
    "statistics": "fmextract.pipeline.running_stats:RunningStats.update",
    "statistics' end": "fmextract.pipeline.running_stats:RunningStats.result",
    "cut": "fmextract.pipeline.chunks:Cutter.add",
    "encode": "fmextract.storage.codecs:encode",
    "create": "fmextract.storage.writer:ShardWriter.__init__",
    "write": "fmextract.storage.writer:ShardWriter.write_chunk",
    "finish": "fmextract.storage.writer:ShardWriter.finish",
    "publish": "fmextract.storage.durable:publish",
    "record": "fmextract.pipeline.write:record_shard",
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("stages") / "photos", 14)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_raises_ends_the_run(photos: Path, tmp_path: Path, stage: str, late: bool) -> None:
    import importlib

    module, _, rest = STAGES[stage].partition(":")
    owner: Any = importlib.import_module(module)
    *path, name = rest.split(".")
    for part in path:
        owner = getattr(owner, part)
    with pytest.MonkeyPatch.context() as patch:
        work = pipeline.run_shards

        def broken_inside(*args: Any, **kwargs: Any) -> None:
            # Not before: the same functions serve the probe and the plan.
            patch.setattr(owner, name, _after(3 * late, getattr(owner, name), Broken(stage)))
            work(*args, **kwargs)

        patch.setattr(pipeline, "run_shards", broken_inside)
        with pytest.raises(Broken, match=stage):
            extract(photos, tmp_path / "out")
    left = [path.name for path in (tmp_path / "out").iterdir()]
    assert not [name for name in left if name.startswith(".") or name == "lock.json"], left
    assert extract(photos, tmp_path / "out").images == 14


@pytest.mark.parametrize(
    ("error", "code"), [(NoSpace("full"), 4), (DeviceLost("gone"), 4), (CaptureError("other"), 4), (MemoryError(), 4)]
)
def test_errors_keep_their_exit_codes(photos: Path, tmp_path: Path, error: Exception, code: int) -> None:
    class Failing(Tiny):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.failing:
                raise error
            return super().forward(x)

        failing = False

    model = Failing()
    notes = Notes(lambda done: setattr(model, "failing", True))
    expected = DeviceLost if isinstance(error, MemoryError) else type(error)
    if isinstance(error, (NoSpace, DeviceLost)):  # whatever a model raises, it is the model that does
        expected = CaptureError
    with pytest.raises(expected) as caught:
        extract(photos, tmp_path / "out", model=model, notes=notes)
    assert caught.value.exit_code == code


def test_a_lost_device_stops_and_resumes(photos: Path, tmp_path: Path) -> None:
    class Lost(Tiny):
        lost = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.lost:
                raise RuntimeError("CUDA error: unspecified launch failure")
            return super().forward(x)

    model = Lost()
    with pytest.raises(DeviceLost, match="unspecified launch failure"):
        extract(photos, tmp_path / "out", model=model, notes=Notes(lambda done: setattr(model, "lost", True)))
    extract(photos, tmp_path / "out", model=Lost())


# ---------------------------------------------------------------------------------------------- stages that hang


class Slow:
    """A Dataset of which one image takes until it is let go, in a thread of the run."""

    thread_safe = True

    def __init__(self) -> None:
        self.go = threading.Event()

    def __len__(self) -> int:
        return 12

    def __getitem__(self, row: int) -> np.ndarray:  # type: ignore[type-arg]
        if row == 9 and threading.current_thread().name.startswith("fmextract-decode"):  # the plan looks at it too
            self.go.wait(30)
        return np.full((8, 8, 3), row, np.uint8)


def test_a_stall_says_what_it_waits_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "PATIENCE", 0.2)
    data = Slow()

    class Letting(Notes):
        def note(self, text: str) -> None:
            super().note(text)
            if "to be read and decoded" in text:
                data.go.set()

    notes = Letting()
    extract(data, tmp_path / "out", notes=notes)
    assert "waiting for images to be read and decoded: '000009' (for " in notes
    with activations.open(tmp_path / "out") as acts:
        assert not acts.status.any()  # time never decides what is stored


class SlowHere:
    """A Dataset that only the thread of the caller reads, of which one image takes until it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def __len__(self) -> int:
        return 12

    def __getitem__(self, row: int) -> np.ndarray:  # type: ignore[type-arg]
        if row == 10:  # the plan looks at others
            self.go.wait(30)
        return np.full((8, 8, 3), row, np.uint8)


def test_a_dataset_that_the_caller_s_thread_reads_stalls_no_less_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "PATIENCE", 0.2)
    data, notes = SlowHere(), Notes()
    telling = notes.note
    notes.note = lambda text: (telling(text), data.go.set() if "'000010' (for " in text else None)[0]  # type: ignore[method-assign]
    extract(data, tmp_path / "out", notes=notes)
    assert "waiting for images to be read and decoded: '000010' (for " in notes


def test_a_disk_that_stalls_at_the_end_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All chunks are written by then, and the last shard is being made durable."""
    monkeypatch.setattr(watch, "PATIENCE", 0.2)
    told = threading.Event()
    make = durable.make_durable

    def stalling(path: Path) -> None:
        assert "shard" not in path.name or told.wait(30)
        make(path)

    class Telling(Notes):
        def note(self, text: str) -> None:
            super().note(text)
            if "waiting for" in text:
                told.set()

    notes = Telling()
    monkeypatch.setattr(durable, "make_durable", stalling)
    extract(make_photos(tmp_path / "photos", 4), tmp_path / "out", notes=notes)
    assert f"waiting for the disk of {tmp_path / 'out'}" in notes


def test_a_decoder_that_hangs_for_ever_does_not_keep_a_run_from_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "HANGING", 0.2)
    data = Slow()

    def interrupt(done: int) -> None:
        if done >= 4:
            raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        extract(data, tmp_path / "out", notes=Notes(interrupt), batch_size=2)
    assert time.monotonic() - started < 10
    data.go.set()
    for thread in threading.enumerate():
        if thread.name.startswith("fmextract-decode"):
            thread.join(10)
    extract(data, tmp_path / "out", batch_size=2)


def test_threads_of_a_pool_can_be_left_behind() -> None:
    go = threading.Event()
    pool = Pool("fmextract-test", 2)
    meet = threading.Barrier(3)
    futures = [pool.submit(lambda: (meet.wait(5), go.wait(30))[1]) for _ in range(2)]
    meet.wait(5)
    waiting = pool.submit(lambda: 1)
    assert not pool.close(0.05)
    assert waiting.cancelled()
    go.set()
    assert [future.result(5) for future in futures] == [True, True]


def test_a_pool_hands_on_what_its_tasks_raise() -> None:
    pool = Pool("fmextract-test", 1)
    with pytest.raises(SampleError):
        pool.submit(_raise(SampleError(1, "x"))).result(5)
    assert pool.submit(sum, (1, 2)).result(5) == 3
    assert pool.close(5)
    with pytest.raises(threading.BrokenBarrierError):
        Pool("fmextract-test", 2, begin=_raise(ValueError("x")))


def test_a_channel_wakes_everybody_when_it_is_closed() -> None:
    channel: Channel[int] = Channel(1, [0])
    empty: Channel[int] = Channel(1)
    seen: list[str] = []

    def wait(action: Callable[[], Any]) -> None:
        try:
            action()
        except Closed:
            seen.append("closed")

    waiting = [threading.Thread(target=wait, args=(action,)) for action in (lambda: channel.put(1), empty.get)]
    for thread in waiting:
        thread.start()
    time.sleep(0.05)
    channel.close()
    empty.close()
    for thread in waiting:
        thread.join(5)
    assert seen == ["closed", "closed"]
    with pytest.raises(Closed):
        channel.get()


def test_a_channel_is_full_by_the_sizes_of_what_waits_in_it() -> None:
    channel: Channel[str] = Channel(4)
    channel.put("large", 9)  # alone it passes, or it never would
    came: list[str] = []

    def put(item: str, size: int) -> None:
        channel.put(item, size)
        came.append(item)

    first = threading.Thread(target=put, args=("three", 3))
    first.start()
    time.sleep(0.05)
    assert came == []
    assert channel.get() == "large"
    first.join(5)
    second = threading.Thread(target=put, args=("two", 2))
    second.start()
    time.sleep(0.05)
    assert came == ["three"]
    channel.put("one", 1)
    assert [channel.get(), channel.get(), channel.get()] == ["three", "one", "two"]
    second.join(5)
    assert came == ["three", "two"]


@pytest.mark.parametrize(
    ("number", "threads", "longest", "tasks"),
    [(32, 2, 4, 8), (33, 2, 4, 9), (16, 2, 2, 8), (32, 16, 1, 32), (3, 2, 1, 3), (0, 2, 0, 0), (400, 2, 4, 100)],
)
def test_chunks_share_tasks_where_threads_have_enough_of_them(
    number: int, threads: int, longest: int, tasks: int
) -> None:
    cut = [Chunk(0, (i,), []) for i in range(number)]
    made = storing.tasks(cut, threads, 4)
    assert [chunk for task in made for chunk in task] == cut
    assert max(map(len, made), default=0) == longest
    assert len(made) == tasks


def test_chunks_that_share_a_task_come_to_their_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = make_photos(tmp_path / "photos", 12)
    extract(photos, tmp_path / "plain.h5", num_workers=1)
    lengths: list[int] = []
    encode = storing.Storing._encode

    def noting(self: Any, task: Any, done: Any) -> Any:
        lengths.append(len(task))
        return encode(self, task, done)

    monkeypatch.setattr(storing.Storing, "_encode", noting)
    monkeypatch.setattr(storing, "tasks", lambda cut, threads, most: [cut[:2], cut[2:]] if len(cut) > 2 else [cut])
    extract(photos, tmp_path / "shared.h5", num_workers=1)
    assert max(lengths) > 1
    with activations.open(tmp_path / "plain.h5") as plain, activations.open(tmp_path / "shared.h5") as shared:
        for name in LAYERS:
            np.testing.assert_array_equal(plain[name][:], shared[name][:])


def test_a_crash_of_the_decoder_names_the_rows(tmp_path: Path) -> None:
    """A process that dies in native code leaves the rows in flight behind; runs.Notes of the next run names them."""
    script = f"""
import ctypes, sys, threading
sys.path.insert(0, {str(Path(runs.__file__).parent)!r})
import numpy as np, runs
from pathlib import Path
class Crashing:
    thread_safe = True
    def __len__(self): return 12
    def __getitem__(self, row):
        # The plan looks at it too, on the main thread.
        if row == 9 and sys.argv[2] == "crash" and threading.current_thread().name.startswith("fmextract"):
            ctypes.string_at(0)
        return np.full((8, 8, 3), row, np.uint8)
notes = runs.Notes()
runs.extract(Crashing(), Path(sys.argv[1]), notes=notes)
print(notes.notes)
"""
    command = [sys.executable, "-X", "faulthandler", "-c", script, str(tmp_path / "out")]
    crashed = subprocess.run([*command, "crash"], capture_output=True, text=True, check=False)
    assert crashed.returncode < 0
    assert "Segmentation fault" in crashed.stderr
    again = subprocess.run([*command, "fine"], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "ended without a word while these were being decoded" in again.stdout
    assert "'000009'" in again.stdout
