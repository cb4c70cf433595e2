"""The command line: exit codes to the letter, a clean stdout, messages instead of tracebacks."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from files import make_file
from PIL import Image

import fmextract
from fmextract import errors
from fmextract.capture.reducer_help import REDUCER_HELP
from fmextract.cli import main
from fmextract.common import text
from fmextract.common.progress import TerminalProgress

TINY = """
import torch
from fmextract import Preprocess

class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.bn1 = torch.nn.BatchNorm2d(4)
        self.relu = torch.nn.ReLU(inplace=True)
        self.fc = torch.nn.Linear(4, 2)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        return self.fc(x.mean((2, 3)))

def model():
    torch.manual_seed(0)
    return Tiny(), Preprocess(resize=16, crop=(16, 16))

def plain():
    return Tiny()

def talking():
    print("built, and saying so on stdout")
    made, preprocess = model()
    made.register_forward_pre_hook(lambda *_: print("forward, and saying so on stdout"))
    return made, preprocess
"""

KEYS = {
    "output", "images", "failed", "seconds", "images_per_second", "bytes_raw", "bytes_stored", "device", "precision",
    "batch_size", "limiting_stage", "stages", "layers", "resumed_images",
}  # fmt: skip


class Said(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


Run = Callable[..., Said]


@pytest.fixture
def fm(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process."""

    def run(*words: object) -> Said:
        capfd.readouterr()
        code = main([str(word) for word in words])
        return Said(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model file, five good photos, and an output of another run."""
    root = tmp_path_factory.mktemp("cli")
    (root / "tiny.py").write_text(TINY)
    (root / "photos").mkdir()
    random = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(root / "photos" / f"{i}.png")
    make_file(root / "made.h5", {"conv": np.arange(96, dtype=np.float32).reshape(2, 3, 4, 4)}, status=[0, 2])
    return root


@pytest.fixture
def options(place: Path, tmp_path: Path) -> list[object]:
    """What every `extract` here says: photos, model, a place, and no measuring."""
    fixed = ["--precision", "fp32", "--batch-size", "2", "--device", "cpu"]
    return [place / "photos", "-m", f"{place / 'tiny.py'}:model", "-o", tmp_path / "acts.h5", *fixed]


def assert_message(said: Said, code: int, *parts: str) -> None:
    """An exit code, nothing on stdout, one message without a traceback that says all of `parts`."""
    assert said.code == code, said.err
    assert said.out == ""
    assert "Traceback" not in said.err
    assert said.err.count("error: ") >= 1
    for part in parts:
        assert part in said.err


# --------------------------------------------------------------------------------------------- extract


def test_extract_writes_a_file_and_says_so(fm: Run, options: list[object], tmp_path: Path) -> None:
    said = fm("extract", *options, "-l", "conv1", "-l", "relu")
    assert said.code == 0
    assert "5 images" in said.out
    for column in ("layer", "shape", "stored", "zeros"):
        assert column in said.out
    assert "4×16×16" in said.out
    with fmextract.open(tmp_path / "acts.h5") as acts:
        assert acts.layers == ("conv1", "relu")
        assert list(acts.status) == [0] * 5


def test_extract_json_is_the_contract(fm: Run, options: list[object], tmp_path: Path) -> None:
    said = fm("extract", *options, "-l", "conv1", "--json")
    assert said.code == 0
    assert said.json.keys() >= KEYS
    assert said.json["images"] == 5
    assert said.json["failed"] == 0
    assert said.json["output"] == str(tmp_path / "acts.h5")
    assert said.json["stages"].keys() >= {"decode", "forward", "encode", "write"}
    (layer,) = said.json["layers"]
    assert layer.keys() >= {"name", "shape", "dtype", "bytes_stored", "sparsity", "nonfinite"}


def test_the_same_command_on_a_finished_output_says_that_nothing_was_run(fm: Run, options: list[object]) -> None:
    assert "complete already" not in fm("extract", *options, "-l", "conv1").out
    again = fm("extract", *options, "-l", "conv1")
    assert again.code == 0
    assert "5 images" in again.out
    assert "complete already, nothing was run" in again.out


def test_stdout_is_the_result_whatever_the_model_prints(fm: Run, options: list[object], place: Path) -> None:
    options[2] = f"{place / 'tiny.py'}:talking"
    said = fm("extract", *options, "-l", "conv1", "--json")
    assert said.json["images"] == 5
    assert "saying so on stdout" in said.err


def test_a_bad_image_is_exit_code_3_and_named(fm: Run, options: list[object], place: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("0.png", "1.png"):
        (photos / name).write_bytes((place / "photos" / name).read_bytes())
    (photos / "bad\x1b[31m.png").write_bytes(b"not a picture")
    said = fm("extract", photos, *options[1:], "-l", "fc", "--json")
    assert said.code == 3
    assert (said.json["images"], said.json["failed"]) == (3, 1)
    assert said.json["failures"][0][0] == "bad\x1b[31m.png"
    assert "1 image failed" in said.err
    assert "bad\\x1b[31m.png: " in said.err
    assert "\x1b" not in said.err


def test_a_run_of_bad_images_only_is_stopped(fm: Run, options: list[object], tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "bad.png").write_bytes(b"not a picture")
    assert_message(fm("extract", tmp_path / "photos", *options[1:], "-l", "fc", "--json"), 4, "bad.png")


def test_dry_run_and_plan_say_the_same_and_write_nothing(fm: Run, options: list[object], tmp_path: Path) -> None:
    dry, plan = (fm(*words, *options, "-l", "conv1", "--json") for words in (("extract", "--dry-run"), ("plan",)))
    assert dry.code == plan.code == 0
    assert dry.json["layers"] == plan.json["layers"]
    assert dry.json["rows"] == 5
    assert list(tmp_path.iterdir()) == []
    del options[options.index("-o") : options.index("-o") + 2]
    table = fm("plan", *options, "-l", "conv1")
    assert table.code == 0
    assert "5 images" in table.out
    assert "conv1" in table.out


# --------------------------------------------------------------------------- what users get wrong: code 2


def test_unknown_layer(fm: Run, options: list[object]) -> None:
    assert_message(fm("extract", *options, "-l", "conv"), 2, "'conv'", "conv1")


def test_unknown_model(fm: Run, options: list[object]) -> None:
    options[2] = "resnet5"
    assert_message(fm("extract", *options), 2, "resnet5", "resnet50")
    options[2] = "no_such_module:model"
    assert_message(fm("extract", *options), 2, "no_such_module")


def test_model_without_preprocessing(fm: Run, options: list[object], place: Path) -> None:
    options[2] = f"{place / 'tiny.py'}:plain"
    assert_message(fm("extract", *options), 2, "--preprocess", "size=")


def test_empty_and_missing_source(fm: Run, options: list[object], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_message(fm("extract", tmp_path / "empty", *options[1:]), 2, "empty")
    assert_message(fm("extract", tmp_path / "missing", *options[1:]), 2, "missing")


def test_missing_weights_file(fm: Run, options: list[object]) -> None:
    assert_message(fm("extract", *options, "-w", "missing.safetensors"), 2, "missing.safetensors")


def test_output_that_is_something_else(fm: Run, options: list[object], tmp_path: Path) -> None:
    (tmp_path / "acts.h5").write_text("a letter to my aunt")
    assert_message(fm("extract", *options, "--overwrite"), 2, "acts.h5")
    assert (tmp_path / "acts.h5").read_text() == "a letter to my aunt"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--clip"], ["--clip", "float16"]),
        (["--keep-bits", "30"], ["--keep-bits", "23"]),
        (["--keep-bits", "11", "--dtype", "float16"], ["--keep-bits", "10"]),
        (["--precision", "fp8"], ["--precision", "bf16"]),
        (["--codec", "rar"], ["--codec 'rar'", "gzip"]),
        (["--level", "99"], ["--level 99", "gzip"]),
        (["--batch-size", "many"], ["--batch-size", "auto"]),
        (["--max-error", "little"], ["--max-error", "2%"]),
        (["--shard-size", "big"], ["--shard-size 'big'", "512MiB"]),
        (["--limit", "0"], ["--limit"]),
        (["--limit", "ten"], ["--limit", "integer"]),
        (["--device", "abacus"], ["abacus"]),
        (["--size", "wide"], ["--size", "wide"]),
        (["--layr", "conv1"], ["--layr", "--layer", "fmextract extract --help"]),
    ],
    ids=" ".join,
)
def test_options_that_cannot_be(fm: Run, options: list[object], words: list[str], parts: list[str]) -> None:
    assert_message(fm("extract", *options, *words), 2, *parts)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["extrakt"], ["extrakt", "extract", "fmextract --help"]),
        (["extract"], ["SOURCE"]),
        (["extract", "photos"], ["--model"]),
        (["extract", "photos", "-m", "resnet50"], ["--out"]),
        (["info"], ["FILE"]),
        (["info", "missing.h5"], ["missing.h5"]),
        (["info", "."], ["not an fmextract output"]),
    ],
    ids=lambda value: " ".join(value) or "nothing",
)
def test_usage(fm: Run, words: list[str], parts: list[str]) -> None:
    assert_message(fm(*words), 2, *parts)


def test_no_command_shows_the_help(fm: Run) -> None:
    said = fm()
    assert said.code == 2
    assert "Commands:" in said.out


# ------------------------------------------------------------------------------------------- exit codes


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Make the run raise an error."""
    import fmextract.run

    def fail_with(error: BaseException) -> None:
        def run(*_: object, **options: object) -> None:
            raise error

        monkeypatch.setattr(fmextract.run.extract, "run", run)

    return fail_with


ERRORS = [error for error in vars(errors).values() if isinstance(error, type) and hasattr(error, "exit_code")]


@pytest.mark.parametrize("kind", [kind for kind in ERRORS if kind not in (errors.MissingExtra, errors.SampleError)])
def test_every_error_has_its_exit_code(
    fm: Run, options: list[object], failing: Callable[[BaseException], None], kind: type[errors.FmextractError]
) -> None:
    error = kind("what was wrong\x1b[31m")
    if hasattr(error, "add_note"):  # Python 3.11
        error.add_note("stage: decode")
    failing(error)
    said = fm("extract", *options)
    assert_message(said, kind.exit_code, "error: what was wrong\\x1b[31m")
    assert "stage: decode" in said.err or not hasattr(error, "add_note")


def test_missing_extra_says_how_to_get_it(
    fm: Run, options: list[object], failing: Callable[[BaseException], None]
) -> None:
    failing(errors.MissingExtra("timm", "timm", "a model of timm"))
    assert_message(fm("extract", *options), 2, "pip install 'fmextract[timm]'")


def test_interrupted_says_how_to_resume(
    fm: Run, options: list[object], failing: Callable[[BaseException], None]
) -> None:
    failing(KeyboardInterrupt())
    assert_message(fm("extract", *options), 130, "interrupted; no shard was finished yet: the same command starts over")


def test_interrupted_later_says_what_is_kept(
    fm: Run, options: list[object], failing: Callable[[BaseException], None], tmp_path: Path
) -> None:
    (tmp_path / "acts.h5.partial").mkdir()
    for i in range(2):
        (tmp_path / "acts.h5.partial" / f"shard-0000{i}.json").write_text("{}")
    failing(KeyboardInterrupt())
    assert_message(fm("extract", *options), 130, "2 shards finished and kept: the same command goes on from there")


def test_a_bug_is_called_one(fm: Run, options: list[object], failing: Callable[[BaseException], None]) -> None:
    failing(ZeroDivisionError("division by zero"))
    assert_message(fm("extract", *options), 1, "bug", "ZeroDivisionError: division by zero", "--debug")


@pytest.mark.parametrize("error", [ZeroDivisionError("oh"), errors.NoSpace("oh")], ids=["bug", "error"])
def test_debug_shows_the_traceback(
    fm: Run, options: list[object], failing: Callable[[BaseException], None], error: Exception
) -> None:
    failing(error)
    said = fm("extract", *options, "--debug")
    assert said.code == getattr(error, "exit_code", 1)
    assert "Traceback (most recent call last)" in said.err


def test_a_closed_pipe_is_no_error(place: Path) -> None:
    """`fmextract info … | head -1`: what is wanted was read, the rest is nobody's business."""
    command = [sys.executable, "-m", "fmextract", "info", str(place / "made.h5"), "--json"]
    read, write = os.pipe()
    os.close(read)
    try:
        ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(write)
    assert (ended.returncode, ended.stderr) == (0, "")


# ---------------------------------------------------------------------------------------- the other commands


def test_info(fm: Run, place: Path) -> None:
    said = fm("info", place / "made.h5", "--json")
    with fmextract.open(place / "made.h5") as acts:
        assert said.json == acts.info()
    table = fm("info", place / "made.h5")
    assert table.code == said.code == 0
    assert "2, 1 of them failed" in table.out
    assert "2×3×4×4" in table.out


def test_info_of_an_older_friend(fm: Run, tmp_path: Path) -> None:
    (tmp_path / "notes.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    assert_message(fm("info", tmp_path / "notes.h5"), fm("info", tmp_path / "notes.h5").code, "notes.h5")


def test_pack(fm: Run, options: list[object], tmp_path: Path) -> None:
    options[options.index("-o") + 1] = tmp_path / "shards"
    assert fm("extract", *options, "-l", "conv1", "--shard-size", "8KiB").code == 0
    said = fm("pack", tmp_path / "shards", "-o", tmp_path / "packed.h5", "--json")
    assert (said.code, said.err) == (0, "")
    assert said.json["rows"] == 5
    with fmextract.open(tmp_path / "packed.h5") as one, fmextract.open(tmp_path / "shards") as many:
        np.testing.assert_array_equal(one["conv1"][:], many["conv1"][:])
    assert_message(fm("pack", tmp_path / "shards", "-o", tmp_path / "packed.h5"), 2, "--overwrite")
    assert fm("pack", tmp_path / "shards", "-o", tmp_path / "packed.h5", "--overwrite").code == 0


def test_export(fm: Run, place: Path, tmp_path: Path) -> None:
    table = fm("export", place / "made.h5", "--to", "npy", "-o", tmp_path / "arrays")
    assert table.code == 0
    assert f"2 images in {tmp_path / 'arrays'}" in table.out
    assert "1 image without values: NaN" in table.out
    assert "2×3×4×4" in table.out
    said = fm("export", place / "made.h5", "--to", "rdm", "-o", tmp_path / "rdm.h5")
    assert (said.code, said.out) == (2, "")
    assert "1 of 2 images have values" in said.err
    said = fm("export", place / "made.h5", "--to", "npy", "-o", tmp_path / "arrays")
    assert (said.code, said.out) == (2, "")
    assert "--overwrite replaces it" in said.err
    said = fm("export", place / "made.h5", "--to", "npy", "-o", tmp_path / "arrays", "--overwrite", "--json")
    assert (said.json["path"], said.json["rows"], said.json["failed"]) == (str(tmp_path / "arrays"), 2, 1)
    (layer,) = said.json["layers"]
    assert np.load(tmp_path / "arrays" / layer["place"]).shape == tuple(layer["shape"]) == (2, 3, 4, 4)


def test_layers(fm: Run, place: Path) -> None:
    words = ("layers", f"{place / 'tiny.py'}:model")
    rows = fm(*words, "--json").json
    assert [row["path"] for row in rows][:3] == ["conv1", "bn1", "relu"]
    assert rows[0]["number"] == "conv#0 trunk#0"
    assert rows[0]["shape"] == [4, 16, 16]
    assert rows[1]["overwritten"]
    table = fm(*words)
    assert table.code == 0
    assert "conv#0" in table.out
    chosen = fm(*words, "-l", "type:Linear", "--json")
    assert [row["path"] for row in chosen.json] == ["fc"]
    assert_message(fm(*words, "-l", "nothing"), 2, "nothing")


def test_version(fm: Run) -> None:
    assert fm("--version") == (0, f"fmextract {fmextract.__version__}\n", "")


@pytest.mark.parametrize("words", [["-h"], ["--help"], ["extract", "-h"], ["demo", "--help"]], ids=" ".join)
def test_help(fm: Run, words: list[str]) -> None:
    said = fm(*words)
    assert said.code == 0
    assert said.out.startswith("Usage: fmextract")


# -------------------------------------------------------------------------- streams that are closed or full


ENDINGS = {"closed stdout": ">&-", "closed stderr": "2>&-", "both closed": ">&- 2>&-", "all closed": "<&- >&- 2>&-"}
ENDINGS |= {"full stdout": ">/dev/full", "full stderr": "2>/dev/full", "both full": ">/dev/full 2>/dev/full"}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(("file", "code"), [("made.h5", 0), ("missing.h5", 2)])
def test_the_exit_code_is_that_of_the_work(place: Path, ending: str, file: str, code: int) -> None:
    command = f"exec {shlex.quote(sys.executable)} -m fmextract info {file} --json {ENDINGS[ending]}"
    assert subprocess.run(["sh", "-c", command], cwd=place, check=False, timeout=60).returncode == code


def test_a_run_whose_model_talks_ends_well_though_nobody_can_hear_it(place: Path, tmp_path: Path) -> None:
    """stderr, where what a model prints goes, is full; stdout is closed, and its number is no file's."""
    words = ["extract", "photos", "-m", "tiny.py:talking", "-o", str(tmp_path / "acts.h5"), "-l", "conv1"]
    words += ["--precision", "fp32", "--batch-size", "2", "--device", "cpu"]
    command = f"exec {shlex.join([sys.executable, '-m', 'fmextract', *words])} >&- 2>/dev/full"
    assert subprocess.run(["sh", "-c", command], cwd=place, check=False, timeout=120).returncode == 0
    with fmextract.open(tmp_path / "acts.h5") as acts:
        assert not acts.status.any()
    assert (
        subprocess.run([sys.executable, "-m", "fmextract", "verify", tmp_path / "acts.h5"], check=False).returncode == 0
    )


def test_a_full_stdout_is_said(place: Path) -> None:
    command = f"exec {shlex.quote(sys.executable)} -m fmextract info made.h5 >/dev/full"
    ended = subprocess.run(["sh", "-c", command], cwd=place, check=False, timeout=60, capture_output=True, text=True)
    assert ended.stderr == "the result could not be printed: No space left on device\n"


# ------------------------------------------------------------------------------------------ where it goes


def test_a_refused_run_leaves_no_directories(fm: Run, options: list[object], tmp_path: Path) -> None:
    options[options.index("-o") + 1] = tmp_path / "a" / "b" / "acts.h5"
    assert_message(fm("extract", *options, "-l", "nothing"), 2, "nothing")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["-o", "--out="])
def test_a_quoted_home_means_the_home(
    fm: Run, options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    at = options.index("-o")
    options[at : at + 2] = ["-o", "~/acts.h5"] if form == "-o" else ["--out=~/acts.h5"]
    assert fm("extract", *options, "-l", "conv1").code == 0
    assert fm("info", "~/acts.h5").code == 0
    with fmextract.open("~/acts.h5") as acts:
        assert acts.num_rows == 5


@pytest.mark.parametrize("command", ["extract", "plan"])
def test_an_output_named_like_another_format_is_refused_first(
    fm: Run, options: list[object], command: str, tmp_path: Path
) -> None:
    options[options.index("-o") + 1] = tmp_path / "acts.npy"
    options[options.index("-m") + 1] = "no_such_model"  # which would be found out later
    assert_message(fm(command, *options), 2, "acts.npy", "name.h5", "fmextract export")


def test_a_plan_that_the_disk_cannot_hold_exits_as_the_run_would(
    fm: Run, options: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fmextract.run.estimate.free_space", lambda out: 3000)
    said = fm("plan", *options, "-l", "conv1")
    assert said.code == 4
    assert "conv1" in said.out  # the plan is shown all the same
    assert "has 2.9 KiB free" in said.err
    assert fm("extract", *options, "-l", "conv1").code == 4


def test_one_speed(fm: Run, options: list[object], tmp_path: Path) -> None:
    """What the command prints, what its JSON says and what the file says are one figure."""
    said = fm("extract", *options, "-l", "conv1", "--json")
    assert "images/s" not in said.err
    speed = said.json["images_per_second"]
    with fmextract.open(tmp_path / "acts.h5") as acts:
        assert acts.throughput is not None
        assert acts.throughput["images_per_second"] == speed
    assert f"{text.rate(speed)} images/s" in fm("info", tmp_path / "acts.h5").out


# --------------------------------------------------------------------------------------------- layers


def test_layers_shows_what_a_reducer_stores_and_refuses_an_unknown_one(fm: Run, place: Path) -> None:
    model = f"{place / 'tiny.py'}:model"
    (row,) = fm("layers", model, "-l", "relu=mean", "--json").json
    assert (row["path"], row["shape"], row["bytes"]) == ("relu=mean", [4], 16)
    (row,) = fm("layers", model, "-l", "relu=pool:2", "--json").json
    assert row["shape"] == [4, 2, 2]
    assert_message(fm("layers", model, "-l", "relu=meen"), 2, "unknown reducer 'meen'", "mean")
    assert_message(fm("layers", model, "-l", "relu=cls"), 2, "layer 'relu=cls'", "an axis of tokens")


def test_layers_takes_weights(fm: Run, place: Path, tmp_path: Path) -> None:
    assert fm("layers", "squeezenet1_0", "-w", "random:1", "-l", "features.0", "--size", "32").code == 0
    assert_message(fm("layers", "squeezenet1_0", "-w", "no_such_weights"), 2, "no_such_weights")
    assert_message(fm("layers", "squeezenet1_0", "-w", tmp_path / "missing.pth"), 2, "missing.pth")


def test_inputs_that_come_as_they_are_have_the_size_that_is_said(fm: Run, place: Path, tmp_path: Path) -> None:
    """With --preprocess none nothing but --size says it, to what runs a model on noise."""
    model = ("-m", f"{place / 'tiny.py'}:plain", "-w", "default", "-o", tmp_path / "a.png")
    words = ("show", "filters", *model, "-l", "conv#0", "--preprocess", "none")
    assert_message(fm(*words), 2, "--size")
    assert fm(*words, "--size", "16").code == 0
    assert fm("layers", "squeezenet1_0", "--preprocess", "none", "--size", "64x32").code == 0
    assert_message(fm("layers", "squeezenet1_0", "--preprocess", "none"), 2, "--size")


def test_an_empty_folder_is_called_empty(fm: Run, options: list[object], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    said = fm("extract", tmp_path / "empty", *options[1:])
    assert_message(said, 2, "there are no files at all")
    assert len(said.err) < 200
    (tmp_path / "empty" / "notes.txt").write_text("no picture")
    said = fm("extract", tmp_path / "empty", *options[1:])
    assert_message(said, 2, "but 1 other file (.txt 1)", ".jpg")
    assert len(said.err) < 350


def test_the_reducers_stand_in_the_help(fm: Run) -> None:
    said = " ".join(fm("layers", "--help").out.split())
    for help in REDUCER_HELP.values():
        assert f"={help.usage} keeps" in said


# ---------------------------------------------------------------------------------------- progress and text


class Stream:
    """A stderr that remembers; a terminal or not."""

    def __init__(self, terminal: bool, broken: bool = False) -> None:
        self.said, self.terminal, self.broken = "", terminal, broken
        self.encoding = "utf-8"

    def write(self, said: str) -> int:
        if self.broken:
            raise BrokenPipeError
        self.said += said
        return len(said)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return self.terminal


def go(stream: Any) -> None:
    progress = TerminalProgress(stream)
    progress.note("precision bf16: error 1%\x07")
    progress.start(total=100, done=20)
    progress.advance(40, 0)
    progress.note("half way")
    progress.advance(40, 3)
    progress.finish()
    progress.finish()


def test_progress_in_a_log_is_notes_and_one_last_line() -> None:
    stream = Stream(terminal=False)
    go(stream)
    first, second, last = stream.said.splitlines()
    assert (first, second) == ("precision bf16: error 1%\\x07", "half way")
    assert last.startswith("100 images in ")
    assert "20 of them were there before" in last
    assert last.endswith("3 failed")


def test_progress_in_a_log_says_every_so_often_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds after the start and then every half minute, by a clock that advances 4 s an image."""
    clock = itertools.count(0, 1)
    now = [0.0]
    monkeypatch.setattr("fmextract.common.progress.time.monotonic", lambda: now[0])
    stream = Stream(terminal=False)
    progress = TerminalProgress(stream)
    for done in range(5):
        now[0] += 4
        progress.step("effective receptive fields", done, 5)
    progress.start(total=20, done=0)
    for _ in range(20):
        now[0] += 4
        progress.advance(1, next(clock) // 10)
    progress.finish()
    assert stream.said.splitlines() == [
        "effective receptive fields: 2 of 5",
        "3 of 20 images, 0.25 images/s, 1 min 08 s left",
        "11 of 20 images, 0.25 images/s, 36.0 s left, 1 failed",
        "19 of 20 images, 0.25 images/s, 4.0 s left, 1 failed",
        "20 images in 1 min 20 s, 1 failed",
    ]


def test_a_notebook_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """stderr of a Jupyter kernel is no terminal. What tqdm draws there is tqdm's; that it is asked to is ours."""
    asked: list[dict[str, Any]] = []

    class Bar:
        def __init__(self, **how: Any) -> None:
            asked.append(how)

        def update(self, images: int) -> None:
            asked.append({"images": images})

        def close(self) -> None: ...
        def clear(self) -> None: ...
        def refresh(self) -> None: ...

    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=1)))
    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    stream = Stream(terminal=False)
    monkeypatch.setattr(sys, "stderr", stream)
    progress = TerminalProgress()
    progress.start(total=100, done=20)
    progress.advance(40, 0)
    progress.finish()
    assert asked == [{"total": 100, "initial": 20, "unit": " images", "smoothing": 0}, {"images": 40}]


def test_progress_on_a_terminal_shows_rate_and_end() -> None:
    stream = Stream(terminal=True)
    go(stream)
    assert "images/s" in stream.said
    assert "ends " in stream.said
    assert "\x07" not in stream.said


def test_a_bar_names_no_end_before_there_is_one() -> None:
    stream = Stream(terminal=True)
    progress = TerminalProgress(stream)
    progress.start(total=100, done=20)
    assert "20/100 images" in stream.said
    assert "ends" not in stream.said
    assert "?" not in stream.said


@pytest.mark.parametrize("terminal", [False, True])
def test_a_closed_stderr_does_not_end_a_run(terminal: bool) -> None:
    go(Stream(terminal, broken=True))


def test_keys_cannot_harm_a_terminal() -> None:
    assert text.printable("a\x1b[2J\n\u202eb\udcffü") == "a\\x1b[2J\\n\\u202eb\\udcffü"


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0 B"), (999, "999 B"), (1536, "1.5 KiB"), (250 << 20, "250 MiB"), (5 << 50, "5120 TiB")]
)
def test_byte_count(count: int, shown: str) -> None:
    assert text.byte_count(count) == shown


@pytest.mark.parametrize(
    ("fraction", "shown"), [(None, ""), (0.0, "0"), (0.5, "50.0%"), (0.0123, "1.2%"), (0.000038, "0.0038%")]
)
def test_share(fraction: float | None, shown: str) -> None:
    assert text.share(fraction) == shown


@pytest.mark.parametrize(("seconds", "shown"), [(2.51, "2.5 s"), (65, "1 min 05 s"), (3725, "1 h 02 min")])
def test_duration(seconds: float, shown: str) -> None:
    assert text.duration(seconds) == shown


def test_table_fits_the_terminal_and_keeps_both_ends() -> None:
    rows = [("features.denseblock4.denselayer16.conv2", 32, ""), ("日本語", 1000, "")]
    whole = text.table(("path", "count", "note"), rows, right=("count",)).splitlines()
    assert whole[1] == "features.denseblock4.denselayer16.conv2     32"
    assert "note" not in whole[0]
    cut = text.table(("path", "count", "note"), rows, right=("count",), width=30).splitlines()
    assert cut[1].startswith("features.de")
    assert cut[1].endswith("er16.conv2     32")
    assert len(cut[1]) == 30
