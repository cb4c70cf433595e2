"""What a process leaves behind that was killed is known as its own, and removed by the next run of the same command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from files import make_file, make_shards

from fmextract.common import processes
from fmextract.exporting import export
from fmextract.run import packing
from fmextract.storage import durable, shards

KILLED = """
import os, signal, sys
from pathlib import Path
from fmextract.exporting import export
from fmextract.run import packing
from fmextract.storage import durable
durable.publish = lambda temporary, final: os.kill(os.getpid(), signal.SIGKILL)
source, target, to = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
packing.pack(source, target) if to == "pack" else export.export(source, to=to, out=target)
"""


def test_a_mark_tells_a_living_process_from_a_dead_one() -> None:
    mine = processes.mark()
    assert durable.is_temporary(f".x.{mine}")
    assert mine != processes.mark()
    assert not processes.is_dead(mine)
    code = "from fmextract.common.processes import mark; print(mark())"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert processes.is_dead(ended.stdout.strip())
    # The same number, begun at another time; another machine, of which nobody here knows.
    if processes.started(os.getpid()):
        assert processes.is_dead(mine[:14] + "000000000001" + mine[26:])
    assert not processes.is_dead("0" * 32)


@pytest.mark.parametrize(
    ("to", "name"), [("pack", "acts.h5"), ("npy", "acts-npy"), ("safetensors", "acts.safetensors")]
)
def test_what_a_killed_command_left_is_removed_by_the_next(to: str, name: str, tmp_path: Path) -> None:
    arrays = {"layer": np.arange(48, dtype=np.float32).reshape(8, 6)}
    source = tmp_path / "source"
    make_shards(source, arrays, [4])
    target = tmp_path / name

    def run() -> None:
        packing.pack(source, target) if to == "pack" else export.export(source, to=to, out=target)

    ended = subprocess.run([sys.executable, "-c", KILLED, source, target, to], check=False, capture_output=True)
    assert ended.returncode < 0, ended.stderr
    (left,) = tmp_path.glob(".*")
    living = left.with_name(f".{name}.{processes.mark()}")
    stranger = left.with_name(f".{name}.{'0' * 32}")
    for other in (living, stranger):
        other.write_text("not mine to remove")
    run()
    assert not left.exists()
    assert living.exists()
    assert stranger.exists()
    assert target.exists()


def test_an_earlier_export_that_was_set_aside_is_no_rubbish_until_the_next_is_there(tmp_path: Path) -> None:
    arrays = {"layer": np.arange(24, dtype=np.float32).reshape(4, 6)}
    make_file(tmp_path / "acts.h5", arrays)
    code = "from fmextract.common.processes import mark; print(mark())"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    aside = tmp_path / f".out.{ended.stdout.strip()}"
    aside.mkdir()
    (aside / "earlier.npy").write_bytes(b"all there is")
    shards.remove_dead(tmp_path / "out", directories=(tmp_path / "out").exists())
    assert aside.exists()
    export.export(tmp_path / "acts.h5", to="npy", out=tmp_path / "out")
    assert not aside.exists()
