"""Tables of what stands where in a file of fmextract and in the JSON beside it; the one way to HDF5's attributes.

A file is never to be trusted: each of its bytes may be sound, and yet say anything. All that is read of a file is
checked here against a table and comes out as Python's own types, within ranges that the rest of the program expects.
libhdf5 is asked for the value of an attribute only when its type is one that it reads safely, and never through
its own functions for dimension scales, which take an attribute's type for granted (a `DIMENSION_LIST` of another type
is a segmentation fault).

    ROOT, LAYER         attributes: name → Attribute(kind, required)         attributes()  node → checked values
    COLUMNS             one entry per row: name → Column(types, required)      scales()      dataset → its axes' scales
    ACTIVATION          the types of activations                             parse()       text → checked JSON
    STATISTICS          what the values of a statistic can be                statistics()  arrays → checked arrays
    RECORD, PLAN        the JSON files of a directory                        checked()     JSON → checked JSON

A new attribute, column or field is one line of a table. What is in no table is ignored, or handed on where it is plain.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import h5py
import numpy as np
import numpy.typing as npt

from fmextract.config import RENAMED
from fmextract.errors import DamagedError, FormatError
from fmextract.storage.layer_stats import COVARIANCE, NEAR_ZERO, TOP

Array: TypeAlias = npt.NDArray[Any]
Kind: TypeAlias = Callable[[Any], Any]
"""Returns the value, perhaps as another type, or raises Wrong."""

LARGEST = 2**62
"""Sums and differences of two such numbers still fit into int64."""
SIDE, PIXELS = 2**16, 2**28
"""Of an input: pictures of a larger one, which a file may claim, would fill the memory."""
DEPTH = 32
"""Levels of JSON within JSON: fmextract writes six."""
_BOOKKEEPING = (b"DIMENSION_LIST", b"REFERENCE_LIST")
"""HDF5's own attributes, of references; see `scales`."""


class Wrong(ValueError):
    """A value is not what the table says. The message is what was expected, `place` where within the value."""

    def __init__(self, expected: str, got: Any, place: str = "") -> None:
        super().__init__(f"expected {expected}, got {_short(got)}")
        self.expected, self.got, self.place = expected, got, place

    def within(self, name: str | int) -> Wrong:
        """Return the same error, about something that lies at `name` of a larger value."""
        place = f"{name}.{self.place}" if self.place else str(name)
        return Wrong(self.expected, self.got, place)


def _short(value: Any) -> str:
    said = repr(value) if not isinstance(value, np.ndarray) else f"{value.dtype} {value.shape}"
    return said if len(said) <= 60 else f"{said[:57]}..."


# --------------------------------------------------------------------------------------------------------------- kinds


def anything(value: Any) -> Any:
    return value


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise Wrong("a text", value)
    return value


def flag(value: Any) -> bool:
    """Return True, False, or HDF5's 1 and 0."""
    if type(value) is not bool and (type(value) is not int or value not in (0, 1)):
        raise Wrong("true or false", value)
    return bool(value)


def one_of(*values: str) -> Kind:
    def check(value: Any) -> Any:
        if value not in values:
            raise Wrong(f"one of {', '.join(values)}", value)
        return value

    return check


def whole(low: int = 0, high: int = LARGEST) -> Kind:
    """Return an integer in low .. high, as Python's; true and false are none."""

    def check(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise Wrong(f"a whole number of {low} to {high}", value)
        return value

    return check


def number(low: float = -1e300, high: float = 1e300, *, finite: bool = True) -> Kind:
    """Return a number in low .. high, and NaN or an infinity unless `finite`, as Python's float."""

    def check(value: Any) -> float:
        if type(value) not in (int, float):
            raise Wrong("a number", value)
        if not (low <= value <= high or (not finite and not math.isfinite(value))):
            raise Wrong(f"a number of {low:g} to {high:g}", value)
        return float(value)

    return check


def pair(kind: Kind) -> Kind:
    """Return two numbers along (y, x), of an attribute: as the array that it is."""

    def check(value: Any) -> Array:
        if not isinstance(value, np.ndarray) or value.shape != (2,):
            raise Wrong("two numbers", value)
        for one in value.tolist():
            kind(one)
        return value

    return check


def optional(kind: Kind) -> Kind:
    """Take null, too."""
    return lambda value: None if value is None else kind(value)


def either(*kinds: Kind) -> Kind:
    """Return the first kind that takes the value."""

    def check(value: Any) -> Any:
        said = []
        for kind in kinds:
            try:
                return kind(value)
            except Wrong as wrong:
                said.append(wrong.expected)
        raise Wrong(" or ".join(said), value)

    return check


def many(kind: Kind, length: int | None = None) -> Kind:
    """Return a list of values of one kind."""

    def check(value: Any) -> list[Any]:
        if not isinstance(value, list | tuple) or (length is not None and len(value) != length):
            raise Wrong(f"a list of {length}" if length is not None else "a list", value)
        made = []
        for number, one in enumerate(value):
            try:
                made.append(kind(one))
            except Wrong as wrong:
                raise wrong.within(number) from None
        return made

    return check


def table_of(kind: Kind) -> Kind:
    """Return a JSON object of any names, whose values are of one kind."""

    def check(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise Wrong("a JSON object", value)
        return {name: _within(name, kind, one) for name, one in value.items()}

    return check


def fields(required: Sequence[str] = (), /, **kinds: Kind) -> Kind:
    """Return a JSON object. Fields that are there are checked by their names; those of other names stay as they are."""

    def check(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise Wrong("a JSON object", value)
        for name in required:
            if name not in value:
                raise Wrong(f"a field {name!r}", value)
        return {name: _within(name, kinds[name], one) if name in kinds else one for name, one in value.items()}

    return check


def renamed(kind: Kind) -> Kind:
    """A JSON object in which options may have the names of earlier versions: returns those of today."""

    def check(value: Any) -> Any:
        is_object = isinstance(value, dict)
        return kind({RENAMED.get(name, name): one for name, one in value.items()} if is_object else value)

    return check


def _within(name: str, kind: Kind, value: Any) -> Any:
    try:
        return kind(value)
    except Wrong as wrong:
        raise wrong.within(name) from None


def _size(value: Any) -> list[int]:
    """Return [height, width] of an input or a photo."""
    height, width = many(whole(1, SIDE), 2)(value)
    if height * width > PIXELS:
        raise Wrong(f"at most {PIXELS} pixels", value)
    return [height, width]


def _largest(kind: Kind) -> Kind:
    """Return a number, or of several the largest."""
    return lambda value: kind(max(value.tolist()) if isinstance(value, np.ndarray) and value.size else value)


# -------------------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True, slots=True)
class Attribute:
    """An attribute of HDF5. `json`: a text that holds JSON of this kind.

    `content` False is for what says nothing of the values and is in no digest: where it is wrong, it counts as absent.
    """

    kind: Kind
    required: bool = False
    json: bool = False
    content: bool = True


@dataclass(frozen=True, slots=True)
class Column:
    """A dataset with one entry per row, of one of these types (numpy's names, or `text`), numbers with up to `axes`."""

    types: tuple[str, ...]
    required: bool = True
    axes: int = 1


@dataclass(frozen=True, slots=True)
class Statistic:
    """Numbers of low .. high, or not finite ones unless `finite`; integers on the disk if `integers`."""

    low: float = -math.inf
    high: float = math.inf
    finite: bool = False
    integers: bool = False


def _pairs(value: Any) -> list[list[str]]:
    """Return (convolution, batch norm) by path. The first files said only whether there were any."""
    return [] if type(value) is bool else many(many(text, 2))(value)


_PIXELS = number(-1e9, 1e9)
_OPTIONS = renamed(
    fields(
        layers=many(text),
        preprocess=optional(text),
        exif=flag,
        dtype=text,
        keep_bits=optional(whole(0, 64)),
        clip=flag,
        codec=text,
        level=optional(whole(0, 100)),
        top_k=whole(0, 10**6),
        overwrite=flag,
        ignore=many(text),
    )
)
_IDENTITY = renamed(fields(input_shape=optional(many(whole(1, LARGEST))), source=table_of(anything)))
CONFIG = fields(
    options=_OPTIONS,
    identity=_IDENTITY,
    batch_size=whole(1, 10**9),
    device=text,
    memory_format=text,
    weights=optional(text),
    origin=fields(provider=text, weights_file_sha256=text),
    input_dtype=text,
    run_id=text,
    forward_threads=whole(1, 10**6),
    fused=_pairs,
    pooling=flag,
    prepacked=flag,
    notes=many(text),
)
PREPROCESS = fields(
    kind=text,
    resize=optional(either(whole(1, SIDE), _size)),
    crop=optional(_size),
    size=optional(_size),
    mean=optional(many(number())),
    std=optional(many(number())),
    interpolation=optional(text),
    antialias=optional(flag),
    origin=optional(text),
    callable=optional(text),
)
IMAGES = fields(absolute=text, relative=text)
THROUGHPUT = fields(
    ("images", "seconds", "busy_seconds"),
    images=whole(),
    seconds=number(0, 1e12),
    busy_seconds=table_of(number(0, 1e15)),
)

ROOT: Mapping[str, Attribute] = {
    "format": Attribute(text, required=True),
    "format_version": Attribute(whole(1), required=True),
    "Conventions": Attribute(text),
    "title": Attribute(text, required=True),
    "source": Attribute(text, required=True),
    "history": Attribute(text, required=True),
    "fmextract_config": Attribute(CONFIG, required=True, json=True),
    "model": Attribute(text, required=True),
    "weights_sha256": Attribute(text, required=True),
    "preprocess": Attribute(PREPROCESS, required=True, json=True),
    "precision": Attribute(text, required=True),
    "versions": Attribute(table_of(text), required=True, json=True),
    "created": Attribute(text, required=True),
    "images": Attribute(IMAGES, json=True),
    "label_names": Attribute(many(text), json=True),
    "content_digest": Attribute(text),
    "throughput": Attribute(THROUGHPUT, json=True, content=False),
    "smaller_batches": Attribute(table_of(whole(1, 10**9)), json=True),
    "left_out": Attribute(text),
}

LAYER: Mapping[str, Attribute] = {
    "module": Attribute(text, required=True),
    "module_type": Attribute(text, required=True),
    "call": Attribute(whole(1, 2**31), required=True),
    "calls": Attribute(whole(1, 2**31), required=True),
    "number": Attribute(text),
    "number_from_end": Attribute(text),
    "classes": Attribute(text),
    "further_paths": Attribute(many(text), json=True),
    "tap": Attribute(one_of("out", "in"), required=True),
    "member": Attribute(text),
    "reducer": Attribute(text),
    "compute_dtype": Attribute(text, required=True),
    "mantissa": Attribute(whole(0, 64)),
    "rel_error": Attribute(number(finite=False)),
    "copied": Attribute(flag, required=True),
    "rf_size": Attribute(pair(number(0, 1e9))),
    "rf_stride": Attribute(pair(_PIXELS)),
    "rf_offset": Attribute(pair(_PIXELS)),
    "rf_bound": Attribute(flag),
    "rf_whole": Attribute(flag),
    "rf_global": Attribute(flag),
    "erf_size": Attribute(_largest(number(0, 1e9))),
    "near_zero_below": Attribute(number(0)),
    "effective_dimension": Attribute(number(finite=False)),
    "effective_dimension_rows": Attribute(whole()),
    "effective_dimension_estimated": Attribute(flag),
    "nonfinite": Attribute(whole()),
    "clipped": Attribute(whole()),
}
TOGETHER: Sequence[tuple[str, ...]] = (
    ("rf_size", "rf_stride", "rf_offset"),
    ("effective_dimension", "effective_dimension_rows"),
)
"""Attributes of a layer that are there all or none."""

COLUMNS: Mapping[str, Column] = {
    "sample": Column(("int64",)),
    "key": Column(("text",)),
    "status": Column(("uint8",)),
    "message": Column(("text",)),
    "height": Column(("int32",)),
    "width": Column(("int32",)),
    "label": Column(("int64", "float64", "text"), required=False, axes=2),
    "file_size": Column(("int64",), required=False),
    "file_digest": Column(("text",), required=False),
}
BROUGHT = Column(("int64", "float64", "text"), required=False, axes=2)
"""A column that the source brought along, `label` among them; what its attributes are."""
BROUGHT_ATTRIBUTES: Mapping[str, Attribute] = {
    "column": Attribute(text),
    "encoding": Attribute(one_of("json")),
    "_FillValue": Attribute(whole(-(2**63), 2**63 - 1)),
}
ACTIVATION = (
    *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
    *("float16", "float32", "float64"),
)
"""Types of activations on the disk."""

_SHARE = Statistic(0, 1)
STATISTICS: Mapping[str, Statistic] = {
    "count": Statistic(0, LARGEST, finite=True),
    "nonfinite": Statistic(0, LARGEST, finite=True),
    "mean": Statistic(),
    "std": Statistic(0),
    "min": Statistic(),
    "max": Statistic(),
    "zero_fraction": _SHARE,
    NEAR_ZERO: _SHARE,
    "top_value": Statistic(),
    "top_sample": Statistic(-1, LARGEST, integers=True),
    "top_y": Statistic(-1, 2**31 - 1, integers=True),
    "top_x": Statistic(-1, 2**31 - 1, integers=True),
    "covariance_count": Statistic(0, LARGEST, finite=True),
}

_FIELD = fields(
    ("size", "stride", "offset"),
    size=many(number(0, 1e9), 2),
    stride=many(_PIXELS, 2),
    offset=many(_PIXELS, 2),
    bound=flag,
    whole=flag,
    has_global=flag,
)
_SPEC = fields(
    ("name", "shape", "axes", "chunk", "dtype", "field"),
    name=text,
    module=text,
    module_type=text,
    call=whole(1, 2**31),
    calls=whole(1, 2**31),
    tap=one_of("out", "in"),
    member=text,
    reducer=text,
    shape=many(whole(1, LARGEST)),
    axes=many(text),
    dtype=one_of(*ACTIVATION),
    compute_dtype=text,
    chunk=many(whole(1, LARGEST)),
    mantissa=optional(whole(0, 64)),
    copied=flag,
    rel_error=optional(number()),
    field=optional(_FIELD),
    erf_size=optional(number(0, 1e9)),
    near_zero_below=optional(number(0)),
    number=text,
    number_from_end=text,
    classes=many(text),
    further_paths=many(text),
)
PLAN = renamed(
    fields(
        run_id=text,
        rows=whole(1),
        layers=many(_SPEC),
        precision=text,
        memory_format=text,
        batch_size=whole(1, 10**9),
        device=text,
        threads=whole(1, 4096),
        forward_threads=whole(1, 4096),
        codec=text,
        level=whole(0, 100),
        dtype=text,
        keep_bits=optional(whole(0, 64)),
        clip=flag,
        top_k=whole(0, 10**6),
        shard_rows=whole(1),
        shards=many(many(whole(), 2)),
        identity=_IDENTITY,
        config=_OPTIONS,
        info=fields(
            title=text,
            source=text,
            history=text,
            model=text,
            weights=optional(text),
            weights_sha256=text,
            origin=table_of(anything),
            input_dtype=text,
            preprocess=PREPROCESS,
            created=text,
            images=IMAGES,
        ),
        versions=table_of(text),
        fused=_pairs,
        pooling=flag,
        prepacked=flag,
        estimate=table_of(optional(either(number(), table_of(number())))),
        notes=many(text),
    )
)
RECORD = fields(
    ("name", "start", "stop", "bytes", "sha256", "statuses", "content_digest", "batch_size", "extra"),
    name=text,
    start=whole(),
    stop=whole(1),
    bytes=whole(),
    sha256=text,
    statuses=table_of(whole()),
    content_digest=text,
    batch_size=whole(),
    extra=fields(chunks=table_of(text)),
)
"""The record of a shard, in its own JSON file and in the index."""


# ---------------------------------------------------------------------------------------------------------------- JSON


def load(said: str) -> Any:
    """Return the value of a JSON text. Raises ValueError for what is no JSON, and for JSON that fmextract never writes.

    That is NaN and infinities, numbers beyond ±2^63, half of a surrogate pair, more than DEPTH levels.
    """
    try:
        value = json.loads(said, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError(f"more than {DEPTH} levels of JSON") from None
    todo = [(value, 0)]
    while todo:
        one, depth = todo.pop()
        if depth > DEPTH:
            raise ValueError(f"more than {DEPTH} levels of JSON")
        if isinstance(one, dict):
            todo += [(part, depth + 1) for pair in one.items() for part in pair]
        elif isinstance(one, list):
            todo += [(part, depth + 1) for part in one]
        elif isinstance(one, str):
            if not one.isascii():
                one.encode()  # UnicodeEncodeError is a ValueError
        elif isinstance(one, int | float) and not -(2**63) <= one < 2**64:
            raise ValueError(f"the number {_short(one)} is too large")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def checked(value: Any, kind: Kind, where: str) -> Any:
    """Return a JSON value of this kind. Raises FormatError that says where it is not."""
    try:
        return kind(value)
    except Wrong as wrong:
        raise FormatError(f"{where} is damaged: {wrong.place + ': ' if wrong.place else ''}{wrong}") from None


# ---------------------------------------------------------------------------------------------------------- attributes


def attributes(
    node: h5py.h5g.GroupID | h5py.h5d.DatasetID, table: Mapping[str, Attribute], where: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the attributes of an object by name, checked against a table, and what they mean: for JSON, what it holds.

    Those in no table come along if they are texts or numbers. `where` names the file and the object.
    Raises DamagedError for an attribute that is missing or is not what the table says.
    """
    values: dict[str, Any] = {}
    meant: dict[str, Any] = {}
    for encoded in attribute_names(node):
        name = encoded.decode("utf-8", "surrogateescape")
        known = table.get(name)
        try:
            value = attribute(node, encoded)
            if known is not None:
                value, meant[name] = _as_kind(value, known)
            values[name] = value
        except Wrong as wrong:
            if known is not None and known.content:
                place = f"{name}, {wrong.place}" if wrong.place else name
                raise DamagedError(f"{where}: the attribute {place}: {wrong}") from None
    for name, known in table.items():
        if known.required and name not in values:
            raise DamagedError(f"{where} has no attribute {name}")
    return values, meant


def as_read(values: Mapping[str, Any], table: Mapping[str, Attribute]) -> dict[str, Any]:
    """Return what `attributes` makes of values that this process has written."""
    return {name: _as_kind(value, table[name])[0] if name in table else value for name, value in values.items()}


def _as_kind(value: Any, known: Attribute) -> tuple[Any, Any]:
    """Return (the value of an attribute, what it means), which differ where it holds JSON."""
    if not known.json:
        made = known.kind(value)
        return made, made
    try:
        loaded = load(text(value))
    except Wrong:
        raise
    except ValueError as error:
        raise Wrong(f"JSON ({error})", value) from None
    return value, known.kind(loaded)


def attribute_names(node: h5py.h5g.GroupID | h5py.h5d.DatasetID) -> list[bytes]:
    """Return the names in alphabetical order, without HDF5's bookkeeping of scales."""
    names: list[bytes] = []
    if h5py.h5a.get_num_attrs(node):
        h5py.h5a.iterate(node, lambda name, *_: names.append(name))
    return sorted(name for name in names if name not in _BOOKKEEPING)


def attribute(node: h5py.h5g.GroupID | h5py.h5d.DatasetID, name: bytes) -> Any:
    """Return a text, an int, a float or an array of numbers with one axis. Raises Wrong for anything else, unread."""
    stored = h5py.h5a.open(node, name)
    kind = stored.get_type()
    try:
        nbytes = stored.get_storage_size()
    except RuntimeError:
        raise Wrong("a value", "none") from None
    try:
        known = _type(kind.encode())
    except TypeError as error:
        raise Wrong("numbers of a type that numpy has", str(error)) from None
    if known is None or nbytes > MOST_ATTRIBUTE:
        raise Wrong("a text or numbers", f"{type(kind).__name__} of {nbytes} bytes")
    size, dtype, memory, is_text = known
    shape = () if nbytes == size else stored.shape  # to ask for the shape of each would be a quarter of the time
    if shape is None or len(shape) > 1 or nbytes != size * math.prod(shape):
        raise Wrong("one text, number or list of numbers", shape)
    value = np.zeros(shape, dtype)
    try:
        stored.read(value, mtype=memory)
    except TypeError as error:
        raise Wrong("one text, or one of the numbers, without axes", str(error)) from None
    if is_text:
        return _decoded(value, shape)
    return value if shape else value.item()


class _Type(NamedTuple):
    """A type of texts or numbers: bytes of a value in an attribute, and the type in memory, numpy's and HDF5's."""

    size: int
    dtype: np.dtype[Any]
    memory: h5py.h5t.TypeID
    is_text: bool


@functools.lru_cache(maxsize=256)
def _type(encoded: bytes) -> _Type | None:
    """Return the type that HDF5 encodes so, None for others: a file has a handful of them, and each takes long to make.

    Raises TypeError for numbers that numpy has not.
    """
    kind = h5py.h5t.decode(encoded)
    if kind.get_class() not in (h5py.h5t.STRING, h5py.h5t.INTEGER, h5py.h5t.FLOAT):
        return None
    is_text = isinstance(kind, h5py.h5t.TypeStringID)
    varies = is_text and kind.is_variable_str()
    dtype = _TEXT if varies and kind.get_cset() else kind.dtype
    return _Type(_REFERENCE if varies else kind.get_size(), dtype, h5py.h5t.py_create(dtype), is_text)


@functools.lru_cache(maxsize=256)
def is_storable(encoded: bytes) -> bool:
    """Return whether values of a type, as HDF5 encodes it, are numbers or texts. May raise TypeError."""
    dtype = h5py.h5t.decode(encoded).dtype
    return dtype.kind in "iuf" or h5py.check_string_dtype(dtype) is not None


def _decoded(value: Array, shape: tuple[int, ...]) -> str:
    if shape:
        raise Wrong("one text", shape)
    raw = value.item()
    try:
        said = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise Wrong("a text in UTF-8", raw) from None
    if "\0" in said:
        raise Wrong("a text without NUL", said)
    return str(said)


_REFERENCE = 16
"""Bytes that a text of any length has in an attribute: its own length, and where it lies."""
_TEXT = h5py.string_dtype("utf-8")
MOST_ATTRIBUTE = 2**26
"""Bytes of an attribute in the file; one of more than 64 KiB is an odd one already."""


# -------------------------------------------------------------------------------------------------------------- scales


def is_scale(dataset: h5py.h5d.DatasetID) -> bool:
    return bool(h5py.h5a.exists(dataset, b"CLASS"))


def scales(dataset: h5py.h5d.DatasetID, where: str) -> list[list[int]]:
    """Return the addresses of the scales attached to each axis of a dataset.

    Raises DamagedError where `DIMENSION_LIST` is not what HDF5 writes, or points to nothing.
    """
    axes = len(dataset.shape)
    if not h5py.h5a.exists(dataset, b"DIMENSION_LIST"):
        return [[] for _ in range(axes)]
    stored = h5py.h5a.open(dataset, b"DIMENSION_LIST")
    kind = stored.get_type()
    if (
        not isinstance(kind, h5py.h5t.TypeVlenID)
        or not kind.get_super().equal(h5py.h5t.STD_REF_OBJ)
        or stored.shape != (axes,)
    ):
        raise DamagedError(f"{where}: its DIMENSION_LIST is not one list of references per axis")
    lists = np.empty(axes, _LISTS)
    stored.read(lists, mtype=_LISTS_IN_MEMORY)
    return [[_address(reference, dataset, where) for reference in one] for one in lists]


_LISTS = h5py.vlen_dtype(h5py.ref_dtype)
_LISTS_IN_MEMORY = h5py.h5t.py_create(_LISTS)


def _address(reference: h5py.h5r.Reference, dataset: h5py.h5d.DatasetID, where: str) -> int:
    try:
        found = h5py.h5r.dereference(reference, dataset) if reference else None
        if isinstance(found, h5py.h5d.DatasetID):
            return int(h5py.h5o.get_info(found).addr)
    except (OSError, RuntimeError, ValueError, TypeError, KeyError):
        found = None
    raise DamagedError(f"{where}: a scale of it is not there")


# ---------------------------------------------------------------------------------------------------------- statistics


def statistics(values: Mapping[str, Array], channels: int, where: str) -> dict[str, Array]:
    """Return the statistics of a layer, each of them what it can be. Raises DamagedError for one that is not."""
    for name, array in values.items():
        first = len(values.get("covariance_count", array)) if name in COVARIANCE else channels
        shapes = {(first, first)} if name == "covariance" else {(first, *array.shape[1:])}
        axes = (2,) if name == "covariance" or name in TOP else (1,) if name in (*STATISTICS, *COVARIANCE) else (1, 2)
        if array.ndim not in axes or array.shape not in shapes or array.dtype.kind not in "iuf":
            raise DamagedError(f"{where}/{name}: expected numbers of {first} channels, got {_short(array)}")
        if known := STATISTICS.get(name):
            _check_numbers(array, known, f"{where}/{name}")
    kept = [values[name].shape for name in TOP if name in values]
    if kept and (len(kept) != len(TOP) or len(set(kept)) > 1):
        raise DamagedError(f"{where}: expected {', '.join(TOP)} of one shape")
    if values.keys() & set(COVARIANCE) and not set(COVARIANCE) <= values.keys():
        raise DamagedError(f"{where}: expected {', '.join(COVARIANCE)} together")
    return dict(values)


def _check_numbers(array: Array, known: Statistic, where: str) -> None:
    if known.integers and array.dtype.kind not in "iu":
        raise DamagedError(f"{where}: expected integers, got {array.dtype}")
    finite = np.isfinite(array)
    if known.finite and not finite.all():
        raise DamagedError(f"{where}: expected finite numbers")
    some = array[finite]
    if some.size and not (known.low <= some.min() and some.max() <= known.high):
        raise DamagedError(f"{where}: expected numbers of {known.low:g} to {known.high:g}")
