"""Files that are sound HDF5 and whose structure is anything, given to everything that reads: only our own errors.

    python benchmarks/fuzz_structure.py [--minutes 60] [--seed 0] [--one SEED] [--entries N] [--edits NAME,NAME]

A small run is made; copies of its file, its directory and its unfinished directory are changed in a few places (types,
shapes, names, links, references, filters, values, the JSON within and beside), the digests are made again so that the
change alone is wrong, and every command that reads is run on each. What counts as a finding: an exception that is not
ours or does not name the output, JSON that is not JSON, a wait of minutes, a gibibyte of memory, and the end of the
process, which is why the readers run in a process of their own. Prints one line a finding, with the seed that makes it
again, and a JSON summary; the exit status says whether there was one.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import h5py
import numpy as np

MODEL = """
import torch
from torch import nn


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(inplace=True), nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.relu(self.conv(x)).mean((2, 3)))


def small():
    torch.manual_seed(0)
    return Small()
"""
RUN = ("--preprocess", "size=12,crop=8,mean=0.5,std=0.5", "--precision", "fp32", "--batch-size", "2", "--workers", "1",
       "--device", "cpu", "-l", "conv", "-l", "relu", "-l", "fc")  # fmt: skip
ROWS = 8
HANG_SECONDS, MEMORY_BYTES, ADDRESS_BYTES = 120, 1 << 30, 24 << 30


# -------------------------------------------------------------------------------------------------------- the subjects


def make_subjects(folder: Path) -> None:
    """A run as a file, as a directory of shards, and as one that was not finished, of photos and a model beside."""
    import PIL.Image

    photos = folder / "photos"
    photos.mkdir()
    random = np.random.default_rng(0)
    for number in range(ROWS):
        pixels = random.integers(0, 256, (16, 12, 3), np.uint8)
        PIL.Image.fromarray(pixels).save(photos / f"{number}.png")
    (photos / "5.png").write_bytes(b"\x89PNG broken")
    (folder / "model.py").write_text(MODEL)
    for out, options in (("acts.h5", ()), ("acts", ("--shard-size", "1"))):
        assert extract(folder, folder / out, *options) == 0, f"the run of {out} failed"
    shutil.copytree(folder / "acts", folder / "begun")
    (folder / "begun" / "index.json").unlink()
    last = max((folder / "begun").glob("shard-*.h5"))
    last.unlink()
    last.with_suffix(".json").unlink()


def extract(folder: Path, out: Path, *options: str) -> int:
    from fmextract import cli

    # One of eight is broken: status 3 says so.
    code = cli.main(["extract", str(folder / "photos"), "-m", f"{folder}/model.py:small", "-o", str(out),
                     "--max-failures", "3", *RUN, *options, "--debug"])  # fmt: skip
    return 0 if code == 3 else code


# ---------------------------------------------------------------------------------------------------------- the edits


def odd_attribute(random: Random, file: h5py.File) -> Any:
    """A value that an attribute could have."""
    text = h5py.string_dtype()
    return random.choice(
        [
            lambda: -1, lambda: 0, lambda: 2**63 - 1, lambda: np.uint64(2**64 - 1), lambda: np.int8(-128), lambda: True,
            lambda: np.nan, lambda: np.inf, lambda: -np.inf, lambda: 1e308, lambda: np.float16(0.5), lambda: -1e30,
            lambda: "", lambda: "x" * 70000, lambda: "../../x", lambda: "\u202eabc\n", lambda: np.bytes_(b"\xff\xfe"),
            lambda: np.bytes_(b"a\0b"), lambda: "nan", lambda: "[]", lambda: "{}", lambda: "null", lambda: "7",
            lambda: np.zeros((0,)), lambda: np.zeros(2), lambda: np.full(2, np.nan), lambda: np.full(2, -1e30),
            lambda: np.zeros((3,), int), lambda: np.zeros((2, 2)), lambda: np.array(["a", "b"], dtype=text),
            lambda: np.full(2, 2**62), lambda: np.array([], dtype=text), lambda: h5py.Empty("f4"),
            lambda: h5py.Empty(text), lambda: file.ref, lambda: np.array([file.ref] * 2, dtype=h5py.ref_dtype),
            lambda: np.zeros((), [("a", "i4"), ("b", "f8")]), lambda: np.zeros((), np.complex64),
            lambda: np.array(1, dtype=h5py.enum_dtype({"A": 1, "B": 2})), lambda: np.void(b"opaque"),
        ]
    )()  # fmt: skip


def odd_json(random: Random) -> Any:
    return random.choice(
        [None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**40, -(10**400), 0.5, -2.5, 1e308, 1e-320, "", "x", "NaN",
         "../..", "\x00", "\ud800", [], [None, None], [0, 0], [-1, 5], [2**40, 2**40], ["a", "b"], [1.5, 2.5], [[]],
         [10**400, 1], {}, {"x": None}, {"": []}, [1] * 5000, deep(200), deep(20)]
    )  # fmt: skip


def deep(levels: int) -> Any:
    made: Any = 1
    for level in range(levels):
        made = [made] if level % 2 else {"a": made}
    return made


def edited_json(random: Random, value: Any) -> Any:
    """The value with one place in it changed, removed or added."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        name = random.choice(list(value))
        what = random.random()
        if what < 0.15:
            return {key: one for key, one in value.items() if key != name}
        if what < 0.2:
            return {**value, "another": odd_json(random)}
        return {**value, name: edited_json(random, value[name])}
    if isinstance(value, list) and value and random.random() < 0.7:
        at = random.randrange(len(value))
        if random.random() < 0.2:
            return value[:at] + value[at + 1 :]
        return [*value[:at], edited_json(random, value[at]), *value[at + 1 :]]
    return odd_json(random)


def json_text(random: Random, said: str) -> str:
    """A JSON text with one change."""
    if random.random() < 0.1:
        return random.choice(
            ["", "{", "NaN", "[NaN]", "[" * 100_000, '{"a": Infinity}', "7", "null", said[:-1], "\ufeff{}"]
        )
    try:
        return json.dumps(edited_json(random, json.loads(said)))
    except ValueError:
        return json.dumps(odd_json(random))


def nodes(file: h5py.File) -> list[str]:
    paths = ["/"]
    file.visit(lambda name: paths.append(f"/{name}"))
    return paths


def datasets(file: h5py.File) -> list[str]:
    return [path for path in nodes(file) if isinstance(file[path], h5py.Dataset)]


def some_attribute(random: Random, file: h5py.File) -> tuple[Any, str]:
    node = file[random.choice(nodes(file))]
    names = [name for name in node.attrs if name not in ("DIMENSION_LIST", "REFERENCE_LIST")]
    return node, random.choice(names or ["note"])


def attribute_of_another_kind(random: Random, file: h5py.File) -> None:
    node, name = some_attribute(random, file)
    node.attrs[name] = odd_attribute(random, file)


def attribute_of_a_layer(random: Random, file: h5py.File) -> None:
    group = file["layers"][random.choice(list(file["layers"]))]
    name = random.choice(
        [*group.attrs, "erf_size", "nonfinite", "clipped", "mantissa", "effective_dimension", "rf_whole"]
    )
    group.attrs[name] = odd_attribute(random, file)


def attribute_removed(random: Random, file: h5py.File) -> None:
    node, name = some_attribute(random, file)
    node.attrs.pop(name, None)


def attribute_renamed(random: Random, file: h5py.File) -> None:
    node, name = some_attribute(random, file)
    if name in node.attrs:
        h5py.h5a.rename(
            node.id, name.encode(), random.choice([b"CLASS", b"NAME", b"format", b"\xff\xfe", b"a/b", b"x"])
        )


def attribute_large(random: Random, file: h5py.File) -> None:
    node, name = some_attribute(random, file)
    node.attrs.pop(name, None)
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # old layouts have no room for it
        node.attrs[name] = np.zeros(10**6)


def json_within(random: Random, file: h5py.File) -> None:
    name = random.choice(["fmextract_config", "preprocess", "preprocess", "versions", "throughput", "smaller_batches"])
    file.attrs[name] = json_text(random, str(file.attrs.get(name, "{}")))


def scales_list(random: Random, file: h5py.File) -> None:
    """DIMENSION_LIST, REFERENCE_LIST, CLASS or NAME of another type, or of references that lead elsewhere."""
    data = file[random.choice(datasets(file))]
    name = random.choice(["DIMENSION_LIST", "DIMENSION_LIST", "REFERENCE_LIST", "CLASS", "NAME"])
    data.attrs.pop(name, None)
    if random.random() < 0.5:
        data.attrs[name] = odd_attribute(random, file)
        return
    lists = h5py.vlen_dtype(h5py.ref_dtype)
    aims = [file.ref, file[random.choice(nodes(file))].ref, h5py.Reference(), data.ref]
    made = np.empty(random.choice([data.ndim, data.ndim, data.ndim + 1, 1]), object)
    for axis in range(len(made)):
        count = random.choice([0, 1, 1, 2, 40])
        made[axis] = np.array([random.choice(aims) for _ in range(count)], dtype=h5py.ref_dtype)
    data.attrs.create("DIMENSION_LIST", made, dtype=lists)


def scales_swapped(random: Random, file: h5py.File) -> None:
    data = file[random.choice(datasets(file))]
    scale = file[random.choice(datasets(file))]
    with contextlib.suppress(RuntimeError, ValueError, OSError, KeyError, TypeError):
        if random.random() < 0.5:
            scale.make_scale(random.choice(["", "y", "a/b", "x" * 300]))
        data.dims[random.randrange(data.ndim)].attach_scale(scale)


def removed(random: Random, file: h5py.File) -> None:
    del file[random.choice(nodes(file)[1:])]


def renamed(random: Random, file: h5py.File) -> None:
    path = random.choice(nodes(file)[1:])
    parent = file[path].parent
    name = random.choice(
        [b"a%2", b"%zz", b"..x", b"\xff\xfe", b"x" * 400, b" ", b"-o", b"stats", b"activation", b"a:2=mean"]
    )
    with contextlib.suppress(ValueError, RuntimeError, OSError, KeyError):
        parent.id.links.move(path.rpartition("/")[2].encode("utf-8", "surrogateescape"), parent.id, name)


def another_dataset(random: Random, file: h5py.File) -> None:
    """In the place of one, of another type, shape, layout, filter or fill value."""
    path = random.choice(datasets(file))
    old = file[path]
    shape, dtype = old.shape, old.dtype
    if random.random() < 0.5:
        shape = random.choice([(), (0,), (1,), shape[:-1], (*shape, 2), (*shape[:-1], 0), (2**20,), shape[::-1]])
    if random.random() < 0.7:
        dtype = random.choice(
            ["i1", "u1", "i8", "u8", "f2", "f4", ">f4", "f8", "S3", "c8", "?", h5py.string_dtype(), h5py.ref_dtype,
             h5py.vlen_dtype("i4"), np.dtype([("a", "f4")]), h5py.enum_dtype({"A": 1}), "V5", np.longdouble]
        )  # fmt: skip
    parent, name = old.parent, path.rpartition("/")[2]
    attrs = [(key, old.attrs[key]) for key in old.attrs if key not in ("REFERENCE_LIST", "CLASS", "NAME")]
    del file[path]
    options: dict[str, Any] = {}
    if shape and 0 not in shape and random.random() < 0.6:
        single = (1,) * len(shape) if max(shape) < 1000 else True  # to write a million chunks takes gigabytes
        options["chunks"] = random.choice([True, tuple(max(1, n // 2) for n in shape), single])
        options |= random.choice(
            [{}, {"compression": "gzip"}, {"compression": "lzf"}, {"fletcher32": True}, {"shuffle": True}]
        )
    with contextlib.suppress(TypeError, ValueError, OSError, RuntimeError):
        if random.random() < 0.3:
            options["fillvalue"] = random.choice([1, -1, np.nan])
        if random.random() < 0.2 and "chunks" in options:
            options["maxshape"] = (None,) * len(shape)
        made = parent.create_dataset(name, shape, dtype, track_order=random.random() < 0.5, **options)
        for key, value in attrs:
            with contextlib.suppress(TypeError, ValueError, OSError, RuntimeError):
                made.attrs[key] = value
        if random.random() < 0.8 and made.dtype.kind in "iuf":
            made[...] = random.choice([0, 1, 100])


def resized(random: Random, file: h5py.File) -> None:
    data = file[random.choice([path for path in datasets(file) if file[path].chunks] or datasets(file))]
    with contextlib.suppress(TypeError, ValueError, OSError, RuntimeError):
        data.resize(random.choice([0, 1, 5, ROWS + 1, 1000, 2**40, 2**62]), axis=0)


def all_resized(random: Random, file: h5py.File) -> None:
    rows = random.choice([0, 1, ROWS + 100, 10**6, 2**40])
    for path in datasets(file):
        if file[path].maxshape[0] is None:
            file[path].resize(rows, axis=0)


def linked(random: Random, file: h5py.File) -> None:
    """A link of any kind in the place of something, or beside it: also in circles, outside, and to nothing."""
    path, aim = random.choice(nodes(file)[1:]), random.choice(nodes(file))
    place = random.choice([path, f"{path}x", f"/layers/{random.choice(list(file['layers']))}/more"])
    link = random.choice(
        [h5py.SoftLink(aim), h5py.SoftLink(place), h5py.SoftLink("/nowhere"), h5py.ExternalLink("acts.h5", aim),
         h5py.ExternalLink("/etc/passwd", "/"), file[aim]]
    )  # fmt: skip
    with contextlib.suppress(ValueError, OSError, RuntimeError, KeyError, TypeError):
        if place in file:
            del file[place]
        file[place] = link


def elsewhere(random: Random, file: h5py.File) -> None:
    """Virtual, or in another file."""
    path = random.choice(datasets(file))
    shape, dtype = file[path].shape, file[path].dtype
    parent, name = file[path].parent, path.rpartition("/")[2]
    del file[path]
    with contextlib.suppress(TypeError, ValueError, OSError, RuntimeError):
        if random.random() < 0.5:
            layout = h5py.VirtualLayout(shape, dtype)
            layout[...] = h5py.VirtualSource(random.choice([".", "acts.h5", "nowhere.h5"]), path, shape)
            parent.create_virtual_dataset(name, layout)
        else:
            parent.create_dataset(name, shape, dtype, external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])


def another_object(random: Random, file: h5py.File) -> None:
    path = random.choice(nodes(file)[1:])
    del file[path]
    file[path] = random.choice([np.dtype("f4"), np.zeros(3), 7, "text"])
    if random.random() < 0.3:
        del file[path]
        file.create_group(path)


def values(random: Random, file: h5py.File) -> None:
    """Values that a type allows and nobody expects."""
    data = file[random.choice(datasets(file))]
    with contextlib.suppress(TypeError, ValueError, OSError, RuntimeError, OverflowError):
        odd: Any
        if data.dtype.kind == "O":
            odd = random.choice(["", "../../etc/passwd", "x" * 5000, b"\xff\xfe", "a\nb\u202e", "/", "\x7f"])
        elif data.dtype.kind == "f":
            odd = random.choice([np.nan, np.inf, -np.inf, -1, 1e308, 0, 1e-320])
        else:
            limits = np.iinfo(data.dtype)
            odd = random.choice([limits.min, limits.max, -1, 0, 1, 10**6])
        if random.random() < 0.5:
            data[...] = odd
        else:
            data[tuple(random.randrange(size) for size in data.shape)] = odd


def a_skipped_filter(random: Random, file: h5py.File) -> None:
    data = file["layers"][random.choice(list(file["layers"]))]["activation"]
    offset = (0,) * data.ndim
    _, payload = data.id.read_direct_chunk(offset)
    data.id.write_direct_chunk(
        offset, random.choice([payload, payload[:5], b"", bytes(99)]), random.choice([1, 2, 3, 2**32 - 1])
    )


EDITS: tuple[Callable[[Random, h5py.File], None], ...] = (
    attribute_of_another_kind, attribute_of_a_layer, attribute_of_a_layer, attribute_of_a_layer, attribute_removed,
    attribute_renamed, attribute_large, json_within, json_within, json_within, scales_list, scales_list, scales_swapped,
    removed, renamed, another_dataset, another_dataset, another_dataset, resized, all_resized, linked, elsewhere,
    another_object, values, values, values, values, a_skipped_filter,
)  # fmt: skip


def change(random: Random, path: Path) -> list[str]:
    """Change a file in one to three places, and make its digest again; returns the names of the edits."""
    done = []
    try:
        with h5py.File(path, "r+", libver=("earliest", "v110")) as file:
            for _ in range(random.choice([1, 1, 1, 2, 3])):
                edit = random.choice(EDITS)
                done.append(edit.__name__)
                # What h5py refuses to make, nobody has to read; and an edit may meet what one before it has left.
                with contextlib.suppress(Exception):
                    edit(random, file)
    except (OSError, RuntimeError, ValueError) as error:
        done.append(f"not closed: {error}")
    return done


def digest_again(path: Path) -> str | None:
    """So that what is wrong is not told by the digest. None where the content cannot be read that far."""
    from fmextract import store
    from fmextract.errors import FmextractError

    try:
        digest = store.content_digest(path)
        with h5py.File(path, "r+") as file:
            file.attrs["content_digest"] = digest
    except (FmextractError, OSError, RuntimeError, TypeError, ValueError, KeyError):
        return None
    return digest


def change_directory(random: Random, folder: Path) -> list[str]:
    """Change a shard, with a record that fits again, or one of the JSON files."""
    from fmextract import index

    shard = random.choice(sorted(folder.glob("shard-*.h5")))
    if random.random() < 0.5:
        path = random.choice([*folder.glob("*.json"), folder / "plan.json"])
        path.write_text(json_text(random, path.read_text()))
        return [path.name]
    done = change(random, shard)
    digest = digest_again(shard)
    record = shard.with_suffix(".json")
    new = {"bytes": shard.stat().st_size, "sha256": index.file_sha256(shard)} | (
        {"content_digest": digest} if digest else {}
    )
    said = json.loads(record.read_text()) | new
    record.write_text(json.dumps(said))
    if (listed := folder / "index.json").exists():
        whole = json.loads(listed.read_text())
        whole["shards"] = [one | (new if one["name"] == shard.name else {}) for one in whole["shards"]]
        listed.write_text(json.dumps(whole))
    return done


# --------------------------------------------------------------------------------------------------------- the readers


def read(target: Path) -> None:
    """`open`, and all that it offers."""
    import fmextract as fm
    from fmextract.errors import ConfigError

    with fm.open(target) as acts:
        acts.info()
        repr(acts)
        _ = acts.config, acts.preprocess, acts.versions, acts.throughput, acts.input_size, acts.labels, acts.samples
        _ = acts.keys, acts.status, acts.messages, acts.heights, acts.widths, acts.rows(), acts.file_digests
        for name in acts.layers:
            layer = acts[name]
            _ = layer.field, layer.attrs, layer[0], layer[...], layer[[0, -1]], repr(layer), layer.effective_dimension
            list(layer.batches(3))
            with contextlib.suppress(ConfigError):  # it has none
                layer.top(0)
        list(acts.batches(size=5))
        data = acts.dataset()
        _ = [data[item] for item in range(len(data))]


def commands(target: Path, base: Path, out: Path) -> dict[str, list[str]]:
    """What reads an output, by name; a directory can be packed, and a run can go on in both."""
    sample = ["--image", "1.png", "-l", "conv", "-o"]
    photos = ["--images", str(base / "photos")]
    run = [
        "extract",
        str(base / "photos"),
        "-m",
        f"{base}/model.py:small",
        "--max-failures",
        "3",
        *RUN,
        "-o",
        str(target),
    ]
    made = {
        "info": ["info", str(target), "--json"],
        "info table": ["info", str(target)],
        "verify": ["verify", str(target), "--json"],
        "verify rerun": ["verify", str(target), "--rerun", "1", "-m", f"{base}/model.py:small"],
        "report": ["report", str(target), "-o", str(out / "r.html"), *photos],
        "show maps": ["show", "maps", str(target), *sample, str(out / "maps"), *photos, "--json"],
        "show overlay": ["show", "maps", str(target), *sample, str(out / "o.png"), *photos, "--overlay"],
        "show top": ["show", "top", str(target), "-l", "conv", "--channel", "1", "-o", str(out / "t.png"), *photos],
        "show where": ["show", "where", str(target), *sample, str(out / "w.png"), *photos, "--json"],
        "show depth": ["show", "depth", str(target), "-o", str(out / "d.png"), "--json"],
        "compare": ["compare", str(base / "acts.h5"), str(target), "--json"],
        "compare back": ["compare", str(target), str(base / "acts.h5"), "-o", str(out / "c.png")],
        "resume": run,
    }
    made |= {
        f"export {to}": ["export", str(target), "--to", to, "-o", str(out / name), "--json"]
        for to, name in (
            ("npy", "npy"), ("safetensors", "x.safetensors"), ("parquet", "x.parquet"), ("netcdf", "x.nc"),
            ("rdm", "x.h5"),
        )
    }  # fmt: skip
    if target.is_dir():
        made["pack"] = ["pack", str(target), "-o", str(out / "packed.h5")]
    return made


def wrong(name: str, arguments: list[str], target: Path) -> str | None:
    """What a command did that it must not, None where it did well."""
    from fmextract import cli

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = cli.main([*arguments, "--debug"])
    said = err.getvalue()
    if code not in (0, 2, 3, 4, 5):
        return f"{name}: exit status {code}: {_end(said)}"
    # A photo that cannot be shown is named itself.
    if code in (2, 4) and not any(name in said.partition("error: ")[2] for name in (target.name, "photos/")):
        return f"{name}: does not name the file: {said.rpartition('error:')[2].strip()[:300]}"
    if "--json" in arguments and out.getvalue():
        try:
            json.loads(out.getvalue(), parse_constant=_no_constant)
        except ValueError as error:
            return f"{name}: prints no JSON: {error}"
    return None


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _end(said: str) -> str:
    """The last line, and where in the package it was raised."""
    lines = said.strip().splitlines()
    places = [line.strip() for line in lines if "/fmextract/" in line and "cli.py" not in line]
    return f"{lines[-1] if lines else ''} [{places[-1] if places else ''}]"


def use_edits(names: str) -> None:
    """Only the edits of these names, all of them for an empty text."""
    global EDITS
    EDITS = tuple(edit for edit in EDITS if not names or edit.__name__ in names.split(","))


def findings(random: Random, base: Path, work: Path, entries: int | None) -> Iterator[str]:
    """Make a mutant and give it to the readers, `entries` of the commands or all of them; yields what went wrong."""
    from fmextract.errors import FmextractError

    kind = random.choice(["acts.h5", "acts.h5", "acts.h5", "acts", "acts", "begun"])
    target = work / f"mutant{Path(kind).suffix}"
    out = work / "out"
    out.mkdir()
    if Path(kind).suffix:
        shutil.copy(base / kind, target)
        edits = change(random, target)
        digest_again(target)
    else:
        shutil.copytree(base / kind, target)
        edits = change_directory(random, target)
    print(json.dumps({"kind": kind, "edits": edits}), flush=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(target)
    except FmextractError as error:
        if target.name not in str(error):
            yield f"read: does not name the file: {error}"
    except Exception:
        yield f"read: {_end(traceback.format_exc())}"
    run = commands(target, base, out)
    chosen = list(run) if entries is None else random.sample(list(run), entries)
    for name in sorted(chosen, key=lambda name: name == "resume"):  # which may change the mutant
        if said := wrong(name, run[name], target):
            yield said


def serve(base: Path, entries: int | None) -> None:
    """Read seeds from standard input, one a line; print for each its mutant, its findings, and when it is done."""
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_BYTES, ADDRESS_BYTES))
    for line in sys.stdin:
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with tempfile.TemporaryDirectory() as work:
            for said in findings(Random(int(line)), base, Path(work), entries):
                print(json.dumps({"found": said}), flush=True)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        if grown > MEMORY_BYTES:
            print(json.dumps({"found": f"took {grown >> 20} MiB of memory"}), flush=True)
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps({"done": int(line)}), flush=True)


# ------------------------------------------------------------------------------------------------------------ the loop


class Readers:
    """A process that reads mutants, started again whenever one ends it."""

    def __init__(self, base: Path, entries: int | None) -> None:
        names = ",".join(edit.__name__ for edit in EDITS)
        arguments = [sys.executable, __file__, "--serve", str(base), "--entries", str(entries or 0), "--edits", names]
        self._start = lambda: subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._process = self._start()

    def findings(self, seed: int) -> tuple[Any, list[str]]:
        """(the mutant, what went wrong)."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{seed}\n")
        self._process.stdin.flush()
        mutant: Any = None
        found: list[str] = []
        for line in self._process.stdout:
            said = json.loads(line)
            if "done" in said:
                return mutant, found
            if "found" in said:
                found.append(said["found"])
            else:
                mutant = said
        _, trace = self._process.communicate()
        status, self._process = self._process.returncode, self._start()
        place = next((line.strip() for line in trace.splitlines() if "/fmextract/" in line), "")
        return mutant, [*found, f"ended the process, status {status}: {trace[:60]!r} {place}"]

    def close(self) -> None:
        self._process.communicate()


def search(
    seeds: Iterator[int], seconds: float, base: Path, entries: int | None
) -> Iterator[tuple[int, Any, list[str]]]:
    """(seed, mutant, findings) of each mutant until the time is over."""
    until = time.monotonic() + seconds
    readers = Readers(base, entries)
    try:
        for seed in seeds:
            if time.monotonic() > until:
                return
            yield seed, *readers.findings(seed)
    finally:
        readers.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the first mutant; the next has the next number")
    parser.add_argument("--one", type=int, help="only the mutant of this seed, here, with tracebacks")
    parser.add_argument("--entries", type=int, default=0, help="commands run on each mutant; 0: all of them")
    parser.add_argument("--edits", default="", help="names of functions that change a file, with commas; all of them")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    entries = given.entries or None
    use_edits(given.edits)
    if given.serve is not None:
        serve(given.serve, entries)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        with contextlib.redirect_stdout(sys.stderr):
            make_subjects(base)
        if given.one is not None:
            with tempfile.TemporaryDirectory() as work:
                found = list(findings(Random(given.one), base, Path(work), entries))
            print("\n".join(found))
            return bool(found)
        count, kinds = 0, dict[str, int]()
        seeds = iter(range(given.seed, sys.maxsize))
        for seed, mutant, found in search(seeds, 60 * given.minutes, base, entries):
            count += 1
            for said in found:
                kinds[said] = kinds.get(said, 0) + 1
                print(f"seed {seed} {mutant}: {said}", flush=True)
    print(json.dumps({"mutants": count, "findings": sum(kinds.values()), "kinds": len(kinds)}))
    return bool(kinds)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
