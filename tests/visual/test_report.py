"""The report: within its size, safe whatever the file says, and in a browser the same numbers as in the file."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from files import AXES, INFO, make_file, stamps_of

import fmextract
from fmextract.cli import main
from fmextract.common import boxes
from fmextract.common.text import printable
from fmextract.errors import ConfigError
from fmextract.records import Field
from fmextract.storage import durable, shards
from fmextract.visual.report.numbers import shown
from fmextract.visual.report.report import _level, _spread, write_report
from fmextract.visual.report.views import sprite_columns

HERE = Path(__file__).parents[1] / "browser"
EVIL = "</script><img src=x onerror=alert(1)>"
CONV = f"conv{EVIL}\"'&\n"
MESSAGE = f"broken {EVIL} \"quoted\" 'too' \u202e\n<!--"
KEYS = ["a.png", f"{EVIL}.png", "b\"'&.png", "line\nbreak.png", "ünï/c.png", "last.png"]
FAILED = 2
INPUT = (48, 64)
FIELD = Field((7.0, 9.0), (4.0, 4.0), (2.0, 2.0))
WIDE = Field((99.0, 99.0), (8.0, 8.0), (4.0, 4.0))
AXES_OF = {
    CONV: AXES[4],
    "big": AXES[4],
    "swin": ("y", "x", "channel"),
    "tokens": AXES[3],
    "odd": ("axis_1", "axis_2", "axis_3"),
    "fc": AXES[2],
}
SHAPES = {CONV: (5, 12, 16), "big": (3, 130, 90), "swin": (6, 8, 4), "tokens": (49, 6), "odd": (2, 3, 4), "fc": (10,)}
SPECS: dict[str, dict[str, Any]] = {
    CONV: {"field": FIELD, "rel_error": 0.0123},
    "swin": {"field": WIDE, "erf_size": 12.0},
}


def statistics(array: np.ndarray, axes: Sequence[str], good: np.ndarray, k: int = 3) -> dict[str, np.ndarray]:
    """What a run records, by numpy."""
    axis = 1 + axes.index("channel" if "channel" in axes else "feature")
    x = np.moveaxis(array, axis, 1).astype(np.float64).reshape(len(array), array.shape[axis], -1)
    kept = np.moveaxis(x[good], 1, 0).reshape(x.shape[1], -1)
    finite = np.where(np.isfinite(kept), kept, np.nan)
    peaks = np.where(np.isfinite(x), x, -np.inf)
    at, best = peaks.argmax(2), peaks.max(2)
    best[~good] = -np.inf
    rows = np.argsort(-best, axis=0, kind="stable")[:k].T
    positions = [at[rows[c], c] for c in range(len(rows))]
    others = [(role, n) for role, n in zip(axes, array.shape[1:], strict=True) if role not in ("channel", "feature")]
    place = [np.unravel_index(one, [n for _, n in others]) if others else () for one in positions]
    none = np.full(rows.shape, -1)
    return {
        "count": np.isfinite(kept).sum(1),
        "mean": np.nanmean(finite, 1),
        "std": np.nanstd(finite, 1),
        "min": np.nanmin(finite, 1),
        "max": np.nanmax(finite, 1),
        "zero_fraction": (kept == 0).sum(1) / np.isfinite(kept).sum(1),
        "nonfinite": (~np.isfinite(kept)).sum(1),
        "top_value": np.take_along_axis(best.T, rows, 1),
        "top_sample": rows,
        "top_y": np.array([p[0] for p in place]) if others else none,
        "top_x": np.array([p[1] for p in place]) if len(others) > 1 else none,
    }


@dataclass(frozen=True)
class Stored:
    """A file with everything odd in it, what it holds, and the photos."""

    path: Path
    arrays: Mapping[str, np.ndarray]
    photos: Path
    options: Mapping[str, Any]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    folder = tmp_path_factory.mktemp("report")
    random = np.random.default_rng(0)
    good = np.arange(len(KEYS)) != FAILED
    arrays, stats = {}, {}
    for name, shape in SHAPES.items():
        array = np.maximum(random.standard_normal((len(KEYS), *shape)) * 3 + 1, 0).astype(np.float32)
        array[FAILED] = np.nan
        arrays[name] = array
    arrays[CONV][good, 3] = 0  # a dead channel
    arrays[CONV][0, 1, 2, 3] = np.nan
    arrays["fc"][0, 4] = np.inf
    for name, axes in AXES_OF.items():
        if name != "odd":
            stats[name] = statistics(arrays[name], axes, good)
    photos = folder / "photos"
    for row, key in enumerate(KEYS):
        if row not in (FAILED, len(KEYS) - 1):  # the last one is gone
            (photos / key).parent.mkdir(parents=True, exist_ok=True)
            pixels = np.add.outer(np.arange(96), np.arange(128))[..., None] * (1, 0.5, 0) + (0, 0, 40 * row)
            PIL.Image.fromarray(pixels.astype(np.uint8)).save(photos / key, "PNG")
    preprocess = {"kind": "standard", "resize": list(INPUT), "crop": list(INPUT), "interpolation": "bilinear"}
    info = replace(INFO, source=str(photos), preprocess=preprocess, model=f"model {EVIL}", precision="bf16")
    info = replace(info, extra={"images": {"absolute": str(photos)}})
    options = {
        "axes": AXES_OF, "spec": SPECS, "stats": stats, "keys": KEYS, "info": info,
        "status": [2 if row == FAILED else 0 for row in range(len(KEYS))],
        "message": [MESSAGE if row == FAILED else "" for row in range(len(KEYS))],
        "files": stamps_of(photos, KEYS),
    }  # fmt: skip
    make_file(folder / "acts.h5", arrays, **options)
    return Stored(folder / "acts.h5", arrays, photos, options)


def data_of(page: Path) -> dict[str, Any]:
    """The data block, as a browser reads it: up to the first thing that ends a script."""
    text = page.read_text(encoding="utf-8")
    block = text.partition('<script id="data" type="application/json">')[2].partition("</script")[0]
    return json.loads(block)


# ------------------------------------------------------------------------------------------------------ the file


def test_nothing_a_file_says_becomes_markup(stored: Stored, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    write_report(stored.path, page)
    text = page.read_text(encoding="utf-8")
    assert EVIL not in text
    assert text.count("</script") == 2
    assert "<img" not in text
    data = data_of(page)
    assert data["failures"][0]["message"] == printable(MESSAGE)
    assert [layer["name"] for layer in data["layers"]] == [printable(name) for name in SHAPES]
    assert not re.search(r"https?://", text.replace("http://www.w3.org/2000/svg", ""))


def test_only_its_own_program_may_run(stored: Stored, tmp_path: Path) -> None:
    import hashlib

    page = tmp_path / "report.html"
    write_report(stored.path, page)
    text = page.read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1]  # type: ignore[index]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        inline = re.findall(f"<{tag}>(.*?)</{tag}>", text, flags=re.DOTALL)
        (digest,) = (base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in inline)
        assert f"{directive} 'sha256-{digest}'" in policy


def test_without_options_it_lies_beside_the_file(stored: Stored) -> None:
    made = write_report(stored.path)
    try:
        assert Path(made.path) == stored.path.parent / "report.html"
        assert Path(made.path).stat().st_size == made.bytes
        assert (made.layers, made.images, made.photos) == (6, 5, 4)
        assert any("1 photo missing" in what and "--images" in what for what in made.left_out)
        assert write_report(stored.path) == made  # its own page is written over
    finally:
        Path(made.path).unlink()


def test_something_else_is_not_written_over(stored: Stored, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<p>mine</p>")
    with pytest.raises(ConfigError, match="not a report"):
        write_report(stored.path, tmp_path / "index.html")
    with pytest.raises(ConfigError, match="is a directory"):
        write_report(stored.path, tmp_path)
    with pytest.raises(ConfigError, match="no directory"):
        write_report(stored.path, tmp_path / "none" / "report.html")
    assert (tmp_path / "index.html").read_text() == "<p>mine</p>"


def test_photos_elsewhere_and_photos_nowhere(stored: Stored, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(stored.photos, moved)
    info = replace(stored.options["info"], extra={"images": {"absolute": "/nowhere/at/all"}})
    make_file(tmp_path / "acts.h5", stored.arrays, **{**stored.options, "info": info})
    nowhere = write_report(tmp_path / "acts.h5")
    assert nowhere.photos == 0
    assert nowhere.images == 5
    assert write_report(tmp_path / "acts.h5", images=moved).photos == 4


def test_a_directory_of_shards_gives_the_same(stored: Stored, tmp_path: Path) -> None:
    good = np.arange(len(KEYS)) != FAILED
    whole, parts, folder = tmp_path / "whole.html", tmp_path / "parts.html", tmp_path / "shards"
    write_report(stored.path, whole)
    folder.mkdir()
    plan = {"shards": [[0, 4], [4, 6]]}
    durable.write_json(folder / shards.PLAN, plan)
    for number, rows in enumerate((slice(0, 4), slice(4, 6))):
        mine = {name: array[rows] for name, array in stored.arrays.items()}
        stats = {name: stats_of_rows(array, name, good, rows) for name, array in stored.arrays.items() if name != "odd"}
        options = {
            **stored.options,
            **{key: stored.options[key][rows] for key in ("keys", "status", "message", "files")},
        }
        shard = folder / shards.shard_name(number)
        digest = make_file(shard, mine, start=rows.start, **{**options, "stats": stats})
        where = range(rows.start, rows.stop)
        shards.record_shard(shard, rows=where, statuses=options["status"], content_digest=digest, batch_size=1)
    shards.fold_index(folder, plan)
    write_report(folder, parts)
    one, many = data_of(whole), data_of(parts)
    assert one["maps"] == many["maps"]
    assert one["photos"] == many["photos"]
    assert one["failures"] == many["failures"]
    for a, b in zip(one["layers"], many["layers"], strict=True):
        assert a["stats"] == b["stats"]
        assert a["histogram"] == b["histogram"]
        for name in ("top_value", "top_row", "top_y", "top_x") if a["channels"] else ():
            assert a["channels"][name] == b["channels"][name]


def stats_of_rows(array: np.ndarray, name: str, good: np.ndarray, rows: slice) -> dict[str, np.ndarray]:
    """The statistics of one shard: rows numbered in the whole; as many strongest as it has good rows, then empty."""
    made = statistics(array[rows], AXES_OF[name], good[rows])
    empty = ~np.isfinite(made["top_value"])
    made["top_sample"] = np.where(empty, -1, made["top_sample"] + rows.start)
    made["top_value"] = np.where(empty, np.nan, made["top_value"])
    missing = 3 - made["top_value"].shape[1]
    for part in ("value", "sample", "y", "x"):
        fill = np.nan if part == "value" else -1
        made[f"top_{part}"] = np.pad(made[f"top_{part}"], ((0, 0), (0, missing)), constant_values=fill)
    return made


@pytest.mark.parametrize("size", [110_000, 130_000, 200_000, 1_000_000])
def test_it_never_grows_beyond_its_size(stored: Stored, tmp_path: Path, size: int) -> None:
    made = write_report(stored.path, tmp_path / "report.html", max_size=size)
    assert made.bytes == (tmp_path / "report.html").stat().st_size <= size
    if size < 120_000:
        assert any("no room" in what or "some maps" in what or "maps of" in what for what in made.left_out)
    folder = f"{stored.path.parent}/"
    assert data_of(tmp_path / "report.html")["left_out"] == [what.replace(folder, "") for what in made.left_out]


def test_a_size_too_small_for_the_numbers_is_refused(stored: Stored, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="numbers of this run alone need"):
        write_report(stored.path, tmp_path / "report.html", max_size=60_000)
    assert list(tmp_path.iterdir()) == []


def test_many_images_and_channels_are_thinned_out_evenly(tmp_path: Path) -> None:
    rows, channels = 60, 90
    array = np.random.default_rng(1).random((rows, channels, 4, 4), np.float32)
    stats = statistics(array, AXES[4], np.ones(rows, bool))
    make_file(tmp_path / "acts.h5", {"conv": array}, stats={"conv": stats})
    made = write_report(tmp_path / "acts.h5")
    assert made.images == 24
    assert any("maps of 36 of 60 images" in what for what in made.left_out)
    data = data_of(tmp_path / "report.html")
    assert {0, 59} <= {int(row) for row in data["maps"]}
    assert data["layers"][0]["view"]["shown"] == sorted(np.argsort(-stats["std"], kind="stable")[:64].tolist())


def test_a_run_in_which_all_failed_and_one_without_statistics(tmp_path: Path) -> None:
    array = np.full((3, 4, 2, 2), np.nan, np.float32)
    make_file(tmp_path / "failed.h5", {"conv": array}, status=[1, 2, 3])
    made = write_report(tmp_path / "failed.h5")
    assert (made.images, made.photos) == (0, 0)
    data = data_of(tmp_path / "report.html")
    assert [f["status"] for f in data["failures"]] == ["could not be read", "could not be decoded", "forward failed"]
    assert data["layers"][0]["stats"]["mean"] is None


def test_preprocessing_of_the_users_own_shows_the_whole_photo(stored: Stored, tmp_path: Path) -> None:
    info = replace(stored.options["info"], preprocess={"kind": "custom", "origin": "mine:prepare"})
    make_file(tmp_path / "acts.h5", stored.arrays, **{**stored.options, "info": info})
    assert write_report(tmp_path / "acts.h5").photos == 4
    data = data_of(tmp_path / "report.html")
    assert data["geometry"] is False
    assert data["photos"]["0"]["size"] == [96, 128]


@pytest.mark.parametrize(("photo", "preprocess"), [
    ((300, 451), {"resize": 256, "crop": [224, 224]}),
    ((60, 90), {"resize": None, "crop": [100, 100]}),
    ((90, 60), {"resize": [50, 70], "crop": None}),
])  # fmt: skip
def test_thumbnails_are_what_the_network_saw(
    tmp_path: Path, photo: tuple[int, int], preprocess: dict[str, Any]
) -> None:
    from fmextract.inputs import decoding
    from fmextract.records import Preprocess
    from fmextract.visual.report.photos import Photos

    y, x = np.mgrid[: photo[0], : photo[1]]
    pixels = np.stack([255 * y / photo[0], 255 * x / photo[1], 128 + 60 * np.sin(x / 20 + y / 15)], 2)
    (tmp_path / "photos").mkdir()
    PIL.Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / "a.png")
    info = replace(INFO, preprocess=preprocess)
    make_file(tmp_path / "acts.h5", {"fc": np.ones((1, 3), np.float32)}, keys=["a.png"], info=info)
    fields = {name: tuple(size) if isinstance(size, list) else size for name, size in preprocess.items()}
    seen = decoding.decode((tmp_path / "photos" / "a.png").read_bytes(), Preprocess(**fields)).pixels
    with fmextract.open(tmp_path / "acts.h5") as acts:
        made = Photos(acts, tmp_path / "photos").thumbnail(0)
    assert made is not None
    assert tuple(made["size"]) == tuple(seen.shape[1:])
    thumb = np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(made["jpeg"]))), float)
    assert np.abs(thumb - seen.permute(1, 2, 0).numpy()).mean() < 4


def test_room_is_given_out_fairly() -> None:
    assert _level([5, 100, 3], 20) == 12
    assert _level([5], 100) == 5
    assert _level([], 3) == 0
    assert _spread(list(range(10)), 3) == [0, 4, 9]
    assert sprite_columns(64, 7, 7) == 8


def test_on_the_command_line(stored: Stored, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert main(["report", str(stored.path), "-o", str(page), "--images", str(stored.photos), "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert said["bytes"] == page.stat().st_size
    assert main(["report", str(stored.path), "-o", str(page), "--max-size", "150kB"]) == 0
    assert "not in it:" in capfd.readouterr().out
    assert page.stat().st_size <= 150_000
    assert main(["report", str(stored.path), "-o", str(page), "--max-size", "huge"]) == 2


# ------------------------------------------------------------------------------------------------- in a browser


def visit(visits: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What Chromium gives for each visit; skips where it, node or npm is missing."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    for name, found in {"chromium": chromium, "node": shutil.which("node"), "npm": shutil.which("npm")}.items():
        if not found:
            pytest.skip(f"{name} is not installed")
    if not (HERE / "node_modules" / "playwright-core").is_dir():
        subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=HERE, check=True)
    asked = json.dumps({"chromium": chromium, "visits": visits})
    done = subprocess.run(["node", "visit.mjs"], cwd=HERE, input=asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


TEXT = "[...document.querySelectorAll('section:not([hidden])')].map((s) => [s.id, s.innerText])"
HASH = "decodeURIComponent(location.hash)"
TABLE = "[...document.querySelectorAll('#{0} tbody tr')].map((r) => [...r.cells].map((c) => c.innerText))"
LEVELS = """new Promise((give) => {{
  const layer = data.layers[{layer}], entry = data.maps[{row}][{layer}], view = layer.view;
  withMaps(entry, view, (levels, columns, width) => give(entry.low.map((low, i) =>
    Array.from({{length: view.drawn[0]}}, (_, y) => Array.from({{length: view.drawn[1]}}, (_, x) =>
      valueOf(levelAt(levels, columns, width, view, i, y, x), low, entry.high[i]))))));
}})"""
PIXELS = """[...document.querySelectorAll('.maps canvas')].map((c) =>
  [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data])"""
TOPS = """[...document.querySelectorAll('#tops figure')].map((f) =>
  [Number(f.dataset.row), f.dataset.box ?? null, f.querySelector('strong').innerText,
   f.querySelector('.mono').innerText, f.querySelector('img') !== null])"""
BARS = "[...document.querySelectorAll('svg.depth g.pick')].map((g) => g.getAttribute('aria-label'))"
OVER = "(({style: s}) => [s.top, s.left, s.height, s.width].map(parseFloat))(document.querySelector('canvas.over'))"


@dataclass(frozen=True)
class Seen:
    """What a browser gave, by name."""

    given: Mapping[str, Any]
    wrong: Sequence[str]
    requests: Sequence[str]


@pytest.fixture(scope="module")
def seen(stored: Stored, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Seen]:
    out = tmp_path_factory.mktemp("browser")
    write_report(stored.path, out / "report.html")
    url = (out / "report.html").as_uri()
    first = "document.querySelector('h2').innerText"
    names = list(SHAPES)
    steps: dict[str, list[Any]] = {
        "run": ["evaluate", TEXT],
        "failures": ["evaluate", TABLE.format("failures")],
        "metric": ["click", "text=dead channels"],
        "metric hash": ["evaluate", HASH],
        "depth": ["evaluate", BARS],
        "bar": ["click", "svg.depth g.pick >> nth=1"],
        "bar hash": ["evaluate", HASH],
        "layers": ["evaluate", TABLE.format("layers")],
        "row": ["click", "#layers a >> nth=0"],
        "row title": ["evaluate", "document.querySelector('#detail h2').innerText"],
        "nav maps": ["click", "nav a >> nth=2"],
        "maps": ["evaluate", TEXT],
        "pixels": ["evaluate", PIXELS],
        "over": ["evaluate", OVER],
        "map": ["click", "[data-channel='3']"],
        "map hash": ["evaluate", HASH],
        "focus": ["evaluate", "document.activeElement.dataset.channel"],
        "probe": ["hover", ".frame", {"x": 20, "y": 20}],
        "tip": ["evaluate", "document.getElementById('tip').innerText"],
        "next image": ["press", "ArrowRight"],
        "next hash": ["evaluate", HASH],
        "back": ["back"],
        "back hash": ["evaluate", HASH],
        "overlay": ["press", "o"],
        "overlay off": ["evaluate", "document.querySelector('canvas.over').hidden"],
        "scale": ["press", "s"],
        "range": ["evaluate", "document.getElementById('range').innerText"],
        "next layer": ["press", "j"],
        "next layer hash": ["evaluate", HASH],
        "select": ["choose", "#view-maps select[data-id=layer]", "odd"],
        "odd": ["evaluate", TEXT],
        "select fc": ["choose", "#view-maps select[data-id=layer]", "fc"],
        "fc": ["evaluate", TABLE.format("strongest")],
        "channels": ["hash", f"#view=channels&layer={url_quoted(CONV)}&channel=1"],
        "tops": ["evaluate", TOPS],
        "number": ["fill", "#channel", "4"],
        "number tops": ["evaluate", TOPS],
        "picker": ["click", "#picker"],
        "picker hash": ["evaluate", HASH],
        "key": ["press", "ArrowRight"],
        "key hash": ["evaluate", HASH],
        "unknown": ["hash", "#view=channels&layer=nope&channel=999"],
        "unknown text": ["evaluate", TEXT],
        "token": ["hash", "#view=channels&layer=tokens&channel=2"],
        "token tops": ["evaluate", TOPS],
        "swin": ["hash", "#view=channels&layer=swin&channel=0"],
        "swin tops": ["evaluate", TOPS],
        "theme before": ["evaluate", "document.documentElement.dataset.theme"],
        "theme": ["press", "t"],
        "theme after": ["evaluate", "document.documentElement.dataset.theme"],
        "help": ["press", "?"],
        "help open": ["evaluate", "document.getElementById('keys').open"],
        "escape": ["press", "Escape"],
        "home": ["press", "1"],
        "home title": ["evaluate", first],
    }  # fmt: skip
    for layer, name in enumerate(names):
        if name != "fc":
            steps[f"levels {layer}"] = ["evaluate", LEVELS.format(layer=layer, row=0)]
    widths = [
        step for view in ("run", "layers", "maps", "channels") for step in (
            ["hash", f"#view={view}"], ["evaluate", "document.documentElement.scrollWidth"])
    ]  # fmt: skip
    shown_on_paper = "[...document.querySelectorAll('section')].map((s) => getComputedStyle(s).display)"
    pages = [
        {"url": url, "steps": list(steps.values())},
        {"url": url, "width": 390, "dark": True,
         "steps": [["evaluate", "document.documentElement.dataset.theme"], *widths]},
        {"url": url, "steps": [["pdf", str(out / "page.pdf")], ["paper"], ["evaluate", shown_on_paper]]},
    ]  # fmt: skip
    array = np.full((3, 4, 2, 2), np.nan, np.float32)
    make_file(out / "failed.h5", {"conv": array}, status=[1, 2, 3], spec={"conv": {"axes": ("axis_1", "axis_2", "x")}})
    write_report(out / "failed.h5", out / "failed.html")
    pages.append({"url": (out / "failed.html").as_uri(), "steps": [
        step for view in ("run", "layers", "maps", "channels") for step in (
            ["hash", f"#view={view}"], ["press", "j"], ["press", "n"], ["press", "ArrowRight"], ["evaluate", TEXT])
    ]})  # fmt: skip
    results = visit(pages)
    assert (out / "page.pdf").read_bytes().count(b"/Type /Page\n") >= 4
    return {
        "wide": Seen(dict(zip(steps, results[0]["given"], strict=True)), results[0]["wrong"], results[0]["requests"]),
        "narrow": Seen(dict(enumerate(results[1]["given"])), results[1]["wrong"], results[1]["requests"]),
        "failed": Seen(dict(enumerate(results[3]["given"])), results[3]["wrong"], results[3]["requests"]),
        "paper": Seen(dict(enumerate(results[2]["given"])), results[2]["wrong"], results[2]["requests"]),
    }


def url_quoted(name: str) -> str:
    from urllib.parse import quote

    return quote(printable(name), safe="")


@pytest.fixture(scope="module")
def wide(seen: Mapping[str, Seen]) -> Mapping[str, Any]:
    return seen["wide"].given


def test_nothing_goes_wrong_and_nothing_is_fetched(seen: Mapping[str, Seen]) -> None:
    for one in seen.values():
        assert not one.wrong
        assert len(one.requests) == 1
        assert one.requests[0].startswith("file://")


def test_the_run_is_told(wide: Mapping[str, Any]) -> None:
    ((section, text),) = wide["run"]
    assert section == "view-run"
    assert "1 failed" in text
    assert "bf16" in text
    assert printable(INFO.created) in text
    assert wide["failures"] == [["2", shown(KEYS[FAILED]), "could not be decoded", printable(MESSAGE)]]
    assert wide["metric hash"] == "#metric=dead"
    assert wide["depth"][0] == f"{printable(CONV)}: dead channels 20.0 %"
    assert len(wide["depth"]) == len(SHAPES)
    assert wide["bar hash"] == "#view=layers&layer=big&metric=dead"


def test_every_layer_is_told(wide: Mapping[str, Any], stored: Stored) -> None:
    good = np.arange(len(KEYS)) != FAILED
    assert len(wide["layers"]) == len(SHAPES)
    for cells, (name, array) in zip(wide["layers"], stored.arrays.items(), strict=True):
        finite = array[good][np.isfinite(array[good])]
        assert cells[0].startswith(shown(name))
        assert cells[1] == "×".join(map(str, array.shape[1:]))
        assert cells[3] == f"{100 * (finite == 0).mean():.1f} %"
        mean, std = (float(one.replace("−", "-")) for one in cells[5].split(" ± "))
        assert mean == pytest.approx(finite.mean(), rel=5e-3)
        assert std == pytest.approx(finite.std(), rel=5e-3)
        assert float(cells[6]) == pytest.approx(finite.max(), rel=5e-3)
    assert wide["layers"][0][7] == "1 / 5"
    assert wide["layers"][0][8] == "1"
    assert wide["layers"][0][9] == "7×9 px"
    assert wide["layers"][0][10] == "1.2 %"
    assert wide["row title"] == printable(CONV)


def as_maps(name: str, image: np.ndarray) -> np.ndarray:
    if name == "swin":
        return image.transpose(2, 0, 1)
    if name == "tokens":
        return image[1:].T.reshape(6, 6, 8)
    if name == "big":
        full = np.full((3, 132, 90), np.nan)
        full[:, :130] = image
        return np.nanmean(full.reshape(3, 44, 3, 30, 3), (2, 4))
    return image


@pytest.mark.parametrize("layer", range(5))
def test_maps_hold_the_values_of_the_file(wide: Mapping[str, Any], stored: Stored, layer: int) -> None:
    name = list(SHAPES)[layer]
    expected = as_maps(name, stored.arrays[name][0].astype(np.float64))
    got = np.array(wide[f"levels {layer}"], dtype=np.float64)
    assert got.shape == expected.shape
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    step = (np.nanmax(expected, (1, 2)) - np.nanmin(expected, (1, 2)))[:, None, None] / 254
    assert np.nanmax(np.abs(got - expected) - step * 0.501) < 1e-4


def test_maps_are_painted_and_lie_where_their_cells_look(wide: Mapping[str, Any], stored: Stored) -> None:
    values = stored.arrays[CONV][0]
    pixels = np.array(wide["pixels"]).reshape(5, 12, 16, 4)
    np.testing.assert_array_equal(pixels[..., 3] == 0, np.isnan(values))  # a hole is transparent
    assert pixels[3, :, :, :3].max() < 8  # the dead channel is dark
    light = pixels[0, :, :, :3].sum(-1)
    order = np.argsort(values[0].reshape(-1), kind="stable")
    assert (np.diff(light.reshape(-1)[order]) >= -3).all()
    top, left, height, width = wide["over"]
    offset, stride = FIELD.offset, FIELD.stride
    assert top == pytest.approx(100 * (offset[0] - stride[0] / 2) / INPUT[0])
    assert left == pytest.approx(100 * (offset[1] - stride[1] / 2) / INPUT[1])
    assert height == pytest.approx(100 * 12 * stride[0] / INPUT[0])
    assert width == pytest.approx(100 * 16 * stride[1] / INPUT[1])


def test_clicks_and_keys_lead_on_and_back(wide: Mapping[str, Any]) -> None:
    layer = f"layer={printable(CONV)}".replace(" ", "+")
    assert wide["map hash"].replace(" ", "+") == f"#view=maps&{layer}&channel=3&metric=dead"
    assert wide["focus"] == "3"
    assert re.match(r"y \d+, x \d+: 0$", wide["tip"])
    assert "row=1" in wide["next hash"]
    assert wide["back hash"] == wide["map hash"]
    assert wide["overlay off"] is True
    assert "layer=big" in wide["next layer hash"]
    assert "3×4 cells" in wide["odd"][0][1]
    assert "not known" in wide["odd"][0][1]
    assert wide["theme before"] == "light"
    assert wide["theme after"] == "dark"
    assert wide["help open"] is True
    assert wide["home title"] == "By depth"
    assert "channel=" in wide["picker hash"]
    assert wide["key hash"] != wide["picker hash"]
    assert "Channel 999 is not in this report" in wide["unknown text"][0][1]


def test_a_layer_without_maps_shows_its_strongest(wide: Mapping[str, Any], stored: Stored) -> None:
    values = stored.arrays["fc"][0].astype(float)
    values[~np.isfinite(values)] = -np.inf
    best = int(values.argmax())
    assert wide["fc"][0][0] == str(best)
    assert float(wide["fc"][0][1]) == pytest.approx(values[best], rel=1e-3)


@pytest.mark.parametrize(("step", "channel"), [("tops", 1), ("number tops", 4)])
def test_strongest_images_are_those_of_the_file(
    wide: Mapping[str, Any], stored: Stored, step: str, channel: int
) -> None:
    with fmextract.open(stored.path) as acts:
        expected = acts[CONV].top(channel, 3)
    assert [one[0] for one in wide[step]] == [top.row for top in expected]
    for (row, box, value, key, has_photo), top in zip(wide[step], expected, strict=True):
        assert float(value) == pytest.approx(top.value, rel=1e-3)
        assert key == shown(top.key)
        assert has_photo == (row != len(KEYS) - 1)
        assert top.y is not None
        assert top.x is not None
        assert [float(edge) for edge in box.split()] == pytest.approx(boxes.cell_box(FIELD, (top.y, top.x), INPUT))


def test_strongest_tokens_are_patches(wide: Mapping[str, Any], stored: Stored) -> None:
    stats = stored.options["stats"]["tokens"]
    for (row, box, *_), sample, token in zip(
        wide["token tops"], stats["top_sample"][2], stats["top_y"][2], strict=True
    ):
        assert row == sample
        if token == 0:
            assert box is None
        else:
            y, x = divmod(int(token) - 1, 8)
            assert [float(edge) for edge in box.split()] == [8 * y, 8 * x, 8 * y + 8, 8 * x + 8]


def test_the_effective_field_is_boxed_where_it_is_known(wide: Mapping[str, Any], stored: Stored) -> None:
    effective = replace(WIDE, size=(12.0, 12.0))
    with fmextract.open(stored.path) as acts:
        expected = acts["swin"].top(0, 3)
    for (row, box, *_), top in zip(wide["swin tops"], expected, strict=True):
        assert row == top.row
        assert top.y is not None
        assert top.x is not None
        assert [float(edge) for edge in box.split()] == pytest.approx(boxes.cell_box(effective, (top.y, top.x), INPUT))


def test_it_does_not_look_for_ever(tmp_path: Path) -> None:
    array = np.random.default_rng(2).random((300, 40), np.float32)
    stats = {"fc": statistics(array, AXES[2], np.ones(300, bool), k=9)}
    make_file(tmp_path / "acts.h5", {"fc": array}, stats=stats)
    assert "100 photos missing" in "".join(write_report(tmp_path / "acts.h5").left_out)


def test_it_fits_a_telephone_and_follows_the_system(seen: Mapping[str, Seen]) -> None:
    theme, *others = seen["narrow"].given.values()
    assert theme == "dark"
    assert all(width <= 390 for width in others if width is not None)


def test_a_run_in_which_all_failed_can_be_looked_at(seen: Mapping[str, Seen]) -> None:
    run, layers, maps, channels = list(seen["failed"].given.values())[4::5]
    assert "3 failed" in run[0][1]
    assert "no finite values" in layers[0][1]
    assert "no maps" in maps[0][1]
    assert "no statistics by channel" in channels[0][1]


def test_paper_gets_every_view(seen: Mapping[str, Seen]) -> None:
    assert seen["paper"].given[2] == ["block"] * 4
