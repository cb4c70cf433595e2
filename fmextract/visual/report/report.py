"""Write an HTML file about a run: what was done, each layer in numbers, its maps over photos, its strongest images.

The page needs no server, no network and nothing beside it. All that a file says (keys, messages, names of layers) goes
into it as JSON in a block that is never executed, and from there onto the page as text, never as markup.

The page is filled in an order: the run and every layer's numbers, always; the statistics of channels with their
strongest images; photos; maps. The page and the result say what did not fit.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from fmextract.common import strict_json
from fmextract.common.folders import local_name
from fmextract.common.text import byte_count, count, printable
from fmextract.errors import ConfigError
from fmextract.reading import activations
from fmextract.reading.layer import Layer
from fmextract.visual.report import numbers
from fmextract.visual.report.photos import Photos
from fmextract.visual.report.views import drawn, view_of

__all__ = ["Report", "write_report"]

MAX_SIZE = 20_000_000
IMAGES = 24
"""Images whose maps are shown, if the data set has as many: no more than a person looks through."""
SAMPLED = 12
"""Images whose values go into the histograms."""
MAPS = 64
"""Maps of one layer and image."""
MAP_LAYERS = 100
FEWEST_MAPS = 12
"""Rather fewer images than fewer maps of each layer."""
PHOTO = 25_000
"""Bytes that a photo takes at most, about: with less room left, none is read in vain."""
GIVE_UP = 100
"""Photos that may be missing before the first one is found: each look may ask a network."""
FEATURED = 16
"""Channels of each layer whose strongest images all get a photo before any other channel's do."""
MARK = '<meta name="generator" content="fmextract">'
"""Marks a page as ours, which may be overwritten."""


@dataclass(frozen=True, slots=True)
class Report:
    """A written report.

    Attributes:
        path: The page.
        bytes: Of the page.
        layers: How many are in it.
        images: How many have maps in it.
        photos: How many have a photo in it.
        left_out: What it does not hold, and why.
    """

    path: str
    bytes: int
    layers: int
    images: int
    photos: int
    left_out: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        head = f"{printable(self.path)}: {byte_count(self.bytes)}, {count(self.layers, 'layer')}, maps of "
        head += f"{count(self.images, 'image')}, {count(self.photos, 'photo')}"
        return "\n".join([head, *(f"  not in it: {printable(what)}" for what in self.left_out)])


def write_report(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    images: str | os.PathLike[str] | None = None,
    max_size: int = MAX_SIZE,
) -> Report:
    """Write a page about the output at `path` to `out`, else report.html beside it, of at most `max_size` bytes.

    Photos come from the folder `images`, else from the source that the file names; without them the page has all the
    rest. Raises ConfigError where `out` holds something else, or where `max_size` is too little for the numbers.
    """
    target = Path(out) if out is not None else Path(path).absolute().parent / "report.html"
    _refuse_foreign(target)
    with activations.open(path) as acts:
        said = _Collected(acts, images, max_size)
        page = _page(f"{local_name(acts.attrs.get('model', ''))} · {Path(path).name}", said.data)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(page)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return Report(
        str(target), len(page), len(said.data["layers"]), len(said.data["maps"]), len(said.data["photos"]),
        tuple(said.left_out),
    )  # fmt: skip


def _refuse_foreign(target: Path) -> None:
    if target.is_dir():
        raise ConfigError(f"{target} is a directory; name a file, as {target / 'report.html'}")
    if not target.parent.is_dir():
        raise ConfigError(f"{target}: there is no directory {target.parent}")
    if target.exists():
        with target.open("rb") as file:
            if MARK.encode() not in file.read(2000):
                raise ConfigError(f"{target} is not a report of fmextract, and is not written over: choose another -o")


# ---------------------------------------------------------------------------------------------------- the page


def _page(title: str, data: Mapping[str, Any]) -> bytes:
    """Return the template with its style, its program and the data."""
    style, program, page = (_template(name) for name in ("page.css", "page.js", "page.html"))
    parts = {
        "title": html.escape(printable(title)),
        "mark": MARK,
        "style": style,
        "program": program,
        "style_hash": _hash(style),
        "program_hash": _hash(program),
        "data": _json(data),
    }
    # One pass: what is put in may itself look like a place to put something.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], page).encode()


def _template(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Return the name of an inline style or script for a content security policy: nothing else may run in the page."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(data: Any) -> str:
    """Write JSON that cannot end the script element it stands in, with null for what is not finite."""
    text = strict_json.dumps(strict_json.plain(data, digits=6), separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# ----------------------------------------------------------------------------------------------- what is in it


class _Collected:
    """`data`: all that goes into the page, within `max_size`; `left_out`: what does not, for who makes it."""

    def __init__(self, acts: activations.Activations, images: str | os.PathLike[str] | None, max_size: int) -> None:
        self.acts = acts
        self.places = numbers.Places(acts, str(Path(images).absolute()) if images is not None else "")
        self.room = max_size - len(_page("x" * 300, {}))
        self.views = {name: view_of(acts[name], acts.input_size) for name in acts.layers}
        good = acts.rows()
        self.rows = _spread(good.tolist(), IMAGES)
        sampled = {name: numbers.sample(acts[name], _spread(self.rows, SAMPLED)) for name in acts.layers}
        self.layers = [self._layer(name, sampled[name]) for name in acts.layers]
        self.photos = Photos(acts, images)
        self.data: dict[str, Any] = {
            "run": numbers.run(acts),
            "input": acts.input_size,
            "geometry": self.photos.geometry,
            "failures": numbers.failures(acts, self.places),
            "layers": self.layers,
            "keys": {},
            "photos": {},
            "maps": {},
            "left_out": [],
        }
        self._add_channels(max_size)
        self.room -= len(_json(self.data)) + 4000  # of which the sentences on what was left out need a part
        if self.room < 0:
            need = max_size - self.room
            raise ConfigError(f"--max-size {max_size:,}: the numbers of this run alone need {need:,} bytes")
        self._add_keys(self.rows)
        self._add_photos(self.room * 0.55)
        self._add_maps()
        self._add_photos(0)  # with what the maps left
        self._tell()

    def _layer(self, name: str, sampled: numbers.Sample) -> dict[str, Any]:
        layer, view = self.acts[name], self.views[name]
        return {**numbers.layer(layer, sampled), "view": view.as_json(), "channels": None}

    def _add_channels(self, max_size: int) -> None:
        """Add statistics and strongest images by channel: of all, or of as many per layer as a quarter has room for."""
        have = {name: numbers.channel_count(self.acts[name]) for name in self.acts.layers}
        room = max_size / 4
        while any(have.values()):
            most = _level(list(have.values()), room / numbers.BYTES_A_CHANNEL)
            rows: dict[int, None] = {}
            for name, entry in zip(self.acts.layers, self.layers, strict=True):
                made = numbers.channels(self.acts[name], _chosen(self.acts[name], min(most, have[name])), FEATURED)
                entry["channels"] = made.data if made else None
                rows |= dict.fromkeys(made.rows if made else ())
            self.data["keys"] = {row: self.places.key(row) for row in rows}
            # Keys may be long: they count.
            if len(_json([self.layers, self.data["keys"]])) < max_size / 2 or most == 0:
                self.named = list(rows)
                return
            room /= 2
        self.named = []

    def _add_keys(self, rows: Iterable[int]) -> None:
        for row in rows:
            if row not in self.data["keys"]:
                self._put(self.data["keys"], row, self.places.key(row))

    def _put(self, into: dict[Any, Any], key: Any, value: Any) -> bool:
        """Add it, and return whether there was room for it."""
        need = len(_json({str(key): value}))
        if need > self.room:
            return False
        into[key] = value
        self.room -= need
        return True

    def _add_photos(self, reserved: float) -> None:
        """Add the photos of images with maps, then of those that channels name, the featured channels first."""
        for row in dict.fromkeys([*self.rows, *self.named]):
            if row in self.data["photos"] or row in self.photos.missing:
                continue
            if self.room <= reserved + PHOTO:
                break
            if not self.data["photos"] and len(self.photos.missing) >= GIVE_UP:
                self.named = []
                break
            made = self.photos.thumbnail(row)
            if made is not None:
                self._put(self.data["photos"], row, made)

    def _add_maps(self) -> None:
        names = _spread([name for name in self.acts.layers if self.views[name].count], MAP_LAYERS)
        rows, most = self._affordable_maps(names)
        for name in names:
            view = self.views[name]
            fit = view.fit(most)
            view.choose(
                _chosen(self.acts[name], fit) if numbers.channel_count(self.acts[name]) == view.count else range(fit)
            )
        for name, entry in zip(self.acts.layers, self.layers, strict=True):
            entry["view"] = self.views[name].as_json()
        for row in rows:
            self.data["maps"].setdefault(row, {})
            for name in names:
                place = self.acts.layers.index(name)
                self._put(self.data["maps"][row], place, drawn(self.views[name], np.asarray(self.acts[name][row])))
        self.map_layers = names
        self.data["maps"] = {row: maps for row, maps in self.data["maps"].items() if maps}

    def _affordable_maps(self, names: Sequence[str]) -> tuple[list[int], int]:
        """Return the rows and maps per layer that the room left is enough for: a byte of the page per cell."""
        views = [self.views[name] for name in names]
        for images in sorted({min(n, len(self.rows)) for n in (24, 16, 12, 8, 6, 4, 3, 2, 1)}, reverse=True):
            for most in (MAPS, 48, 32, 24, 16, FEWEST_MAPS):
                if images * sum(view.fit(most) * view.bytes_a_map for view in views) <= self.room:
                    return _spread(self.rows, images), most
        return self.rows[:1], max(1, FEWEST_MAPS // 3)

    def _tell(self) -> None:
        self.left_out = list(self._sentences())
        self.data["left_out"] = [printable(self.places.sentence(sentence)) for sentence in self.left_out]

    def _sentences(self) -> Iterator[str]:
        good, shown = len(self.acts.rows()), len(self.data["maps"])
        if shown < good:
            yield f"maps of {good - shown:,} of {count(good, 'image')}: those shown are spread evenly over the rows"
        short = sum(1 for name in self.map_layers if self.views[name].shown_count < self.views[name].count)
        if short:
            how = "those shown vary most over the data set"
            yield f"some maps of {count(short, 'layer')} with many channels: {how}"
        missing = len(self.acts.layers) - len(self.map_layers)
        if missing:
            yield f"maps of {count(missing, 'layer')} of {len(self.acts.layers):,}"
        holes = sum(len(self.map_layers) - len(maps) for maps in self.data["maps"].values())
        if holes:
            yield f"{count(holes, 'picture')} of maps for which there was no room"
        few = sum(1 for e in self.layers if e["channels"] and e["channels"]["shown"] is not None)
        if few:
            yield f"the strongest images of some channels, in {count(few, 'layer')}"
        counts = [numbers.channel_count(self.acts[name]) for name in self.acts.layers]
        none = sum(1 for n, entry in zip(counts, self.layers, strict=True) if n and not entry["channels"])
        if none:
            yield f"the channels of {count(none, 'layer')}: no room"
        bare = counts.count(0)
        if bare:
            yield f"statistics of channels for {count(bare, 'layer')} whose channel axis is not known"
        if self.photos.missing:
            yield self.photos.told()
        wanted = len(set(self.rows) | set(self.named)) - len(self.photos.missing)
        if wanted > len(self.data["photos"]):
            yield f"{wanted - len(self.data['photos']):,} of {count(wanted, 'photo')}: no room"
        failed = int(np.count_nonzero(self.acts.status))
        if failed > len(self.data["failures"]):
            yield f"{failed - len(self.data['failures']):,} of {count(failed, 'failure')}: the file holds them all"


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most `most` of the items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / max(1, most - 1))] for i in range(most)]


def _level(sizes: Sequence[int], room: float) -> int:
    """Return the largest number such that, with each size cut to it, all of them together fit into `room`."""
    low, high = 0, max(sizes, default=0)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sum(min(size, middle) for size in sizes) <= room else (low, middle - 1)
    return low


def _chosen(layer: Layer, most: int) -> list[int]:
    """Return the numbers of the `most` channels that vary most over the data set, ascending."""
    spread = numbers.spread_of_channels(layer)
    return sorted(np.argsort(-spread, kind="stable")[:most].tolist())
