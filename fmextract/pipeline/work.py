"""What a run hands to its stages, and what they count."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from fmextract.capture.hooks import Capture
from fmextract.capture.inspection import TapOutput
from fmextract.capture.taps import Forward
from fmextract.config import FailureBudget
from fmextract.errors import SampleError, TooManyFailures
from fmextract.inputs import device_jpegs, preprocessing
from fmextract.inputs.reading import Reader
from fmextract.pipeline.workers import Jpegs, Workers
from fmextract.planning import Plan
from fmextract.records import FileInfo, FileStamp, SampleTable, Source
from fmextract.storage.shards import ShardRecord

FIRST = 5  # keys that are named where something is wrong with them


@dataclass(frozen=True, slots=True)
class Work:
    """What the pipeline needs beside the plan: things that cannot be written down in one."""

    plan: Plan
    info: FileInfo
    source: Source
    reader: Reader
    preprocess: preprocessing.Preprocessing | None
    jpegs: device_jpegs.DeviceJpegs | Jpegs | None  # what decodes plain JPEGs elsewhere; None: the threads here do
    workers: Workers | None  # processes that encode; None: the threads here do
    input_shape: tuple[int, ...]
    ready: bool  # the images are the model's inputs already: float, not to be normalised
    model: nn.Module
    forward: Forward
    capture: Capture
    outputs: Sequence[TapOutput]  # one a layer
    device: torch.device
    budget: FailureBudget
    checksums: bool  # whether a shard is recorded with the SHA-256 of its file


@dataclass(slots=True)
class Tally:
    """What a run counts as it goes: busy seconds of each stage (summed over its threads), failures, shards."""

    busy: dict[str, float] = field(default_factory=dict)
    threads: dict[str, int] = field(default_factory=dict)
    failures: list[tuple[str, str]] = field(default_factory=list)
    failed: int = 0
    seen: int = 0
    smallest_batch: int = 0
    nonfinite: dict[str, list[str]] = field(default_factory=dict)  # the first keys of each layer that has such values
    records: list[ShardRecord] = field(default_factory=list)
    moves: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, stage: str, seconds: float) -> None:
        with self._lock:
            self.busy[stage] = self.busy.get(stage, 0.0) + seconds
            self.moves += 1

    def fail(self, samples: SampleTable, row: int, error: SampleError) -> None:
        """Count a row that failed, and say so in its shard's table."""
        i = row - samples.start
        samples.status[i], samples.message[i] = int(error.status), str(error)
        self.failed += 1
        if len(self.failures) < 20:
            self.failures.append((samples.keys[i], str(error)))


def check_budget(budget: FailureBudget, tally: Tally) -> None:
    """Raises TooManyFailures where more images failed than the budget allows."""
    if budget.exceeded(tally.failed, tally.seen):
        first = "The first of this run: {!r}: {}. ".format(*tally.failures[0]) if tally.failures else ""
        raise TooManyFailures(
            f"{tally.failed} of {tally.seen} images failed, more than --max-failures {budget} allows. {first}"
            "The same command resumes; --max-failures sets another budget."
        )


class Nonfinite:
    """Counts NaN and infinite values where no axis is known as the channel, so that nothing else can be counted."""

    def __init__(self) -> None:
        self._counts: list[torch.Tensor] = []
        self._valid: list[bool] = []
        self._rows: list[int] = []

    def update(self, rows: torch.Tensor, first_row: int, valid: Sequence[bool]) -> None:
        """`rows` (B, …) are the rows from `first_row` on; those not `valid` are left out. No wait for a device."""
        if not rows.is_floating_point():
            return
        self._counts.append((~rows.isfinite()).reshape(len(rows), -1).sum(1))
        self._valid += valid
        self._rows += range(first_row, first_row + len(rows))

    def _per_row(self) -> np.ndarray[Any, Any]:
        counts = torch.cat(self._counts).cpu().numpy() if self._counts else np.zeros(0, np.int64)
        return np.where(self._valid, counts, 0)

    def result(self) -> int:
        return int(self._per_row().sum())

    def nonfinite_rows(self) -> list[int]:
        """The first rows with such values."""
        return [self._rows[i] for i in np.flatnonzero(self._per_row())[:FIRST]]


# ---------------------------------------------------------------------------------------------- decode


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a row: the size of its image, the file that was read, and why it failed, if it did."""

    height: int
    width: int
    file: FileStamp
    error: SampleError | None = None
