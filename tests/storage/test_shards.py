"""The set of files of a run: nothing half written, nothing missing unseen, nothing outside the directory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fmextract.errors import DamagedError, FormatError, OutputError
from fmextract.storage import durable, shards

DIGEST = "ab" * 32
PLAN: dict[str, Any] = {"shards": [[0, 8], [8, 16], [16, 19]]}


def record(number: int, rows: range, directory: Path) -> shards.ShardRecord:
    """A finished shard: bytes under the final name, and their record."""
    temporary = directory / f".{number}.tmp"
    temporary.write_bytes(f"shard {number}".encode() * 100)
    final = directory / shards.shard_name(number)
    durable.publish(temporary, final)
    statuses = [0] * (len(rows) - 1) + [2]
    return shards.record_shard(final, rows=rows, statuses=statuses, content_digest=DIGEST, batch_size=8)


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    durable.write_json(tmp_path / shards.PLAN, PLAN)
    for number, (start, stop) in enumerate(PLAN["shards"]):
        record(number, range(start, stop), tmp_path)
    shards.fold_index(tmp_path, PLAN)
    return tmp_path


def test_names_sort_as_numbers_do() -> None:
    assert [shards.shard_name(i) for i in (0, 12, 123456)] == ["shard-00000.h5", "shard-00012.h5", "shard-123456.h5"]


def test_publish_replaces_in_one_step(tmp_path: Path) -> None:
    temporary, final = tmp_path / "t", tmp_path / "f"
    final.write_text("old")
    temporary.write_text("new")
    durable.publish(temporary, final)
    assert final.read_text() == "new"
    assert not temporary.exists()
    with pytest.raises(OutputError, match="cannot write"):
        durable.publish(temporary, final)
    assert final.read_text() == "new"


def test_publish_syncs_the_bytes_before_the_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t").write_text("x")
    names = {(tmp_path / "t").stat().st_ino: "bytes", tmp_path.stat().st_ino: "directory"}
    done: list[str] = []
    monkeypatch.setattr(durable.os, "fsync", lambda fd: done.append(names[os.fstat(fd).st_ino]))
    replace_path = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, to: (done.append("rename"), replace_path(self, to))[1])
    durable.publish(tmp_path / "t", tmp_path / "f")
    assert done == ["bytes", "rename", "directory"]


def test_write_json_keeps_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    durable.write_json(path, {"a": [1, 2]})
    assert json.loads(path.read_text()) == {"a": [1, 2]}

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable.os, "fsync", full)
    with pytest.raises(durable.disk_error(path, OSError(28, "")).__class__, match="full"):
        durable.write_json(path, {"a": []})
    with pytest.raises(TypeError, match="JSON"):
        durable.write_json(path, {"a": {1, 2}})
    assert json.loads(path.read_text()) == {"a": [1, 2]}
    assert list(tmp_path.iterdir()) == [path]


def test_read_json_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="there is no file"):
        durable.read_json(tmp_path / "no.json")
    for text in ("{", "[" * 100_000, b"\xff"):
        (tmp_path / "a.json").write_bytes(text.encode() if isinstance(text, str) else text)
        with pytest.raises(FormatError, match="not valid JSON"):
            durable.read_json(tmp_path / "a.json")


def test_a_record_tells_the_truth_about_its_file(tmp_path: Path) -> None:
    made = record(3, range(24, 30), tmp_path)
    content = (tmp_path / "shard-00003.h5").read_bytes()
    assert (made.name, made.rows, made.bytes) == ("shard-00003.h5", range(24, 30), len(content))
    assert made.sha256 == hashlib.sha256(content).hexdigest()
    assert (made.statuses, made.failed) == ({"0": 5, "2": 1}, 1)
    assert shards.ShardRecord.from_json(json.loads((tmp_path / "shard-00003.json").read_text())) == made


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../shard-00000.h5"},
        {"name": "a/shard-00000.h5"},
        {"name": "/etc/passwd"},
        {"name": "shard-00000.h5/.."},
        {"name": "shard-00000.h5\n"},
        {"name": 7},
        {"start": -1},
        {"stop": 0},
        {"stop": 9},
        {"start": "0"},
        {"start": 0.0},
        {"batch_size": True},
        {"bytes": None},
        {"statuses": {"0": 7}},
        {"statuses": {"0": -8, "1": 16}},
        {"statuses": 8},
        {"sha256": "AB" * 32},
        {"sha256": "ab"},
        {"content_digest": None},
        {"extra": 3},
    ],
    ids=str,
)
def test_records_that_are_not_valid_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    good = record(0, range(8), tmp_path).to_json()
    assert shards.ShardRecord.from_json({**good, "of a later version": 1}).to_json() == good
    with pytest.raises(FormatError):
        shards.ShardRecord.from_json({**good, **change})
    for missing in change:
        with pytest.raises(FormatError):
            shards.ShardRecord.from_json({name: value for name, value in good.items() if name != missing})


def test_a_finished_run_loads(finished: Path) -> None:
    records = shards.load_index(finished)
    assert [each.rows for each in records] == [range(8), range(8, 16), range(16, 19)]


def test_order_comes_from_the_rows(finished: Path) -> None:
    path = finished / shards.INDEX
    stored = json.loads(path.read_text())
    stored["shards"].reverse()
    path.write_text(json.dumps(stored))
    assert [each.start for each in shards.load_index(finished)] == [0, 8, 16]


def test_an_unfinished_run_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="not an fmextract output"):
        shards.load_index(tmp_path)
    durable.write_json(tmp_path / shards.PLAN, PLAN)
    record(0, range(8), tmp_path)
    record(2, range(16, 19), tmp_path)
    for call in (lambda: shards.load_index(tmp_path), lambda: shards.fold_index(tmp_path, PLAN)):
        with pytest.raises(OutputError, match=r"missing shard-00001\.h5 \(rows 8 to 15\).*resumes"):
            call()
    assert not (tmp_path / shards.INDEX).exists()
    record(1, range(8, 16), tmp_path)
    with pytest.raises(OutputError, match=r"index\.json is missing"):
        shards.load_index(tmp_path)
    shards.fold_index(tmp_path, PLAN)
    assert len(shards.load_index(tmp_path)) == 3


def test_a_shard_counts_as_done_only_with_its_whole_file(tmp_path: Path) -> None:
    record(0, range(8), tmp_path)
    assert [each.name for each in shards.load_records(tmp_path)] == ["shard-00000.h5"]
    with (tmp_path / "shard-00000.h5").open("ab") as file:
        file.write(b"x")
    assert shards.load_records(tmp_path) == []
    (tmp_path / "shard-00000.h5").unlink()
    assert shards.load_records(tmp_path) == []


def test_a_record_under_another_name_counts_for_nothing(tmp_path: Path) -> None:
    record(0, range(8), tmp_path)
    shutil.copy(tmp_path / "shard-00000.json", tmp_path / "shard-00001.json")
    told: list[str] = []
    assert [each.name for each in shards.load_records(tmp_path, told.append)] == ["shard-00000.h5"]
    assert "shard-00001.json is damaged: it is the record of shard-00000.h5" in told[0]


def test_no_flipped_bit_of_a_record_is_missed(tmp_path: Path) -> None:
    record(0, range(8), tmp_path)
    path = tmp_path / "shard-00000.json"
    whole, (right,) = path.read_bytes(), shards.load_records(tmp_path)
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        told: list[str] = []
        assert shards.load_records(tmp_path, told.append) == [right] or told, f"byte {at}"
    assert told


def test_a_record_of_an_earlier_version_has_no_digest(tmp_path: Path) -> None:
    record(0, range(8), tmp_path)
    path = tmp_path / "shard-00000.json"
    said = json.loads(path.read_text())
    assert len(said.pop("digest")) == 64
    path.write_text(json.dumps(said))
    assert len(shards.load_records(tmp_path)) == 1


def test_a_missing_file_names_its_rows(finished: Path) -> None:
    (finished / "shard-00001.h5").unlink()
    with pytest.raises(FormatError, match=r"shard-00001\.h5 is missing, with it the rows 8 to 15"):
        shards.load_index(finished)


def test_a_file_of_another_size_is_damage(finished: Path) -> None:
    (finished / "shard-00002.h5").write_bytes(b"short")
    with pytest.raises(DamagedError, match=r"shard-00002\.h5 \(rows 16 to 18\) has 5 bytes, expected 700"):
        shards.load_index(finished)


def test_rows_of_the_index_must_be_whole(finished: Path) -> None:
    path = finished / shards.INDEX
    whole = json.loads(path.read_text())
    middle = shards.ShardRecord.from_json(whole["shards"][1])
    twice = replace(middle, start=7, statuses={"0": 9}).to_json()
    for entries, message in (
        (whole["shards"][::2], r"rows 8 to 15, before shard-00002\.h5, are missing"),
        (whole["shards"][1:], r"rows 0 to 7, before shard-00001\.h5, are missing"),
        (whole["shards"][:2], "expected 19 rows, the shards have 16"),
        ([whole["shards"][0], twice, whole["shards"][2]], r"rows 7 to 7, before shard-00001\.h5, are there twice"),
    ):
        path.write_text(json.dumps({**whole, "shards": entries}))
        with pytest.raises(FormatError, match=message):
            shards.load_index(finished)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "was not written by fmextract"),
        ({"format_version": 2}, "version 2.*up to 1.*upgrade"),
        ({"format_version": None}, "is damaged"),
        ({"rows": "19"}, "is damaged"),
        ({"shards": {}}, "is damaged"),
        ({"shards": [3]}, "shard 0 is damaged: expected a JSON object"),
    ],
)
def test_a_damaged_index_is_refused(finished: Path, change: dict[str, Any], message: str) -> None:
    path = finished / shards.INDEX
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(FormatError, match=message):
        shards.load_index(finished)


def test_a_plan_without_shards_is_refused(tmp_path: Path) -> None:
    for plan in ({}, {"shards": 3}, {"shards": [[1]]}):
        with pytest.raises(FormatError, match="lists no shards"):
            shards.fold_index(tmp_path, plan)


def test_a_run_without_rows(tmp_path: Path) -> None:
    assert shards.fold_index(tmp_path, {"shards": []}) == []
    assert shards.load_index(tmp_path) == []
