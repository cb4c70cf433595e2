"""Every model of torchvision: is each stored value, bit for bit, what a cloning hook sees in the same forward pass?

    python benchmarks/sweep.py --state sweep.jsonl              check what is not in the state file yet
    python benchmarks/sweep.py --state sweep.jsonl --table docs/reference/models.md

Each model gets random weights and four noise images (or clips), as small as it allows, in batches of two. All its
modules, leaves and containers, go through `extract` into a file and are read back with `open`. The reference is a pass
of torchvision's own model over the same batches, with hooks that clone every output; it shares no code with fmextract.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import inspect
import json
import math
import multiprocessing
import re
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torchvision
from torch import nn

import fmextract as fm

BATCH = 2
DETECTION = ("rcnn", "retinanet", "fcos", "ssd")
# The smallest input that the networks take, (channel, [time,] y, x), by the beginning of their names.
SMALL: dict[str, tuple[int, ...]] = {
    "quantized_inception": (3, 96, 96),
    "inception": (3, 96, 96),
    "maxvit": (3, 224, 224),
    "vit_h_14": (3, 56, 56),
    "mvit": (3, 16, 64, 64),
    "swin3d": (3, 8, 64, 64),
    "r3d": (3, 8, 64, 64),
    "mc3": (3, 8, 64, 64),
    "r2plus1d": (3, 8, 64, 64),
    "s3d": (3, 16, 224, 224),
    "": (3, 64, 64),
}


# ------------------------------------------------------------------------------------------------ models


@contextlib.contextmanager
def cheap_init() -> Iterator[None]:
    """Uniform weights of the usual variance in place of truncated normals, which take minutes for 600 M parameters."""

    def uniform(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        bound = math.sqrt(6 / max(1, tensor.numel() // max(1, tensor.shape[0])))
        with torch.no_grad():
            return tensor.uniform_(-bound, bound)

    names = ("kaiming_normal_", "kaiming_uniform_", "normal_", "trunc_normal_", "xavier_uniform_", "uniform_")
    kept = {name: getattr(nn.init, name) for name in names}
    try:
        for name in names:
            setattr(nn.init, name, uniform)
        yield
    finally:
        for name, function in kept.items():
            setattr(nn.init, name, function)


def build(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """(a model of torchvision in evaluation mode with cheap random weights, the shape of one input)."""
    shape = next(small for prefix, small in SMALL.items() if name.startswith(prefix))
    builder = torchvision.models.get_model_builder(name)
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None
    if name.startswith("quantized_"):
        options["quantize"] = True
    if name.startswith("vit_"):
        options["image_size"] = shape[-1]
    if any(kind in name for kind in DETECTION) and not name.startswith("ssd"):
        options |= {"min_size": 96, "max_size": 96}
    patches = contextlib.ExitStack()
    if name.startswith("mvit"):  # its builders fix the size of a clip
        small = {"spatial_size": shape[-2:], "temporal_size": shape[1]}
        whole = torchvision.models.video.mvit._mvit
        patches.enter_context(
            mock.patch.object(torchvision.models.video.mvit, "_mvit", lambda **options: whole(**(options | small)))
        )
    sets = list(torchvision.models.get_model_weights(name))
    is_huge = max((weights.meta["num_params"] for weights in sets), default=0) > 10**8
    if is_huge:
        patches.enter_context(cheap_init())
    torch.manual_seed(0)
    with patches, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return builder(**options).eval(), shape


# --------------------------------------------------------------------------------------------- reference


def forward(model: nn.Module, batch: torch.Tensor) -> Any:
    """What a user of torchvision would write."""
    is_detection = hasattr(model, "roi_heads") or hasattr(model, "anchor_generator")
    return model(list(batch) if is_detection else batch)


def watch(model: nn.Module, batch: torch.Tensor, see: Callable[[str, int, Any], None]) -> None:
    """Run `batch`; `see(path, number, output)` the moment that the number-th call (from 1) of a module ends."""
    counts: Counter[str] = Counter()
    handles = []
    for path, module in model.named_modules():

        def hook(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
            counts[path] += 1
            see(path, counts[path], output)

        handles.append(module.register_forward_hook(hook))
    try:
        with torch.no_grad():
            forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()


def reference(model: nn.Module, batch: torch.Tensor) -> dict[str, list[Any]]:
    """Path → a clone of the output of each of its calls, taken the moment the call ended."""
    seen: dict[str, list[Any]] = {}
    watch(model, batch, lambda path, number, output: seen.setdefault(path, []).append(_cloned(output)))
    return seen


def _cloned(value: Any) -> Any:
    """A copy of the tensors in nested containers, all of them as dicts."""
    if isinstance(value, torch.Tensor):
        return value.dequantize() if value.is_quantized else value.clone()
    if isinstance(value, Mapping):
        return {str(key): _cloned(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return {str(i): _cloned(item) for i, item in enumerate(value)}
    return None


def member(value: Any, keys: Sequence[str]) -> torch.Tensor:
    """The tensor at `keys` of a module's output; where it has one tensor only and no key is left: that."""
    for key in keys:
        value = _cloned(value)[key]
    (tensor,) = _tensors(_cloned(value))
    return tensor


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    return [value] if isinstance(value, torch.Tensor) else []


def same(rows: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Whether `rows` (B, …) are the rows of `tensor`, bit for bit: its first axis is the batch or a multiple of it."""
    if len(tensor) == len(rows):
        return _bits(rows) == _bits(tensor)
    if len(tensor) % len(rows):
        return False
    k = len(tensor) // len(rows)
    orders = tensor.unflatten(0, (-1, k)), tensor.unflatten(0, (k, -1)).transpose(0, 1)
    return any(_bits(rows) == _bits(order) for order in orders)


def _bits(tensor: torch.Tensor) -> tuple[tuple[int, ...], bytes]:
    return tuple(tensor.shape), tensor.contiguous().numpy().tobytes()


# ------------------------------------------------------------------------------------------------- check


class Notes:
    """A Progress that keeps what is said."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)

    def step(self, what: str, done: int, total: int) -> None: ...
    def start(self, total: int, done: int) -> None: ...
    def advance(self, images: int, failed: int) -> None: ...
    def finish(self) -> None: ...

    @property
    def refused(self) -> dict[str, str]:
        """Layer → why it was left out."""
        found = (re.fullmatch(r"left out '(.+?)': (.+)", text) for text in self.texts)
        return {match[1]: match[2] for match in found if match}


def check(model: nn.Module, shape: Sequence[int], memory_format: str = "contiguous") -> dict[str, Any]:
    """Extract every module of `model` for two batches of noise and compare with the reference.

    Gives the number of leaf modules and of tensors that were compared, the names of those that differ or were neither
    stored nor refused, and why layers were refused.
    """
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn((2 * BATCH, *shape), generator=generator)
    laid_out = {"channels_last": torch.channels_last}.get(memory_format, torch.contiguous_format)
    other = copy.deepcopy(model).to(memory_format=laid_out) if memory_format == "channels_last" else model
    notes = Notes()
    options: dict[str, Any] = {
        "precision": "fp32",
        "batch_size": BATCH,
        "memory_format": memory_format,
        "codec": "none",
        "top_k": 1,
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        fm.extract(list(inputs), model, Path(folder, "x.h5"), layers=["**"], progress=notes, **options) as acts,
    ):
        compared = _Compared(acts)
        for start in range(0, len(inputs), BATCH):
            compared.start = start
            watch(other, inputs[start : start + BATCH].contiguous(memory_format=laid_out), compared.see)
    leaves = {path for path, module in model.named_modules() if not list(module.children())}
    refused = {re.split(r"[:\[]", name)[0] for name in notes.refused}
    return {
        "leaves": len(leaves & {path for path, _ in compared.layers}),
        "tensors": len(acts.layers),
        "different": sorted(set(acts.layers) - compared.equal | compared.different),
        "missing": sorted(compared.other - refused),
        "refused": notes.refused,
    }


class _Compared:
    """Compares what hooks see with what is stored, at once: clones of everything would not fit into memory."""

    def __init__(self, acts: fm.Activations) -> None:
        self.start = 0
        self.equal: set[str] = set()
        self.different: set[str] = set()
        self.other: set[str] = set()
        self.layers: dict[tuple[str, int], list[tuple[str, list[str]]]] = {}
        self._acts = acts
        for name in acts.layers:
            match = re.fullmatch(r"(.+?)(?::(\d+))?((?:\[[^\]]+\])*)", name)
            assert match is not None, name
            keys = re.findall(r"\[([^\]]+)\]", match[3])
            self.layers.setdefault((match[1], int(match[2] or 1)), []).append((name, keys))

    def see(self, path: str, number: int, output: Any) -> None:
        """One call of a module: is this batch of it stored?"""
        if path and isinstance(output, torch.Tensor) and (path, number) not in self.layers:
            self.other.add(path)
        for name, keys in self.layers.get((path, number), []):
            rows = torch.from_numpy(self._acts[name][self.start : self.start + BATCH])
            is_same = same(rows, member(output, keys))
            (self.equal if is_same else self.different).add(name)


# ------------------------------------------------------------------------------------------------- sweep


def checked(name: str) -> dict[str, Any]:
    """One line of the state file: what became of one model."""
    torch.set_num_threads(1)  # teams of threads wait for each other on a busy machine
    started = time.perf_counter()
    row: dict[str, Any] = {"model": name}
    try:
        model, shape = build(name)
        row |= {"input": list(shape), **check(model, shape)}
    except Exception as error:  # a model that cannot be built or run is a line of the table, not the end of the sweep
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    row["seconds"] = round(time.perf_counter() - started, 1)
    return row


def sweep(state: Path, names: Sequence[str]) -> None:
    """Check every model that `state` does not know yet; its processes are replaced, since memory is not given back."""
    known = {row["model"] for row in _rows(state)}
    todo = [name for name in names if name not in known]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=6) as pool:
        for row in pool.imap(checked, todo):
            with state.open("a") as lines:
                lines.write(json.dumps(row) + "\n")
            verdict = row.get("error") or f"{len(row['different'])} differ, {len(row['missing'])} missing"
            print(f"{row['model']}: {verdict}, {row['seconds']} s", flush=True)


def _rows(state: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in state.read_text().splitlines()] if state.exists() else []


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The Markdown of docs/reference/models.md."""
    rows = sorted(rows, key=lambda row: row["model"])
    run = [row for row in rows if "error" not in row]
    wrong = sum(len(row["different"]) + len(row["missing"]) for row in run)
    total = len(torchvision.models.list_models())
    version, backend = (module.__version__.partition("+")[0] for module in (torchvision, torch))
    leaves, tensors = (sum(row[what] for row in run) for what in ("leaves", "tensors"))
    lines = [
        f"""# Models

{len(rows)} of the {total} models of torchvision {version}, with random weights, in fp32 on a CPU (torch {backend}).
`benchmarks/sweep.py` writes this page.

All modules of a model, leaves and containers, are extracted to a file and read back. *Equal*: the values are those of
hooks that clone every output of torchvision's own model in the same batches, bit for bit. *Refused*: tensors that do
not have one row per image, left out by name. *Seconds* were measured on a busy core.

{len(run)} of {len(rows)} models, {leaves} leaf modules, {tensors} tensors: {wrong or "none"} wrong.

| model | input | leaf modules | tensors | equal | refused | seconds |
|---|---|--:|--:|--:|--:|--:|"""
    ]
    for row in run:
        size = " × ".join(map(str, row["input"]))
        equal = row["tensors"] - len(row["different"])
        cells = (row["model"], size, row["leaves"], row["tensors"], equal, len(row["refused"]) or "", row["seconds"])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    failed = [f"- `{row['model']}`: {row['error']}" for row in rows if "error" in row]
    lines += ["", "## Not run, and why", "", *failed] if failed else []
    lines += ["", "## Refused layers, and why", ""]
    for row in run:
        for why, names in _by_reason(row["refused"]).items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"- `{row['model']}`: {', '.join(f'`{n}`' for n in names[:3])}{more}: {why}")
    return "\n".join(lines) + "\n"


def _by_reason(refused: Mapping[str, str]) -> dict[str, list[str]]:
    """Reason without its figures → layers."""
    reasons: dict[str, list[str]] = {}
    for name, why in refused.items():
        reasons.setdefault(re.sub(r": [\d(].*", "", why), []).append(name)
    return reasons


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, required=True, help="one JSON line a model; none is run twice")
    parser.add_argument("--table", type=Path, help="write the table here, and check nothing")
    parser.add_argument("models", nargs="*", help="names; all of torchvision's without any")
    options = parser.parse_args()
    if options.table:
        options.table.write_text(table(_rows(options.state)))
    else:
        sweep(options.state, options.models or torchvision.models.list_models())


if __name__ == "__main__":
    main()
