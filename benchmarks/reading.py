"""Reading what a run wrote, beside h5py on the same file: in order, shuffled, into a DataLoader, one row at a time.

    python -m benchmarks.reading [--images 300] [--codecs gzip,none,lz4,zstd] [--repeats 3] [--seconds 1]

Three layers: `blocks.0` of the demo's trained network in full (784 KiB an image, one in a chunk), `blocks.2` (122 KiB,
8 in a chunk), and 50,000 pooled features of 512 channels (2 KiB, 512 in a chunk). Every way of reading takes its turn,
`repeats` times; medians are given. A turn is pass after pass over the layer for `seconds`, with the opening of the file
and the start of a DataLoader's workers. Files are in the page cache. MB are of values, not compressed.

The columns: h5py in a DataLoader as a competent user writes it, a map-style Dataset that opens the file once in each
worker, with a chunk cache of the size of ours; `DataLoader(acts.dataset(layer), batch_size)`; and whole batches, with
`dataset.batches` as the sampler. `times` is the better of ours. The caches are smaller than the layers but for `fits`.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin  # noqa: F401  for h5py: lz4 and zstd
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fmextract as fm
from fmextract.common.machine import machine
from fmextract.common.progress import Quiet
from fmextract.common.sample_photos import copy_photos, make_photos

MAPS = ("blocks.0", "blocks.2")
POOLED = "1=mean"
BATCH = {"blocks.0": 32, "blocks.2": 64, POOLED: 256}
"""What one would train a probe with."""
CODECS = ("gzip", "none", "lz4", "zstd")
SINGLE = 100
"""Single rows in a turn."""


# ------------------------------------------------------------------------------------------------------------ the files


def make_maps(folder: Path, images: int, codec: str) -> Path:
    """Full maps of the demo's network for `images` photos."""
    out = folder / f"maps-{codec}.h5"
    if not out.exists():
        photos = folder / "photos"
        if not photos.exists():
            make_photos(photos, images)
        _extract(photos, "fmextract.demo:model", MAPS, out, codec)
    return out


def make_pooled(folder: Path, rows: int, codec: str) -> Path:
    """Mean activations of 512 random filters over small patches of the demo's photos."""
    out = folder / f"pooled-{codec}.h5"
    if not out.exists():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 512, 8, stride=4), nn.ReLU())
        _extract(_Patches(folder, rows), model, (POOLED,), out, codec, preprocess="size=16,crop=16,mean=0.5,std=0.5")
    return out


def _extract(source: Any, model: Any, layers: tuple[str, ...], out: Path, codec: Any, **options: Any) -> None:
    fm.extract(source, model, out, layers=layers, codec=codec, precision="fp32", top_k=0, progress=Quiet(), **options)


class _Patches(Dataset[np.ndarray]):
    """Patches of 16 x 16 pixels at random places of the demo's photos."""

    def __init__(self, folder: Path, rows: int) -> None:
        from PIL import Image

        originals = sorted(copy_photos(folder / "originals").iterdir())
        self.photos = [np.asarray(Image.open(path).convert("RGB")) for path in originals]
        random = np.random.default_rng(0)
        self.places = [(int(random.integers(len(self.photos))), random.random(2)) for _ in range(rows)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, row: int) -> np.ndarray:
        number, place = self.places[row]
        photo = self.photos[number]
        y, x = (place * (np.array(photo.shape[:2]) - 16)).astype(int)
        return photo[y : y + 16, x : x + 16]


# --------------------------------------------------------------------------------------------------------- ways to read

SMALL, LARGE = 16 * 2**20, 256 * 2**20
"""Less than any of the layers, or than half of it, which is what each of two workers reads; and more than any."""


@dataclass(frozen=True)
class Way:
    name: str
    cache: int = SMALL
    loader: bool = True
    shuffle: bool = False
    workers: int = 0


WAYS = (
    Way("by batches, no DataLoader", loader=False),
    Way("in order"),
    Way("in order, 2 workers", workers=2),
    Way("shuffled", shuffle=True),
    Way("shuffled, 2 workers", shuffle=True, workers=2),
    Way("shuffled, fits", LARGE, shuffle=True),
    Way("shuffled, fits, 2 workers", LARGE, shuffle=True, workers=2),
)


class H5pyRows(Dataset[torch.Tensor]):
    """One row an item; the file is opened once in every process."""

    def __init__(self, path: Path, layer: str, cache: int) -> None:
        self.path, self.name = path, f"layers/{layer}/activation"
        # HDF5's own advice for a large cache: a prime number of slots, some hundred times the number of chunks.
        self.options = {"rdcc_nbytes": cache, "rdcc_nslots": 100_003}
        self.data: h5py.Dataset | None = None
        with h5py.File(path) as file:
            self.rows = len(file[self.name])

    def opened(self) -> h5py.Dataset:
        if self.data is None:
            self.data = h5py.File(self.path, **self.options)[self.name]
        return self.data

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.from_numpy(self.opened()[row])


def by_h5py(path: Path, layer: str, way: Way) -> Generator[int, None, None]:
    """Bytes of batch after batch, pass after pass."""
    dataset, size = H5pyRows(path, layer, way.cache), BATCH[layer]
    if not way.loader:
        data = dataset.opened()
        while True:
            for start in range(0, len(data), size):
                yield data[start : start + size].nbytes
    loader = DataLoader(dataset, size, shuffle=way.shuffle, num_workers=way.workers, persistent_workers=way.workers > 0)
    while True:
        for batch in loader:
            yield batch.nbytes


def by_fmextract(path: Path, layer: str, way: Way, whole: bool) -> Generator[int, None, None]:
    """The same; `whole` batches, or rows that the DataLoader copies together."""
    size = BATCH[layer]
    with fm.open(path) as acts:
        while not way.loader:
            for _, maps in acts[layer].batches(size):
                yield maps.nbytes
        dataset = acts.dataset(layer, cache=way.cache)
        options: dict[str, Any] = {"batch_size": size, "shuffle": way.shuffle}
        if whole:
            batches = dataset.batches(size, shuffle=way.shuffle, workers=way.workers)
            options = {"batch_size": None, "sampler": batches}
        loader = DataLoader(dataset, num_workers=way.workers, persistent_workers=way.workers > 0, **options)
        while True:
            for _, batch in loader:
                yield batch.nbytes


def rate(batches: Iterable[int], seconds: float) -> float:
    """MB/s of one turn."""
    gc.collect()
    begin, nbytes, taken = time.perf_counter(), 0, 0.0
    for size in batches:
        nbytes += size
        taken = time.perf_counter() - begin
        if taken > seconds:
            break
    return nbytes / taken / 1e6


def compare(path: Path, layer: str, way: Way, repeats: int, seconds: float) -> list[float | None]:
    """MB/s of every column, by turns; None where there is no such thing."""
    columns = {
        "h5py": lambda: by_h5py(path, layer, way),
        "rows": lambda: by_fmextract(path, layer, way, whole=False),
        "whole": lambda: by_fmextract(path, layer, way, whole=True) if way.loader else None,
    }
    turns: dict[str, list[float]] = {name: [] for name in columns}
    for _ in range(repeats):
        for name, start in columns.items():
            batches = start()
            if batches is not None:
                turns[name].append(rate(batches, seconds))
                batches.close()
    return [statistics.median(rates) if rates else None for rates in turns.values()]


def compare_single(path: Path, layer: str, repeats: int) -> dict[str, tuple[float, float]]:
    """{which rows: (h5py, ours) in ms}: the first of a chunk, or one in its middle; every row of another chunk."""
    found = {}
    for name in ("first of a chunk", "amid a chunk"):
        turns = []
        for _ in range(repeats):
            with h5py.File(path) as file, fm.open(path) as acts:
                theirs, ours = file[f"layers/{layer}/activation"], acts[layer]
                images = ours.chunks[0]
                at = images // 2 if name == "amid a chunk" else 0
                chunks = np.random.default_rng(0).permutation((len(ours) - at - 1) // images)
                rows = (chunks[:SINGLE] * images + at).tolist()
                turns.append((_single_rows(theirs, rows), _single_rows(ours, rows)))
        found[name] = (statistics.median(a for a, _ in turns), statistics.median(b for _, b in turns))
    return found


def _single_rows(array: Any, rows: Iterable[int]) -> float:
    """Milliseconds a row, the median."""
    taken = []
    for row in rows:
        begin = time.perf_counter()
        array[row]
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken) * 1e3


def measure(path: Path, layer: str, codec: str, repeats: int, seconds: float) -> None:
    """Print the lines of one layer and codec."""
    for way in WAYS:
        h5py_, rows, whole = compare(path, layer, way, repeats, seconds)
        rates = " | ".join("" if one is None else f"{one:,.0f}" for one in (h5py_, rows, whole))
        times = max(rows or 0, whole or 0) / (h5py_ or 1)
        print(f"| `{layer}` | {codec} | {way.name} | {rates} | {times:.1f} |", flush=True)
    for name, (theirs, ours) in compare_single(path, layer, repeats).items():
        print(f"| `{layer}` | {codec} | one row, {name}, ms | {theirs:.2f} | {ours:.2f} | | {theirs / ours:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--rows", type=int, default=50_000, help="of pooled features")
    parser.add_argument("--codecs", default=",".join(CODECS))
    parser.add_argument("--layers", default=",".join((*MAPS, POOLED)))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, help="where files are made, and kept; a temporary one if not given")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
    print(" · ".join(f"{name} {value}" for name, value in machine().items()), file=sys.stderr)
    print("| layer | codec | MB/s | h5py | fmextract | whole batches | times |\n|---|---|---|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for codec in options.codecs.split(","):
            for layer in options.layers.split(","):
                make, count = (make_pooled, options.rows) if layer == POOLED else (make_maps, options.images)
                measure(make(folder, count, codec), layer, codec, options.repeats, options.seconds)


if __name__ == "__main__":
    main()
