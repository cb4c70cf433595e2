"""The options of the commands: names, values and help, once for all commands that share them."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from fmextract.cli import completion
from fmextract.cli.run_file import ConfigFile
from fmextract.config import (
    DTYPES,
    EFFECTIVE_FIELDS,
    JPEG_DECODERS,
    MEMORY_FORMATS,
    PRECISIONS,
    WORKER_KINDS,
    Config,
)

# ----------------------------------------------------------------------------------------------------- options


WHAT, EXACT, FAST, SAFE = "What", "How exact", "How fast", "How safe"
"""Panels of the help of a run."""


def _option(
    *names: str,
    help: str,
    metavar: str | None = None,
    panel: str | None = None,
    complete: Callable[..., Any] | None = None,
) -> Any:
    return typer.Option(
        *names,
        help=help,
        metavar=metavar,
        rich_help_panel=panel,
        autocompletion=complete or completion.choices(metavar),
        show_default=False,
    )


Json = Annotated[bool, _option("--json", help="Print the result as JSON.")]


Model = Annotated[
    str,
    _option(
        "--model",
        "-m",
        metavar="MODEL",
        panel=WHAT,
        complete=completion.models,
        help="resnet50 (any name of torchvision), timm:NAME, module:callable or path/file.py:callable.",
    ),
]


Preprocessing = Annotated[
    str | None,
    _option(
        "--preprocess",
        metavar="HOW",
        panel=WHAT,
        complete=completion.one_of(("model", "none")),
        help="model (that of its weights), the name of another model, module:callable, none, or "
        "in words: size=256,crop=224,mean=0.5,std=0.5,interpolation=bicubic. [default: model]",
    ),
]


Size = Annotated[
    str | None,
    _option(
        "--size",
        metavar="N|HxW",
        panel=WHAT,
        help="Exact size of the model's input, pixels. [default: the preprocessing's]",
    ),
]


def _layers(reducers: str, default: str, panel: str | None = None) -> Any:
    return _option(
        "--layer",
        "-l",
        metavar="SELECTOR",
        panel=panel,
        complete=completion.reducers,
        help="What to take; repeatable. A path layer4.2.conv3, a glob 'layer?.*.conv1' (** crosses dots), "
        "type:Conv2d, 'conv#0' (the first in order of execution; 'conv#-1' the last), 'trunk#0' (the same without the "
        f"convolutions of shortcuts). Suffixes: :2 second call, @in the input, [1] a member, =mean a reducer "
        f"({reducers}). [default: {default}]",
    )


Layers = Annotated[list[str] | None, _layers("`fmextract layers --help` has the list", "the model's main parts", WHAT)]
LayersToList = Annotated[list[str] | None, _layers("all of them below", "every layer")]


# The other options of a run, by panel and by the field of `Config` that each of them sets: type, what to write, help.
# Their defaults live in `Config`: what is not given here is not passed on.
_OPTIONS: Mapping[str, Mapping[str, tuple[type, str | None, str]]] = {
    WHAT: {
        "weights": (
            str,
            "WEIGHTS",
            "default, the name of a set of weights, random:SEED, or a file (.safetensors, .pth). [default: default]",
        ),
        "exif": (bool, None, "Turn photos as their EXIF orientation says."),
        "limit": (int, "N", "Only the first N images. [default: all]"),
        "key": (str, "COLUMN", "Column of a manifest that names the images. [default: key, else their paths]"),
        "label": (
            str,
            "COLUMN|folder",
            "Column of a manifest that labels the images, or folder: that which each lies in. [default: label]",
        ),
        "hidden": (bool, None, "Take hidden files and folders too, and what computers put beside photos (@eaDir)."),
        "allow_outside": (bool, None, "Let a manifest name files that are not below its own folder."),
        "seed": (int, "N", "What is random begins from this number: in a forward pass, and in each row. [default: 0]"),
    },
    EXACT: {
        "precision": (
            str,
            "|".join(PRECISIONS),
            "Of the forward pass; auto takes the fastest whose measured error stays under --max-error. [default: auto]",
        ),
        "max_error": (
            str,
            "SHARE",
            "Relative L2 error against fp32, median of the layers, that auto may cost. [default: 2%]",
        ),
        "dtype": (
            str,
            "|".join(DTYPES),
            "Type of the values on disk; not every reader opens float16. [default: float32]",
        ),
        "clip": (bool, None, "With --dtype float16: clip what would overflow, instead of stopping."),
        "keep_bits": (int, "BITS", "Mantissa bits kept; the rest is rounded away. [default: all there are]"),
        "memory_format": (
            str,
            "|".join(MEMORY_FORMATS),
            "Of the forward pass; changes the last bits of a convolution. [default: auto]",
        ),
        "top_k": (int, "K", "Strongest images kept for each channel. [default: 9]"),
        "effective_fields": (
            str,
            "|".join(EFFECTIVE_FIELDS),
            "Measure effective receptive fields; auto does where it takes little of the run. [default: auto]",
        ),
    },
    FAST: {
        "batch_size": (str, "N|auto", "Images a batch; auto measures. [default: auto]"),
        "device": (str, "DEVICE", "auto, cpu, cuda, cuda:0, mps. [default: auto]"),
        "compile": (
            bool,
            None,
            "Run the model through torch.compile: a wait at the start, then passes that are as fast or faster.",
        ),
        "codec": (
            str,
            "gzip|zstd|lz4|none",
            "Compression; readers of zstd and lz4 need a plugin. [default: gzip]",
        ),
        "level": (str, "N|auto", "Level of the codec. [default: auto, its fastest]"),
        "jpeg_decoder": (
            str,
            "|".join(JPEG_DECODERS),
            "Where JPEGs become pixels; device: plain ones on CUDA (torchcodec, a few levels off). [default: cpu]",
        ),
        "num_workers": (str, "N|auto", "How many decode and compress at once. [default: auto, from the CPUs]"),
        "worker_kind": (
            str,
            "|".join(WORKER_KINDS),
            "Threads, or processes, which do not wait for each other; auto: from 5 on in long runs. [default: auto]",
        ),
        "dataset_workers": (
            int,
            "N",
            "Processes that read a Dataset, and run a preprocessing of your own; 0: one thread does. [default: 0]",
        ),
        "shard_size": (
            str,
            "SIZE",
            "Values, before compression, that one shard holds about, as 512MiB. [default: auto]",
        ),
    },
    SAFE: {
        "max_failures": (
            str,
            "COUNT|SHARE",
            "Failed images allowed, as 12 or 5%; a share counts from 200 images on. [default: 5%]",
        ),
        "recheck": (
            bool,
            None,
            "Run some stored rows again before an earlier output is taken up or called complete. [default: recheck]",
        ),
        "ignore": (
            list[str],
            "FIELD",
            "A field of an earlier run that may differ, by the name in a refusal; repeatable. Rows are still compared.",
        ),
        "keep_failures": (bool, None, "Leave images that failed in an earlier run; else they are tried again."),
        "overwrite": (bool, None, "Replace an earlier output of fmextract. Without it the same command resumes."),
        "break_lock": (bool, None, "Take over an output that another run, which is surely dead, still holds."),
    },
}


_SHORT = {"weights": ("-w",)}
_COMPLETED = {
    "weights": completion.one_of(("default", "random:0")),
    "device": completion.one_of(("auto", "cpu", "cuda", "mps")),
}


def _run_options() -> Iterator[inspect.Parameter]:
    """Every field of `Config` as a parameter that typer reads, panel by panel."""
    for name, kind in {"layers": Layers, "preprocess": Preprocessing, "size": Size}.items():
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=None)
    defaults = {field.name: field.default for field in fields(Config)}
    for panel, options in _OPTIONS.items():
        for name, (plain, metavar, help) in options.items():
            word, default = word_of(name), defaults[name]
            named = f"--{word}/--no-{word}" if default is True else f"--{word}"
            option = _option(
                named, *_SHORT.get(name, ()), metavar=metavar, panel=panel, complete=_COMPLETED.get(name), help=help
            )
            annotation: Any = Annotated[bool, option] if plain is bool else Annotated[plain | None, option]
            default = default if plain is bool else None
            yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def word_of(name: str) -> str:
    """A field of `Config` as the command line writes it."""
    return name.replace("_", "-")


Command = TypeVar("Command", bound=Callable[..., Any])


def with_run_options(command: Command) -> Command:
    """`command` as typer sees it: with every option of a run in the place of its `**options`."""
    own = inspect.signature(command)
    *before, last = own.parameters.values()
    assert last.kind is last.VAR_KEYWORD
    positional = [parameter for parameter in before if parameter.kind is not parameter.KEYWORD_ONLY]
    keywords = [parameter for parameter in before if parameter.kind is parameter.KEYWORD_ONLY]
    file = inspect.Parameter("config_file", inspect.Parameter.KEYWORD_ONLY, annotation=ConfigFile, default=None)
    signature = own.replace(parameters=[*positional, *_run_options(), *keywords, file])
    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in signature.parameters.values()}
    return command


def _config(options: Mapping[str, Any]) -> Config:
    return Config.of(**{name: value for name, value in options.items() if value is not None})


def _of_file(context: typer.Context, file: Path | None) -> Path | None:
    """Let the model be the one that `file` says, which is the empty name, where nothing else is said."""
    if file is not None:
        context.default_map = {"model": "", **(context.default_map or {})}
    return file


Like = Annotated[
    Path | None,
    typer.Option(
        "--like",
        metavar="FILE",
        callback=_of_file,
        is_eager=True,
        rich_help_panel=WHAT,
        show_default=False,
        help="Do what the run did that made this file, on another source: its model, weights, layers, precision … where"
        " nothing else is said. Other weights are refused.",
    ),
]


Trust = Annotated[
    bool,
    _option("--trust", panel=SAFE, help="Let --like import code, and download weights, that only the file names."),
]


Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A folder of images (recursive), a .csv, .tsv, .jsonl or .txt manifest with a `path` column, a quoted "
        "pattern, or module:callable giving a Dataset.",
        show_default=False,
    ),
]


File = Annotated[Path, typer.Argument(metavar="FILE", help="A file name.h5, or a directory.", show_default=False)]


Out = Annotated[
    Path,
    _option("--out", "-o", metavar="OUT", panel=WHAT, help="name.h5 for one file, name/ for a directory of shards."),
]


Stored = Annotated[
    list[str] | None,
    _option(
        "--layer",
        "-l",
        metavar="SELECTOR",
        complete=completion.layers,
        help="A layer of the file: its name, or a selector as in `extract`; repeatable. [default: all]",
    ),
]


Theme = Annotated[
    str, _option("--theme", metavar="dark|light", help="Of the picture; light for paper. [default: dark]")
]


Dpi = Annotated[int, _option("--dpi", metavar="N", help="Pixels an inch. [default: 150]")]


Cmap = Annotated[
    str | None,
    _option("--cmap", metavar="NAME", help="A colour map of matplotlib. [default: magma; gray for kernels]"),
]


def _style(theme: str, dpi: int, cmap: str | None = None, out: Path | None = None) -> Any:
    """How a picture is drawn, as `fmextract.visual` takes it; where long work comes first, `out` is checked too."""
    from fmextract.visual import canvas

    if out is not None:
        canvas.check_name(out)
    return canvas.Style(theme, dpi, cmap)


Weights = Annotated[str, _option("--weights", "-w", metavar="WEIGHTS", help="As in `extract`. [default: default]")]


Picture = Annotated[Path, _option("--out", "-o", metavar="OUT", help="name.png, name.pdf or name.svg.")]


Images = Annotated[
    Path | None,
    _option("--images", metavar="DIR", help="Where the photos are now. [default: where the run found them]"),
]


OneLayer = Annotated[
    str,
    _option(
        "--layer",
        "-l",
        metavar="SELECTOR",
        complete=completion.layers,
        help="A layer of the file: its name, or a selector.",
    ),
]
