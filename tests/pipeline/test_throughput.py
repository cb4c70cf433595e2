"""How fast a run was stands in its output, and is no part of what two runs are compared by."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import pytest
import torch
from runs import extract, extract_until, make_photos

from fmextract.cli import app
from fmextract.pipeline import threads
from fmextract.reading import activations
from fmextract.visual.report.report import write_report


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("throughput") / "photos", 10)


@pytest.mark.parametrize("name", ["acts.h5", "acts"])
def test_the_shards_of_a_run_add_up(photos: Path, tmp_path: Path, name: str) -> None:
    result = extract(photos, tmp_path / name)
    with activations.open(tmp_path / name) as acts:
        said = acts.throughput
        assert said is not None
        assert said["images"] == 10
        assert 0 < said["seconds"] <= result.seconds
        assert said["images_per_second"] == pytest.approx(10 / said["seconds"], rel=0.01)
        assert {"decode", "forward", "encode", "write"} <= set(said["busy_seconds"])
        for stage, spent in said["busy_seconds"].items():
            assert 0 <= spent <= result.stages[stage]["busy_seconds"] + 0.01


def test_a_resumed_run_counts_all_of_it(photos: Path, tmp_path: Path) -> None:
    extract_until(8, photos, tmp_path / "acts.h5")
    extract(photos, tmp_path / "acts.h5")
    with activations.open(tmp_path / "acts.h5") as acts:
        assert acts.throughput is not None
        assert acts.throughput["images"] == 10


def test_it_is_shown_and_is_no_content(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "acts.h5"
    extract(photos, out, shard_size=None)
    with h5py.File(out, "r+") as file:
        assert json.loads(file.attrs["throughput"])["images"] == 10
        file.attrs["throughput"] = json.dumps({"images": 10, "seconds": 4.0, "busy_seconds": {"forward": 3.0}})
    assert app.main(["verify", str(out)]) == 0
    capsys.readouterr()
    assert app.main(["info", str(out)]) == 0
    assert "2.5 images/s, 10 images in 4.0 s" in capsys.readouterr().out.replace("2.50", "2.5")
    page = tmp_path / "report.html"
    write_report(out, page, images=photos)
    assert "2.5 images/s: 10 images in 4.0 s; busiest, over all threads: forward 3.0 s" in page.read_text()


@pytest.mark.parametrize(
    "said", ["", "[]", "{", '{"images": "many"}', '{"images": 0, "seconds": 0, "busy_seconds": {}}']
)
def test_nonsense_is_as_nothing(photos: Path, tmp_path: Path, said: str) -> None:
    out = tmp_path / "acts.h5"
    extract(photos, out, shard_size=None)
    with h5py.File(out, "r+") as file:
        file.attrs["throughput"] = said
    with activations.open(out) as acts:
        assert acts.throughput is None
        assert acts.info()["throughput"] is None


def test_operations_on_a_pool_start_no_teams_of_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    pool = threads.thread_pool("test", 2)
    try:
        numbers = [pool.submit(_in_an_operation).result() for _ in range(4)]
        assert numbers == [1] * 4
        assert torch.get_num_threads() == 2
    finally:
        pool.close(1.0)
        torch.set_num_threads(before)


def _in_an_operation() -> int:
    """As it is once torch has set the thread up, which its first parallel operation does."""
    torch.ones(1 << 20).add_(1)
    return torch.get_num_threads()
