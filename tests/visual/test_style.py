"""Pictures for a screen and for paper: theme, resolution, colour map, format; and what stands in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from looking import LAYERS, small_run, write_photos
from PIL import Image

import fmextract
from fmextract.cli import app
from fmextract.comparison import Comparison, LayerComparison
from fmextract.errors import ConfigError
from fmextract.visual import canvas, depth, differences, maps, top, where

GROUND = {"dark": (0x16, 0x16, 0x1D), "light": (255, 255, 255)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("style")
    small_run(write_photos(folder / "photos", 3), folder / "acts.h5").close()
    return folder


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every figure that is saved."""
    saved: list[Any] = []
    plain = canvas.save

    def saving(made: Any, out: Any) -> Path:
        saved.append(made)
        return plain(made, out)

    monkeypatch.setattr(canvas, "save", saving)
    return saved


def texts(figure: Any) -> list[str]:
    return [one.get_text() for one in figure.findobj(matplotlib.text.Text)]


def commands(place: Path) -> dict[str, list[str]]:
    acts, model = str(place / "acts.h5"), f"{Path(__file__).parents[1] / 'looking.py'}:Tiny"
    return {
        "filters": ["show", "filters", "-m", model, "-l", "conv1", "--preprocess", "size=32,mean=0,std=1"],
        "maps": ["show", "maps", acts, "--image", "1.png"],
        "depth": ["show", "depth", acts],
        "top": ["show", "top", acts, "-l", "conv2", "--channel", "1", "-k", "2"],
        "where": ["show", "where", acts, "--image", "1.png", "-l", "conv2"],
        "compare": ["compare", acts, acts],
    }


@pytest.mark.parametrize("what", ["filters", "maps", "depth", "top", "where", "compare"])
def test_every_picture_for_a_screen_and_for_paper(place: Path, tmp_path: Path, what: str) -> None:
    command = commands(place)[what]
    sizes = {}
    for theme in GROUND:
        assert app.main([*command, "-o", str(tmp_path / f"{theme}.png"), "--theme", theme, "--dpi", "60"]) == 0
        with Image.open(tmp_path / f"{theme}.png") as picture:
            sizes[theme] = picture.size
            assert picture.convert("RGB").getpixel((1, 1)) == GROUND[theme]
    assert app.main([*command, "-o", str(tmp_path / "fine.png"), "--dpi", "120"]) == 0
    with Image.open(tmp_path / "fine.png") as picture:
        assert np.allclose(picture.size, 2 * np.array(sizes["dark"]), atol=2)
    assert app.main([*command, "-o", str(tmp_path / "a.pdf"), "--theme", "light"]) == 0
    pdf = (tmp_path / "a.pdf").read_bytes()
    assert pdf.startswith(b"%PDF-")
    assert b"/FontFile2" in pdf  # letters of a font
    assert app.main([*command, "-o", str(tmp_path / "a.svg"), "--theme", "light"]) == 0
    drawn = ElementTree.parse(tmp_path / "a.svg").getroot()  # ours
    assert drawn.tag.endswith("}svg")
    assert str(place) not in (tmp_path / "a.svg").read_text(encoding="utf-8")


def test_a_colour_map_is_that_of_the_maps(place: Path, tmp_path: Path) -> None:
    with fmextract.open(place / "acts.h5") as acts:
        for name in (None, "viridis"):
            (made,) = maps.show_maps(
                acts, "1.png", tmp_path / str(name), layers=["conv1"], scale="shared", style=canvas.Style(cmap=name)
            )
            with Image.open(made.picture) as picture:
                seen = set(map(tuple, np.asarray(picture.convert("RGB")).reshape(-1, 3).tolist()))
            table = matplotlib.colormaps[name or "magma"](range(256), bytes=True)[:, :3]
            assert len(seen & set(map(tuple, table.tolist()))) > 200
    assert canvas.colour_map() == "magma"  # as before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"theme": "sepia"}, "--theme 'sepia': expected dark or light"),
        ({"dpi": 1}, "--dpi 1"),
        ({"dpi": 10**6}, "--dpi"),
        ({"cmap": "viridi"}, "the closest: viridis"),
        ({"cmap": ""}, "no such colour map"),
    ],
)
def test_what_there_is_not_is_named(place: Path, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        canvas.Style(**options)
    named = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    assert app.main([*commands(place)["maps"], "-o", str(tmp_path / "x.png"), *named]) == 2
    assert not (tmp_path / "x.png").exists()


def test_two_channels_are_told_apart(place: Path, tmp_path: Path, figures: list[Any]) -> None:
    with fmextract.open(place / "acts.h5") as acts:
        top.show_top(acts, "conv2", [5, 3], tmp_path / "two.png", k=2)
        top.show_top(acts, "conv2", [5], tmp_path / "one.png", k=2)
    two, one = (
        [(text.get_text(), text.get_position()[1]) for text in figure.texts if text.get_text().startswith("channel ")]
        for figure in figures
    )
    assert [text for text, _ in two] == ["channel 5", "channel 3"]
    assert two[0][1] > two[1][1]  # each above its own row
    assert one == []


def test_no_path_of_this_machine_is_a_caption(place: Path, tmp_path: Path, figures: list[Any]) -> None:
    photos = [place / "photos" / "1.png", place / "photos" / "2.png"]
    model = f"{Path(__file__).parents[1] / 'looking.py'}:Tiny"
    how: dict[str, Any] = {"preprocess": "size=36,crop=32,mean=0,std=1", "precision": "fp32", "batch_size": 2}
    with fmextract.extract(photos, model, tmp_path / "acts.h5", layers=LAYERS, **how) as acts:
        key = str(acts.keys[0])
        assert key == str(photos[0])
        maps.show_maps(acts, key, tmp_path / "maps")
        maps.show_maps(acts, key, tmp_path / "maps.png")
        where.show_where(acts, key, "conv2", tmp_path / "where.png")
        top.show_top(acts, "conv2", [0], tmp_path / "top.png", k=2)
        depth.show_depth(acts, tmp_path / "depth.png")
    for figure in figures:
        assert not [text for text in texts(figure) if "/" in text]
    assert any("1.png" in text for text in texts(figures[0]))


# ---- the errors of a comparison


def compared(median: np.ndarray, most: np.ndarray) -> Comparison:
    rows = [
        LayerComparison(f"layer{i}", (4, 4), float(m), float(m), float(w), 1.0, 1.0, 0, ())
        for i, (m, w) in enumerate(zip(median, most, strict=True))
    ]
    return Comparison("a.h5", "b.h5", 9, 0, 0, 0, (), (), (), tuple(rows))


@pytest.mark.parametrize(
    ("median", "most"),
    [
        (np.linspace(0.0041, 0.0059, 7), np.linspace(0.0051, 0.0081, 7)),
        (np.full(7, 0.003), np.full(7, 0.003)),
        (np.linspace(0.0002, 0.0009, 7), np.linspace(0.0011, 0.0032, 7)),
        (np.geomspace(1e-8, 1e-2, 7), np.geomspace(2e-8, 2e-2, 7)),
        (np.array([0, 0, 0.001, 0.001, 0.002, 0.002, 0.003]), np.linspace(0, 0.004, 7)),
        (np.array([0, 0, 1e-7, 1e-5, 0.002, 0.002, 0.003]), np.linspace(0, 0.004, 7)),
        (np.zeros(7), np.zeros(7)),
        (np.full(7, np.nan), np.full(7, np.nan)),
    ],
)
def test_the_errors_have_marks_and_fill_their_panel(
    tmp_path: Path, figures: list[Any], median: np.ndarray, most: np.ndarray
) -> None:
    differences.draw_comparison(compared(median, most), tmp_path / "a.png")
    upper = figures[0].axes[0]
    low, high = upper.get_ylim()
    marks = [
        text.get_text()
        for at, text in zip(upper.get_yticks(), upper.get_yticklabels(), strict=True)
        if low <= at <= high
    ]
    assert len([mark for mark in marks if mark]) >= 2, marks
    values = 100 * np.concatenate([median, most])
    above = values[np.isfinite(values) & (values > 0)]
    if above.size and upper.get_yscale() == "log":
        assert low > above.min() / 2  # no empty decade below
    names: Callable[..., Any] = figures[0].axes[1].get_xticklabels
    lowest = min(text.get_window_extent().y0 for text in names())
    assert 0 <= lowest < 0.45 * figures[0].dpi  # nor an empty band under the names
