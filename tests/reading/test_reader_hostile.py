"""Files that were damaged, or made to do harm: only our own errors come out, soon, and nothing outside is followed."""

from __future__ import annotations

import contextlib
import json
import resource
import struct
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from files import COLUMNS, make_file, make_shards
from hypothesis import given, settings
from hypothesis import strategies as st

from fmextract.errors import DamagedError, FmextractError, FormatError
from fmextract.reading import activations
from fmextract.storage import validation

MAPS = np.random.default_rng(0).normal(size=(6, 4, 3, 2)).astype(np.float32)
WORDS = (0, 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**64 - 1)


def read_everything(path: Path) -> None:
    with activations.open(path) as acts:
        acts.info()
        repr(acts)
        _ = acts.labels, acts.heights, acts.widths, acts.messages, acts.config, acts.versions, acts.input_size
        for name in acts.layers:
            layer = acts[name]
            _ = layer[...], layer.field, layer.stats.names
            with contextlib.suppress(IndexError):  # no channels left
                layer.top(-1)
        list(acts.batches())


@pytest.fixture(scope="module")
def small() -> Iterator[tuple[bytes, Path]]:
    """The bytes of a small valid file with everything in it, and a path for mutants."""
    top = {name: np.zeros((4, 2), int) for name in ("top_value", "top_sample", "top_y", "top_x")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.h5"
        make_file(
            path,
            {"maps": MAPS},
            chunk={"maps": (2, 2, 3, 2)},
            stats={"maps": {"zero_fraction": np.zeros(4), **top}},
            labels=["cat"] * len(MAPS),
        )
        read_everything(path)
        yield path.read_bytes(), Path(folder) / "mutant.h5"


@st.composite
def mutation(draw: st.DrawFn, size: int) -> Callable[[bytearray], None]:
    """One bit, a few bytes, a word, a block from elsewhere, or the end cut off."""
    place = st.integers(0, size - 1)
    at, other, length = draw(place), draw(place), draw(st.integers(1, 64))
    kind = draw(st.sampled_from(["bit", "bytes", "word", "copy", "cut"]))
    bit, values, word = draw(st.integers(0, 7)), draw(st.binary(min_size=1, max_size=8)), draw(st.sampled_from(WORDS))

    def mutate(data: bytearray) -> None:
        if kind == "bit":
            data[at] ^= 1 << bit
        elif kind == "bytes":
            data[at : at + len(values)] = values
        elif kind == "word":
            data[at & ~7 : (at & ~7) + 8] = word.to_bytes(8, "little")
        elif kind == "copy":
            data[at : at + length] = data[other : other + length]
        else:
            del data[at:]

    return mutate


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_mutants_raise_only_our_errors(small: tuple[bytes, Path], data: st.DataObject) -> None:
    valid, path = small
    mutant = bytearray(valid)
    for mutate in data.draw(st.lists(mutation(len(valid)), min_size=1, max_size=3)):
        if mutant:
            mutate_within(mutate, mutant)
    path.write_bytes(mutant)
    start, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(FmextractError):
        read_everything(path)
    assert time.monotonic() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 2**20  # KiB on Linux: less than 1 GiB


def mutate_within(mutate: Callable[[bytearray], None], data: bytearray) -> None:
    """After a cut, a place may lie behind the end."""
    try:
        mutate(data)
    except IndexError:
        del data[-1:]


def test_truncated_at_every_length(small: tuple[bytes, Path]) -> None:
    valid, path = small
    for size in range(0, len(valid) - 1, len(valid) // 60):
        path.write_bytes(valid[:size])
        with pytest.raises(FormatError):
            read_everything(path)


# -------------------------------------------------------------------------------------------------- made to do harm


@pytest.fixture
def crafted(tmp_path: Path) -> tuple[Path, Any]:
    """A valid file, open for writing: `change(file)`, then see that `open` refuses it."""
    path = tmp_path / "a.h5"
    make_file(path, {"maps": MAPS})
    make_file(tmp_path / "secret.h5", {"maps": MAPS + 1})

    def change(edit: Callable[[h5py.File], None]) -> None:
        with h5py.File(path, "r+") as file:
            edit(file)

    return path, change


def replace(file: h5py.File, name: str, value: Any) -> None:
    del file[name]
    file[name] = value


def external_link(file: h5py.File) -> None:
    replace(file, "layers/maps/activation", h5py.ExternalLink("secret.h5", "/layers/maps/activation"))


def external_layer(file: h5py.File) -> None:
    replace(file, "layers/maps", h5py.ExternalLink("secret.h5", "/layers/maps"))


def external_column(file: h5py.File) -> None:
    replace(file, "key", h5py.ExternalLink("secret.h5", "/key"))


def soft_link(file: h5py.File) -> None:
    file["layers/other"] = h5py.SoftLink("/layers/maps")


def dangling_link(file: h5py.File) -> None:
    file["layers/other"] = h5py.SoftLink("/nowhere")


def cycle(file: h5py.File) -> None:
    file["layers/maps/layers"] = file["layers"]


def root_in_itself(file: h5py.File) -> None:
    file["layers/root"] = file["/"]


def virtual_dataset(file: h5py.File) -> None:
    layout = h5py.VirtualLayout(MAPS.shape, MAPS.dtype)
    layout[...] = h5py.VirtualSource("secret.h5", "layers/maps/activation", MAPS.shape)
    del file["layers/maps/activation"]
    file["layers/maps"].create_virtual_dataset("activation", layout)


def external_storage(file: h5py.File) -> None:
    del file["layers/maps/activation"]
    file["layers/maps"].create_dataset(
        "activation", shape=MAPS.shape, dtype="f4", external=[("/etc/passwd", 0, MAPS.nbytes)]
    )


def huge_rows(file: h5py.File) -> None:
    for name in (*COLUMNS, "layers/maps/activation"):
        file[name].resize(2**40, 0)


def huge_chunks(file: h5py.File) -> None:
    del file["layers/maps/activation"]
    file["layers/maps"].create_dataset(
        "activation", shape=MAPS.shape, dtype="f4", chunks=(2**20, 4, 3, 100), maxshape=(None, 4, 3, None)
    )


def wrong_rows(file: h5py.File) -> None:
    file["layers/maps/activation"].resize(5, 0)


def wrong_column(file: h5py.File) -> None:
    file["status"].resize(5, 0)


def not_chunked(file: h5py.File) -> None:
    replace(file, "layers/maps/activation", MAPS)


def no_rows_axis(file: h5py.File) -> None:
    replace(file, "layers/maps/activation", np.float32(1))


def compound(file: h5py.File) -> None:
    replace(file, "layers/maps/activation", np.zeros(6, [("a", "f4")]))


def dataset_for_layers(file: h5py.File) -> None:
    replace(file, "layers", np.zeros(6))


def layer_without_data(file: h5py.File) -> None:
    del file["layers/maps/activation"]


def no_columns(file: h5py.File) -> None:
    del file["key"]


def lower_version(file: h5py.File) -> None:
    file.attrs["format_version"] = "1"


@pytest.mark.parametrize(
    "edit",
    [
        external_link,
        external_layer,
        external_column,
        soft_link,
        dangling_link,
        cycle,
        root_in_itself,
        virtual_dataset,
        external_storage,
        huge_rows,
        huge_chunks,
        wrong_rows,
        wrong_column,
        not_chunked,
        no_rows_axis,
        compound,
        dataset_for_layers,
        layer_without_data,
        no_columns,
        lower_version,
    ],
)
def test_open_refuses(crafted: tuple[Path, Any], edit: Callable[[h5py.File], None]) -> None:
    path, change = crafted
    change(edit)
    with pytest.raises(FormatError, match=r"a\.h5"):
        activations.open(path)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a":' * 5000, "[" * 100_000])
def test_json_that_is_none(crafted: tuple[Path, Any], text: str) -> None:
    path, change = crafted
    change(lambda file: file.attrs.modify("preprocess", text))
    with pytest.raises(DamagedError, match=r"a\.h5: the attribute preprocess: expected .*JSON"):
        activations.open(path)


def test_strings_that_are_not_text(crafted: tuple[Path, Any]) -> None:
    path, change = crafted
    change(lambda file: file["key"].__setitem__(2, b"\xff\xfe"))
    with activations.open(path) as acts, pytest.raises(DamagedError, match=r"a\.h5"):
        acts.keys  # noqa: B018


def test_a_chunk_that_inflates_without_end(crafted: tuple[Path, Any]) -> None:
    path, change = crafted
    bomb = zlib.compress(bytes(2**26), 9)
    change(lambda file: file["layers/maps/activation"].id.write_direct_chunk((0, 0, 0, 0), bomb))
    with activations.open(path) as acts, pytest.raises(DamagedError, match="rows 0 to 3"):
        acts["maps"][...]


def test_statistics_that_name_rows_that_are_not_there(tmp_path: Path) -> None:
    top = {name: np.full((4, 1), 99) for name in ("top_value", "top_sample", "top_y", "top_x")}
    make_file(tmp_path / "a.h5", {"maps": MAPS}, stats={"maps": top})
    with activations.open(tmp_path / "a.h5") as acts, pytest.raises(DamagedError, match="row 99"):
        acts["maps"].top(0)


def test_an_index_that_leads_out_of_its_folder(tmp_path: Path) -> None:
    make_shards(tmp_path / "acts", {"maps": MAPS}, ())
    make_file(tmp_path / "shard-00000.h5", {"maps": MAPS})
    listed = json.loads((tmp_path / "acts/index.json").read_text())
    listed["shards"][0]["name"] = "../shard-00000.h5"
    (tmp_path / "acts/index.json").write_text(json.dumps(listed))
    with pytest.raises(FormatError):
        activations.open(tmp_path / "acts")


@settings(max_examples=100, deadline=None)
@given(text=st.binary(max_size=200) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
def test_any_index_raises_only_our_errors(text: bytes | str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("index.json", "plan.json"):
            (Path(folder) / name).write_bytes(text if isinstance(text, bytes) else text.encode())
            with pytest.raises(FmextractError):
                activations.open(folder)
            (Path(folder) / name).unlink()


def heap_places(data: bytes) -> list[int]:
    """Where the sizes of the objects in the global heaps of a valid file stand."""
    places, heap = [], data.find(validation.HEAP)
    while heap >= 0:
        at, end = heap + 16, heap + struct.unpack_from("<Q", data, heap + 8)[0]
        while at <= end - 16:
            places.append(at + 8)
            index, size = struct.unpack_from("<H6xQ", data, at)
            at += 16 + -(-size // 8) * 8 if index else size
        heap = data.find(validation.HEAP, heap + 1)
    return places


@pytest.mark.parametrize("wrong", [0, 7, 2**63, 2**64 - 1, 2**64 - 16])
def test_heaps_that_libhdf5_would_walk_for_ever(small: tuple[bytes, Path], wrong: int) -> None:
    valid, path = small
    places = heap_places(valid)
    assert len(places) > 10
    for place in places[::5]:
        path.write_bytes(valid[:place] + wrong.to_bytes(8, "little") + valid[place + 8 :])
        with contextlib.suppress(DamagedError):
            read_everything(path)


def with_filters(path: Path, stages: list[tuple[int, int, tuple[int, ...]]], payload: bytes | None = None) -> None:
    """Other filters of the activations; the chunks lie as they were, or are `payload`."""
    with h5py.File(path, "r+") as file:
        old = file["layers/maps/activation"]
        scales, plist = [axis[0] for axis in old.dims], h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk(old.chunks)
        for stage in stages:
            plist.set_filter(*stage)
        space = h5py.h5s.create_simple(old.shape, (h5py.h5s.UNLIMITED, *old.shape[1:]))
        del file["layers/maps/activation"]
        made = h5py.Dataset(h5py.h5d.create(file.id, b"layers/maps/activation", old.id.get_type(), space, plist))
        for axis, scale in zip(made.dims, scales, strict=True):
            axis.attach_scale(scale)
        for at in range(old.id.get_num_chunks()):
            offset = old.id.get_chunk_info(at).chunk_offset
            made.id.write_direct_chunk(offset, payload or old.id.read_direct_chunk(offset)[1])


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([(5, 1, (8, 0, 4, 1, 4, 0, 0, 0))], "the filter 5"),  # n-bit, of integers of no bits
        ([(1, 1, (1,)), (1, 1, (1,))], "the filter 1 more than once"),
        ([(65535, 1, ())], "the filter 65535"),
    ],
)
def test_filters_that_libhdf5_is_not_given(
    tmp_path: Path, stages: list[tuple[int, int, tuple[int, ...]]], said: str
) -> None:
    path = tmp_path / "a.h5"
    make_file(path, {"maps": MAPS})
    with_filters(path, stages)
    with pytest.raises(FormatError, match=said):
        activations.open(path)


def test_a_shuffle_of_other_bytes_than_the_values_have(tmp_path: Path) -> None:
    """libhdf5 sets the client data itself when a dataset is made, so that they are changed where they lie."""
    path = tmp_path / "a.h5"
    make_file(path, {"maps": MAPS})
    with_filters(path, [(2, 1, (4,)), (1, 1, (1,))])
    content = path.read_bytes()
    place = content.rindex(b"shuffle\0") + 8
    path.write_bytes(content[:place] + b"\x02" + content[place + 1 :])
    with pytest.raises(FormatError, match=r"the filter 2 with the client data \(2,\)"):
        activations.open(path)


def test_a_chunk_that_libhdf5_would_inflate_without_end(tmp_path: Path) -> None:
    """Ours is bounded; one with a checksum behind it goes through libhdf5."""
    path = tmp_path / "a.h5"
    make_file(path, {"maps": MAPS})
    with_filters(path, [(2, 1, (4,)), (1, 1, (1,)), (3, 1, ())], zlib.compress(bytes(2**26), 9))
    with activations.open(path) as acts, pytest.raises(DamagedError, match=r"a chunk of .* bytes has"):
        acts["maps"][...]


@pytest.mark.parametrize("rows", [1, 600, 5000, 9000])
def test_columns_of_any_length_are_no_danger(tmp_path: Path, rows: int) -> None:
    path = tmp_path / "a.h5"
    make_file(path, {"fc": np.zeros((rows, 1), np.float32)})
    with activations.open(path) as acts:
        assert len(acts.keys) == rows


@pytest.mark.parametrize(
    "how", [{}, {"chunks": (4,), "shuffle": True}, {"chunks": (4,), "shuffle": True, "compression": 4}]
)
def test_texts_in_one_piece_or_through_other_filters_are_read(tmp_path: Path, how: Any) -> None:
    """As h5repack writes them, with -l CONTI and -f SHUF."""
    path = tmp_path / "a.h5"
    keys = [f"ö{i}" for i in range(len(MAPS))]
    make_file(path, {"maps": MAPS}, keys=keys)
    with h5py.File(path, "r+") as file:
        attributes = {k: v for k, v in file["key"].attrs.items() if k not in ("CLASS", "NAME", "REFERENCE_LIST")}
        del file["key"]
        file.create_dataset("key", data=keys, dtype=h5py.string_dtype(), **how).attrs.update(attributes)
    with activations.open(path) as acts:
        assert list(acts.keys) == keys
        assert np.array_equal(acts["maps"][...], MAPS)


def test_a_checksum_by_h5py_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    make_file(path, {"maps": MAPS})
    with h5py.File(path, "r+") as file:
        old = file["layers/maps/activation"]
        scales, chunks = [axis[0] for axis in old.dims], old.chunks
        del file["layers/maps/activation"]
        made = file["layers/maps"].create_dataset(
            "activation", data=MAPS, chunks=chunks, shuffle=True, compression="gzip", fletcher32=True,
            maxshape=(None, *MAPS.shape[1:]),
        )  # fmt: skip
        for axis, scale in zip(made.dims, scales, strict=True):
            axis.attach_scale(scale)
    with activations.open(path) as acts:
        np.testing.assert_array_equal(acts["maps"][...], MAPS)
