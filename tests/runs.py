"""Tiny runs for tests: a model of three layers, images of 8 x 8 pixels, shards of four rows."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from fmextract.config import Config
from fmextract.errors import FmextractError
from fmextract.reading import activations
from fmextract.records import Result
from fmextract.run.extract import run
from fmextract.storage import shards

LAYERS = ("conv", "relu", "fc")
OPTIONS: Mapping[str, Any] = {
    "layers": LAYERS,
    "preprocess": "size=8,crop=8,mean=0.5,std=0.5",
    "precision": "fp32",
    "batch_size": 4,
    "num_workers": 2,
    "shard_size": 1,  # less than a row: shards as short as they can be, one batch
    "device": "cpu",
}


class Tiny(nn.Module):
    """A convolution, a ReLU in place after it, a linear layer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.relu = nn.ReLU(inplace=True)
            self.fc = nn.Linear(4, 5)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.fc(self.relu(self.conv(x)).mean((2, 3)))
        return made


def picture(number: int) -> bytes:
    """A PNG of noise, different for every number."""
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def make_photos(folder: Path, count: int, bad: Mapping[int, bytes] | None = None) -> Path:
    """A folder of `count` pictures, those in `bad` with that content."""
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:04}.png").write_bytes((bad or {}).get(number, picture(number)))
    return folder


class Notes:
    """A Progress that keeps what it is told. `on_advance` is called as the images come."""

    def __init__(self, on_advance: Callable[[int], None] = lambda done: None) -> None:
        self.notes: list[str] = []
        self.done = 0
        self._on_advance = on_advance

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, what: str, done: int, total: int) -> None: ...

    def start(self, total: int, done: int) -> None:
        self.done = done

    def advance(self, images: int, failed: int) -> None:
        self.done += images
        self._on_advance(self.done)

    def finish(self) -> None: ...

    def __contains__(self, text: str) -> bool:
        return any(text in note for note in self.notes)


def extract(source: Any, out: Path, *, model: Any = None, notes: Any = None, **options: Any) -> Result:
    """A run with OPTIONS, changed by `options`.

    On one thread: on a machine that is busy, two that wait for each other at every operation take fifty times as long.
    """
    config = Config.of(**{**OPTIONS, **options})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run(source, Tiny() if model is None else model, out, config, Notes() if notes is None else notes)
    finally:
        torch.set_num_threads(threads)


class Ended(BaseException):
    """A run is ended from outside, at a chosen moment."""


def await_shards(out: Path, count: int) -> None:
    """Until `count` shards are published; they are written beside the forward passes."""
    directory = out.with_name(f"{out.name}.partial") if out.suffix else out
    end = time.monotonic() + 20
    while len(list(directory.glob("shard-*.json"))) < count and time.monotonic() < end:
        time.sleep(0.001)


def extract_until(rows: int, source: Any, out: Path, **options: Any) -> None:
    """A run that is ended when `rows` rows are done, and the shards before the last one are published."""

    def stop(done: int) -> None:
        if done >= rows:
            await_shards(out, (done - 1) // 4)
            raise Ended

    try:
        extract(source, out, notes=Notes(stop), **options)
    except Ended:
        return
    raise AssertionError("the run came to its end")


def chunks(out: Path) -> dict[tuple[str, int, tuple[int, ...]], bytes]:
    """Every stored chunk, by layer, first row of its file, and place."""
    held = {}
    with activations.open(out) as acts:
        for file in acts.files:
            for name in acts.layers:
                stored = file.stored(name)
                for place in np.ndindex(stored.sizes.shape):
                    with file.path.open("rb") as raw:
                        raw.seek(int(stored.offsets[place]))
                        held[name, file.rows.start, place] = raw.read(int(stored.sizes[place]))
    return held


def same(one: Path, other: Path) -> None:
    """Asserts that two outputs hold the same: every chunk, every column, every statistic."""
    assert chunks(one) == chunks(other)
    with activations.open(one) as a, activations.open(other) as b:
        for column in ("keys", "status", "messages", "heights", "widths"):
            np.testing.assert_array_equal(getattr(a, column), getattr(b, column))
        for name in a.layers:
            for statistic in a[name].stats.names:
                np.testing.assert_array_equal(getattr(a[name].stats, statistic), getattr(b[name].stats, statistic))


# ------------------------------------------------------------------------ what test_crash runs in processes of its own


def command(arguments: list[str], said: str, slow: float = 0.0) -> int:
    """The command line, its stderr in the file `said`, with `slow` seconds after every batch."""
    from fmextract.cli import app
    from fmextract.common import progress

    advance = progress.TerminalProgress.advance

    def slowly(self: Any, images: int, failed: int) -> None:
        time.sleep(slow)
        advance(self, images, failed)

    progress.TerminalProgress.advance = slowly  # type: ignore[method-assign]
    with Path(said).open("w") as sys.stderr, Path("/dev/null").open("w") as sys.stdout:
        return app.main(arguments)


def extract_killed(source: Path, out: Path, number: int) -> int:
    """A run that is killed before the `number`th time that Python opens, renames or removes a file at `out`."""
    at_out = [0]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.remove", "os.rmdir") and str(arguments[0]).startswith(str(out)):
            at_out[0] += 1
            if at_out[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)  # for ever: in a process of its own
    extract(source, out)
    return 0


def _stopped(source: Path, out: Path, on_advance: Callable[[int], None]) -> str:
    try:
        extract(source, out, notes=Notes(on_advance))
    except FmextractError as error:
        return f"{type(error).__name__} {error.exit_code} {error}"
    return "finished"


CANNOT_MOUNT = 77


def on_full_disk(source: str, disk: str, whole: str, said: str) -> int:
    """A run on a file system of its own that is filled up at its second shard, and another one once there is room."""
    if not _mounted(disk):
        return CANNOT_MOUNT
    out, filler = Path(disk) / "out", Path(disk) / "filler"

    def fill(done: int) -> None:
        if done == 8:
            await_shards(out, 1)
            with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))

    lines = [_stopped(Path(source), out, fill), str(sorted(path.name for path in out.iterdir()))]
    filler.unlink()
    lines.append(f"{len(shards.load_records(out))} {extract(Path(source), out).resumed_images}")
    same(out, Path(whole))
    Path(said).write_text("\n".join([*lines, "same"]))
    return 0


def _mounted(place: str) -> bool:
    """A tmpfs of 2 MiB, seen by this process alone."""
    new_user, new_mounts = 0x10000000, 0x00020000
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if not hasattr(libc, "unshare") or libc.unshare(new_user | new_mounts):
        return False
    with contextlib.suppress(OSError):
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    return not libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", 0, b"size=2m")


def on_limited_files(source: str, out: str, said: str) -> int:
    """A run in which, from its second shard on, no file may grow beyond 10,000 bytes."""
    import resource

    def limit(done: int) -> None:
        if done == 8:
            await_shards(Path(out), 1)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))

    line = _stopped(Path(source), Path(out), limit)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    Path(said).write_text(line)
    return 0
