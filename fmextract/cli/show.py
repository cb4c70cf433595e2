"""`fmextract show`: pictures of filters, maps, depth, strongest images and where they look."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fmextract.cli import tables
from fmextract.cli.app import _show, working
from fmextract.cli.command import command
from fmextract.cli.options import (
    Cmap,
    Dpi,
    File,
    Images,
    Json,
    Model,
    OneLayer,
    Picture,
    Preprocessing,
    Size,
    Stored,
    Theme,
    Weights,
    _option,
    _style,
)
from fmextract.common import text

# ---------------------------------------------------------------------------------------------------- pictures

show = typer.Typer(
    help="Draw filters, feature maps, depth, strongest images and where they look.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@command(show, "filters")
def show_filters(
    model: Model,
    layer: Annotated[str, _option("--layer", "-l", metavar="SELECTOR", help="A convolution: its path, or conv#N.")],
    out: Picture,
    weights: Weights = "default",
    preprocess: Preprocessing = None,
    size: Size = None,
    image: Annotated[
        Path | None, _option("--image", metavar="FILE", help="Draw each kernel beside this photo and the map it makes.")
    ] = None,
    count: Annotated[
        int | None, _option("--count", metavar="N", help="How many filters. [default: 64 in colour, else 16]")
    ] = None,
    order: Annotated[
        str, _option("--order", metavar="index|norm", help="The first, or the largest. [default: index]")
    ] = "index",
    filters: Annotated[
        list[int] | None, _option("--filter", metavar="N", help="A filter by its number; repeatable.")
    ] = None,
    inputs: Annotated[
        str | None,
        _option("--inputs", metavar="A:B", help="Input channels from A to B - 1. [default: 0:16; colour where 3]"),
    ] = None,
    scale: Annotated[
        str,
        _option("--scale", metavar="each|shared", help="Black to white for each filter, or for all. [default: each]"),
    ] = "each",
    theme: Theme = "dark",
    dpi: Dpi = 150,
    cmap: Cmap = None,
    as_json: Json = False,
) -> int:
    """Draw the kernels of a convolution.

    In colour where there are three input channels, else one row a filter. Mid-grey is zero.

    fmextract show filters -m resnet50 -l conv1 -o filters.png
    """
    with working():
        from fmextract.visual import filters as drawing

        made = drawing.show_filters(
            model,
            layer,
            out,
            weights=weights,
            preprocess=preprocess or "model",
            size=size,
            image=image,
            count=count,
            order=order,
            filters=filters or (),
            inputs=drawing.parse_slice(inputs),
            scale=scale,
            style=_style(theme, dpi, cmap),
        )
    _show(made.as_json(), lambda: text.printable(made.picture), as_json)
    return 0


@command(show, "maps")
def show_maps(
    out: Annotated[
        Path, _option("--out", "-o", metavar="OUT", help="A folder, one picture a layer; or name.png for all in one.")
    ],
    acts: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="What `extract` made; or --model and --input.", show_default=False),
    ] = None,
    image: Annotated[str | None, _option("--image", metavar="KEY", help="The image, by its key in the file.")] = None,
    layers: Stored = None,
    images: Images = None,
    model: Annotated[
        str | None, _option("--model", "-m", metavar="MODEL", help="Run this model, instead of reading a file.")
    ] = None,
    input: Annotated[Path | None, _option("--input", metavar="FILE", help="The photo to run, with --model.")] = None,
    weights: Weights = "default",
    preprocess: Preprocessing = None,
    size: Size = None,
    count: Annotated[int, _option("--count", metavar="N", help="Channels a layer. [default: 16]")] = 16,
    order: Annotated[
        str,
        _option(
            "--order",
            metavar="strongest|first",
            help="Channels that vary most over this image, or the first. [default: strongest]",
        ),
    ] = "strongest",
    channels: Annotated[
        list[int] | None, _option("--channel", metavar="N", help="A channel by its number; repeatable.")
    ] = None,
    scale: Annotated[
        str, _option("--scale", metavar="each|shared", help="Dark to bright for each map, or for all. [default: each]")
    ] = "each",
    overlay: Annotated[
        bool, _option("--overlay", help="Lay the maps over the photo, each cell where it looks.")
    ] = False,
    kind: Annotated[
        str | None, _option("--format", metavar="png|pdf|svg", help="Of the pictures in a folder. [default: png]")
    ] = None,
    theme: Theme = "dark",
    dpi: Dpi = 150,
    cmap: Cmap = None,
    as_json: Json = False,
) -> int:
    """Draw an image beside its feature maps.

    From a file, or straight from a model (--model, --input). Tokens are shown on their patch grid.

    fmextract show maps acts.h5 --image cats/tom.jpg -l 'conv#0' -l 'layer*' -o maps/
    """
    drawing: dict[str, Any] = {"count": count, "order": order, "channels": channels or (), "scale": scale}
    drawing |= {"overlay": overlay, "format": kind, "layers": layers or ()}
    with working():
        from fmextract.reading import activations
        from fmextract.visual import live, maps

        drawing["style"] = _style(theme, dpi, cmap)

        if model is not None and input is not None and acts is None:
            how: dict[str, Any] = {"weights": weights, "preprocess": preprocess or "model", "size": size}
            made = live.show_maps_of(model, input, out, **how, **drawing)
        elif acts is not None and image is not None and model is None:
            with activations.open(acts) as stored:
                made = maps.show_maps(stored, image, out, images=images, **drawing)
        else:
            raise typer.BadParameter("give either a file and --image KEY, or --model MODEL and --input FILE")
    _show([one.as_json() for one in made], lambda: tables.paths(one.picture for one in made), as_json)
    return 0


@command(show, "depth")
def show_depth(
    acts: File,
    out: Annotated[
        Path | None, _option("--out", "-o", metavar="OUT", help="Draw it, too: name.png, name.pdf or name.svg.")
    ] = None,
    layers: Stored = None,
    theme: Theme = "dark",
    dpi: Dpi = 150,
    as_json: Json = False,
) -> int:
    """Say how sparse and alive each layer is, in the order of execution.

    From the statistics that the run kept, over all images.

    fmextract show depth acts.h5 -o depth.png
    """
    with working():
        from fmextract.reading import activations
        from fmextract.visual import depth

        with activations.open(acts) as stored:
            if out is None:
                rows = depth.measure_depth(stored, layers or ())
            else:
                _, rows = depth.show_depth(stored, out, layers=layers or (), style=_style(theme, dpi))
    _show([row.as_json() for row in rows], lambda: tables.depth(rows), as_json)
    return 0


@command(show, "top")
def show_top(
    acts: File,
    layer: OneLayer,
    channels: Annotated[list[int], _option("--channel", metavar="N", help="A channel by its number; repeatable.")],
    out: Picture,
    k: Annotated[int, _option("-k", metavar="K", help="Images a channel, as many as were kept. [default: 9]")] = 9,
    images: Images = None,
    theme: Theme = "dark",
    dpi: Dpi = 150,
    as_json: Json = False,
) -> int:
    """Draw the images that drive a channel hardest.

    Each with a box around what the cell that did it looks at, and that part of the photo.

    fmextract show top acts.h5 -l layer4 --channel 17 -o top.png
    """
    with working():
        from fmextract.reading import activations
        from fmextract.visual import top

        with activations.open(acts) as stored:
            found = top.show_top(stored, layer, channels, out, k=k, images=images, style=_style(theme, dpi))
    _show(top.top_picture(out, found), lambda: tables.examples(out, found), as_json)
    return 0


@command(show, "where")
def show_where(
    acts: File,
    image: Annotated[str, _option("--image", metavar="KEY", help="The image, by its key in the file.")],
    layer: OneLayer,
    out: Picture,
    k: Annotated[int, _option("-k", metavar="K", help="How many channels. [default: 5]")] = 5,
    images: Images = None,
    theme: Theme = "dark",
    dpi: Dpi = 150,
    cmap: Cmap = None,
    as_json: Json = False,
) -> int:
    """Draw where in an image a layer is strongest.

    The region of each of its strongest channels, and the sum of all channels over the photo.

    fmextract show where acts.h5 --image cats/tom.jpg -l layer4 -o where.png
    """
    with working():
        from fmextract.reading import activations
        from fmextract.visual import where

        with activations.open(acts) as stored:
            found = where.show_where(stored, image, layer, out, k=k, images=images, style=_style(theme, dpi, cmap))
    _show(where.where_picture(out, found), lambda: tables.where(out, found), as_json)
    return 0
