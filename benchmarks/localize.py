"""Does the strongest region of a layer hit the object? Photos pasted on backgrounds, and real photos, against chance.

Each scene is a photo shrunk to a square somewhere on a texture. A hit: the centre of the box that `show where` gives
for the layer's hottest cell lies in the square. Chance is the share of the scene that the square covers.

The real photos are the six of the demo that have one clear object, whose boxes were drawn by hand; there chance is the
share of what the network sees that the object's box covers. Six are few: they show that it is no matter of pasting.

    python benchmarks/localize.py [--scenes 120]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import fmextract
from fmextract.common import sample_photos
from fmextract.common.boxes import Box, photo_box
from fmextract.common.progress import Quiet
from fmextract.reading.activations import Activations
from fmextract.visual import where

OBJECTS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "coins.png")
BACKGROUNDS = ("grass.png", "brick.png", "moon.png")
SCENE, SQUARE = 224, 72
DRAWN = {
    "astronaut.png": (16, 24, 512, 364),
    "camera.png": (64, 0, 512, 335),
    "chelsea.png": (0, 0, 300, 398),
    "coffee.png": (16, 79, 392, 480),
    "motorcycle_left.png": (107, 92, 456, 686),
    "rocket.jpg": (122, 301, 415, 340),
}
"""The one object of a photo: (top, left, bottom, right) in its pixels, drawn by hand."""
LAYERS = ["blocks.2", "blocks.3", "blocks.4", "blocks.5", "blocks.6", "bn2.act"]


def scenes(photos: Path, folder: Path, count: int) -> dict[str, tuple[int, int]]:
    """Write `count` scenes; {key: (y, x) of the square's corner}."""
    random = np.random.default_rng(0)
    folder.mkdir()
    corners = {}
    for i in range(count):
        back = Image.open(photos / BACKGROUNDS[i % len(BACKGROUNDS)]).convert("RGB").resize((SCENE, SCENE))
        thing = Image.open(photos / OBJECTS[i % len(OBJECTS)]).convert("RGB")
        side = min(thing.size)
        left, top = (thing.width - side) // 2, (thing.height - side) // 2
        thing = thing.crop((left, top, left + side, top + side)).resize((SQUARE, SQUARE))
        y, x = (int(v) for v in random.integers(0, SCENE - SQUARE + 1, 2))
        back.paste(thing, (x, y))
        back.save(folder / f"{i:03}.png")
        corners[f"{i:03}.png"] = (y, x)
    return corners


def hit(acts: Activations, key: str, layer: str, target: Box) -> tuple[bool, bool]:
    """Whether the hottest cell, and the strongest channel, point into `target`, in pixels of the photo."""
    found = where.localize(acts, key, layer, 1)
    row = acts.row(key)
    size = int(acts.heights[row]), int(acts.widths[row])
    inside = []
    for seen in (found.hottest.box, found.peaks[0].region.box):
        box = photo_box(seen, acts.preprocess, size)
        assert box is not None
        y, x = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        inside.append(target[0] <= y < target[2] and target[1] <= x < target[3])
    return inside[0], inside[1]


def shares(acts: Activations, targets: Mapping[str, Box]) -> dict[str, list[float]]:
    """By layer, the share of images whose hottest cell, and strongest channel, hit."""
    hits = {layer: [hit(acts, key, layer, target) for key, target in targets.items()] for layer in LAYERS}
    return {layer: np.mean(those, axis=0).round(3).tolist() for layer, those in hits.items()}


def chances(acts: Activations, targets: Mapping[str, Box]) -> tuple[float, float]:
    """(share of what the network sees that the targets cover, share of images whose middle lies in the target)."""
    covered, middle = [], []
    for key, target in targets.items():
        row = acts.row(key)
        size = int(acts.heights[row]), int(acts.widths[row])
        whole = acts.input_size
        assert whole is not None
        seen = photo_box((0, 0, *whole), acts.preprocess, size)
        assert seen is not None
        sides = [max(0.0, min(seen[i + 2], target[i + 2]) - max(seen[i], target[i])) for i in (0, 1)]
        covered.append(sides[0] * sides[1] / ((seen[2] - seen[0]) * (seen[3] - seen[1])))
        centre = [(seen[i] + seen[i + 2]) / 2 for i in (0, 1)]
        middle.append(all(target[i] <= centre[i] < target[i + 2] for i in (0, 1)))
    return float(np.mean(covered)), float(np.mean(middle))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--scenes", type=int, default=120)
    count = options.parse_args().scenes
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        photos = sample_photos.copy_photos(root / "photos")
        corners = scenes(photos, root / "scenes", count)
        squares = {key: (y, x, y + SQUARE, x + SQUARE) for key, (y, x) in corners.items()}
        whole = {"preprocess": "size=224,crop=224,mean=0.498,std=0.502"}
        found = {
            "scenes": measured(root / "scenes", root / "scenes.h5", squares, **whole),
            "photos": measured(photos, root / "photos.h5", DRAWN),
        }
    print(json.dumps(found, indent=1))


def measured(images: Path, out: Path, targets: Mapping[str, Box], **options: Any) -> dict[str, Any]:
    """What a run over `images` points at, against chance."""
    options |= {"layers": LAYERS, "batch_size": 4, "precision": "fp32", "effective_fields": "always"}
    with fmextract.extract(str(images), "fmextract.demo:model", out, progress=Quiet(), **options) as acts:
        chance, middle = chances(acts, targets)
        return {
            "images": len(targets),
            "chance": round(chance, 3),
            "middle": round(middle, 3),
            "hottest cell, strongest channel": shares(acts, targets),
        }


if __name__ == "__main__":
    main()
