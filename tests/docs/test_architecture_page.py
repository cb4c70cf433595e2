"""The page of the architecture names what is there: every room in the order of imports, every module in its room."""

from __future__ import annotations

import re
from pathlib import Path

from test_architecture import MODULES, ROOMS

PAGE = Path(__file__).parents[2] / "docs/explanation/architecture.md"
TABLE = re.findall(r"^\| `(\w+)/?` \|[^|]*\|(.*)\|$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_the_rooms_stand_in_the_order_of_imports() -> None:
    assert [room for room, _ in TABLE] == [room for room in ROOMS if not room.startswith("__")]


def test_every_module_stands_in_its_room_and_nothing_else() -> None:
    for room, files in TABLE:
        inside = {name.rpartition(".")[2] for name in MODULES if name.startswith(f"{room}.")}
        assert set(re.findall(r"`(\w+)`", files)) == inside, f"the row of {room} on {PAGE.name}"
