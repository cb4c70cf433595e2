"""What runs a model: `extract`, `plan`, `layers` and `bench`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmextract.common.progress import shown
from fmextract.config import Config, FailureBudget, by_present_names
from fmextract.errors import ConfigError
from fmextract.options import (
    HowToPreprocess,
    Images,
    PathLike,
    RunOptions,
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
    from fmextract.benchmark import Benchmark
    from fmextract.planning import Plan
    from fmextract.reading.activations import Activations
    from fmextract.records import Progress
    from fmextract.run.describe import ModelLayers


def extract(
    source: Images,
    model: str | torch.nn.Module | None,
    out: PathLike,
    *,
    layers: Sequence[str] | str = (),
    plan: Plan | PathLike | None = None,
    like: Output | None = None,
    trust: bool = False,
    progress: bool | Progress = True,
    **options: Unpack[RunOptions],
) -> Activations:
    """Run images through a model and store the activations of its layers.

    Where `out` holds the beginning of the same run, it is taken up; where it is complete, nothing is run. Images that
    fail are no exception: they are rows with a status, whose values are NaN.

    Args:
        source: A folder (recursive), a manifest (.csv, .tsv, .jsonl, .txt with a column `path`), a pattern, a
            map-style Dataset, or a sequence of images.
        model: A name (`resnet50` of torchvision, `timm:NAME`, `module:callable`), or a module, which is left as it was;
            None with `like`.
        out: `name.h5` for one file, a directory for shards.
        layers: Selectors: paths, globs (`"layer?.*.conv1"`), `"type:Conv2d"`, `"conv#0"`, with a reducer
            `"layer4=mean"`. None: the model's main parts.
        plan: What `plan` returned for the same arguments, or the file it was saved to: nothing is measured again.
        like: An output, by its path or open: what is not said here is as in the run that made it, on other images. The
            model is then None, or given where the output cannot name it.
        trust: Let code run, and weights be downloaded, that only `like` names.
        progress: Whether to show a bar and notes on stderr; or an object that is told instead.
        **options: See `RunOptions`.

    Returns:
        The finished output, as `open(out)` gives it: layers of shape (image, …), float32 unless `dtype` says otherwise.

    Raises:
        ConfigError: For what cannot be done, or its kin: ModelError, LayerError, SourceError, OutputError.
        RunStopped: For a run that ended early; the same call resumes it.

    Examples:
        >>> acts = fm.extract("photos/", "shufflenet_v2_x0_5", "acts.h5", layers=["conv1", "conv5"], weights="random:0")
        >>> acts["conv5"].shape  # (image, channel, y, x)
        (4, 1024, 7, 7)
        >>> pooled = fm.extract("photos/", "shufflenet_v2_x0_5", "pooled.h5", layers="conv5=mean", weights="random:0")
        >>> pooled["conv5=mean"][:].dtype, pooled.keys[0]
        (dtype('float32'), 'a.png')
        >>> again = fm.extract("photos/", None, "again.h5", like="pooled.h5", limit=2)
        >>> again["conv5=mean"].shape
        (2, 1024)
    """
    from fmextract.run.extract import extracted

    with _as_in(like, trust, source, model, {"layers": layers, **options}) as (network, config):
        return extracted(source, network, out, config, shown(progress), plan=plan)


def plan(
    source: Images,
    model: str | torch.nn.Module | None,
    out: PathLike = "acts.h5",
    *,
    layers: Sequence[str] | str = (),
    plan: Plan | PathLike | None = None,
    like: Output | None = None,
    trust: bool = False,
    progress: bool | Progress = True,
    **options: Unpack[RunOptions],
) -> Plan:
    """Say what `extract` with the same arguments would do, and what it would cost.

    Builds the model, measures on the first images, and writes nothing.

    Args:
        source: As in `extract`.
        model: As in `extract`.
        out: As in `extract`; the space on its disk is looked at.
        layers: As in `extract`.
        plan: A plan made before, that is checked against these arguments instead of measuring again.
        like: As in `extract`.
        trust: As in `extract`.
        progress: Whether to show notes on stderr; or an object that is told instead.
        **options: See `RunOptions`.

    Returns:
        The plan: precision, batch size, layers with shapes and types, shards, estimates in bytes and seconds. `print`
        shows it as a table; `Plan.save` keeps it for `extract(plan=…)`.

    Raises:
        ConfigError: For what cannot be done, or its kin, as in `extract`.

    Examples:
        >>> asked = {"layers": ["conv1", "conv5"], "weights": "random:0", "precision": "fp32"}
        >>> plan = fm.plan("photos/", "shufflenet_v2_x0_5", **asked)
        >>> plan
        <Plan: 4 images, 2 layers, fp32 on ..., about ... MiB on disk>
        >>> plan.layers[1].shape
        (1024, 7, 7)
        >>> acts = fm.extract("photos/", "shufflenet_v2_x0_5", "planned.h5", plan=plan, **asked)
    """
    from fmextract.run.extract import make_plan

    with _as_in(like, trust, source, model, {"layers": layers, **options}) as (network, config):
        return make_plan(source, network, out, config, shown(progress), plan=plan)


@contextmanager
def _as_in(
    like: Output | None, trust: bool, source: Images, model: Any, options: Mapping[str, Any]
) -> Iterator[tuple[Any, Config]]:
    """The model and the options of a run, which may be those that made the output `like` where they are not said."""
    if like is None:
        if trust:
            raise ConfigError("trust=True is about what an output names: it only means something with like=")
        yield model, Config.of(**options)
        return
    from fmextract.reading.opened import place
    from fmextract.run.like import like as as_in

    said = {name: value for name, value in by_present_names(options).items() if name != "layers" or listed(value)}
    with as_in(place(like), model, source, said, allow=trust) as (network, told):
        yield network, Config.of(**told)


def layers(
    model: str | torch.nn.Module,
    *,
    layers: Sequence[str] | str = (),
    weights: str | None = None,
    preprocess: HowToPreprocess = "model",
    size: Size = None,
) -> ModelLayers:
    """List a model's layers in the order of execution, with the shapes that would be stored.

    Args:
        model: As in `extract`. A name is built with random weights: nothing is downloaded.
        layers: Selectors as in `extract`; with a reducer the shape is what it would keep. None: every layer.
        weights: As in `extract`. None: random ones for a name; a module keeps its own.
        preprocess: As in `extract`; it says the size of the input.
        size: Size of the input in pixels: N, `"HxW"` or (height, width). Where nothing says it, 224.

    Returns:
        One `ModuleRow` per layer, those that are never called last: path, type, number (`conv#20`), shape without the
        image axis, bytes per image, receptive field of a layer with maps. `print` shows it as a table.

    Raises:
        ModelError: For a model that cannot be built.
        LayerError: For a selector that matches nothing.
        SourceError: Where the size of the input is not known.

    Examples:
        >>> for row in fm.layers("shufflenet_v2_x0_5", layers=["conv#0", "conv5=mean"]):
        ...     print(row.path, row.type, row.shape)
        conv1.0 Conv2d (24, 112, 112)
        conv5=mean Sequential (1024,)
    """
    from fmextract.run.describe import describe

    return describe(model, weights=weights, preprocess=preprocess, size=written_size(size), selectors=listed(layers))


def bench(
    source: Images | None,
    model: str | torch.nn.Module,
    *,
    layers: Sequence[str] | str = (),
    repeats: int = 3,
    plot: PathLike | None = None,
    theme: Theme = "dark",
    dpi: int = 150,
    progress: bool | Progress = True,
    **options: Unpack[RunOptions],
) -> Benchmark:
    """Measure the stages of a run alone, and how near the whole run comes to their limit.

    Args:
        source: As in `extract`. None: JPEGs made of the demo's photos (extra `demo`).
        model: As in `extract`.
        layers: As in `extract`.
        repeats: Medians of so many turns.
        plot: A picture to draw of it: .png, .pdf or .svg.
        theme: Of that picture; light for paper.
        dpi: Pixels per inch of that picture.
        progress: Whether to show notes on stderr; or an object that is told instead.
        **options: See `RunOptions`.

    Returns:
        Rates in images per second: of each stage, of the bare library call it is made of, of whole runs, and the limit.

    Raises:
        ConfigError: For what cannot be done, or its kin, as in `extract`.

    Examples:
        >>> found = fm.bench("photos/", "shufflenet_v2_x0_5", weights="random:0", layers="conv5", repeats=1)
        >>> [stage.name for stage in found.stages if stage.part]
        ['decode', 'forward', 'statistics', 'encode', 'write']
    """
    from fmextract import benchmark

    config = Config.of(layers=layers, **options)
    if plot is None:
        return benchmark.bench(source, model, config, shown(progress), repeats=repeats)
    from fmextract.visual import canvas, stages

    style = canvas.Style(theme, dpi)
    canvas.check_name(Path(plot))
    found = benchmark.bench(source, model, config, shown(progress), repeats=repeats)
    stages.draw_stages(found, Path(plot), style=style)
    return found


def _default(option: str) -> Any:
    value = getattr(Config(), option)
    return "5%" if isinstance(value, FailureBudget) else value


for _function in (extract, plan, bench):
    with_options(_function, as_parameters(RunOptions, _default))
