"""fmextract beside the tools and the script that people use today: same photos, network, weights and layers, one run.

    python -m benchmarks.peers [--work DIR] [--images 96] [--turns 3] [--only script,captum] [--cases maps,vit]
                               [--minutes 4] [--json FILE] [--markdown]

The other tools are no part of fmextract's installation. In an environment of their own, beside fmextract's:

    pip install -e '.[demo]' torchextractor==0.3.0 captum==0.9.0 torchlens==2.36.1 timm scipy
    pip install --no-deps thingsvision==2.7.3          (it asks for numpy 1, an old torchvision and TensorFlow)

One that is not installed, or fails, stands in the table with the reason. Every run is a process of its own; the
contenders take turns, and medians are given. What was measured is kept in DIR/runs.jsonl: the same command goes on
where it was, after a pause of any length with `--minutes`, and other cases, contenders and numbers of images are added.
Needs Linux, for the memory.

Rate: photos over the seconds from the call with the ready model to the last byte; and over those of the whole process,
imports and building the network included. Memory: the peak of the process above what it held when the network was
ready, and its workers' own. Values: all rows of all layers against hooks that clone, in batches of the same size, on
the same pixels (torchvision's transforms on Pillow's decoding; fmextract's own pixels are within one level of these).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contenders import CONTENDERS, Folder, Ours, Task, missing

EXACT_ENOUGH = 1e-4
"""Relative L2 error under which values count as right in fp32: kernels differ by 1e-6, a wrong tensor by much more."""
TIMEOUT = 900  # seconds for one process


@dataclass(frozen=True)
class Case:
    """A network of torchvision, the random weights of seed 0, and the layers to store."""

    title: str
    arch: str
    layers: tuple[str, ...]
    means: bool = False
    batch: int = 8
    has_means: tuple[str, ...] = ()
    """The layers that give a mean to a tool which cannot reduce."""

    def network(self) -> Any:
        """Speed and sizes on disk need no download."""
        import torch
        import torchvision

        torch.manual_seed(0)
        return getattr(torchvision.models, self.arch)(weights=None).eval()

    def asked(self, name: str) -> tuple[tuple[str, ...], bool]:
        """(the layers asked of a contender, whether as means)."""
        if self.means and not CONTENDERS[name].means:
            return self.has_means, False
        return self.layers, self.means


STAGES = tuple(f"layer{i}" for i in (1, 2, 3, 4))
_MAPS = Case("ResNet-50, full maps of layer1 to layer4, and avgpool", "resnet50", (*STAGES, "avgpool"))
CASES = {
    "maps": _MAPS,
    "maps-16": replace(_MAPS, title=f"{_MAPS.title}, in batches of 16", batch=16),
    "vit": Case(
        "ViT-B/16, four encoder blocks",
        "vit_b_16",
        tuple(f"encoder.layers.encoder_layer_{i}" for i in (2, 5, 8, 11)),
    ),
    "pooled": Case(
        "ResNet-50, means of layer1 to layer4, and avgpool",
        "resnet50",
        (*STAGES, "avgpool"),
        means=True,
        has_means=("avgpool",),
    ),
}
# What is known to go wrong, on a small network and eight photos: not timed.
HAZARDS = {
    "overwritten": Case("", "resnet18", ("bn1", "layer1.0.bn1"), batch=4),
    "reused": Case("", "resnet18", ("layer1.0.relu",), batch=4),
    "broken": Case("", "resnet18", ("layer4",), batch=4),
}
FEW, BROKEN = 8, 5
"""Photos of a hazard, and the row of the broken one."""
IN_HAZARDS = [name for name in CONTENDERS if not name.startswith("fmextract")] + ["fmextract-fp32"]


# --------------------------------------------------------------------------- in the contender's process


def one(case: Case, name: str, photos: Path, out: Path) -> dict[str, Any]:
    """Carry out a task: when the network was ready, when all was done, the peak of the memory above that at ready."""
    contender = CONTENDERS[name]
    model = case.network()
    contender.load()
    layers, means = case.asked(name)
    task = Task(model, photos, out, layers, means, case.batch)
    _reset_peak()
    before, ready = _memory("VmRSS"), time.monotonic()
    parts = contender.run(task)
    return {"ready": ready, "done": time.monotonic(), "peak": max(0, _memory("VmHWM") - before), "parts": parts}


def _reset_peak() -> None:
    """The kernel begins anew to remember the most memory that this process has held."""
    Path("/proc/self/clear_refs").write_text("5")


def _memory(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


# ------------------------------------------------------------------------------------- are they right?


def check(case: Case, name: str, photos: Path, out: Path, truths: Path) -> dict[str, Any]:
    """What is stored, against the truth: for every layer how many calls there are, and which of them, how exactly, is
    stored; whether the rows are in order, and whether the output names the photo of each.
    """
    contender = CONTENDERS[name]
    contender.load()
    layers, means = case.asked(name)
    exact = _truth(case, photos, truths, ours=isinstance(contender, Ours))
    found: dict[str, Any] = {}
    for layer in layers:
        calls = [_reduced(call, means) for call in exact[layer]]
        found[layer] = {"calls": len(calls), "stored": [_match(a, calls) for a in contender.read(out, layer)]}
    last = contender.read(out, layers[-1])[-1]
    names = contender.names(out)
    return {
        "layers": found,
        "order": _in_order(last, _reduced(exact[layers[-1]][-1], means)),
        "names": names is not None and names == [path.name for path in sorted(photos.glob("*.jpg"))],
    }


def _reduced(maps: np.ndarray, means: bool) -> np.ndarray:
    return maps.mean((2, 3)) if means else maps


def _match(stored: np.ndarray, calls: Sequence[np.ndarray]) -> dict[str, Any]:
    """(the call that comes nearest, its relative L2 error over the rows that hold values, those rows and all)."""
    whole = np.isfinite(stored.reshape(len(stored), -1)).all(axis=1)
    rows = {"rows": len(stored), "whole": int(whole.sum())}
    if len(stored) != len(calls[0]):
        return rows | {"call": None, "error": None}
    errors = [_error(stored[whole], call[whole]) for call in calls]
    return rows | {"call": int(np.argmin(errors)) + 1, "error": min(errors)}


def _error(stored: np.ndarray, exact: np.ndarray) -> float:
    """Relative L2 error, row by row so that no copy in float64 of the whole is needed."""
    off = sum(float(np.square(a.astype(np.float64) - b).sum()) for a, b in zip(stored, exact, strict=True))
    return (off / sum(float(np.square(b.astype(np.float64)).sum()) for b in exact)) ** 0.5


def _in_order(stored: np.ndarray, exact: np.ndarray) -> bool:
    """Whether each row is, of all rows of the truth, most like its own: by cosine, with the mean row taken off."""
    if len(stored) != len(exact):
        return False
    sides = []
    for values in (stored, exact):
        flat = values.reshape(len(values), -1).astype(np.float64)
        flat -= flat.mean(axis=0)
        sides.append(flat / np.linalg.norm(flat, axis=1, keepdims=True))
    return bool((np.argmax(sides[0] @ sides[1].T, axis=1) == np.arange(len(exact))).all())


def _truth(case: Case, photos: Path, truths: Path, *, ours: bool) -> dict[str, list[np.ndarray]]:
    """Every call of every layer, (sample, ...) in float32, by hooks that clone; kept in `truths` once it was made."""
    title = "-".join((case.arch, "ours" if ours else "pil", photos.name, *case.layers))
    folder = truths / title.replace("encoder.layers.encoder_layer_", "")
    if not folder.exists():
        making = Path(tempfile.mkdtemp(dir=truths))
        for layer, calls in _hooked(case, photos, ours).items():
            for call, maps in enumerate(calls):
                np.save(making / f"{layer}@{call}.npy", maps)
        making.rename(folder)
    files = {layer: sorted(folder.glob(f"{layer}@*.npy")) for layer in case.layers}
    return {layer: [np.load(file, mmap_mode="r") for file in paths] for layer, paths in files.items()}


def _hooked(case: Case, photos: Path, ours: bool) -> dict[str, list[np.ndarray]]:
    import torch

    model, batches, now = case.network(), [], dict[str, list[Any]]()
    for layer in case.layers:
        hook = lambda module, args, output, layer=layer: now.setdefault(layer, []).append(output.clone())  # noqa: E731
        model.get_submodule(layer).register_forward_hook(hook)
    folder = Folder(photos)
    rows = list(_our_pixels(photos)) if ours else [folder[row] for row in range(len(folder))]
    for at in range(0, len(rows), case.batch):
        now.clear()
        with torch.no_grad():
            model(torch.stack(rows[at : at + case.batch]))
        batches.append({layer: [tensor.numpy() for tensor in calls] for layer, calls in now.items()})
    return {
        layer: [np.concatenate(parts) for parts in zip(*(batch[layer] for batch in batches), strict=True)]
        for layer in case.layers
    }


def _our_pixels(photos: Path) -> Iterator[Any]:
    """The inputs as fmextract decodes and resizes them; what this does to the values is told apart, by `decoding`."""
    from fmextract.inputs import decoding, preprocessing

    preprocess = preprocessing.parse_preprocess(Ours.preprocess)
    for path in sorted(photos.glob("*.jpg")):
        yield preprocessing.normalise(decoding.decode(path.read_bytes(), preprocess).pixels[None], preprocess)[0]


def decoding(case: Case, photos: Path, truths: Path) -> float:
    """How far the right values for fmextract's pixels are from those for Pillow's: the worst layer."""
    pil, ours = (_truth(case, photos, truths, ours=which) for which in (False, True))
    return max(_error(b, a) for layer in case.layers for a, b in zip(pil[layer], ours[layer], strict=True))


# ---------------------------------------------------------------------------------------- measuring


class Journal:
    """What was measured so far, one JSON object a line, by what it is about."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.entries: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def add(self, **entry: Any) -> dict[str, Any]:
        """One more line, on disk before this returns."""
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        self.entries.append(entry)
        return entry

    def find(self, **about: Any) -> list[dict[str, Any]]:
        """The lines that say all of this."""
        return [e for e in self.entries if all(e.get(key) == value for key, value in about.items())]


class Failed(Exception):
    """The last line of what a contender said before it ended."""


def _call(task: str, *arguments: object) -> tuple[dict[str, Any], float, float, int]:
    """(what a process of this module printed, its start and its end on the monotonic clock, its workers' memory)."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.peers", "--inside", task, *map(str, arguments)]
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as told, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=told, stderr=errors, text=True)
        workers = _Workers(process.pid)
        try:
            code = process.wait(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise Failed(f"not finished after {TIMEOUT} s") from None
        finally:
            peak = workers.stop()
        ended = time.monotonic()
        told.seek(0)
        errors.seek(0)
        if code:
            raise Failed(_last_words(errors.read()) or f"exit status {code}")
        return json.loads(told.read().splitlines()[-1]), began, ended, peak


def _last_words(errors: str) -> str:
    """The last line of a traceback, without the place of the class and the folders, which are this run's own."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return re.sub(r"^(\w+\.)+(?=\w+:)|/\S+/(?=[^/\s])", "", lines[-1]) if lines else ""


class _Workers:
    """The memory that the child processes of a process have to themselves, once a second; its peak."""

    def __init__(self, pid: int) -> None:
        self.children = Path(f"/proc/{pid}/task/{pid}/children")
        self.peak, self.over = 0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()

    def stop(self) -> int:
        self.over.set()
        self.thread.join()
        return self.peak

    def _watch(self) -> None:
        while not self.over.wait(1.0):
            try:
                now = sum(_private(int(child)) for child in self.children.read_text().split())
            except (FileNotFoundError, ProcessLookupError):
                continue  # one of them has just ended
            self.peak = max(self.peak, now)


def _private(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def measure(journal: Journal, work: Path, case: str, name: str, turn: int, images: int) -> None:
    """One run of a contender, and the first time whether its values are right; into the journal, failed or not."""
    about = {"kind": "run", "case": case, "contender": name, "images": images}
    os.sync()  # what the one before left to be written is not this one's
    with tempfile.TemporaryDirectory(dir=work) as out:
        photos = _photos(work, images)
        try:
            told, began, ended, workers = _call("one", case, name, photos, out)
        except Failed as failure:
            journal.add(**about, turn=turn, failed=str(failure))
            return
        done = journal.add(
            **about,
            turn=turn,
            start=told["ready"] - began,
            seconds=told["done"] - told["ready"],
            whole=ended - began,
            peak=told["peak"],
            workers=workers,
            bytes=_bytes(Path(out)),
            parts=told["parts"],
        )
        _say(f"{case} {name}: {images / done['seconds']:.2f} images/s, {images / done['whole']:.2f} with its start")
        if not journal.find(kind="check", case=case, contender=name):
            _check(journal, {**about, "kind": "check"}, case, name, photos, Path(out), work)


def _check(journal: Journal, about: Mapping[str, Any], *arguments: Any) -> None:
    case, name, photos, out, work = arguments
    try:
        found = _call("check", case, name, photos, out, work / "truth")[0]
    except Failed as failure:
        found = {"failed": str(failure)}
    journal.add(**about, **found)


def hazards(journal: Journal, work: Path, name: str) -> None:
    """The known hazards, each once; and after the broken photo is mended, the same command again on the same output."""
    good = _photos(work, FEW)
    for hazard in HAZARDS:
        if journal.find(kind="hazard", hazard=hazard, contender=name):
            continue
        about = {"kind": "hazard", "hazard": hazard, "contender": name}
        with tempfile.TemporaryDirectory(dir=work) as scratch:
            photos, out = Path(scratch) / good.name, Path(scratch) / "out"
            shutil.copytree(good, photos)
            out.mkdir()
            if hazard == "broken":
                _break(sorted(photos.glob("*.jpg"))[BROKEN])
            _attempt(journal, about, hazard, name, photos, out, work)
            if hazard == "broken":
                shutil.copytree(good, photos, dirs_exist_ok=True)
                _attempt(journal, {**about, "hazard": "mended"}, hazard, name, photos, out, work)
        _say(f"{hazard} {name}: {_outcome(journal, hazard, name)}")


def _attempt(journal: Journal, about: Mapping[str, Any], *arguments: Any) -> None:
    hazard, name, photos, out, work = arguments
    try:
        _call("one", hazard, name, photos, out)
    except Failed as failure:
        journal.add(**about, failed=str(failure))
    else:
        _check(journal, about, hazard, name, _photos(work, FEW), out, work)


def _break(photo: Path) -> None:
    """Cut off in the middle, as by a full disk or a copy that was ended."""
    data = photo.read_bytes()
    photo.write_bytes(data[: len(data) // 2])


def _photos(work: Path, count: int) -> Path:
    from fmextract.common.sample_photos import make_photos

    folder = work / f"photos-{count}"
    if not folder.exists():
        make_photos(work / "photos", count).rename(folder)
    return folder


def _bytes(out: Path) -> int:
    return sum(file.stat().st_size for file in out.rglob("*") if file.is_file())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------- telling


def report(journal: Journal, options: Any) -> dict[str, Any]:
    """Everything measured of what was asked for, summed up: plain data."""
    from fmextract.common.machine import machine

    versions = {}
    for package in sorted({package for contender in CONTENDERS.values() for package in contender.packages}):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "machine": machine(),
        "versions": versions,
        "cases": {
            case: {name: _summary(journal, case, name, _count(name, options)) for name in options.only}
            for case in options.cases
            if case in CASES
        },
        "decoding": {case: e["error"] for case in options.cases for e in journal.find(kind="decoding", case=case)},
        "hazards": {
            name: {hazard: _outcome(journal, hazard, name) for hazard in (*HAZARDS, "mended")}
            for name in options.only
            if name in IN_HAZARDS and "hazards" in options.cases
        },
    }


def _summary(journal: Journal, case: str, name: str, images: int) -> dict[str, Any]:
    """Medians of the turns of a contender, or why there are none."""
    runs = journal.find(kind="run", case=case, contender=name, images=images)
    good = [run for run in runs if "failed" not in run]
    if not good:
        lacking = missing(name)
        why = f"not installed: {', '.join(lacking)}" if lacking else "not run"
        return {"did_not_run": f"failed: {runs[0]['failed']}" if runs else why}
    median: Callable[[Callable[[dict[str, Any]], float]], float] = lambda of: statistics.median(map(of, good))  # noqa: E731
    checks = journal.find(kind="check", case=case, contender=name)
    return {
        "images": images,
        "turns": len(good),
        "images_per_second": median(lambda run: images / run["seconds"]),
        "images_per_second_whole": median(lambda run: images / run["whole"]),
        "slowest": min(images / run["seconds"] for run in good),
        "fastest": max(images / run["seconds"] for run in good),
        "start_seconds": median(lambda run: run["start"]),
        "bytes_per_image": good[0]["bytes"] / images,
        "peak": median(lambda run: run["peak"]),
        "workers": median(lambda run: run["workers"]),
        "milliseconds_per_image": {
            part: 1000 * median(lambda run, part=part: run["parts"][part] / images) for part in good[0]["parts"]
        },
        "only": list(CASES[case].asked(name)[0]) if CASES[case].asked(name)[0] != CASES[case].layers else [],
        "values": _values(checks[0]) if checks else {},
    }


def _values(checked: Mapping[str, Any]) -> dict[str, Any]:
    """The worst error over the layers (None: rows are missing), and whether rows are in order and named."""
    if "failed" in checked:
        return {"failed": checked["failed"]}
    errors = [stored["error"] for layer in checked["layers"].values() for stored in layer["stored"]]
    worst = None if not errors or None in errors else max(errors)
    return {"error": worst, "order": checked["order"], "names": checked["names"]}


def _outcome(journal: Journal, hazard: str, name: str) -> str:
    """What became of a hazard, in words."""
    entries = journal.find(kind="hazard", hazard=hazard, contender=name)
    if not entries:
        return f"not installed: {', '.join(missing(name))}" if missing(name) else "not run"
    entry = entries[0]
    if "failed" in entry:
        return f"stops: {entry['failed'].split(';')[0].split(' (')[0]}"
    stored = [found for layer in entry["layers"].values() for found in layer["stored"]]
    errors = [found["error"] for found in stored]
    if None in errors or not errors:
        return f"{min((found['rows'] for found in stored), default=0)} of {FEW} rows, without a word"
    if hazard == "reused":
        right = sorted(found["call"] for found in stored if found["error"] < EXACT_ENOUGH)
        calls = next(iter(entry["layers"].values()))["calls"]
        return "all calls" if len(right) == calls else f"call {', '.join(map(str, right))} of {calls} only"
    if max(errors) > EXACT_ENOUGH:
        return f"wrong by {max(errors):.0%}"
    whole = min(found["whole"] for found in stored)
    return "right" if whole == FEW else f"finishes, {whole} of {FEW} rows right, the others empty"


def _told(found: Mapping[str, Any], layout: Callable[[str, list[list[str]]], str]) -> str:
    """The tables, and why contenders that are not in them are not."""
    parts = [layout(title, rows) for title, rows in _tables(found)]
    for case, contenders in found["cases"].items():
        parts += [f"{name}, {case}: {row['did_not_run']}" for name, row in contenders.items() if "did_not_run" in row]
    parts += [f"{case}: fmextract's pixels for Pillow's: {error:.1e}" for case, error in found["decoding"].items()]
    return "\n".join(parts)


def _tables(found: Mapping[str, Any]) -> Iterator[tuple[str, list[list[str]]]]:
    """(title, rows with the heading first) of each case, and of the hazards."""
    for case, contenders in found["cases"].items():
        heading = [
            "contender",
            "images/s",
            "with start-up",
            "times the script",
            "MB an image",
            "peak, MB",
            "worst error",
        ]
        base = contenders.get("script", {}).get("images_per_second")
        yield CASES[case].title, [heading, *(_line(name, row, base) for name, row in contenders.items())]
    if found["hazards"]:
        heading = ["contender", "in-place ReLU", "a module called twice", "a broken photo", "mended, run again", "rows"]
        lines = [
            [name, *(row[hazard] for hazard in (*HAZARDS, "mended")), _rows_told(found["cases"].values(), name)]
            for name, row in found["hazards"].items()
        ]
        yield "What is known to go wrong", [heading, *lines]


def _plain(title: str, rows: list[list[str]]) -> str:
    """For a terminal."""
    from fmextract.common import text

    return f"{title}\n{text.table(rows[0], rows[1:], right=[rows[0][i] for i in _figures(rows)])}\n"


def _markdown(title: str, rows: list[list[str]]) -> str:
    """For the documentation."""
    rule = ["--:" if i in _figures(rows) else "---" for i in range(len(rows[0]))]
    lines = [f"| {' | '.join(cell.replace('|', '¦') for cell in row)} |" for row in [rows[0], rule, *rows[1:]]]
    return "\n".join([f"**{title}**", "", *lines, ""])


def _figures(rows: list[list[str]]) -> list[int]:
    """The columns that hold figures, which go to the right; an error may be `not checked`."""
    return [i for i in range(1, len(rows[0])) if rows[0][1] == "images/s"]


def _line(name: str, row: Mapping[str, Any], base: float | None) -> list[str]:
    if "did_not_run" in row:
        return [name, row["did_not_run"].split(":")[0], *["–"] * 5]
    return [
        name + (f" ({', '.join(row['only'])} only)" if row["only"] else ""),
        f"{row['images_per_second']:.2f}",
        f"{row['images_per_second_whole']:.2f}",
        f"{row['images_per_second'] / base:.2f}" if base else "–",
        f"{row['bytes_per_image'] / 1e6:.3g}",
        f"{(row['peak'] + row['workers']) / 1e6:.0f}",
        _error_told(row),
    ]


def _error_told(row: Mapping[str, Any]) -> str:
    values = row["values"]
    if not values or "failed" in values:
        return f"not read back: {values['failed']}" if values else "not checked"
    if values["error"] is None:
        return "rows are missing"
    return "0" if values["error"] == 0 else f"{values['error']:.1e}"


def _rows_told(cases: Any, name: str) -> str:
    values = [rows[name]["values"] for rows in cases if rows.get(name, {}).get("values")]
    if not values or any("failed" in value for value in values):
        return "not read back"
    order = "in order" if all(value["order"] for value in values) else "out of order"
    return f"{order}, {'named' if all(value['names'] for value in values) else 'not named'}"


# --------------------------------------------------------------------------------------------- main


def _carry_out(journal: Journal, work: Path, options: Any) -> int:
    """Everything that was asked for and is not in the journal, by turns, until the time is up; how much is left."""
    jobs = list(_jobs(journal, work, options))
    began = time.monotonic()
    for done, job in enumerate(jobs):
        if options.minutes and time.monotonic() - began > 60 * options.minutes:
            return len(jobs) - done
        job()
    return 0


def _jobs(journal: Journal, work: Path, options: Any) -> Iterator[Callable[[], None]]:
    installed = [name for name in options.only if not missing(name)]
    cases = [case for case in options.cases if case in CASES]
    for turn, case, name in itertools.product(range(options.turns), cases, installed):
        images = _count(name, options)
        before = journal.find(kind="run", case=case, contender=name, images=images)
        if not any(run["turn"] == turn or "failed" in run for run in before):
            yield partial(measure, journal, work, case, name, turn, images)
    for case in cases:
        if not journal.find(kind="decoding", case=case):
            yield partial(_measure_decoding, journal, work, case, options.images)
    for name in installed if "hazards" in options.cases else []:
        if name in IN_HAZARDS and any(not journal.find(kind="hazard", hazard=h, contender=name) for h in HAZARDS):
            yield partial(hazards, journal, work, name)


def _count(name: str, options: Any) -> int:
    """Photos for a contender: rates are by the photo, and torchlens takes long."""
    return min(options.images, options.few) if name == "torchlens" else int(options.images)


def _measure_decoding(journal: Journal, work: Path, case: str, images: int) -> None:
    journal.add(kind="decoding", case=case, error=_call("decoding", case, _photos(work, images), work / "truth")[0])


def _inside(task: str, case: str, *rest: str) -> Any:
    """What a process of its own does for the one that measures."""
    if task == "decoding":
        return decoding(CASES[case], *map(Path, rest))
    does: dict[str, Callable[..., Any]] = {"one": one, "check": check}
    return does[task]((CASES | HAZARDS)[case], rest[0], *map(Path, rest[1:]))


def main() -> None:
    options = _options()
    if options.inside:
        with contextlib.redirect_stdout(sys.stderr):  # thingsvision prints
            made = _inside(*options.inside)
        print(json.dumps(made))
        return
    work = options.work or Path(tempfile.mkdtemp(prefix="fmextract-peers-"))
    (work / "truth").mkdir(parents=True, exist_ok=True)
    journal = Journal(work / "runs.jsonl")
    left = _carry_out(journal, work, options)
    found = report(journal, options)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))
    print(_told(found, _markdown if options.markdown else _plain))
    if left:
        _say(f"{left} measurements are left: the same command goes on")
        raise SystemExit(75)
    if not options.work:
        shutil.rmtree(work)


def _options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, metavar="DIR", help="photos, truths and the journal; kept")
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--few", type=int, default=32, help="images for torchlens, which takes long")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", type=_some(CONTENDERS), default=list(CONTENDERS), help=", ".join(CONTENDERS))
    known = {**CASES, "hazards": HAZARDS}
    parser.add_argument("--cases", type=_some(known), default=list(known), help=", ".join(known))
    parser.add_argument(
        "--minutes", type=float, help="begin nothing more after this time; exit status 75 if work is left"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--inside", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def _some(known: Mapping[str, Any]) -> Callable[[str], list[str]]:
    """The type of an option that takes names, separated by commas."""

    def names(text: str) -> list[str]:
        given = text.split(",") if text else []
        for name in given:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return given

    return names


if __name__ == "__main__":
    main()
