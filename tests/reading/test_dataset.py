"""The torch Dataset over layers: against the arrays that were written, and by what is read from the file."""

from __future__ import annotations

import itertools
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from files import make_file
from torch.utils.data import DataLoader, Subset

from fmextract.errors import ConfigError
from fmextract.reading import activations, files

ROWS = 46
FAILED = (3, 20)
GOOD = [row for row in range(ROWS) if row not in FAILED]
CHUNKS = {"fc": (4, 7), "maps": (1, 4, 4, 3), "tokens": (2, 5, 6)}
ALL_FITS, NOTHING_FITS = 2**20, 4 * 7 * 4 * 4
"""Bytes to keep: everything, or four chunks of `fc`."""

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def make_arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"fc": (7,), "maps": (6, 4, 3), "tokens": (5, 6)}
    arrays = {name: rng.normal(size=(ROWS, *shape)).astype(np.float32) for name, shape in shapes.items()}
    for array in arrays.values():
        array[list(FAILED)] = np.nan
    return arrays


ARRAYS = make_arrays()


@pytest.fixture(scope="module")
def acts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[activations.Activations]:
    path = tmp_path_factory.mktemp("feeding") / "acts.h5"
    make_file(path, ARRAYS, chunk=CHUNKS, status=[2 * (row in FAILED) for row in range(ROWS)])
    with activations.open(path) as opened:
        opened["fc"][:8], opened["maps"][:8]  # the threads are there before any worker forks
        yield opened


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The chunks that are read from a file in this process, as they are."""
    seen: list[tuple[int, ...]] = []
    read = files.File._payload
    monkeypatch.setattr(files.File, "_payload", lambda *a: (seen.append(a[2]), read(*a))[1])
    return seen


@pytest.mark.parametrize("cache", [ALL_FITS, NOTHING_FITS])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("whole", [False, True], ids=["rows", "whole batches"])
def test_a_dataloader_gets_every_row_once(
    acts: activations.Activations, cache: int, workers: int, shuffle: bool, whole: bool
) -> None:
    dataset = acts.dataset("fc", "maps", cache=cache)
    if whole:
        batches = dataset.batches(6, shuffle=shuffle, workers=workers)
        loader = DataLoader(dataset, batch_size=None, sampler=batches, num_workers=workers)
    else:
        loader = DataLoader(dataset, batch_size=6, shuffle=shuffle, num_workers=workers)
    assert len(loader) == 8
    for _ in range(2):
        seen: list[int] = []
        for rows, fc, maps in loader:
            np.testing.assert_array_equal(fc.numpy(), ARRAYS["fc"][rows.numpy()])
            np.testing.assert_array_equal(maps.numpy(), ARRAYS["maps"][rows.numpy()])
            seen += rows.tolist()
        assert (seen if not shuffle else sorted(seen)) == GOOD
        assert shuffle == (seen != GOOD)


@pytest.mark.parametrize("cache", [ALL_FITS, NOTHING_FITS])
def test_items_and_lists_of_items(acts: activations.Activations, cache: int) -> None:
    dataset = acts.dataset("fc", cache=cache)
    for _ in range(2):  # before and after something is held
        row, values = dataset[3]
        assert row == GOOD[3] == 4
        np.testing.assert_array_equal(values.numpy(), ARRAYS["fc"][4])
        values[:] = 0
        rows, several = dataset[[5, -1, 5]]
        assert rows.tolist() == [GOOD[5], GOOD[-1], GOOD[5]]
        np.testing.assert_array_equal(several.numpy(), ARRAYS["fc"][rows.numpy()])
        several[:] = 0
    assert [row for row, _ in Subset(dataset, [0, 19]).__getitems__([1, 0])] == [GOOD[19], GOOD[0]]
    again = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(again[3][1].numpy(), ARRAYS["fc"][4])
    with pytest.raises(IndexError):
        dataset[len(GOOD)]


def test_what_fits_is_read_once(acts: activations.Activations, decoded: list[tuple[int, ...]]) -> None:
    dataset = acts.dataset("fc", cache=ALL_FITS)
    for items in dataset.batches(5, shuffle=True):
        dataset[items]
    dataset[2]
    assert sorted(decoded) == [(chunk, 0) for chunk in range(12)]
    assert len(pickle.dumps(dataset)) < 2000  # and does not travel to workers


def test_a_chunkwise_shuffle_decodes_every_chunk_once(
    acts: activations.Activations, decoded: list[tuple[int, ...]]
) -> None:
    """Where rows are taken from anywhere, the same cache holds next to nothing of what comes next."""
    dataset = acts.dataset("fc", cache=NOTHING_FITS)
    for items in dataset.batches(6, shuffle=True):
        dataset[items]
    assert sorted(decoded) == [(chunk, 0) for chunk in range(12)]
    decoded.clear()
    for items in np.array_split(np.random.default_rng(0).permutation(len(dataset)), 8):
        dataset[items]
    assert len(decoded) > 24


def test_shuffles_differ_and_repeat(acts: activations.Activations) -> None:
    for cache in (ALL_FITS, NOTHING_FITS):
        dataset = acts.dataset("fc", cache=cache)
        batches = dataset.batches(6, shuffle=True, seed=1)
        first, second = list(batches), list(batches)
        assert first != second
        assert [first, second] == [list(b) for b in [dataset.batches(6, shuffle=True, seed=1)] for _ in range(2)]
        assert first != list(dataset.batches(6, shuffle=True, seed=2))
        for one in (first, second):
            assert sorted(itertools.chain(*one)) == list(range(len(GOOD)))


def test_maps_of_one_row_a_chunk_are_shuffled_uniformly(acts: activations.Activations) -> None:
    """The first batch reaches over the whole file, however little is kept."""
    batches = acts.dataset("maps", cache=1).batches(11, shuffle=True)
    assert np.mean([np.ptp(next(iter(batches))) for _ in range(50)]) > 30


def test_each_worker_has_chunks_of_its_own(acts: activations.Activations) -> None:
    dataset = acts.dataset("fc", cache=NOTHING_FITS)
    batches = list(dataset.batches(4, shuffle=True, workers=2))
    assert len(batches) == 11
    chunks = [{int(row) // 4 for items in batches[lane::2] for row in dataset.rows[items]} for lane in (0, 1)]
    assert sum(map(len, chunks)) <= 12 + 2  # a window on the border between both
    assert sorted(itertools.chain(*batches)) == list(range(len(GOOD)))


def test_rows_to_choose_from(acts: activations.Activations) -> None:
    assert acts.dataset("fc", rows=[20, 30, 4, 3]).rows.tolist() == [30, 4]
    assert acts.dataset("fc", rows=[20, -1], include_failed=True).rows.tolist() == [20, ROWS - 1]
    odd = np.arange(ROWS) % 2 == 1
    dataset = acts.dataset(rows=odd)
    assert dataset.names == ("fc", "maps", "tokens")
    assert dataset.rows.tolist() == [row for row in GOOD if row % 2]
    rows, fc, _, tokens = dataset[list(range(len(dataset)))]
    np.testing.assert_array_equal(fc.numpy(), ARRAYS["fc"][rows.numpy()])
    np.testing.assert_array_equal(tokens.numpy(), ARRAYS["tokens"][rows.numpy()])
    with pytest.raises(IndexError):
        acts.dataset("fc", rows=[ROWS])
    with pytest.raises(activations.UnknownName, match="closest are fc"):
        acts.dataset("f")
    assert len(acts.dataset("fc", rows=[])) == 0


def test_sizes_of_batches(acts: activations.Activations) -> None:
    dataset = acts.dataset("fc")
    for drop, lengths in ((False, [9] * 4 + [8]), (True, [9] * 4)):
        for shuffle in (False, True):
            batches = dataset.batches(9, shuffle=shuffle, drop_last=drop, workers=3)
            assert sorted(map(len, batches), reverse=True) == lengths
            assert len(batches) == len(lengths)
    with pytest.raises(ConfigError, match="at least 1"):
        dataset.batches(0)
    assert list(acts.dataset("fc", rows=[]).batches(4, shuffle=True)) == []


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_for_themselves(acts: activations.Activations, method: str) -> None:
    """Also after this process has read, and holds what it read."""
    dataset = acts.dataset("fc")
    whole = dataset[list(range(len(dataset)))][1]
    loader = DataLoader(dataset, batch_size=16, num_workers=1, multiprocessing_context=method)
    assert torch.equal(torch.cat([values for _, values in loader]), whole)


def test_a_dataset_outlives_what_it_came_from(tmp_path: Path) -> None:
    make_file(tmp_path / "a.h5", {"fc": ARRAYS["fc"]})
    with activations.open(tmp_path / "a.h5") as opened:
        dataset = opened.dataset("fc")
    np.testing.assert_array_equal(dataset[0][1].numpy(), ARRAYS["fc"][0])


def test_the_page_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of docs/how-to/other-tools.md on feeding a DataLoader."""
    page = (Path(__file__).parents[2] / "docs/how-to/other-tools.md").read_text(encoding="utf-8")
    (code,) = re.findall("```python\n(.*?)```", page.partition("## Feed a DataLoader")[2], re.DOTALL)
    make_file(tmp_path / "acts.h5", {"layer1": ARRAYS["maps"], "layer4": ARRAYS["fc"]})
    monkeypatch.chdir(tmp_path)
    said: dict[str, Any] = {}
    exec(code, said)
    rows = said["rows"].numpy()
    assert len(rows) == ROWS - 32
    np.testing.assert_array_equal(said["layer4"].numpy(), ARRAYS["fc"][rows])
    assert said["keys"].tolist() == [f"img/{row:05}.jpg" for row in rows]
    said["acts"].close()
