"""The reader against numpy on the full arrays, and against h5py."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
from files import COLUMNS, make_file, make_shards
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fmextract.errors import ConfigError, DamagedError, FmextractError, FormatError
from fmextract.reading import activations, chunks, files, layer, parallel
from fmextract.reading.chunks import Recent
from fmextract.reading.layer import Top
from fmextract.records import Field

ROWS = 22
SHAPES = {"fc": (7,), "tokens": (5, 6), "maps": (6, 4, 3), "swin": (3, 2, 6), "video": (4, 2, 3, 3)}
CHUNKS = {"fc": (4, 7), "tokens": (2, 5, 6), "maps": (1, 4, 4, 3), "swin": (4, 3, 2, 4), "video": (2, 3, 2, 3, 3)}
DTYPES = {"fc": "float32", "tokens": "float16", "maps": "float32", "swin": "int16", "video": "float64"}
PLACES = [("one", codec) for codec in ("gzip", "zstd", "lz4", "none")] + [("shards", "gzip"), ("shards", "none")]


def make_arrays(rows: int = ROWS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: (rng.normal(size=(rows, *shape)) * 100).round(2).astype(DTYPES[name]) for name, shape in SHAPES.items()
    }


ARRAYS = make_arrays()


@pytest.fixture(scope="module")
def outputs() -> Iterator[dict[tuple[str, str], activations.Activations]]:
    """The same arrays in every way that they can be stored."""
    with tempfile.TemporaryDirectory() as folder:
        opened = {}
        for place, codec in PLACES:
            path = Path(folder) / f"{place}-{codec}"
            if place == "one":
                path = path.with_suffix(".h5")
                make_file(path, ARRAYS, chunk=CHUNKS, codec=codec)
            else:
                make_shards(path, ARRAYS, (8, 12, 16), chunk=CHUNKS, codec=codec)
            opened[place, codec] = activations.open(path)
        yield opened
        for acts in opened.values():
            acts.close()


@pytest.fixture
def failing(tmp_path: Path) -> Path:
    """Two layers of 22 rows of which 3 and 20 failed, with labels."""
    arrays = {"maps": ARRAYS["maps"].copy(), "fc": ARRAYS["fc"].copy()}
    status = [0] * ROWS
    for row, code in ((3, 2), (20, 3)):
        status[row] = code
        for array in arrays.values():
            array[row] = np.nan
    make_file(tmp_path / "acts.h5", arrays, status=status, labels=[row % 3 for row in range(ROWS)])
    return tmp_path / "acts.h5"


# ------------------------------------------------------------------------------------------------------------ indexing


@st.composite
def one_index(draw: st.DrawFn, size: int) -> Any:
    """An index of one axis, now and then out of bounds."""
    inside = st.integers(-size, size - 1)
    return draw(
        st.one_of(
            inside,
            st.slices(size),
            st.builds(
                slice, *[st.none() | st.integers(-size - 2, size + 2)] * 2, st.sampled_from([None, -3, -1, 1, 2])
            ),
            st.lists(inside, max_size=2 * size),
            st.lists(inside, min_size=2, max_size=2).map(np.array),
            hnp.arrays(bool, size),
            hnp.arrays(np.int32, (2, 2), elements=inside),
            st.just(size) | st.lists(st.integers(-size - 1, size), max_size=3),
        )
    )


@st.composite
def any_index(draw: st.DrawFn, shape: tuple[int, ...]) -> Any:
    """A whole index: some axes from the left, some from the right of an Ellipsis."""
    used = draw(st.integers(0, len(shape)))
    left = draw(st.integers(0, used))
    key = [draw(one_index(size)) for size in (*shape[:left], *shape[len(shape) - (used - left) :])]
    if left < used or draw(st.booleans()):
        key.insert(left, Ellipsis)
    return key[0] if len(key) == 1 and draw(st.booleans()) else tuple(key)


def outcome(array: Any, key: Any) -> Any:
    try:
        return np.asarray(array[key])
    except IndexError as error:
        return type(error)


@settings(max_examples=600, deadline=None)
@given(data=st.data())
def test_indexing_equals_numpy(outputs: dict[tuple[str, str], activations.Activations], data: st.DataObject) -> None:
    acts = outputs[data.draw(st.sampled_from(PLACES))]
    name = data.draw(st.sampled_from(list(SHAPES)))
    key = data.draw(any_index(ARRAYS[name].shape))
    want, got = outcome(ARRAYS[name], key), outcome(acts[name], key)
    if isinstance(want, type):
        assert got is want
    elif got is IndexError:
        assert want.size == 0  # numpy does not look at an index that is paired with an empty one
    else:
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want, strict=True)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_indexing_equals_h5py_where_it_can(
    outputs: dict[tuple[str, str], activations.Activations], data: st.DataObject
) -> None:
    acts = outputs["one", "gzip"]
    name = data.draw(st.sampled_from(list(SHAPES)))
    shape = ARRAYS[name].shape
    rows = data.draw(
        st.slices(ROWS).filter(lambda s: (s.step or 1) > 0)
        | st.lists(st.integers(0, ROWS - 1), min_size=1, unique=True).map(sorted)
    )
    rest = tuple(data.draw(st.slices(size).filter(lambda s: (s.step or 1) > 0)) for size in shape[1:])
    with h5py.File(acts.path) as file:  # with locks, while the reader opens it without
        try:
            want = file[f"layers/{name}/activation"][(rows, *rest)]
        except ValueError:  # h5py has no list of rows with an empty slice
            reject()
        np.testing.assert_array_equal(acts[name][(rows, *rest)], want)


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.uint64])
@pytest.mark.parametrize(
    "rows", [[0], [3, 4, 5], list(range(22)), [4, 3], [3, 3], [2, 4], [1, 3, 2, 4], [20, 21, 22], [-1, 0], [-2, -1], []]
)
def test_arrays_of_rows_that_follow_each_other_and_that_do_not(
    outputs: dict[tuple[str, str], activations.Activations], rows: list[int], dtype: type
) -> None:
    """Such arrays are read as slices, which would cut off rows that are not there."""
    if dtype is np.uint64 and min(rows, default=0) < 0:
        rows = [row % ROWS for row in rows]
    key = np.array(rows, dtype)
    for place in PLACES:
        for name, array in ARRAYS.items():
            want, got = outcome(array, key), outcome(outputs[place][name], key)
            if isinstance(want, type):
                assert got is want
            else:
                np.testing.assert_array_equal(got, want, strict=True)


def test_masks_over_several_axes(outputs: dict[tuple[str, str], activations.Activations]) -> None:
    layer, array = outputs["shards", "gzip"]["maps"], ARRAYS["maps"]
    for mask in (array > 50, array.sum((2, 3)) > 0, np.zeros((ROWS, 6), bool)):
        np.testing.assert_array_equal(layer[mask], array[mask])
    np.testing.assert_array_equal(layer[array[:, :, 0, 0] > 0, ..., 1], array[array[:, :, 0, 0] > 0, ..., 1])


@pytest.mark.parametrize(
    "key", [1.0, "a", [0.5], True, None, (0, None), (..., ...), (0,) * 5, np.zeros(0), np.ones(5, bool), 22, -23, [22]]
)
def test_bad_index_raises_like_numpy(outputs: dict[tuple[str, str], activations.Activations], key: Any) -> None:
    with pytest.raises(IndexError):
        outputs["one", "gzip"]["maps"][key]


def test_scalars_and_conversion(outputs: dict[tuple[str, str], activations.Activations]) -> None:
    layer, array = outputs["one", "gzip"]["fc"], ARRAYS["fc"]
    assert isinstance(layer[1, 2], np.float32)
    np.testing.assert_array_equal(np.asarray(layer), array)
    assert np.asarray(layer, dtype="float64").dtype == np.float64
    np.testing.assert_array_equal(np.stack(list(layer)), array)
    with pytest.raises(ValueError, match="copy"):
        layer.__array__(copy=False)  # as np.array(layer, copy=False) of numpy 2 calls it


def test_results_are_the_callers(outputs: dict[tuple[str, str], activations.Activations]) -> None:
    layer = outputs["one", "gzip"]["swin"]
    layer[0:3][:] = 0
    layer[5][:] = 0
    np.testing.assert_array_equal(layer[...], ARRAYS["swin"])


def test_only_touched_chunks_are_read(
    outputs: dict[tuple[str, str], activations.Activations], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    read = files.File._payload
    monkeypatch.setattr(files.File, "_payload", lambda *a: (seen.append(a[2]), read(*a))[1])
    acts = activations.open(outputs["one", "gzip"].path, threads=1)  # idle threads would read ahead
    for key, touched in (
        ((3, 5), {(3, 1, 0, 0)}),
        ((slice(3, 5), slice(0, 2)), {(3, 0, 0, 0), (4, 0, 0, 0)}),
        (([9, 1], [0, 5]), {(9, 0, 0, 0), (1, 1, 0, 0)}),
        ((slice(0, 0),), set()),
    ):
        seen.clear()
        acts.recent.clear()
        acts["maps"][key]
        assert set(seen) == touched
        assert len(seen) == len(touched)


def test_a_chunk_of_many_rows_is_decoded_once_in_a_loop(
    outputs: dict[tuple[str, str], activations.Activations], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    read = files.File._payload
    monkeypatch.setattr(files.File, "_payload", lambda *a: (seen.append(a[2]), read(*a))[1])
    for threads in (1, 3):
        with activations.open(outputs["one", "gzip"].path, threads=threads) as acts:
            seen.clear()
            np.testing.assert_array_equal(list(acts["fc"]), ARRAYS["fc"])
            assert sorted(seen) == [(chunk, 0) for chunk in range(6)]


def test_reading_in_order_reads_ahead_and_no_other(
    outputs: dict[tuple[str, str], activations.Activations], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    read = files.File._payload
    monkeypatch.setattr(files.File, "_payload", lambda *a: (seen.append(a[2]), read(*a))[1])
    with activations.open(outputs["one", "gzip"].path, threads=3) as acts:
        # From chunk 2 on to 3 is in order: 4 is kept from before, 5 is read along and need not be read for row 21.
        for row, chunks in ((16, [4]), (9, [2]), (12, [3, 5]), (21, []), (2, [0]), (4, [1])):
            seen.clear()
            np.testing.assert_array_equal(acts["fc"][row], ARRAYS["fc"][row])
            assert sorted(place[0] for place in seen) == chunks


@pytest.mark.parametrize("few", [1, 4, 10**6], ids=["picked", "as it is", "joined"])
@pytest.mark.parametrize("codec", ["gzip", "zstd", "lz4", "none"])
def test_however_a_part_of_a_chunk_is_read(
    outputs: dict[tuple[str, str], activations.Activations], codec: str, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer, "FEW", few)
    monkeypatch.setattr(chunks, "SEEK_BYTES", 1)  # stretches of rows alone, though these chunks are small
    monkeypatch.setattr(layer, "ALONE_BYTES", 64)  # and several threads
    rng = np.random.default_rng(few)
    for name, array in ARRAYS.items():
        with activations.open(outputs["one", codec].path, cache=1) as acts:
            for _ in range(20):
                rows = rng.integers(-ROWS, ROWS, rng.integers(1, 9))
                start, stop = sorted(rng.integers(0, ROWS, 2))
                for key in (rows, int(rows[0]), slice(start, stop), slice(stop, start, -2), (rows, ..., slice(1, 3))):
                    np.testing.assert_array_equal(acts[name][key], array[key])


def test_stored_as_it_is_no_more_is_read_than_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.arange(64 * 1000, dtype=np.float32).reshape(64, 1000)
    make_file(tmp_path / "a.h5", {"fc": array}, chunk={"fc": (64, 1000)}, codec="none")
    read: list[int] = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, room, at: (read.append(room[0].nbytes), preadv(fd, room, at))[1])
    with activations.open(tmp_path / "a.h5") as acts:
        for key, rows in ((33, [1]), (slice(5, 25), [20]), (..., [64]), ([7, 9, 10], [1, 2]), ([12, 11], [1, 1])):
            read.clear()
            np.testing.assert_array_equal(acts["fc"][key], array[key])
            assert read == [4000 * n for n in rows]


def test_recent_chunks_are_bounded() -> None:
    recent = Recent(100)
    for number in range(10):
        recent.put(("a", (number,)), np.zeros(30, np.uint8))
        recent.put(("a", (number,)), np.zeros(30, np.uint8))
    assert [recent.get(("a", (n,))) is not None for n in range(10)] == [False] * 7 + [True] * 3
    recent.clear()
    assert recent._room == 100


def test_threads_read_at_once(outputs: dict[tuple[str, str], activations.Activations]) -> None:
    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(15):
            name = str(rng.choice(list(SHAPES)))
            rows = rng.integers(-ROWS, ROWS, rng.integers(1, ROWS))
            np.testing.assert_array_equal(acts[name][rows], ARRAYS[name][rows])

    for place in (("one", "gzip"), ("one", "zstd"), ("shards", "gzip")):
        with activations.open(outputs[place].path, threads=3) as acts, ThreadPoolExecutor(6) as pool:
            list(pool.map(read, range(12)))


def test_open_files_are_bounded(
    outputs: dict[tuple[str, str], activations.Activations], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "FILES_OPEN", 1)
    with activations.open(outputs["shards", "gzip"].path) as acts:
        np.testing.assert_array_equal(acts["maps"][::-1], ARRAYS["maps"][::-1])
        assert len(acts.files._open) == 1


def test_an_error_in_a_thread_is_raised_and_stops_the_others() -> None:
    done: list[int] = []

    def work(task: int) -> None:
        if task == 5:
            raise DamagedError("five")
        done.append(task)

    with pytest.raises(DamagedError, match="five"):
        parallel.in_parallel(work, iter(range(10_000)), 10_000, 4)
    assert len(done) < 10_000


# ------------------------------------------------------------------------------------------------ columns and the rest


def test_columns(failing: Path) -> None:
    with activations.open(failing) as acts:
        assert acts.layers == ("maps", "fc")
        assert acts.num_rows == ROWS
        assert acts.keys[4] == "img/00004.jpg"
        assert acts.row("img/00004.jpg") == 4
        assert np.flatnonzero(acts.status).tolist() == [3, 20]
        assert acts.messages[3] == "broken"
        assert acts.messages[4] == ""
        assert acts.labels is not None
        assert acts.labels.tolist() == [row % 3 for row in range(ROWS)]
        assert acts.heights.tolist() == [480] * ROWS
        assert acts.widths.dtype == np.int32
        assert acts.config == {"model": "tiny"}
        assert acts.versions == {"fmextract": "0"}
        assert acts.input_size == (224, 224)
        assert acts["maps"].axes == ("sample", "channel", "y", "x")
        assert acts["maps"].attrs["module_type"] == acts["maps"].module_type == "Conv2d"
        with pytest.raises(KeyError, match=r"closest are .*img/00004"):
            acts.row("img/0004.jpg")
        with pytest.raises(ConfigError, match=r"no layer 'map'.*closest are maps"):
            acts["map"]


def test_an_output_is_a_mapping_of_names_to_layers(failing: Path) -> None:
    with activations.open(failing) as acts:
        assert len(acts) == len(list(acts)) == 2
        assert all(name in acts for name in acts)
        assert ROWS not in acts
        assert dict(acts.items()) == {name: acts[name] for name in acts}
        assert list(acts.values()) == [acts["maps"], acts["fc"]]
        for use in (lambda: dict(acts), lambda: {**acts}, acts.keys):
            with pytest.raises(TypeError, match=r"acts\.layers.*dict\(acts\.items\(\)\)"):
                use()
        keys = acts.keys
        assert isinstance(keys, np.ndarray)
        assert type(keys[3]) is str
        assert pickle.loads(pickle.dumps(keys)).tolist() == keys.tolist()
        assert keys[acts.status != 0].tolist() == ["img/00003.jpg", "img/00020.jpg"]
        assert pd.Series(keys)[3] == "img/00003.jpg"


def test_a_layer_is_a_sequence_of_rows(failing: Path) -> None:
    with activations.open(failing) as acts:
        layer = acts["fc"]
        assert len(layer) == len(list(layer)) == ROWS
        with pytest.raises(ConfigError, match=r"value in acts\['fc'\]\[row\]"):
            _ = 5.0 in layer


def test_names_with_slashes_and_their_order(tmp_path: Path) -> None:
    arrays = {name: ARRAYS["fc"] + i for i, name in enumerate(("z/y", "a", "50%", "m%2Fn", "relu:2", "b=mean"))}
    make_file(tmp_path / "a.h5", arrays)
    with activations.open(tmp_path / "a.h5") as acts:
        assert list(acts) == list(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(acts[name][...], array)


def test_info_and_repr(failing: Path) -> None:
    with activations.open(failing) as acts:
        info = acts.info()
        assert info["rows"] == ROWS
        assert info["failed"] == 2
        assert info["failures"][0] == {"row": 3, "key": "img/00003.jpg", "status": 2, "message": "broken"}
        maps = info["layers"][0]
        assert (maps["name"], maps["shape"], maps["codec"]) == ("maps", [ROWS, 6, 4, 3], "gzip")
        assert maps["bytes_raw"] == ARRAYS["maps"].nbytes
        assert 0 < maps["bytes_stored"] < failing.stat().st_size
        assert "2 layers, tiny, fp32" in repr(acts)
        assert "maps  float32 (22, 6, 4, 3) (sample, channel, y, x)" in repr(acts)
    assert "closed" in repr(acts)


def test_closed(failing: Path) -> None:
    acts = activations.open(failing)
    layer = acts["maps"]
    acts.close()
    with pytest.raises(ConfigError, match="closed"):
        layer[0]


def test_rows_of_a_lone_shard_count_from_zero(tmp_path: Path) -> None:
    paths = make_shards(tmp_path / "acts", {"maps": ARRAYS["maps"]}, (8, 16))
    with activations.open(paths[1]) as acts:
        np.testing.assert_array_equal(acts["maps"][:2], ARRAYS["maps"][8:10])
        assert acts.row("img/00008.jpg") == 0


def test_shards_equal_one_file(tmp_path: Path) -> None:
    status = [int(row == 9) for row in range(ROWS)]
    make_shards(tmp_path / "acts", ARRAYS, (8, 16), chunk=CHUNKS, status=status)
    with activations.open(tmp_path / "acts") as acts:
        assert acts.keys.tolist() == [f"img/{row:05}.jpg" for row in range(ROWS)]
        assert acts.status.tolist() == status
        assert acts.info()["files"] == 3
        with pytest.raises(ConfigError, match="no statistics"):
            acts["maps"].stats  # noqa: B018


# ------------------------------------------------------------------------------------------------- batches and dataset


@pytest.mark.parametrize("size", [1, 5, 8, 256])
def test_batches_leave_out_failed_rows(failing: Path, size: int) -> None:
    good = [row for row in range(ROWS) if row not in (3, 20)]
    with activations.open(failing) as acts:
        for include, want in ((False, good), (True, list(range(ROWS)))):
            batches = list(acts["maps"].batches(size, include_failed=include))
            rows = np.concatenate([rows for rows, _ in batches])
            assert rows.dtype == np.int64
            assert rows.tolist() == want
            assert max(len(rows) for rows, _ in batches) <= size
            np.testing.assert_array_equal(np.concatenate([maps for _, maps in batches]), acts["maps"][want])
        rows, maps = next(acts.batches(["fc", "maps"], size))
        assert list(maps) == ["fc", "maps"]
        np.testing.assert_array_equal(maps["fc"], ARRAYS["fc"][rows])
        with pytest.raises(ConfigError, match="at least 1"):
            acts["maps"].batches(0).__next__()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_dataset_in_a_dataloader(failing: Path, workers: int) -> None:
    import torch

    with activations.open(failing) as acts:
        dataset = acts.dataset("fc", "maps")
        assert isinstance(dataset, torch.utils.data.Dataset)
        acts["maps"][0:8]  # the pool and its threads are there before the workers fork
        loader = torch.utils.data.DataLoader(dataset, batch_size=6, num_workers=workers, shuffle=True)
        seen = []
        for rows, fc, maps in loader:
            np.testing.assert_array_equal(fc.numpy(), ARRAYS["fc"][rows.numpy()])
            np.testing.assert_array_equal(maps.numpy(), ARRAYS["maps"][rows.numpy()])
            seen += rows.tolist()
        assert sorted(seen) == [row for row in range(ROWS) if row not in (3, 20)]
        assert len(acts.dataset(include_failed=True)) == ROWS
        with pytest.raises(KeyError):
            acts.dataset("map")


def test_dataset_pickles(failing: Path) -> None:
    import torch

    with activations.open(failing) as acts:
        dataset = acts.dataset("maps")
        row, maps = dataset[3]
    again = pickle.loads(pickle.dumps(dataset))
    assert again[3][0] == row == 4
    assert torch.equal(again[3][1], maps)
    assert torch.equal(maps, torch.from_numpy(ARRAYS["maps"][4]))
    assert [item[0] for item in torch.utils.data.Subset(again, [0, 19]).__getitems__([1, 0])] == [21, 0]


def test_reader_does_not_import_torch() -> None:
    code = "import sys, fmextract.reading.activations; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ---------------------------------------------------------------------------------------------------------- statistics


def make_stats(field: Field | None) -> dict[str, dict[str, Any]]:
    top = {
        "top_value": np.full((6, 3), np.nan),
        "top_sample": np.full((6, 3), -1, np.int64),
        "top_y": np.full((6, 3), -1, np.int32),
        "top_x": np.full((6, 3), -1, np.int32),
    }
    for rank, entry in enumerate(((9.5, 21, 3, 2), (4.0, 0, 0, 0))):
        for column, value in zip(top.values(), entry, strict=True):
            column[5, rank] = value
    return {"maps": {"zero_fraction": np.linspace(0, 1, 6), "count": np.arange(6), **top}}


def test_stats_and_top(tmp_path: Path) -> None:
    field = Field(size=(43.0, 43.0), stride=(32.0, 64.0), offset=(16.0, 32.0))
    make_file(
        tmp_path / "a.h5",
        {"maps": ARRAYS["maps"], "fc": ARRAYS["fc"]},
        spec={"maps": {"field": field}},
        stats=make_stats(field),
    )
    with activations.open(tmp_path / "a.h5") as acts:
        layer = acts["maps"]
        assert layer.field == field
        assert set(layer.stats.names) >= {"zero_fraction", "count", "top_value"}
        assert "k" not in layer.stats.names
        np.testing.assert_array_equal(layer.stats.zero_fraction, np.linspace(0, 1, 6))
        with pytest.raises(AttributeError, match="zero_fraction"):
            layer.stats.zeros  # noqa: B018
        first, second = layer.top(5)
        assert first == Top(21, "img/00021.jpg", 9.5, 3, 2, (138.5, 90.5, 181.5, 133.5))
        assert second.box == (10.5, 0.0, 53.5, 37.5)  # clipped: the cell looks over the edge
        assert layer.top(-1, k=1) == [first]
        assert layer.top(0) == []
        with pytest.raises(IndexError, match="channel 6"):
            layer.top(6)
        with pytest.raises(ConfigError, match="no statistics for fc"):
            acts["fc"].stats  # noqa: B018


def test_top_without_a_receptive_field_has_no_box(tmp_path: Path) -> None:
    make_file(tmp_path / "a.h5", {"maps": ARRAYS["maps"]}, stats=make_stats(None))
    with activations.open(tmp_path / "a.h5") as acts:
        assert acts["maps"].top(5)[0].box is None


# ---------------------------------------------------------------------------------------------------- what open refuses


def test_run_in_progress_is_refused(tmp_path: Path) -> None:
    """Rows are counted: how long a shard is, nobody knows."""
    status = [0] * 3 + [2] + [0] * (ROWS - 4)
    make_shards(tmp_path / "acts", {"fc": ARRAYS["fc"]}, (8, 16), status=status, finish=False)
    stored = r"in progress: 16 of 22 images are stored, 1 of them failed \(2 of 3 shards\)\. The same extract command"
    with pytest.raises(FormatError, match=stored):
        activations.open(tmp_path / "acts")
    (tmp_path / "acts").rename(tmp_path / "a.h5.partial")
    with pytest.raises(FormatError, match=stored):
        activations.open(tmp_path / "a.h5")


def test_missing_shard_is_refused(tmp_path: Path) -> None:
    paths = make_shards(tmp_path / "acts", {"fc": ARRAYS["fc"]}, (8, 16))
    paths[1].unlink()
    with pytest.raises(FmextractError, match=r"shard-00001\.h5 is missing.*8 to 15"):
        activations.open(tmp_path / "acts")


def test_swapped_shards_are_refused(tmp_path: Path) -> None:
    paths = make_shards(tmp_path / "acts", {"fc": ARRAYS["fc"][:20]}, (8, 16))
    small = make_shards(tmp_path / "other", {"maps": ARRAYS["maps"][:20]}, (8, 16))[1].read_bytes()
    record = paths[1].stat().st_size
    paths[1].write_bytes(small[:record].ljust(record, b"\0"))
    with pytest.raises(FormatError), activations.open(tmp_path / "acts") as acts:
        acts["fc"][...]


def test_a_shard_of_another_codec_is_refused(tmp_path: Path) -> None:
    array = np.repeat(ARRAYS["fc"][:24], 40, axis=1)  # compresses well
    paths = make_shards(tmp_path / "acts", {"fc": array}, (8, 16), codec="none")
    other = make_shards(tmp_path / "other", {"fc": array}, (8, 16), codec="gzip")[1].read_bytes()
    paths[1].write_bytes(other.ljust(paths[1].stat().st_size, b"\0"))
    listed = json.loads((tmp_path / "acts" / "index.json").read_text())
    listed["shards"][1]["content_digest"] = activations.open(paths[1]).attrs["content_digest"]
    (tmp_path / "acts" / "index.json").write_text(json.dumps(listed))
    with activations.open(tmp_path / "acts") as acts:
        for key in (slice(6, 10), [3, 12], 9, ...):
            with pytest.raises(FormatError, match=r"shard-00001.h5: layer fc has another shape, type or codec here"):
                acts["fc"][key]


def test_replaced_file_is_noticed(failing: Path, tmp_path: Path) -> None:
    with activations.open(failing) as acts:
        make_file(tmp_path / "new.h5", {"maps": ARRAYS["maps"]})
        (tmp_path / "new.h5").replace(failing)
        with pytest.raises(FormatError, match="replaced"):
            acts["maps"][0]


@pytest.mark.parametrize("what", ["nothing", "an empty folder", "text", "empty", "another HDF5", "newer", "a pipe"])
def test_not_ours_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "a.h5"
    expected = {"nothing": "no such file", "text": "not an HDF5", "empty": "not an HDF5", "newer": "upgrade"}
    if what == "an empty folder":
        path.mkdir()
    elif what == "text":
        path.write_text("label,pixel0\n" * 100)
    elif what == "empty":
        path.touch()
    elif what == "another HDF5":
        with h5py.File(path, "w") as file:
            file["x"] = [1]
    elif what == "newer":
        make_file(path, {"fc": ARRAYS["fc"]})
        with h5py.File(path, "r+") as file:
            file.attrs["format_version"] = 2
    elif what == "a pipe":
        os.mkfifo(path)
    with pytest.raises(FmextractError, match=expected.get(what)) as caught:
        activations.open(path)
    assert caught.value.exit_code == 2


def test_damaged_chunk_names_file_layer_and_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    make_file(path, ARRAYS, chunk=CHUNKS)
    with h5py.File(path) as file:
        chunk = file["layers/fc/activation"].id.get_chunk_info_by_coord((8, 0))
    with path.open("r+b") as raw:
        raw.seek(chunk.byte_offset + chunk.size // 2)
        raw.write(b"\xff" * 8)
    with activations.open(path) as acts:
        np.testing.assert_array_equal(acts["fc"][:8], ARRAYS["fc"][:8])
        with pytest.raises(DamagedError, match=r"a\.h5: layer fc, rows 8 to 11"):
            acts["fc"][...]


def test_chunk_that_was_never_written_is_no_fill_value(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    make_file(path, {"fc": ARRAYS["fc"], "maps": ARRAYS["maps"]})
    with h5py.File(path, "r+") as file:
        for name in (*COLUMNS, "layers/fc/activation"):
            file[name].resize(30, 0)
        file["layers/maps/activation"].resize(30, 0)
    with activations.open(path) as acts, pytest.raises(DamagedError, match="6 of 8 chunks"):
        acts["fc"][0]


def test_pipelines_that_are_not_ours_go_through_libhdf5(tmp_path: Path) -> None:
    """What h5repack or a person with h5py may have made of a file."""
    path = tmp_path / "a.h5"
    make_file(path, {"maps": ARRAYS["maps"]})
    with h5py.File(path, "r+") as file:
        group = file["layers/maps"]
        values, scales = group["activation"][...], [axis[0] for axis in group["activation"].dims]
        del group["activation"]
        data = group.create_dataset(
            "activation", data=values.astype(">f4"), chunks=(4, 4, 4, 3), compression="lzf", maxshape=(None, 6, 4, 3)
        )
        for axis, scale in zip(data.dims, scales, strict=True):
            axis.attach_scale(scale)
    with activations.open(path) as acts:
        assert acts["maps"].codec is None
        for key in (..., (slice(None, None, -2), [5, 0]), ([3, 21], 4)):
            np.testing.assert_array_equal(acts["maps"][key], ARRAYS["maps"][key])


# ------------------------------------------------------------------------------------------------- in other processes

SOME = ARRAYS["maps"]
UNPICKLE = (
    "import pickle, sys; acts, layer = pickle.load(sys.stdin.buffer); print(acts.num_rows, layer[1].sum(), layer.name)"
)


def test_what_is_open_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its path alone, though that was relative; the other process opens the files itself."""
    monkeypatch.chdir(tmp_path)
    make_shards(Path("acts"), {"maps": SOME}, (4,))
    with activations.open("acts", threads=1, cache=77) as acts:
        sent = pickle.dumps((acts, acts["maps"]))
        assert len(sent) < 1000
        again, layer = pickle.loads(sent)
        assert layer.acts is again
        assert (again.threads, again.recent.nbytes) == (1, 77)
        np.testing.assert_array_equal(layer[:], SOME)
    ran = subprocess.run([sys.executable, "-c", UNPICKLE], input=sent, capture_output=True, cwd="/", check=True)
    rows, total, name = ran.stdout.decode().split()
    assert (int(rows), name) == (len(SOME), "maps")
    assert float(total) == pytest.approx(SOME[1].sum(), rel=1e-6)


def test_what_was_replaced_is_not_unpickled(tmp_path: Path) -> None:
    make_file(tmp_path / "a.h5", {"maps": SOME})
    with activations.open(tmp_path / "a.h5") as acts:
        sent = pickle.dumps(acts)
    make_file(tmp_path / "a.h5", {"maps": SOME + 1})
    with pytest.raises(FormatError, match="replaced since"):
        pickle.loads(sent)


def test_a_shard_that_was_replaced_is_not_read(tmp_path: Path) -> None:
    """The first is as it was: what was opened, pickled or fed to torch holds the rows of one output only."""
    make_shards(tmp_path / "acts", {"maps": SOME}, (4,))
    other = np.concatenate([SOME[:4], SOME[4:] + 1])
    with activations.open(tmp_path / "acts") as acts:
        sent, dataset = pickle.dumps(acts), acts.dataset("maps")
        np.testing.assert_array_equal(acts["maps"][:4], SOME[:4])
        make_shards(tmp_path / "new", {"maps": other}, (4,))
        shutil.rmtree(tmp_path / "acts")
        (tmp_path / "new").rename(tmp_path / "acts")
        with pytest.raises(FormatError, match="was replaced"):
            acts["maps"][5]
        with pytest.raises(FormatError, match="was replaced"):
            pickle.loads(sent)
        for one in (dataset, pickle.loads(pickle.dumps(dataset))):
            with pytest.raises(FormatError, match="was replaced"):
                one[5]


def test_the_working_directory_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shards(tmp_path / "acts", {"maps": SOME}, (4,))
    make_file(tmp_path / "acts.h5", {"maps": SOME})
    for name in ("acts", "acts.h5"):
        monkeypatch.chdir(tmp_path)
        with activations.open(name) as acts:
            monkeypatch.chdir("/")
            np.testing.assert_array_equal(acts["maps"][:], SOME)
            np.testing.assert_array_equal(pickle.loads(pickle.dumps(acts))["maps"][:], SOME)
            assert [row for row, _ in acts.dataset("maps")] == list(range(len(SOME)))


def test_what_is_closed_does_not_pickle(tmp_path: Path) -> None:
    make_file(tmp_path / "a.h5", {"maps": SOME})
    with activations.open(tmp_path / "a.h5") as acts:
        pass
    with pytest.raises(ConfigError, match="closed"):
        pickle.dumps(acts)


@pytest.mark.parametrize("reduce", [np.mean, np.std, np.var, np.sum, np.min, np.max, np.argmax])
def test_reductions_say_what_to_do(tmp_path: Path, reduce: Callable[[Any], Any]) -> None:
    """To take them of the array would read all of it, and give NaN for one failed row."""
    make_file(tmp_path / "a.h5", {"maps": SOME})
    with activations.open(tmp_path / "a.h5") as acts:
        with pytest.raises(ConfigError, match=r"acts\['maps'\]\.stats.*batches.*acts\['maps'\]\[acts\.rows\(\)\]"):
            reduce(acts["maps"])
        with pytest.raises(ConfigError):
            getattr(acts["maps"], reduce.__name__)(axis=0)
        np.testing.assert_array_equal(np.asarray(acts["maps"]), SOME)
