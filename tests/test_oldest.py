"""The oldest libraries that scripts/oldest tests on are those that pyproject.toml allows."""

from __future__ import annotations

import sys
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent


def lower_bounds() -> list[str]:
    """Return NAME==VERSION for each lower bound of what a user installs: all but our own tools."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [extra for name, extra in project["optional-dependencies"].items() if name not in ("dev", "docs")]
    found = set()
    for wanted in map(Requirement, sum(extras, project["dependencies"])):
        if wanted.name != "fmextract":
            (bound,) = wanted.specifier
            assert bound.operator in (">=", "=="), f"{wanted} has no lower bound"
            found.add(f"{wanted.name}=={bound.version}")
    return sorted(found)


def test_the_constraints_are_the_lower_bounds_of_pyproject() -> None:
    lines = (ROOT / ".ci" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    assert lines == lower_bounds()
