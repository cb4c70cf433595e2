"""Describe the layout of a file, version 1: names, attributes and columns, written and read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from fmextract.common import strict_json
from fmextract.errors import LayerError
from fmextract.records import FORMAT, FORMAT_VERSION, Field, FileInfo, LayerSpec
from fmextract.storage.codecs import MOST_CHUNK_BYTES, Array
from fmextract.storage.objects import Values

Stats: TypeAlias = Mapping[str, Mapping[str, Any]]
"""By layer, by statistic: an array whose first axis is the channel."""


MAX_LAYERS = 4000
"""One dimension scale can be attached to about 4,085 datasets, and /sample is the scale of every layer."""


MAX_NAME = 255
"""Bytes in a name that netCDF-C can open (measured: 256 fail)."""


MAX_CHUNK_BYTES = MOST_CHUNK_BYTES


COLUMN_CHUNK = 4096


LIBVER = ("earliest", "v110")


INFLATION = 1100
"""No deflate stream grows by more (1032): a file that claims more values than this times its size is damaged."""


# ---------------------------------------------------------------------------------------------------- names and errors


def escape_name(name: str) -> str:
    """Return the group name of a layer: `/` would nest, so it becomes %2F, and % itself %25."""
    return name.replace("%", "%25").replace("/", "%2F")


def unescape_name(name: str) -> str:
    """Return the inverse of `escape_name`."""
    return name.replace("%2F", "/").replace("%25", "%")


def chunk_grid(shape: Sequence[int], chunk: Sequence[int]) -> tuple[int, ...]:
    """Return how many chunks there are along each axis."""
    return tuple(-(-size // step) for size, step in zip(shape, chunk, strict=True))


def check_layers(layers: Sequence[LayerSpec]) -> None:
    if len(layers) > MAX_LAYERS:
        raise LayerError(f"one file holds at most {MAX_LAYERS} layers, got {len(layers)}; select fewer, or run twice")
    names: set[str] = set()
    for spec in layers:
        group = escape_name(spec.name)
        if not group or group in (".", "..") or "\0" in group:
            raise LayerError(f"{spec.name!r} cannot be the name of a layer in a file")
        if len(group.encode()) > MAX_NAME:
            raise LayerError(f"the layer name {spec.name!r} is longer than the {MAX_NAME} bytes that netCDF allows")
        if group in names:
            raise LayerError(f"the layer {spec.name!r} is there twice")
        names.add(group)
        reserved = {"sample", "activation", "stats"}.intersection(spec.axes)
        if reserved or len(set(spec.axes)) != len(spec.axes):
            raise LayerError(f"{spec.name}: expected axes with different names other than sample, got {spec.axes}")
        if (
            any(not 0 < part <= size for part, size in zip(spec.chunk[1:], spec.shape, strict=True))
            or spec.chunk[0] < 1
        ):
            raise LayerError(f"{spec.name}: expected a chunk within the shape {spec.shape}, got {spec.chunk}")
        if np.dtype(spec.dtype).kind not in "fiu":
            raise LayerError(f"{spec.name}: values of type {spec.dtype} cannot be stored")
        if math.prod(spec.chunk) * np.dtype(spec.dtype).itemsize > MAX_CHUNK_BYTES:
            raise LayerError(f"{spec.name}: a chunk {spec.chunk} of {spec.dtype} is larger than 1 GiB")


def _root_attrs(info: FileInfo) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "Conventions": "CF-1.11",
        "title": info.title,
        "source": info.source,
        "history": info.history,
        "fmextract_config": info.config,
        "model": info.model,
        "weights_sha256": info.weights_sha256,
        "preprocess": info.preprocess,
        "precision": info.precision,
        "versions": info.versions,
        "created": info.created,
        **info.extra,
    }


FIELD_FLAGS = {"bound": "bound", "whole": "whole", "global": "has_global"}
"""What an attribute `rf_…` says of a field by being there, and the name of it in `records.Field`."""


def _layer_attrs(spec: LayerSpec) -> dict[str, Any]:
    attrs = {
        "module": spec.module,
        "module_type": spec.module_type,
        "call": spec.call,
        "calls": spec.calls,
        "number": spec.number or None,
        "number_from_end": spec.number_from_end or None,
        "classes": " ".join(spec.classes) or None,
        "further_paths": strict_json.dumps(spec.further_paths) if spec.further_paths else None,
        "tap": spec.tap,
        "member": spec.member or None,
        "reducer": spec.reducer or None,
        "compute_dtype": spec.compute_dtype,
        "mantissa": spec.mantissa,
        "copied": spec.copied,
        "rel_error": spec.rel_error,
    }
    if spec.field is not None:
        attrs |= {f"rf_{name}": getattr(spec.field, name) for name in ("size", "stride", "offset")}
        attrs |= {f"rf_{flag}": getattr(spec.field, name) or None for flag, name in FIELD_FLAGS.items()}
    attrs["erf_size"] = spec.erf_size
    attrs["near_zero_below"] = spec.near_zero_below
    return attrs


def _scales(spec: LayerSpec) -> list[Values]:
    """Return the scales of the axes behind the first."""
    made = []
    for role, size in zip(spec.axes, spec.shape, strict=True):
        values, attrs = coordinate(spec.field, role, size)
        made.append(Values(role, values, attrs=attrs))
    return made


def coordinate(field: Field | None, role: str, size: int) -> tuple[Array, dict[str, str]]:
    """Return the values along an axis: the centre of each cell's receptive field for y and x, else the index."""
    if role not in ("y", "x"):
        return np.arange(size, dtype=np.int32), {}
    index = np.arange(size, dtype=np.float64)
    if field is None:
        return index, {"long_name": "index"}
    along = ("y", "x").index(role)
    centres = field.offset[along] + index * field.stride[along]
    return centres, {"long_name": "centre of the receptive field", "units": "pixel"}
