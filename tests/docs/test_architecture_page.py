"""Pages about the code name what is there: rooms, modules, what they define, and files."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest
from test_architecture import MODULES, ROOMS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/explanation/architecture.md"
TABLE = re.findall(r"^\| `(\w+)/?` \|[^|]*\|(.*)\|$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
PAGES = [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs/explanation").glob("*.md"))]


def test_the_rooms_stand_in_the_order_of_imports() -> None:
    assert [room for room, _ in TABLE] == [room for room in ROOMS if not room.startswith("__")]


def test_every_module_stands_in_its_room_and_nothing_else() -> None:
    for room, files in TABLE:
        inside = {name.rpartition(".")[2] for name in MODULES if name.startswith(f"{room}.")}
        assert set(re.findall(r"`(\w+)`", files)) == inside, f"the row of {room} on {PAGE.name}"


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
