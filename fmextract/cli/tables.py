"""What each command tells a person: a result → lines of text. `cli` shows it, or JSON of the same."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmextract.common import text
from fmextract.records import Result

if TYPE_CHECKING:
    from fmextract.visual.depth import LayerDepth
    from fmextract.visual.top import Example
    from fmextract.visual.where import Where


def summary(result: Result) -> str:
    """A finished run: rows, speed, bytes, and its layers."""
    held = [f"{text.count(result.images, 'image')} in {text.printable(result.output)}"]
    if result.failed:
        held.append(f"{result.failed:,} of them failed")
    if result.resumed_images:
        held.append(f"{result.resumed_images:,} there before")
    if result.resumed_images == result.images:
        run = ["complete already, nothing was run"]
    else:
        run = [
            f"{text.duration(result.seconds)} in all, {text.rate(result.images_per_second)} images/s once they began"
        ]
    run.append(f"{result.device}, {result.precision}, batch size {result.batch_size}")
    if result.stages:
        run.append(f"limited by {result.limiting_stage}")
    if result.bytes_stored:
        change = text.size_change(result.bytes_raw, result.bytes_stored)
        run.append(f"{text.byte_count(result.bytes_raw)} → {text.byte_count(result.bytes_stored)} ({change})")
    rows = [
        (
            layer.name,
            text.shape(layer.shape),
            layer.dtype,
            text.byte_count(layer.bytes_stored),
            text.share(layer.sparsity),
            f"{layer.nonfinite:,}" if layer.nonfinite else "",
            text.share(layer.rel_error),
        )
        for layer in result.layers
    ]
    head = ("layer", "shape", "type", "stored", "zeros", "not finite", "error")
    layers = _table(head, rows, right=("stored", "zeros", "not finite", "error"))
    return "\n".join([", ".join(held), "; ".join(run), "", layers])


def failures(result: Result) -> str:
    """The first images that failed, with the reason; there is at least one."""
    lines = [f"{text.count(result.failed, 'image')} failed; the file holds the reasons (status, message):"]
    lines += [f"  {text.printable(key)}: {text.printable(message)}" for key, message in result.failures]
    if result.failed > len(result.failures):
        lines.append("  …")
    return "\n".join(lines)


def _speed(said: Mapping[str, Any] | None) -> str | None:
    if said is None:
        return None
    return f"{text.rate(said['images_per_second'])} images/s, {said['images']:,} images in {said['seconds']:,.1f} s"


def info(said: Mapping[str, Any]) -> str:
    """What an output holds; `said` is what `Activations.info` returns."""
    facts = [
        ("output", said["path"]),
        ("format", f"{said['format']}, {text.count(said['files'], 'file')}"),
        ("model", said["model"]),
        ("weights", f"sha256 {said['weights_sha256']}" if said["weights_sha256"] else None),
        ("precision", said["precision"]),
        ("created", said["created"]),
        ("speed", _speed(said["throughput"])),
        ("rows", f"{said['rows']:,}" + (f", {said['failed']:,} of them failed" if said["failed"] else "")),
        ("values", f"{text.byte_count(said['bytes_raw'])} → {text.byte_count(said['bytes_stored'])} on disk"),
    ]
    lines = [f"{name:9}  {text.printable(value)}" for name, value in facts if value is not None]
    lines += [
        f"  {text.printable(failure['key'])}: {text.printable(failure['message'])}" for failure in said["failures"]
    ]
    rows = [
        (
            layer["name"],
            text.shape(layer["shape"]),
            ", ".join(layer["axes"]),
            layer["dtype"],
            layer["compute_dtype"],
            layer["codec"],
            text.byte_count(layer["bytes_stored"]),
            f"{layer['ratio']:.1f}" if layer["ratio"] else "",
        )
        for layer in said["layers"]
    ]
    head = ("layer", "shape", "axes", "type", "computed in", "codec", "stored", "ratio")
    return "\n".join([*lines, "", _table(head, rows, right=("stored", "ratio"))])


def depth(found: Sequence[LayerDepth]) -> str:
    """How sparse and alive each layer is, and of how many dimensions."""
    rows = [
        (
            row.layer,
            row.type,
            row.channels,
            text.share(row.zeros),
            text.share(row.near_zeros),
            _dimension(row),
            f"{row.mean:.3g}",
            f"{row.std:.3g}",
            f"{row.min:.3g}",
            f"{row.max:.3g}",
            row.dead,
            row.constant or "",
            row.nonfinite or "",
        )
        for row in found
    ]
    head = ("layer", "type", "channels", "zeros", "near zero", "dimension", "mean", "std", "min", "max", "dead",
            "constant", "not finite")  # fmt: skip
    return "\n".join([_table(head, rows, right=head[2:]), *_about_depth(found)])


def _dimension(row: LayerDepth) -> str:
    if row.effective_dimension is None:
        return ""
    about = "~" if row.effective_dimension_estimated else ""
    digits = ",.0f" if row.effective_dimension >= 100 else "#.3g"
    return about + format(row.effective_dimension, digits)


def _about_depth(found: Sequence[LayerDepth]) -> list[str]:
    told = []
    if any(row.near_zeros is not None for row in found):
        told.append("near zero: at most 1% of the layer's root mean square either side of zero, zeros included")
    if rows := [row.effective_dimension_rows for row in found if row.effective_dimension_rows is not None]:
        about = "; ~ is estimated" if any(row.effective_dimension_estimated for row in found) else ""
        told.append(f"dimension: the participation ratio over {text.count(max(rows), 'image')}{about}")
    return ["", *told] if told else []


def examples(out: Path, found: Sequence[Example]) -> str:
    """A picture, and the strongest images of its channels."""
    rows = [(e.channel, f"{e.value:.4g}", e.key, _place(e.cell), _place(e.photo_box)) for e in found]
    head = ("channel", "value", "image", "cell (y, x)", "in the photo (y0, x0, y1, x1)")
    return "\n".join([text.printable(out), "", _table(head, rows, right=("channel", "value"))])


def where(out: Path, found: Where) -> str:
    """A picture, and where in the image each of the strongest channels looks."""
    rows: list[tuple[object, ...]] = [
        (peak.channel, f"{peak.strength:.1f}", f"{peak.value:.4g}", _place(peak.cell), _place(peak.photo_box))
        for peak in found.peaks
    ]
    head = ("channel", "strength", "value", "cell (y, x)", "in the photo (y0, x0, y1, x1)")
    rows.append(("all", "", f"{found.heat.max():.4g}", _place(found.cell), _place(found.hottest_in_photo)))
    return "\n".join([text.printable(out), "", _table(head, rows, right=("channel", "strength", "value"))])


def paths(pictures: Iterable[Path]) -> str:
    """Pictures, one a line, each once."""
    return "\n".join(text.printable(path) for path in dict.fromkeys(pictures))


def _place(numbers: Sequence[float] | None) -> str:
    return "" if numbers is None else ", ".join(f"{round(number)}" for number in numbers)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]], right: Sequence[str]) -> str:
    return text.table(head, rows, right=right, width=width())


def width() -> int | None:
    """Characters that a table is cut to: those of the terminal; None where stdout is a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
