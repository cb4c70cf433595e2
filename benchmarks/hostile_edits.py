"""Changes to a file of fmextract after which it is still HDF5, and its structure anything: see `fuzz_structure`.

EDITS       change a file that is open          edit(random, file)
PATCHES     change the bytes of one that is not    patch(random, path)
"""

from __future__ import annotations

import contextlib
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import h5py
import numpy as np

ROWS = 8
"""Images of the run whose files are changed."""


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


# --------------------------------------------------------------------------------------------------- filters, chunks


FILTERS = {"deflate": 1, "shuffle": 2, "fletcher32": 3, "szip": 4, "nbit": 5, "scaleoffset": 6}


def remade(file: h5py.File, path: str, shape: Any, plist: h5py.h5p.PropDCID, kind: Any = None, most: Any = None) -> Any:
    """A dataset in the place of another, with its attributes; returns both, the old one without a name."""
    old = file[path]
    kind = kind or old.id.get_type()
    del file[path]
    limits = tuple(h5py.h5s.UNLIMITED if one is None else one for one in most) if most else None
    space = h5py.h5s.create_simple(shape, limits) if shape else h5py.h5s.create(h5py.h5s.SCALAR)
    made = h5py.Dataset(h5py.h5d.create(file.id, path.encode(), kind, space, dcpl=plist))
    for name in old.attrs:
        with contextlib.suppress(TypeError, ValueError, OSError, RuntimeError):
            if name not in ("REFERENCE_LIST", "CLASS", "NAME", "DIMENSION_LIST"):
                made.attrs[name] = old.attrs[name]
    for axis, scales in enumerate(old.dims):
        with contextlib.suppress(TypeError, ValueError, OSError, RuntimeError, KeyError):
            made.dims[axis].attach_scale(scales[0])
    return old, made


def activation(random: Random, file: h5py.File) -> str:
    return f"/layers/{random.choice(list(file['layers']))}/activation"


def odd_filters(random: Random, file: h5py.File) -> None:
    """A pipeline of any filters in any order, with any client data, over the chunks that were there."""
    path = random.choice([activation(random, file)] * 3 + datasets(file))
    old = file[path]
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk(old.chunks or tuple(map(max, old.shape, [1] * old.ndim)))
    plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    usual = [(FILTERS["shuffle"], (old.dtype.itemsize,)), (FILTERS["deflate"], (1,))]
    stages = random.choice(
        [usual, usual[::-1], usual * 2, usual[:1], usual[1:], [*usual, (FILTERS["fletcher32"], ())], []]
    )
    odd = [(), (0,), (1,), (3,), (8,), (2**16,), (2**32 - 1,), (2,) * 40, (0, 0, 0, 2**31, 1, 1, 1, 1)]
    for number, data in stages:
        number = random.choice([number] * 6 + [*FILTERS.values(), 32000, 32001, 32004, 32015, 32026, 65535, 256])
        plist.set_filter(number, random.choice([0, 1, 1, 2, 0xFF]), random.choice([data] * 3 + odd))
    kind = random.choice([None] * 4 + [h5py.h5t.IEEE_F32BE, h5py.h5t.IEEE_F64LE, h5py.h5t.IEEE_F16LE])
    old, made = remade(file, path, old.shape, plist, kind, (None, *old.shape[1:]))
    chunks(old, made)


def chunks(old: h5py.Dataset, made: h5py.Dataset) -> None:
    """The chunks of one dataset for another of the same shape, as they lie: hostile filters end those who write."""
    for at in range(old.id.get_num_chunks()):
        found = old.id.get_chunk_info(at)
        made.id.write_direct_chunk(found.chunk_offset, old.id.read_direct_chunk(found.chunk_offset)[1])


def huge_chunks(random: Random, file: h5py.File) -> None:
    """Chunks of gigabytes in a few bytes, axes of 2^62, and more values than there is room for."""
    path = random.choice([activation(random, file)] * 2 + datasets(file))
    old = file[path]
    axes = old.ndim
    sides = [
        (2**31 - 1, *[1] * (axes - 1)),
        (*[1] * (axes - 1), 2**30),
        (ROWS, *[2**20] * (axes - 1)),
        old.chunks or (),
    ]
    side = random.choice(sides)
    shape = random.choice([old.shape, (2**62, *old.shape[1:]), (*old.shape[:-1], 2**62), (ROWS, *side[1:]), side])
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk(side)
    plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    if random.random() < 0.7:
        plist.set_deflate(1)
    _, made = remade(file, path, shape, plist, None, (None,) * axes)
    packer, block = zlib.compressobj(9), bytes(2**24)
    size = min(2**28, int(np.prod([float(n) for n in side])) * made.dtype.itemsize)
    bomb = b"".join(packer.compress(block) for _ in range(size >> 24)) + packer.compress(bytes(size % 2**24))
    bomb += packer.flush()
    for row in range(0, min(shape[0], ROWS), side[0]):
        made.id.write_direct_chunk((row, *[0] * (axes - 1)), random.choice([bomb, bomb, b"", b"x" * 100]))


def sparse(random: Random, file: h5py.File) -> None:
    """Chunks that are not there, that lie on each other's place, or that were made and taken back."""
    path = activation(random, file)
    plist = file[path].id.get_create_plist()
    old, made = remade(file, path, file[path].shape, plist, None, (None, *file[path].shape[1:]))
    for at in range(old.id.get_num_chunks()):
        found = old.id.get_chunk_info(at)
        if random.random() < 0.6:
            made.id.write_direct_chunk(found.chunk_offset, old.id.read_direct_chunk(found.chunk_offset)[1])


# ------------------------------------------------------------------------------------------------------------ very many


def very_many(random: Random, file: h5py.File) -> None:
    """Attributes, groups or datasets by the thousand, in a group of any storage."""
    count = random.choice([300, 3000, 3000, 30_000, 100_000])
    what = random.choice(["attributes", "groups", "layers", "datasets", "deep"])
    if what == "deep":
        group = file["layers"]
        for _ in range(min(count, 3000)):
            group = group.create_group("a")
        return
    node = file[random.choice(["/", "/layers", random.choice([p for p in nodes(file) if p != "/layers"])])]
    if what == "attributes":
        for number in range(count):
            node.attrs[f"n{number}"] = number
        return
    group = node if isinstance(node, h5py.Group) else file
    group = file["layers"] if what == "layers" else group
    for number in range(count if what != "datasets" else min(count, 10_000)):
        if what == "datasets":
            group[f"n{number}"] = number
        else:
            h5py.h5g.create(group.id, b"n%d" % number)


def dense(random: Random, file: h5py.File) -> None:
    """A layer again, in a group that keeps its attributes and links in other structures than usual."""
    group = file["layers"][random.choice(list(file["layers"]))]
    name = group.name
    plist = h5py.h5p.create(h5py.h5p.GROUP_CREATE)
    plist.set_attr_phase_change(*random.choice([(0, 0), (65535, 0), (1, 1)]))
    if random.random() < 0.5:
        order = h5py.h5p.CRT_ORDER_TRACKED | h5py.h5p.CRT_ORDER_INDEXED
        plist.set_link_creation_order(order)
    file.move(name, "/moved")
    made = h5py.Group(h5py.h5g.create(file.id, name.encode(), gcpl=plist))
    for key in file["moved"].attrs:
        made.attrs[key] = file["moved"].attrs[key]
    for key in list(file["moved"]):
        file.move(f"/moved/{key}", f"{name}/{key}")
    del file["moved"]


def circle(random: Random, file: h5py.File) -> None:
    """Hard links that lead back, and objects with two names."""
    groups = [path for path in nodes(file) if isinstance(file[path], h5py.Group)]
    inner, aim = file[random.choice(groups)], file[random.choice(nodes(file))]
    inner[random.choice(["back", "stats", "activation", "a"]) + random.choice(["", "2"])] = aim


# ---------------------------------------------------------------------------------------------------------- odd types


def odd_type(random: Random, file: h5py.File) -> Any:
    base = np.dtype(random.choice(["f4", "i8", "f2"]))
    return random.choice(
        [
            h5py.regionref_dtype, h5py.ref_dtype, h5py.string_dtype(), h5py.string_dtype("ascii"),
            h5py.string_dtype("utf-8", 5), h5py.vlen_dtype(base), h5py.vlen_dtype(h5py.string_dtype()),
            h5py.enum_dtype({"A": 0, "B": 1}, "i8"), h5py.enum_dtype({"A": 0}, "i1"),
            np.dtype((base, (3,))), np.dtype((base, (2, 2))), np.dtype("V7"), h5py.opaque_dtype(np.dtype("M8[s]")),
            np.dtype([("r", base), ("i", base)]), np.dtype([("a", h5py.string_dtype()), ("b", base, (2,))]),
            np.dtype({"names": ["a"], "formats": [base], "offsets": [5], "itemsize": 30}), np.dtype("c16"),
            np.dtype("?"),
        ]
    )  # fmt: skip


def odd_values(random: Random, file: h5py.File) -> None:
    """Regions, strings of variable length, compounds, enumerations, arrays … where numbers or texts belong."""
    dtype, path = odd_type(random, file), random.choice(datasets(file))
    shape = file[path].shape
    if random.random() < 0.3:
        named = f"type{random.randrange(100)}"
        file[named] = dtype
        if random.random() < 0.7:
            dtype = file[named]
        if random.random() < 0.5:
            file.move(named, f"{path}t")
    if random.random() < 0.4:
        node = file[random.choice(nodes(file))]
        name = random.choice([*node.attrs, "DIMENSION_LIST", "NAME", "module", "odd"])
        node.attrs.pop(name, None)
        kind = dtype.id if isinstance(dtype, h5py.Datatype) else h5py.h5t.py_create(dtype, logical=True)
        space = h5py.h5s.create_simple(random.choice([(1,), (2,), (0,)]))
        space = random.choice([space, h5py.h5s.create(h5py.h5s.SCALAR), h5py.h5s.create(h5py.h5s.NULL)])
        h5py.h5a.create(node.id, name.encode(), kind, space)
        return
    old = file[path]
    attrs = {name: old.attrs[name] for name in old.attrs if name in ("CLASS", "NAME", "column", "encoding")}
    del file[path]
    made = file.create_dataset(path, shape, dtype, chunks=random.choice([None, True]) if shape else None)
    for name, value in attrs.items():
        made.attrs[name] = value
    if made.dtype == h5py.regionref_dtype and random.random() < 0.7:
        made[...] = file["sample"].regionref[0:2]


def odd_number_type(random: Random, file: h5py.File) -> None:
    """Numbers as HDF5 can have them and no processor has: other widths, offsets, paddings, orders of bytes."""
    path = random.choice([activation(random, file), *datasets(file)])
    old = file[path]
    if old.dtype.kind not in "iuf":
        return
    kind = (h5py.h5t.IEEE_F32LE if old.dtype.kind == "f" else h5py.h5t.STD_I32LE).copy()
    with contextlib.suppress(ValueError, RuntimeError, TypeError):
        change = random.randrange(5)
        if change == 0:
            kind.set_order(h5py.h5t.ORDER_BE)
        elif change == 1:
            kind.set_precision(random.choice([7, 20, 31]))
        elif change == 2:
            kind.set_size(random.choice([3, 5, 6, 7, 8, 16]))
        elif change == 3 and isinstance(kind, h5py.h5t.TypeFloatID):
            kind.set_fields(*random.choice([(31, 24, 7, 0, 24), (15, 10, 5, 0, 10), (31, 20, 11, 0, 20)]))
        elif isinstance(kind, h5py.h5t.TypeFloatID):
            kind.set_ebias(random.choice([0, 1, 126, 1000]))
    plist = old.id.get_create_plist()
    shape = old.shape
    old, made = remade(file, path, shape, plist, kind, (None, *shape[1:]) if old.chunks else None)
    if made.chunks and random.random() < 0.5:
        chunks(old, made)
    else:
        made[...] = old[...]


def virtual(random: Random, file: h5py.File) -> None:
    """Made of others: of itself, of many, of files by numbers, without an end."""
    path = activation(random, file)
    shape, dtype = file[path].shape, file[path].dtype
    aim = random.choice([path, random.choice(datasets(file)), "/moved"])
    file.move(path, "/moved")
    layout = h5py.VirtualLayout(shape, dtype, maxshape=random.choice([None, (None, *shape[1:])]))
    source = h5py.VirtualSource(random.choice([".", "acts.h5", "part-%b.h5", "/dev/zero"]), aim, shape)
    for row in range(shape[0]) if random.random() < 0.5 else [slice(None)]:
        layout[row] = source[row]
    file.create_virtual_dataset(path, layout, fillvalue=random.choice([None, 7]))


# ------------------------------------------------------------------------------------------------------ bytes of files


def user_block(random: Random, path: Path) -> None:
    """Bytes of somebody else before the file, as HDF5 allows: of the right length, or of a wrong one."""
    front = random.choice([512, 512, 1024, 4096, 100])
    path.write_bytes(
        random.choice([bytes(front), b"\x89HDF\r\n\x1a\n".ljust(front, b"x"), b"#!/bin/sh\n".ljust(front)])
        + path.read_bytes()
    )


def patched(random: Random, path: Path, found: list[int], width: int) -> None:
    """One of the places in a file, overwritten with an odd number."""
    if found:
        content, at = bytearray(path.read_bytes()), random.choice(found)
        said = random.choice([0, 1, 2, 3, 5, 255, 2**15, 2**31, 2**32 - 1, 2**62, 2**64 - 1, random.getrandbits(64)])
        content[at : at + width] = (said % 256**width).to_bytes(width, "little")
        path.write_bytes(content)


def places(content: bytes, sought: bytes, after: int) -> list[int]:
    """Where `sought` stands, and `after` bytes on."""
    at, found = content.find(sought), []
    while at >= 0:
        found.append(at + after)
        at = content.find(sought, at + 1)
    return found


def filter_in_place(random: Random, path: Path) -> None:
    """Client data, number, flags or length of a filter, in a message without a checksum."""
    content = path.read_bytes()
    name = random.choice([b"shuffle\0", b"deflate\0"])
    patched(random, path, places(content, name, random.choice([8, 8, 8, -2, -4, -6, -8])), random.choice([2, 4]))


def structure_in_place(random: Random, path: Path) -> None:
    """A number within one of the signed structures: heaps, trees, nodes of symbols, headers."""
    sign = random.choice(
        [b"GCOL", b"HEAP", b"TREE", b"SNOD", b"OHDR", b"OCHK", b"FRHP", b"FHDB", b"BTHD", b"FAHD", b"EAHD"]
    )
    content = path.read_bytes()
    patched(
        random,
        path,
        places(content, sign, random.choice([4, 5, 6, 8, 12, 16, 24, 32, 40, 64])),
        random.choice([1, 2, 4, 8]),
    )


def number_in_place(random: Random, path: Path) -> None:
    """A shape, a size, an address or a count: a number that stands somewhere, made another."""
    content = path.read_bytes()
    sought = random.choice([ROWS, 4, 3, 9, 5, len(content), 512, 2**64 - 1])
    patched(random, path, places(content, struct.pack("<Q", sought), 0), 8)


def shorter_or_longer(random: Random, path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(
        random.choice([content[: random.randrange(len(content))], content + bytes(random.choice([1, 5000]))])
    )


EDITS: tuple[Callable[[Random, h5py.File], None], ...] = (
    attribute_of_another_kind, attribute_of_a_layer, attribute_of_a_layer, attribute_of_a_layer, attribute_removed,
    attribute_renamed, attribute_large, json_within, json_within, json_within, scales_list, scales_list, scales_swapped,
    removed, renamed, another_dataset, another_dataset, another_dataset, resized, all_resized, linked, elsewhere,
    another_object, values, values, values, values, a_skipped_filter, odd_filters, odd_filters, odd_filters,
    huge_chunks, huge_chunks, sparse, very_many, dense, circle, odd_values, odd_values, odd_values, odd_number_type,
    odd_number_type, virtual,
)  # fmt: skip

PATCHES: tuple[Callable[[Random, Path], None], ...] = (
    user_block, filter_in_place, filter_in_place, structure_in_place, structure_in_place, number_in_place,
    number_in_place, shorter_or_longer,
)  # fmt: skip
