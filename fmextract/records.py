"""The nouns: what flows between the rooms. Plain frozen data, validated when made; no torch, no I/O."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from numbers import Integral
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

    Attributes:
        resize: Length of the shorter side in pixels, or (height, width), or None.
        crop: (height, width) in pixels, N for (N, N), or None.
        mean: Of each channel, in units of the 0..1 scale: input = (pixel / 255 - mean) / std.
        std: Of each channel, in the same units.
        interpolation: nearest, bilinear or bicubic.
        antialias: Whether resizing to smaller sizes averages.
        origin: Where this preprocessing comes from, for the file.

    Raises:
        ConfigError: For an interpolation that there is not, a size that is none, and a std that is not positive.

    Examples:
        >>> imagenet = fm.Preprocess(256, (224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        >>> imagenet.size
        (224, 224)
    """

    resize: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    interpolation: str = "bilinear"
    antialias: bool = True
    origin: str = ""

    def __post_init__(self) -> None:
        if _is_side(self.crop):
            object.__setattr__(self, "crop", (self.crop, self.crop))
        if not (self.resize is None or _is_side(self.resize) or _is_size(self.resize)):
            raise ConfigError(f"resize={self.resize!r}: expected a number of pixels, (height, width) or None")
        if not (self.crop is None or _is_size(self.crop)):
            raise ConfigError(f"crop={self.crop!r}: expected (height, width) in pixels, one number for both, or None")
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


def _is_side(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral) and int(value) > 0


def _is_size(value: object) -> bool:
    return isinstance(value, tuple | list) and len(value) == len(("height", "width")) and all(map(_is_side, value))


ROLES = ("channel", "y", "x", "time", "token", "feature")
SPATIAL = ("time", "y", "x")


@dataclass(frozen=True, slots=True)
class Field:
    """A receptive field along (y, x), in pixels of the network's input.

    Cell i covers the interval of `size` pixels centred on `offset + i * stride`; pixel p has its centre at p + 0.5.

    Attributes:
        size: (height, width) of what one cell sees.
        stride: (y, x) from one cell to the next.
        offset: (y, x) of the centre of the first cell.
        bound: At most that much, but for cells at the border behind padding by reflection and the like, which see
            pixels of the inside in place of those outside.
        whole: Every cell sees the whole image, whose size is given; offset and stride say where the cell stands.
        has_global: Something that is the same for all cells (squeeze-excitation, a norm over space) comes in as well,
            and is left out of the size.

    Examples:
        >>> with fm.open("acts.h5") as acts:
        ...     acts["conv1"].field.stride
        (2.0, 2.0)
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

    Attributes:
        name: The layer's name in the file.
        module: The module's path in the model, "" for the model itself.
        module_type: The name of its class.
        call: Which of its calls, from 1.
        calls: How many calls there are in a forward pass.
        tap: out or in: what the module gives, or is given.
        member: Which tensor of a tuple or mapping, as `[0]`, or "".
        reducer: As `mean`, or "".
        shape: Of one image, without the image axis.
        axes: What each axis of `shape` is: channel, y, x, time, token or feature.
        dtype: Type on disk (numpy's name).
        compute_dtype: Type in the forward pass (torch's name, as `bfloat16`).
        chunk: (images, *shape of the part of one image) in a chunk.
        mantissa: Mantissa bits that can be non-zero in the values, where they are fewer than `dtype` has.
        copied: Whether the tensor is copied in the hook, as it is overwritten later.
        rel_error: Relative L2 error of this layer against fp32, where it was measured.
        field: The receptive field of a cell, where it is known.
        erf_size: Side, in pixels of the input, of the square that holds 90 % of a cell's squared gradient; None where
            it was not measured.
        near_zero_below: Values of at most this either side of zero count as near zero; None where they are not counted.
        number: What a selector can call its module, as `conv#20 trunk#19`.
        number_from_end: The same from the end, as `conv#-33 trunk#-30`.
        classes: The classes that the module descends from, its own first.
        further_paths: Of a module that has several.
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
    """What stands in the root attributes of every file of a run.

    Attributes:
        title: What the file is, in a line.
        source: Where the images came from.
        history: When it was made and by which command, line by line.
        config: Everything needed to ask for the same run again.
        model: The model's name.
        weights_sha256: Of the model's state dict, in hex.
        preprocess: The fields of `Preprocess`.
        precision: That of the forward pass, resolved.
        versions: Of the libraries, by name.
        created: When the run began, ISO 8601 in UTC.
        extra: Further attributes.
    """

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
    """One line of `fmextract layers`: a module, or one tensor of one of its calls.

    Attributes:
        index: Its place in the order of execution, from 0; -1 for a module that the forward never calls.
        path: What a selector calls it.
        type: The name of the module's class.
        number: The selector by kind and order, as `conv#20`, or "".
        calls: How many calls there are in a forward pass.
        shape: Of one image, without the image axis; None where there is none.
        axes: What each axis of `shape` is: channel, y, x, time, token or feature.
        dtype: Type in the forward pass.
        bytes: Per image, in that type.
        overwritten: Whether a later operation writes over it; it is kept as it was.
        refused: Why it cannot be stored row by row, else "".
        field: The receptive field of a cell, where it is known.
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
    """What a run did: what `fmextract extract --json` prints.

    Attributes:
        output: The path.
        images: Rows, failed ones included.
        failed: Rows without values.
        seconds: Those of the whole command.
        images_per_second: From the first image that was read to the last shard that was written, over all shards,
            without what came before (building the model, the plan).
        bytes_raw: Of the values.
        bytes_stored: Of the output on disk.
        device: Where the forward pass ran.
        precision: That of the forward pass, resolved.
        batch_size: Images per batch.
        limiting_stage: The stage that was busiest, or "none".
        stages: Of each stage how many seconds it was busy, summed over its threads, and how many threads it had.
        layers: What is said of each layer.
        resumed_images: Rows that were there before.
        failures: The first failed (key, message) pairs.
        notes: Lines worth reading.
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
