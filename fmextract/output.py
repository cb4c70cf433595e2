"""What `-o` names: where the shards of a run are, whether it is begun or done, and how it becomes one output."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fmextract import index, planning, reader, store
from fmextract.config import is_single_file
from fmextract.errors import OutputError
from fmextract.moments import merge
from fmextract.planning import Plan
from fmextract.records import Progress

PLAN = "plan.json"


class Output:
    """A file (`name.h5`, its shards meanwhile in `name.h5.partial/`) or a directory of shards."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._single = is_single_file(target)
        self.directory = target.with_name(target.name + ".partial") if self._single else target
        self.records: list[index.ShardRecord] = []

    def begin(
        self, identity: Mapping[str, Any], make_plan: Callable[[], Plan], progress: Progress, *, overwrite: bool
    ) -> Plan:
        """The plan to follow: that of a run begun earlier with the same identity, else a new one, published."""
        self._check_target(overwrite)
        if (self.directory / PLAN).exists():
            earlier = Plan.from_json(index.read_json(self.directory / PLAN))
            changed = list(planning.differences(earlier.identity, identity))
            if not changed:
                self.records = index.load_records(self.directory)
                progress.note(f"resuming {self._target}: {len(self.records)} of {len(earlier.shards)} shards are there")
                return earlier
            if not overwrite:
                raise OutputError(_refusal(self._target, changed))
            self._remove_shards(earlier)
        made = make_plan()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            index.write_json(self.directory / PLAN, made.as_json())
        except OSError as error:
            raise store.disk_error(self.directory, error) from error
        return made

    def _check_target(self, overwrite: bool) -> None:
        if self._single and self._target.is_dir():
            raise OutputError(f"{self._target} is a directory; -o name.h5 must be a file")
        if self._single and self._target.exists():
            with reader.open(self._target):  # only an output of ours may be replaced
                pass
            if not overwrite:
                raise OutputError(f"{self._target} exists and is finished. --overwrite replaces it, -o names another.")
        if not self._single and self._target.exists():
            if not self._target.is_dir():
                raise OutputError(f"{self._target} is a file; name a directory, or a file ending in .h5")
            if any(self._target.iterdir()) and not (self._target / PLAN).exists():
                raise OutputError(
                    f"{self._target} holds something that fmextract did not write; name another directory"
                )

    def _remove_shards(self, earlier: Plan) -> None:
        """Only what the earlier plan lists is ours to remove."""
        (self.directory / index.INDEX).unlink(missing_ok=True)
        for i in range(len(earlier.shards)):
            name = self.directory / index.shard_name(i)
            name.with_suffix(".json").unlink(missing_ok=True)
            name.unlink(missing_ok=True)
        (self.directory / PLAN).unlink()

    def fold(self, made: Plan) -> None:
        """All shards are there: write the index, or make the one file of them."""
        if not self._single:
            index.fold_index(self.directory, made.as_json())
            return
        shards = [self.directory / index.shard_name(i) for i in range(len(made.shards))]
        if len(shards) == 1:
            index.publish(shards[0], self._target)
        else:
            packed = self.directory / f".{self._target.name}.tmp"
            store.pack(shards, packed, stats=merged_stats(shards))
            index.publish(packed, self._target)
        shutil.rmtree(self.directory)


def merged_stats(shards: Sequence[Path]) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    """The statistics of all shards together, layer by layer, one layer in memory at a time for each shard."""
    parts: dict[str, list[Mapping[str, np.ndarray[Any, Any]]]] = {}
    for path in shards:
        with reader.open(path) as acts:
            for name in acts.layers:
                stats = acts[name].stats
                if stats.names:
                    parts.setdefault(name, []).append({key: getattr(stats, key) for key in stats.names})
    return {name: merge(of_layer) for name, of_layer in parts.items()}


def _refusal(target: Path, changed: Sequence[tuple[str, Any, Any]]) -> str:
    listed = "; ".join(f"{name}: {_short(old)} there, {_short(new)} now" for name, old, new in changed)
    return f"{target} was begun otherwise ({listed}). The same arguments resume it, --overwrite starts anew."


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
