"""Whether an earlier run is the one that is asked for: what it says of itself against what is asked, photo by photo.

A field that earlier versions did not write is no difference. Nor is code where Python or a library is another one now:
then the stored rows that are run again decide.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from fmextract import planning
from fmextract.common.facts import CHANGES
from fmextract.errors import ConfigError, FormatError, OutputError, SampleError
from fmextract.inputs.files import stamp_of
from fmextract.inputs.named_files import folder_digest
from fmextract.planning import Identity
from fmextract.reading import activations
from fmextract.records import Source, Status

SHOWN = 6  # differences, and photos, that a message names
_SINCE = ("seed", "max_error", "code")
"""Fields that the first versions did not write."""
NOT_IGNORED = ("layers", "input_shape", "source.count", "source.keys")
"""What lies in an output: another of these is another run, whatever anybody knows."""
_NOT_UNFINISHED = "device"
"""A run that is taken up goes on where it was, which needs the device."""
_CONSEQUENCES = {
    "model": ("code.model.", "weights"),
    "input_shape": ("preprocess.crop", "preprocess.resize", "preprocess.size"),
}
"""What differs with a field is not told besides."""
_DIGEST = re.compile(r"([0-9a-f]{16}|[0-9a-f]{32}|[0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class Asked:
    """What a run is asked for: its identity, as JSON, and its images.

    `ignore`: fields of the identity in which an earlier run may be another one; `recheck`: stored rows are run again.
    """

    identity: Identity
    source: Source
    ignore: Sequence[str] = ()
    recheck: bool = True


def compared(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, in words, but for which files there are."""
    old, new = comparable(old, new)
    changes = [name for name, *_ in planning.differences(old, new)]
    hidden = [prefix for name, prefixes in _CONSEQUENCES.items() if name in changes for prefix in prefixes]
    return [
        _worded(name, a, b)
        for name, a, b in planning.differences(old, new)
        if not any(name.startswith(prefix) for prefix in hidden)
    ]


def code_compared(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs in the code alone, in words, or why that is not known."""
    sides = [{name: side[name] for name in ("code",) if name in side} for side in (old, new)]
    return [*compared(*sides), *_not_compared(*sides)]


def changed(
    earlier: Mapping[str, Any],
    asked: Asked,
    stored: Sequence[Path],
    tell: Callable[[str], None],
    finished: bool = False,
) -> list[str]:
    """What is asked for otherwise than in an earlier run, in words; empty where that one may go on.

    `stored` are the files that hold its rows: they name the photos that differ. `tell` is told what is not compared.
    Of a `finished` one many rows are run again where nobody can tell whether the seed decides them. Raises ConfigError
    for a field to ignore that there is not.
    """
    check_ignored(asked, earlier)
    if not finished:
        asked = replace(asked, ignore=[name for name in asked.ignore if name != _NOT_UNFINISHED])
    if without := ignored(earlier, asked):
        tell(f"not compared, as --ignore says: {listed(without)}")
        asked = replace(asked, identity=ignoring(earlier, asked))
    if finished and asked.recheck and seed_in_doubt(earlier, asked):
        tell(
            f"the earlier run had the seed {earlier['seed']}: nothing was seen to be random, but code of yours may draw"
            " for some images alone; more rows than else are run again, and --overwrite makes all anew"
        )
        asked = replace(asked, identity={**asked.identity, "seed": earlier["seed"]})
    changes = compared(earlier, asked.identity)
    old, new = earlier.get("source", {}), asked.identity.get("source", {})
    if (old.get("keys"), old.get("count")) != (new.get("keys"), new.get("count")):
        return [*changes, *_other_rows(old, new, asked.source, stored)]
    if changes:
        return changes
    for line in _not_compared(earlier, asked.identity):
        tell(line)
    if others := files_in_doubt(earlier, asked, stored):
        tell(
            f"{_some(others)}, which the Dataset names, is not as it was in the earlier run: whether rows come out of"
            " what is new there cannot be told, and more of them than else are run again; --overwrite makes all anew"
        )
    if old.get("sizes") != new.get("sizes") or ("times" in old and old["times"] != new.get("times")):
        return _other_files(old, new, asked.source, stored, tell)
    return []


def files_in_doubt(earlier: Mapping[str, Any], asked: Asked, stored: Sequence[Path]) -> list[str]:
    """Files that a Dataset names, and folders with files, that are others than they were, but for the output itself."""
    old, new = (side.get("source", {}) for side in (earlier, asked.identity))
    if "files" not in old or "files" not in new:
        return []
    files = [path for path in old["files"] | new["files"] if old["files"].get(path) != new["files"].get(path)]
    then, now = old["folders"], new["folders"]
    folders = [path for path in now if path in then and then[path] not in (now[path], folder_digest(path, stored))]
    # A folder that holds one of the files says nothing besides.
    return files + [path for path in folders if not any(Path(path) in Path(file).parents for file in files)]


def seed_in_doubt(earlier: Mapping[str, Any], asked: Asked) -> bool:
    """Whether the seeds differ, nothing was seen to depend on them, and something might."""
    now = ignoring(earlier, asked)
    known = {str(side.get("random")) for side in (earlier, now)}
    differ = "seed" in earlier and earlier["seed"] != now.get("seed")
    return differ and "not seen" in known and known <= {"none", "not seen"}


def check_seed(earlier: Mapping[str, Any], asked: Asked, target: Path) -> None:
    """Raises OutputError where rows are to be made by another seed than those that are there, and may depend on it."""
    if seed_in_doubt(earlier, asked):
        raise OutputError(
            f"{target} was made with the seed {earlier['seed']}, and of the rows that are made now code of yours may"
            f" draw random numbers: give --seed {earlier['seed']}, or --ignore seed if you know that it draws none"
        )


# ---------------------------------------------------------------------------------------------------- what is ignored


def check_ignored(asked: Asked, earlier: Mapping[str, Any] | None = None) -> None:
    """Raises ConfigError for a field that no run here has, and for one that says what lies in an output."""
    known = {name for side in (asked.identity, earlier or {}) for name in _fields(side)}
    for name in asked.ignore:
        if name in NOT_IGNORED:
            raise ConfigError(f"--ignore {name}: it says what lies in an output; another one is another run")
        if not any(_is_below(field, name) for field in known):
            starts = {field.partition(":")[0] for field in known}
            names = starts | {field.rpartition(".")[0] for field in starts} - {""}
            close = difflib.get_close_matches(name, sorted(names), n=3) or [n for n in asked.identity if n in names]
            raise ConfigError(f"--ignore {name}: no such field; expected one as {', '.join(close)}")


def ignored(earlier: Mapping[str, Any], asked: Asked) -> list[str]:
    """What differs from an earlier run and is ignored, in words."""
    return [_worded(*difference) for difference in planning.differences(ignoring(earlier, asked), asked.identity)]


def ignoring(earlier: Mapping[str, Any], asked: Asked) -> Identity:
    """The identity of the run that is asked for, with what is ignored as it was in an earlier one."""
    return cast("Identity", _taken_over(earlier, asked.identity, asked.ignore)) if asked.ignore else asked.identity


def _taken_over(old: Mapping[str, Any], new: Mapping[str, Any], names: Sequence[str], path: str = "") -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for name in dict.fromkeys((*new, *old)):
        a, b, here = old.get(name), new.get(name), f"{path}{name}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            merged[name] = _taken_over(a, b, names, f"{here}.")
            continue
        ignore = here not in NOT_IGNORED and any(
            _is_below(here, one) or _is_below(_as_told(here), one) for one in names
        )
        if name in (side := old if ignore else new):
            merged[name] = side[name]
    return merged


def _fields(identity: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """The fields of an identity, by the names that messages have for them."""
    for name, value in identity.items():
        yield from {f"{path}{name}", _as_told(f"{path}{name}")}
        if isinstance(value, Mapping):
            yield from _fields(value, f"{path}{name}.")


def _is_below(field: str, name: str) -> bool:
    return field == name or field.startswith((f"{name}.", f"{name}:"))


def _as_told(name: str) -> str:
    return name.removeprefix("code.").replace("source.code.", "source: ")


# ------------------------------------------------------------------------------------------------------------ fields


def comparable(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both without what one of them cannot say, and without which files there are."""
    left_out = {"not_covered", "random", *(name for name in _SINCE if name not in old or name not in new)}
    if old.get("random") == new.get("random") == "none":
        left_out.add("seed")
    if "code" not in old:
        left_out.add("memory_format")  # the first versions wrote what was chosen here, not what was asked for
    of_source = {
        "keys",
        "count",
        "sizes",
        "times",
        "files",
        "folders",
        *(() if "code" in old and "code" in new else ("labels", "code")),
    }
    if _code_is_incomparable(old, new):
        left_out.add("code")
        of_source.add("code")
    sides = []
    for side in (old, new):
        kept = {name: value for name, value in side.items() if name not in left_out}
        source = kept.get("source")
        if isinstance(source, Mapping):
            kept["source"] = {name: value for name, value in source.items() if name not in of_source}
        sides.append(kept)
    return _without_changing(*sides)


def _code_is_incomparable(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return "code" in old and "code" in new and _by(old) != _by(new)


def _by(identity: Mapping[str, Any]) -> dict[str, Any]:
    code = identity.get("code")
    by = code.get("by") if isinstance(code, Mapping) else None
    return dict(by) if isinstance(by, Mapping) else {}


def _without_changing(old: Any, new: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both without what a run itself changes."""
    kept: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for name in dict.fromkeys((*old, *new)):
        a, b = old.get(name), new.get(name)
        if CHANGES in (a, b):
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            a, b = _without_changing(a, b)
        for side, given, value in zip(kept, (old, new), (a, b), strict=True):
            if name in given:
                side[name] = value
    return kept


def _not_compared(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    if _code_is_incomparable(old, new):
        then, now = _by(old), _by(new)
        others = [f"{name} {then.get(name, 'not there')} then, {now.get(name, 'not there')} now" for name in then | now]
        listed = "; ".join(
            line for line, name in zip(others, then | now, strict=True) if then.get(name) != now.get(name)
        )
        yield f"code and settings are not compared with the earlier run, as libraries differ ({listed})"
    if unknown := new.get("not_covered"):
        yield f"not compared with the earlier run, as nobody can tell what is in it: {_some(list(map(str, unknown)))}"


def _worded(name: str, old: Any, new: Any) -> str:
    name = _as_told(name)
    if any(isinstance(value, str) and _DIGEST.fullmatch(value) for value in (old, new)):
        if old is None or new is None:
            return (
                f"{name}: {'not there' if old is None else 'there'} then, {'not there' if new is None else 'there'} now"
            )
        return f"{name}: other than it was"
    if isinstance(old, list) and isinstance(new, list) and len(f"{old}{new}") > 120:
        # Long lists differ somewhere: say where.
        gone, come = ([str(value) for value in a if value not in b] for a, b in ((old, new), (new, old)))
        if gone or come:
            return f"{name}: there also {_short(gone)}, now also {_short(come)}"
    return f"{name}: {_short(old)} there, {_short(new)} now"


def _short(value: Any) -> str:
    text = "not set" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ------------------------------------------------------------------------------------------------------------ photos


def _rows_of(stored: Sequence[Path]) -> Iterator[tuple[int, str, int, str]]:
    """(row, key, status, digest of its file or nothing) of every row that is stored."""
    for path in stored:
        try:
            with activations.open(path) as acts:
                first = acts.first_row
                columns = zip(acts.keys, acts.status, acts.file_digests, strict=True)
                for at, (key, status, digest) in enumerate(columns):
                    yield first + at, str(key), int(status), str(digest)
        except FormatError:
            continue  # a damaged shard is made again, whatever it says


def _other_rows(old: Mapping[str, Any], new: Mapping[str, Any], source: Source, stored: Sequence[Path]) -> list[str]:
    """Which photos are new, and which are gone."""
    words = []
    if old.get("count") != new.get("count"):
        words.append(f"source.count: {old.get('count')} there, {new.get('count')} now")
    then = {row: key for row, key, *_ in _rows_of(stored) if key}
    keys = [source.key(row) for row in range(len(source))]
    now, known = set(keys), set(then.values())
    gone = [key for key in then.values() if key not in now]
    # Of a run that is not finished nobody knows how the others were called.
    come = [key for key in keys if key not in known] if len(then) == old.get("count") else []
    moved = [(row, key) for row, key in then.items() if row < len(keys) and keys[row] != key]
    if gone:
        words.append(f"gone: {_some(gone)}")
    if come:
        words.append(f"new: {_some(come)}")
    if moved and not gone and not come:
        row, key = moved[0]
        words.append(f"row {row} was {key!r} and is {keys[row]!r} now")
    if not words:
        words.append("the rows that are stored are the same, among those to come others are named")
    return [f"source.keys: {', '.join(words)}" if not words[0].startswith("source") else ", ".join(words)]


def _other_files(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    source: Source,
    stored: Sequence[Path],
    tell: Callable[[str], None],
) -> list[str]:
    """Which photos have another content than their rows were made of. Rows that failed are tried again anyway."""
    rows = [(row, key, digest) for row, key, status, digest in _rows_of(stored) if status == Status.OK]
    known = [(row, key, digest) for row, key, digest in rows if digest]
    if rows and not known and old.get("sizes") != new.get("sizes"):
        return ["source.sizes: files have other sizes than they had"]
    if rows and not known:
        tell(
            "files have other times than they had, and their contents are not stored: only the rows that are run again"
            " are compared (--recheck says how many)"
        )
    if known:
        tell(f"some photos have another size or time than they had: {len(known):,} are compared with what was stored")
    others = [key for row, key, digest in known if _digest_of(source, row) != digest]
    return [f"source: other content than then: {_some(others)}"] if others else []


def _digest_of(source: Source, row: int) -> str:
    try:
        return str(stamp_of(source.load(row)).digest)
    except SampleError:
        return ""


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:SHOWN]))
    return f"{shown} and {len(names) - SHOWN:,} more" if len(names) > SHOWN else shown


def listed(words: Sequence[str]) -> str:
    """Differences for a message."""
    more = f"; and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
    return "; ".join(words[:SHOWN]) + more
