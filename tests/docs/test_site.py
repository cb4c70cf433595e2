"""The site: it builds without a warning, every page is in its menu, and every public name is on the page of the API."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fmextract
from fmextract import errors

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [str(path.relative_to(DOCS)) for path in sorted(DOCS.rglob("*.md"))]
MENU = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.MULTILINE)
API = (DOCS / "reference/api.md").read_text(encoding="utf-8")


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    """Build the site out of a copy of the pages in `folder`."""
    (folder / "fmextract").symlink_to(ROOT / "fmextract")
    shutil.copy(ROOT / "mkdocs.yml", folder)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, "NO_COLOR": "1"}, capture_output=True, text=True, check=False
    )


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    shutil.copytree(DOCS, tmp_path / "docs")
    ended = build(tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for page in PAGES:
        assert (tmp_path / "site" / page).with_suffix(".html").is_file()
    api = (tmp_path / "site/reference/api.html").read_text(encoding="utf-8")
    for name in public():
        assert f'id="fmextract.{name}"' in api, name
    assert "fonts.googleapis" not in api


@pytest.mark.parametrize("text", ["[a](nowhere.md)", "[a](start.md#nowhere)"])
def test_a_link_that_leads_nowhere_stops_the_build(tmp_path: Path, text: str) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text(f"# A page\n\n{text}\n", encoding="utf-8")
    (tmp_path / "docs/start.md").write_text("# Start\n", encoding="utf-8")
    ended = build(tmp_path)
    assert ended.returncode != 0
    assert "1 issue found" in ended.stdout + ended.stderr


def test_every_page_is_in_the_menu_once() -> None:
    assert sorted(MENU) == PAGES


def public() -> list[str]:
    """The public names, errors as they stand on the page: under `fmextract.errors`."""
    names = [name for name in fmextract.__all__ if not name.startswith("__")]
    return [f"errors.{name}" if inspect.isclass(vars(errors).get(name)) else name for name in names]


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    named = re.findall(r"^::: fmextract\.(\S+)$", API, flags=re.MULTILINE)
    assert sorted(named) == sorted([*(name for name in public() if "." not in name), "errors", "testing"])


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_pages_outside_the_site_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (ROOT / target).exists(), target
