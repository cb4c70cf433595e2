"""Make inputs of the rows of a source: the user's code runs in one place, seeded by row; all else in any thread.

A Dataset, and a preprocessing function, may hold what two threads must not use at once: an open file, a position, a
buffer. So the thread that called the run does all of it, row after row, unless the code is known to be thread-safe or
says so (`thread_safe = True`). Processes (`--dataset-workers`) do it in parallel, each with a copy of its own. Decoding
and resizing, which need none of it, go on in threads.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from fmextract.errors import SampleError, SourceError
from fmextract.inputs import decoding, thread_safety
from fmextract.inputs.dataset_workers import DatasetWorkers
from fmextract.inputs.datasets import DatasetSource
from fmextract.inputs.files import FileSource, OnDisk, stamp_of
from fmextract.inputs.preprocessing import CustomPreprocess, Preprocessing
from fmextract.inputs.seeding import own_generators, seeded
from fmextract.inputs.sources import unlimited
from fmextract.records import FileStamp, Source, Status

WATCHED = 16
"""Rows of which it is checked whether they draw random numbers."""
LOOKED_AT = 4
"""Rows that code which says it is thread-safe loads before a run."""
LOADING, PREPROCESSING = 0, 1
"""The parts that are seeded by themselves: the numbers are the same whether both run in one place or not."""


@dataclass(frozen=True, slots=True)
class Preprocessed:
    """What a user's function made of a row, or why it made nothing; and which content of a file it was given."""

    image: decoding.Image | SampleError
    file: FileStamp


@dataclass(frozen=True, slots=True)
class Item:
    """What the user's code made of a row.

    `data`: what `decode` takes, or Preprocessed where preprocessing is the user's, or the SampleError that says why
    there is none. `learnt` is what a Dataset shows beside the image. `drew`: which of the two parts drew random
    numbers.
    """

    data: Any
    learnt: Any
    drew: tuple[bool, bool]


@dataclass(frozen=True, slots=True)
class Refused:
    """A Dataset's very first item was no image. `otherwise`: this row's error, had another been the first."""

    error: SourceError
    otherwise: SampleError | None


@dataclass(frozen=True, slots=True)
class OwnCode:
    """Loads a row, and preprocesses it if `preprocess` is a user's function; None: that happens elsewhere."""

    source: Source
    preprocess: CustomPreprocess | None
    exif: bool
    seed: int

    def __call__(self, row: int, watch: bool) -> Item:
        with _one_torch_thread():
            return self._item(row, watch)

    def _item(self, row: int, watch: bool) -> Item:
        loading = preprocessing = False
        data: Any
        try:
            with seeded(self.seed, row, LOADING, watch=watch) as draws:
                data = self._loaded(row)
            loading = draws.any
            if self.preprocess is not None:
                with seeded(self.seed, row, PREPROCESSING, watch=watch) as draws:
                    data = self._preprocessed(content(data))
                preprocessing = draws.any
        except SampleError as error:
            data = error.with_traceback(None)
        except SourceError as error:
            data = Refused(error, error.__cause__ if isinstance(error.__cause__, SampleError) else None)
        source = unlimited(self.source)
        learnt = source.learnt(row) if isinstance(source, DatasetSource) else None
        return Item(data, learnt, (loading, preprocessing))

    def _loaded(self, row: int) -> Any:
        source = unlimited(self.source)
        if isinstance(source, (DatasetSource, FileSource)):
            return decoding.snapshot(source.fetch(row) if isinstance(source, DatasetSource) else source.load(row))
        try:
            return decoding.snapshot(source.load(row))
        except SampleError:
            raise
        except Exception as error:  # a user's Source may raise anything, which fails one row
            raise SampleError(Status.UNREADABLE, f"{type(error).__name__}: {error}") from error

    def _preprocessed(self, data: Any) -> Preprocessed:
        try:
            image = decoding.decode(data, self.preprocess, exif=self.exif)
        except SampleError as error:
            return Preprocessed(error.with_traceback(None), stamp_of(data))
        # The function may fill the same tensor for the next row.
        return Preprocessed(replace(image, pixels=image.pixels.clone()), stamp_of(data))


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Use one torch thread within the block, as a process does: a sum over several has other last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def content(data: Any) -> Any:
    """Return what a Reader decodes, after reading a file. Raises the SampleError that stands in place of an image."""
    if isinstance(data, SampleError):
        raise data
    return data.read() if isinstance(data, OnDisk) else data


def stamp(content: Any) -> FileStamp:
    """Return which content of a file a row is made of, if it is."""
    return content.file if isinstance(content, Preprocessed) else stamp_of(content)


class Reader:
    """Reads rows and makes inputs of them.

    `serial`: the user's code runs in one place, and rows come from `ahead`, in the thread that called the run; else any
    thread may `load` them. `workers` are the processes that it runs in, 0 for that thread. `notes` are worth keeping;
    `seconds` is the time spent waiting for the user's code so far.
    """

    def __init__(
        self,
        source: Source,
        preprocess: Preprocessing | None,
        *,
        exif: bool = False,
        seed: int = 0,
        workers: int = 0,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Start the processes. `say` takes each note, too.

        Raises ConfigError where a process cannot be given a copy of the user's code and data.
        """
        custom = preprocess if isinstance(preprocess, CustomPreprocess) else None
        known = thread_safety.source_is_known(source), thread_safety.preprocess_is_known(preprocess)
        bears = (
            known[0] or thread_safety.source_says_so(source),
            known[1] or thread_safety.preprocess_says_so(preprocess),
        )
        nothing_to_do = all(bears) and thread_safety.needs_no_process(source)
        self.serial = not all(bears)
        self.workers = 0 if nothing_to_do else workers
        self.notes: list[str] = []
        self.seconds = 0.0
        self._source, self._preprocess, self._exif, self._say = source, preprocess, exif, say
        self._users = {source.name: None if known[0] else source, "the preprocessing": None if known[1] else custom}
        self._all = OwnCode(source, None if known[1] else custom, exif, seed)
        self._own = self._all if self.workers or not bears[1] else replace(self._all, preprocess=None)
        self._watched = 0
        self._drew: set[str] = set()
        self._processes: DatasetWorkers | None = None
        if self.workers:
            self.serial = True
            self._processes = DatasetWorkers(_sendable(self._all), self.workers, source.key)
        elif workers:
            self._note(f"--dataset-workers has nothing to do: the threads of the run read {source.name}")
        for name, code in self._users.items():
            if paths := own_generators(_code(code)):
                self._note(
                    f"{name} has random generators of its own ({', '.join(paths)}): what they give does not begin from"
                    " --seed and the row, so that rows may differ from run to run, and with --dataset-workers"
                )

    def close(self) -> None:
        """End the processes."""
        if self._processes is not None:
            self._processes.close()

    # ---- by the thread that called the run

    def ahead(self, rows: Iterable[int]) -> Iterator[Any]:
        """Yield what the user's code makes of each of `rows`, in this order; `decode` takes it, in any thread."""
        yield from self._items(rows, self._own)

    def image(self, row: int) -> decoding.Image:
        """Return the input that a row gives. Raises SampleError."""
        (data,) = self._items([row], self._all)
        return self.decode(content(data))

    def first(self, row: int) -> decoding.Image:
        """Return what `image` does; note a row that differs a second time, from the same seeds."""
        image = self.image(row)
        if all(code is None for code in self._users.values()):
            return image
        if not self.serial:
            self._look_at_others()
        try:
            pixels = self.image(row).pixels
        except SampleError as error:
            self._note(f"{self._source.key(row)!r} cannot be read a second time: {error}")
            return image
        if not torch.equal(image.pixels.nan_to_num(), pixels.nan_to_num()):
            self._note(
                f"{self._source.key(row)!r} comes out differently each time it is read, from the same random seeds:"
                " what is stored cannot be made again"
            )
        return image

    def _look_at_others(self) -> None:
        """See whether code that says it is thread-safe draws random numbers, which not every row may do."""
        count = len(self._source)
        for _ in self._items(range(0, count, -(-count // LOOKED_AT)), self._all):
            if self.serial:
                return

    def _items(self, rows: Iterable[int], own: OwnCode) -> Iterator[Any]:
        rows, again = itertools.tee(rows)
        made = self._processes.each(rows, self._watch) if self._processes else (own(r, self._watch()) for r in rows)
        source = unlimited(self._source)
        for row in again:
            started = time.perf_counter()
            item = next(made)
            self.seconds += time.perf_counter() - started
            data = item.data
            if isinstance(data, Refused):
                if data.otherwise is None or "items" not in getattr(source, "looked_at", ()):
                    raise data.error
                data = data.otherwise
            if isinstance(source, DatasetSource):
                source.learn(row, item.learnt)
            for name, drew in zip(self._users, item.drew, strict=True):
                if drew and name not in self._drew:
                    self._tell_random(name)
            yield data

    def _watch(self) -> bool:
        self._watched += 1
        return self._watched <= WATCHED

    def _tell_random(self, name: str) -> None:
        self._drew.add(name)
        # Threads share the generators: even thread-safe code would draw from those of other rows.
        self.serial, self._own = True, self._all
        self._note(
            f"{name} is random, as for training: the numbers that it draws for a row, where it does not seed them"
            " itself, begin from --seed and the row's own number"
        )

    @property
    def random(self) -> bool:
        """Whether the user's code was seen to draw random numbers."""
        return bool(self._drew)

    @property
    def may_draw(self) -> bool:
        """Whether any of it is the user's code, of which only what it was seen to do is known."""
        return any(code is not None for code in self._users.values())

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self._say(text)

    # ---- by any thread

    def load(self, row: int) -> Any:
        """Return what a row holds, where the reader is not `serial`. Raises SampleError."""
        return self._source.load(row)

    def decode(self, data: Any) -> decoding.Image:
        """Return the input that the `content` of what `load` or `ahead` gave becomes. Raises SampleError."""
        if not isinstance(data, Preprocessed):
            return decoding.decode(data, self._preprocess, exif=self._exif)
        if isinstance(data.image, SampleError):
            raise data.image
        return data.image


@contextmanager
def reading(source: Source, preprocess: Preprocessing | None, **options: Any) -> Iterator[Reader]:
    """Give a Reader, whose processes end with the block."""
    reader = Reader(source, preprocess, **options)
    try:
        yield reader
    finally:
        reader.close()


def _code(user: Any) -> Any:
    """Return what the user wrote, from within what we made of it."""
    if isinstance(user, CustomPreprocess):
        return user.function
    user = unlimited(user) if user is not None else None
    return user.data if isinstance(user, DatasetSource) else user


def _sendable(own: OwnCode) -> OwnCode:
    """Return the source without its keys: a process needs none, and they may be many."""
    source = unlimited(own.source)
    if isinstance(source, DatasetSource):
        source = replace(source, keys=range(len(source)))  # type: ignore[arg-type]
    return replace(own, source=source)
