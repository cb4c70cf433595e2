"""Processes that decode and encode: the bits of the threads, and an end of their own only after ours."""

from __future__ import annotations

import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import runs
import torch
import xxhash
from PIL import Image
from runs import Notes, extract, make_photos

from fmextract.config import Config
from fmextract.errors import ConfigError, OutputError, OutputLost, SampleError
from fmextract.inputs import decoding, preprocessing
from fmextract.inputs.files import OnDisk
from fmextract.inputs.sources import on_disk, open_source
from fmextract.pipeline import chunks, workers
from fmextract.planning import Plan
from fmextract.reading import activations
from fmextract.records import FileStamp
from fmextract.run.make_plan import plan_for
from fmextract.run.prepare import prepare
from fmextract.storage import writer

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="processes need memfd_create, of Linux")
PREPROCESS = preprocessing.parse_preprocess("size=20,crop=16,mean=0.5,std=0.5")
SHAPE = (3, 16, 16)


@pytest.fixture(scope="module")
def two() -> Iterator[workers.Workers]:
    notes: list[str] = []
    with workers.hired(2, "processes", 0, notes.append) as hired:
        assert hired is not None
        assert hired.wait()
        yield hired
    assert notes == []


def jpeg(number: int = 0, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> bytes:
    channels = {"RGB": 3, "L": 1, "CMYK": 4}[mode]
    pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], channels), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(), mode).resize(size).save(file, "JPEG", quality=90)
    return file.getvalue()


# ------------------------------------------------------------------------------------------------- encoding


def plan(tmp_path: Path, **options: Any) -> Plan:
    """Of layers conv (4, 8, 8), relu and fc (5)."""
    photos = make_photos(tmp_path / "photos", 6)
    config = Config.of(**{**runs.OPTIONS, **options})
    with prepare(photos, runs.Tiny(), config, Notes()) as prepared:
        return plan_for(prepared, tmp_path / "out.h5", Notes())


def cut(made: Plan, laid_out: Any = lambda rows: rows, scale: float = 1.0) -> list[chunks.Chunk]:
    """Chunks of all layers for ten rows, of which the third and the last failed."""
    failed = [row in (2, 9) for row in range(10)]
    found = []
    for i, spec in enumerate(made.layers):
        kind = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(spec.compute_dtype, torch.float32)
        rows = laid_out((torch.randn(10, *spec.shape) * scale).to(kind))
        cutter = chunks.Cutter(i, spec)
        found += [*cutter.add(rows, failed), *cutter.flush()]
    return found


def same(made: list[chunks.Encoded], expected: list[chunks.Encoded]) -> None:
    assert [bytes(m.payload) for m in made] == [bytes(e.payload) for e in expected]
    assert [(m.digest, m.overflowed) for m in made] == [(e.digest, e.overflowed) for e in expected]


def channels_last(rows: torch.Tensor) -> torch.Tensor:
    return rows.contiguous(memory_format=torch.channels_last) if rows.ndim == 4 else rows


@pytest.mark.parametrize(
    "laid_out", [lambda rows: rows, channels_last, lambda rows: torch.cat([rows, rows], 1)[:, ::2]]
)
@pytest.mark.parametrize(
    "options",
    [{}, {"precision": "bf16"}, {"codec": "none"}, {"keep_bits": 5}, {"dtype": "float16", "clip": True}],
    ids=str,
)
def test_chunks_are_encoded_as_by_a_thread(
    two: workers.Workers, tmp_path: Path, options: dict[str, Any], laid_out: Any
) -> None:
    made = plan(tmp_path, **options)
    some = cut(made, laid_out, scale=1e5 if "dtype" in options else 1.0)
    expected = chunks.Encoder(made).all(some)
    assert any(e.overflowed for e in expected) == ("dtype" in options)
    encode = two.encoder(made)
    same(encode(some), expected)
    same([one for chunk in some for one in encode([chunk])], expected)


def test_a_stream_longer_than_its_values_comes_all_the_same(
    two: workers.Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan(tmp_path, codec="none")
    some = cut(made)
    monkeypatch.setattr(workers, "_SLACK", 0)
    monkeypatch.setattr(workers, "_bytes_on_disk", lambda layer: 0)  # no room for any
    same(two.encoder(made)(some), chunks.Encoder(made).all(some))


def test_what_encoding_raises_is_raised_here(two: workers.Workers, tmp_path: Path) -> None:
    made = plan(tmp_path)
    encode = two.encoder(replace(made, level=99))
    for _ in range(3):  # as often as there are processes, and once more: they are still there
        with pytest.raises(ConfigError, match="--level 99: codec gzip has levels 0 to 3"):
            encode(cut(made))


# ------------------------------------------------------------------------------------------------- decoding


def test_jpegs_are_decoded_as_by_a_thread_and_all_else_is_left_alone(two: workers.Workers, tmp_path: Path) -> None:
    cmyk, png, broken = jpeg(3, mode="CMYK"), runs.picture(0), jpeg(5)[:300]
    (tmp_path / "a.jpg").write_bytes(jpeg(6))
    data = [
        jpeg(0), cmyk, png, jpeg(1, mode="L"), broken, torch.zeros(3, 16, 16), None, jpeg(2, (200, 100)),
        OnDisk(os.fsencode(tmp_path / "a.jpg")), OnDisk(os.fsencode(tmp_path / "gone.jpg")),
    ]  # fmt: skip
    into = torch.full((len(data), *SHAPE), 7, dtype=torch.uint8)
    decoded = two.jpegs(False).decode(data, PREPROCESS, into)
    sizes = [one and one[:2] for one in decoded]
    assert sizes == [(30, 40), None, None, (30, 40), None, None, None, (100, 200), (30, 40), None]
    for item, size, pixels in zip(data, sizes, into, strict=True):
        if size is None:
            assert (pixels == 7).all()
        else:
            encoded = item.read() if isinstance(item, OnDisk) else item
            assert torch.equal(pixels, decoding.decode(encoded, PREPROCESS).pixels)
    stamps = [one and one.file for one in decoded]
    assert stamps == [None if size is None else FileStamp() for size in sizes[:8]] + [
        FileStamp(len(jpeg(6)), xxhash.xxh3_128_hexdigest(jpeg(6))), None
    ]  # fmt: skip
    into = torch.zeros(2, *SHAPE, dtype=torch.uint8)
    assert two.jpegs(False).decode([jpeg(0), jpeg(1)], PREPROCESS, into) == [(30, 40, FileStamp())] * 2
    assert torch.equal(into[1], decoding.decode(jpeg(1), PREPROCESS).pixels)


def test_photos_are_turned_where_that_is_asked(two: workers.Workers) -> None:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.open(io.BytesIO(jpeg(0))).save(file, "JPEG", exif=exif)
    for asked in (False, True):
        into = torch.zeros(1, *SHAPE, dtype=torch.uint8)
        sizes = two.jpegs(asked).decode([file.getvalue()], PREPROCESS, into)
        image = decoding.decode(file.getvalue(), PREPROCESS, exif=asked)
        assert [one and one[:2] for one in sizes] == [(image.height, image.width)] == [(40, 30) if asked else (30, 40)]
        assert torch.equal(into[0], image.pixels)


def test_what_counts_as_a_bomb_is_what_counts_here(two: workers.Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    into = torch.zeros(1, *SHAPE, dtype=torch.uint8)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1000)
    assert two.jpegs(False).decode([jpeg(0)], PREPROCESS, into) == [None]
    with pytest.raises(SampleError, match="more than the 1000 allowed"):
        decoding.decode(jpeg(0), PREPROCESS)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", None)
    assert two.jpegs(False).decode([jpeg(0)], PREPROCESS, into) == [(30, 40, FileStamp())]


def test_a_worker_reads_only_files_that_are_called_jpegs(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.JPEG", "c.png"):
        (tmp_path / name).write_bytes(jpeg())
    source = open_source(tmp_path, limit=3)
    found = [on_disk(source, row) for row in range(3)]
    assert [file and Path(os.fsdecode(file.path)).name for file in found] == ["a.jpg", "b.JPEG", None]
    assert on_disk(open_source([jpeg()]), 0) is None


# --------------------------------------------------------------------------------------------------- whole runs


def photos_of(folder: Path, count: int) -> Path:
    """JPEGs, among them one that is damaged, one that is no JPEG, and a PNG."""
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:04}.jpg").write_bytes(jpeg(number))
    (folder / "0005.jpg").write_bytes(jpeg(5)[:200])
    (folder / "0006.jpg").write_bytes(runs.picture(6))
    (folder / "0007.png").write_bytes(runs.picture(7))
    return folder


@pytest.fixture
def done_there(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many tasks processes did of a run, which here waits for them, short as it is."""
    done = {"encode": 0, "decode": 0}

    @contextmanager
    def waited_for(*how: Any) -> Iterator[workers.Workers | None]:
        with workers.hired(*how) as hired:
            if hired is not None:
                assert hired.wait()
            yield hired

    def counted(name: str) -> None:
        real = getattr(workers._Worker, name)

        def counting(self: Any, *args: Any) -> Any:
            made = real(self, *args)
            done[name] += 1
            return made

        monkeypatch.setattr(workers._Worker, name, counting)

    counted("encode")
    counted("decode")
    monkeypatch.setattr("fmextract.run.extract.hired", waited_for)
    return done


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_stores_the_same(tmp_path: Path, precision: str, done_there: dict[str, int]) -> None:
    photos = photos_of(tmp_path / "photos", 40)
    options = {"max_failures": 1, "precision": precision, "shard_size": "1KiB"}
    extract(photos, tmp_path / "threads", worker_kind="threads", **options)
    notes = Notes()
    made = extract(photos, tmp_path / "processes", worker_kind="processes", notes=notes, **options)
    runs.same(tmp_path / "threads", tmp_path / "processes")
    assert made.failed == 1
    assert "worker" not in notes
    assert done_there["encode"] >= 10
    assert done_there["decode"] >= 10


def children(parent: int) -> list[int]:
    """Processes whose ancestor is `parent`, those that ended left out."""
    found: list[int] = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found += [int(stat.parent.name), *children(int(stat.parent.name))]
    return found


def test_what_processes_leave_undone_is_done_by_threads(tmp_path: Path, done_there: dict[str, int]) -> None:
    """They are killed in the middle of a run."""
    photos = photos_of(tmp_path / "photos", 40)
    options = {"max_failures": 1, "shard_size": "1MiB"}  # one shard: none is being finished then
    extract(photos, tmp_path / "threads", worker_kind="threads", **options)
    before, killed = set(children(os.getpid())), []

    def kill(done: int) -> None:
        if done == 16:
            for process in set(children(os.getpid())) - before:
                os.kill(process, signal.SIGKILL)
                killed.append(process)

    extract(photos, tmp_path / "processes", worker_kind="processes", notes=Notes(kill), **options)
    assert len(killed) == 3, "the one that forks, and two workers"
    assert 0 < done_there["decode"] < 30  # of 39
    runs.same(tmp_path / "threads", tmp_path / "processes")
    assert not set(children(os.getpid())) - before


def test_a_worker_that_ended_is_told(tmp_path: Path) -> None:
    notes: list[str] = []
    made = plan(tmp_path)
    with workers.hired(1, "processes", 0, notes.append) as one:
        assert one is not None
        assert one.wait()
        for process in children(one._server.pid):
            os.kill(process, signal.SIGKILL)
        same(one.encoder(made)(cut(made)[:0]), [])
        some = cut(made)
        same(one.encoder(made)(some), chunks.Encoder(made).all(some))
    assert notes == ["a worker process ended before its time; a thread of the run does its work from now on"]


def test_a_shard_that_is_being_finished_when_its_worker_ends_is_lost(tmp_path: Path) -> None:
    """Whether it had begun to write cannot be known."""
    with workers.hired(1, "processes", 0, lambda note: None) as one:
        assert one is not None
        assert one.wait()
        (process,) = children(one._server.pid)
        os.kill(process, signal.SIGSTOP)
        end = threading.Timer(0.2, os.kill, (process, signal.SIGKILL))
        end.start()
        shard = writer.Unfinished(tmp_path / "x.h5", range(1), (), (), (), "gzip", 1)
        with pytest.raises(OutputLost, match="ended while it finished a shard"):
            one.finish(shard, None, {}, {}, {}, True)
        end.join()
        with pytest.raises(OutputError, match=r"x\.h5"):  # from now on it is done here
            one.finish(shard, None, {}, {}, {}, True)


def test_what_finishing_raises_is_raised_here(two: workers.Workers, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"x\.h5"):
        two.finish(writer.Unfinished(tmp_path / "x.h5", range(1), (), (), (), "gzip", 1), None, {}, {}, {}, True)


def test_where_processes_do_not_start_threads_do_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    notes: list[str] = []
    made = plan(tmp_path)
    some = cut(made)
    with workers.hired(2, "processes", 0, notes.append) as none:
        assert none is not None
        assert not none.wait()
        same(none.encoder(made)(some), chunks.Encoder(made).all(some))
    assert notes == ["worker processes did not start; threads do their work"]


def test_they_end_with_the_process_that_is_killed() -> None:
    code = "from fmextract.pipeline.workers import Workers; w = Workers(2, print); w.wait(); print('up', flush=True)"
    code += "; input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == b"up\n"
        theirs = children(started.pid)
        assert len(theirs) == 3
        started.kill()
    end = time.monotonic() + 30
    while any(Path(f"/proc/{process}").exists() for process in theirs) and time.monotonic() < end:
        time.sleep(0.02)
    assert not [process for process in theirs if Path(f"/proc/{process}").exists()]


@pytest.mark.parametrize(
    ("count", "kind", "seconds", "there"),
    [
        (4, "auto", 1e6, False),
        (5, "auto", 30, True),
        (5, "auto", 10, False),  # they would take half of that to start
        (8, "threads", 1e6, False),
        (1, "processes", 0, True),
    ],
)
def test_auto_takes_them_where_threads_would_wait(
    count: int, kind: str, seconds: float, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with workers.hired(count, kind, seconds, lambda note: None) as hired:
        assert (hired is not None) == there
    assert workers.are_processes(count, kind, seconds) == there


@pytest.mark.parametrize(
    ("where", "name", "value", "said"),
    [
        (sys, "executable", "/no/such/python", r"worker processes cannot be started \(.*No such file.*; threads do"),
        (sys, "executable", "", "this system cannot start worker processes; threads do their work"),
        (sys, "frozen", True, "this system cannot start worker processes; threads do their work"),
    ],
)
def test_where_they_cannot_be_started_threads_do_the_work(
    where: Any, name: str, value: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, name, value, raising=False)
    notes: list[str] = []
    with workers.hired(2, "processes", 0, notes.append) as none:
        assert none is None
    assert re.match(said, *notes)


def test_what_a_worker_does_not_understand_is_done_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(str):
        """Cannot even be sent."""

    class Script(str):
        """Of the caller's script, which a worker does not have."""

    Script.__module__, Script.__qualname__ = "__main__", "Script"
    monkeypatch.setattr(sys.modules["__main__"], "Script", Script, raising=False)
    made = plan(tmp_path)
    some = cut(made)
    for foreign, said in ((Mine("x"), "Mine"), (Script("x"), "Script")):
        notes: list[str] = []
        with workers.hired(1, "processes", 0, notes.append) as one:
            assert one is not None
            assert one.wait()
            for _ in range(3):
                same(one.encoder(replace(made, run_id=foreign))(some), chunks.Encoder(made).all(some))
            same(one.encoder(made)(some), chunks.Encoder(made).all(some))
        (note,) = notes
        assert re.match(
            rf"worker processes do not understand what they are asked \(.*{said}.*threads do that work", note
        )


def test_labels_of_a_kind_of_their_own_are_plain_text(tmp_path: Path) -> None:
    class Kind(str, Enum):
        CAT = "cat"

    class Labelled:
        def __len__(self) -> int:
            return 5

        def __getitem__(self, row: int) -> tuple[bytes, str]:
            return jpeg(row), Kind.CAT

    extract(Labelled(), tmp_path / "out.h5", worker_kind="processes")
    with activations.open(tmp_path / "out.h5") as acts:
        assert acts.labels.tolist() == ["cat"] * 5


def test_memory_that_cannot_be_had_is_done_without(
    two: workers.Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(name: str) -> int:
        raise OSError(38, "Function not implemented")

    made, notes = plan(tmp_path), list[str]()
    some = cut(made)
    with workers.hired(1, "processes", 0, notes.append) as one:
        assert one is not None
        assert one.wait()
        monkeypatch.setattr(os, "memfd_create", refused)
        same(one.encoder(made)(some), chunks.Encoder(made).all(some))
    assert notes == ["a worker process ended before its time; a thread of the run does its work from now on"]


def test_the_caller_s_sockets_and_modules_are_none_of_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("json.py", "socket.py", "fmextract.py"):
        (tmp_path / name).write_text("raise SystemExit('of the folder that the run was started in')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry] + [Path("/no/text")])
    socket.setdefaulttimeout(0.01)
    try:
        with workers.hired(1, "processes", 0, pytest.fail) as one:
            assert one is not None
            assert one.wait()
            time.sleep(0.1)
            made = plan(tmp_path)
            some = cut(made)
            same(one.encoder(made)(some[:0]), [])
            same(one.encoder(made)(some), chunks.Encoder(made).all(some))
    finally:
        socket.setdefaulttimeout(None)


def test_none_of_them_is_left_behind(tmp_path: Path) -> None:
    """Nor as a process that nobody has waited for: in a container there may be nobody to do so."""
    code = """if True:
        import ctypes, os
        assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0  # whatever is orphaned comes to us
        from fmextract.pipeline import workers
        with workers.hired(2, "processes", 0, print) as two:
            assert two.wait()
        try:
            print(os.waitpid(-1, os.WNOHANG))
        except ChildProcessError:
            print("none")
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "none\n"


def test_a_plan_counts_their_memory(tmp_path: Path) -> None:
    made = {}
    for kind in ("threads", "processes"):
        (tmp_path / kind).mkdir()
        made[kind] = plan(tmp_path / kind, num_workers=3, worker_kind=kind).estimate.bytes_peak
    assert 400e6 < made["processes"] - made["threads"] < 1e9


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="--worker-kind 'fork': expected one of auto, threads, processes"):
        Config.of(worker_kind="fork")
