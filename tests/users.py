"""Datasets and preprocessing as people write them. Spawned processes import this module."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import PIL.Image
import PIL.ImageFile
import torch
from torch.utils.data import get_worker_info

Array = np.ndarray[Any, Any]


def pixels(row: int) -> Array:
    """An image of 8 x 8 that is another one for each row."""
    made: Array = np.random.default_rng(row).integers(0, 256, (8, 8, 3), np.uint8)
    return made


class Rows:
    """What they have in common: a length."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count


class OpenFile(Rows):
    """One file, open all the time; two calls at once read each other's rows."""

    def __init__(self, path: Path, count: int) -> None:
        super().__init__(count)
        self.file = path.open("rb", buffering=0)

    @staticmethod
    def write(path: Path, count: int) -> Path:
        path.write_bytes(b"".join(pixels(row).tobytes() for row in range(count)))
        return path

    def __getitem__(self, row: int) -> Array:
        self.file.seek(row * 192)
        time.sleep(0.0005)
        return np.frombuffer(self.file.read(192), np.uint8).reshape(8, 8, 3)


class LaterOpened(Rows):
    """Opens its file when the first item is asked for, as people do for the workers of a DataLoader."""

    def __init__(self, path: Path, count: int) -> None:
        super().__init__(count)
        self.path, self.file = path, None

    def __getitem__(self, row: int) -> tuple[Array, int]:
        if self.file is None:
            self.file = h5py.File(self.path, "r")
        return self.file["images"][row], 10 * row


class Position(Rows):
    """A decoder that moves forward to an item, and gives the same buffer each time."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.at, self.buffer = 0, np.zeros((8, 8, 3), np.uint8)

    def __getitem__(self, row: int) -> Array:
        self.at = 0
        while self.at < row:
            self.at += 1
            time.sleep(0.00001)
        self.buffer[:] = pixels(self.at)
        return self.buffer


class Pages(Rows):
    """One TIFF with many pages, which is an image of the page that was sought last."""

    def __init__(self, path: Path, count: int) -> None:
        super().__init__(count)
        first, *others = (PIL.Image.fromarray(pixels(row)) for row in range(count))
        first.save(path, save_all=True, append_images=others)
        self.picture = PIL.Image.open(path)

    def __getitem__(self, row: int) -> PIL.Image.Image:
        self.picture.seek(row)
        return self.picture


class Table(Rows):
    """A connection that only the thread that made it may use."""

    def __init__(self, path: str, count: int) -> None:
        super().__init__(count)
        self.connection = sqlite3.connect(path)
        self.connection.execute("create table images (number integer, data blob)")
        rows = [(row, pixels(row).tobytes()) for row in range(count)]
        self.connection.executemany("insert into images values (?, ?)", rows)

    def __getitem__(self, row: int) -> tuple[Array, str]:
        ((data,),) = self.connection.execute("select data from images where number = ?", (row,))
        return np.frombuffer(data, np.uint8).reshape(8, 8, 3), f"label {row}"


class Augmented(Rows):
    """Noise from each of the global generators; row 5 cannot be read. Its label is drawn, too."""

    def __getitem__(self, row: int) -> tuple[Array, int]:
        time.sleep(0.001 * (row % 3))
        if row == 5:
            raise KeyError("no such thing")
        noise = np.random.randint(0, 64, (8, 8, 3))
        noise += random.randrange(64) + int(torch.randint(0, 64, ()))
        return (pixels(row) // 4 + noise).astype(np.uint8), random.randrange(1000)


class SometimesRandom(Rows):
    """Draws for every other row, and says that threads may read it."""

    thread_safe = True

    def __getitem__(self, row: int) -> Array:
        return pixels(row) // 2 + (random.randrange(128) if row % 2 else 0)


class Settings(Rows):
    """A picture of what libraries were told for the whole process."""

    def __getitem__(self, row: int) -> Array:
        threads, bits = torch.get_num_threads(), torch.get_default_dtype().itemsize
        shown = (threads, bits, (PIL.Image.MAX_IMAGE_PIXELS or 0) % 256 + int(PIL.ImageFile.LOAD_TRUNCATED_IMAGES))
        return np.broadcast_to(np.array(shown, np.uint8), (8, 8, 3))


class SaysSo(Augmented):
    """Draws random numbers, and says that threads may read it."""

    thread_safe = True


class Threaded(Rows):
    """Says that threads may read it, and notes which did."""

    thread_safe = True

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.threads: set[int] = set()

    def __getitem__(self, row: int) -> Array:
        self.threads.add(threading.get_ident())
        time.sleep(0.002)
        return pixels(row)


class OwnGenerator(Rows):
    """Augments by generators of its own."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.rng = np.random.default_rng(0)
        self.transforms = [{"noise": torch.Generator()}]

    def __getitem__(self, row: int) -> Array:
        return (pixels(row) // 2 + self.rng.integers(0, 64, (8, 8, 3))).astype(np.uint8)


class Clock(Rows):
    """Gives something else each time."""

    def __getitem__(self, row: int) -> Array:
        return np.random.default_rng().integers(0, 256, (8, 8, 3), np.uint8)


class Worker(Rows):
    """A picture of which worker reads it, of how many, and whether a file descriptor of the run is open there."""

    def __init__(self, count: int, path: Path) -> None:
        super().__init__(count)
        self.place = path.stat().st_ino

    def __getitem__(self, row: int) -> Array:
        info = get_worker_info()
        inherited = self.place in {path.stat().st_ino for path in Path("/proc/self/fd").iterdir() if path.exists()}
        shown = (info.id, info.num_workers, int(inherited)) if info is not None else (255, 255, 255)
        return np.broadcast_to(np.array(shown, np.uint8), (8, 8, 3))


class Deadly(Rows):
    """A row at which its process is killed, in the middle of the others, as long as there is the file `path`."""

    def __init__(self, count: int, row: int, path: Path) -> None:
        super().__init__(count)
        self.row, self.path = row, path

    def __getitem__(self, row: int) -> Array:
        if row == self.row and self.path.exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return pixels(row)


class Odd(Rows):
    """Items of every kind that is taken, one that is no image, one that no process could send."""

    def __init__(self, count: int, folder: Path) -> None:
        super().__init__(count)
        self.folder = folder
        for name in ("photo.png", "lazy.bmp"):
            PIL.Image.fromarray(pixels(0)).save(folder / name)

    def __getitem__(self, row: int) -> Any:
        image = pixels(row)
        path = self.folder / "photo.png"
        return (
            image,
            torch.from_numpy(image),
            PIL.Image.fromarray(image),
            PIL.Image.open(self.folder / "lazy.bmp"),  # is read only when its pixels are asked for
            {"image": path.read_bytes(), "label": "cat"},
            str(path),
            path.with_name("missing.png"),
            lambda: image,
            memoryview(path.read_bytes()),
        )[row % 9]


def training(image: PIL.Image.Image) -> torch.Tensor:
    """A training pipeline by mistake: random crops and noise."""
    x = random.randrange(4)
    made = torch.from_numpy(np.array(image.crop((x, 0, x + 4, 4)), copy=True)).permute(2, 0, 1) / 255
    return made + torch.rand(())


class Buffered:
    """A preprocessing that keeps its result for the next call."""

    def __init__(self) -> None:
        self.made = torch.zeros(3, 8, 8)

    def __call__(self, image: PIL.Image.Image) -> torch.Tensor:
        self.made.copy_(torch.from_numpy(np.array(image, copy=True)).permute(2, 0, 1))
        time.sleep(0.001)
        return self.made
