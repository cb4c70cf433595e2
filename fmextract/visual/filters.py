"""Draw the kernels of a convolution. Imports torch, since it builds the model."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from fmextract.capture import resolve, survey
from fmextract.common.text import shape
from fmextract.errors import ConfigError, LayerError
from fmextract.model import loading
from fmextract.options import HowToPreprocess
from fmextract.run import describe
from fmextract.visual import canvas
from fmextract.visual.canvas import Array, Style, short, styled
from fmextract.visual.live import activations_of
from fmextract.visual.photos import as_seen, load_photo
from fmextract.visual.places import read_maps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOUR = 3
"""Input channels of a kernel that is shown in colour: red, green, blue."""


@dataclass(frozen=True, slots=True)
class Filters:
    """Kernels of a convolution as they were drawn.

    `weights` is (filters, input channels, height, width), those shown: `filters` and `inputs` are their numbers. `low`
    and `high` are the values that are drawn as black and white, one per filter.
    """

    picture: Path
    layer: str
    shape: tuple[int, ...]
    filters: tuple[int, ...]
    inputs: tuple[int, ...]
    weights: Array = field(repr=False)
    low: Array = field(repr=False)
    high: Array = field(repr=False)
    maps: Array | None = field(default=None, repr=False)

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON, without the values."""
        return {
            "picture": str(self.picture),
            "layer": self.layer,
            "shape": list(self.shape),
            "inputs": list(self.inputs),
            "filters": [
                {"filter": number, "norm": float(np.linalg.norm(kernel)), "low": float(low), "high": float(high)}
                for number, kernel, low, high in zip(self.filters, self.weights, self.low, self.high, strict=True)
            ],
        }


@styled
def show_filters(
    model: str | nn.Module,
    layer: str,
    out: str | os.PathLike[str],
    *,
    weights: str = "default",
    preprocess: HowToPreprocess = "model",
    size: str | int | None = None,
    image: str | os.PathLike[str] | None = None,
    count: int | None = None,
    order: str = "index",
    filters: Sequence[int] = (),
    inputs: tuple[int, int] | None = None,
    scale: str = "each",
    style: Style = canvas.PLAIN,
) -> Filters:
    """Draw the kernels of a convolution into `out` (.png, .pdf, .svg).

    `layer` is its path or a selector (`conv#0`). Kernels with three input channels are drawn in colour, as a grid;
    others as one row per filter, one column per input channel of the slice `inputs` (first, last + 1; 0 to 16 if
    None). Shown are the first `count` filters, those with the largest norm (`order` index or norm), or the `filters`
    given. Mid-grey is zero; `scale`: each filter reaches black or white, or only the strongest of all (shared). With
    `image`, a file, each filter is drawn beside the photo and the map that it makes of it.

    Raises LayerError for a layer that is no two-dimensional convolution, ConfigError, ModelError, MissingExtra.
    """
    loaded = loading.load_model(model, weights, preprocess, size, without_photos=image is None)
    path, kernels, words = _kernels(loaded, layer, None if size is None else str(size))
    numbers = _pick(kernels, count or (64 if image is None and kernels.shape[1] == COLOUR else 16), order, filters)
    coloured = kernels.shape[1] == COLOUR and inputs is None
    columns = range(*_slice(inputs, kernels.shape[1])) if not coloured else range(COLOUR)
    if image is not None:
        numbers = numbers[: count or 4]
    chosen = kernels[numbers][:, list(columns)]
    most = np.abs(chosen).reshape(len(chosen), -1).max(1)
    if scale == "shared":
        most = np.full_like(most, most.max())
    elif scale != "each":
        raise ConfigError(f"unknown scale {scale!r}: expected each or shared")
    tiles = _coloured(chosen, most) if coloured else _grey(chosen, most)
    title = "  ·  ".join((*words, f"{shape(kernels.shape)}  (filters, input channels, height, width)"))
    maps = None
    if image is not None:
        figure, maps = _beside(loaded, path, image, numbers, tiles, coloured)
    elif coloured:
        figure = _in_grid(tiles, numbers)
    else:
        figure = _in_rows(tiles, numbers, columns)
    _frame(figure, path, title, float(most[0]), scale, coloured)
    picture = canvas.save(figure, out)
    return Filters(picture, path, kernels.shape, tuple(numbers), tuple(columns), chosen, -most, most, maps)


def parse_slice(text: str | None) -> tuple[int, int] | None:
    """Read `0:16` as (0, 16), and None as None. Raises ConfigError."""
    if text is None:
        return None
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal()):
        raise ConfigError(f"expected input channels as 0:16, got {text!r}")
    return int(first), int(last)


def _kernels(loaded: loading.LoadedModel, layer: str, size: str | None) -> tuple[str, Array, list[str]]:
    """Return a convolution's path, weights, float32 (filters, input channels, height, width), and numbers."""
    modules = dict(loaded.module.named_modules())
    path, words = _found(loaded, layer, size, modules)
    module = modules[path]
    weight = getattr(module, "weight", None)
    weight = weight() if callable(weight) else weight  # a quantized module's is a method
    if not isinstance(weight, torch.Tensor) or weight.ndim != 4:
        convolutions = [name for name, one in modules.items() if getattr(getattr(one, "weight", None), "ndim", 0) == 4]
        inside = [name for name in convolutions if name.startswith(f"{path}.")]
        close = (inside or difflib.get_close_matches(path, convolutions, n=3) or convolutions)[:3]
        raise LayerError(
            f"{path} is a {type(module).__name__}, no two-dimensional convolution. The closest: {', '.join(close)}"
        )
    values = weight.dequantize() if weight.is_quantized else weight
    kernels: Array = values.detach().float().cpu().numpy()
    transposed = isinstance(module, nn.ConvTranspose2d)  # which has its input channels first
    return path, kernels.transpose(1, 0, 2, 3) if transposed else kernels, words


def _found(
    loaded: loading.LoadedModel, layer: str, size: str | None, modules: dict[str, nn.Module]
) -> tuple[str, list[str]]:
    """Return the module that a path or selector means, and its numbers, by a pass that shows the order of execution."""
    try:
        seen = _survey(loaded, layer, size)
    except (ConfigError, LayerError):
        if layer not in modules:
            raise
        return layer, []  # whether or not the network runs, its kernels are there
    path = layer
    if layer not in modules:
        named = list(dict.fromkeys(tap.module for tap in resolve.resolve([layer], seen)))
        if len(named) > 1:
            raise LayerError(f"{layer!r} matches {len(named)} modules: name one of {', '.join(named[:6])}")
        path = named[0]
    return path, seen.numbers.get(seen.aliases.get(path, path), "").split()


def _survey(loaded: loading.LoadedModel, layer: str, size: str | None) -> survey.Survey:
    shape = describe.input_shape(loaded, size)
    if shape is None:
        raise ConfigError(f"{layer!r} is found by a forward pass, whose input size is not known: give --size N")
    return describe.survey_model(loaded, shape)


def _pick(kernels: Array, count: int, order: str, chosen: Sequence[int]) -> list[int]:
    for number in chosen:
        if not 0 <= number < len(kernels):
            raise ConfigError(f"there are the filters 0 to {len(kernels) - 1}, and no filter {number}")
    if chosen:
        return list(chosen)
    if order == "index":
        return list(range(min(count, len(kernels))))
    if order != "norm":
        raise ConfigError(f"unknown order {order!r}: expected index or norm")
    norms = np.linalg.norm(kernels.reshape(len(kernels), -1), axis=1)
    return [int(i) for i in np.argsort(-norms, kind="stable")[:count]]


def _slice(inputs: tuple[int, int] | None, channels: int) -> tuple[int, int]:
    first, last = inputs or (0, min(16, channels))
    if not 0 <= first < last <= channels:
        raise ConfigError(f"expected input channels within 0:{channels}, got {first}:{last}")
    return first, last


def _coloured(kernels: Array, most: Array) -> list[Array]:
    """Draw kernels (n, 3, y, x) as pixels (y, x, 3): zero is mid-grey, `most` full colour."""
    scaled = kernels / np.where(most, most, 1)[:, None, None, None] / 2 + 0.5
    pixels: Array = np.rint(scaled.transpose(0, 2, 3, 1) * 255).astype(np.uint8)
    return list(pixels)


def _grey(kernels: Array, most: Array) -> list[Array]:
    """Draw kernels (n, m, y, x) as n times m tiles."""
    return [
        canvas.paint(kernel, -end, end, canvas.GREYS) for row, end in zip(kernels, most, strict=True) for kernel in row
    ]


# ---------------------------------------------------------------------------------------------------- drawing


def _in_grid(tiles: Sequence[Array], numbers: Sequence[int]) -> Figure:
    least = math.ceil(math.sqrt(len(tiles)))
    columns = next((n for n in range(least, least * 3 // 2 + 1) if len(tiles) % n == 0), least)
    figure = canvas.figure(8.4, 0.9 + 7.4 * math.ceil(len(tiles) / columns) / columns + 0.15)
    axis = figure.add_axes((0.03, 0.02, 0.86, 1 - 0.92 / figure.get_figheight()), anchor="NW")
    canvas.show_tiles(axis, tiles, [str(number) for number in numbers], columns)
    return figure


def _in_rows(tiles: Sequence[Array], numbers: Sequence[int], inputs: range) -> Figure:
    """Draw one row per filter, its number before it; the numbers of the input channels above."""
    lines, columns = len(numbers), len(inputs)
    side = min(0.55, 8 / max(columns, 4))
    width = max(8.4, side * columns + 2.2)
    figure = canvas.figure(width, 1.35 + side * lines)
    height = figure.get_figheight()
    axis = figure.add_axes((0.9 / width, 0.15 / height, side * columns / width, side * lines / height), anchor="NW")
    axis.set_facecolor(canvas.theme().background)
    axis.imshow(canvas.mosaic(tiles, columns), interpolation="none", aspect="auto")
    step = canvas.CELL + canvas.GAP
    axis.set_yticks([(i + 0.5) * step for i in range(lines)], [f"filter {n}" for n in numbers])
    every = max(1, math.ceil(columns / 16))
    axis.set_xticks([(i + 0.5) * step for i in range(0, columns, every)], [str(n) for n in inputs[::every]])
    axis.xaxis.tick_top()
    axis.tick_params(length=0, colors=canvas.theme().faint, labelsize=8)
    for spine in axis.spines.values():
        spine.set_visible(False)
    return figure


def _beside(
    loaded: loading.LoadedModel,
    path: str,
    image: str | os.PathLike[str],
    numbers: Sequence[int],
    tiles: Sequence[Array],
    coloured: bool,
) -> tuple[Figure, Array]:
    """Draw kernel, photo and map, one row per filter. Returns the maps (n, y, x)."""
    with activations_of([image], loaded.module, [path], preprocess=loaded.preprocess) as acts:
        layer = acts[acts.layers[0]]
        maps = read_maps(acts, layer, 0).values[list(numbers)]
        photo = as_seen(load_photo(acts, 0), acts.preprocess)
        key = str(acts.keys[0])
    side = 2.1
    height = 0.9 + side * len(numbers)
    figure = canvas.figure(8.4, height)
    each = len(tiles) // len(numbers)
    for i, number in enumerate(numbers):
        kernel = tiles[i] if coloured else canvas.mosaic(tiles[i * each : (i + 1) * each], math.ceil(math.sqrt(each)))
        pictures = (kernel, np.asarray(photo), canvas.paint(maps[i], *canvas.value_range(maps[i])))
        words = (f"filter {number}", short(Path(key).name, 26), f"map {number}")
        for j, (pixels, text) in enumerate(zip(pictures, words, strict=True)):
            bottom = (height - 0.9 - side * (i + 1) + 0.05) / height
            axis = figure.add_axes((0.03 + 0.29 * j, bottom, 0.27, (side - 0.32) / height), anchor="W")
            axis.imshow(pixels, interpolation="lanczos" if j == 1 else "none")
            axis.set_axis_off()
            axis.set_title(text, color=canvas.theme().faint, size=9, loc="left", pad=3)
    return figure, maps


def _frame(figure: Figure, path: str, title: str, most: float, scale: str, coloured: bool) -> None:
    """Write the title above, and at the right what dark and bright mean."""
    width, height = figure.get_size_inches()
    canvas.heading(figure, path, title, (0.25, width - 0.25, 0.35))
    tall = min(3.0, height - 1.5)
    place = (1 - 0.66 / width, 1 - (0.98 + tall) / height, 0.13 / width, tall / height)
    bar = figure.add_axes(place)
    canvas.colour_bar(bar, -most, most, "weight", canvas.GREYS)
    if scale == "each":
        bar.set_yticks([0, 0.5, 1], ["−max", "0", "+max"])
        bar.set_title("of each", color=canvas.theme().faint, size=8, pad=6, loc="left")
    if coloured:
        bar.set_xlabel("R, G, B", color=canvas.theme().faint, size=8)
