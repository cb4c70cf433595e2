"""Run a user's Dataset in several processes, each with a copy of its own; rows come back in order.

The processes are spawned, not forked: forked ones share the position of every open file, and the locks that threads
hold. To a Dataset they look like the workers of torch's DataLoader (`get_worker_info()`, one torch thread). They are
not those: DataLoader's workers send through one pipe, where a killed one can leave half an item that blocks the others;
they wait for ever for an item that cannot be sent; and they die as an exception anywhere in the caller's main thread.
Here each has a pipe of its own.

A process takes some rows at a time, and holds no more than those: memory is bounded, however long the source is.
"""

from __future__ import annotations

import io
import itertools
import multiprocessing
import pickle
import queue
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageFile
import torch
from torch.utils.data._utils import worker as torch_worker

from fmextract.common.beside import load_file
from fmextract.errors import ConfigError, SourceLost

AHEAD = 8
"""Rows that a process is given before they are asked for."""
PATIENCE = 5.0  # seconds for a process to end by itself

Make = Callable[[int, bool], Any]


class DatasetWorkers:
    """`count` processes that each have a copy of `make`, which makes an item of a row.

    `make(row, watch)` and what it gives must be what pickle can send. `key` names a row.
    """

    def __init__(self, make: Make, count: int, key: Callable[[int], str]) -> None:
        """Start them, and return before they are there. Raises ConfigError for what cannot be sent."""
        _refuse_in_import()
        message = _pickled(make, count)
        self._key = key
        self._workers: list[_Worker] = []
        try:
            self._workers += (_Worker(number, count) for number in range(count))
        except BaseException:
            self.close()
            raise
        # Only now: each takes its copy when it has started, and they start side by side.
        self._message: tuple[dict[str, str], bytes] | None = message

    def each(self, rows: Iterable[int], watch: Callable[[], bool]) -> Iterator[Any]:
        """Yield what `make` gives for each of `rows`, in order. Raises SourceLost where a process died."""
        self._give_copies()
        for worker in self._workers:
            worker.forget()
        to_come = zip(itertools.cycle(self._workers), rows, strict=False)
        given: deque[tuple[_Worker, int]] = deque()
        while True:
            for worker, row in itertools.islice(to_come, AHEAD * len(self._workers) - len(given)):
                self._told(worker, lambda w=worker, r=row: w.ask(r, watch()))  # type: ignore[misc]
                given.append((worker, row))
            if not given:
                return
            worker, row = given.popleft()
            raised, item = self._told(worker, worker.answer)
            if raised is not None:
                raise raised
            yield item

    def close(self) -> None:
        """End them, also those at work."""
        for worker in self._workers:
            worker.leave()
        deadline = time.monotonic() + PATIENCE
        for worker in self._workers:
            worker.end(deadline - time.monotonic())

    def _give_copies(self) -> None:
        message, self._message = self._message, None
        for worker in self._workers if message is not None else ():
            assert message is not None
            if why := self._told(worker, lambda w=worker: w.begin(*message)):  # type: ignore[misc]
                raise ConfigError(
                    f"--dataset-workers: another process cannot rebuild what reads the images: {why}. A class or"
                    " function that it needs belongs into a module that can be imported; --dataset-workers 0 needs none"
                )

    def _told(self, worker: _Worker, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except (EOFError, OSError) as gone:
            raise self._lost(worker) from gone

    def _lost(self, worker: _Worker) -> Exception:
        how = worker.how_it_ended()
        if not worker.begun:
            return ConfigError(
                f"--dataset-workers: a process did not start ({how}). It imports the script that started the run: what"
                " a script does must stand under `if __name__ == '__main__':`, and it must lie in a file"
            )
        row = worker.row
        where = f"while it read {self._key(row)!r} (row {row})" if row >= 0 else "between two rows"
        return SourceLost(
            f"a process that reads the Dataset ended {where}: {how}. What is done is kept; the same command goes on"
            " from there. Where memory ran out, fewer --dataset-workers need less; with 0 the run itself reads it."
        )


class _Worker:
    """One process, as the run sees it. Its methods raise EOFError or OSError where it is gone."""

    def __init__(self, number: int, count: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._at = spawn.RawValue("q", -1)  # the row it is at: known also when it was killed
        self._channel, theirs = spawn.Pipe()
        self._owed = 0
        self.begun = False
        self._process = spawn.Process(
            target=_serve, args=(theirs, self._at, number, count), name=f"fmextract-dataset-{number}", daemon=True
        )
        try:
            self._process.start()
        finally:
            theirs.close()

    @property
    def row(self) -> int:
        return int(self._at.value)

    def begin(self, files: Mapping[str, str], message: bytes) -> str:
        """Give it its copy of what it runs; "" or why it cannot have one."""
        self._channel.send((files, _settings()))
        self._channel.send_bytes(message)
        said: str = self._channel.recv()
        self.begun = True
        return said

    def ask(self, row: int, watch: bool) -> None:
        self._channel.send((row, watch))
        self._owed += 1

    def answer(self) -> tuple[Exception | None, Any]:
        """Return (what `make` raised, what it made) of the first row that it was asked for and has not answered."""
        message = self._channel.recv_bytes()
        self._owed -= 1
        raised, item = pickle.loads(message)  # from our own process, which no other can reach
        return raised, item

    def forget(self) -> None:
        """Drop earlier requests."""
        while self._owed:
            self._channel.recv_bytes()
            self._owed -= 1

    def how_it_ended(self) -> str:
        self._process.join(PATIENCE)
        code = self._process.exitcode
        if code is None:
            return "it does not answer any more"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def leave(self) -> None:
        self._channel.close()

    def end(self, patience: float) -> None:
        self._process.join(max(0.0, patience))
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()


def _refuse_in_import() -> None:
    """A process that imports a script as it starts must not start a run of its own."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise ConfigError(
            "a run is started while a process imports the script: put it under if __name__ == '__main__':"
        )


def _settings() -> tuple[Any, ...]:
    """Settings of libraries for the whole process, on which images and tensors depend."""
    return PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES, torch.get_default_dtype()


def _set(settings: tuple[Any, ...]) -> None:
    PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES, dtype = settings
    torch.set_default_dtype(dtype)


def _pickled(what: Any, count: int) -> tuple[dict[str, str], bytes]:
    """Return (the files of modules that no import finds, `what` pickled)."""
    file = io.BytesIO()
    pickler = _Pickler(file, pickle.HIGHEST_PROTOCOL)
    try:
        pickler.dump(what)
    except Exception as error:  # a class that cannot be copied may raise anything
        raise ConfigError(
            f"--dataset-workers {count}: {_culprit(what)} cannot be sent to another process ({type(error).__name__}:"
            f" {error}). Open files when the first item is asked for, and put functions at the top of a module; without"
            " --dataset-workers one thread reads"
        ) from error
    files = {name: str(sys.modules[name].__file__) for name in pickler.modules if _is_file_of_its_own(name)}
    return files, file.getvalue()


class _Pickler(pickle.Pickler):
    """A pickler that notes the modules of what it pickles."""

    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self.modules: set[str] = set()

    def reducer_override(self, obj: Any) -> Any:
        module = getattr(obj, "__module__", None) or type(obj).__module__
        if isinstance(module, str):
            self.modules.add(module)
        return NotImplemented


def _is_file_of_its_own(name: str) -> bool:
    """Return whether a module was loaded from a file that no import finds."""
    if name in ("__main__", "__mp_main__") or getattr(sys.modules.get(name), "__file__", None) is None:
        return False
    if "." in name:
        return False  # of a package, which is found or not
    found = (finder.find_spec(name, None) for finder in sys.meta_path)
    spec = next((spec for spec in found if spec is not None), None)
    return spec is None or spec.origin != sys.modules[name].__file__


def _culprit(what: Any) -> str:
    """Return the innermost attribute of the user's that cannot be pickled, as `transform.file (_io.BufferedReader)`."""
    path: list[str] = []
    while True:
        state = {name: member for name, member in _state(what).items() if not _can_be_pickled(member)}
        name, member = next(iter(state.items()), ("", None))
        if not name:
            kind = f"{type(what).__module__}.{type(what).__qualname__}"
            if callable(what) and hasattr(what, "__qualname__"):
                kind = f"{kind} {what.__qualname__}"
            return f"{'.'.join(path)} ({kind})" if path else kind
        if not type(what).__module__.startswith("fmextract."):  # its address in this process would say nothing
            path.append(name)
        what = member


def _state(what: Any) -> dict[str, Any]:
    """Return its attributes; where it is a container, its first members."""
    if isinstance(what, (list, tuple)):
        return {f"[{i}]": member for i, member in enumerate(what[:100])}
    slots = [name for kind in type(what).__mro__ for name in kind.__dict__.get("__slots__", ())]
    return {**{name: getattr(what, name) for name in slots if hasattr(what, name)}, **getattr(what, "__dict__", {})}


def _can_be_pickled(what: Any) -> bool:
    try:
        pickle.dumps(what, pickle.HIGHEST_PROTOCOL)
    except Exception:
        return False
    return True


# --------------------------------------------------------------------------------------------- in the other processes


def _serve(channel: Connection, at: Any, number: int, count: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the run's, which then ends them
    torch.set_num_threads(1)
    with suppress(EOFError, OSError):  # the run has ended
        (files, settings), message = channel.recv(), channel.recv_bytes()
        try:
            make = _Unpickler(io.BytesIO(message), files).load()
            _set(settings)  # after the imports, which may change them
        except Exception as error:  # for the run, which refuses
            channel.send(f"{type(error).__name__}: {error}")
            return
        torch_worker._worker_info = torch_worker.WorkerInfo(id=number, num_workers=count, seed=number, dataset=make)
        channel.send("")
        _work(channel, make, at)


def _work(channel: Connection, make: Make, at: Any) -> None:
    """Make rows one after the other; a thread sends them, so that the next is made meanwhile."""
    made: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    ended = threading.Event()

    def send() -> None:
        try:
            while True:
                channel.send_bytes(made.get())
        except OSError:
            ended.set()  # the run has ended, too

    threading.Thread(target=send, name="fmextract-send", daemon=True).start()
    while not ended.is_set():
        at.value = -1
        row, watch = channel.recv()
        at.value = row
        made.put(_made(make, row, watch))


def _made(make: Make, row: int, watch: bool) -> bytes:
    """Return (what it raised, what it made), pickled."""
    try:
        file = io.BytesIO()
        _ItemPickler(file, pickle.HIGHEST_PROTOCOL).dump((None, make(row, watch)))
        return file.getvalue()
    except Exception as error:  # for the run, which raises it
        return pickle.dumps((RuntimeError(f"{type(error).__name__}: {error}"), None))


class _ItemPickler(pickle.Pickler):
    """A pickler that sends tensors as arrays, which takes a seventh of the time."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is torch.Tensor and obj.dtype in _AS_ARRAYS and obj.layout is torch.strided:
            return torch.as_tensor, (obj.numpy(force=True),)
        return NotImplemented


_AS_ARRAYS = (torch.float32, torch.float64, torch.float16, torch.uint8, torch.int64)


class _Unpickler(pickle.Unpickler):
    """Loads modules that no import finds from the files they came from: a script's, or one named by its path."""

    def __init__(self, file: io.BytesIO, files: Mapping[str, str]) -> None:
        super().__init__(file)
        self._files = files

    def find_class(self, module: str, name: str) -> Any:
        if module in self._files and module not in sys.modules:
            load_file(Path(self._files[module]), module)
        return super().find_class(module, name)
