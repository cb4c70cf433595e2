"""Pages about the code name what is there: rooms, modules, what they define, files, and calls against the imports."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from PIL import Image
from test_architecture import MODULES, ROOMS, room

import fmextract

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/explanation/architecture.md"
TABLE = re.findall(r"^\| `(\w+)/?` \|[^|]*\|(.*)\|$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
PAGES = [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs/explanation").glob("*.md"))]


def test_the_rooms_stand_in_the_order_of_imports() -> None:
    assert [room for room, _ in TABLE] == [room for room in ROOMS if not room.startswith("__")]


def test_every_module_stands_in_its_room_and_nothing_else() -> None:
    for name, files in TABLE:
        inside = {module.rpartition(".")[2] for module in MODULES if module.startswith(f"{name}.")}
        assert set(re.findall(r"`(\w+)`", files)) == inside, f"the row of {name} on {PAGE.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_and_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"\b(?:\w+/)+\w+\.(?:py|c)\b", text):
        assert any((folder / path).is_file() for folder in (ROOT, ROOT / "fmextract")), path
    for word in re.findall(r"`(\w+(?:\.\w+)+)`", text):
        parts = word.split(".")
        if parts[0] not in ROOMS:
            continue
        module = max((i for i in range(1, len(parts) + 1) if ".".join(parts[:i]) in MODULES), default=0)
        assert module, word
        found = import_module(f"fmextract.{'.'.join(parts[:module])}")
        for part in parts[module:]:
            assert hasattr(found, part), word
            found = getattr(found, part)


def test_the_climbs_are_those_on_the_page(tmp_path: Path) -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3, bias=False)
    )
    for i in range(6):
        Image.effect_noise((16, 16), 64).convert("RGB").save(tmp_path / f"{i}.png")
    with traced() as climbs:
        asked: Any = {
            "layers": ["conv#0", "type:ReLU", "3=mean"],
            "preprocess": "size=16,mean=0,std=1",
            "batch_size": 4,
        }
        acts = fmextract.extract(tmp_path, model, tmp_path / "acts.h5", **asked)
        assert acts["0"][[1, 4], 2:].shape == (2, 2, 14, 14)
        assert acts.select("trunk#0") == ("0",)
        acts.close()
    listed = re.findall(r"^\| `([\w.]+)` \| `([\w.]+)` \|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert climbs == set(listed)


@contextmanager
def traced() -> Iterator[set[tuple[str, str]]]:
    """The calls (module, module) into rooms that stand after the caller's, but those that torch makes."""
    climbs: set[tuple[str, str]] = set()

    def see(frame: FrameType, event: str, _: object) -> None:
        callee, back = module_of(frame), frame.f_back
        if event != "call" or not callee or frame.f_code.co_name == "__torch_dispatch__":
            return
        while back is not None and not module_of(back):
            back = back.f_back
        if back is not None and ROOMS.index(room(module_of(back))) < ROOMS.index(room(callee)):
            climbs.add((module_of(back), callee))

    threading.setprofile(see)
    sys.setprofile(see)
    try:
        yield climbs
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def module_of(frame: FrameType) -> str:
    """`capture.hooks` of code of the package, "" of any other."""
    name = str(frame.f_globals.get("__name__", ""))
    return name.removeprefix("fmextract.") if name.startswith("fmextract.") else ""
