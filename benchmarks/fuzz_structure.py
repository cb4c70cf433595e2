"""Files that are sound HDF5 and whose structure is anything, given to everything that reads: only our own errors.

    python -m benchmarks.fuzz_structure [--minutes 60] [--seed 0] [--one SEED] [--entries N] [--edits NAME,NAME]

A small run is made; copies of its file, its directory and its unfinished directory are changed in a few places (types,
shapes, names, links, references, filters, chunks, values, bytes, the JSON within and beside: `hostile_edits`), the
digests are made again so that the change alone is wrong, and every command that reads is run on each. What counts as a
finding: an exception that is not ours or does not name the output, JSON that is not JSON, other values than h5py reads,
20 seconds of one reader, a gibibyte of memory, and the end of the process, which is why the readers run in a process
of their own. Prints one line a finding, with the seed that makes it again, and a JSON summary; the exit status says
whether there was one.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import h5py
import numpy as np

from benchmarks import hostile_edits
from benchmarks.hostile_edits import ROWS, json_text

MODEL = """
import torch
from torch import nn


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(inplace=True), nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.relu(self.conv(x)).mean((2, 3)))


def small():
    torch.manual_seed(0)
    return Small()
"""
RUN = ("--preprocess", "size=12,crop=8,mean=0.5,std=0.5", "--precision", "fp32", "--batch-size", "2",
       "--num-workers", "1", "--device", "cpu", "-l", "conv", "-l", "relu", "-l", "fc")  # fmt: skip
ROOT = Path(__file__).resolve().parents[1]
HANG_SECONDS, LONG_SECONDS, MEMORY_BYTES, ADDRESS_BYTES = 120, 20, 1 << 30, 24 << 30


# -------------------------------------------------------------------------------------------------------- the subjects


def make_subjects(folder: Path) -> None:
    """A run as a file, as a directory of shards, and as one that was not finished, of photos and a model beside."""
    import PIL.Image

    photos = folder / "photos"
    photos.mkdir()
    random = np.random.default_rng(0)
    for number in range(ROWS):
        pixels = random.integers(0, 256, (16, 12, 3), np.uint8)
        PIL.Image.fromarray(pixels).save(photos / f"{number}.png")
    (photos / "5.png").write_bytes(b"\x89PNG broken")
    (folder / "model.py").write_text(MODEL)
    for out, options in (("acts.h5", ()), ("acts", ("--shard-size", "1"))):
        assert extract(folder, folder / out, *options) == 0, f"the run of {out} failed"
    shutil.copytree(folder / "acts", folder / "begun")
    (folder / "begun" / "index.json").unlink()
    last = max((folder / "begun").glob("shard-*.h5"))
    last.unlink()
    last.with_suffix(".json").unlink()


def extract(folder: Path, out: Path, *options: str) -> int:
    from fmextract.cli import app

    # One of eight is broken: status 3 says so.
    code = app.main(["extract", str(folder / "photos"), "-m", f"{folder}/model.py:small", "-o", str(out),
                     "--max-failures", "3", *RUN, *options, "--debug"])  # fmt: skip
    return 0 if code == 3 else code


# ------------------------------------------------------------------------------------------------------- the mutants


EDITS, PATCHES = hostile_edits.EDITS, hostile_edits.PATCHES


def use_edits(names: str) -> None:
    """Only the edits and patches of these names, all of them for an empty text."""
    global EDITS, PATCHES
    EDITS = tuple(edit for edit in EDITS if not names or edit.__name__ in names.split(","))
    PATCHES = tuple(patch for patch in PATCHES if not names or patch.__name__ in names.split(","))


def change(random: Random, path: Path) -> list[str]:
    """Change a file in one to three places, and make its digest again; returns the names of the edits."""
    if PATCHES and (not EDITS or random.random() < 0.2):
        patch = random.choice(PATCHES)
        patch(random, path)
        return [patch.__name__]
    done = []
    try:
        with h5py.File(path, "r+", libver=("earliest", "v110")) as file:
            for _ in range(random.choice([1, 1, 1, 2, 3])):
                edit = random.choice(EDITS)
                done.append(edit.__name__)
                # What h5py refuses to make, nobody has to read; and an edit may meet what one before it has left.
                with contextlib.suppress(Exception):
                    edit(random, file)
    except (OSError, RuntimeError, ValueError) as error:
        done.append(f"not closed: {error}")
    return done


def digest_again(path: Path) -> str | None:
    """So that what is wrong is not told by the digest. None where the content cannot be read that far."""
    from fmextract.errors import FmextractError
    from fmextract.storage import digest

    try:
        value = digest.content_digest(path)
        with h5py.File(path, "r+") as file:
            file.attrs["content_digest"] = value
    except (FmextractError, OSError, RuntimeError, TypeError, ValueError, KeyError):
        return None
    return value


def change_directory(random: Random, folder: Path) -> list[str]:
    """Change a shard, with a record that fits again, or one of the JSON files."""
    from fmextract.storage import shards

    shard = random.choice(sorted(folder.glob("shard-*.h5")))
    if random.random() < 0.5:
        path = random.choice([*folder.glob("*.json"), folder / "plan.json"])
        path.write_text(json_text(random, path.read_text()))
        return [path.name]
    done = change(random, shard)
    digest = digest_again(shard)
    record = shard.with_suffix(".json")
    new = {"bytes": shard.stat().st_size, "sha256": shards.file_sha256(shard)} | (
        {"content_digest": digest} if digest else {}
    )
    said = json.loads(record.read_text()) | new
    record.write_text(json.dumps(said))
    if (listed := folder / "index.json").exists():
        whole = json.loads(listed.read_text())
        whole["shards"] = [one | (new if one["name"] == shard.name else {}) for one in whole["shards"]]
        listed.write_text(json.dumps(whole))
    return done


# --------------------------------------------------------------------------------------------------------- the readers


def read(target: Path) -> None:
    """`open`, and all that it offers."""
    import fmextract as fm
    from fmextract.errors import ConfigError

    with fm.open(target) as acts:
        acts.info()
        repr(acts)
        _ = acts.config, acts.preprocess, acts.versions, acts.throughput, acts.input_size, acts.labels, acts.samples
        _ = acts.keys, acts.status, acts.messages, acts.heights, acts.widths, acts.rows(), acts.file_digests
        for name in acts.layers:
            layer = acts[name]
            _ = layer.field, layer.attrs, layer[0], layer[...], layer[[0, -1]], repr(layer), layer.effective_dimension
            list(layer.batches(3))
            with contextlib.suppress(ConfigError):  # it has none
                layer.top(0)
        list(acts.batches(size=5))
        data = acts.dataset()
        _ = [data[item] for item in range(len(data))]


def misread(target: Path) -> str | None:
    """A layer of a file of which other values are read than h5py has, None where there is none."""
    import fmextract as fm
    from fmextract.storage.layout import escape_name

    with fm.open(target) as acts, h5py.File(target) as file:
        for name in acts.layers:
            ours, theirs = acts[name][...], file[f"layers/{escape_name(name)}/activation"][...]
            if not np.array_equal(ours, theirs, equal_nan=theirs.dtype.kind == "f"):
                return name
    return None


def commands(target: Path, base: Path, out: Path) -> dict[str, list[str]]:
    """What reads an output, by name; a directory can be packed, and a run can go on in both."""
    sample = ["--image", "1.png", "-l", "conv", "-o"]
    photos = ["--images", str(base / "photos")]
    run = [
        "extract",
        str(base / "photos"),
        "-m",
        f"{base}/model.py:small",
        "--max-failures",
        "3",
        *RUN,
        "-o",
        str(target),
    ]
    made = {
        "info": ["info", str(target), "--json"],
        "info table": ["info", str(target)],
        "verify": ["verify", str(target), "--json"],
        "verify rerun": ["verify", str(target), "--rerun", "1", "-m", f"{base}/model.py:small"],
        "report": ["report", str(target), "-o", str(out / "r.html"), *photos],
        "show maps": ["show", "maps", str(target), *sample, str(out / "maps"), *photos, "--json"],
        "show overlay": ["show", "maps", str(target), *sample, str(out / "o.png"), *photos, "--overlay"],
        "show top": ["show", "top", str(target), "-l", "conv", "--channel", "1", "-o", str(out / "t.png"), *photos],
        "show where": ["show", "where", str(target), *sample, str(out / "w.png"), *photos, "--json"],
        "show depth": ["show", "depth", str(target), "-o", str(out / "d.png"), "--json"],
        "compare": ["compare", str(base / "acts.h5"), str(target), "--json"],
        "compare back": ["compare", str(target), str(base / "acts.h5"), "-o", str(out / "c.png")],
        "resume": run,
    }
    made |= {
        f"export {to}": ["export", str(target), "--to", to, "-o", str(out / name), "--json"]
        for to, name in (
            ("npy", "npy"), ("safetensors", "x.safetensors"), ("parquet", "x.parquet"), ("netcdf", "x.nc"),
            ("rdm", "x.h5"),
        )
    }  # fmt: skip
    if target.is_dir():
        made["pack"] = ["pack", str(target), "-o", str(out / "packed.h5")]
    return made


def wrong(name: str, arguments: list[str], target: Path) -> str | None:
    """What a command did that it must not, None where it did well."""
    from fmextract.cli import app

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = app.main([*arguments, "--debug"])
    said = err.getvalue()
    if code not in (0, 2, 3, 4, 5):
        return f"{name}: exit status {code}: {_end(said)}"
    # A photo that cannot be shown is named itself.
    if code in (2, 4) and not any(name in said.partition("error: ")[2] for name in (target.name, "photos/")):
        return f"{name}: does not name the file: {said.rpartition('error:')[2].strip()[:300]}"
    if "--json" in arguments and out.getvalue():
        try:
            json.loads(out.getvalue(), parse_constant=_no_constant)
        except ValueError as error:
            return f"{name}: prints no JSON: {error}"
    return None


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _end(said: str) -> str:
    """The last line, and where in the package it was raised."""
    lines = said.strip().splitlines()
    places = [line.strip() for line in lines if "/fmextract/" in line and "cli.py" not in line]
    return f"{lines[-1] if lines else ''} [{places[-1] if places else ''}]"


def findings(random: Random, base: Path, work: Path, entries: int | None) -> Iterator[str]:
    """Make a mutant and give it to the readers, `entries` of the commands or all of them; yields what went wrong."""
    from fmextract.errors import FmextractError

    kind = random.choice(["acts.h5", "acts.h5", "acts.h5", "acts", "acts", "begun"])
    target = work / f"mutant{Path(kind).suffix}"
    out = work / "out"
    out.mkdir()
    if Path(kind).suffix:
        shutil.copy(base / kind, target)
        edits = change(random, target)
        digest_again(target)
    else:
        shutil.copytree(base / kind, target)
        edits = change_directory(random, target)
    print(json.dumps({"kind": kind, "edits": edits}), flush=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            begun = time.process_time()
            read(target)
            if time.process_time() - begun > LONG_SECONDS:
                yield f"read: took {time.process_time() - begun:.0f} s"
            if target.is_file() and (layer := misread(target)):
                yield f"read: other values of {layer} than h5py reads"
    except FmextractError as error:
        if target.name not in str(error):
            yield f"read: does not name the file: {error}"
    except Exception:
        yield f"read: {_end(traceback.format_exc())}"
    run = commands(target, base, out)
    chosen = list(run) if entries is None else random.sample(list(run), entries)
    for name in sorted(chosen, key=lambda name: name == "resume"):  # which may change the mutant
        begun = time.process_time()
        if said := wrong(name, run[name], target):
            yield said
        if time.process_time() - begun > LONG_SECONDS:
            yield f"{name}: took {time.process_time() - begun:.0f} s"


def serve(base: Path, entries: int | None) -> None:
    """Read seeds from standard input, one a line; print for each its mutant, its findings, and when it is done."""
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_BYTES, ADDRESS_BYTES))
    for line in sys.stdin:
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with tempfile.TemporaryDirectory() as work:
            for said in findings(Random(int(line)), base, Path(work), entries):
                print(json.dumps({"found": said}), flush=True)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        if grown > MEMORY_BYTES:
            print(json.dumps({"found": f"took {grown >> 20} MiB of memory"}), flush=True)
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps({"done": int(line)}), flush=True)


# ------------------------------------------------------------------------------------------------------------ the loop


class Readers:
    """A process that reads mutants, started again whenever one ends it."""

    def __init__(self, base: Path, entries: int | None) -> None:
        names = ",".join(change.__name__ for change in (*EDITS, *PATCHES))
        arguments = [
            sys.executable,
            "-m",
            "benchmarks.fuzz_structure",
            "--serve",
            str(base),
            "--entries",
            str(entries or 0),
            "--edits",
            names,
        ]
        self._start = lambda: subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
        self._process = self._start()

    def findings(self, seed: int) -> tuple[Any, list[str]]:
        """(the mutant, what went wrong)."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{seed}\n")
        self._process.stdin.flush()
        mutant: Any = None
        found: list[str] = []
        for line in self._process.stdout:
            said = json.loads(line)
            if "done" in said:
                return mutant, found
            if "found" in said:
                found.append(said["found"])
            else:
                mutant = said
        _, trace = self._process.communicate()
        status, self._process = self._process.returncode, self._start()
        place = next((line.strip() for line in trace.splitlines() if "/fmextract/" in line), "")
        return mutant, [*found, f"ended the process, status {status}: {trace[:60]!r} {place}"]

    def close(self) -> None:
        self._process.communicate()


def search(
    seeds: Iterator[int], seconds: float, base: Path, entries: int | None
) -> Iterator[tuple[int, Any, list[str]]]:
    """(seed, mutant, findings) of each mutant until the time is over."""
    until = time.monotonic() + seconds
    readers = Readers(base, entries)
    try:
        for seed in seeds:
            if time.monotonic() > until:
                return
            yield seed, *readers.findings(seed)
    finally:
        readers.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the first mutant; the next has the next number")
    parser.add_argument("--one", type=int, help="only the mutant of this seed, here, with tracebacks")
    parser.add_argument("--entries", type=int, default=0, help="commands run on each mutant; 0: all of them")
    parser.add_argument("--edits", default="", help="names of functions that change a file, with commas; all of them")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    entries = given.entries or None
    use_edits(given.edits)
    if given.serve is not None:
        serve(given.serve, entries)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        with contextlib.redirect_stdout(sys.stderr):
            make_subjects(base)
        if given.one is not None:
            with tempfile.TemporaryDirectory() as work:
                found = list(findings(Random(given.one), base, Path(work), entries))
            print("\n".join(found))
            return bool(found)
        count, kinds = 0, dict[str, int]()
        seeds = iter(range(given.seed, sys.maxsize))
        for seed, mutant, found in search(seeds, 60 * given.minutes, base, entries):
            count += 1
            for said in found:
                kinds[said] = kinds.get(said, 0) + 1
                print(f"seed {seed} {mutant}: {said}", flush=True)
    print(json.dumps({"mutants": count, "findings": sum(kinds.values()), "kinds": len(kinds)}))
    return bool(kinds)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
