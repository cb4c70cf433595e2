"""What works on outputs: `open`, `verify`, `pack`, `export`, `compare` and `report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from fmextract.common.progress import shown
from fmextract.config import parse_size
from fmextract.options import HowToPreprocess, Images, PathLike, Theme, listed

if TYPE_CHECKING:
    import torch

    from fmextract.comparison import Comparison
    from fmextract.exporting.export import Exported
    from fmextract.reading.activations import Activations
    from fmextract.records import Progress
    from fmextract.verification import Verification
    from fmextract.visual.report.report import Report

    Output: TypeAlias = PathLike | Activations


def open(path: PathLike, *, threads: int | None = None, cache: int = 64 << 20) -> Activations:
    """Open an output: one .h5 file, or a directory of shards.

    Args:
        path: What `extract` was given as `out`.
        threads: How many decode chunks. None: as many as the process has CPUs.
        cache: Bytes of decoded chunks that are kept, about.

    Returns:
        The layers by name and the columns of the images. It is a context manager; nothing is read before it is asked
        for.

    Raises:
        FormatError: Where there is no such file, it is not fmextract's or is newer, or a run is in progress.
        DamagedError: Where its content is not what was written.

    Examples:
        >>> with fm.open("acts.h5") as acts:
        ...     acts.layers, acts["conv5"][0, :3].shape
        (('conv1', 'conv5'), (3, 7, 7))
    """
    from fmextract.reading import activations

    return activations.open(path, threads=threads, cache=cache)


def verify(
    acts: Output,
    *,
    rerun: int = 0,
    model: str | torch.nn.Module | None = None,
    source: Images | None = None,
    preprocess: HowToPreprocess = None,
    weights: str | None = None,
    trust: bool = False,
    seed: int | None = None,
    progress: bool | Progress = True,
) -> Verification:
    """Check an output: checksums, every chunk, rows, statistics; and run some images again.

    What `rerun` needs is what the file names, unless it is given here.

    Args:
        acts: A path, or what `open` returned.
        rerun: How many random images are run through the model again.
        model: For `rerun`, as in `extract`.
        source: For `rerun`, as in `extract`.
        preprocess: For `rerun`, as in `extract`.
        weights: For `rerun`, as in `extract`.
        trust: Let `rerun` import code, and download weights, that only the file names.
        seed: Chooses the images. None: others each time.
        progress: Whether to show notes on stderr; or an object that is told instead.

    Returns:
        What was looked at, and `problems`; `ok` where there is none. `largest_error` is the relative L2 error of the
        images that were run again.

    Raises:
        FormatError: For what is no finished output.
        ConfigError: Where images cannot be run again.

    Examples:
        >>> checked = fm.verify("acts.h5")
        >>> checked.ok, checked.rows, checked.problems
        (True, 4, ())
    """
    from fmextract import verification

    return verification.verify(
        path_of(acts),
        rerun=rerun,
        model=model,
        source=source,
        preprocess=preprocess,
        weights=weights,
        trust=trust,
        seed=seed,
        progress=shown(progress),
    )


def pack(
    directory: Output, out: PathLike, *, leave_out: Sequence[str | range] = (), overwrite: bool = False
) -> Activations:
    """Make one file of a directory of shards, which stays; chunks are copied as they are.

    Args:
        directory: What `extract` was given as `out`, or what `open` made of it.
        out: The file to make, `name.h5`.
        leave_out: Rows of shards that are missing, as ranges or `"4096-8191"` (first and last row). They become rows
            that failed.
        overwrite: Replace an earlier output of fmextract.

    Returns:
        The file, as `open(out)` gives it.

    Raises:
        FormatError: For a run that is not finished.
        OutputError: Where `out` exists, or `directory` is none of shards.

    Examples:
        >>> acts = fm.extract("photos/", "shufflenet_v2_x0_5", "shards/", layers="conv5=mean", weights="random:0")
        >>> fm.pack("shards/", "packed.h5")["conv5=mean"].shape
        (4, 1024)
    """
    from fmextract.reading import activations
    from fmextract.run import packing

    ranges = [r for rows in leave_out for r in ([rows] if isinstance(rows, range) else packing.row_ranges([rows]))]
    target = Path(out).expanduser()
    packing.pack(path_of(directory), target, leave_out=ranges, overwrite=overwrite)
    return activations.open(target)


def export(
    acts: Output,
    *,
    to: Literal["npy", "safetensors", "parquet", "netcdf", "rdm"],
    out: PathLike,
    layers: Sequence[str] | str | None = None,
    metric: Literal["euclidean-squared", "correlation", "cosine"] | None = None,
    overwrite: bool = False,
    progress: bool | Progress = True,
) -> Exported:
    """Write stored layers in a format of other tools.

    Rows stay in their places, with their keys beside them; rows that failed hold NaN, and `"rdm"` leaves them out.

    Args:
        acts: A path, or what `open` returned.
        to: `"npy"`: a directory, one file per layer. `"parquet"`: one row per image. `"rdm"`: dissimilarities for
            rsatoolbox.
        out: A directory for npy; name.safetensors, name.parquet, name.nc; name.h5 for rdm.
        layers: Names or selectors. None: all.
        metric: Of `"rdm"`, as rsatoolbox defines it. None: euclidean-squared.
        overwrite: Replace an earlier export to the same format.
        progress: Whether to show a bar on stderr; or an object that is told instead.

    Returns:
        The path, bytes, and where each layer stands in it, with its shape and type.

    Raises:
        ConfigError: For a format, metric or layer that there is not.
        OutputError: Where something else stands at `out`.
        MissingExtra: Where the format's library is not installed.

    Examples:
        >>> written = fm.export("acts.h5", to="npy", out="arrays/", layers="conv5")
        >>> np.load("arrays/" + written.layers[0].place).shape
        (4, 1024, 7, 7)
    """
    from fmextract.exporting import export as exporting
    from fmextract.reading.opened import opened

    with opened(acts) as stored:
        told = shown(progress, unit="row")
        chosen = listed(layers)
        return exporting.export(
            stored, to=to, out=out, layers=chosen, metric=metric, overwrite=overwrite, progress=told
        )


def compare(
    a: Output,
    b: Output,
    *,
    layers: Sequence[str] | str | None = None,
    out: PathLike | None = None,
    worst: int = 3,
    theme: Theme = "dark",
    dpi: int = 150,
) -> Comparison:
    """Say where two outputs begin to differ, layer by layer: two precisions, two checkpoints, two ways of storing.

    Images are matched by key, layers by name. Similarity is linear CKA (S. Kornblith et al., "Similarity of Neural
    Network Representations Revisited", ICML 2019).

    Args:
        a: What counts as right: a path, or what `open` returned.
        b: What is compared with it.
        layers: Names. None: all that both have.
        out: A picture to draw of it: .png, .pdf or .svg.
        worst: How many images are named for each layer.
        theme: Of that picture; light for paper.
        dpi: Pixels per inch of that picture.

    Returns:
        Per layer the relative L2 error (1 is 100%), the cosine of all values, CKA (0 to 1), and the images that differ
        most.

    Raises:
        ConfigError: Where the two have no image, or no layer of the same shape, in common.

    Examples:
        >>> acts = fm.extract("photos/", "shufflenet_v2_x0_5", "bf16.h5", layers=["conv1", "conv5"], weights="random:0",
        ...                   precision="bf16")
        >>> found = fm.compare("acts.h5", "bf16.h5")
        >>> [(one.layer, one.error < 0.02, one.cka > 0.99) for one in found.layers]
        [('conv1', True, True), ('conv5', True, True)]
    """
    from fmextract import comparison
    from fmextract.reading.opened import opened

    style = None
    if out is not None:
        from fmextract.visual import canvas

        style = canvas.Style(theme, dpi)
        canvas.check_name(out)
    with opened(a) as right, opened(b) as other:
        found = comparison.compare(right, other, listed(layers), worst=worst)
    if out is not None and style is not None:
        from fmextract.visual.differences import draw_comparison

        draw_comparison(found, out, style=style)
    return found


def report(
    acts: Output, *, out: PathLike | None = None, images: PathLike | None = None, max_size: int | str = "20MB"
) -> Report:
    """Write one HTML page about an output, to browse and to send; it opens without a server.

    Args:
        acts: A path, or what `open` returned.
        out: The page. None: report.html beside the output.
        images: The folder where the photos are now. None: where the run found them.
        max_size: Of the page, in bytes or as `"20MB"`; what does not fit is told.

    Returns:
        The path, what is in it, and what was left out and why.

    Raises:
        ConfigError: Where `out` holds something else, or `max_size` is too little for the numbers.

    Examples:
        >>> page = fm.report("acts.h5", out="report.html")
        >>> page.layers, page.photos
        (2, 4)
    """
    from fmextract.visual.report.report import write_report

    return write_report(path_of(acts), out, images=images, max_size=parse_size(max_size, "--max-size"))


def path_of(acts: Output) -> Path:
    """Where an output is. Raises ConfigError for what is none."""
    from fmextract.reading.opened import place

    return place(acts)
