"""Pictures of what is awkward: values that are not finite, layers that are dead, one image, very many channels."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import matplotlib.text
import numpy as np
import pytest
import torch
from looking import small_run, write_photos
from matplotlib.font_manager import fontManager
from PIL import Image
from torch import nn

import fmextract
from fmextract import comparison
from fmextract.cli import app
from fmextract.errors import ConfigError, OutputError
from fmextract.visual import canvas, depth, differences, maps, where
from fmextract.visual.report.report import write_report
from fmextract.visual.top import show_top


class Odd(nn.Module):
    """`holes`: channel 1 is NaN throughout, channel 2 in part; `dead`: zero; `wide`: 150 channels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.holes, self.dead = nn.Conv2d(3, 4, 3, stride=4), nn.Identity(), nn.ReLU()
        self.wide = nn.Conv2d(4, 150, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        bad = x.clone()
        bad[:, 1] = math.nan
        bad[:, 2] = (bad[:, 2] + 0.2).log()
        self.dead(-x.abs() - 1)
        self.holes(bad)
        return self.wide(x)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    photos = write_photos(folder / "photos", 3)
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(photos / "猫と犬.png")
    (photos / "broken.png").write_bytes(b"no picture")
    layers = ["conv", "holes", "dead", "wide"]
    small_run(photos, folder / "acts.h5", Odd(), layers=layers, max_failures="50%").close()
    for name in ("one.h5", "other.h5"):
        small_run(photos, folder / name, Odd(), layers=layers, limit=1).close()
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


def test_a_channel_without_finite_values_is_no_peak(place: Path, tmp_path: Path, figures: list[Any]) -> None:
    with fmextract.open(place / "acts.h5") as acts:
        assert not np.isfinite(acts["holes"][acts.row("1.png")][1]).any()
        found = where.show_where(acts, "1.png", "holes", tmp_path / "where.png")
        with pytest.raises(ConfigError, match="no image has a finite value in holes, channel 1"):
            show_top(acts, "holes", [1], tmp_path / "top.png")
    assert sorted(peak.channel for peak in found.peaks) == [0, 2, 3]
    assert all(math.isfinite(peak.strength) for peak in found.peaks)
    assert "inf" not in " ".join(words(figures[0]))


def test_values_that_are_not_finite_are_counted_in_the_picture(place: Path, tmp_path: Path, figures: list[Any]) -> None:
    with fmextract.open(place / "acts.h5") as acts:
        maps.show_maps(acts, "1.png", tmp_path / "maps", layers=["holes", "conv"])
        bad = int((~np.isfinite(acts["holes"][acts.row("1.png")])).sum())
    told = [[text for text in words(figure) if "not finite" in text] for figure in figures]
    assert sorted(told) == [[], [f"{bad} values not finite, left blank"]]


def test_a_layer_that_is_the_same_everywhere_has_no_peak_of_all_channels(
    place: Path, tmp_path: Path, figures: list[Any]
) -> None:
    with fmextract.open(place / "acts.h5") as acts:
        where.show_where(acts, "1.png", "dead", tmp_path / "where.png")
        where.show_where(acts, "1.png", "conv", tmp_path / "where.png")
    assert "sum of all channels: the same everywhere" in words(figures[0])
    assert "sum of all channels, and its peak" in words(figures[1])


def test_numbers_of_peaks_of_one_cell_stay_within_the_photo(place: Path, tmp_path: Path, figures: list[Any]) -> None:
    with fmextract.open(place / "acts.h5") as acts:
        found = where.show_where(acts, "1.png", "wide", tmp_path / "where.png", k=9)
    assert len({peak.cell for peak in found.peaks}) < len(found.peaks)  # some share one
    left = figures[0].axes[0]
    top, bottom = sorted(left.get_ylim())
    places = [text.get_position() for text in left.texts if text.get_text()]
    assert len(set(places)) == 9
    assert all(top <= y < bottom - 1 for _, y in places)


def test_one_image_has_no_dimension_and_no_cka_and_that_is_said(
    place: Path, tmp_path: Path, figures: list[Any]
) -> None:
    with fmextract.open(place / "one.h5") as one, fmextract.open(place / "other.h5") as other:
        depth.show_depth(one, tmp_path / "depth.png")
        differences.draw_comparison(comparison.compare(one, other, ["conv"]), tmp_path / "same.png")
    assert "none: it takes several images that differ" in words(figures[0])
    assert "linear CKA: of one image there is none" in [
        text.get_text() for axis in figures[1].axes if axis.get_legend() for text in axis.get_legend().get_texts()
    ]


@pytest.mark.parametrize(("many", "named"), [(16, True), (150, False)])
def test_a_number_never_covers_its_map(place: Path, tmp_path: Path, figures: list[Any], many: int, named: bool) -> None:
    with fmextract.open(place / "acts.h5") as acts:
        maps.show_maps(acts, "1.png", tmp_path / "maps.png", layers=["conv", "wide"], count=many)
    held = {text for text in words(figures[0]) if text.isdecimal()}
    assert (len(held) >= many) is named


def test_letters_that_a_font_has_not_are_no_warning_and_come_from_another(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fmextract.open(place / "acts.h5") as acts, warnings.catch_warnings():
        warnings.simplefilter("error")
        maps.show_maps(acts, "猫と犬.png", tmp_path / "plain.png", layers=["conv"])
        where.show_where(acts, "猫と犬.png", "conv", tmp_path / "where.png")
    missing, family = _a_letter_of_another_font()
    pictures = []
    for fonts in ((), (family,)):
        monkeypatch.setattr(canvas, "FONTS", fonts)
        canvas._installed_fonts.cache_clear()
        pictures.append(_drawn(missing, tmp_path / "letter.png"))
    canvas._installed_fonts.cache_clear()
    assert (pictures[0] != pictures[1]).any()


@canvas.styled
def _drawn(text: str, out: Path) -> Any:
    figure = canvas.figure(2, 1)
    figure.text(0.1, 0.3, text, size=30, color="white")
    canvas.save(figure, out)
    return np.asarray(Image.open(out)).copy()


def _a_letter_of_another_font() -> tuple[str, str]:
    """A letter that DejaVu Sans lacks, and one of matplotlib's own fonts that has it."""
    from matplotlib.ft2font import FT2Font

    paths = {font.name: font.fname for font in fontManager.ttflist if "mpl-data" in font.fname}
    lacking = set(FT2Font(paths["STIXGeneral"]).get_charmap()) - set(FT2Font(paths["DejaVu Sans"]).get_charmap())
    return chr(min(letter for letter in lacking if letter > 0x2000)), "STIXGeneral"


def test_the_page_says_which_maps_hold_nothing_finite(place: Path, tmp_path: Path) -> None:
    write_report(place / "acts.h5", tmp_path / "report.html")
    block = (tmp_path / "report.html").read_text(encoding="utf-8").partition('type="application/json">')[2]
    data = json.loads(block.partition("</script")[0])
    (number,) = (i for i, layer in enumerate(data["layers"]) if layer["name"] == "holes")
    entry = data["maps"][next(iter(data["maps"]))][str(number)]
    assert entry["low"][1] is None
    assert entry["high"][1] is None
    assert all(entry["low"][i] is not None for i in (0, 3))


def test_an_image_that_failed_is_told_apart_from_a_photo_that_cannot_be_shown(place: Path, tmp_path: Path) -> None:
    with (
        fmextract.open(place / "acts.h5") as acts,
        pytest.raises(ConfigError, match=r"'broken\.png' has no activations"),
    ):
        maps.show_maps(acts, "broken.png", tmp_path / "maps", layers=["conv"])


def test_a_file_in_the_place_of_a_folder_of_pictures(place: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with fmextract.open(place / "acts.h5") as acts, pytest.raises(OutputError, match=r"file is not a folder"):
        maps.show_maps(acts, "1.png", tmp_path / "file", layers=["conv"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "top", "{acts}", "-l", "conv", "--channel", "0", "-k", "0", "-o", "x.png"], "at least 1 image"),
        (["show", "depth", "{acts}", "-l", "qqqq"], "there are conv, dead, holes, wide"),
        (["demo", "-o", "{acts}"], "cannot put the photos into"),
        (["extract", "{photos}", "-m", "x.py:y", "-o", "x.h5", "--max-failures", "150%"], "at most 100%"),
    ],
)
def test_mistakes_are_said_as_such(
    place: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    filled = [one.format(acts=place / "acts.h5", photos=place / "photos") for one in arguments]
    assert app.main(filled) == 2
    told = capfd.readouterr().err
    assert said in told
    assert "bug" not in told
