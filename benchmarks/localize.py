"""Does the strongest region of a layer hit the object? Photos pasted on backgrounds, against chance.

Each scene is a photo shrunk to a square somewhere on a texture. A hit: the centre of the box that `show where` gives
for the layer's hottest cell lies in the square. Chance is the share of the scene that the square covers.

    python benchmarks/localize.py [--scenes 120]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import fmextract
from fmextract import demo, look
from fmextract.progress import Quiet
from fmextract.reader import Activations

OBJECTS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "coins.png")
BACKGROUNDS = ("grass.png", "brick.png", "moon.png")
SCENE, SQUARE = 224, 72
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


def hit(acts: Activations, key: str, layer: str, corner: tuple[int, int]) -> tuple[bool, bool]:
    """Whether the hottest cell, and the strongest channel, point into the square."""
    found = look.where(acts, key, layer, 1)
    inside = []
    for box in (found.hottest.box, found.peaks[0].region.box):
        y, x = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        inside.append(corner[0] <= y < corner[0] + SQUARE and corner[1] <= x < corner[1] + SQUARE)
    return inside[0], inside[1]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--scenes", type=int, default=120)
    count = options.parse_args().scenes
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        corners = scenes(demo.copy_photos(root / "photos"), root / "scenes", count)
        run = {"preprocess": "size=224,crop=224,mean=0.498,std=0.502", "precision": "fp32", "progress": Quiet()}
        with fmextract.extract(
            str(root / "scenes"), "fmextract.demo:model", root / "acts.h5", layers=LAYERS, batch_size=8, **run
        ) as acts:
            shares = {
                layer: np.mean([hit(acts, key, layer, corner) for key, corner in corners.items()], axis=0).tolist()
                for layer in LAYERS
            }
    print(json.dumps({"scenes": count, "chance": (SQUARE / SCENE) ** 2, "hottest cell, strongest channel": shares}))


if __name__ == "__main__":
    main()
