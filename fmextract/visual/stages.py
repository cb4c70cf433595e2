"""Draw what `fmextract bench` measured: the time per image, stage by stage, and that of whole runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from fmextract.common.folders import local_name
from fmextract.visual import canvas
from fmextract.visual.canvas import Style, cut, styled

if TYPE_CHECKING:
    from fmextract.benchmark import Benchmark


@styled
def draw_stages(found: Benchmark, out: str | os.PathLike[str], *, style: Style = canvas.PLAIN) -> Path:
    """Draw a benchmark into `out` (.png, .pdf, .svg); returns the path. Raises MissingExtra, OutputError.

    One bar per stage, in milliseconds per image, through the code of a run and by the bare library call; below them the
    limit that the stages set, and whole runs.
    """
    stages = [stage for stage in found.stages if stage.part]
    names = [stage.name for stage in stages] + ["limit", "end to end"]
    ours = [1e3 / stage.images_per_second for stage in stages] + [1e3 / found.limit, 1e3 / found.end_to_end]
    bare = [1e3 / stage.bare if stage.bare else 0.0 for stage in stages] + [0.0, 0.0]
    figure = canvas.figure(8.5, 1.7 + 0.42 * len(names))
    height = figure.get_figheight()
    machine = cut(found.machine.get("processor", found.device), 40)
    canvas.heading(figure, f"{cut(local_name(found.model), 30)}, {found.precision}, on {machine}", "")
    words = f"{found.end_to_end:.3g} images/s, {found.share:.0%} of the limit; {found.limiting_stage} takes most"
    axis = canvas.plot_axis(figure, (0.14, 0.6 / height, 0.78, 1 - 1.7 / height), words)
    places = list(range(len(names)))[::-1]
    colours = [canvas.theme().blue] * len(stages) + [canvas.theme().faint, canvas.theme().accent]
    axis.barh(places, ours, height=0.62, color=colours)
    axis.barh(places, bare, height=0.2, color=canvas.theme().orange, label="bare library call")
    for place, value in zip(places, ours, strict=True):
        axis.text(value, place, f" {value:.3g}", color=canvas.theme().ink, size=8.5, va="center")
    axis.set_yticks(places, names)
    axis.set_xlabel("milliseconds per image, all threads", color=canvas.theme().faint, size=9)
    axis.grid(axis="x", color=canvas.theme().line, linewidth=0.8)
    axis.grid(visible=False, axis="y")
    axis.margins(x=0.08)
    canvas.legend(axis)
    return canvas.save(figure, out)
