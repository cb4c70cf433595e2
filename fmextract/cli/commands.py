"""The command line: parse, call one public function, show what it returns as `tables` or JSON. No logic of its own.

stdout holds the result and nothing else; notes, progress and errors go to stderr. torch is imported by the commands
that need it, so that `--help` and `info` answer at once.
"""

import contextlib
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from fmextract.capture.reducer_help import REDUCER_HELP
from fmextract.cli import completion, run_file, tables
from fmextract.cli.app import ARGUMENTS, MISMATCH, SOME_FAILED, _show, app, importing, main, working
from fmextract.cli.command import command
from fmextract.cli.options import (
    WHAT,
    Dpi,
    File,
    Json,
    LayersToList,
    Like,
    Model,
    Out,
    Preprocessing,
    Size,
    Source,
    Stored,
    Theme,
    Trust,
    _config,
    _option,
    _style,
    with_run_options,
)
from fmextract.cli.show import show
from fmextract.cli.verbosity import progress
from fmextract.common import text
from fmextract.config import Config, parse_size
from fmextract.errors import ConfigError


@command(app)
@with_run_options
def extract(
    source: Source,
    model: Model,
    out: Out,
    *,
    plan_file: Annotated[
        Path | None,
        _option("--plan", metavar="FILE", help="Do what `fmextract plan … --save` kept; measure nothing again."),
    ] = None,
    like_file: Like = None,
    trust: Trust = False,
    dry_run: Annotated[bool, _option("--dry-run", help="Print the plan and stop, as `fmextract plan` does.")] = False,
    as_json: Json = False,
    **options: Any,
) -> int:
    """Run images through a model and keep its layers' activations.

    fmextract extract photos/ -m resnet50 -l 'conv#0' -l 'layer*' -o acts.h5
    """
    if dry_run:
        with _as_in(like_file, model, source, options, trust) as (model, config):
            return _plan(source, model, out, config, as_json, given=plan_file)
    with (
        _as_in(like_file, model, source, options, trust) as (model, config),
        working(hint=lambda: _what_is_kept(out)),
    ):
        with importing():
            from fmextract.run.extract import run

        words = shlex.join(["fmextract", *ARGUMENTS.get()])
        result = run(source, model, out, config, progress(), plan=plan_file, command=words)
    _show(result.as_json(), lambda: tables.summary(result), as_json)
    if not result.failed:
        return 0
    with contextlib.suppress(OSError):
        print(tables.failures(result), file=sys.stderr)
    return SOME_FAILED


@command(app)
@with_run_options
def plan(
    source: Source,
    model: Model,
    out: Annotated[
        Path, _option("--out", "-o", metavar="OUT", panel=WHAT, help="As in `extract`. [default: acts.h5]")
    ] = Path("acts.h5"),
    *,
    save: Annotated[
        Path | None, _option("--save", metavar="OUT", help="Keep the plan in a file, for `extract --plan`.")
    ] = None,
    save_config: Annotated[
        Path | None,
        _option("--save-config", metavar="OUT", help="Keep the options in a TOML file, for `extract --config`."),
    ] = None,
    like_file: Like = None,
    trust: Trust = False,
    as_json: Json = False,
    **options: Any,
) -> int:
    """Say what `extract` would do, and what it would cost.

    Takes the same options, measures on the first images, and writes nothing but the plan with --save, and the options
    with --save-config. Exits with 4 where the disk is too small.

    fmextract plan photos/ -m resnet50 -l 'layer*'
    """
    with _as_in(like_file, model, source, options, trust) as (model, config):
        return _plan(source, model, out, config, as_json, save=save, save_config=save_config)


@contextlib.contextmanager
def _as_in(
    file: Path | None, model: str, source: str, options: Mapping[str, Any], trust: bool
) -> Iterator[tuple[str, Config]]:
    """Give the model and the options of a run, which may be those that made `file` where they are not said."""
    if file is None:
        if trust:
            raise ConfigError("--trust is about what a file names: it only means something with --like")
        yield model, _config(options)
        return
    with importing():
        from fmextract.run.like import like

    # A flag that is not given is False, all but one.
    given = {name: value for name, value in options.items() if value is not None}
    said = {name: value for name, value in given.items() if value is not False or name == "recheck"}
    with like(file, model or None, source, said, allow=trust) as (name, told):
        yield name, Config.of(**told)


def _plan(
    source: str,
    model: str,
    out: Path,
    config: Config,
    as_json: bool,
    *,
    given: Path | None = None,
    save: Path | None = None,
    save_config: Path | None = None,
) -> int:
    with working():
        with importing():
            from fmextract.run.estimate import check_space
            from fmextract.run.extract import make_plan

        made = make_plan(source, model, out, config, progress(), plan=given)
        if save is not None:
            made.save(save)
        if save_config is not None:
            run_file.save(save_config, source, model, out, config, save)
    _show(made.as_json(), lambda: made.table(tables.width()), as_json)
    check_space(made.estimate.bytes_needed, made.estimate.bytes_free, out)
    return 0


@command(
    app,
    epilog="Reducers: "
    + "; ".join(f"={help.usage} keeps {help.keeps}, {help.shapes}" for help in REDUCER_HELP.values())
    + "; =module:callable, a function of yours from (B, …) to (B, …).",
)
def layers(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="As in `extract --model`; built with random weights, no download, unless -w says others.",
            autocompletion=completion.models,
        ),
    ],
    selectors: LayersToList = None,
    weights: Annotated[
        str | None, _option("--weights", "-w", metavar="WEIGHTS", help="As in `extract`. [default: random:0]")
    ] = None,
    preprocess: Preprocessing = None,
    size: Size = None,
    as_json: Json = False,
) -> int:
    """List a model's layers in the order of execution.

    With a reducer in the selector (-l 'layer4=mean') it shows the shape that would be stored.

    fmextract layers resnet50 -l 'type:Conv2d'
    """
    with working():
        with importing():
            from fmextract.run.describe import describe

        chosen = tuple(selectors or ())
        rows = describe(model, weights=weights, preprocess=preprocess or "model", size=size, selectors=chosen)
    _show([asdict(row) for row in rows], lambda: rows.table(tables.width()), as_json)
    return 0


@command(app)
def info(out: File, as_json: Json = False) -> int:
    """Say what an output holds: its run, rows and layers.

    fmextract info acts.h5
    """
    with working():
        from fmextract.reading import activations

        with activations.open(out) as acts:
            said = acts.info()
    _show(said, lambda: tables.info(said), as_json)
    return 0


@command(app)
def pack(
    directory: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A directory of shards, as `extract -o DIR/` leaves.", show_default=False),
    ],
    out: Annotated[Path, _option("--out", "-o", metavar="OUT", help="The file to make, as name.h5.")],
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
) -> int:
    """Make one file of a directory of shards.

    Chunks are copied as they are; the directory stays. A run that is not finished is refused.

    fmextract pack acts/ -o acts.h5
    """
    with working():
        from fmextract.run import packing

        packing.pack(directory, out, leave_out=packing.row_ranges(leave_out or ()), overwrite=overwrite)
    return info(out, as_json=as_json)


@command(app)
def verify(
    out: File,
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
) -> int:
    """Check an output: checksums, every chunk, rows, statistics.

    Exit code 5 where something is not as it was written. Code that a file names is run only if you name it again, or
    with --trust.

    fmextract verify acts.h5 --rerun 20
    """
    with working():
        from fmextract.verification import verify as check

        report = check(
            out,
            rerun=rerun,
            model=model,
            source=source,
            preprocess=preprocess,
            weights=weights,
            trust=trust,
            progress=progress(),
        )
    _show(report.as_json(), lambda: report.table(tables.width()), as_json)
    return 0 if report.ok else MISMATCH


@command(app)
def report(
    out: File,
    page: Annotated[
        Path | None,
        _option("--out", "-o", metavar="OUT", help="The page to write. [default: report.html beside FILE]"),
    ] = None,
    images: Annotated[
        Path | None,
        _option("--images", metavar="DIR", help="Where the photos are now. [default: where the run found them]"),
    ] = None,
    max_size: Annotated[
        str, _option("--max-size", metavar="SIZE", help="Of the page; what does not fit is told. [default: 20MB]")
    ] = "20MB",
    as_json: Json = False,
) -> int:
    """Write one HTML page about an output, to browse and to send.

    Its run, every layer in numbers, maps over photos, the strongest images of each channel. Opens without a server.

    fmextract report acts.h5 -o report.html
    """
    with working():
        from fmextract.visual.report.report import write_report

        made = write_report(out, page, images=images, max_size=parse_size(max_size, "--max-size"))
    _show(made.as_json(), lambda: str(made), as_json)
    return 0


@command(app)
@with_run_options
def bench(
    source: Annotated[
        str | None,
        typer.Argument(metavar="SOURCE", help="As in `extract`. [default: JPEGs made of the demo's photos]"),
    ] = None,
    *,
    model: Model,
    repeats: Annotated[int, _option("--repeats", metavar="N", help="Medians of so many turns. [default: 3]")] = 3,
    plot: Annotated[Path | None, _option("--plot", metavar="OUT", help="Draw it: .png, .pdf or .svg.")] = None,
    theme: Theme = "dark",
    dpi: Dpi = 150,
    as_json: Json = False,
    **options: Any,
) -> int:
    """Measure the stages alone, and how near a run comes to their limit.

    fmextract bench photos/ -m resnet50 -w random:0 -l 'layer*' --precision bf16
    """
    config = _config(options)
    with working():
        with importing():
            from fmextract.benchmark import bench as measure
        style = _style(theme, dpi, out=plot)
        found = measure(source, model, config, progress(), repeats=repeats)
        if plot is not None:
            from fmextract.visual.stages import draw_stages

            draw_stages(found, plot, style=style)
    _show(found.as_json(), lambda: found.table(tables.width()), as_json)
    return 0


@command(app)
def demo(
    out: Annotated[Path, _option("--out", "-o", metavar="OUT", help="Where to put it. [default: demo/]")] = Path(
        "demo"
    ),
    as_json: Json = False,
) -> int:
    """Make a first file and picture with a trained network.

    Photos out of scikit-image run through EfficientNet-Lite0; nothing is downloaded.

    pip install 'fmextract[demo]' && fmextract demo
    """
    with working():
        with importing():
            from fmextract.demo import demo as run_demo

        made = run_demo(out, progress())
    _show(made.as_json(), lambda: str(made), as_json)
    return 0


@command(app)
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="What counts as right.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="What is compared with it.", show_default=False)],
    layers: Annotated[
        list[str] | None,
        _option(
            "--layer", "-l", metavar="SELECTOR", help="A layer: its name, or a selector; repeatable. [default: all]"
        ),
    ] = None,
    out: Annotated[
        Path | None, _option("--out", "-o", metavar="OUT", help="Draw it, too: name.png, name.pdf or name.svg.")
    ] = None,
    worst: Annotated[int, _option("--worst", metavar="K", help="Images named for each layer. [default: 3]")] = 3,
    theme: Theme = "dark",
    dpi: Dpi = 150,
    as_json: Json = False,
) -> int:
    """Say where two outputs begin to differ, layer by layer.

    Two precisions, two checkpoints, two ways of storing: rows are matched by key, layers by name.

    fmextract compare fp32.h5 bf16.h5 -o differences.png
    """
    with working():
        from fmextract import comparison
        from fmextract.reading import activations

        style = _style(theme, dpi, out=out)
        with activations.open(a) as first, activations.open(b) as second:
            found = comparison.compare(first, second, layers or (), worst=worst)
        if out is not None:
            from fmextract.visual.differences import draw_comparison

            draw_comparison(found, out, style=style)
    _show(found.as_json(), lambda: found.table(tables.width()), as_json)
    return 0


@command(app)
def export(
    acts: File,
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
            metavar="OUT",
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
) -> int:
    """Write stored layers in a format of other tools.

    Rows stay in their places, with their keys beside them; rows that failed hold NaN, and rdm leaves them out.

    fmextract export acts.h5 --to npy -l 'layer*' -o arrays/
    """
    with working():
        from fmextract.exporting.export import export as write

        told = progress("row")
        made = write(acts, to=to, out=out, layers=layers, metric=metric, overwrite=overwrite, progress=told)
    _show(made.as_json(), lambda: made.table(tables.width()), as_json)
    return 0


app.add_typer(show, name="show")


def _what_is_kept(out: Path) -> str:
    from fmextract.run.output import finished_shards

    kept = finished_shards(out)
    if not kept:
        return "no shard was finished yet: the same command starts over"
    return f"{text.count(kept, 'shard')} finished and kept: the same command goes on from there"


if __name__ == "__main__":
    sys.exit(main())
