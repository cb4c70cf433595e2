"""The nouns: what flows between the rooms. Plain frozen data, validated when made; no torch, no I/O."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from typing import Any, Protocol, TypeAlias, runtime_checkable

from fmextract.errors import ConfigError

FORMAT = "fmextract"
FORMAT_VERSION = 1


class Status(IntEnum):
    """What became of a row."""

    OK = 0
    UNREADABLE = 1
    UNDECODABLE = 2
    FORWARD_FAILED = 3


STATUS_MEANINGS = ("ok", "could_not_be_read", "could_not_be_decoded", "forward_failed")


Label: TypeAlias = int | float | str | list[Any] | dict[str, Any] | None
"""What stands beside an image: a number, text, a list of numbers, or anything that JSON can hold; None: no label."""


@runtime_checkable
class Source(Protocol):
    """Where images come from: random access by row.

    The thread that called the run calls it, or processes with copies of it; several threads at once where it has an
    attribute `thread_safe` that is True. Rows are 0 .. len-1 in a fixed order; `key` is unique and never shortened. A
    source may also have `notes`, a list of lines worth reading about what it took and what it passed over.
    """

    @property
    def name(self) -> str:
        """What to show a person: the folder, the manifest, the type of the Dataset."""

    def __len__(self) -> int: ...

    def key(self, row: int) -> str: ...

    def label(self, row: int) -> Label: ...

    def load(self, row: int) -> Any:
        """The image of a row: its encoded bytes, or an array, tensor or PIL image.

        Raises SampleError(Status.UNREADABLE, …) when it cannot be had.
        """

    def fingerprint(self) -> Mapping[str, Any]:
        """JSON-able identity of the source (count, digests of keys and sizes): decides whether a run may resume."""


@dataclass(frozen=True, slots=True)
class Preprocess:
    """From a decoded photo to the input of a model: resize, centre crop, scale to 0..1, normalise.

    `resize` is the length of the shorter side, or (height, width), or None. `crop` is (height, width) or None.
    `mean` and `std` are in units of the 0..1 scale, one a channel: input = (pixel / 255 - mean) / std.
    """

    resize: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    interpolation: str = "bilinear"
    antialias: bool = True
    origin: str = ""

    def __post_init__(self) -> None:
        if self.interpolation not in ("nearest", "bilinear", "bicubic"):
            raise ConfigError(f"unknown interpolation {self.interpolation!r}; expected nearest, bilinear or bicubic")
        if len(self.mean) != len(self.std) or not all(s > 0 for s in self.std):
            raise ConfigError(
                f"mean and std must have one value a channel and std must be positive, got {self.mean} and {self.std}"
            )

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of every input, or None where it depends on the photo."""
        if self.crop is not None:
            return self.crop
        return self.resize if isinstance(self.resize, tuple) else None


ROLES = ("channel", "y", "x", "time", "token", "feature")
SPATIAL = ("time", "y", "x")


@dataclass(frozen=True, slots=True)
class Field:
    """A receptive field along (y, x), in pixels of the network's input.

    Cell i covers the interval of `size` pixels centred on `offset + i * stride`; pixel p has its centre at p + 0.5.
    `bound`: at most that much, but for cells at the border behind padding by reflection and the like, which see pixels
    of the inside in place of those outside. `whole`: every cell sees the whole image, whose size is given; offset and
    stride say where the cell stands. `has_global`: something that is the same for all cells (squeeze-excitation, a norm
    over space) comes in as well, and is left out of the size.
    """

    size: tuple[float, float]
    stride: tuple[float, float]
    offset: tuple[float, float]
    bound: bool = False
    whole: bool = False
    has_global: bool = False


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One stored layer: how its values were taken from the model and how they lie on disk.

    `shape` and `axes` are those of one image (no sample axis). `dtype` is the type on disk (numpy name),
    `compute_dtype` that of the tensor in the forward pass (torch name, as `bfloat16`).
    `mantissa` is the number of explicit mantissa bits that can be non-zero in the values, when fewer than dtype has.
    `chunk` is (images, *shape of the part of one image in a chunk). `erf_size` is the side, in pixels of the input, of
    the square that holds 90 % of a cell's squared gradient, None where it was not measured. Values of at most
    `near_zero_below` either side of zero count as near zero, None where they are not counted. What a selector
    can mean its module by: `number`, as `conv#20 trunk#19`, and `number_from_end`, as `conv#-33 trunk#-30`; `classes`
    that it descends from, its own first; `further_paths` of a module that has several.
    """

    name: str
    module: str
    module_type: str
    call: int
    calls: int
    tap: str
    member: str
    reducer: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    dtype: str
    compute_dtype: str
    chunk: tuple[int, ...]
    mantissa: int | None = None
    copied: bool = False
    rel_error: float | None = None
    field: Field | None = None
    erf_size: float | None = None
    near_zero_below: float | None = None
    number: str = ""
    number_from_end: str = ""
    classes: tuple[str, ...] = ()
    further_paths: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"{self.name}: expected one axis role for each of {self.shape}, got {self.axes}")
        if len(self.chunk) != len(self.shape) + 1:
            raise ValueError(f"{self.name}: expected a chunk of {len(self.shape) + 1} axes, got {self.chunk}")
        if self.tap not in ("out", "in"):
            raise ValueError(f"{self.name}: expected tap 'out' or 'in', got {self.tap!r}")

    @property
    def channel_axis(self) -> int | None:
        """The axis of `shape` along which statistics are kept, None where the roles are not known."""
        for role in ("channel", "feature"):
            if role in self.axes:
                return self.axes.index(role)
        return None

    @property
    def values(self) -> int:
        """Values of one image."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class FileInfo:
    """What stands in the root attributes of every file of a run."""

    title: str
    source: str
    history: str
    config: Mapping[str, Any]
    model: str
    weights_sha256: str
    preprocess: Mapping[str, Any]
    precision: str
    versions: Mapping[str, str]
    created: str
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FileStamp:
    """What tells one content of a file from another: its size in bytes, and its XXH3 (128 bits) in hex.

    -1 and "" where there is no file, or nobody knows.
    """

    size: int = -1
    digest: str = ""


@dataclass(slots=True)
class SampleTable:
    """The columns that stand beside the activations, one entry a row of a shard. Filled while it runs.

    `files` says of each row which content of a file it was made of; `columns` are those that the source brings along.
    """

    start: int
    keys: list[str]
    labels: Sequence[Label] | None
    status: list[int]
    message: list[str]
    height: list[int]
    width: list[int]
    files: list[FileStamp]
    columns: Mapping[str, Sequence[Label]] = field(default_factory=dict)

    @classmethod
    def empty(cls, start: int, keys: list[str], labels: Sequence[Label] | None) -> SampleTable:
        """A table of `len(keys)` rows that all stand at status 0, size 0 x 0, of no file."""
        n = len(keys)
        return cls(start, keys, labels, [0] * n, [""] * n, [0] * n, [0] * n, [FileStamp()] * n)

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True, slots=True)
class ModuleRow:
    """One line of `fmextract layers`: a module (or one tensor of one of its calls) as the probe saw it.

    `index` counts the rows in the order of execution, from 0; -1 for a module that the forward never calls.
    `number` is the selector by kind and order, as `conv#20`, or "". `shape` and `bytes` are those of one image;
    `refused` says why it cannot be stored row by row, else "".
    """

    index: int
    path: str
    type: str
    number: str
    calls: int
    shape: tuple[int, ...] | None
    axes: tuple[str, ...]
    dtype: str
    bytes: int
    overwritten: bool
    refused: str
    field: Field | None = None


@dataclass(frozen=True, slots=True)
class LayerResult:
    """What a finished run says of one layer. `sparsity` is the share of exact zeros, None where not known."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes_stored: int
    sparsity: float | None
    nonfinite: int
    rel_error: float | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """What a run did; `as_json` is what `--json` prints.

    `seconds` are those of the whole command. `images_per_second` is what `info` shows as well: over all shards of the
    output, from the first image that was read to the last shard that was written, without what came before (building
    the model, the plan). `images` counts failed rows too.
    """

    output: str
    images: int
    failed: int
    seconds: float
    images_per_second: float
    bytes_raw: int
    bytes_stored: int
    device: str
    precision: str
    batch_size: int
    limiting_stage: str
    stages: Mapping[str, Mapping[str, float]]
    layers: tuple[LayerResult, ...]
    resumed_images: int
    failures: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain data, ready for `json.dumps`. `failures` are the first failed (key, message) pairs."""
        return asdict(self)


@runtime_checkable
class Progress(Protocol):
    """What a run tells a person while it goes. Every call comes from the thread that called the run, but for notes on
    what a run that does not move is waiting for, and on processes that ended."""

    def note(self, text: str) -> None:
        """One line worth reading: what was chosen and why, a warning."""

    def step(self, what: str, done: int, total: int) -> None:
        """A part of the preparation is at `done` of `total`; told where it takes long enough to be worth a line."""

    def start(self, total: int, done: int) -> None:
        """The images begin: `total` rows, of which `done` were there before."""

    def advance(self, images: int, failed: int) -> None:
        """`images` more rows are finished; `failed` rows have failed so far."""

    def finish(self) -> None:
        """The images are over, for good or ill."""
