"""Which code is a library's, told by its version, and which is the user's own, wherever either lies."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from fmextract.common.facts import Facts, is_library, source_digest


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that Python imports from; what is imported out of it is forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    forget = is_library.cache_clear, source_digest.cache_clear
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
    for clear in forget:
        clear()


def package(folder: Path, name: str, source: str = "def scaled(x):\n    return x * 2\n") -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(source)


def installed(folder: Path, name: str, *members: str) -> None:
    """What pip leaves beside a package that it installs."""
    about = folder / f"{name}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about / "RECORD").write_text("".join(f"{member},sha256=abc,12\n" for member in members))


def told(module: types.ModuleType) -> tuple[list[str], frozenset[str]]:
    facts = Facts()
    facts.value("the function", module.scaled)
    found = facts.told()
    return sorted(found.facts), found.packages


def test_what_pip_put_into_any_folder_is_a_library_and_what_lies_beside_it_is_not(folder: Path) -> None:
    package(folder, "kept_lib")
    (folder / "kept_file.py").write_text("def scaled(x):\n    return x\n")
    package(folder, "kept_mine")
    installed(folder, "kept", "kept_lib/__init__.py", "kept_file.py", '"kept_data/a,b.txt"')
    import kept_file  # type: ignore[import-not-found]
    import kept_lib  # type: ignore[import-not-found]
    import kept_mine  # type: ignore[import-not-found]

    assert is_library("kept_lib.inner")
    assert is_library("kept_file")
    assert not is_library("kept_mine")
    assert "kept_lib" in told(kept_lib)[1]
    assert "scaled" not in told(kept_lib)[0]
    assert "kept_file" in told(kept_file)[1]
    assert "scaled" in told(kept_mine)[0]


def test_a_link_to_an_installed_package_is_a_library(folder: Path) -> None:
    package(folder / "real" / "site-packages", "linked_lib")
    (folder / "linked_lib").symlink_to(folder / "real" / "site-packages" / "linked_lib")
    import linked_lib  # type: ignore[import-not-found]

    assert linked_lib.__file__ == str(folder / "linked_lib" / "__init__.py")
    assert is_library("linked_lib")


def test_a_package_that_its_user_develops_in_place_is_user_code(folder: Path) -> None:
    """As `pip install -e` leaves it: the distribution lies elsewhere, beside the source is what the build left."""
    package(folder, "own_package")
    (folder / "own_package.egg-info").mkdir()
    (folder / "own_package.egg-info" / "top_level.txt").write_text("own_package\n")
    import own_package  # type: ignore[import-not-found]

    assert not is_library("own_package")
    assert "scaled" in told(own_package)[0]


def test_a_large_library_in_place_is_told_by_its_version_and_its_source(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(folder, "torchaudio")
    (folder / "torchaudio" / "deep").mkdir()
    (folder / "torchaudio" / "deep" / "part.py").write_text("A = 1\n")
    monkeypatch.delitem(sys.modules, "torchaudio", raising=False)
    import torchaudio  # type: ignore[import-not-found]

    assert torchaudio.__file__ == str(folder / "torchaudio" / "__init__.py")
    assert is_library("torchaudio.models")
    assert "scaled" not in told(torchaudio)[0]
    first = source_digest("torchaudio")
    source_digest.cache_clear()
    (folder / "torchaudio" / "deep" / "part.py").write_text("A = 2\n")
    assert first is not None
    assert source_digest("torchaudio") not in (first, None)
    assert source_digest("torch") is None, "installed: its version says enough"


def test_a_library_is_one_before_it_is_imported_as_after(folder: Path) -> None:
    """Else what a run says of itself would depend on what else the process had imported."""
    package(folder, "lazy_lib")
    installed(folder, "lazy", "lazy_lib/__init__.py")

    def function(x: int) -> int:
        import lazy_lib  # type: ignore[import-not-found]

        return int(lazy_lib.scaled(x))

    def facts() -> tuple[dict[str, object], frozenset[str]]:
        asked = Facts()
        asked.value("the function", function)
        found = asked.told()
        return dict(found.facts), found.packages

    before = facts()
    assert function(2) == 4
    is_library.cache_clear()
    assert facts() == before
    assert before[1] == {"lazy_lib"}
