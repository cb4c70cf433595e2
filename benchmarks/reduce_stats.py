"""What the running statistics cost on a CPU: `python benchmarks/reduce_stats.py [--threads 2] [--top 9]`.

One image is layer1 to layer4 of a ResNet-50 in full: 1.4 million values, 5.6 MB in float32. Batches of 8 images, 96
images in all, after a ReLU. Reported is CPU time, so that other work on the machine counts as little as it can, and
beside it what it costs on the same machine to copy the bytes once and to sum them once.

Measured with torch 2.14 on two shared cores of an x86-64 server (Sapphire Rapids, 2 MiB of L2 a core), one thread, the
least of several runs; ms an image, and what it is where the loops of `kernels` are not compiled (`--without-kernels`):

| | moments | without | with the top 9 | without |
|---|--:|--:|--:|--:|
| float32 contiguous | 1.8 | 7.4 | 2.5 | 11 |
| float32 channels_last | 2.2 | 8.1 | 3.7 | 13 |
| bfloat16 contiguous | 1.5 | 7.7 | 2.4 | 11 |
| bfloat16 channels_last | 1.7 | 8.2 | 3.3 | 12 |

Without kernels: against blocks of 2^17 values, 2^16 and 2^18 cost up to 1.2 times (calls of torch, and misses of L2),
2^15 twice. What was tried: torch's own sum to float64 1.1 GB/s, count_nonzero 1.0, aminmax 1.8, vector_norm of order 0
1.0, against 15 to 40 GB/s for each in-place step on a block that was widened before. On busy cores two threads for one
operation wait for each other: 108 ms of wall time an image, where a pool of two threads, each with one torch thread and
a layer at a time, took 18 ms.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from fmextract.common import allocator, kernels
from fmextract.pipeline import running_stats
from fmextract.pipeline.running_stats import RunningStats

RESNET50 = ((256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7))
BATCH, BATCHES = 8, 12
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def cpu_ms(work: Callable[[], object], images: int, repeats: int = 4) -> float:
    """The least CPU time of several runs, in ms an image."""
    best = float("inf")
    for _ in range(repeats):
        begin = time.process_time()
        work()
        best = min(best, time.process_time() - begin)
    return best / images * 1e3


def accumulate(batches: list[list[torch.Tensor]], top: int) -> None:
    """One shard: `batches[layer]` are the batches of a layer, used in turn."""
    running = [RunningStats(shape, ("channel", "y", "x"), top, torch.device("cpu"), 0.01) for shape in RESNET50]
    for i in range(BATCHES):
        for layer, pool in zip(running, batches, strict=True):
            layer.update(pool[i % len(pool)], i * BATCH)


def main() -> None:
    """Print one line for each type and layout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--top", type=int, default=9)
    parser.add_argument("--block", type=int, default=running_stats._CPU_BLOCK, help="values in a block")
    parser.add_argument("--without-kernels", action="store_true", help="as where there was no C compiler")
    options = parser.parse_args()
    if options.without_kernels:
        kernels._library = None
    torch.set_num_threads(options.threads)
    allocator.keep_freed_memory()  # as in a run
    running_stats._CPU_BLOCK = options.block
    print(f"threads {options.threads}, block {options.block}; CPU ms an image")
    print(f"{'type':9} {'layout':14} {'moments':>8} {f'+ top {options.top}':>8} {'copy':>6} {'sum':>6} {'GB/s':>6}")
    for dtype_name, dtype in DTYPES.items():
        for layout_name, layout in LAYOUTS.items():
            # Three sets of images, so that new ones keep entering the top as they do in a real shard.
            batches = [
                [torch.randn(BATCH, *s).relu_().to(dtype).to(memory_format=layout) for _ in range(3)] for s in RESNET50
            ]
            first = [pool[0] for pool in batches]
            room = [torch.empty_like(x) for x in first]
            images = BATCH * BATCHES
            moments = cpu_ms(lambda b=batches: accumulate(b, 0), images)
            everything = cpu_ms(lambda b=batches: accumulate(b, options.top), images)
            copied = cpu_ms(lambda f=first, r=room: [y.copy_(x) for x, y in zip(f, r, strict=True)], BATCH)
            summed = cpu_ms(lambda f=first: [x.sum((0, 2, 3)) for x in f], BATCH)
            rate = sum(x[0].nbytes for x in first) / everything / 1e6
            print(
                f"{dtype_name:9} {layout_name:14} {moments:8.2f} {everything:8.2f}"
                f" {copied:6.2f} {summed:6.2f} {rate:6.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
