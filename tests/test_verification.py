"""verify finds every byte that changed, says where, and runs images again."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import runs
import torch
from runs import Tiny, extract, make_photos
from torch import nn

from fmextract.cli import app
from fmextract.errors import ConfigError, FormatError, OutputError
from fmextract.reading import activations
from fmextract.run import make_plan, packing, provenance
from fmextract.storage import contents, shards
from fmextract.storage.digest import digest_of_open
from fmextract.verification import verify

ROWS = 14
MODEL = f"{Path(runs.__file__)}:Tiny"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("verify") / "photos", ROWS, {5: b"no image"})


@pytest.fixture(scope="module")
def whole(photos: Path) -> Path:
    extract(photos, photos.parent / "whole", model=MODEL)
    return photos.parent / "whole"


@pytest.fixture(scope="module")
def whole_file(photos: Path, whole: Path) -> Path:
    packing.pack(whole, photos.parent / "whole.h5")
    return photos.parent / "whole.h5"


@pytest.fixture(scope="module")
def small(photos: Path) -> Path:
    """Two shards of two layers: quick to verify a hundred times."""
    extract(photos, photos.parent / "small", layers=["conv", "fc"], limit=6)
    return photos.parent / "small"


def copied(whole: Path, place: Path) -> Path:
    return Path(shutil.copytree(whole, place) if whole.is_dir() else shutil.copy(whole, place))


def flip(file: Path, byte: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[byte] ^= 1 << bit
    file.write_bytes(content)


def chunk_at(file: Path, layer: str, place: tuple[int, ...] = (0, 0, 0, 0)) -> tuple[int, int]:
    """Offset and size of a stored chunk."""
    with activations.open(file) as acts:
        stored = acts.files[0].stored(layer)
        return int(stored.offsets[place]), int(stored.sizes[place])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"keep_bits": 5},
        {"dtype": "float16"},
        {"precision": "bf16"},
        {"codec": "none"},
        {"top_k": 0},
        {"layers": ["conv=mean", "relu=top", "fc", "conv=pool:2"]},
        {"dtype": "float16", "clip": True, "keep_bits": 3},
        {"batch_size": 3},
    ],
)
def test_what_was_written_is_whole(photos: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    for name in ("out", "out.h5"):
        extract(photos, tmp_path / name, **options)
        report = verify(tmp_path / name)
        assert report.problems == ()
        assert report.ok
        assert (report.rows, report.layers) == (ROWS, len(options.get("layers", runs.LAYERS)))
        assert report.bytes > 0
        assert report.chunks >= report.files * report.layers


def test_any_flipped_byte_of_a_directory_is_found(small: Path, tmp_path: Path) -> None:
    dice = random.Random(0)
    out = copied(small, tmp_path / "out")
    files = sorted(out.iterdir())
    for _ in range(80):
        file = dice.choice(files)
        before = file.read_bytes()
        byte = dice.randrange(len(before))
        flip(file, byte, dice.randrange(8))
        if file.suffix == ".json" and json_means_the_same(file, before):
            file.write_bytes(before)
            continue
        report = verify(out)
        assert not report.ok, f"byte {byte} of {file.name}"
        if file.suffix == ".h5":
            assert {Path(problem.file).name for problem in report.problems} == {file.name}
            assert all(problem.rows for problem in report.problems if not problem.layer)
        file.write_bytes(before)
    assert verify(out).ok


def json_means_the_same(file: Path, before: bytes) -> bool:
    """White space outside of a plan, whose digest the index knows."""
    if file.name == "plan.json":
        return False
    try:
        now, then = json.loads(file.read_bytes()), json.loads(before)
    except ValueError:
        return False
    return bool(now == then)


def test_every_flipped_bit_of_a_plan_is_found(small: Path, tmp_path: Path) -> None:
    out = copied(small, tmp_path / "out")
    plan = out / "plan.json"
    before = plan.read_bytes()
    for byte in range(0, len(before), len(before) // 40):
        flip(plan, byte, byte % 8)
        assert "plan.json" in {Path(problem.file).name for problem in verify(out).problems}, f"byte {byte}"
        plan.write_bytes(before)
    assert verify(out).ok


def test_a_flipped_bit_in_the_name_of_a_field_is_found(small: Path, tmp_path: Path) -> None:
    """Also where the field is one that files of before do not have, as the digest itself."""
    out = copied(small, tmp_path / "out")
    for name, fields in {
        "shard-00001.json": ("digest", "sha256", "extra", "chunks"),
        "index.json": ("digest", "plan_sha256", "rows", "shards", "extra"),
        "plan.json": ("digest", "estimate", "pooling"),
    }.items():
        before = (out / name).read_bytes()
        for field in fields:
            at = before.index(f'"{field}"'.encode()) + 1
            for letter in range(0, len(field), 2):
                flip(out / name, at + letter, letter % 8)
                problems = verify(out).problems
                assert name in {Path(problem.file).name for problem in problems}, f"letter {letter} of {field}, {name}"
                (out / name).write_bytes(before)
    assert verify(out).ok


def test_directories_of_before_there_were_digests_still_verify(small: Path, tmp_path: Path) -> None:
    out = copied(small, tmp_path / "out")
    for file in out.glob("*.json"):
        said = json.loads(file.read_text())
        del said["digest"]
        said.pop("plan_sha256", None)
        file.write_text(json.dumps(said))
    assert verify(out).ok


def test_two_runs_differ_in_their_digest_by_what_the_format_says(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/reference/format.md: `created`, `history` and `run_id`, and nothing else."""

    def digests(name: str) -> list[str]:
        extract(photos, tmp_path / name, layers=["conv", "fc"], limit=6)
        return [record.content_digest for record in shards.load_index(tmp_path / name)]

    one, other = digests("one"), digests("other")
    assert set(one).isdisjoint(other)
    now = datetime(2026, 1, 1, tzinfo=timezone.utc)
    monkeypatch.setattr(provenance, "datetime", SimpleNamespace(now=lambda zone: now))
    monkeypatch.setattr(make_plan, "uuid", SimpleNamespace(uuid4=lambda: SimpleNamespace(hex="0" * 32)))
    assert digests("third") == digests("fourth")


def test_a_flipped_byte_of_one_file_is_found_if_anything_depends_on_it(small: Path, tmp_path: Path) -> None:
    dice = random.Random(1)
    out = tmp_path / "out.h5"
    packing.pack(small, out)
    before = out.read_bytes()
    expected = all_that_is_seen(out)
    found = 0
    for _ in range(100):
        byte = dice.randrange(len(before))
        flip(out, byte, dice.randrange(8))
        ok = verify(out).ok
        found += not ok
        if ok:
            assert all_that_is_seen(out) == expected, f"byte {byte}"
        out.write_bytes(before)
    assert found > 30


def all_that_is_seen(path: Path) -> list[Any]:
    with activations.open(path) as acts:
        attrs = {name: value for name, value in acts.attrs.items() if name != "throughput"}  # no digest is of it
        seen: list[Any] = [attrs, acts.keys.tolist(), acts.status.tolist(), acts.messages.tolist()]
        for name in acts.layers:
            layer = acts[name]
            seen += [name, layer.axes, dict(layer.attrs), layer[:].tobytes()]
            seen += [getattr(layer.stats, statistic).tobytes() for statistic in layer.stats.names]
        return [repr(value) for value in seen]


@pytest.mark.parametrize("codec", ["gzip", "none"])
def test_a_changed_chunk_names_file_layer_and_rows(photos: Path, tmp_path: Path, codec: str) -> None:
    out = tmp_path / "out"
    extract(photos, out, codec=codec)
    shard = out / "shard-00002.h5"
    offset, size = chunk_at(shard, "relu", (1, 0, 0, 0))
    flip(shard, offset + size // 2, 5)
    problems = verify(out).problems
    assert {(Path(p.file).name, p.layer) for p in problems} == {("shard-00002.h5", "relu")}
    assert "9-9" in {problem.rows for problem in problems}


def test_a_changed_value_with_a_mended_checksum_is_found_by_the_statistics(
    photos: Path, whole: Path, tmp_path: Path
) -> None:
    """Whoever rewrites values, digests and records all over still has to face what was counted."""
    extract(photos, tmp_path / "out", codec="none")
    shard = tmp_path / "out" / "shard-00000.h5"
    with h5py.File(shard, "r+", locking=False) as file:
        file["layers/conv/activation"][2, 1, 0, 0] = 100.0
    with h5py.File(shard, "r+", locking=False) as file:
        digest = digest_of_open(file, {})
        file.attrs["content_digest"] = digest
    record = json.loads(shard.with_suffix(".json").read_text())
    record |= {
        "sha256": shards.file_sha256(shard),
        "bytes": shard.stat().st_size,
        "content_digest": digest,
        "extra": {},
    }
    shard.with_suffix(".json").write_text(json.dumps(record))
    listed = json.loads((tmp_path / "out" / "index.json").read_text())
    listed["shards"][0] = record
    del listed["digest"]
    (tmp_path / "out" / "index.json").write_text(json.dumps(listed))
    found = {(problem.layer, problem.what.split(":")[0]) for problem in verify(tmp_path / "out").problems}
    assert ("conv", "the values are not those that max was taken of") in found
    assert ("conv", "the values are not those that mean was taken of") in found


def edit_columns(edit: Callable[[h5py.File], None], whole_file: Path, place: Path) -> Path:
    out = copied(whole_file, place)
    with h5py.File(out, "r+", locking=False) as file:
        edit(file)
        file.attrs["content_digest"] = digest_of_open(file, {})
    return out


def set_value(name: str, place: Any, value: Any) -> Callable[[h5py.File], None]:
    def edit(file: h5py.File) -> None:
        file[name][place] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (set_value("status", 3, 1), "do not agree"),
        (set_value("status", 3, 9), "codes that do not exist"),
        (set_value("key", 3, "0002.png"), "two rows have the same key"),
        (set_value("sample", 3, 77), "does not count its rows"),
        (set_value("height", 3, -1), "negative"),
        (set_value("layers/conv/y", 3, 77.0), "coordinate y"),
        (set_value("layers/conv/channel", 3, 77), "coordinate channel"),
        (set_value("layers/conv/stats/count", 3, 77), "count"),
        (set_value("layers/conv/stats/zero_fraction", 3, 0.5), "zero_fraction"),
        (set_value("layers/conv/stats/top_sample", (3, 0), 2), "strongest images"),
        (set_value("layers/conv/activation", (5, 0), 1.0), "a failed row holds values"),
        (set_value("layers/conv/activation", (6, 0, 0, 0), np.nan), "nonfinite"),
    ],
)
def test_what_does_not_go_together_is_found_without_checksums(
    whole_file: Path, tmp_path: Path, edit: Callable[[h5py.File], None], what: str
) -> None:
    out = edit_columns(edit, whole_file, tmp_path / "out.h5")
    assert any(what in problem.what for problem in verify(out).problems), verify(out).problems


def test_a_shard_of_another_run_is_found(photos: Path, whole: Path, tmp_path: Path) -> None:
    out = copied(whole, tmp_path / "out")
    extract(photos, tmp_path / "other", model=Tiny(seed=3))
    for kind in ("h5", "json"):
        shutil.copy(tmp_path / "other" / f"shard-00001.{kind}", out)
    problems = verify(out).problems
    assert any("another run" in problem.what for problem in problems)
    assert any("another record" in problem.what for problem in problems)


def test_verify_needs_something_finished(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such file"):
        verify(tmp_path / "nothing.h5")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="not an fmextract output"):
        verify(tmp_path / "folder")


# ----------------------------------------------------------------------------------------------------------- run again


@pytest.mark.parametrize("name", ["whole", "whole.h5"])
def test_images_run_again_agree(photos: Path, whole: Path, whole_file: Path, name: str) -> None:
    report = verify(photos.parent / name, rerun=6, seed=0, model=MODEL)
    assert report.problems == ()
    assert (report.rerun, report.largest_error) == (6, 0.0)


def test_images_that_were_stored_in_another_place_are_found(photos: Path, tmp_path: Path) -> None:
    """The values of two rows are swapped, in every layer: only the model can tell."""
    extract(photos, tmp_path / "out.h5", model=MODEL, codec="none", top_k=0)
    with h5py.File(tmp_path / "out.h5", "r+", locking=False) as file:
        for layer in file["layers"].values():
            layer["activation"][[2, 3]] = layer["activation"][[2, 3]][::-1]
        file.attrs["content_digest"] = digest_of_open(file, {})
    assert verify(tmp_path / "out.h5").ok
    problems = verify(tmp_path / "out.h5", rerun=ROWS, model=MODEL).problems
    assert {problem.rows for problem in problems} == {"2-2", "3-3"}
    assert {problem.layer for problem in problems} == set(runs.LAYERS)


def test_a_model_given_as_an_object_has_to_be_given_again(photos: Path, tmp_path: Path) -> None:
    extract(photos, tmp_path / "out.h5")
    with pytest.raises(ConfigError, match="model="):
        verify(tmp_path / "out.h5", rerun=2)
    assert verify(tmp_path / "out.h5", rerun=2, model=Tiny()).largest_error == 0.0
    with pytest.raises(ConfigError, match="weights"):
        verify(tmp_path / "out.h5", rerun=2, model=Tiny(seed=1))
    with pytest.raises(ConfigError, match=r"source\.count"):
        verify(tmp_path / "out.h5", rerun=2, model=Tiny(), source=make_photos(tmp_path / "others", 3))


def test_a_layer_whose_path_is_no_selector_is_run_again(photos: Path, tmp_path: Path) -> None:
    class Odd(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("a:b", nn.ReLU())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(self.get_submodule("a:b")(x))

    extract(photos, tmp_path / "out.h5", model=Odd(), layers=["a:b", "fc"])
    assert verify(tmp_path / "out.h5", rerun=2, model=Odd()).largest_error == 0.0


# -------------------------------------------------------------------------------------------------------- command line


def test_the_command_line(whole: Path, whole_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["verify", str(whole_file)]) == 0
    assert "whole" in capsys.readouterr().out
    assert app.main(["verify", str(whole), "--rerun", "2", "-m", MODEL, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["ok"], said["rerun"], said["problems"]) == (True, 2, [])
    out = copied(whole, tmp_path / "out")
    offset, size = chunk_at(out / "shard-00001.h5", "conv")
    flip(out / "shard-00001.h5", offset + size // 2)
    assert app.main(["verify", str(out)]) == 5
    assert "shard-00001.h5, layer conv, rows 4-4" in capsys.readouterr().out
    (out / "shard-00001.h5").unlink()
    assert app.main(["verify", str(out), "--json"]) == 5
    assert json.loads(capsys.readouterr().out)["problems"][0]["rows"] == "4-7"
    assert app.main(["pack", str(out), "-o", str(tmp_path / "packed.h5")]) == 2
    (out / "index.json").unlink()
    assert app.main(["verify", str(out)]) == 2
    capsys.readouterr()
    assert app.main(["pack", str(out), "-o", str(tmp_path / "packed.h5"), "--leave-out", "4-7"]) == 0
    assert app.main(["verify", str(tmp_path / "packed.h5")]) == 0


def test_no_torch() -> None:
    code = "import sys, fmextract.verification, fmextract.run.output; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_file_is_opened_and_walked_for_its_structure_as_often_whatever_its_layers_are(
    small: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening and validating take longer than reading a small layer."""
    done: list[str] = []
    for name in ("open_file", "validate"):
        made = getattr(contents, name)

        def counted(*given: Any, made: Any = made, name: str = name) -> Any:
            done.append(name)
            return made(*given)

        monkeypatch.setattr(contents, name, counted)
    for place in (small, whole):
        done.clear()
        report = verify(place)
        assert report.ok
        assert done.count("validate") == report.files
        assert done.count("open_file") <= 3 * report.files  # not for each layer
