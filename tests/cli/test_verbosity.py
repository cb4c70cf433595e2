"""`-q` and `-v`: what stands on stderr, while the result on stdout is the same."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import runs

from fmextract.cli import main
from fmextract.cli.verbosity import progress, verbosity

log = logging.getLogger("fmextract")


def words(tmp_path: Path) -> list[str]:
    photos = runs.make_photos(tmp_path / "photos", 5, {2: b"no picture"})
    fixed = ["--preprocess", "size=8,crop=8,mean=0.5,std=0.5", "--precision", "fp32", "--batch-size", "4"]
    model = f"{Path(runs.__file__)}:Tiny"
    return ["extract", str(photos), "-m", model, "-l", "conv", "-o", str(tmp_path / "out.h5"), *fixed, "--device=cpu"]


@pytest.mark.parametrize("flag", ["-q", "--quiet"])
def test_quiet_leaves_progress_and_notes_out_but_not_failures(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], flag: str
) -> None:
    assert main([*words(tmp_path), flag]) == 3
    said = capfd.readouterr()
    assert "5 images" in said.out
    assert said.err.startswith("1 image failed")
    assert "images in" not in said.err


def test_an_error_is_said_all_the_same(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tmp_path / "missing.h5"), "-q"]) == 2
    assert capfd.readouterr().err.startswith("error: ")


def test_verbose_shows_the_log_with_the_time(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*words(tmp_path), "-v"]) == 3
    said = capfd.readouterr().err
    assert re.search(r"^\d\d:\d\d:\d\d INFO 5 images in ", said, re.M)
    assert said.count("5 images in ") == 1
    assert log.handlers == [handler for handler in log.handlers if isinstance(handler, logging.NullHandler)]


@pytest.mark.parametrize(("verbose", "shown"), [(0, []), (1, ["info"]), (2, ["info", "debug"])])
def test_once_is_info_and_twice_debug(capfd: pytest.CaptureFixture[str], verbose: int, shown: list[str]) -> None:
    with verbosity(quiet=False, verbose=verbose):
        log.info("info")
        logging.getLogger("fmextract.of.a.part").debug("debug")
    assert [line.split()[-1] for line in capfd.readouterr().err.splitlines()] == shown


def test_a_record_cannot_harm_a_terminal_and_a_closed_stderr_no_run() -> None:
    with verbosity(quiet=False, verbose=1):
        told = progress()
        told.note("a note")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(told, "_stream", _Closed())
            log.info("nobody hears it")


class _Closed:
    def write(self, said: str) -> int:
        raise BrokenPipeError

    def flush(self) -> None: ...


def test_both_at_once_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tmp_path), "-q", "-v"]) == 2
    assert "-q and -v" in capfd.readouterr().err
