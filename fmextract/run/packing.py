"""One file of a directory of shards, copied chunk by chunk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fmextract.common.folders import base_of, moved
from fmextract.config import is_single_file
from fmextract.errors import ConfigError, FormatError, OutputError
from fmextract.planning import Plan
from fmextract.reading import activations, counts
from fmextract.reading.totals import merged
from fmextract.storage import contents, durable, merging
from fmextract.storage.durable import writing
from fmextract.storage.shards import PLAN, load_index, load_records, remove_dead, shard_name


def check_ours(target: Path) -> None:
    """Only a file that says it is ours, and can be read, may be compared with or replaced."""
    try:
        with activations.open(target):
            pass
    except FormatError as error:
        raise OutputError(f"{target} exists and is no output of fmextract, or a broken one: {error}") from error


# ------------------------------------------------------------------------------------------------------------- packing


def pack(directory: Path, out: Path, *, leave_out: Sequence[range] = (), overwrite: bool = False) -> None:
    """Make one file of a directory of shards, copying chunks as they are.

    A run that is not finished, or has lost shards, is refused unless `leave_out` names exactly the rows that are
    missing: they are in the file as failed rows. Raises FormatError, DamagedError, OutputError, NoSpace.
    """
    if not directory.is_dir():
        raise OutputError(f"{directory} is not a directory of shards")
    if not is_single_file(out):
        raise OutputError(f"{out}: expected the name of a file, as name.h5")
    if out.exists():
        check_ours(out)
        if not overwrite:
            raise OutputError(f"{out} exists; --overwrite replaces it, -o names another")
    parts = _parts(directory, leave_out)
    with writing(out):
        remove_dead(out, directories=False)
        pack_parts(parts, out, out.parent)


def row_ranges(texts: Iterable[str]) -> list[range]:
    """`8-15` → the rows 8 to 15. Raises ConfigError."""
    ranges = []
    for text in texts:
        first, dash, last = text.partition("-")
        if not dash or not first.isdecimal() or not last.isdecimal() or int(last) < int(first):
            raise ConfigError(f"--leave-out {text!r}: expected the first and the last row, as 4096-8191")
        ranges.append(range(int(first), int(last) + 1))
    return ranges


def _parts(directory: Path, leave_out: Sequence[range]) -> list[Path | range]:
    """The shards of a directory, and the rows that are left out, in the order of their rows."""
    if not leave_out:
        return [directory / record.name for record in load_index(directory)]
    plan = Plan.load(directory / PLAN)
    there = {record.name for record in load_records(directory)}
    parts: list[Path | range] = []
    for i, rows in enumerate(plan.shards):
        name = shard_name(i)
        parts.append(directory / name if name in there else rows)
    missing = _joined(part for part in parts if isinstance(part, range))
    if _joined(leave_out) != missing or len(missing) == 0 or not there:
        raise OutputError(f"{directory}: told to leave out {_said(_joined(leave_out))}; missing are {_said(missing)}")
    return parts


def _joined(ranges: Iterable[range]) -> list[range]:
    """The same rows as few joined, in order."""
    joined: list[range] = []
    for part in sorted(ranges, key=lambda rows: rows.start):
        if joined and part.start <= joined[-1].stop:
            joined[-1] = range(joined[-1].start, max(joined[-1].stop, part.stop))
        elif len(part):
            joined.append(part)
    return joined


def _said(ranges: Sequence[range]) -> str:
    return ", ".join(f"{rows.start}-{rows.stop - 1}" for rows in ranges) or "no rows"


def pack_parts(parts: Sequence[Path | range], target: Path, scratch: Path) -> None:
    """One file of all parts, published under its name at once. `scratch` is a directory beside or below it."""
    shards = [part for part in parts if isinstance(part, Path)]
    temporary = durable.temporary_name(scratch / target.name)
    stats, attrs, smaller = merged(shards)
    with contents.open_shard(shards[0]) as first:
        info = contents.read_info(first)
    left_out = _joined(part for part in parts if isinstance(part, range))
    extra = {
        **{name: value for name, value in info.extra.items() if name not in ("smaller_batches", "throughput")},
        **_images(shards[0], target),
        "throughput": _throughput(shards),
        **({"smaller_batches": smaller} if smaller else {}),
        **({"left_out": _said(left_out)} if left_out else {}),
    }
    info = replace(info, extra=extra, history=_history(shards))
    try:
        merging.pack(parts, temporary, info=info, stats=stats, layer_attrs=attrs)
        durable.publish(temporary, target)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _images(shard: Path, target: Path) -> dict[str, Any]:
    with activations.open(shard) as acts:
        return images_from(acts, target.parent)


def images_from(acts: activations.Activations, to: Path) -> dict[str, Any]:
    """The attribute `images` of a file in the folder `to` that is made of `acts`; nothing where that has none."""
    return {"images": moved(acts.images, base_of(acts.path), to)} if acts.images else {}


def _history(shards: Sequence[Path]) -> str:
    """That of the last shard, which also says how the run was taken up."""
    with contents.open_shard(shards[-1]) as last:
        return contents.read_info(last).history


def _throughput(shards: Sequence[Path]) -> Mapping[str, Any] | None:
    """That of all shards together."""
    with contextlib.ExitStack() as stack:
        opened = (stack.enter_context(activations.open(path)) for path in shards)
        return counts.total_throughput(acts.files[0].contents.said.get("throughput") for acts in opened)
