"""SIGKILL anywhere, SIGINT, SIGTERM, a full disk: what is published stays whole, and the same command goes on.

The runs are those of a server process in which torch is imported and nothing was run: each is a fork of it, so that
dozens of killed runs cost seconds. It forks before HDF5 opens a file and before torch starts a thread.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
from runs import make_photos, same

from fmextract.errors import FmextractError
from fmextract.reading import activations
from fmextract.storage import digest, durable

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

ROWS = 10
KILLS = 44
SERVER = f"""
import json, os, sys, traceback
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import torch
torch.set_num_threads(1)
import runs
from pathlib import Path
from fmextract import cli, verification
from fmextract.pipeline import pipeline
from fmextract.run import output, packing, prepare, recheck

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        code = 1
        try:
            code = eval(job["call"]) or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.__stderr__.flush()
            os._exit(code)
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


class Server:
    """Starts runs, each a process of its own, one at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, call: str) -> int:
        """The process number of a call that has begun: an expression over what SERVER imports."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"call": call}) + "\n")
        self._process.stdin.flush()
        child = self._line()
        assert child > 1  # it will be killed by that number
        return child

    def wait(self) -> int:
        """The exit code of the run, negative where a signal ended it."""
        return self._line()

    def run(self, call: str) -> int:
        self.start(call)
        return self.wait()

    def close(self) -> None:
        self._process.communicate()

    def _line(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())


def extraction(source: Path, out: Path) -> str:
    return f"runs.extract(Path({str(source)!r}), Path({str(out)!r})) and 0"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("crash") / "photos", ROWS)


@pytest.fixture(scope="module")
def undisturbed(photos: Path, server: Server) -> dict[str, Path]:
    made = {"": photos.parent / "whole", ".h5": photos.parent / "whole.h5"}
    for out in made.values():
        assert server.run(extraction(photos, out)) == 0
    return made


# --------------------------------------------------------------------------------------------------------------- kills


def test_kill_anywhere(server: Server, photos: Path, undisturbed: dict[str, Path], tmp_path: Path) -> None:
    """Killed at random moments between the first byte of a temporary file and the last rename, then taken up again."""
    dice = random.Random(0)
    fell: collections.Counter[str] = collections.Counter()
    begun = time.monotonic()
    span = 0.3  # of a run, from its first file to its end; learned as runs finish before they are killed
    while fell.total() < KILLS and time.monotonic() - begun < 90:
        suffix = dice.choice(["", ".h5"])
        out = tmp_path / f"out{suffix}"
        killed = _kill_once(server, photos, out, dice.uniform(0, span))
        if killed is None:
            span *= 0.9
        else:
            fell[killed] += 1
            span = min(2.0, span * 1.02)
        _no_file_is_broken(out)
        # Half of the runs are killed more than once before they are done.
        if killed is None or dice.random() < 0.5:
            assert server.run(extraction(photos, out)) == 0
            same(out, undisturbed[suffix])
            assert not out.with_name(f"{out.name}.partial").exists()
            shutil.rmtree(out) if out.is_dir() else out.unlink()
    print(f"{fell.total()} kills: {dict(fell)}")
    assert fell.total() >= 40, fell


@pytest.mark.parametrize("suffix", ["", ".h5"])
def test_killed_at_every_file(
    server: Server, photos: Path, undisturbed: dict[str, Path], tmp_path: Path, suffix: str
) -> None:
    """Killed before each file that Python opens, renames or removes: every moment between two of them, by turns."""
    out = tmp_path / f"out{suffix}"
    fell: collections.Counter[str] = collections.Counter()
    number = 0
    while True:
        number += 1
        server.start(f"runs.extract_killed(Path({str(photos)!r}), Path({str(out)!r}), {number})")
        if (code := server.wait()) == 0:
            break
        assert code == -signal.SIGKILL
        directory = out.with_name(f"{out.name}.partial") if suffix else out
        fell[_moment(directory, out)] += 1
        _no_file_is_broken(out)
        assert server.run(extraction(photos, out)) == 0
        same(out, undisturbed[suffix])
        assert not directory.exists() or not suffix
        shutil.rmtree(out) if out.is_dir() else out.unlink()
    same(out, undisturbed[suffix])
    print(f"{fell.total()} kills: {dict(fell)}")
    assert {"writing the plan", "writing a shard", "between a shard and its record", "between shards"} <= set(fell), (
        fell
    )


def _kill_once(server: Server, photos: Path, out: Path, after: float) -> str | None:
    """Kill a run `after` seconds from its first temporary file; returns what was there then, None if it was over."""
    directory = out.with_name(f"{out.name}.partial") if out.suffix else out
    child = server.start(extraction(photos, out))
    known = {path.name for path in directory.glob(".*")}
    while not any(path.name not in known for path in directory.glob(".*")) and _lives(child):
        time.sleep(0.0005)
    time.sleep(after)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    if server.wait() != -signal.SIGKILL:
        return None
    return _moment(directory, out)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _moment(directory: Path, out: Path) -> str:
    """Where a kill fell, from what it left."""
    names = {path.name for path in directory.iterdir()} if directory.exists() else set()
    if out.suffix and out.exists():
        return "tidying up after the last rename"
    if any(name.startswith(".shard-") and ".json." in name for name in names):
        return "writing the record of a shard"
    if any(name.startswith(".shard-") for name in names):
        return "writing a shard"
    if any(name.startswith(".plan") for name in names) or "plan.json" not in names:
        return "writing the plan"
    if any(name.endswith(".h5") and name.replace(".h5", ".json") not in names for name in names):
        return "between a shard and its record"
    if any(name.startswith((".index", ".out")) for name in names):
        return "writing the last file"
    return "between shards"


def _no_file_is_broken(out: Path) -> None:
    """Every file under its final name can be read, and nothing partial opens as the whole."""
    directory = out.with_name(f"{out.name}.partial") if out.suffix else out
    for path in directory.glob("[!.]*.h5") if directory.exists() else ():
        with activations.open(path) as acts:
            assert digest.content_digest(path) == acts.attrs["content_digest"]
    for path in directory.glob("[!.]*.json") if directory.exists() else ():
        json.loads(path.read_text())
    try:
        with activations.open(out) as acts:
            assert acts.num_rows == ROWS
    except FmextractError:
        pass


# -------------------------------------------------------------------------------------------------- order of the calls


def test_data_are_on_the_disk_before_their_name(photos: Path, tmp_path: Path) -> None:
    """For every file: write, fsync, rename, fsync of the directory; a shard before its record, all before the index.

    The calls are those that strace saw, where it is installed and allowed; else those that Python made.
    """
    out = tmp_path / "out"
    calls, seen_by = _calls_by_strace(photos, out, tmp_path / "trace") or _calls_in_process(photos, out)
    print(f"order of system calls recorded by {seen_by}")
    named = [i for i, (call, _) in enumerate(calls) if call == "rename"]
    order = [Path(calls[i][1]).name for i in named]
    expected = ["plan.json"] + [f"shard-{i:05}.{kind}" for i in range(3) for kind in ("h5", "json")] + ["index.json"]
    assert order == expected
    for at, following in zip(named, [*named[1:], len(calls)], strict=True):
        final = Path(calls[at][1])
        synced = [
            path for call, path in calls[:at] if call == "fsync" and Path(path).name.startswith(f".{final.name}.")
        ]
        assert synced, f"{final.name} was renamed before it was synced"
        if seen_by == "strace":
            touched = [call for call, path in calls if path == synced[-1]]
            assert touched[0] == "write", f"nothing was written to {synced[-1]}"
            assert touched[-1] == "fsync", f"{synced[-1]} was written to after it was synced"
        assert ("fsync", str(out)) in calls[at:following], f"the name {final.name} was not made durable"


def _calls_by_strace(photos: Path, out: Path, trace: Path) -> tuple[list[tuple[str, str]], str] | None:
    if not shutil.which("strace"):
        return None
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r}); import runs; from pathlib import Path; "
    )
    script += f"runs.extract(Path({str(photos)!r}), Path({str(out)!r}))"
    command = ["strace", "-f", "-y", "-e", "trace=write,pwrite64,fsync,rename,renameat,renameat2", "-o", str(trace)]
    done = subprocess.run([*command, sys.executable, "-c", script], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return None
    calls = []
    for line in trace.read_text().splitlines():
        call = line.split(None, 1)[1]
        if call.startswith(("write(", "pwrite64(")) and f"<{out}/" in call:
            calls.append(("write", call.split("<", 1)[1].split(">", 1)[0]))
        elif call.startswith("fsync(") and "<" in call:
            calls.append(("fsync", call.split("<", 1)[1].split(">", 1)[0]))
        elif call.startswith("rename") and str(out) in call:
            calls.append(("rename", call.split('"')[3]))
    return calls, "strace"


def _calls_in_process(photos: Path, out: Path) -> tuple[list[tuple[str, str]], str]:
    calls: list[tuple[str, str]] = []
    fsync, replace = os.fsync, Path.replace

    def recorded_fsync(handle: int) -> None:
        fsync(handle)
        calls.append(("fsync", str(Path(f"/proc/self/fd/{handle}").readlink())))

    def recorded_replace(self: Path, target: Path) -> Path:
        calls.append(("rename", str(target)))
        return replace(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", recorded_fsync)
        patch.setattr(Path, "replace", recorded_replace)
        runs.extract(photos, out)
    return calls, "os.fsync and Path.replace"


# -------------------------------------------------------------------------------------------------------- interruption


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_in_order(
    server: Server, photos: Path, undisturbed: dict[str, Path], tmp_path: Path, number: int
) -> None:
    out, said = tmp_path / "out", tmp_path / "said"
    options = ["-l", "conv", "-l", "relu", "-l", "fc", "--preprocess", "size=8,crop=8,mean=0.5,std=0.5"]
    options += [
        "--precision",
        "fp32",
        "--batch-size",
        "4",
        "--num-workers",
        "2",
        "--shard-size",
        "1",
        "--device",
        "cpu",
    ]
    model = f"{Path(__file__).parents[1] / 'runs.py'}:Tiny"
    command = ["extract", str(photos), "-m", model, *options, "-o", str(out), "--json"]
    child = server.start(f"runs.command({command!r}, {str(said)!r}, slow=0.3)")
    while not (out / "shard-00000.json").exists() and _lives(child):
        time.sleep(0.001)
    os.kill(child, number)
    assert server.wait() == 130, said.read_text()
    assert re.search(
        r"interrupted; \d shards? finished and kept: the same command goes on from there", said.read_text()
    )
    assert "Traceback" not in said.read_text()
    names = {path.name for path in out.iterdir()}
    assert not [name for name in names if name.startswith(".") or name == "lock.json"]
    assert "shard-00000.json" in names
    assert "index.json" not in names
    assert server.run(f"runs.command({command!r}, {str(said)!r})") == 0
    assert "resuming" in said.read_text()
    assert runs.chunks(out) == runs.chunks(undisturbed[""])


def test_interrupted_while_the_last_shard_is_written(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller's thread waits for the writer then: it must go on waiting until the writer has let go."""
    publish = durable.publish

    def slowly(temporary: Path, final: Path) -> None:
        if final.name == f"shard-{(ROWS - 1) // 4:05}.h5":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)
        publish(temporary, final)

    monkeypatch.setattr(durable, "publish", slowly)
    with pytest.raises(KeyboardInterrupt):
        runs.extract(photos, tmp_path / "out")
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
    monkeypatch.undo()
    runs.extract(photos, tmp_path / "out")


# ----------------------------------------------------------------------------------------------------------- full disk


def test_a_full_disk(server: Server, photos: Path, undisturbed: dict[str, Path], tmp_path: Path) -> None:
    """A file system of 2 MiB fills in the middle of a run."""
    disk, said = tmp_path / "disk", tmp_path / "said"
    disk.mkdir()
    code = server.run(f"runs.on_full_disk({str(photos)!r}, {str(disk)!r}, {str(undisturbed[''])!r}, {str(said)!r})")
    if code == runs.CANNOT_MOUNT:
        pytest.skip("a small file system cannot be mounted here; see the limit on the size of files below")
    assert code == 0
    stopped, names, resumed, compared = said.read_text().splitlines()
    assert stopped.startswith("NoSpace 4")
    assert "Make room and run the same command again" in stopped
    assert "'.shard" not in names
    shards, rows = map(int, resumed.split())
    assert shards >= 1
    assert rows == 4 * shards
    assert compared == "same"


def test_a_file_that_cannot_grow(server: Server, photos: Path, undisturbed: dict[str, Path], tmp_path: Path) -> None:
    """A limit on the size of files, where no file system can be mounted."""
    said = tmp_path / "said"
    assert server.run(f"runs.on_limited_files({str(photos)!r}, {str(tmp_path / 'out')!r}, {str(said)!r})") == 0
    assert said.read_text().startswith("OutputLost 4"), said.read_text()
    assert not list((tmp_path / "out").glob(".shard*"))
    assert runs.extract(photos, tmp_path / "out").resumed_images >= 4
    same(tmp_path / "out", undisturbed[""])


def test_an_output_that_goes_away(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    threw = pytest.raises(FmextractError, match="What is done is kept")

    def remove(done: int) -> None:
        if done == 8:
            out.rename(tmp_path / "elsewhere")

    with threw as caught:
        runs.extract(photos, out, notes=runs.Notes(remove))
    assert caught.value.exit_code == 4
    shutil.rmtree(out, ignore_errors=True)
    (tmp_path / "elsewhere").rename(out)
    (out / "lock.json").unlink()  # it says, rightly, that this process lives
    runs.extract(photos, out)


def test_a_read_only_place(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere: the file system's answer is put in its mouth."""
    real: Callable[..., int] = os.open

    def refuse(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if str(path).startswith(str(tmp_path)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(30, "Read-only file system", str(path))
        return real(path, flags, *args, **kwargs)

    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(FmextractError, match="Read-only file system") as caught:
        runs.extract(photos, tmp_path / "out")
    assert caught.value.exit_code == 2


def test_what_was_decoded_in_a_crash_is_named(server: Server, photos: Path, tmp_path: Path) -> None:
    """As a decoder that crashes would leave it: the file of the rows in flight is still there."""
    from array import array

    runs.extract_until(5, photos, tmp_path / "out")
    (tmp_path / "out" / f".in-flight.{'0' * 32}").write_bytes(array("q", [6, -1]).tobytes())
    notes = runs.Notes()
    runs.extract(photos, tmp_path / "out", notes=notes)
    assert "the run before ended without a word while these were being decoded: '0006.png'" in notes
