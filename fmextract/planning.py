"""What a run will do, before it does it: layers, chunks, shards, and what they will cost.

A plan is plain data. It is published as `plan.json` before the first image is read, and everything that a shard holds
depends on it alone; so a run that died is taken up again by whoever has the plan and the images.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from fmextract.common import text
from fmextract.errors import FormatError, OutputError
from fmextract.records import FORMAT_VERSION, Field, LayerSpec
from fmextract.storage import durable, schema
from fmextract.storage.shards import read_sealed

PLAN_FORMAT = "fmextract-plan"


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run will cost. Bytes on disk come from compressing a probe batch, seconds from timing it.

    `bytes_peak` is the host memory that the run adds to the loaded model. `bytes_needed` is what must be free on the
    disk, twice the output where several shards become one file; `bytes_free` is what is free, None where not known.
    """

    bytes_raw: int = 0
    bytes_stored: int = 0
    seconds: float = 0.0
    bytes_peak: int = 0
    bytes_needed: int = 0
    bytes_free: int | None = None
    stored_per_image: Mapping[str, float] = dataclasses.field(default_factory=dict)


_LAYER_FIELDS = tuple(field.name for field in dataclasses.fields(LayerSpec))
_TUPLES = {"shape", "axes", "chunk", "classes", "further_paths"}  # lists in JSON


class _SaidOfRun(TypedDict):
    title: str
    source: str
    history: str
    model: str
    weights: str | None
    weights_sha256: str
    origin: Mapping[str, Any]
    input_dtype: str
    preprocess: Mapping[str, Any]
    created: str


class RunInfo(_SaidOfRun, total=False):
    """What a file says of its run. `images`: where the files of its source lie; `label_names`: JSON."""

    images: Mapping[str, str]
    label_names: str


class Identity(TypedDict, total=False):
    """What decides the stored values of a run, and what a resume compares. Of an earlier version some are missing."""

    model: str
    weights: str
    preprocess: Mapping[str, Any]
    input_shape: Sequence[int]
    exif: bool
    jpeg_decoder: str
    layers: Sequence[str]
    precision: str
    memory_format: str
    compile: bool
    batch_size: int | None
    device: str
    dtype: str
    clip: bool
    keep_bits: int | None
    codec: str
    level: int | None
    top_k: int
    seed: int
    random: str
    max_error: float | None
    source: Mapping[str, Any]
    code: Mapping[str, Any]
    not_covered: Sequence[str]


@dataclass(frozen=True, slots=True, repr=False)
class Plan(text.Tabled):
    """Everything that decides what the shards of a run hold, resolved: no `auto` is left.

    Attributes:
        run_id: Names the run.
        rows: Images.
        layers: How each layer is taken and stored.
        precision: Of the forward pass.
        memory_format: Of the forward pass.
        batch_size: Images per batch.
        device: Where the forward pass runs.
        threads: How many decode and encode.
        forward_threads: Threads of one operation of the model on a CPU, whose number changes the last bits.
        codec: Compression.
        level: Of the codec.
        dtype: Type on disk of floating-point layers.
        keep_bits: Mantissa bits that are kept; None: all.
        clip: Whether values beyond float16 are clipped.
        top_k: Strongest images kept for each channel.
        shard_rows: Rows of every shard but the last.
        identity: What a resume compares (see `differences`).
        config: The options as they were asked for.
        info: What the files will say of the run.
        versions: Of the libraries, by name.
        fused: (convolution, batch norm) that run as one.
        pooling: Whether max pooling in half precision goes a faster way.
        prepacked: Whether weights in half precision do.
        estimate: Bytes and seconds.
        notes: Lines worth reading.

    Examples:
        >>> plan = fm.plan("photos/", "shufflenet_v2_x0_5", layers="conv5=mean", weights="random:0")
        >>> print(plan)  # doctest: +ELLIPSIS
        4 images in 1 shard of up to ...
        >>> plan.save("plan.json")
        >>> fm.Plan.load("plan.json").layers == plan.layers
        True
    """

    run_id: str
    rows: int
    layers: tuple[LayerSpec, ...]
    precision: str
    memory_format: str
    batch_size: int
    device: str
    threads: int
    forward_threads: int
    codec: str
    level: int
    dtype: str
    keep_bits: int | None
    clip: bool
    top_k: int
    shard_rows: int
    identity: Identity
    config: Mapping[str, Any]
    info: RunInfo
    versions: Mapping[str, str]
    fused: tuple[tuple[str, str], ...] = ()
    pooling: bool = False
    prepacked: bool = False
    estimate: Estimate = dataclasses.field(default_factory=Estimate)
    notes: tuple[str, ...] = ()

    @property
    def shards(self) -> list[range]:
        """The row ranges of the shards, in order."""
        return [range(a, min(a + self.shard_rows, self.rows)) for a in range(0, self.rows, self.shard_rows)]

    def table(self, width: int | None = None) -> str:
        """Return what the run will do and cost, and its layers, as `fmextract plan` shows it."""
        cost = self.estimate
        head = [
            f"{text.count(self.rows, 'image')} in {text.count(len(self.shards), 'shard')} of up to {self.shard_rows:,}",
            f"{self.precision} on {self.device}, batch size {self.batch_size}, {self.memory_format}"
            + (", batch norm inside the convolutions" if self.fused else "")
            + (", compiled" if self.config.get("compile") else "")
            + (", JPEGs decoded on the device" if self.config.get("jpeg_decoder") == "device" else ""),
            f"{text.count(self.threads, 'thread')}, {self.dtype} with {self.codec}, level {self.level}",
            f"{text.byte_count(cost.bytes_raw)} of values, about {text.byte_count(cost.bytes_stored)} on disk"
            + (f", about {text.duration(cost.seconds)}" if cost.seconds else "")
            + (f", {text.byte_count(cost.bytes_peak)} of memory" if cost.bytes_peak else ""),
        ]
        rows = [
            (
                layer.name,
                layer.module_type,
                text.shape(layer.shape),
                ", ".join(layer.axes),
                layer.dtype,
                layer.compute_dtype,
                text.byte_count(cost.stored_per_image.get(layer.name, 0)),
                text.share(layer.rel_error),
            )
            for layer in self.layers
        ]
        columns = ("layer", "type", "shape", "axes", "on disk", "computed in", "bytes/image", "error")
        return "\n".join([*head, "", text.table(columns, rows, right=("bytes/image", "error"), width=width)])

    def __repr__(self) -> str:
        what = f"{text.count(self.rows, 'image')}, {text.count(len(self.layers), 'layer')}"
        size = text.byte_count(self.estimate.bytes_stored)
        return f"<Plan: {what}, {self.precision} on {self.device}, about {size} on disk>"

    def as_json(self) -> dict[str, Any]:
        """Plain data for `plan.json`; `from_json` is the inverse."""
        plain = dataclasses.asdict(dataclasses.replace(self, layers=()))
        plain["layers"] = [_layer_as_json(layer) for layer in self.layers]
        plain["shards"] = [[part.start, part.stop] for part in self.shards]
        return {"format": PLAN_FORMAT, "format_version": FORMAT_VERSION, **plain}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file, for `extract(…, plan=path)`.

        Raises:
            OutputError: Where something else than an earlier plan stands there.
            NoSpace: Where the disk is full.
        """
        target = Path(path).expanduser()
        if os.path.lexists(target):
            try:
                Plan.load(target)
            except FormatError as error:
                raise OutputError(f"{target} exists, and is not a plan of fmextract: choose another name") from error
        durable.write_json(target, self.as_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """What was saved there. Raises OutputError where nothing is there, FormatError where it is no plan."""
        return cls.from_json(read_sealed(Path(path)), path)

    @classmethod
    def from_json(cls, obj: Any, where: str | os.PathLike[str] = "plan.json") -> Plan:
        """Raises FormatError for anything but what `as_json` gives."""
        if not isinstance(obj, dict) or obj.get("format") != PLAN_FORMAT:
            raise FormatError(f"{where} is not the plan of an fmextract run")
        if obj.get("format_version") != FORMAT_VERSION:
            raise FormatError(f"{where} is of version {obj.get('format_version')}, this program knows {FORMAT_VERSION}")
        obj = schema.checked(obj, schema.PLAN, str(where))
        try:
            known = {f.name: obj[f.name] for f in dataclasses.fields(cls) if f.name in obj or not _has_default(f)}
            known["fused"] = tuple((str(conv), str(norm)) for conv, norm in obj.get("fused", ()))
            known["layers"] = tuple(_layer_from_json(layer) for layer in obj["layers"])
            known["estimate"] = Estimate(**obj["estimate"])
            known["notes"] = tuple(obj["notes"])
            listed = obj["shards"]
            # Counted first: a plan of few bytes may speak of more shards than there is memory for.
            if len(listed) != -(-obj["rows"] // obj["shard_rows"]):
                raise ValueError(f"{len(listed)} shards do not make {obj['rows']} rows")
            plan = cls(**known)
            if [[rows.start, rows.stop] for rows in plan.shards] != listed:
                raise ValueError("its shards do not follow one another")
            return plan
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"{where} is damaged: {type(error).__name__}: {error}") from error


def _has_default(field: dataclasses.Field[Any]) -> bool:
    """Whether a plan may lack the field: it came later than the first plans."""
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _layer_as_json(layer: LayerSpec) -> dict[str, Any]:
    """`dataclasses.asdict` of it: that copies one value after the other, which is slow for thousands of layers."""
    said = {name: getattr(layer, name) for name in _LAYER_FIELDS}
    return said if layer.field is None else {**said, "field": dataclasses.asdict(layer.field)}


def _layer_from_json(obj: Mapping[str, Any]) -> LayerSpec:
    made = {**obj}
    for name in _TUPLES & made.keys():
        made[name] = tuple(made[name])
    if made["field"] is not None:
        field: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in made["field"].items()}
        made["field"] = Field(**field)
    return LayerSpec(**made)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(field, old value, new value) for every field in which two nested mappings differ."""
    for name in dict.fromkeys((*old, *new)):
        a, b = old.get(name), new.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from differences(a, b, f"{path}{name}.")
        elif a != b:
            yield f"{path}{name}", a, b


def step(layers: Sequence[LayerSpec], batch_size: int) -> int:
    """Rows that are whole batches, and whole chunks of every layer."""
    return math.lcm(batch_size, *(layer.chunk[0] for layer in layers))
