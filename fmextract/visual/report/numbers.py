"""Collect the numbers of a report as plain data: the run, its failures, each layer with its histogram, each channel."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fmextract.common.folders import common_folder, local_name, without_folders
from fmextract.common.text import printable
from fmextract.errors import ConfigError
from fmextract.reading.activations import Activations
from fmextract.reading.layer import Layer, Stats
from fmextract.records import STATUS_MEANINGS
from fmextract.storage.layer_stats import NEAR_ZERO, NEAR_ZERO_SHARE

Array: TypeAlias = npt.NDArray[Any]

FAILURES = 200
TOP = 9
"""Strongest images shown of a channel."""
BYTES_A_CHANNEL = 4 * 5.4 + TOP * 4 * 5.4
"""In the page: four statistics, and value, row, y and x of each strongest image, as base64."""
BINS = 60
VALUES_A_ROW = 20_000
LONGEST = 500
"""Characters of a key or a message: a damaged file may hold megabytes."""


def shown(text: object) -> str:
    """Return it on one line, cut to SHOWN, without characters that turn or hide others."""
    said = printable(text)
    return said if len(said) <= LONGEST else f"{said[: LONGEST // 2]} … {said[-LONGEST // 2 :]}"


def run(acts: Activations) -> dict[str, Any]:
    """Return what was run, in words and numbers; what the file does not say is left out."""
    config, info = acts.config, acts.info()
    by_status = np.bincount(acts.status, minlength=len(STATUS_MEANINGS))
    facts = {
        "model": local_name(acts.attrs.get("model", "")),
        "weights": _weights(acts),
        "source": local_name(acts.attrs.get("source", "")),
        "preprocessing": _preprocessing(acts.preprocess),
        "precision": acts.attrs.get("precision"),
        "device": config.get("device"),
        "batch size": config.get("batch_size"),
        "throughput": _throughput(info["throughput"]),
        "created": acts.attrs.get("created"),
        "files": info["files"],
        "versions": ", ".join(f"{name} {version}" for name, version in acts.versions.items()),
    }
    return {
        "name": shown(acts.path.name),
        "model": shown(local_name(acts.attrs.get("model", ""))),
        "facts": [[name, shown(value)] for name, value in facts.items() if value not in (None, "")],
        "rows": acts.num_rows,
        "failed": int(by_status[1:].sum()),
        "statuses": {name.replace("_", " "): n for name, n in zip(STATUS_MEANINGS, by_status.tolist(), strict=False)},
        "bytes_raw": info["bytes_raw"],
        "bytes_stored": info["bytes_stored"],
        "precision": shown(acts.attrs.get("precision", "")),
    }


def _throughput(said: Mapping[str, Any] | None) -> str | None:
    if said is None:
        return None
    busy = sorted(said["busy_seconds"].items(), key=lambda item: -item[1])[:3]
    stages = ", ".join(f"{stage} {seconds:,.1f} s" for stage, seconds in busy)
    speed = f"{said['images_per_second']:,.1f} images/s: {said['images']:,} images in {said['seconds']:,.1f} s"
    return f"{speed}; busiest, over all threads: {stages}" if stages else speed


def _weights(acts: Activations) -> str:
    asked, digest = acts.config.get("weights"), acts.attrs.get("weights_sha256")
    return " · ".join([*([local_name(asked)] if asked else []), *([f"sha256 {str(digest)[:16]}"] if digest else [])])


def _preprocessing(preprocess: Mapping[str, Any]) -> str:
    """Say it as `resize 256, crop 224×224, bicubic`."""
    if preprocess.get("kind", "standard") != "standard":
        return local_name(preprocess.get("origin") or "the user's own")

    def pixels(size: Any) -> str:
        return "×".join(map(str, size)) if isinstance(size, (list, tuple)) else str(size)

    words = [f"{step} {pixels(preprocess[step])}" for step in ("resize", "crop") if preprocess.get(step)]
    words += [local_name(preprocess[name]) for name in ("interpolation", "origin") if preprocess.get(name)]
    for name in ("mean", "std"):
        if isinstance(preprocess.get(name), list):
            words.append(f"{name} {' '.join(f'{value:.3g}' for value in preprocess[name])}")
    return ", ".join(words)


class Places:
    """Where images lie, for a page that is passed on: names, and no folders of this machine.

    Keys that are absolute paths lose the folder that all have in common, so that they still differ.
    """

    def __init__(self, acts: Activations, *folders: str) -> None:
        self._keys, self._common = acts.keys, common_folder(map(str, acts.keys))
        self._known = [self._common, acts.images.get("absolute", ""), str(acts.path.absolute().parent), *folders]

    def key(self, row: int) -> str:
        """Return the key of a row."""
        key = str(self._keys[row])
        return shown(key.removeprefix(self._common) if key.startswith("/") else key)

    def sentence(self, text: str) -> str:
        return without_folders(text, self._known)


def failures(acts: Activations, places: Places) -> list[dict[str, Any]]:
    """Return the first failed rows."""
    return [
        {
            "row": row,
            "key": places.key(row),
            "status": STATUS_MEANINGS[min(int(acts.status[row]), len(STATUS_MEANINGS) - 1)].replace("_", " "),
            "message": shown(places.sentence(str(acts.messages[row]))),
        }
        for row in np.flatnonzero(acts.status)[:FAILURES].tolist()
    ]


# ------------------------------------------------------------------------------------------------------- layers


@dataclass(frozen=True, slots=True)
class Sample:
    """Some stored values of a layer, float64, taken at even steps from some rows."""

    values: Array
    rows: int


def sample(layer: Layer, rows: Sequence[int]) -> Sample:
    """Take at most VALUES_A_ROW values of each row."""
    taken = []
    for row in rows:
        values = np.asarray(layer[row]).reshape(-1)
        # A step that shares no factor with the axes would be better still; an odd one visits every column.
        step = max(1, -(-values.size // VALUES_A_ROW)) | 1
        taken.append(values[::step].astype(np.float64))
    return Sample(np.concatenate(taken) if taken else np.empty(0), len(rows))


def layer(layer: Layer, sampled: Sample) -> dict[str, Any]:
    """Describe one layer: what it is, its statistics and its histogram."""
    field, info = layer.field, layer.info()
    effective = layer.attrs.get("erf_size")
    return {
        "name": shown(layer.name),
        "module": shown(layer.module),
        "type": shown(layer.module_type),
        "numbers": [shown(number) for number in layer.numbers],
        "call": layer.spec.call,
        "calls": layer.spec.calls,
        "tap": layer.spec.tap,
        "reducer": shown(layer.spec.reducer),
        "shape": layer.shape[1:],
        "axes": layer.axes[1:],
        "dtype": layer.dtype.name,
        "compute_dtype": shown(layer.compute_dtype),
        "rel_error": layer.spec.rel_error,
        "bytes_raw": info["bytes_raw"],
        "bytes_stored": info["bytes_stored"],
        "field": None
        if field is None
        else {name: getattr(field, name) for name in ("size", "stride", "offset", "bound", "whole", "has_global")},
        "erf": None if effective is None else [float(np.max(effective))] * 2,  # the side of a square
        "stats": _summary(stats_of(layer), sampled) | _dimension(layer),
        "histogram": _histogram(sampled),
    }


def stats_of(layer: Layer) -> Stats | None:
    """Return the position of the channel axis; None where it is not known."""
    try:
        return layer.stats
    except ConfigError:
        return None


def _summary(stats: Stats | None, sampled: Sample) -> dict[str, Any]:
    """Summarise all channels, by the run's statistics if there are any, else by the sample."""
    finite = sampled.values[np.isfinite(sampled.values)]
    some = finite if finite.size else np.array([np.nan])
    if stats is None:
        made = {
            "zeros": float((some == 0).mean()) if finite.size else None,
            "mean": some.mean(),
            "std": some.std(),
            "min": some.min(),
            "max": some.max(),
            "nonfinite": len(sampled.values) - len(finite),
            "dead": None,
            "channels": None,
        }
    else:
        weight = stats.count / max(1, stats.count.sum())
        mean = float(np.nansum(weight * stats.mean))
        empty = not stats.count.sum()
        made = {
            "zeros": None if empty else float(np.nansum(weight * stats.zero_fraction)),
            "mean": None if empty else mean,
            "std": None if empty else math.sqrt(np.nansum(weight * (stats.std**2 + (stats.mean - mean) ** 2))),
            "min": None if empty else np.nanmin(stats.min),
            "max": None if empty else np.nanmax(stats.max),
            "nonfinite": int(stats.nonfinite.sum()),
            "dead": int((stats.zero_fraction == 1).sum()),
            "channels": len(stats.count),
        }
    counted = stats is not None and NEAR_ZERO in stats.names
    if stats is not None and counted:
        near = None if empty else float(np.nansum(weight * stats.near_zero_fraction))
    else:
        near = (
            float((np.abs(finite) <= NEAR_ZERO_SHARE * math.sqrt(np.square(finite).mean())).mean())
            if finite.size
            else None
        )
    return {**made, "sampled": stats is None, "near": near, "near_sampled": not counted}


def _dimension(layer: Layer) -> dict[str, Any]:
    found = layer.effective_dimension
    return {
        "dimension": found and found.value,
        "dimension_rows": found and found.rows,
        "dimension_estimated": found and found.estimated,
    }


def _histogram(sampled: Sample) -> dict[str, Any] | None:
    """Make a histogram of the finite values that are not zero; a spike of zeros would hide the others.

    The outermost thousandths lie outside the bins and are counted: one outlier would squeeze all others into one bin.
    """
    finite = sampled.values[np.isfinite(sampled.values)]
    others = finite[finite != 0]
    if not finite.size:
        return None
    made: dict[str, Any] = {"values": len(finite), "rows": sampled.rows, "zeros": len(finite) - len(others)}
    if not others.size:
        return {**made, "counts": [], "low": 0.0, "high": 0.0, "below": 0, "above": 0}
    low, high = np.quantile(others, (0.001, 0.999)) if len(others) > 2000 else (others.min(), others.max())
    if not high > low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    counts, _ = np.histogram(others, BINS, (low, high))
    return {**made, "counts": counts, "low": low, "high": high,
            "below": int((others < low).sum()), "above": int((others > high).sum())}  # fmt: skip


# ----------------------------------------------------------------------------------------------------- channels


def channel_count(layer: Layer) -> int:
    """Return the number of channels; 0 without statistics by channel."""
    stats = stats_of(layer)
    return 0 if stats is None else len(stats.count)


def spread_of_channels(layer: Layer) -> Array:
    """Return how much each channel varies over the data set; 0 where it has no values."""
    stats = stats_of(layer)
    return np.zeros(0) if stats is None else np.nan_to_num(stats.std, nan=0.0, posinf=0.0)


@dataclass(frozen=True, slots=True)
class Channels:
    """Channels of a layer. `rows` are those that they name, the featured channels' first."""

    data: dict[str, Any]
    rows: list[int]


def channels(layer: Layer, chosen: Sequence[int], featured: int) -> Channels | None:
    """Return the statistics and strongest images of the chosen channels, in typed arrays; None where there are none."""
    stats = stats_of(layer)
    if stats is None or not chosen:
        return None
    numbers = np.asarray(chosen)
    data: dict[str, Any] = {
        "count": len(stats.count),
        "shown": None if len(chosen) == len(stats.count) else list(chosen),
        "mean": _packed(stats.mean[numbers], "<f4"),
        "std": _packed(stats.std[numbers], "<f4"),
        "max": _packed(stats.max[numbers], "<f4"),
        "zeros": _packed(stats.zero_fraction[numbers], "<f4"),
        "k": 0,
    }
    if "top_value" not in stats.names:
        return Channels(data, [])
    value, row, y, x = (getattr(stats, f"top_{part}")[numbers, :TOP] for part in ("value", "sample", "y", "x"))
    row = np.where(row >= 0, row - layer.acts.first_row, -1)  # of a lone shard, whose rows begin later
    row = np.where(row < len(layer), row, -1)
    data |= {
        "k": value.shape[1],
        "top_value": _packed(value, "<f4"),
        "top_row": _packed(row, "<i4"),
        "top_y": _packed(y, "<i4"),
        "top_x": _packed(x, "<i4"),
    }
    first = np.argsort(-spread_of_channels(layer)[numbers], kind="stable")
    order = [*row[first[:featured]].reshape(-1).tolist(), *row[first[featured:]].T.reshape(-1).tolist()]
    return Channels(data, [one for one in dict.fromkeys(order) if one >= 0])


def _packed(values: Array, dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values.astype(dtype)).tobytes()).decode("ascii")
