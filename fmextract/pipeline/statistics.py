"""The statistics of the layers of one shard, brought up to date beside the forward passes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch

from fmextract.capture.inspection import TapOutput
from fmextract.pipeline.running_stats import RunningStats
from fmextract.pipeline.threads import Pool
from fmextract.pipeline.work import Nonfinite, Tally, Work
from fmextract.records import LayerSpec
from fmextract.storage.layer_stats import settled

Arrays = dict[str, dict[str, np.ndarray[Any, Any]]]
Attributes = dict[str, dict[str, Any]]


class ShardStatistics:
    """Statistics of every layer over the rows of a shard: on a device in its stream, on a CPU on a pool of threads."""

    def __init__(self, work: Work, pool: Pool, tally: Tally) -> None:
        self._work, self._pool, self._tally = work, pool, tally
        self._running = [
            self._of_layer(output, layer) for output, layer in zip(work.outputs, work.plan.layers, strict=True)
        ]
        self._under_way: list[Future[None]] = []

    def _of_layer(self, output: TapOutput, layer: LayerSpec) -> RunningStats | Nonfinite:
        if {"channel", "feature"} & set(output.axes):
            top, device = self._work.plan.top_k, self._work.device
            return RunningStats(output.shape, output.axes, top, device, layer.near_zero_below)
        return Nonfinite()

    def update(self, tensors: Sequence[torch.Tensor], first: int, valid: Sequence[bool]) -> None:
        """Take in the rows from `first` on, but those not `valid`; one tensor (rows, …) a layer, each on one thread.

        A layer's batches stay in order, since those of the batch before are waited for.
        """
        if self._work.device.type != "cpu":
            for running, tensor in zip(self._running, tensors, strict=True):
                running.update(tensor, first, valid)
            return
        self.wait()
        self._under_way = [
            self._pool.submit(self._timed_update, running, tensor, first, valid)
            for running, tensor in zip(self._running, tensors, strict=True)
        ]

    def _timed_update(
        self, running: RunningStats | Nonfinite, rows: torch.Tensor, first: int, valid: Sequence[bool]
    ) -> None:
        started = time.perf_counter()
        running.update(rows, first, valid)
        self._tally.add("statistics", time.perf_counter() - started)

    def wait(self) -> None:
        """Wait for those of the batch before."""
        waiting, self._under_way = self._under_way, []
        for future in waiting:
            future.result()

    def result(self, shard: range, keys: Sequence[str]) -> tuple[Arrays, Attributes]:
        """(arrays, attributes) by layer. The one place where the host waits for the device's statistics."""
        arrays: Arrays = {}
        attrs: Attributes = {}
        whole = len(shard) == self._work.plan.rows
        for spec, running in zip(self._work.plan.layers, self._running, strict=True):
            if isinstance(running, RunningStats):
                values = running.result()
                # What there is to merge with other shards is kept no longer where there are none.
                arrays[spec.name], attrs[spec.name] = settled(values) if whole else (values, {})
                count = int(arrays[spec.name]["nonfinite"].sum())
            else:
                count = running.result()
                attrs[spec.name] = {"nonfinite": np.int64(count)}
            if count:
                known = self._tally.nonfinite.setdefault(spec.name, [])
                known += [keys[row - shard.start] for row in running.nonfinite_rows()]
        return arrays, attrs
