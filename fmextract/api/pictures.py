"""Pictures: the five `show_…` functions. They need matplotlib, the extra `look`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from fmextract.errors import ConfigError
from fmextract.options import (
    MAP_DEFAULTS,
    HowToPreprocess,
    MapOptions,
    PathLike,
    Size,
    Theme,
    Unpack,
    as_parameters,
    listed,
    with_options,
    written_size,
)

if TYPE_CHECKING:
    import torch

    from fmextract.api.files import Output
    from fmextract.visual.depth import LayerDepth
    from fmextract.visual.filters import Filters
    from fmextract.visual.maps import MapPicture
    from fmextract.visual.top import Example
    from fmextract.visual.where import Where


def show_filters(
    model: str | torch.nn.Module,
    layer: str,
    out: PathLike,
    *,
    weights: str = "default",
    preprocess: HowToPreprocess = "model",
    size: Size = None,
    image: PathLike | None = None,
    count: int | None = None,
    order: Literal["index", "norm"] = "index",
    filters: Sequence[int] = (),
    inputs: str | tuple[int, int] | None = None,
    scale: Literal["each", "shared"] = "each",
    theme: Theme = "dark",
    dpi: int = 150,
    cmap: str | None = None,
) -> Filters:
    """Draw the kernels of a convolution: in colour where there are three input channels, else one row per filter.

    Mid-grey is zero.

    Args:
        model: As in `extract`.
        layer: A convolution: its path, or a selector as `"conv#0"`.
        out: The picture: .png, .pdf or .svg.
        weights: As in `extract`.
        preprocess: As in `extract`, for `image`.
        size: As in `extract`, for `image`.
        image: A photo: each kernel is drawn beside it and the map it makes of it.
        count: How many filters. None: 64 in colour, else 16.
        order: The first, or those with the largest L2 norm.
        filters: Filters by number, instead of `count` and `order`.
        inputs: Input channels, (first, last + 1) or `"0:16"`. None: 0 to 16; in colour where there are 3.
        scale: Black to white for each filter, or for all.
        theme: Of the picture; light for paper.
        dpi: Pixels per inch.
        cmap: A colour map of matplotlib. None: gray.

    Returns:
        The picture's path and what is drawn in it.

    Raises:
        LayerError: For a layer that is no two-dimensional convolution.
        ModelError: For a model that cannot be built.
        MissingExtra: Without matplotlib.

    Examples:
        >>> drawn = fm.show_filters("shufflenet_v2_x0_5", "conv#0", "filters.png", weights="random:0", count=8)
        >>> drawn.layer, drawn.filters
        ('conv1.0', (0, 1, 2, 3, 4, 5, 6, 7))
    """
    from fmextract.visual import canvas
    from fmextract.visual import filters as drawing

    return drawing.show_filters(
        model,
        layer,
        out,
        weights=weights,
        preprocess=preprocess,
        size=written_size(size),
        image=image,
        count=count,
        order=order,
        filters=filters,
        inputs=drawing.parse_slice(inputs) if isinstance(inputs, str) else inputs,
        scale=scale,
        style=canvas.Style(theme, dpi, cmap),
    )


@overload
def show_maps(
    acts: Output, image: str, out: PathLike, *, images: PathLike | None = None, **options: Unpack[MapOptions]
) -> list[MapPicture]: ...


@overload
def show_maps(
    *,
    out: PathLike,
    model: str | torch.nn.Module,
    input: PathLike,
    weights: str = "default",
    preprocess: HowToPreprocess = "model",
    size: Size = None,
    **options: Unpack[MapOptions],
) -> list[MapPicture]: ...


def show_maps(
    acts: Output | None = None,
    image: str | None = None,
    out: PathLike = "",
    *,
    images: PathLike | None = None,
    model: str | torch.nn.Module | None = None,
    input: PathLike | None = None,
    weights: str = "default",
    preprocess: HowToPreprocess = "model",
    size: Size = None,
    **options: Unpack[MapOptions],
) -> list[MapPicture]:
    """Draw an image beside its feature maps: from an output, or straight from a model (`model`, `input`).

    Tokens are shown on their patch grid, the class token and registers apart.

    Args:
        acts: A path, or what `open` returned.
        image: The image, by its key in the output.
        out: A folder, for one picture per layer; or name.png (.pdf, .svg) for all in one.
        images: The folder where the photos are now. None: where the run found them.
        model: Run this model instead of reading an output, as in `extract`.
        input: The photo to run, a file, with `model`.
        weights: With `model`, as in `extract`.
        preprocess: With `model`, as in `extract`.
        size: With `model`, as in `extract`.
        **options: See `MapOptions`.

    Returns:
        One entry per layer: the picture's path, and which channels are drawn.

    Raises:
        ConfigError: For an image, layer or channel that is not there, and for a photo that is not found.
        MissingExtra: Without matplotlib.

    Examples:
        >>> drawn = fm.show_maps("acts.h5", "a.png", "maps/", layers="conv5", count=4)
        >>> drawn[0].layer, len(drawn[0].channels)
        ('conv5', 4)
        >>> drawn = fm.show_maps(model="shufflenet_v2_x0_5", input="photos/a.png", out="maps.png", layers="conv5",
        ...                      weights="random:0")
    """
    from fmextract.visual import canvas

    drawing: dict[str, Any] = {**MAP_DEFAULTS, **options}
    unknown = sorted(set(drawing) - set(MAP_DEFAULTS))
    if unknown:
        raise TypeError(f"show_maps() got an unexpected keyword argument {unknown[0]!r}")
    drawing["layers"] = listed(drawing["layers"])
    drawing["style"] = canvas.Style(drawing.pop("theme"), drawing.pop("dpi"), drawing.pop("cmap"))
    if not str(out):
        raise ConfigError("show_maps: give out=, a folder or the name of a picture")
    if model is not None and input is not None and acts is None and image is None:
        from fmextract.visual.live import show_maps_of

        return show_maps_of(
            model, input, out, weights=weights, preprocess=preprocess, size=written_size(size), **drawing
        )
    if acts is None or image is None or model is not None or input is not None:
        raise ConfigError("give either an output and the key of an image in it, or model= and input=")
    from fmextract.reading.opened import opened
    from fmextract.visual import maps

    with opened(acts) as stored:
        return maps.show_maps(stored, image, out, images=images, **drawing)


def show_depth(
    acts: Output,
    out: PathLike | None = None,
    *,
    layers: Sequence[str] | str | None = None,
    theme: Theme = "dark",
    dpi: int = 150,
) -> list[LayerDepth]:
    """Say how sparse and alive each layer is, in the order of execution, and draw it.

    From the statistics that the run kept, over all images. The effective dimension is the participation ratio of the
    channels' covariance (P. Gao et al., "A theory of multineuronal dimensionality, dynamics and measurement", 2017).

    Args:
        acts: A path, or what `open` returned.
        out: A picture to draw of it: .png, .pdf or .svg. None: only the numbers.
        layers: Names or selectors. None: all.
        theme: Of the picture; light for paper.
        dpi: Pixels per inch.

    Returns:
        One entry per layer: the share of zeros, the number of dead channels, effective dimension, mean, spread, range.

    Raises:
        ConfigError: Where no layer has statistics.
        MissingExtra: Without matplotlib, where `out` is given.

    Examples:
        >>> [(one.layer, one.channels, one.zeros > 0) for one in fm.show_depth("acts.h5", "depth.png")]
        [('conv1', 24, True), ('conv5', 1024, True)]
    """
    from fmextract.reading.opened import opened
    from fmextract.visual import canvas, depth

    with opened(acts) as stored:
        if out is None:
            return depth.measure_depth(stored, listed(layers))
        return depth.show_depth(stored, out, layers=listed(layers), style=canvas.Style(theme, dpi))[1]


def show_top(
    acts: Output,
    layer: str,
    channels: Sequence[int] | int,
    out: PathLike,
    *,
    k: int = 9,
    images: PathLike | None = None,
    theme: Theme = "dark",
    dpi: int = 150,
) -> list[Example]:
    """Draw the images that drive a channel hardest, with a box around what the cell that did it looks at.

    The box is the effective receptive field where the output has it (W. Luo et al., "Understanding the Effective
    Receptive Field in Deep Convolutional Neural Networks", NeurIPS 2016), the theoretical one dashed.

    Args:
        acts: A path, or what `open` returned.
        layer: A layer of the output, by its name.
        channels: A channel by its number, or several.
        out: The picture: .png, .pdf or .svg.
        k: Images per channel, as many as were kept (`top_k`).
        images: The folder where the photos are now. None: where the run found them.
        theme: Of the picture; light for paper.
        dpi: Pixels per inch.

    Returns:
        One entry per channel and image: its key, row and value, the cell (y, x), and its box in the photo, in pixels.

    Raises:
        ConfigError: For a layer or channel that is not there, and for a photo that is not found.
        MissingExtra: Without matplotlib.

    Examples:
        >>> found = fm.show_top("acts.h5", "conv5", 17, "top.png", k=2)
        >>> [(one.channel, one.key in "a.png b.png c.png d.png") for one in found]
        [(17, True), (17, True)]
    """
    from fmextract.reading.opened import opened
    from fmextract.visual import canvas, top

    numbers = [channels] if isinstance(channels, int) else list(channels)
    with opened(acts) as stored:
        return top.show_top(stored, layer, numbers, out, k=k, images=images, style=canvas.Style(theme, dpi))


def show_where(
    acts: Output,
    image: str,
    layer: str,
    out: PathLike,
    *,
    k: int = 5,
    images: PathLike | None = None,
    theme: Theme = "dark",
    dpi: int = 150,
    cmap: str | None = None,
) -> Where:
    """Draw where in an image a layer is strongest: the region of each of its strongest channels, and all of them.

    Args:
        acts: A path, or what `open` returned.
        image: The image, by its key in the output.
        layer: A layer of the output, by its name.
        out: The picture: .png, .pdf or .svg.
        k: How many channels.
        images: The folder where the photos are now. None: where the run found them.
        theme: Of the picture; light for paper.
        dpi: Pixels per inch.
        cmap: A colour map of matplotlib. None: magma.

    Returns:
        The strongest channels, each with its cell (y, x) and its box in the photo, in pixels; and the sum over all
        channels, float (y, x).

    Raises:
        ConfigError: For an image or layer that is not there, and for a photo that is not found.
        MissingExtra: Without matplotlib.

    Examples:
        >>> found = fm.show_where("acts.h5", "a.png", "conv5", "where.png", k=3)
        >>> len(found.peaks), found.heat.shape
        (3, (7, 7))
    """
    from fmextract.reading.opened import opened
    from fmextract.visual import canvas, where

    with opened(acts) as stored:
        return where.show_where(stored, image, layer, out, k=k, images=images, style=canvas.Style(theme, dpi, cmap))


with_options(show_maps, as_parameters(MapOptions, MAP_DEFAULTS.__getitem__))
