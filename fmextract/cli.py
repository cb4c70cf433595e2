"""The command line: parse, call one public function, show what it returns as `tables` or JSON. No logic of its own.

stdout holds the result and nothing else; notes, progress and errors go to stderr. torch is imported by the commands
that need it, so that `--help` and `info` answer at once.
"""

import contextlib
import faulthandler
import gc
import inspect
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any, TextIO, TypeVar, cast

import typer

from fmextract import __version__, tables
from fmextract.capture.reducer_help import REDUCER_HELP
from fmextract.common import streams, strict_json, text
from fmextract.common.progress import TerminalProgress
from fmextract.config import (
    DECODERS,
    EFFECTIVE_FIELDS,
    MEMORY_FORMATS,
    PRECISIONS,
    STORES,
    WORKER_KINDS,
    Config,
    parse_size,
)
from fmextract.errors import FmextractError

USAGE = 2
SOME_FAILED = 3
MISMATCH = 5
INTERRUPTED = 130

# What every mistake in the usage is. Newer versions of typer bring a click of their own: it has no fixed address.
ClickError: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


class Interrupted(FmextractError):
    """Ctrl-C while a command worked."""

    exit_code = INTERRUPTED


app = typer.Typer(
    name="fmextract",
    help="Stream images through a PyTorch model and keep the activations of its layers in HDF5.",
    epilog="Begin with `fmextract demo`, or list the layers of a model: `fmextract layers resnet50`. "
    "Exit codes: 0 done, 2 usage or configuration, 3 done but some images failed, 4 stopped early "
    "(the same command resumes), 5 damaged file, 130 interrupted, 1 anything unexpected.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. No traceback, unless --debug is given."""
    arguments = [_at_home(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    streams.ensure_open()
    try:
        return _run(arguments)
    finally:
        for stream in (sys.stdout, sys.stderr):
            streams.settle(stream)


def _at_home(argument: str) -> str:
    """`~/x.h5` as a shell would have given it, had it not been quoted, or behind `--out=`."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return f"{option}{equals}{Path(value).expanduser()}" if value.startswith("~/") else argument


_ARGUMENTS: ContextVar[Sequence[str]] = ContextVar("arguments of the command line")


def _run(arguments: list[str]) -> int:
    _ARGUMENTS.set(arguments)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # a stream that a test or an embedding program put there
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        return app(arguments, prog_name="fmextract", standalone_mode=False) or 0
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    except ClickError as error:
        return _complain(f"{error.format_message()}{_where_help_is(error)}", USAGE)
    except FmextractError as error:
        _trace(arguments)
        return _complain("\n".join([str(error), *getattr(error, "__notes__", ())]), error.exit_code)
    except Exception as error:  # whatever escaped: a bug, said as one
        _trace(arguments)
        hint = "" if "--debug" in arguments else "; --debug shows the traceback, which helps to mend it"
        return _complain(f"this is a bug in fmextract: {type(error).__name__}: {error}{hint}", 1)


def _complain(message: str, code: int) -> int:
    with contextlib.suppress(OSError):
        print("error:", "\n".join(map(text.printable, message.splitlines())), file=sys.stderr)
    return code


def _where_help_is(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return f"\nSee: {context.command_path} --help" if context is not None else ""


def _trace(arguments: Sequence[str]) -> None:
    if "--debug" in arguments:
        traceback.print_exc()


# ----------------------------------------------------------------------------------------------------- options


def _option(*names: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, show_default=False)


Json = Annotated[bool, _option("--json", help="Print the result as JSON.")]
Debug = Annotated[bool, _option("--debug", help="Show the traceback of an error.")]
Model = Annotated[
    str,
    _option(
        "--model",
        "-m",
        metavar="MODEL",
        help="resnet50 (any name of torchvision), timm:NAME, module:callable or path/file.py:callable.",
    ),
]
Preprocessing = Annotated[
    str | None,
    _option(
        "--preprocess",
        metavar="HOW",
        help="model (that of its weights), the name of another model, module:callable, none, or "
        "in words: size=256,crop=224,mean=0.5,std=0.5,interpolation=bicubic. [default: model]",
    ),
]
Size = Annotated[
    str | None,
    _option("--size", metavar="N|HxW", help="Exact size of the model's input, pixels. [default: the preprocessing's]"),
]
Layers = Annotated[
    list[str] | None,
    _option(
        "--layer",
        "-l",
        metavar="SELECTOR",
        help="What to take; repeatable. A path layer4.2.conv3, a glob 'layer?.*.conv1' (** crosses dots), "
        "type:Conv2d, 'conv#0' (the first in order of execution; 'conv#-1' the last), 'trunk#0' (the same without the "
        "convolutions of shortcuts). Suffixes: :2 second call, @in "
        "the input, [1] a member, =mean a reducer (`fmextract layers --help` has the list). "
        "[default: the model's main parts]",
    ),
]

# The other options of a run, by the field of `Config` that each of them sets: type, what to write, help. Their defaults
# live in `Config`: what is not given here is not passed on.
_OPTIONS: Mapping[str, tuple[type, str | None, str]] = {
    "weights": (
        str,
        "WEIGHTS",
        "default, the name of a set of weights, random:SEED, or a file (.safetensors, .pth). [default: default]",
    ),
    "exif": (bool, None, "Turn photos as their EXIF orientation says."),
    "decode": (
        str,
        "|".join(DECODERS),
        "Where JPEGs become pixels; device: plain ones on CUDA (torchcodec, a few levels off). [default: cpu]",
    ),
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
    "batch_size": (str, "N|auto", "Images a batch; auto measures. [default: auto]"),
    "device": (str, "DEVICE", "auto, cpu, cuda, cuda:0, mps. [default: auto]"),
    "store": (str, "|".join(STORES), "Type of the values on disk; not every reader opens float16. [default: float32]"),
    "clip": (bool, None, "With --store float16: clip what would overflow, instead of stopping."),
    "keep_bits": (int, "BITS", "Mantissa bits kept; the rest is rounded away. [default: all there are]"),
    "codec": (
        str,
        "gzip|zstd|lz4|none",
        "Compression; readers of zstd and lz4 need a plugin. [default: gzip]",
    ),
    "level": (str, "N|auto", "Level of the codec. [default: auto, its fastest]"),
    "memory_format": (
        str,
        "|".join(MEMORY_FORMATS),
        "Of the forward pass; changes the last bits of a convolution. [default: auto]",
    ),
    "compile": (
        bool,
        None,
        "Run the model through torch.compile: a wait at the start, then passes that are as fast or faster.",
    ),
    "shard_size": (str, "SIZE", "Values, before compression, that one shard holds about, as 512MiB. [default: auto]"),
    "workers": (str, "N|auto", "How many decode and compress at once. [default: auto, from the CPUs]"),
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
    "limit": (int, "N", "Only the first N images. [default: all]"),
    "seed": (int, "N", "What is random begins from this number: in a forward pass, and in each row. [default: 0]"),
    "top": (int, "K", "Strongest images kept for each channel. [default: 9]"),
    "effective_fields": (
        str,
        "|".join(EFFECTIVE_FIELDS),
        "Measure effective receptive fields; auto does where it takes little of the run. [default: auto]",
    ),
    "max_failures": (
        str,
        "COUNT|SHARE",
        "Failed images allowed, as 12 or 5%; a share counts from 200 images on. [default: 5%]",
    ),
    "key": (str, "COLUMN", "Column of a manifest that names the images. [default: key, else their paths]"),
    "label": (
        str,
        "COLUMN|folder",
        "Column of a manifest that labels the images, or folder: that which each lies in. [default: label]",
    ),
    "hidden": (bool, None, "Take hidden files and folders too, and what computers put beside photos (@eaDir)."),
    "allow_outside": (bool, None, "Let a manifest name files that are not below its own folder."),
    "recheck": (
        bool,
        None,
        "Run some stored rows again before an earlier output is taken up or called complete. [default: recheck]",
    ),
    "ignore": (
        list[str],
        "FIELD",
        "A field of an earlier run that may differ, as a refusal names it; repeatable. Stored rows are still compared.",
    ),
    "keep_failures": (bool, None, "Leave images that failed in an earlier run; else they are tried again."),
    "overwrite": (bool, None, "Replace an earlier output of fmextract. Without it the same command resumes."),
    "break_lock": (bool, None, "Take over an output that another run, which is surely dead, still holds."),
}
_SHORT = {"weights": ("-w",)}


def _run_options() -> Iterator[inspect.Parameter]:
    """Every field of `Config` as a parameter that typer reads."""
    shared: dict[str, Any] = {"layers": Layers, "preprocess": Preprocessing, "size": Size}
    for field in fields(Config):
        name = field.name
        kind, default = shared.get(name), None
        if kind is None:
            plain, metavar, help = _OPTIONS[name]
            word = name.replace("_", "-")
            named = f"--{word}/--no-{word}" if field.default is True else f"--{word}"
            option = _option(named, *_SHORT.get(name, ()), metavar=metavar, help=help)
            kind = Annotated[bool, option] if plain is bool else Annotated[plain | None, option]
            default = field.default if plain is bool else None
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default)


Command = TypeVar("Command", bound=Callable[..., Any])


def _with_run_options(command: Command) -> Command:
    """`command` as typer sees it: with every option of a run in the place of its `**options`."""
    own = inspect.signature(command)
    *before, last = own.parameters.values()
    assert last.kind is last.VAR_KEYWORD
    positional = [parameter for parameter in before if parameter.kind is not parameter.KEYWORD_ONLY]
    keywords = [parameter for parameter in before if parameter.kind is parameter.KEYWORD_ONLY]
    signature = own.replace(parameters=[*positional, *_run_options(), *keywords])
    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in signature.parameters.values()}
    return command


def _config(options: Mapping[str, Any]) -> Config:
    return Config.of(**{name: value for name, value in options.items() if value is not None})


Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A folder of images (recursive), a .csv, .tsv, .jsonl or .txt manifest with a `path` column, a quoted "
        "pattern, or module:callable giving a Dataset.",
        show_default=False,
    ),
]
Output = Annotated[Path, typer.Argument(metavar="OUT", help="A file name.h5, or a directory.", show_default=False)]
Out = Annotated[
    Path, _option("--out", "-o", metavar="OUT", help="name.h5 for one file, name/ for a directory of shards.")
]
Stored = Annotated[
    list[str] | None,
    _option(
        "--layer",
        "-l",
        metavar="SELECTOR",
        help="A layer of the file: its name, a glob, or conv#N as the run was asked for it; repeatable. [default: all]",
    ),
]


# ---------------------------------------------------------------------------------------------------- commands


@app.callback(invoke_without_command=True)
def _fmextract(
    context: typer.Context,
    version: Annotated[bool, _option("--version", help="Print the version.")] = False,
) -> int:
    if version:
        _print(f"fmextract {__version__}")
    elif context.invoked_subcommand is None:
        _print(context.get_help())
        return USAGE
    return 0


@app.command()
@_with_run_options
def extract(
    source: Source,
    model: Model,
    out: Out,
    *,
    plan_file: Annotated[
        Path | None,
        _option("--plan", metavar="FILE", help="Do what `fmextract plan … --save FILE` showed; measure nothing again."),
    ] = None,
    dry_run: Annotated[bool, _option("--dry-run", help="Print the plan and stop, as `fmextract plan` does.")] = False,
    as_json: Json = False,
    debug: Debug = False,
    **options: Any,
) -> int:
    """Run images through a model and keep its layers' activations.

    fmextract extract photos/ -m resnet50 -l 'conv#0' -l 'layer*' -o acts.h5
    """
    if dry_run:
        return _plan(source, model, out, options, as_json, given=plan_file)
    config = _config(options)
    with _working(hint=lambda: _what_is_kept(out)):
        with _importing():
            from fmextract.run.extract import run

        command = shlex.join(["fmextract", *_ARGUMENTS.get()])
        result = run(source, model, out, config, TerminalProgress(), plan=plan_file, command=command)
    _show(result.as_json(), lambda: tables.summary(result), as_json)
    if not result.failed:
        return 0
    with contextlib.suppress(OSError):
        print(tables.failures(result), file=sys.stderr)
    return SOME_FAILED


@app.command()
@_with_run_options
def plan(
    source: Source,
    model: Model,
    out: Annotated[Path, _option("--out", "-o", metavar="OUT", help="As in `extract`. [default: acts.h5]")] = Path(
        "acts.h5"
    ),
    *,
    save: Annotated[
        Path | None, _option("--save", metavar="FILE", help="Keep the plan in a file, for `extract --plan FILE`.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
    **options: Any,
) -> int:
    """Say what `extract` would do, and what it would cost.

    Takes the same options, measures on the first images, and writes nothing but the plan with --save. Exits with 4
    where the disk is too small.

    fmextract plan photos/ -m resnet50 -l 'layer*'
    """
    return _plan(source, model, out, options, as_json, save=save)


def _plan(
    source: str,
    model: str,
    out: Path,
    options: Mapping[str, Any],
    as_json: bool,
    *,
    given: Path | None = None,
    save: Path | None = None,
) -> int:
    config = _config(options)
    with _working():
        with _importing():
            from fmextract.run.estimate import check_space
            from fmextract.run.extract import make_plan

        made = make_plan(source, model, out, config, TerminalProgress(), plan=given)
        if save is not None:
            made.save(save)
    _show(made.as_json(), lambda: tables.plan(made), as_json)
    check_space(made.estimate.bytes_needed, made.estimate.bytes_free, out)
    return 0


@app.command(
    epilog="Reducers: "
    + "; ".join(f"={help.usage} keeps {help.keeps}, {help.shapes}" for help in REDUCER_HELP.values())
    + "; =module:callable, a function of yours from (B, …) to (B, …)."
)
def layers(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="As in `extract --model`; built with random weights, no download.")
    ],
    selectors: Layers = None,
    preprocess: Preprocessing = None,
    size: Size = None,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """List a model's layers in the order of execution.

    With a reducer in the selector (-l 'layer4=mean') it shows the shape that would be stored.

    fmextract layers resnet50 -l 'type:Conv2d'
    """
    with _working():
        with _importing():
            from fmextract.run.describe import describe

        rows = describe(model, preprocess=preprocess or "model", size=size, selectors=tuple(selectors or ()))
    _show([asdict(row) for row in rows], lambda: tables.modules(rows), as_json)
    return 0


@app.command()
def info(out: Output, as_json: Json = False, debug: Debug = False) -> int:
    """Say what an output holds: its run, rows and layers.

    fmextract info acts.h5
    """
    with _working():
        from fmextract.reading import activations

        with activations.open(out) as acts:
            said = acts.info()
    _show(said, lambda: tables.info(said), as_json)
    return 0


@app.command()
def pack(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="A directory of shards, as `extract -o DIR/` leaves.", show_default=False),
    ],
    out: Annotated[Path, _option("--out", "-o", metavar="FILE", help="The file to make, as name.h5.")],
    leave_out: Annotated[
        list[str] | None,
        _option(
            "--leave-out",
            metavar="A-B",
            help="Rows of shards that are missing, as 4096-8191; repeatable. They become failed rows.",
        ),
    ] = None,
    overwrite: Annotated[bool, _option("--overwrite", help="Replace an earlier output of fmextract.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Make one file of a directory of shards.

    Chunks are copied as they are; the directory stays. A run that is not finished is refused.

    fmextract pack acts/ -o acts.h5
    """
    with _working():
        from fmextract.run import packing

        packing.pack(directory, out, leave_out=packing.row_ranges(leave_out or ()), overwrite=overwrite)
    return info(out, as_json=as_json)


@app.command()
def verify(
    out: Output,
    rerun: Annotated[
        int, _option("--rerun", metavar="K", help="Run K random images through the model again. [default: 0]")
    ] = 0,
    model: Annotated[
        str | None, _option("--model", "-m", metavar="MODEL", help="For --rerun. [default: what the file names]")
    ] = None,
    source: Annotated[
        str | None, _option("--source", metavar="SOURCE", help="For --rerun. [default: what the file names]")
    ] = None,
    preprocess: Annotated[
        str | None, _option("--preprocess", metavar="HOW", help="For --rerun. [default: what the file says]")
    ] = None,
    weights: Annotated[
        str | None, _option("--weights", "-w", metavar="WEIGHTS", help="For --rerun. [default: what the file names]")
    ] = None,
    trust: Annotated[
        bool, _option("--trust", help="Let --rerun import code, and download weights, that only the file names.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Check an output: checksums, every chunk, rows, statistics.

    Exit code 5 where something is not as it was written. Code that a file names is run only if you name it again, or
    with --trust.

    fmextract verify acts.h5 --rerun 20
    """
    with _working():
        from fmextract.verification import verify as check

        report = check(
            out,
            rerun=rerun,
            model=model,
            source=source,
            preprocess=preprocess,
            weights=weights,
            trust=trust,
            progress=TerminalProgress(),
        )
    _show(report.as_json(), lambda: tables.verification(report), as_json)
    return 0 if report.ok else MISMATCH


@app.command()
def report(
    out: Output,
    page: Annotated[
        Path | None,
        _option("--out", "-o", metavar="FILE", help="The page to write. [default: report.html beside OUT]"),
    ] = None,
    images: Annotated[
        Path | None,
        _option("--images", metavar="DIR", help="Where the photos are now. [default: where the run found them]"),
    ] = None,
    max_size: Annotated[
        str, _option("--max-size", metavar="SIZE", help="Of the page; what does not fit is told. [default: 20MB]")
    ] = "20MB",
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Write one HTML page about an output, to browse and to send.

    Its run, every layer in numbers, maps over photos, the strongest images of each channel. Opens without a server.

    fmextract report acts.h5 -o report.html
    """
    with _working():
        from fmextract.visual.report.report import write_report

        made = write_report(out, page, images=images, max_size=parse_size(max_size))
    _show(made.as_json(), lambda: str(made), as_json)
    return 0


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


@app.command()
@_with_run_options
def bench(
    source: Annotated[
        str | None,
        typer.Argument(metavar="SOURCE", help="As in `extract`. [default: JPEGs made of the demo's photos]"),
    ] = None,
    *,
    model: Model,
    repeats: Annotated[int, _option("--repeats", metavar="N", help="Medians of so many turns. [default: 3]")] = 3,
    plot: Annotated[Path | None, _option("--plot", metavar="FILE", help="Draw it: .png, .pdf or .svg.")] = None,
    theme: Theme = "dark",
    dpi: Dpi = 150,
    as_json: Json = False,
    debug: Debug = False,
    **options: Any,
) -> int:
    """Measure the stages alone, and how near a run comes to their limit.

    fmextract bench photos/ -m resnet50 -w random:0 -l 'layer*' --precision bf16
    """
    config = _config(options)
    with _working():
        with _importing():
            from fmextract.benchmark import bench as measure
        style = _style(theme, dpi, out=plot)
        found = measure(source, model, config, TerminalProgress(), repeats=repeats)
        if plot is not None:
            from fmextract.visual.stages import draw_stages

            draw_stages(found, plot, style=style)
    _show(found.as_json(), lambda: tables.benchmark(found), as_json)
    return 0


@app.command()
def demo(
    out: Annotated[Path, _option("--out", "-o", metavar="DIR", help="Where to put it. [default: demo/]")] = Path(
        "demo"
    ),
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Make a first file and picture with a trained network.

    Photos out of scikit-image run through EfficientNet-Lite0; nothing is downloaded.

    pip install 'fmextract[demo]' && fmextract demo
    """
    with _working():
        with _importing():
            from fmextract.demo import demo as run_demo

        made = run_demo(out, TerminalProgress())
    _show(made.as_json(), lambda: str(made), as_json)
    return 0


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="What counts as right.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="What is compared with it.", show_default=False)],
    layers: Annotated[
        list[str] | None, _option("--layer", "-l", metavar="LAYER", help="A layer by name; repeatable. [default: all]")
    ] = None,
    out: Annotated[
        Path | None, _option("--out", "-o", metavar="PICTURE", help="Draw it, too: name.png, name.pdf or name.svg.")
    ] = None,
    worst: Annotated[int, _option("--worst", metavar="K", help="Images named for each layer. [default: 3]")] = 3,
    theme: Theme = "dark",
    dpi: Dpi = 150,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Say where two outputs begin to differ, layer by layer.

    Two precisions, two checkpoints, two ways of storing: rows are matched by key, layers by name.

    fmextract compare fp32.h5 bf16.h5 -o differences.png
    """
    with _working():
        from fmextract import comparison
        from fmextract.reading import activations

        style = _style(theme, dpi, out=out)
        with activations.open(a) as first, activations.open(b) as second:
            found = comparison.compare(first, second, layers or (), worst=worst)
        if out is not None:
            from fmextract.visual.differences import draw_comparison

            draw_comparison(found, out, style=style)
    _show(found.as_json(), lambda: tables.comparison(found), as_json)
    return 0


@app.command()
def export(
    acts: Output,
    to: Annotated[
        str,
        _option(
            "--to",
            metavar="npy|safetensors|parquet|netcdf|rdm",
            help="npy: a directory, one file a layer. parquet: one row an image. rdm: dissimilarities for rsatoolbox.",
        ),
    ],
    out: Annotated[
        Path,
        _option(
            "--out",
            "-o",
            metavar="DEST",
            help="What to write: a directory for npy; name.safetensors, name.parquet, name.nc; name.h5 for rdm.",
        ),
    ],
    layers: Stored = None,
    metric: Annotated[
        str | None,
        _option(
            "--metric",
            metavar="euclidean-squared|correlation|cosine",
            help="Of --to rdm, as rsatoolbox defines it. [default: euclidean-squared]",
        ),
    ] = None,
    overwrite: Annotated[bool, _option("--overwrite", help="Replace an earlier export to the same format.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Write stored layers in a format of other tools.

    Rows stay in their places, with their keys beside them; rows that failed hold NaN, and rdm leaves them out.

    fmextract export acts.h5 --to npy -l 'layer*' -o arrays/
    """
    with _working():
        from fmextract.exporting.export import export as write

        progress = TerminalProgress(unit="row")
        made = write(acts, to=to, out=out, layers=layers, metric=metric, overwrite=overwrite, progress=progress)
    _show(made.as_json(), lambda: tables.exported(made), as_json)
    return 0


# ---------------------------------------------------------------------------------------------------- pictures

show = typer.Typer(
    help="Draw filters, feature maps, depth, strongest images and where they look.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(show, name="show")

Weights = Annotated[str, _option("--weights", "-w", metavar="WEIGHTS", help="As in `extract`. [default: default]")]
Picture = Annotated[Path, _option("--out", "-o", metavar="PICTURE", help="name.png, name.pdf or name.svg.")]
Images = Annotated[
    Path | None,
    _option("--images", metavar="DIR", help="Where the photos are now. [default: where the run found them]"),
]


@show.command("filters")
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
    debug: Debug = False,
) -> int:
    """Draw the kernels of a convolution.

    In colour where there are three input channels, else one row a filter. Mid-grey is zero.

    fmextract show filters -m resnet50 -l conv1 -o filters.png
    """
    with _working():
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


@show.command("maps")
def show_maps(
    out: Annotated[
        Path, _option("--out", "-o", metavar="DIR", help="A folder, one picture a layer; or name.png for all in one.")
    ],
    acts: Annotated[
        Path | None,
        typer.Argument(metavar="[OUT]", help="What `extract` made; or --model and --input.", show_default=False),
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
    debug: Debug = False,
) -> int:
    """Draw an image beside its feature maps.

    From a file, or straight from a model (--model, --input). Tokens are shown on their patch grid.

    fmextract show maps acts.h5 --image cats/tom.jpg -l 'conv#0' -l 'layer*' -o maps/
    """
    drawing: dict[str, Any] = {"count": count, "order": order, "channels": channels or (), "scale": scale}
    drawing |= {"overlay": overlay, "format": kind, "layers": layers or ()}
    with _working():
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


OneLayer = Annotated[str, _option("--layer", "-l", metavar="LAYER", help="A layer of the file, by its name.")]


@show.command("depth")
def show_depth(
    acts: Output,
    out: Annotated[
        Path | None, _option("--out", "-o", metavar="PICTURE", help="Draw it, too: name.png, name.pdf or name.svg.")
    ] = None,
    layers: Stored = None,
    theme: Theme = "dark",
    dpi: Dpi = 150,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Say how sparse and alive each layer is, in the order of execution.

    From the statistics that the run kept, over all images.

    fmextract show depth acts.h5 -o depth.png
    """
    with _working():
        from fmextract.reading import activations
        from fmextract.visual import depth

        with activations.open(acts) as stored:
            if out is None:
                rows = depth.measure_depth(stored, layers or ())
            else:
                _, rows = depth.show_depth(stored, out, layers=layers or (), style=_style(theme, dpi))
    _show([row.as_json() for row in rows], lambda: tables.depth(rows), as_json)
    return 0


@show.command("top")
def show_top(
    acts: Output,
    layer: OneLayer,
    channels: Annotated[list[int], _option("--channel", metavar="N", help="A channel by its number; repeatable.")],
    out: Picture,
    k: Annotated[int, _option("-k", metavar="K", help="Images a channel, as many as were kept. [default: 9]")] = 9,
    images: Images = None,
    theme: Theme = "dark",
    dpi: Dpi = 150,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Draw the images that drive a channel hardest.

    Each with a box around what the cell that did it looks at, and that part of the photo.

    fmextract show top acts.h5 -l layer4 --channel 17 -o top.png
    """
    with _working():
        from fmextract.reading import activations
        from fmextract.visual import top

        with activations.open(acts) as stored:
            found = top.show_top(stored, layer, channels, out, k=k, images=images, style=_style(theme, dpi))
    _show(top.top_picture(out, found), lambda: tables.examples(out, found), as_json)
    return 0


@show.command("where")
def show_where(
    acts: Output,
    image: Annotated[str, _option("--image", metavar="KEY", help="The image, by its key in the file.")],
    layer: OneLayer,
    out: Picture,
    k: Annotated[int, _option("-k", metavar="K", help="How many channels. [default: 5]")] = 5,
    images: Images = None,
    theme: Theme = "dark",
    dpi: Dpi = 150,
    cmap: Cmap = None,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Draw where in an image a layer is strongest.

    The region of each of its strongest channels, and the sum of all channels over the photo.

    fmextract show where acts.h5 --image cats/tom.jpg -l layer4 -o where.png
    """
    with _working():
        from fmextract.reading import activations
        from fmextract.visual import where

        with activations.open(acts) as stored:
            found = where.show_where(stored, image, layer, out, k=k, images=images, style=_style(theme, dpi, cmap))
    _show(where.where_picture(out, found), lambda: tables.where(out, found), as_json)
    return 0


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """For torch: the garbage collector, which would walk its many objects over and over while it loads, waits."""
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


@contextlib.contextmanager
def _working(hint: Callable[[], str] = str) -> Iterator[None]:
    """Around the one public function of a command: what libraries and models' own code print goes to stderr.

    SIGTERM ends it as Ctrl-C does, in order; a crash in native code shows where it was.
    """
    if not faulthandler.is_enabled():
        with contextlib.suppress(OSError, ValueError, AttributeError, RuntimeError):  # a stderr that is no file
            faulthandler.enable()
    heard = cast("TextIO", streams.Tolerant(sys.stderr))
    try:
        with contextlib.redirect_stderr(heard), contextlib.redirect_stdout(heard), _terminated_as_interrupted():
            yield
    except KeyboardInterrupt:
        raise Interrupted("; ".join(["interrupted", *filter(None, [hint()])])) from None


def _what_is_kept(out: Path) -> str:
    from fmextract.run.output import finished_shards

    kept = finished_shards(out)
    if not kept:
        return "no shard was finished yet: the same command starts over"
    return f"{text.count(kept, 'shard')} finished and kept: the same command goes on from there"


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    try:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:  # not the main thread: its signals are the embedding program's
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ----------------------------------------------------------------------------------------------------- showing


def _show(data: Any, render: Callable[[], str], as_json: bool) -> None:
    _print(strict_json.dumps(data, indent=2) if as_json else render())


def _print(lines: str) -> None:
    """To stdout. A reader that has seen enough (`| head`) closes it, a disk is full: the work is done all the same."""
    try:
        print(lines, flush=True)
    except BrokenPipeError:
        pass
    except OSError as error:
        with contextlib.suppress(OSError):
            print(f"the result could not be printed: {error.strerror}", file=sys.stderr)
    streams.settle(sys.stdout)


if __name__ == "__main__":
    sys.exit(main())
