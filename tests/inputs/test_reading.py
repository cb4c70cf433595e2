"""Datasets and preprocessing of users' own: every row is that row's image, whoever reads it, and as often as one likes.

What a row must be is told by the Dataset itself, asked here row by row, by one thread, with nothing else going on.
"""

from __future__ import annotations

import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import PIL.Image
import PIL.ImageFile
import pytest
import torch
import torchvision.transforms as v1
import users
from runs import OPTIONS, Ended, Notes, Tiny, extract, make_photos
from torch.utils.data import ConcatDataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from users import Array, pixels

from fmextract.config import Config
from fmextract.errors import ConfigError, OutputError, SampleError, SourceLost
from fmextract.inputs import reading
from fmextract.inputs.decoding import Image
from fmextract.inputs.preprocessing import CustomPreprocess
from fmextract.inputs.reading import Reader, content
from fmextract.inputs.seeding import own_generators, seeded
from fmextract.inputs.sources import open_source
from fmextract.inputs.thread_safety import data_is_known, transform_is_known
from fmextract.pipeline import workers
from fmextract.reading import activations
from fmextract.records import Preprocess
from fmextract.run.extract import make_plan
from fmextract.verification import verify

# A Dataset that keeps its file open says nowhere when to close it.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

PLAIN = Preprocess(8, (8, 8))


def inputs(data: Any, preprocess: Any = PLAIN, **options: Any) -> tuple[list[Any], list[Any], Reader]:
    """(of each row its pixels or its error, the labels, the reader), as in a run: read here, decoded by threads."""
    source = open_source(data)
    made = Reader(source, preprocess, **options)
    try:
        return [*_decoded(made, range(len(source)))], [source.label(row) for row in range(len(source))], made
    finally:
        made.close()


def _decoded(made: Reader, rows: range) -> Iterator[Any]:
    def decode(data: Any) -> Any:
        try:
            return made.decode(content(data)).pixels.numpy()
        except SampleError as error:
            return error.status, str(error)

    if not made.serial:
        yield from ThreadPoolExecutor(8).map(lambda row: decode(made.load(row)), rows)
        return
    with ThreadPoolExecutor(8) as pool:
        yield from [future.result() for future in [pool.submit(decode, data) for data in made.ahead(rows)]]


def same(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for row, (one, other) in enumerate(zip(found, expected, strict=True)):
        np.testing.assert_equal(one, other, err_msg=f"row {row}")


def channels_first(rows: int) -> list[Array]:
    return [pixels(row).transpose(2, 0, 1) for row in range(rows)]


# --------------------------------------------------------------------------------- what two threads must not use


def h5_file(path: Path, rows: int) -> Path:
    with h5py.File(path, "w") as file:
        file["images"] = np.stack([pixels(row) for row in range(rows)])
    return path


DATASETS: dict[str, Any] = {
    "an open file": lambda folder: users.OpenFile(users.OpenFile.write(folder / "raw", 60), 60),
    "a position and a buffer": lambda folder: users.Position(60),
    "sqlite3": lambda folder: users.Table(":memory:", 60),
    "h5py": lambda folder: h5py.File(h5_file(folder / "x.h5", 60))["images"],
    "h5py, opened later": lambda folder: users.LaterOpened(h5_file(folder / "x.h5", 60), 60),
    "pages of a TIFF": lambda folder: users.Pages(folder / "x.tif", 60),
    "a part of one": lambda folder: Subset(users.Position(80), range(60)),
    "one picture, many times": lambda folder: [PIL.Image.open(png(folder / "x.png"))] * 60,
}


def png(path: Path) -> Path:
    PIL.Image.fromarray(pixels(0)).save(path)
    return path


@pytest.mark.parametrize("kind", DATASETS)
def test_every_row_is_its_own_image(kind: str, tmp_path: Path) -> None:
    found, _, _ = inputs(DATASETS[kind](tmp_path))
    same(found, channels_first(1) * 60 if kind == "one picture, many times" else channels_first(60))


def test_a_run_stores_the_images_of_a_dataset_with_an_open_file(tmp_path: Path) -> None:
    path = users.OpenFile.write(tmp_path / "raw", 48)
    extract(users.OpenFile(path, 48), tmp_path / "out.h5", num_workers=4, shard_size="auto")
    extract([pixels(row) for row in range(48)], tmp_path / "expected.h5", shard_size="auto")
    with activations.open(tmp_path / "out.h5") as acts, activations.open(tmp_path / "expected.h5") as expected:
        np.testing.assert_array_equal(acts["conv"][:], expected["conv"][:])


def test_one_thread_reads_and_labels_come_along(tmp_path: Path) -> None:
    """sqlite3 refuses any other thread than the one that made the connection: the probes, the run, a resume."""
    data = users.Table(":memory:", 20)
    notes = Notes(lambda done: _end() if done >= 8 else None)
    with pytest.raises(Ended):
        extract(data, tmp_path / "out.h5", notes=notes)
    assert extract(data, tmp_path / "out.h5").failed == 0
    with activations.open(tmp_path / "out.h5") as acts:
        assert acts.labels.tolist() == [f"label {row}" for row in range(20)]


def _end() -> None:
    raise Ended


def test_files_and_memory_are_read_by_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = make_photos(tmp_path / "photos", 4)
    (tmp_path / "classes").mkdir()
    photos.rename(tmp_path / "classes" / "cat")
    folder = ImageFolder(str(tmp_path / "classes"))
    plain = v1.Compose([v1.Resize(4), v2.Compose([v2.ToImage(), v2.Normalize([0.0], [1.0])])])
    for data in (
        [pixels(0)],
        (b"x",),
        np.zeros((2, 8, 8, 3), np.uint8),
        torch.zeros(2, 3, 8, 8),
        TensorDataset(torch.zeros(2, 3, 8, 8)),
        folder,
        ImageFolder(str(tmp_path / "classes"), transform=plain),
        Subset(folder, [0]),
        ConcatDataset([folder, Subset(folder, [1])]),
    ):
        assert data_is_known(data), data
        assert not Reader(open_source(data), PLAIN).serial
    says_so = users.training
    monkeypatch.setattr(says_so, "thread_safe", True, raising=False)
    for data in (
        Subset(users.Threaded(2), [0]),
        ConcatDataset([Subset(users.Threaded(2), [0]), folder]),
        ImageFolder(str(tmp_path / "classes"), transform=v1.Compose([v1.Resize(4), says_so])),
    ):
        assert not data_is_known(data), data
        assert not Reader(open_source(data), PLAIN).serial
    for data in (
        users.Position(2),
        Subset(users.Position(2), [0]),
        ConcatDataset([folder, users.Position(2)]),
        ImageFolder(str(tmp_path / "classes"), transform=lambda image: image),
        ImageFolder(str(tmp_path / "classes"), transform=v1.RandomCrop(4)),
        ImageFolder(str(tmp_path / "classes"), target_transform=str),
        ImageFolder(str(tmp_path / "classes"), loader=PIL.Image.open),
        type("Mine", (ImageFolder,), {})(str(tmp_path / "classes")),
        type("Mine", (list,), {})([1]),
    ):
        assert not data_is_known(data), data
        assert Reader(open_source(data), PLAIN).serial


def test_a_dataset_that_says_so_is_read_by_threads(tmp_path: Path) -> None:
    data = users.Threaded(24)
    extract(data, tmp_path / "out.h5", num_workers=4)
    assert len(data.threads) > 1


class Mine:
    """A Source of the user's own, which notes who calls it."""

    name = "mine"

    def __init__(self) -> None:
        self.threads: set[int] = set()

    def __len__(self) -> int:
        return 8

    def key(self, row: int) -> str:
        return f"row {row}"

    def label(self, row: int) -> int:
        return -row

    def fingerprint(self) -> dict[str, Any]:
        return {}

    def load(self, row: int) -> Array:
        self.threads.add(threading.get_ident())
        if row == 3:
            raise ZeroDivisionError("none of that")
        return pixels(row)


def test_a_source_of_the_users_own_is_read_by_one_thread_and_may_raise(tmp_path: Path) -> None:
    data = Mine()
    assert extract(data, tmp_path / "out.h5").failures == (("row 3", "ZeroDivisionError: none of that"),)
    assert data.threads == {threading.get_ident()}
    with activations.open(tmp_path / "out.h5") as acts:
        assert acts.labels.tolist() == [-row for row in range(8)]


def test_what_is_slow_to_read_is_told_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(users.Rows):
        def __getitem__(self, row: int) -> Array:
            time.sleep(0.02)
            return pixels(row)

    monkeypatch.setattr(workers, "WORTH", 0.01)
    notes = Notes()
    result = extract(Slow(4), tmp_path / "out.h5", notes=notes)
    assert "one thread reads Slow, at 2" in notes
    assert "--dataset-workers N" in notes
    assert result.stages["read"]["busy_seconds"] >= 0.08


@pytest.mark.parametrize("transform", [v1.ToTensor(), v1.CenterCrop(3), v2.Identity(), v2.ToDtype(torch.float32)])
def test_transforms_that_keep_nothing_are_known(transform: Any) -> None:
    assert transform_is_known(transform)
    assert transform_is_known(v1.Compose([v2.Compose([transform]), transform]))
    assert not transform_is_known(v1.Compose([transform, v1.RandomHorizontalFlip()]))
    assert not transform_is_known(v1.Compose([transform, str]))


def test_a_preprocessing_of_the_users_own_runs_in_one_thread() -> None:
    """One that fills the same tensor again gives each row its own, of files that threads could read as well."""
    data = [pixels(row) for row in range(60)]
    found, _, made = inputs(data, CustomPreprocess(users.Buffered(), "mine", (8, 8)))
    assert made.serial
    same(found, [image.transpose(2, 0, 1).astype(np.float32) for image in data])
    known = CustomPreprocess(v1.Compose([v1.ToTensor(), v1.Normalize([0.5], [0.5])]), "mine", (8, 8))
    assert not Reader(open_source(data), known).serial


# ------------------------------------------------------------------------------------------------- random numbers


def test_the_callers_generators_are_as_before() -> None:
    def states() -> list[Any]:
        return [torch.get_rng_state().tolist(), random.getstate(), [*map(str, np.random.get_state())]]

    before = states()
    for make in (lambda: inputs(users.Augmented(8)), lambda: inputs([pixels(0)], training_preprocess())):
        make()
        assert states() == before


def training_preprocess() -> CustomPreprocess:
    return CustomPreprocess(users.training, "users:training", (4, 4))


def test_numbers_of_a_row_begin_from_the_seed_and_its_number() -> None:
    def drawn(*place: int) -> list[float]:
        with seeded(*place):
            return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    assert drawn(1, 2) == drawn(1, 2)
    seen = [
        number for place in ((1, 2), (1, 3), (2, 2), (-1, 2), (1, 2, 1), (1 + (2 << 32), 0)) for number in drawn(*place)
    ]
    assert len(set(seen)) == len(seen)


def test_a_dataset_that_is_random_now_and_then_is_found_out() -> None:
    made = Reader(open_source(Subset(users.SometimesRandom(20), range(20))), PLAIN)
    made.first(0)
    assert made.serial
    assert made.random


@pytest.mark.parametrize("data", [users.Augmented(20), users.SaysSo(20)])
def test_augmentation_is_the_same_in_any_order(data: Any) -> None:
    """Also where the Dataset says that threads may read it: they would draw from each other's generators."""
    source = open_source(data)
    made = Reader(source, PLAIN)
    made.first(3)
    assert made.serial
    assert [note for note in made.notes if "is random, as for training" in note]
    forwards = [*_decoded(made, range(20))]
    labels = [source.label(row) for row in range(20)]
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    backwards = [next(_decoded(made, range(row, row + 1))) for row in reversed(range(20))]
    same(forwards, backwards[::-1])
    assert labels == [source.label(row) for row in range(20)]
    assert forwards[5] == (1, "KeyError: 'no such thing'")
    assert not np.array_equal(forwards[0], next(_decoded(Reader(source, PLAIN, seed=1), range(1))))


def test_a_random_preprocessing_is_the_same_in_any_run_and_told(tmp_path: Path) -> None:
    """A training pipeline by mistake: of files, whose rows threads read otherwise."""
    photos = make_photos(tmp_path / "photos", 20)
    notes = Notes()
    options = {"preprocess": users.training, "notes": notes, "num_workers": 4}
    extract(photos, tmp_path / "whole.h5", **options)
    assert "the preprocessing is random" in notes
    stopping = Notes(lambda done: _end() if done >= 8 else None)
    with pytest.raises(Ended):
        extract(photos, tmp_path / "resumed.h5", **{**options, "notes": stopping})
    extract(photos, tmp_path / "resumed.h5", **{**options, "num_workers": 1})
    extract(photos, tmp_path / "other.h5", **options, seed=1)
    with pytest.raises(OutputError, match="seed: 0 there, 1 now"):
        extract(photos, tmp_path / "whole.h5", **options, seed=1)
    with (
        activations.open(tmp_path / "whole.h5") as whole,
        activations.open(tmp_path / "resumed.h5") as resumed,
        activations.open(tmp_path / "other.h5") as other,
    ):
        np.testing.assert_array_equal(whole["conv"][:], resumed["conv"][:])
        assert not np.array_equal(whole["conv"][:], other["conv"][:])
        assert any("is random" in note for note in whole.config["notes"])


def test_what_is_not_random_is_not_told(tmp_path: Path) -> None:
    notes = Notes()
    extract(users.Position(8), tmp_path / "out.h5", notes=notes)
    assert not [note for note in notes.notes if "random" in note or "differently" in note]


def test_generators_of_a_datasets_own_are_named() -> None:
    assert own_generators(users.OwnGenerator(2)) == ["rng", "transforms[0]['noise']"]
    made = Reader(open_source(users.OwnGenerator(2)), PLAIN)
    assert re.search(
        r"OwnGenerator has random generators of its own \(rng, transforms\[0\]\['noise'\]\)", made.notes[0]
    )
    made.first(0)
    assert "'000000' comes out differently each time it is read" in made.notes[-1]

    rng, default = random.Random(0), np.random.RandomState(0)

    def jitter(image: Any, other: Any = default) -> Any:
        return rng, other

    assert own_generators(jitter) == ["rng", "default 0"]
    assert own_generators(v1.Compose([v1.Lambda(jitter)])) == [
        "transforms[0].lambd.rng",
        "transforms[0].lambd.default 0",
    ]


def test_items_that_are_never_the_same_are_told() -> None:
    made = Reader(open_source(users.Clock(3)), PLAIN)
    assert isinstance(made.first(1), Image)
    (note,) = made.notes
    assert "'000001' comes out differently each time it is read, from the same random seeds" in note


def test_items_that_can_be_had_only_once_are_told() -> None:
    given: set[int] = set()

    class Once(users.Rows):
        def __getitem__(self, row: int) -> Array:
            if row in given:
                raise EOFError("that was it")
            given.add(row)
            return pixels(row)

    made = Reader(open_source(Once(3)), PLAIN)
    assert (made.first(1).pixels.numpy() == pixels(1).transpose(2, 0, 1)).all()
    assert made.notes == ["'000001' cannot be read a second time: EOFError: that was it"]


# ------------------------------------------------------------------------------------------------------ processes


def test_processes_give_what_one_thread_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images and labels of all kinds, random ones, and what fails; and what depends on settings of the process."""
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(PIL.ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = ConcatDataset([users.Augmented(20), users.Odd(18, tmp_path), users.Settings(1)])
    here, labels, _ = inputs(data)
    there, same_labels, made = inputs(data, workers=3)
    same(there, here)
    assert same_labels == labels
    assert labels[20:38] == ([None] * 4 + ["cat"] + [None] * 4) * 2
    assert here[38][:, 0, 0].tolist() == [1, 4, 1000 % 256 + 1]
    assert [row for row, one in enumerate(here) if isinstance(one, tuple)] == [5, 26, 27, 35, 36]
    assert any("ConcatDataset is random" in note for note in made.notes)


def test_each_process_opens_its_own_files(tmp_path: Path) -> None:
    """A file that the Dataset opens later is opened there, since nothing is read here before; it inherits none."""
    later = users.LaterOpened(h5_file(tmp_path / "x.h5", 12), 12)
    with (tmp_path / "open").open("w+b") as held:
        held.write(b"x")
        data = ConcatDataset([later, users.Worker(4, tmp_path / "open")])
        found, labels, _ = inputs(data, workers=2)
    assert later.file is None
    same(found[:12], channels_first(12))
    same(
        found[12:], [np.broadcast_to(np.array([row % 2, 2, 0], np.uint8)[:, None, None], (3, 8, 8)) for row in range(4)]
    )
    assert labels == [10 * row for row in range(12)] + [None] * 4


@pytest.mark.parametrize(
    ("data", "culprit"),
    [
        (lambda folder: users.OpenFile(users.OpenFile.write(folder / "raw", 2), 2), r"file \(_io.FileIO\)"),
        (lambda folder: users.Table(":memory:", 2), r"connection \(sqlite3.Connection\)"),
        (lambda folder: Subset(users.Table(":memory:", 2), [0]), r"dataset.connection \(sqlite3.Connection\)"),
        (
            lambda folder: ImageFolder(str(folder), transform=lambda image: image),
            r"transform \(builtins.function .*<lambda>\)",
        ),
    ],
)
def test_what_cannot_be_sent_is_refused_by_name(data: Any, culprit: str, tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    png(tmp_path / "cat" / "x.png")
    with pytest.raises(ConfigError, match=rf"--dataset-workers 2: {culprit} cannot be sent to another process"):
        extract(data(tmp_path), tmp_path / "out.h5", dataset_workers=2)


def test_a_process_that_is_killed_names_its_row_and_the_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "deadly").touch()
    data = users.Deadly(20, 13, tmp_path / "deadly")
    with pytest.raises(SourceLost, match=r"ended while it read '000013' \(row 13\): killed by SIGKILL"):
        extract(data, tmp_path / "out.h5", dataset_workers=1)
    (tmp_path / "deadly").unlink()
    extract(data, tmp_path / "out.h5")
    extract([pixels(row) for row in range(20)], tmp_path / "expected.h5")
    with activations.open(tmp_path / "out.h5") as acts, activations.open(tmp_path / "expected.h5") as expected:
        np.testing.assert_array_equal(acts["conv"][:], expected["conv"][:])


SCRIPT = """
import sys
from pathlib import Path
import runs, users
class Mine(users.Augmented):
    pass
{guard}runs.extract(Mine(8), Path(sys.argv[1]), dataset_workers=1)
"""


def test_a_script_of_the_users_needs_its_guard(tmp_path: Path) -> None:
    """The process imports the script for its classes; without the usual guard it would start the run again."""
    tests = Path(users.__file__).parent
    for guard, message in (("if __name__ == '__main__': ", ""), ("", "must stand under `if __name__ == '__main__':`")):
        (tmp_path / "script.py").write_text(SCRIPT.format(guard=guard))
        command = [sys.executable, "script.py", str(tmp_path / "out.h5")]
        environment = {"PYTHONPATH": f"{tests}:{tests.parent}", "PATH": "", "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert (ended.returncode == 0) == (not message), ended.stderr
        assert message in ended.stderr
        (tmp_path / "out.h5").unlink(missing_ok=True)


def test_a_dataset_in_a_file_of_its_own_is_found_by_the_process_and_preprocessed_there(tmp_path: Path) -> None:
    """`path/file.py:callable`, in a folder where no import looks."""
    (tmp_path / "code").mkdir()
    text = "import users\nclass Mine(users.Augmented):\n    pass\ndef make():\n    return Mine(8)\n"
    (tmp_path / "code" / "of_mine.py").write_text(text)
    here, _, _ = inputs(users.Augmented(8), training_preprocess())
    there, _, _ = inputs(f"{tmp_path}/code/of_mine.py:make", training_preprocess(), workers=1)
    same(there, here)


class Here:
    """In the place of processes: the same, by this one."""

    def __init__(self, make: Any, count: int, key: Any) -> None:
        self.make = make

    def each(self, rows: Iterable[int], watch: Any) -> Iterator[Any]:
        return (self.make(row, watch()) for row in rows)

    def close(self) -> None: ...


def test_a_plan_counts_the_memory_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "DatasetWorkers", Here)
    peak = [
        make_plan(users.Position(4), Tiny(), tmp_path / "out.h5", Config.of(**OPTIONS, dataset_workers=n))
        for n in (0, 3)
    ]
    assert 1e9 < peak[1].estimate.bytes_peak - peak[0].estimate.bytes_peak < 2e9


def test_a_file_starts_no_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it says of the run that made it, its rows are run again by one thread."""
    monkeypatch.setattr(reading, "DatasetWorkers", Here)
    extract(users.Augmented(8), tmp_path / "out.h5", dataset_workers=1000)
    monkeypatch.setattr(reading, "DatasetWorkers", pytest.fail)
    said = verify(tmp_path / "out.h5", rerun=4, model=Tiny(), source=users.Augmented(8))
    assert said.ok
    assert said.largest_error == 0


def test_processes_are_not_started_where_there_is_nothing_for_them(tmp_path: Path) -> None:
    for data in (make_photos(tmp_path / "photos", 2), [pixels(0)]):
        made = Reader(open_source(data), PLAIN, workers=2)
        assert made.workers == 0
        assert "has nothing to do" in made.notes[0]
    with pytest.raises(ConfigError, match="--dataset-workers -1: expected 0 or more"):
        extract(tmp_path / "photos", tmp_path / "out.h5", dataset_workers=-1)
