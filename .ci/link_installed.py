"""Link the named distributions of this Python, and all that they need, into a folder: for the path of an environment of
the same Python that is to see these and no others. Links, so that pip never removes what is here.

    python link_installed.py FOLDER NAME... [--without CONSTRAINTS]
"""

from __future__ import annotations

import argparse
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def needed(names: list[str], left_out: set[str]) -> list[Distribution]:
    """Return the named distributions and the installed ones that they need, but those left out."""
    found: dict[str, Distribution] = {}
    asked = {canonicalize_name(name) for name in names}
    waiting = sorted(asked)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found or name in left_out:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:  # pip does not install what no import needs on this platform
            if name in asked:
                raise
            continue
        wanted = map(Requirement, found[name].requires or ())
        waiting += [one.name for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    return list(found.values())


def main() -> None:
    """Make the links."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--without", type=Path)
    asked = parser.parse_args()
    pins = asked.without.read_text(encoding="utf-8").split() if asked.without else []
    left_out = {str(canonicalize_name(pin.partition("==")[0])) for pin in pins}
    asked.folder.mkdir(parents=True, exist_ok=True)
    for one in needed(asked.names, left_out - {str(canonicalize_name(name)) for name in asked.names}):
        for top in {path.parts[0] for path in one.files or ()} - {"..", "__pycache__"}:
            link = asked.folder / top
            if not link.is_symlink():
                link.symlink_to(Path(str(one.locate_file(top))).resolve())


if __name__ == "__main__":
    main()
