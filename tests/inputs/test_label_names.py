"""What an ImageFolder calls its classes is kept, and nobody's classes are mistaken for those of other labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
from torchvision import datasets

import fmextract as fm


class Kept:
    """A Dataset of a user's with `targets` and `classes`."""

    def __init__(self, targets: Any, classes: Any) -> None:
        self.targets, self.classes = targets, classes

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, row: int) -> Any:
        return np.full((8, 8, 3), row, np.uint8), self.targets[row]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("names") / "photos"
    root.mkdir()
    for name in ("a cat", "döner", "zebra"):
        runs.make_photos(root / name, 2)
    return root


def names_of(data: Any, out: Path, **options: Any) -> tuple[Any, Any]:
    runs.extract(data, out, **options)
    with fm.open(out) as acts:
        return acts.label_names, acts.listed()


@pytest.mark.parametrize("out", ["a.h5", "shards"])
def test_names_of_an_image_folder(folder: Path, tmp_path: Path, out: str) -> None:
    data = datasets.ImageFolder(folder)
    names = ("a cat", "döner", "zebra")
    options = {"shard_size": "1KiB"}
    assert names_of(data, tmp_path / out, **options) == (names, [0, 0, 1, 1, 2, 2])
    subset = torch.utils.data.Subset(data, [5, 0])
    assert names_of(subset, tmp_path / f"subset{out}") == (names, [2, 0])
    both: Any = torch.utils.data.ConcatDataset([subset, torch.utils.data.Subset(data, [1])])
    assert names_of(both, tmp_path / f"both{out}")[0] == names


def test_names_that_do_not_fit_are_not_stored(folder: Path, tmp_path: Path) -> None:
    changed = datasets.ImageFolder(folder, target_transform=lambda label: label % 2)
    both = datasets.ImageFolder(folder)
    both.transforms = lambda image, label: (image, label // 2)
    cases = {
        "target_transform": changed,
        "transforms": both,
        "too few": Kept([0, 1, 2], ["a", "b"]),
        "twice": Kept([0, 1], ["a", "a"]),
        "negative": Kept([-1, 1], ["a", "b"]),
        "floats": Kept([0.5, 1.0], ["a", "b"]),
        "no texts": Kept([0, 1], [3, 4]),
        "too long": Kept([0, 1], [f"{n:0300d}" for n in range(300)]),
    }
    for number, (case, data) in enumerate(cases.items()):
        assert names_of(data, tmp_path / f"{number}.h5")[0] == (), case
    assert names_of(Kept([0, 1], ["a", "b"]), tmp_path / "fit.h5")[0] == ("a", "b")
    assert names_of(Kept([0, 1], ["a", "b"]), tmp_path / "given.h5", label=[1, 0])[0] == ()
