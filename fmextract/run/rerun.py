"""Run images of a finished output again: what that needs is what the file names, unless the user says it.

A file may name anything. Code that it names is not run, and nothing is downloaded for it, unless the user gives the
name again or trusts the file; see `common.trust`.
"""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fmextract.capture import reducers
from fmextract.common import strict_json
from fmextract.common.progress import Quiet
from fmextract.common.trust import names_from_a_file
from fmextract.config import Config
from fmextract.errors import ConfigError, LayerError
from fmextract.inputs import sources
from fmextract.model import loading
from fmextract.reading import activations
from fmextract.records import Progress
from fmextract.run import identity, prepare, recheck, same_run, working
from fmextract.selector import Selector


@dataclass(frozen=True, slots=True)
class Said:
    """What the user says of the run; None for what the file is to say. `trust`: the file is known to be harmless."""

    model: Any = None
    source: Any = None
    preprocess: Any = None
    weights: str | None = None
    trust: bool = False

    def names(self) -> list[str]:
        return [name for name in (self.model, self.source, self.preprocess, self.weights) if isinstance(name, str)]


def rerun(
    acts: activations.Activations, count: int, said: Said, seed: int | None, progress: Progress | None
) -> list[recheck.Difference]:
    """Run `count` random images again, which `seed` chooses; gives what differs. Raises ConfigError where it cannot."""
    first = acts.first_row
    there = np.flatnonzero(acts.keys != "")
    chosen = np.random.default_rng(seed).choice(there, min(count, len(there)), replace=False)
    with (
        limited(acts, said),
        prepare.prepare(
            _source(acts, said), model(acts, said), Config.of(**options(acts, said)), progress or Quiet()
        ) as prepared,
    ):
        now = strict_json.plain(identity.identity(prepared))
        then = {**acts.config["identity"], "device": now["device"]}
        if changed := same_run.changed(then, same_run.Asked(now, prepared.source), [], lambda text: None):
            raise ConfigError(f"cannot run images of {acts.path} again: {same_run.listed(changed)}")
        with working.working(prepared, recheck.plan_of(acts, str(prepared.device))) as work:
            return recheck.differences(work, acts, first, [first + int(row) for row in chosen])


def limited(acts: activations.Activations, said: Said) -> contextlib.AbstractContextManager[None]:
    """While it lasts, a name in the file becomes code, or weights out of a network, only if the user said so.

    Raises ConfigError that says all that has to be given.
    """
    if said.trust:
        return contextlib.nullcontext()
    named = list(_code(acts, said))
    if named:
        again = [f"{option} {name}" for option, name in named if option != "="]
        raise ConfigError(
            f"{acts.path} names code: {', '.join(repr(name) for _, name in named)}. What a file names is not run unless"
            " you say so: "
            + (f"give it again ({' '.join(again)}), or " if len(again) == len(named) else "")
            + "say --trust (trust=True) if you know where the file is from"
        )
    recorded = acts.config.get("origin", {}).get("weights_file_sha256", "")
    return names_from_a_file(
        acts.path, said.names(), downloads=said.model is not None, weights_file_sha256=str(recorded)
    )


def _code(acts: activations.Activations, said: Said) -> Iterator[tuple[str, str]]:
    """What the file names that would be imported, each with the option that gives it (`=`: a reducer; none does)."""
    options = acts.config.get("options", {})
    if said.model is None and loading.is_code(str(acts.attrs["model"])):
        yield "-m", str(acts.attrs["model"])
    if said.source is None and sources.is_code(str(acts.attrs["source"])):
        yield "--source", str(acts.attrs["source"])
    if said.preprocess is None and loading.is_code(str(options.get("preprocess"))):
        yield "--preprocess", str(options.get("preprocess"))
    for selector in options.get("layers", []):
        if reducers.is_code(reducer := _reducer(selector)):
            yield "=", reducer


def _reducer(selector: str) -> str:
    """Return the reducer that a selector may name; none, where it can only be the path of a module with odd letters."""
    try:
        return Selector.parse(selector).reducer
    except LayerError:
        return ""


def options(acts: activations.Activations, said: Said) -> dict[str, Any]:
    """Return the options of the run, with what the user says. Raises ConfigError where the file cannot say it."""
    told = {**acts.config.get("options", {}), "dataset_workers": 0}  # a few rows; and a file starts no processes
    if said.preprocess is not None:
        told["preprocess"] = said.preprocess
    elif _was_an_object(acts, told):
        raise ConfigError(
            f"{acts.path}: its images were preprocessed by an object of a program; give it as preprocess=…"
        )
    if said.weights is not None or isinstance(said.model, nn.Module):
        told["weights"] = said.weights or "default"
    return told


def _was_an_object(acts: activations.Activations, options: Mapping[str, Any]) -> bool:
    """Whether the preprocessing was none that has a name."""
    how = options.get("preprocess")
    own = acts.preprocess.get("kind") == "custom" and not loading.is_code(str(how)) and how != "model"
    return own or not isinstance(how, str) or how.startswith("Preprocess(")


def model(acts: activations.Activations, said: Said) -> Any:
    """Return the model that the user says, or the name in the file. Raises ConfigError where that is none."""
    name = str(acts.attrs["model"])
    if said.model is None and acts.config.get("origin", {}).get("provider") == "python" and ":" not in name:
        raise ConfigError(f"{acts.path}: the model {name} was an object in a program; give it as model=…")
    return name if said.model is None else said.model


def _source(acts: activations.Activations, said: Said) -> Any:
    place = str(acts.attrs["source"])
    there = Path(place).exists() or glob.has_magic(place) or sources.is_code(place)
    if said.source is None and not there:
        raise ConfigError(
            f"{acts.path}: the source {place!r} is not there; go to its folder, or give it with --source (source=)"
        )
    return place if said.source is None else said.source
