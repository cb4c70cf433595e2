"""What stands in pictures and pages: the numbers of a layer, nothing over anything else, no folder of this machine."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import matplotlib.text
import pytest
import torch
from looking import PREPROCESS, write_photos
from torch import nn

import fmextract
from fmextract import benchmark, comparison
from fmextract.cli import app
from fmextract.common.folders import common_folder, local_name, without_folders
from fmextract.errors import ConfigError, OutputError
from fmextract.visual import canvas, maps, stages, top, where
from fmextract.visual.depth import show_depth
from fmextract.visual.filters import show_filters
from fmextract.visual.report.report import write_report


class Block(nn.Module):
    """A block with a shortcut of its own: `after` is the convolution 3 of all, 2 of the trunk."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.fit = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 6, 1)
        self.side = nn.Sequential(nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5))
        self.after = nn.Conv2d(5, 6, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.fit(x) + self.after(self.side(x))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captions")
    write_photos(folder / "photos", 3)
    how: dict[str, Any] = {"preprocess": PREPROCESS, "precision": "fp32", "batch_size": 3, "layers": ["type:Conv2d"]}
    fmextract.extract(str(folder / "photos"), Block(), folder / "acts.h5", **how).close()
    return folder


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every figure that is saved."""
    saved: list[Any] = []
    plain = canvas.save
    monkeypatch.setattr(canvas, "save", lambda made, out: (saved.append(made), plain(made, out))[1])
    return saved


def words(figure: Any) -> list[str]:
    return [one.get_text() for one in figure.findobj(matplotlib.text.Text)]


def test_every_picture_names_both_numbers(place: Path, tmp_path: Path, figures: list[Any]) -> None:
    with fmextract.open(place / "acts.h5") as acts:
        assert acts["after"].numbers == ("conv#3", "trunk#2")
        assert acts["fit"].numbers == ("conv#1",)
        top.show_top(acts, "after", [1, 2], tmp_path / "top.png", k=2)
        where.show_where(acts, "1.png", "after", tmp_path / "where.png")
        maps.show_maps(acts, "1.png", tmp_path / "maps", layers=["after"])
        show_depth(acts, tmp_path / "depth.png")
    model = Block().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for layer in ("after", "trunk#2"):
        show_filters(model, layer, tmp_path / "filters.png", preprocess=PREPROCESS)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "norms as they were"
    for figure in figures:
        assert any("conv#3" in text and "trunk#2" in text for text in words(figure)), words(figure)
    (depth,) = (figure for figure in figures if any(text.startswith("Zeros") for text in words(figure)))
    assert "fit\nconv#1" in words(depth)


def test_kernels_of_what_does_not_run_are_shown(tmp_path: Path, figures: list[Any]) -> None:
    class Broken(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("not this way")

    made = show_filters(Broken(), "after", tmp_path / "filters.png", preprocess=PREPROCESS)
    assert made.layer == "after"
    assert not any("conv#" in text for text in words(figures[0]))


def test_the_page_names_the_numbers(place: Path, tmp_path: Path) -> None:
    write_report(place / "acts.h5", tmp_path / "a.html")
    assert [layer["numbers"] for layer in page(tmp_path / "a.html")["layers"]] == [
        ["conv#0", "trunk#0"], ["conv#1"], ["conv#2", "trunk#1"], ["conv#3", "trunk#2"],
    ]  # fmt: skip


@pytest.mark.parametrize("letters", [5, 40, 400])
@pytest.mark.parametrize("detail", ["", "conv#52  ·  trunk#48  ·  a key of some length.png"])
def test_a_title_and_what_stands_beside_it_do_not_meet(letters: int, detail: str) -> None:
    made = canvas.figure(6.5, 3)
    canvas.heading(made, "x$_" * (letters // 3), detail)
    boxes = [text.get_window_extent() for text in made.texts if text.get_text()]
    assert all(0 <= box.x0 < box.x1 <= 6.5 * made.dpi for box in boxes)
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_captions_of_all_layers_in_one_picture_do_not_meet(tmp_path: Path, figures: list[Any]) -> None:
    class Long(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers_of_many_letters_0123456789 = Block()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers_of_many_letters_0123456789(x)

    write_photos(tmp_path / "photos", 2)
    how: dict[str, Any] = {"preprocess": PREPROCESS, "precision": "fp32", "batch_size": 2, "layers": ["type:Conv2d"]}
    with fmextract.extract(str(tmp_path / "photos"), Long(), tmp_path / "acts.h5", **how) as acts:
        maps.show_maps(acts, "1.png", tmp_path / "all.png")
    renderer = figures[0].canvas.get_renderer()  # that of the file has another resolution than the figure now
    for panel in figures[0].subfigs:
        said = [(text.get_text(), text.get_window_extent(renderer)) for text in panel.texts if text.get_text()]
        met = [(one, other) for one, other in itertools.combinations(said, 2) if one[1].overlaps(other[1])]
        assert not met


# ---- no folder of this machine in what is sent on


def page(path: Path) -> Any:
    block = path.read_text(encoding="utf-8").partition('<script id="data" type="application/json">')[2]
    return json.loads(block.partition("</script")[0])


def test_a_page_says_no_folder_of_this_machine(tmp_path: Path) -> None:
    home = tmp_path / "home of <b>somebody"
    photos = [write_photos(home / "cats", 2) / "1.png", write_photos(home / "dogs", 2) / "1.png"]
    (home / "broken.png").write_bytes(b"no picture")
    (home / "model.py").write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_captions import Block\n"
    )
    how: dict[str, Any] = {"preprocess": PREPROCESS, "precision": "fp32", "batch_size": 2, "max_failures": 1}
    model = f"{home / 'model.py'}:Block"
    fmextract.extract([*photos, home / "broken.png"], model, tmp_path / "acts.h5", layers=["stem"], **how).close()
    photos[1].unlink()
    made = write_report(tmp_path / "acts.h5", tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "somebody" not in text
    assert str(tmp_path) not in text
    said = page(tmp_path / "a.html")
    assert set(said["keys"].values()) == {"cats/1.png", "dogs/1.png"}, "which still differ"
    assert said["failures"][0]["key"] == "broken.png"
    assert said["run"]["model"] == "model.py:Block"
    assert any("missing" in sentence for sentence in said["left_out"])
    assert any(str(photos[1]) in sentence for sentence in made.left_out), "who makes it is told where"
    fmextract.extract(str(home / "cats"), Block(), tmp_path / "folder.h5", layers=["stem"], **how).close()
    write_report(tmp_path / "folder.h5", tmp_path / "b.html")
    assert dict(page(tmp_path / "b.html")["run"]["facts"])["source"] == "cats"
    assert "somebody" not in (tmp_path / "b.html").read_text(encoding="utf-8")


def test_names_without_folders() -> None:
    assert local_name("/data/me/photos/") == "photos"
    assert local_name("/data/me/data.py:make") == "data.py:make"
    assert local_name(r"C:\Users\me\photos") == "photos"
    assert local_name("photos/cats") == "photos/cats"
    assert local_name("package.module:Data") == "package.module:Data"
    said = without_folders(
        "no '/data/me/a b/1.png' in /data/me/a b: see /srv/x.h5, https://host/a/b and/or 3/4", ["/data/me/a b"]
    )
    assert said == "no '1.png' in a b: see x.h5, https://host/a/b and/or 3/4"
    assert without_folders(r"cannot open C:\Users\me\x.png", ["/", ""]) == "cannot open x.png"
    assert common_folder(["/a/b-c/1", "/a/b/1", "/a/bd/1", "relative"]) == "/a/"
    assert common_folder(["/a/1.png"]) == "/a/"
    assert common_folder(["1.png"]) == common_folder([]) == ""


# ---- formats


@pytest.mark.parametrize(
    ("kind", "magic"), [("pdf", b"%PDF-"), ("svg", b"<?xml"), ("png", b"\x89PNG"), (None, b"\x89PNG")]
)
def test_a_folder_of_pictures_in_any_format(place: Path, tmp_path: Path, kind: str | None, magic: bytes) -> None:
    command = ["show", "maps", str(place / "acts.h5"), "--image", "1.png", "-l", "stem", "-l", "after", "-o"]
    assert app.main([*command, str(tmp_path / "maps"), *(["--format", kind] if kind else [])]) == 0
    made = sorted((tmp_path / "maps").iterdir())
    assert [one.name for one in made] == [f"00_stem.{kind or 'png'}", f"01_after.{kind or 'png'}"]
    assert all(one.read_bytes().startswith(magic) for one in made)


def test_formats_that_there_are_not(place: Path, tmp_path: Path) -> None:
    with fmextract.open(place / "acts.h5") as acts:
        with pytest.raises(ConfigError, match="unknown format 'gif': expected png, pdf, svg"):
            maps.show_maps(acts, "1.png", tmp_path / "maps", format="gif")
        with pytest.raises(ConfigError, match="--format svg is for a folder"):
            maps.show_maps(acts, "1.png", tmp_path / "all.pdf", format="svg")
        maps.show_maps(acts, "1.png", tmp_path / "all.pdf", layers=["stem"], format="pdf")
    assert (tmp_path / "all.pdf").is_file()
    assert not (tmp_path / "maps").exists()


def test_a_benchmark_is_drawn_in_a_style_that_is_checked_before_it_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:

    measured: list[Any] = []
    drawn: list[Any] = []

    class Found:
        def as_json(self) -> dict[str, Any]:
            return {}

    monkeypatch.setattr(benchmark, "bench", lambda *args, **how: (measured.append(args), Found())[1])
    monkeypatch.setattr(stages, "draw_stages", lambda found, out, *, style: drawn.append((out, style)))
    command = ["bench", "-m", "resnet18", "--json", "--plot"]
    assert app.main([*command, str(tmp_path / "a.gif")]) == OutputError.exit_code
    assert app.main([*command, str(tmp_path / "a.pdf"), "--theme", "sepia"]) == ConfigError.exit_code
    assert "--theme 'sepia'" in capsys.readouterr().err
    assert measured == []
    assert app.main([*command, str(tmp_path / "a.pdf"), "--theme", "light", "--dpi", "70"]) == 0
    assert drawn == [(tmp_path / "a.pdf", canvas.Style("light", 70))]


def test_a_comparison_is_refused_before_it_is_made(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setattr(comparison, "compare", lambda *args, **how: pytest.fail("compared for nothing"))
    acts = str(place / "acts.h5")
    assert app.main(["compare", acts, acts, "-o", str(tmp_path / "a.gif")]) == OutputError.exit_code
