"""Give layers as a map-style torch Dataset, and batches in an order that suits the chunks: see `Activations.dataset`.

A DataLoader that reads row by row is slow (benchmarks/reading.py): a chunk of many rows is decoded for each of them,
each row becomes a tensor of its own, and the rows are copied together again. So what fits into memory is read once,
all else in whole batches, and a shuffle may take its rows from a few chunks at a time.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, Sampler, get_worker_info

from fmextract.errors import ConfigError

Rows: TypeAlias = npt.NDArray[np.int64]


class LayerDataset(Dataset[tuple[Any, ...]]):
    """Items (row, one tensor per name), and perhaps a label; item i is row `rows[i]` of the file.

    A list of items gives them at once: (rows int64 (n), one tensor (n, …) per name). It pickles, and opens the files
    again in every process: once in each worker of a DataLoader.
    """

    def __init__(
        self,
        opened: Callable[[int], Any],
        names: Sequence[str],
        rows: Rows,
        *,
        fits: bool,
        together: int,
        window: int,
        targets: npt.NDArray[Any] | None = None,
        classes: Sequence[str] = (),
    ) -> None:
        """Read through `opened(n)`, which gives the layers by name to one of n processes that read at once.

        If all of it `fits` into memory, the first batch reads it. `together` rows lie in the same chunks,
        counted from row 0; a shuffle takes its rows from `window` such stretches at a time. `targets`, one entry for
        each row of the file, come last in every item; `classes` are what their numbers stand for, if they are texts.
        """
        self.names = tuple(names)
        self.rows = rows
        self.fits = fits
        self.together = together
        self.window = window
        self.classes = tuple(classes)
        self._targets = None if targets is None else torch.from_numpy(targets)
        self._opened = opened
        self._here: tuple[int, Any] | None = None
        self._held: list[torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int | Sequence[int]) -> tuple[Any, ...]:
        if isinstance(item, (int, np.integer)):
            row = int(self.rows[item])
            of_row = self._read(row) if self._held is None else [held[item].clone() for held in self._held]
            return (row, *of_row, *([] if self._targets is None else [self._targets[row]]))
        items = np.asarray(item, np.int64)
        rows = self.rows[items]
        if self.fits and self._held is None:
            self._held = self._read(self.rows)
        tensors = self._read(rows) if self._held is None else [held[torch.from_numpy(items)] for held in self._held]
        numbers = torch.from_numpy(rows)
        return (numbers, *tensors, *([] if self._targets is None else [self._targets[numbers]]))

    def __getitems__(self, items: Sequence[int]) -> list[tuple[Any, ...]]:
        """Return several items by one read, which a DataLoader with a batch size asks for."""
        rows, *tensors = self[items]
        return list(zip(rows.tolist(), *(tensor.unbind() for tensor in tensors), strict=True))

    def batches(
        self, size: int, *, shuffle: bool = False, seed: int = 0, workers: int = 0, drop_last: bool = False
    ) -> Sampler[list[int]]:
        """Return batches as a sampler: `DataLoader(data, sampler=data.batches(64, shuffle=True), batch_size=None)`.

        Each pass shuffles differently, and equally for the same seed. The shuffle is uniform if the dataset fits into
        its cache, or if each chunk holds one row. Otherwise it mixes the rows of as many chunks as half the cache
        holds, from anywhere in the file, and goes on with others: every chunk is decoded once per pass. With the
        DataLoader's `num_workers` as `workers`, each worker has chunks of its own. Raises ConfigError for a size < 1.
        """
        if size < 1:
            raise ConfigError(f"expected a batch size of at least 1, got {size}")
        return _Batches(self, size, seed if shuffle else None, max(1, workers if shuffle else 1), drop_last)

    def _read(self, rows: int | Rows) -> list[torch.Tensor]:
        """Read one tensor per name. Each process opens the files once; a DataLoader's workers share the CPUs."""
        if self._here is None or self._here[0] != os.getpid():
            worker = get_worker_info()
            self._here = os.getpid(), self._opened(1 if worker is None else worker.num_workers)
        layers = self._here[1]
        return [torch.as_tensor(layers[name][rows]) for name in self.names]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_here": None, "_held": None}


class _Batches(Sampler[list[int]]):
    """See `LayerDataset.batches`. In order where `seed` is None."""

    def __init__(self, dataset: LayerDataset, size: int, seed: int | None, lanes: int, drop_last: bool) -> None:
        self._dataset, self._size, self._seed, self._lanes = dataset, size, seed, lanes
        count = len(dataset)
        self._count = count // size if drop_last else -(-count // size)
        self._passes = itertools.count()

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[list[int]]:
        order = np.arange(len(self._dataset)) if self._seed is None else self._shuffled(self._seed, next(self._passes))
        # A DataLoader hands its batches to its workers by turns: give each worker a stretch of the order.
        lanes = np.array_split(np.arange(self._count), self._lanes)
        for batch in itertools.chain.from_iterable(itertools.zip_longest(*lanes)):
            if batch is not None:
                yield order[batch * self._size : (batch + 1) * self._size].tolist()

    def _shuffled(self, seed: int, turn: int) -> Rows:
        random = np.random.default_rng((seed, turn))
        blocks, block = np.unique(self._dataset.rows // self._dataset.together, return_inverse=True)
        if self._dataset.fits or self._dataset.together == 1:
            return random.permutation(len(block))
        window = random.permutation(len(blocks)) // self._dataset.window
        return np.lexsort((random.random(len(block)), window[block]))
