"""Keep the set of files of a run: which rows lie in which file, what is missing, what has changed.

    shard-00000.h5    a file of `writer` over a fixed range of rows
    shard-00000.json  its record (ShardRecord), written after it: the truth about what is done
    index.json        all records, folded when the last shard is there: only now is the output complete

Every file appears under its final name by one rename, after its bytes are on the disk (`publish`, `write_json`): a
killed run leaves whole files or none. Names in an index never lead out of its directory.
"""

from __future__ import annotations

import glob
import hashlib
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fmextract.common import processes, strict_json
from fmextract.errors import DamagedError, FormatError, OutputError
from fmextract.records import FORMAT_VERSION
from fmextract.storage import schema
from fmextract.storage.durable import is_temporary, read_json, write_json

INDEX, PLAN = "index.json", "plan.json"


INDEX_FORMAT = "fmextract-index"


DIGEST = "digest"
"""In plan.json, index.json and the record of a shard: SHA-256 of all their other fields."""


_NAME = re.compile(r"shard-(\d{5,})\.h5")


_SHA256 = re.compile(r"[0-9a-f]{64}")


def shard_name(i: int) -> str:
    """Return the file name of shard `i`."""
    return f"shard-{i:05d}.h5"


def remove_dead(path: Path, *, directories: bool) -> None:
    """Remove what processes that have surely ended left unfinished of `path`; folders only if `directories`."""
    begin = f".{path.name}."
    for left in path.parent.glob(f"{glob.escape(begin)}*"):
        if is_temporary(left.name) and processes.is_dead(left.name.removeprefix(begin)):
            if not left.is_dir() or left.is_symlink():
                left.unlink(missing_ok=True)
            elif directories:
                shutil.rmtree(left)


def write_sealed(path: Path, obj: Mapping[str, Any]) -> None:
    """Write as `write_json` does, with a digest of the content, which `read_sealed` compares."""
    said = strict_json.plain(obj)
    write_json(path, {**said, DIGEST: _seal(said)})


def read_sealed(path: Path) -> Any:
    """Read what `write_sealed` wrote, and without a comparison what earlier versions wrote. Raises as `read_json`."""
    said = read_json(path)
    if not isinstance(said, dict):
        return said
    if DIGEST not in said:
        if renamed := _renamed_digest(said):
            raise FormatError(f"{path} is damaged: its field {renamed!r} was written as {DIGEST!r}")
    elif said.pop(DIGEST) != _seal(said):
        raise FormatError(f"{path} is damaged: it does not say what was written there, as its digest shows")
    return said


def _renamed_digest(said: Mapping[str, Any]) -> str | None:
    """The field that is the digest of all others: what the digest looks like after a flipped bit in its name."""
    digests = [name for name, value in said.items() if isinstance(value, str) and _SHA256.fullmatch(value)]
    return next((name for name in digests if said[name] == _seal({k: v for k, v in said.items() if k != name})), None)


def _seal(said: Mapping[str, Any]) -> str:
    return hashlib.sha256(strict_json.dumps(said, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------------- records


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """One finished shard: the rows `start` .. `stop`-1, its size in bytes and its digests (hex).

    `sha256` is empty for a shard that is about to become the output by its new name, where it would never be read.
    `statuses` counts its rows by status code, as text ("0": ok, see `records.Status`). `batch_size` is the smallest
    that was used: less than the plan's where memory forced that. `extra` is JSON-able; its `chunks` holds, by layer,
    the first 16 hex digits of the digest of every chunk, one after the other in C order.
    """

    name: str
    start: int
    stop: int
    bytes: int
    sha256: str
    statuses: Mapping[str, int]
    content_digest: str
    batch_size: int
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        numbers = (self.start, self.stop, self.bytes, self.batch_size, *self.statuses.values())
        if min(numbers) < 0 or self.stop <= self.start:
            raise FormatError(f"{self.name!r}: expected counts of at least 0 and start < stop, got {numbers}")
        if not _NAME.fullmatch(self.name):
            raise FormatError(f"expected a shard's name as {shard_name(0)!r}, without a folder, got {self.name!r}")
        digests = (self.content_digest, *([self.sha256] if self.sha256 != "" else []))
        if not all(_SHA256.fullmatch(digest) for digest in digests):
            raise FormatError(f"{self.name}: expected digests of 64 hex digits")
        if sum(self.statuses.values()) != self.stop - self.start:
            raise FormatError(f"{self.name}: the statuses {dict(self.statuses)} do not add up to its rows")

    @property
    def rows(self) -> range:
        """The global rows of the shard."""
        return range(self.start, self.stop)

    @property
    def failed(self) -> int:
        """Rows whose status is not 0."""
        return len(self.rows) - self.statuses.get("0", 0)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict; `from_json` is the inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, obj: Any, where: Path | str = "the record of a shard") -> ShardRecord:
        """Raise FormatError for anything but what `to_json` gives; fields of later versions are ignored."""
        known = schema.checked(obj, schema.RECORD, str(where))
        try:
            return cls(**{name: known[name] for name in cls.__slots__})
        except FormatError as error:
            raise FormatError(f"{where} is damaged: {error}") from None


def record_shard(
    path: Path,
    *,
    rows: range,
    statuses: Sequence[int],
    content_digest: str,
    batch_size: int,
    extra: Mapping[str, Any] | None = None,
    sha256: str | None = None,
) -> ShardRecord:
    """Record a published shard: write `shard-NNNNN.json` beside it, which makes it count as done.

    `statuses` is the status code of each row. The SHA-256 is that of the file as it can be read back; if None, it is
    computed.
    """
    record = ShardRecord(
        name=path.name,
        start=rows.start,
        stop=rows.stop,
        bytes=path.stat().st_size,
        sha256=file_sha256(path) if sha256 is None else sha256,
        statuses={str(code): count for code, count in sorted(Counter(map(int, statuses)).items())},
        content_digest=content_digest,
        batch_size=batch_size,
        extra=dict(extra or {}),
    )
    write_sealed(path.with_suffix(".json"), record.to_json())
    return record


def file_sha256(path: Path) -> str:
    """Return SHA-256 of a file, in hex, in constant memory."""
    digest, block = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(block):
            digest.update(block[:n])
    return digest.hexdigest()


def load_records(directory: Path, tell: Callable[[str], None] = lambda text: None) -> list[ShardRecord]:
    """Return the shards that are done, in row order: every record whose file is there with the recorded size.

    A resume asks this. A record without its file, or with a file of another size, is not done. Nor is one that cannot
    be read or is damaged: `tell` is called with the reason.
    """
    records = []
    for path in sorted(directory.glob("shard-*.json")):
        try:
            record = _own_record(path)
        except (FormatError, OutputError) as error:
            tell(str(error))
            continue
        if _size(directory / record.name) == record.bytes:
            records.append(record)
    return sorted(records, key=lambda record: record.start)


def _own_record(path: Path) -> ShardRecord:
    record = ShardRecord.from_json(read_sealed(path), path)
    if record.name != path.with_suffix(".h5").name:
        raise FormatError(f"{path} is damaged: it is the record of {record.name}")
    return record


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


# --------------------------------------------------------------------------------------------------------------- index


def fold_index(directory: Path, plan: Mapping[str, Any]) -> list[ShardRecord]:
    """Write index.json from the records of all shards. Raises OutputError that names the rows still missing.

    `plan` is the content of plan.json, of which `shards`, the list of [start, stop] of every shard, is used.
    """
    records = load_records(directory)
    missing = list(_missing(directory, plan, records))
    if missing:
        raise OutputError(_unfinished(directory, missing))
    rows = sum(len(record.rows) for record in records)
    _check_rows(directory, records, rows)
    write_sealed(
        directory / INDEX,
        {
            "format": INDEX_FORMAT,
            "format_version": FORMAT_VERSION,
            "rows": rows,
            **({"plan_sha256": file_sha256(directory / PLAN)} if (directory / PLAN).exists() else {}),
            # Digests of single chunks are for `verify`, which reads the shards' own records.
            "shards": [replace(record, extra=without_chunks(record.extra)).to_json() for record in records],
        },
    )
    return records


def plan_digest(directory: Path) -> str | None:
    """Return the SHA-256 that plan.json had when the output was complete; None if an earlier version wrote it."""
    found = read_json(directory / INDEX).get("plan_sha256")
    if found is not None and not (isinstance(found, str) and _SHA256.fullmatch(found)):
        raise FormatError(f"{directory / INDEX} is damaged: expected plan_sha256 of 64 hex digits")
    return found


def without_chunks(extra: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in extra.items() if name != "chunks"}


def load_index(directory: Path) -> list[ShardRecord]:
    """Return the records of a finished run, in row order; their files are there and have the recorded sizes.

    Raises OutputError where the run is not finished or there is none, FormatError for a damaged index or a missing
    file, naming the file and the rows. A gap is never read as zeros.
    """
    if not (directory / INDEX).exists():
        plan = read_sealed(directory / PLAN) if (directory / PLAN).exists() else None
        if plan is None:
            raise OutputError(f"{directory} is not an fmextract output: it has neither {INDEX} nor {PLAN}")
        missing = list(_missing(directory, plan, load_records(directory)))
        raise OutputError(_unfinished(directory, missing))
    records = read_index(directory)
    for record in records:
        size = _size(directory / record.name)
        if size is None:
            raise FormatError(
                f"{directory / record.name} is missing, with it the rows {record.start} to {record.stop - 1}; "
                "put it back, or run the same extract command again"
            )
        if size != record.bytes:
            raise DamagedError(
                f"{directory / record.name} (rows {record.start} to {record.stop - 1}) has {size} bytes, "
                f"expected {record.bytes}"
            )
    return records


def read_index(directory: Path) -> list[ShardRecord]:
    """Return the records in index.json, in row order, without looking at their files. Raises FormatError."""
    records, rows = _parse_index(directory)
    _check_rows(directory, records, rows)
    return records


def _parse_index(directory: Path) -> tuple[list[ShardRecord], int]:
    path = directory / INDEX
    index = read_json(path)
    if not isinstance(index, dict) or index.get("format") != INDEX_FORMAT:
        raise FormatError(f"{path} was not written by fmextract")
    version, rows, shards = index.get("format_version"), index.get("rows"), index.get("shards")
    if type(version) is not int or type(rows) is not int or not isinstance(shards, list):
        raise FormatError(f"{path} is damaged: expected format_version, rows and shards")
    if version > FORMAT_VERSION:
        raise FormatError(
            f"{path} has format version {version}, and this fmextract knows versions up to {FORMAT_VERSION}: "
            "upgrade fmextract to read it"
        )
    records = (ShardRecord.from_json(shard, f"{path}, shard {number}") for number, shard in enumerate(shards))
    return sorted(records, key=lambda record: record.start), rows


def _check_rows(directory: Path, records: Sequence[ShardRecord], rows: int) -> None:
    """Raise FormatError unless the records cover rows 0 .. rows-1, each once."""
    end = 0
    for record in records:
        if record.start != end:
            what = "are missing" if record.start > end else "are there twice"
            low, high = sorted((end, record.start))
            raise FormatError(f"{directory}: the rows {low} to {high - 1}, before {record.name}, {what}")
        end = record.stop
    if end != rows:
        raise FormatError(f"{directory}: expected {rows} rows, the shards have {end}")


def _missing(directory: Path, plan: Mapping[str, Any], records: Sequence[ShardRecord]) -> Iterator[tuple[str, range]]:
    """Yield the shards of the plan that are not done: name and rows."""
    done = {record.name: record.rows for record in records}
    try:
        planned = [range(start, stop) for start, stop in plan["shards"]]
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{directory / PLAN} lists no shards: {error}") from error
    for i, rows in enumerate(planned):
        if done.get(shard_name(i)) != rows:
            yield shard_name(i), rows


def _unfinished(directory: Path, missing: Sequence[tuple[str, range]]) -> str:
    if not missing:
        return f"the run in {directory} is not finished: {INDEX} is missing; run the same command again"
    shown = ", ".join(f"{name} (rows {rows.start} to {rows.stop - 1})" for name, rows in missing[:3])
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return f"the run in {directory} is not finished: missing {shown}{more}; the same command resumes it"
