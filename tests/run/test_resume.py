"""A run that was ended goes on where it was; what differs is refused by name; nothing partial passes for the whole."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
from runs import Notes, Tiny, extract, extract_until, make_photos, same
from torch import nn

from fmextract import planning, verification
from fmextract.errors import FormatError, OutputError, RunStopped
from fmextract.reading import activations
from fmextract.run import output, packing
from fmextract.storage import lock, shards
from fmextract.storage.shards import load_index, load_records

ROWS = 18
SHARDS = 5


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("resume") / "photos", ROWS)


@pytest.fixture(scope="module")
def whole(photos: Path) -> Path:
    """The undisturbed run, as a directory."""
    out = photos.parent / "whole"
    extract(photos, out)
    return out


@pytest.fixture(scope="module")
def whole_file(photos: Path) -> Path:
    out = photos.parent / "whole.h5"
    extract(photos, out)
    return out


# -------------------------------------------------------------------------------------------------------------- shards


def test_a_directory_holds_what_the_format_says(whole: Path) -> None:
    names = sorted(path.name for path in whole.iterdir())
    shards = [f"shard-{i:05}.{kind}" for i in range(SHARDS) for kind in ("h5", "json")]
    assert names == ["index.json", "plan.json", *shards]
    plan = json.loads((whole / "plan.json").read_text())
    assert plan["shards"] == [[0, 4], [4, 8], [8, 12], [12, 16], [16, 18]]
    with activations.open(whole) as acts:
        assert acts.keys.tolist() == [f"{row:04}.png" for row in range(ROWS)]


def test_one_file_equals_the_directory_and_leaves_nothing_beside_it(whole: Path, whole_file: Path) -> None:
    assert not whole_file.with_name("whole.h5.partial").exists()
    with activations.open(whole) as parts, activations.open(whole_file) as one:
        for name in parts.layers:
            np.testing.assert_array_equal(parts[name][:], one[name][:])
            for statistic in one[name].stats.names:
                np.testing.assert_array_equal(
                    getattr(parts[name].stats, statistic), getattr(one[name].stats, statistic)
                )


def test_statistics_of_shards_merge_to_those_of_all_rows(whole: Path) -> None:
    with activations.open(whole) as acts:
        values = np.moveaxis(acts["relu"][:].astype(np.float64), 1, 0).reshape(4, -1)
        stats = acts["relu"].stats
        np.testing.assert_array_equal(stats.count, values.shape[1])
        np.testing.assert_allclose(stats.mean, values.mean(1), rtol=1e-12)
        np.testing.assert_allclose(stats.std, values.std(1), rtol=1e-12)
        np.testing.assert_array_equal(stats.max, values.max(1))
        np.testing.assert_array_equal(stats.zero_fraction, (values == 0).mean(1))
        best = acts["relu"][:].max((2, 3)).argmax(0)
        np.testing.assert_array_equal(stats.top_sample[:, 0], best)
        assert [top.row for top in acts["relu"].top(2, k=1)] == [best[2]]


def test_pack_copies_chunks_as_they_are(whole: Path, whole_file: Path, tmp_path: Path) -> None:
    packing.pack(whole, tmp_path / "packed.h5")
    same(tmp_path / "packed.h5", whole_file)
    assert [path.name for path in tmp_path.iterdir()] == ["packed.h5"]
    with pytest.raises(OutputError, match="exists"):
        packing.pack(whole, tmp_path / "packed.h5")
    packing.pack(whole, tmp_path / "packed.h5", overwrite=True)


def test_an_incomplete_run_is_an_error_everywhere(photos: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    extract_until(9, photos, out)
    there = [record.name for record in load_records(out)]
    assert there
    for read in (activations.open, verification.verify, lambda path: packing.pack(path, tmp_path / "packed.h5")):
        with pytest.raises((FormatError, OutputError), match=r"finished|in progress"):
            read(out)
    missing = [range(4 * len(there), ROWS)]
    with pytest.raises(OutputError, match=f"missing are {missing[0].start}-17"):
        packing.pack(out, tmp_path / "packed.h5", leave_out=[range(ROWS - 2, ROWS)])
    packing.pack(out, tmp_path / "packed.h5", leave_out=missing)
    with activations.open(tmp_path / "packed.h5") as packed, activations.open(whole) as acts:
        left = missing[0].start
        assert packed.attrs["left_out"] == f"{left}-17"
        assert packed.status.tolist() == [0] * left + [1] * (ROWS - left)
        assert np.isnan(packed["conv"][left:]).all()
        np.testing.assert_array_equal(packed["fc"][:left], acts["fc"][:left])
        assert "left out" in packed.messages[-1]
    assert verification.verify(tmp_path / "packed.h5").ok


def test_a_missing_shard_is_an_error_everywhere_and_is_made_again(photos: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    extract(photos, out)
    (out / "shard-00002.h5").unlink()
    with pytest.raises(FormatError, match=r"shard-00002\.h5 is missing, with it the rows 8 to 11"):
        activations.open(out)
    with pytest.raises(FormatError, match=r"shard-00002\.h5"):
        packing.pack(out, tmp_path / "packed.h5")
    (problem,) = verification.verify(out).problems
    assert (Path(problem.file).name, problem.rows) == ("shard-00002.h5", "8-11")
    assert extract(photos, out).resumed_images == ROWS - 4
    same(out, whole)


# -------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("rows", [1, 8, 17])
@pytest.mark.parametrize("name", ["out", "out.h5"])
def test_a_resumed_run_equals_an_undisturbed_one(
    photos: Path, whole: Path, whole_file: Path, tmp_path: Path, name: str, rows: int
) -> None:
    out = tmp_path / name
    extract_until(rows, photos, out)
    with pytest.raises(FormatError, match="in progress"):
        activations.open(out)
    result = extract(photos, out)
    assert result.images == ROWS
    assert result.resumed_images == {1: 0, 8: 4, 17: 16}[rows]
    same(out, whole_file if out.suffix else whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]
    assert not [path for path in out.parent.rglob("*") if path.name.startswith(".") or path.name == lock.NAME]


def test_a_resume_measures_nothing_again(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    extract_until(9, photos, out, precision="auto")
    plan = (out / "plan.json").read_bytes()

    def measured(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("fmextract.run.extract.plan_for", measured)
    extract(photos, out, precision="auto")
    assert (out / "plan.json").read_bytes() == plan


def test_a_finished_run_is_left_alone(photos: Path, tmp_path: Path) -> None:
    for name in ("out", "out.h5"):
        extract(photos, tmp_path / name)
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        notes = Notes()
        result = extract(photos, tmp_path / name, notes=notes)
        assert "is complete already" in notes
        assert (result.images, result.resumed_images) == (ROWS, ROWS)
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


class Other(nn.Module):
    """The layers of Tiny, with the same weights and another forward pass."""

    def __init__(self) -> None:
        super().__init__()
        tiny = Tiny()
        self.conv, self.relu, self.fc = tiny.conv, tiny.relu, tiny.fc

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.fc(self.relu(self.conv(1.01 * x)).mean((2, 3)))
        return made


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("name", ["out", "out.h5"])
def test_what_changed_is_refused_by_name(photos: Path, tmp_path: Path, name: str, finished: bool) -> None:
    out = tmp_path / name
    if finished:
        extract(photos, out)
    else:
        extract_until(9, photos, out)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    changes: list[tuple[dict[str, Any], str]] = [
        ({"model": Tiny(seed=1)}, "weights: other than it was"),
        ({"model": Other()}, "model: 'Tiny' there, 'Other' now"),
        ({"layers": ["conv", "fc"]}, r"layers: \['conv', 'relu', 'fc'\] there, \['conv', 'fc'\] now"),
        ({"preprocess": "size=8,crop=8,mean=0,std=1"}, r"preprocess.mean: \[0.5, 0.5, 0.5\] there"),
        ({"precision": "bf16"}, "precision: 'fp32' there, 'bf16' now"),
        ({"keep_bits": 7}, "keep_bits: not set there, 7 now"),
        ({"dtype": "float16"}, "dtype: 'float32' there, 'float16' now"),
        ({"codec": "none"}, "codec: 'gzip' there, 'none' now"),
        ({"limit": ROWS - 1}, f"source.count: {ROWS} there, {ROWS - 1} now"),
    ]
    for change, message in changes:
        with pytest.raises(OutputError, match=message):
            extract(photos, out, **change)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


class Louder(Tiny):
    """The same code, weights and settings; what it does depends on something that nobody can see from outside."""

    def __init__(self, volume: Path) -> None:
        super().__init__()
        self.volume = volume

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * float(self.volume.read_text()))


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("name", ["out", "out.h5"])
def test_what_no_identity_sees_is_noticed_by_running_stored_rows_again(
    photos: Path, tmp_path: Path, name: str, finished: bool
) -> None:
    out, volume = tmp_path / name, tmp_path / "volume.txt"
    volume.write_text("1.0")
    if finished:
        extract(photos, out, model=Louder(volume))
    else:
        extract_until(9, photos, out, model=Louder(volume))
    volume.write_text("1.01")
    with pytest.raises(OutputError, match=r"cannot be made again: layer '.*' of '00\d\d.png' \(row \d+\) differs by"):
        extract(photos, out, model=Louder(volume))
    volume.write_text(str(1.0 + 1e-6))
    notes = Notes()
    extract(photos, out, model=Louder(volume), notes=notes)
    assert "as rounding explains" in notes


def test_whoever_knows_need_not_run_stored_rows_again(photos: Path, tmp_path: Path) -> None:
    volume = tmp_path / "volume.txt"
    volume.write_text("1.0")
    extract(photos, tmp_path / "out.h5", model=Louder(volume))
    volume.write_text("2.0")
    notes = Notes()
    extract(photos, tmp_path / "out.h5", model=Louder(volume), recheck=False, notes=notes)
    assert "is complete already" in notes


def test_a_changed_image_of_the_same_size_is_noticed(tmp_path: Path) -> None:
    images = [np.full((8, 8, 3), row, np.uint8) for row in range(ROWS)]
    extract_until(9, images, tmp_path / "out")
    changed = [*images[:-1], images[-1] + 1]
    with pytest.raises(OutputError, match=r"source: row 17: other than it was"):
        extract(changed, tmp_path / "out")
    extract([image.copy() for image in images], tmp_path / "out")


def test_a_shard_that_changed_is_made_again(photos: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    extract_until(17, photos, out)
    shard = out / "shard-00001.h5"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    notes = Notes()
    extract(photos, out, notes=notes)
    assert "shard-00001.h5 has changed since it was written" in notes
    same(out, whole)


@pytest.mark.parametrize("name", ["out", "out.h5"])
@pytest.mark.parametrize("what", ["not JSON", "a flipped bit", "unreadable"])
def test_a_damaged_record_costs_its_own_shard_alone(
    photos: Path, whole: Path, whole_file: Path, tmp_path: Path, name: str, what: str
) -> None:
    out = tmp_path / name
    extract_until(17, photos, out)
    record = (out if name == "out" else tmp_path / "out.h5.partial") / "shard-00001.json"
    if what == "unreadable":
        record.unlink()
        record.mkdir()
    else:
        said = record.read_text()
        record.write_text(said[:40] if what == "not JSON" else said.replace('"batch_size": 4', '"batch_size": 5'))
    with pytest.raises(OutputError, match="was begun otherwise"):
        extract(photos, out, model=Tiny(seed=1))
    if what == "unreadable":
        record.rmdir()
        record.write_bytes(b"\xff")
    notes = Notes()
    assert extract(photos, out, notes=notes).resumed_images == 12
    assert any("shard-00001.json" in note and "are extracted again" in note for note in notes.notes)
    same(out, whole_file if name == "out.h5" else whole)


def test_rows_whose_records_are_all_damaged_are_not_thrown_away(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    extract_until(9, photos, out)
    for record in out.glob("shard-*.json"):
        record.write_text("{")
    before = sorted(path.name for path in out.iterdir())
    with pytest.raises(OutputError, match="was begun otherwise"):
        extract(photos, out, model=Tiny(seed=1))
    assert sorted(path.name for path in out.iterdir()) == before


@pytest.mark.parametrize("name", ["out", "out.h5"])
def test_a_flipped_bit_in_the_plan_of_an_unfinished_run_is_seen(
    photos: Path, whole: Path, whole_file: Path, tmp_path: Path, name: str
) -> None:
    out = tmp_path / name
    extract_until(9, photos, out)
    directory = out if name == "out" else tmp_path / "out.h5.partial"
    path = directory / "plan.json"
    content, right = path.read_bytes(), planning.Plan.load(path)
    for at in range(0, len(content), 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        with contextlib.suppress(FormatError):
            assert planning.Plan.load(path) == right, f"byte {at}"
    path.write_bytes(content.replace(b'"batch_size": 4', b'"batch_size": 8', 1))
    with pytest.raises(
        FormatError, match=r"plan\.json is damaged.*its digest.*--overwrite begins anew, -o names another"
    ):
        extract(photos, out)
    mine = directory / "notes.txt"
    mine.write_text("mine")
    extract(photos, out, overwrite=True)
    assert mine.read_text() == "mine"
    mine.unlink()
    same(out, whole_file if name == "out.h5" else whole)


def test_a_file_that_is_called_plan_and_is_not_ours_is_left(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"my": "plan"}')
    with pytest.raises(FormatError, match=r"remove .* yourself"):
        extract(photos, tmp_path, overwrite=True)
    assert (tmp_path / "plan.json").read_text() == '{"my": "plan"}'


class Hungry(Tiny):
    """Has no memory for more than two images at once, once it is told so."""

    most = 99

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError("too much")
        return super().forward(x)


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_the_one_shard_of_a_file_needs_no_checksum(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """It is renamed as soon as it is there; one that a crash left before that is known by its content."""
    out = tmp_path / "out.h5"
    options = {"shard_size": "1GiB", "worker_kind": kind}
    with monkeypatch.context() as patch:
        patch.setattr(shards, "file_sha256", lambda path: pytest.fail("nobody would read it"))
        patch.setattr(output.Output, "fold", lambda self, made: sys.exit("killed"))
        with pytest.raises(SystemExit):
            extract(photos, out, **options)
    directory = out.with_name("out.h5.partial")
    (record,) = load_records(directory)
    assert record.sha256 == ""
    shard = directory / record.name
    content = shard.read_bytes()

    shard.write_bytes(content[:-1000] + bytes(1000))
    notes = Notes()
    with monkeypatch.context() as patch:
        patch.setattr(output.Output, "fold", lambda self, made: sys.exit("killed"))
        with pytest.raises(SystemExit):
            extract(photos, out, notes=notes, **options)
    assert f"{record.name} has changed since it was written" in notes

    content, notes = shard.read_bytes(), Notes()
    extract(photos, out, notes=notes, **options)
    assert "1 of 1 shards are there" in notes
    assert out.read_bytes() == content
    extract(photos, tmp_path / "undisturbed.h5", **options)
    same(out, tmp_path / "undisturbed.h5")
    assert verification.verify(out).ok


def test_smaller_batches_are_recorded_and_equal_within_rounding(photos: Path, tmp_path: Path) -> None:
    model = Hungry()
    extract(photos, tmp_path / "roomy", model=model)
    model = Hungry()
    notes = Notes(lambda done: setattr(model, "most", 2) if done >= 6 else None)
    result = extract(photos, tmp_path / "tight", model=model, notes=notes)
    assert result.batch_size == 2
    records = load_index(tmp_path / "tight")
    assert [record.batch_size for record in records] == [4, 4, 2, 2, 2]
    with activations.open(tmp_path / "tight") as tight, activations.open(tmp_path / "roomy") as roomy:
        for name in tight.layers:
            np.testing.assert_allclose(tight[name][:], roomy[name][:], rtol=1e-5, atol=1e-6)
    packing.pack(tmp_path / "tight", tmp_path / "packed.h5")
    with activations.open(tmp_path / "packed.h5") as packed:
        assert json.loads(packed.attrs["smaller_batches"]) == {"8-11": 2, "12-15": 2, "16-17": 2}
    assert verification.verify(tmp_path / "packed.h5").ok


def test_the_callers_model_comes_back_as_it_was(photos: Path, tmp_path: Path) -> None:
    model = Tiny().train()
    extract_until(5, photos, tmp_path / "out", model=model)
    extract(photos, tmp_path / "out", model=model)
    assert all(module.training and not module._forward_hooks for module in model.modules())


# ----------------------------------------------------------------------------------------------------------- overwrite


def test_overwrite_removes_what_the_plan_lists_and_nothing_else(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    extract(photos, out)
    (out / "notes.txt").write_text("mine")
    (out / "shard-00099.h5").write_text("mine too")
    extract(photos, out, overwrite=True, limit=5)
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "shard-00099.h5").read_text() == "mine too"
    with activations.open(out) as acts:
        assert acts.num_rows == 5
    assert not (out / "shard-00002.h5").exists()


def test_an_old_file_stays_until_the_new_one_is_there(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    extract(photos, out)
    old = out.read_bytes()
    extract_until(9, photos, out, overwrite=True, keep_bits=5)
    assert out.read_bytes() == old
    # Begun with --overwrite: the same command goes on.
    assert extract(photos, out, overwrite=True, keep_bits=5).resumed_images > 0
    assert out.read_bytes() != old
    assert not out.with_name("out.h5.partial").exists()


def test_overwrite_starts_a_run_anew_that_was_begun_without(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    extract_until(9, photos, out)
    assert extract(photos, out, overwrite=True).resumed_images == 0


@pytest.mark.parametrize("what", ["text.h5", "empty.h5", "folder.h5", "folder", "file"])
def test_what_is_not_ours_is_refused(photos: Path, tmp_path: Path, what: str) -> None:
    target = tmp_path / what
    if what.startswith("folder"):
        target.mkdir()
        (target / "thesis.tex").write_text("years of work")
    else:
        target.write_text("" if what == "empty.h5" else "something else")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"directory|no output of fmextract|did not write|is a file"):
            extract(photos, target, overwrite=overwrite)
    assert sorted(path.name for path in tmp_path.iterdir()) == [what]


def test_a_failed_start_leaves_nothing(photos: Path, tmp_path: Path) -> None:
    for name in ("out", "out.h5"):
        with pytest.raises(Exception, match="nope"):
            extract(photos, tmp_path / name, layers=["nope"])
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------- lock


def write_lock(directory: Path, **fields: Any) -> None:
    directory.mkdir(exist_ok=True)
    owner = {"pid": 1, "host": socket.gethostname(), "started": "", "run_id": "", "since": "today"} | fields
    (directory / lock.NAME).write_text(json.dumps(owner))


def test_two_runs_at_once(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    refused: list[str] = []

    def second(done: int) -> None:
        with pytest.raises(OutputError) as caught:
            extract(photos, out, break_lock=True)  # a living process keeps its lock
        refused.append(str(caught.value))

    extract(photos, out, notes=Notes(second))
    assert all(f"process {os.getpid()} on {socket.gethostname()}" in message for message in refused)
    assert len(refused) == SHARDS
    assert activations.open(out).num_rows == ROWS


def test_a_lock_of_a_dead_process_is_taken_over(photos: Path, tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    write_lock(tmp_path / "out", pid=gone.pid, started="12345")
    notes = Notes()
    extract(photos, tmp_path / "out", notes=notes)
    assert f"from process {gone.pid}" in notes


def test_a_number_used_again_is_another_process(photos: Path, tmp_path: Path) -> None:
    if not Path("/proc/self/stat").exists():
        pytest.skip("only Linux tells when a process began")
    write_lock(tmp_path / "out", pid=os.getpid(), started="1")
    extract(photos, tmp_path / "out")


def test_a_lock_of_another_host_needs_to_be_broken(photos: Path, tmp_path: Path) -> None:
    write_lock(tmp_path / "out", host="elsewhere", pid=77)
    with pytest.raises(OutputError, match=r"process 77 on elsewhere.*--break-lock"):
        extract(photos, tmp_path / "out")
    extract(photos, tmp_path / "out", break_lock=True)


def test_processes_of_one_launch_share_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(lock.RUN_ID, "launch-1")
    first, second, third = (lock.Lock(tmp_path) for _ in range(3))
    assert first.acquire(break_lock=False) is None
    assert second.acquire(break_lock=False) is None
    monkeypatch.setenv(lock.RUN_ID, "launch-2")
    with pytest.raises(OutputError, match="in use"):
        third.acquire(break_lock=False)
    second.release()
    assert (tmp_path / lock.NAME).exists()
    first.release()
    assert not (tmp_path / lock.NAME).exists()


def test_a_lock_that_says_nothing_is_respected(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / lock.NAME).write_text("{")
    with pytest.raises(OutputError, match="unknown host"):
        extract(photos, tmp_path / "out")


def test_stopping_for_any_reason_is_resumable(photos: Path, whole: Path, tmp_path: Path) -> None:
    """Each stop of a run that is meant to be resumed is a RunStopped, exit code 4."""
    assert RunStopped.exit_code == 4
    runs.extract_until(3, photos, tmp_path / "out")
    extract(photos, tmp_path / "out")
    same(tmp_path / "out", whole)
