"""One file: what is in it, what its digest covers, what a hostile or damaged one may not do."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import shardfiles
from files import COLUMNS
from shardfiles import INFO, layer, table, values

from fmextract.errors import DamagedError, FmextractError, FormatError, LayerError, NoSpace, OutputError
from fmextract.reading.files import File, Part
from fmextract.records import Field
from fmextract.storage import contents, durable, merging
from fmextract.storage.digest import content_digest
from fmextract.storage.layout import escape_name, unescape_name
from fmextract.storage.writer import ShardWriter, file_identity, take_written

CONV = layer("layer1/0", (3, 4, 5), "channel y x", field=Field((7.0, 9.0), (2.0, 4.0), (0.5, 1.5)), rel_error=0.01)
TOKENS = layer("blocks.0", (6, 8), "token feature", tap="in", member="0", reducer="tokens", copied=True, mantissa=7)
FC = layer("fc=mean", (10,), "feature", images=8)
LAYERS = (CONV, TOKENS, FC)


def arrays_of(rows: int, seed: int = 0) -> dict[Any, np.ndarray]:
    return {spec: values(spec, rows, seed) for spec in LAYERS}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.h5"


# -------------------------------------------------------------------------------------------------------------- layout


def test_layout(path: Path) -> None:
    arrays = arrays_of(9)
    samples = table(range(40, 49), labels=[3] * 8 + [None], status=[0] * 8 + [2])
    stats = {CONV.name: {"mean": np.arange(3.0), "top_value": np.ones((3, 2)), "top_sample": np.ones((3, 2), int)}}
    info = replace(INFO, extra={"warm": True, "seconds": 1.5})
    shardfiles.write(
        path, arrays, start=40, info=info, samples=samples, stats=stats, layer_attrs={FC.name: {"sparsity": 0.5}}
    )
    with h5py.File(path) as file:
        assert list(file["layers"]) == ["layer1%2F0", "blocks.0", "fc=mean"]
        for spec, array in arrays.items():
            stored = file["layers"][escape_name(spec.name)]["activation"]
            np.testing.assert_array_equal(stored, array)
            assert stored.maxshape == (None, *spec.shape)
            assert stored.chunks == spec.chunk
            assert np.isnan(stored.fillvalue)
            names = [dim[0].name.rpartition("/")[2] for dim in stored.dims]
            assert names == ["sample", *spec.axes]
            assert all(len(dim) == 1 for dim in stored.dims)
        assert file["sample"][:].tolist() == list(range(40, 49))
        assert file["key"].asstr()[8] == "photos/0048.jpg"
        assert file["status"][:].tolist() == [0] * 8 + [2]
        assert file["label"][:].tolist() == [3] * 8 + [-1]
        assert file["status"].attrs["flag_meanings"].split()[2] == "could_not_be_decoded"
        conv = file["layers/layer1%2F0"]
        assert conv["y"][:].tolist() == [0.5, 2.5, 4.5, 6.5]
        assert conv["x"][:].tolist() == [1.5, 5.5, 9.5, 13.5, 17.5]
        assert conv["channel"].dtype == np.int32
        assert conv["stats/top_value"].dims[1][0] == conv["stats/k"]
        assert conv["stats/mean"].dims[0][0] == conv["channel"]
        assert conv.attrs["module"] == "layer1/0"
        assert "member" not in conv.attrs
        assert file.attrs["warm"] == 1
        assert file.attrs["warm"].dtype == np.uint8
        assert file["layers/fc=mean"].attrs["sparsity"] == 0.5
        assert json.loads(file.attrs["fmextract_config"]) == INFO.config


def test_the_nouns_come_back(path: Path) -> None:
    samples = table(range(9), labels=["cat", None, "ünï"] * 3, message=["", "no such file", ""] * 3)
    info = replace(INFO, extra={"note": "with ünï"})
    shardfiles.write(path, arrays_of(9), samples=samples, info=info)
    with contents.open_shard(path) as file:
        assert [contents.read_layer(group) for group in file["layers"].values()] == list(LAYERS)
        assert contents.read_info(file) == info
        assert contents.read_samples(file) == samples
        part = contents.read_samples(file, slice(2, 5))
        assert (part.start, part.keys) == (2, samples.keys[2:5])


def test_what_a_process_has_written_is_what_is_found_there(path: Path) -> None:
    whole = replace(CONV, name="ünï/%", copied=True, erf_size=3.0, near_zero_below=np.float32(0.1), number="conv#1")
    whole = replace(whole, field=Field((7, 9), (2, 4), (0.5, 1.5), bound=True, has_global=True))
    counts = replace(layer("count", (2, 3), "channel axis_1"), dtype="int16", chunk=(4, 1, 3))
    attrs = {"effective_dimension": np.float64("nan"), "effective_dimension_rows": np.int64(9), "nonfinite": 2}
    later = {"warm": True, "said": {"a": [1, None]}, "pairs": np.arange(2, dtype=np.float32), "absent": None}
    samples = table(range(9), labels=[1, None, 3] * 3, columns={"sample": ["a"] * 9, "lists": [[1.0, 2.0]] * 9})
    shardfiles.write(
        path,
        {spec: values(spec, 9) for spec in (whole, TOKENS, FC, counts)},
        samples=samples,
        info=replace(INFO, extra={"label_names": '["x", "y"]'}),
        stats={whole.name: {"mean": np.arange(3.0)}},
        layer_attrs={whole.name: attrs, FC.name: later},
        root_attrs={"throughput": {"images": 9, "seconds": 1.5, "busy_seconds": {"decode": 1.0}}},
    )
    with contents.open_shard(path) as file:
        found = contents.validate(file)
    written = take_written(file_identity(path.stat()))
    assert written is not None
    known = written.contents
    assert list(known.layers) == list(found.layers) == [whole.name, TOKENS.name, FC.name, counts.name]
    assert repr(known) == repr(found)  # types too, and arrays, which know no equality


def test_what_a_process_has_written_is_counted_as_it_is_when_read(path: Path) -> None:
    counts = replace(layer("count", (2, 3), "axis_1 axis_2"), dtype="int16", chunk=(4, 1, 3))
    stats = {
        "count": np.array([9, 0, 7]),
        "zero_fraction": np.array([1 / 3, np.nan, 2 / 7]),
        "nonfinite": np.array([0, 9, 2]),
        "mean": np.arange(3.0),
    }
    shardfiles.write(
        path,
        {spec: values(spec, 9) for spec in (CONV, FC, counts)},
        stats={CONV.name: stats, FC.name: {"mean": np.zeros(FC.shape[0])}},
        layer_attrs={counts.name: {"nonfinite": np.int64(5)}},
    )
    written = take_written(file_identity(path.stat()))
    assert written is not None
    assert written.totals.keys() == {CONV.name, counts.name}  # of the other not enough is known
    read = File(Part(path))
    assert {name: read.totals(name) for name in written.totals} == dict(written.totals)
    assert (written.totals[CONV.name].zeros, written.totals[CONV.name].nonfinite) == (5, 11)


def test_attributes_of_a_layer_lie_in_its_header_and_large_ones_beside_it(path: Path) -> None:
    heaps = {}
    for name, size in (("few", 0), ("many", 0), ("large", 20_000)):
        attrs = {} if name == "few" else {f"more_{number}": np.int64(number) for number in range(40)}
        large = {"large": np.arange(float(size))} if size else {}
        shardfiles.write(path, {FC: values(FC, 3)}, layer_attrs={FC.name: attrs | large})
        heaps[name] = path.read_bytes().count(b"FRHP")
        with h5py.File(path) as file:
            stored = file["layers"][FC.name].attrs
            assert {name: stored[name] for name in attrs} == attrs
            assert not size or np.array_equal(stored["large"], large["large"])
    assert heaps["few"] == heaps["many"] < heaps["large"]


def test_only_the_file_that_was_written_last_is_known_and_once(path: Path) -> None:
    def write(at: Path) -> None:
        shardfiles.write(at, {FC: values(FC, 3)})

    other = path.with_name("b.h5")
    write(path)
    identity = file_identity(path.stat())
    write(other)
    assert take_written(identity) is None
    write(path)
    path.rename(other)
    assert take_written(file_identity(other.stat())) is not None
    assert take_written(file_identity(other.stat())) is None
    write(path)
    with path.open("ab") as file:
        file.write(b"x")
    assert take_written(file_identity(path.stat())) is None


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([1, None, 2**40], [1, None, 2**40]),
        ([np.int64(4), 5, 6], [4, 5, 6]),
        (["a", None, "b"], ["a", None, "b"]),
        ([1, "b", None], ["1", "b", None]),
        ([2**70, 1, 2], [str(2**70), "1", "2"]),
    ],
)
def test_labels(path: Path, labels: list[Any], expected: list[Any]) -> None:
    shardfiles.write(path, {FC: values(FC, 3)}, samples=table(range(3), labels=labels))
    with contents.open_shard(path) as file:
        assert contents.read_samples(file).labels == expected


def test_text_that_hdf5_cannot_hold_is_escaped(path: Path) -> None:
    shardfiles.write(path, {FC: values(FC, 2)}, samples=table(range(2), keys=["a\0b", "c\udcff"]))
    with contents.open_shard(path) as file:
        assert contents.read_samples(file).keys == ["a\\x00b", "c\\udcff"]


def test_integers_fill_with_zero_and_channel_splits_need_not_come_out_even(path: Path) -> None:
    counts = layer("counts", (5, 2), "channel x", dtype="int32", chunk=(2, 3, 2))
    array = values(counts, 3)
    shardfiles.write(path, {counts: array})
    with h5py.File(path) as file:
        stored = file["layers/counts/activation"]
        assert stored.fillvalue == 0
        np.testing.assert_array_equal(stored, array)


def test_old_libraries_can_open_the_file(path: Path) -> None:
    shardfiles.write(path, arrays_of(3))
    assert path.read_bytes()[8] <= 2, "the version of the superblock"


def test_no_torch() -> None:
    code = "import sys; from fmextract.storage import codecs, shards, writer; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["layer4=mean", "a/b%2Fc", "%25", "x[1]", "relu:2", "blöck 1", "%"])
def test_layer_names_reverse(name: str) -> None:
    escaped = escape_name(name)
    assert "/" not in escaped
    assert unescape_name(escaped) == name


# ------------------------------------------------------------------------------------------------------ what is refused


def test_a_missing_chunk_is_refused_and_leaves_no_file(path: Path) -> None:
    writer = ShardWriter(path, range(9), [FC], INFO, "gzip", None)
    writer.write_chunk(0, (0, 0), b"x", b"")
    with pytest.raises(ValueError, match="1 of 2 chunks are missing"):
        writer.finish(table(range(9)))
    assert not path.exists()
    with pytest.raises(ValueError, match="is closed"):
        writer.finish(table(range(9)))


@pytest.mark.parametrize("index", [(2, 0), (0, 1), (-1, 0), (0,), (0, 0, 0)])
def test_a_chunk_off_the_grid_is_refused(path: Path, index: tuple[int, ...]) -> None:
    with ShardWriter(path, range(9), [FC], INFO, "gzip", None) as writer:
        with pytest.raises(ValueError, match="expected a chunk index within"):
            writer.write_chunk(0, index, b"x", b"")
        writer.write_chunk(0, (1, 0), b"x", b"")
        with pytest.raises(ValueError, match="twice"):
            writer.write_chunk(0, (1, 0), b"x", b"")
    assert not path.exists()


def test_columns_of_other_rows_are_refused(path: Path) -> None:
    for rows in (range(1, 10), range(8)):
        with (
            ShardWriter(path, range(9), [FC], INFO, "gzip", None) as writer,
            pytest.raises(ValueError, match="expected columns for rows"),
        ):
            writer.finish(table(rows))


def test_statistics_that_do_not_fit_are_refused(path: Path) -> None:
    unknown = layer("odd", (4, 4), "axis_1 axis_2")
    wrong: list[dict[str, Any]] = [
        {FC.name: {"mean": np.zeros(9)}},
        {FC.name: {"top_value": np.zeros((10, 3)), "top_sample": np.zeros((10, 2))}},
        {FC.name: {"mean": np.zeros((10, 2, 2))}},
        {"odd": {"mean": np.zeros(4)}},
        {"absent": {"mean": np.zeros(4)}},
    ]
    for stats in wrong:
        with pytest.raises(ValueError, match=r"expected|roles"):
            shardfiles.write(path, {FC: values(FC, 3), unknown: values(unknown, 3)}, stats=stats)
        assert not path.exists()


@pytest.mark.parametrize(
    "layers",
    [
        [FC, FC],
        [layer("x" * 256, (1,), "feature")],
        [layer("%" * 86, (1,), "feature")],  # 258 bytes once escaped
        [layer("..", (1,), "feature")],
        [layer("", (1,), "feature")],
        [layer("a\0", (1,), "feature")],
        [layer("a", (2, 2), "token token")],
        [layer("a", (2,), "sample")],
        [layer("a", (2,), "feature", chunk=(4, 3))],
        [layer("a", (2,), "feature", chunk=(0, 2))],
        [layer("a", (2,), "feature", dtype="complex64")],
        [layer("a", (1 << 20,), "feature", images=1024)],
        [layer(str(number), (1,), "feature") for number in range(4001)],
    ],
    ids=lambda layers: layers[0].name[:8] + f" {len(layers)}",
)
def test_layers_that_readers_could_not_open_are_refused(path: Path, layers: list[Any]) -> None:
    with pytest.raises(LayerError):
        ShardWriter(path, range(2), layers, INFO, "gzip", None)
    assert not path.exists()


def test_many_layers(path: Path) -> None:
    many = {spec: values(spec, 2) for spec in (layer(f"conv{number}", (2,), "feature") for number in range(150))}
    digest = shardfiles.write(path, many)
    assert content_digest(path) == digest
    with h5py.File(path) as file:
        assert file["layers/conv149/activation"].dims[0][0] == file["sample"]


# ------------------------------------------------------------------------------------------------------------ full disk


def test_errors_of_the_disk() -> None:
    path = Path("out/shard.h5")
    assert isinstance(durable.disk_error(path, OSError(errno.ENOSPC, "")), NoSpace)
    flush = RuntimeError("Can't decrement id ref count (unable to extend file, errno = 28, error message = 'No space')")
    assert isinstance(durable.disk_error(path, flush), NoSpace)
    other = durable.disk_error(path, OSError(errno.EROFS, ""))
    assert isinstance(other, OutputError)
    assert "shard.h5" in str(other)
    assert "Read-only" in str(other)


def test_an_unwritable_place_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file"):
        ShardWriter(tmp_path / "no" / "a.h5", range(2), [FC], INFO, "gzip", None)


FULL_DISK = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import numpy as np, os
from pathlib import Path
import shardfiles
from fmextract.errors import NoSpace, OutputError
path = Path(sys.argv[1]) / "a.h5"
spec = shardfiles.layer("a", (30000,), "feature")
try:
    shardfiles.write(path, {{spec: np.random.default_rng(0).standard_normal((200, 30000)).astype("f4")}})
except (NoSpace, OutputError) as error:
    print(type(error).__name__, path.exists(), error)
    free = os.statvfs(path.parent)
    print("free", free.f_bavail * free.f_frsize > 700_000)
"""


def test_a_file_that_cannot_grow(tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))\n"
    done = subprocess.run(
        [sys.executable, "-c", limit + FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("OutputError False")


@pytest.mark.skipif(
    subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode != 0
    if shutil.which("unshare")
    else True,
    reason="a small file system can only be made where user namespaces are allowed",
)
def test_a_full_disk(tmp_path: Path) -> None:
    script = tmp_path / "full.py"
    script.write_text(FULL_DISK)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f'mount -t tmpfs -o size=1m tmpfs "{disk}" && exec "{sys.executable}" "{script}" "{disk}"'
    done = subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("NoSpace False")
    assert "free True" in done.stdout


# ------------------------------------------------------------------------------------------------------ content digest


def full_file(path: Path) -> str:
    stats = {FC.name: {"mean": np.arange(10.0), "top_value": np.ones((10, 2))}}
    return shardfiles.write(path, arrays_of(9), samples=table(range(9), labels=["cat"] * 9), stats=stats)


def test_digest_is_that_of_the_closed_file_and_of_every_copy(path: Path, tmp_path: Path) -> None:
    digest = full_file(path)
    assert content_digest(path) == digest
    assert full_file(tmp_path / "b.h5") == digest
    with h5py.File(path) as file:
        assert file.attrs["content_digest"] == digest


def flip_chunk(file: h5py.File) -> None:
    data = file["layers/blocks.0/activation"]
    mask, payload = data.id.read_direct_chunk((4, 0, 0))
    data.id.write_direct_chunk((4, 0, 0), payload[:-1] + bytes([payload[-1] ^ 1]), mask)


def mask_chunk(file: h5py.File) -> None:
    data = file["layers/blocks.0/activation"]
    mask, payload = data.id.read_direct_chunk((8, 0, 0))
    data.resize(8, axis=0)  # drops the chunk: writing over it would keep its mask
    data.resize(9, axis=0)
    data.id.write_direct_chunk((8, 0, 0), payload, mask | 1)


def swap_scale(file: h5py.File) -> None:
    first, second = file["layers/fc=mean/feature"], file["layers/blocks.0/feature"]
    file["layers/fc=mean/stats/mean"].dims[0].detach_scale(first)
    file["layers/fc=mean/stats/mean"].dims[0].attach_scale(second)


def rewrite_type(file: h5py.File) -> None:
    means = file["layers/fc=mean/stats/mean"][:]
    del file["layers/fc=mean/stats/mean"]
    file["layers/fc=mean/stats/mean"] = means.astype(np.float32)


CHANGES: dict[str, Callable[[h5py.File], Any]] = {
    "attribute": lambda file: file.attrs.modify("model", "resnet51"),
    "attribute added": lambda file: file["layers/blocks.0"].attrs.create("note", 1),
    "attribute type": lambda file: file["layers/blocks.0"].attrs.create("call", np.int32(1)),
    "attribute removed": lambda file: file["layers/blocks.0"].attrs.pop("mantissa"),
    "key": lambda file: file["key"].__setitem__(3, "other.jpg"),
    "label": lambda file: file["label"].__setitem__(3, "dog"),
    "status": lambda file: file["status"].__setitem__(3, 1),
    "row number": lambda file: file["sample"].__setitem__(3, 7),
    "coordinate": lambda file: file["layers/layer1%2F0/y"].__setitem__(0, 9),
    "statistic": lambda file: file["layers/fc=mean/stats/mean"].__setitem__(0, 9),
    "chunk": flip_chunk,
    "filter mask": mask_chunk,
    "scale": swap_scale,
    "type": rewrite_type,
    "object added": lambda file: file.create_group("extra"),
    "object removed": lambda file: file["layers/fc=mean"].__delitem__("stats"),
    "layer renamed": lambda file: file["layers"].move("fc=mean", "fc=max"),
    "rows": lambda file: file["layers/fc=mean/activation"].resize(8, axis=0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_digest_covers(path: Path, change: str) -> None:
    digest = full_file(path)
    with h5py.File(path, "r+", libver=("earliest", "v110")) as file:
        CHANGES[change](file)
    try:
        assert content_digest(path) != digest
    except FormatError:
        assert change in ("rows",)


def everything_read(path: Path) -> list[Any]:
    """What h5py shows of a file: names, attributes, types, values."""
    seen: list[Any] = []

    def visit(name: str, node: Any) -> None:
        attrs = {key: repr(node.attrs[key]) for key in node.attrs if key not in ("DIMENSION_LIST", "REFERENCE_LIST")}
        seen.append((name, attrs))
        if isinstance(node, h5py.Dataset):
            seen.append((node.shape, node.dtype.str, node[()].tobytes() if node.dtype.kind != "O" else list(node[()])))

    with h5py.File(path) as file:
        visit("/", file)
        file.visititems(visit)
    return seen


def test_no_flipped_bit_changes_what_is_read_unseen(path: Path) -> None:
    digest = shardfiles.write(path, {FC: values(FC, 2)}, samples=table(range(2), labels=["cat", "dog"]))
    sound, original = everything_read(path), path.read_bytes()
    flipped_path = path.with_name("flipped.h5")
    rng, outcomes = np.random.default_rng(0), {"seen": 0, "harmless": 0}
    for bit in rng.integers(0, 8 * len(original), 200):
        flipped = bytearray(original)
        flipped[bit // 8] ^= 1 << bit % 8
        flipped_path.write_bytes(flipped)
        try:
            with contents.open_shard(flipped_path) as file:
                stored = file.attrs["content_digest"]
            unchanged = content_digest(flipped_path) == stored == digest
            shown = everything_read(flipped_path) if unchanged else None
        except (FmextractError, RuntimeError, OSError):  # ours, or h5py's own: some bits of links only it looks at
            unchanged = False
        outcomes["harmless" if unchanged else "seen"] += 1
        assert not unchanged or shown == sound, f"bit {bit} changes values, and no digest"
    assert min(outcomes.values()) > 10, outcomes


# ------------------------------------------------------------------------------------------------------- hostile files


def external_link(file: h5py.File) -> None:
    file["layers/more"] = h5py.ExternalLink("/etc/passwd", "/")


def soft_link(file: h5py.File) -> None:
    file["layers/again"] = h5py.SoftLink("/layers/fc=mean")


def loop(file: h5py.File) -> None:
    file["layers/fc=mean/self"] = file["layers"]


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((9,), np.uint8)
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (9,))
    del file["status"]
    file.create_virtual_dataset("status", layout)


def external_storage(file: h5py.File) -> None:
    del file["status"]
    file.create_dataset("status", (9,), np.uint8, external=[("/etc/passwd", 0, 9)])


def huge_claim(file: h5py.File) -> None:
    for name in (*COLUMNS, "label"):
        file[name].resize(1 << 40, axis=0)
    for group in file["layers"].values():
        group["activation"].resize(1 << 40, axis=0)


def unwritten(file: h5py.File) -> None:
    del file["layers/fc=mean/feature"]
    file["layers/fc=mean"].create_dataset("feature", (1 << 40,), np.int8)


def huge_chunk(file: h5py.File) -> None:
    file["layers/fc=mean"].create_dataset("big", (1,), np.float64, maxshape=(None,), chunks=(1 << 28,))


def odd_type(file: h5py.File) -> None:
    file["layers/fc=mean/flag"] = np.array([True, False])


def named_type(file: h5py.File) -> None:
    file["layers/type"] = np.dtype("f4")


def no_column(file: h5py.File) -> None:
    del file["key"]


def short_column(file: h5py.File) -> None:
    file["key"].resize(8, axis=0)


def no_activation(file: h5py.File) -> None:
    del file["layers/fc=mean/activation"]


@pytest.mark.parametrize(
    "attack",
    [
        external_link,
        soft_link,
        loop,
        virtual,
        external_storage,
        huge_claim,
        unwritten,
        huge_chunk,
        odd_type,
        named_type,
        no_column,
        short_column,
        no_activation,
    ],
)
def test_hostile_files_are_refused(path: Path, attack: Callable[[h5py.File], None]) -> None:
    full_file(path)
    contents.open_shard(path).close()
    with h5py.File(path, "r+", libver=("earliest", "v110")) as file:
        attack(file)
    with pytest.raises(FormatError, match=r"a\.h5"):
        contents.open_shard(path)


def test_other_files_are_refused_with_the_reason(path: Path) -> None:
    with pytest.raises(OutputError, match="there is no file"):
        contents.open_shard(path)
    path.write_bytes(b"not HDF5" * 100)
    with pytest.raises(FormatError, match="is not an HDF5 file"):
        contents.open_shard(path)
    with h5py.File(path, "w") as file:
        file["x"] = 1
    with pytest.raises(FormatError, match="was not written by fmextract"):
        contents.open_shard(path)
    full_file(path)
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = 7
    with pytest.raises(FormatError, match=r"version 7.*up to 1.*upgrade"):
        contents.open_shard(path)


def test_a_file_without_rows_is_none_of_ours(path: Path) -> None:
    full_file(path)
    with h5py.File(path, "r+") as file:
        for name in (*COLUMNS, "label"):
            file[name].resize(0, axis=0)
        for group in file["layers"].values():
            group["activation"].resize(0, axis=0)
    with pytest.raises(FormatError, match="holds no rows"):
        contents.open_shard(path)


def test_a_missing_chunk_is_never_read_as_fill(path: Path) -> None:
    with h5py.File(path, "w") as file:
        data = file.create_dataset("x", (8,), "f4", chunks=(4,))
        data[:4] = 1
        assert contents.read_chunk(data, (0,))[1]
        with pytest.raises(DamagedError, match=r"no chunk \(1,\)"):
            contents.read_chunk(data, (1,))


# ----------------------------------------------------------------------------------------------------------------- pack


@pytest.mark.parametrize("codec", ["gzip", "zstd", "lz4", "none"])
def test_pack_equals_the_file_written_at_once(tmp_path: Path, codec: str) -> None:
    arrays = arrays_of(21)
    labels = [f"class {row % 3}" for row in range(21)]
    cuts, parts = [0, 8, 16, 21], []
    for start, stop in pairwise(cuts):
        parts.append(tmp_path / f"{start}.h5")
        samples = table(range(start, stop), labels=labels[start:stop])
        part = {spec: array[start:stop] for spec, array in arrays.items()}
        shardfiles.write(parts[-1], part, start=start, samples=samples, codec=codec)
    stats = {FC.name: {"mean": np.arange(10.0)}}
    whole = shardfiles.write(
        tmp_path / "whole.h5", arrays, samples=table(range(21), labels=labels), codec=codec, stats=stats
    )
    packed = merging.pack(parts, tmp_path / "packed.h5", stats=stats)
    assert packed == whole == content_digest(tmp_path / "packed.h5")


def test_pack_takes_other_attributes_and_mixed_labels(tmp_path: Path) -> None:
    parts = [tmp_path / "0.h5", tmp_path / "1.h5"]
    shardfiles.write(parts[0], {FC: values(FC, 8)}, samples=table(range(8), labels=[1] * 7 + [None]))
    shardfiles.write(parts[1], {FC: values(FC, 2)}, start=8, samples=table(range(8, 10), labels=["a", None]))
    merging.pack(
        parts, tmp_path / "out.h5", info=replace(INFO, history="packed"), layer_attrs={FC.name: {"sparsity": 1}}
    )
    with contents.open_shard(tmp_path / "out.h5") as file:
        assert contents.read_info(file).history == "packed"
        assert contents.read_samples(file).labels == ["1"] * 7 + [None, "a", None]
        assert file["layers/fc=mean"].attrs["sparsity"] == 1


def drop_chunk(path: Path) -> None:
    with h5py.File(path, "r+", libver=("earliest", "v110")) as file:
        file["layers/fc=mean/activation"].resize(0, axis=0)
        file["layers/fc=mean/activation"].resize(3, axis=0)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"start": 16}, "starts at row 16, expected 8"),
        ({"start": 0}, "starts at row 0, expected 8"),
        ({"info": replace(INFO, weights_sha256="11")}, "another weights_sha256"),
        ({"codec": "none"}, "other layers, chunks or filters"),
        ({"spec": layer("fc=mean", (11,), "feature", images=8)}, "other layers, chunks or filters"),
        ({"spec": layer("fc=mean", (10,), "feature", images=8, rel_error=0.5)}, "other layers"),
        ({"damage": drop_chunk}, "has no chunk"),
    ],
)
def test_pack_refuses_what_does_not_belong_together(tmp_path: Path, second: dict[str, Any], message: str) -> None:
    one, two, out = tmp_path / "one.h5", tmp_path / "two.h5", tmp_path / "out.h5"
    shardfiles.write(one, {FC: values(FC, 8)})
    spec, damage = second.pop("spec", FC), second.pop("damage", None)
    shardfiles.write(two, {spec: values(spec, 3)}, **{"start": 8, **second})
    if damage:
        damage(two)
    with pytest.raises(FormatError, match=message):
        merging.pack([one, two], out)
    assert not out.exists()


def test_pack_refuses_parts_that_split_a_chunk(tmp_path: Path) -> None:
    one, two, out = tmp_path / "one.h5", tmp_path / "two.h5", tmp_path / "out.h5"
    shardfiles.write(one, {FC: values(FC, 7)})
    shardfiles.write(two, {FC: values(FC, 3)}, start=7)
    with pytest.raises(FormatError, match="in the middle of a chunk of fc=mean"):
        merging.pack([one, two], out)
    assert sorted(tmp_path.iterdir()) == [one, two]
