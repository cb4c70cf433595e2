"""Eager against compiled forward passes, with layers captured, side by side in one run: what `--compile` brings.

    python -m benchmarks.compile [--model resnet50] [--size 224] [--batches 1 8 32] [--device cpu]

Both capture the model's main parts. They take turns, a pass each, and medians are compared, so that a machine that is
busy for a while slows both. On CUDA batches of up to 32 are replayed as CUDA graphs, and passes are timed to their end.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack

import torch
import torchvision

from fmextract.capture import hooks, probe, resolve, survey
from fmextract.capture.compiled import GRAPHED_BATCH, CompiledCapture
from fmextract.common import allocator
from fmextract.model import modes, precision, run_mode

PASSES = 15


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Of one call, to the end of what it queued on the device."""
    started = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - started


def compare(model: torch.nn.Module, shape: tuple[int, ...], batch_size: int, device: torch.device) -> str:
    """A row of the table."""
    memory_format = modes.formats("auto", model)[0]
    with ExitStack() as stack:
        stack.enter_context(run_mode.RunMode(model, device, "fp32", run_mode.Mode(memory_format)))
        stack.enter_context(precision.numerics("fp32", device))
        inputs = precision.to_memory_format(torch.randn(batch_size, *shape, device=device), memory_format)
        seen = survey.survey(model, model, inputs[:1].repeat(2, 1, 1, 1))
        wanted = resolve.resolve(resolve.default_selectors(model, seen), seen)
        probed, _ = probe.probe(model, model, wanted, shape, device)
        stop = seen.stop_before([p.tap for p in probed])

        def one_pass(kind: type[hooks.Capture]) -> float:
            # Hooked for one pass at a time: both kinds have hooks on the same model, and each must see its own alone.
            capture = captures[kind]
            with capture.on(model):
                return seconds_of(lambda: capture.forward(model, inputs), device)

        captures = {kind: kind(probed, [None] * len(probed), stop) for kind in (hooks.Capture, CompiledCapture)}
        compiling = one_pass(CompiledCapture)
        times: dict[type[hooks.Capture], list[float]] = {kind: [] for kind in captures}
        for turn in range(PASSES + 3):
            for kind in captures:
                taken = one_pass(kind)
                if turn >= 3:  # the first warm up, and record the graph on CUDA
                    times[kind].append(taken)
    eager, fast = (1000 * statistics.median(times[kind]) for kind in (hooks.Capture, CompiledCapture))
    graphed = "yes" if device.type == "cuda" and batch_size <= GRAPHED_BATCH else "no"
    return f"| {batch_size} | {eager:.1f} | {fast:.1f} | {eager / fast:.2f} | {graphed} | {compiling:.1f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cpu":
        allocator.keep_freed_memory()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    print(f"{options.model}, {options.size} pixels, fp32, {name}, {threads}, torch {torch.__version__}\n")
    print("| batch | eager, ms | compiled, ms | ratio | CUDA graph | seconds to compile |\n|--:|--:|--:|--:|---|--:|")
    torch.manual_seed(0)
    model = torchvision.models.get_model(options.model, weights=None).eval()
    for batch_size in options.batches:
        print(compare(model, (3, options.size, options.size), batch_size, device), flush=True)


if __name__ == "__main__":
    main()
