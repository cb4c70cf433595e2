"""What a notebook shows: bounded, escaped, and in words where something cannot be read."""

from __future__ import annotations

import base64
import io
import os
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from files import INFO, make_file, make_shards

from fmextract.reading import activations, html

MAPS = np.random.default_rng(0).normal(size=(6, 12, 8, 4)).astype(np.float32)


class Page(HTMLParser):
    """The tags, the texts, and the first picture."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words: list[str] = []
        self.picture: PIL.Image.Image | None = None
        self.feed(text)
        self.close()
        self.text = " ".join(self.words)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "img":
            data = str(dict(attrs)["src"]).removeprefix("data:image/png;base64,")
            self.picture = PIL.Image.open(io.BytesIO(base64.b64decode(data)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def shown(thing: Any) -> Page:
    return Page(thing._repr_html_())


def tile(page: Page, number: int) -> np.ndarray:
    """One map of the strip: (height, width, grey and opacity)."""
    assert page.picture is not None
    assert page.picture.mode == "LA"
    pixels = np.asarray(page.picture)
    width = (pixels.shape[1] + html.GAP) // html.MAPS
    return pixels[:, number * width : (number + 1) * width - html.GAP]


def test_a_table_of_the_layers(tmp_path: Path) -> None:
    make_shards(tmp_path / "acts", {"conv": MAPS, "fc": MAPS[:, :, 0, 0]}, (4,), spec={"fc": {"module_type": "Linear"}})
    with activations.open(tmp_path / "acts") as acts:
        page = shown(acts)
        stored = {layer["name"]: layer["bytes_stored"] for layer in acts.info()["layers"]}
    for word in ("6 images", "2 layers", "tiny", "fp32", "conv", "Conv2d", "6×12×8×4", "float32", "Linear", "6×12"):
        assert word in page.text
    assert f"{stored['fc']} B" in page.text
    assert page.tags.count("tr") == 3
    assert "closed" in shown(acts).text


def test_a_strip_of_the_maps_that_vary_most(tmp_path: Path) -> None:
    maps = MAPS.copy()
    maps[:, :4] *= 1e-3
    maps[1] = np.nan
    make_file(tmp_path / "a.h5", {"conv": maps[1:]}, status=[2, 0, 0, 0, 0])
    with activations.open(tmp_path / "a.h5") as acts:
        page = shown(acts["conv"])
    assert "img/00001.jpg" in page.text
    assert "4, 5, 6, 7, 8, 9, 10, 11" in page.text
    for number in range(html.MAPS):
        values = maps[2, 4 + number]
        expected = np.rint((values - values.min()) / np.ptp(values) * 255)
        found = tile(page, number)
        assert found.shape == (96, 48, 2)
        assert (found[..., 1] == 255).all()
        np.testing.assert_allclose(found[6::12, 6::12, 0], expected, atol=1)


def test_axes_in_any_order_and_tokens_on_their_grid(tmp_path: Path) -> None:
    """A ViT's tokens begin with the class token; Swin has its channels last."""
    tokens = np.zeros((2, 17, 12), np.float32)
    tokens[:, 1:] = MAPS[:2, :, :4].reshape(2, 12, 16).transpose(0, 2, 1)
    last = MAPS[:2, :, :4].transpose(0, 2, 3, 1)
    turned = MAPS[:2, :, :4].transpose(0, 1, 3, 2)
    info = {"resize": 64, "crop": [64, 64]}
    arrays = {"tokens": tokens, "last": last, "turned": turned}
    axes = {"last": ("y", "x", "channel"), "turned": ("channel", "x", "y")}
    make_file(tmp_path / "a.h5", arrays, axes=axes, info=INFO.__class__(**{**vars_of(INFO), "preprocess": info}))
    make_file(tmp_path / "b.h5", {"conv": np.ascontiguousarray(MAPS[:2, :, :4])})
    with activations.open(tmp_path / "a.h5") as acts, activations.open(tmp_path / "b.h5") as plain:
        expected = np.asarray(shown(plain["conv"]).picture)
        for name in arrays:
            np.testing.assert_array_equal(np.asarray(shown(acts[name]).picture), expected, err_msg=name)


def vars_of(info: Any) -> dict[str, Any]:
    return {name: getattr(info, name) for name in info.__slots__}


def test_what_is_not_finite_is_left_out(tmp_path: Path) -> None:
    maps = MAPS[:2, :8].astype(np.float64)
    maps[0, 0, :4] = np.nan
    maps[0, 1] = np.inf
    maps[0, 2, 0, 0], maps[0, 2, 0, 1] = -1.7e308, 1.7e308
    maps[0, 3] = 5
    make_file(tmp_path / "a.h5", {"conv": maps})
    with activations.open(tmp_path / "a.h5") as acts:
        page = shown(acts["conv"])
    assert not tile(page, 0)[:48, :, 1].any()
    assert (tile(page, 0)[48:, :, 1] == 255).all()
    assert not tile(page, 1)[..., 1].any()
    assert {tile(page, 2)[0, 0, 0], tile(page, 2)[0, 12, 0]} == {0, 255}
    assert (tile(page, 3)[..., 0] == 0).all()


def test_integers_and_layers_without_maps(tmp_path: Path) -> None:
    whole = (MAPS[:2] * 100).astype(np.int16)
    make_file(tmp_path / "a.h5", {"int": whole, "fc": whole[:, :, 0, 0], "tokens": whole[:, :3, :, 0]})
    with activations.open(tmp_path / "a.h5") as acts:
        assert shown(acts["int"]).picture is not None
        assert "its axes are feature" in shown(acts["fc"]).text
        assert shown(acts["fc"]).picture is None
        assert "its axes are token, feature" in shown(acts["tokens"]).text  # 3 tokens are no grid


def test_names_and_keys_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('&\"')</script>\x1b[2J"
    make_file(tmp_path / "a.h5", {evil: MAPS[:1]}, keys=[evil + "\udcff"], spec={evil: {"module_type": evil}})
    with activations.open(tmp_path / "a.h5") as acts:
        for thing in (acts, acts[evil]):
            page = shown(thing)
            assert "script" not in page.tags
            assert "<script>" in page.text
            assert "\x1b" not in thing._repr_html_()
            assert thing._repr_html_().encode()


def test_many_layers_take_no_time_and_little_room(tmp_path: Path) -> None:
    arrays = {f"layer{number:03}": MAPS[:1, 0, 0] for number in range(400)}
    make_file(tmp_path / "a.h5", arrays, codec="none")
    with activations.open(tmp_path / "a.h5") as acts:
        started = time.process_time()
        text = acts._repr_html_()
        assert time.process_time() - started < 2
    assert len(text) < 30_000
    assert "layer000" in text
    assert "layer399" in text
    assert "340 more: acts.layers" in text


def test_an_image_of_gigabytes_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of its channels lie in many chunks: some of them are shown. Where one chunk is too much, none is."""
    maps = np.random.default_rng(0).normal(size=(1, 64, 32, 32)).astype(np.float32)
    make_file(tmp_path / "a.h5", {"conv": maps}, chunk={"conv": (1, 2, 32, 32)})
    read = []
    original = activations.File.read

    def counted(self: Any, stored: Any, place: Any, out: Any) -> None:
        read.append(place)
        original(self, stored, place, out)

    monkeypatch.setattr(activations.File, "read", counted)
    monkeypatch.setattr(activations.File, "unpack", lambda *args: read.append(args[2]) or unpacked(*args))
    for bound, channels in ((1 << 20, None), (6 * 8192, "0, 10, 21, 32, 42, 53"), (8191, "")):
        monkeypatch.setattr(html, "STRIP_BYTES", bound)
        with activations.open(tmp_path / "a.h5", cache=0) as acts:
            read.clear()
            page = shown(acts["conv"])
            assert len(read) * 8192 <= bound
        if channels:
            assert channels in page.text
        elif channels == "":
            assert "256 KiB" in page.text
            assert page.picture is None


unpacked = activations.File.unpack


def test_what_is_damaged_is_told_in_words(tmp_path: Path) -> None:
    make_file(tmp_path / "a.h5", {"conv": MAPS, "fc": MAPS[:, :, 0, 0]})
    with activations.open(tmp_path / "a.h5") as acts:
        stored = acts.files[0].stored("conv")
        offset, size = int(stored.offsets[0, 0, 0, 0]), int(stored.sizes[0, 0, 0, 0])
    content = bytearray((tmp_path / "a.h5").read_bytes())
    content[offset : offset + size] = os.urandom(size)
    (tmp_path / "a.h5").write_bytes(content)
    with activations.open(tmp_path / "a.h5") as acts:
        page = shown(acts["conv"])
        assert re.search("conv, rows 0 to 3", page.text)
        assert page.picture is None
        assert "6×12×8×4" in shown(acts).text
        layer = acts["fc"]
        (tmp_path / "a.h5").unlink()
        for thing in (acts, layer):
            assert "a.h5" in shown(thing).text
            assert repr(thing)
    assert "closed" in shown(layer).text


def test_every_image_failed(tmp_path: Path) -> None:
    make_file(tmp_path / "a.h5", {"conv": MAPS}, status=[1] * 6)
    with activations.open(tmp_path / "a.h5") as acts:
        assert "every one failed" in shown(acts["conv"]).text
