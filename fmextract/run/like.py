"""The run that made a file, on other images: what is not said is as that file says.

A file may name anything: `rerun.limited` holds for what it names, and the weights must be the ones of the run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from fmextract.common import trust
from fmextract.errors import ConfigError
from fmextract.reading import activations
from fmextract.run import rerun, same_run
from fmextract.run.rerun import Said

TAKEN = (
    "weights", "preprocess", "size", "exif", "jpeg_decoder", "max_error", "device", "dtype", "clip", "keep_bits",
    "codec", "level", "compile", "seed", "top_k", "effective_fields",
)  # fmt: skip
"""Options as they were asked for. Others say which images, where to, or how the work is divided."""


_COMPARED = ("by", "model", "preprocess")
"""Of the code of a run, what is compared: by which versions it can be, and what is there but for reducers."""
_earlier: ContextVar[tuple[Path, Mapping[str, Any]] | None] = ContextVar("run_of_a_file", default=None)


def other_code(identity: Mapping[str, Any]) -> list[str]:
    """Return notes on code of a run that is not as it was in the file that the run is to be like.

    The same weights run through another forward to other values.
    """
    if (earlier := _earlier.get()) is None:
        return []
    file, code = earlier
    sides = [{"code": _shared(*pair)} for pair in ((code, identity["code"]), (identity["code"], code))]
    differing = same_run.code_compared(*sides)
    return [f"not as in the run of {file}: {same_run.listed(differing)}"] if differing else []


def _shared(side: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return what one side says of its code that the other speaks of too: another Dataset has libraries of its own."""
    by = {name: version for name, version in side.get("by", {}).items() if name in other.get("by", {})}
    return {**{name: facts for name, facts in side.items() if name in other}, "by": by}


@contextlib.contextmanager
def like(
    file: Path, model: Any, source: Any, options: Mapping[str, Any], *, allow: bool = False
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Give the model and the options of the run that made `file`, but for what is said; for a run within the block.

    `model` is None, and `options` lacks, what the file is to say. `allow`: the file is trusted. Raises ConfigError
    where the file cannot say it or may not; in the block, where the weights are others.
    """
    with activations.open(file) as acts:
        config = acts.config
        said = Said(model, source, options.get("preprocess"), options.get("weights"), allow)
        if config["identity"].get("layers") != list(acts.layers) and "layers" not in options:
            raise ConfigError(f"--like {file}: it holds other layers than the run that it is of: name them with -l")
        of_file = rerun.options(acts, said)
        taken = {name: of_file[name] for name in TAKEN if of_file.get(name) is not None}
        taken |= {"layers": of_file.get("layers") or list(acts.layers), "precision": str(acts.attrs["precision"])}
        taken |= {name: config[name] for name in ("batch_size", "memory_format") if name in config}
        limited = rerun.limited(acts, said)
        model = rerun.model(acts, said)
        digest = None if said.weights is not None else str(acts.attrs["weights_sha256"])
        prepared = None if said.preprocess is not None or "size" in options else acts.preprocess
        code = config["identity"].get("code", {})
        told_by = {name: code[name] for name in _COMPARED if name in code and options.get(name) is None}
    before = _earlier.set((Path(file), told_by))
    try:
        with limited, trust.model_of_a_file(Path(file), digest, prepared):
            yield model, {**taken, **options}
    finally:
        _earlier.reset(before)
