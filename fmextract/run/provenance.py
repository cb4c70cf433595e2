"""What an output says of its run: identity, versions, source, model, time."""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from fmextract.capture.reducers import Reduction
from fmextract.common import strict_json
from fmextract.common.facts import Facts, Told, changing, interpreter, settled, source_digest
from fmextract.common.folders import remembered
from fmextract.config import is_single_file
from fmextract.inputs import preprocessing
from fmextract.inputs.datasets import DatasetSource
from fmextract.inputs.preprocessing import CustomPreprocess
from fmextract.inputs.sources import folder_of
from fmextract.model import loading
from fmextract.model.structure import structure
from fmextract.planning import Plan, RunInfo
from fmextract.records import FileInfo, Source

LONGEST_NAMES = 60_000
"""An attribute of HDF5 holds 64 KiB: of more classes the names are not stored."""

__all__ = ["code_facts", "code_of", "describe_run", "preprocess_facts", "versions", "versions_for"]


_MADE_BY = (
    "fmextract",
    "torch",
    "torchvision",
    "h5py",
    "numpy",
    "pillow",
    "simplejpeg",
    "torchcodec",
    "isal",
    "triton",
)


def code_of(loaded: loading.LoadedModel) -> dict[str, Told]:
    """Facts of the network, and of the preprocessing where it is a user's, beside their weights and names."""
    told = {"model": structure(loaded.module)}
    if isinstance(loaded.preprocess, CustomPreprocess):
        told["preprocess"] = preprocess_facts(loaded.preprocess)
    return told


def preprocess_facts(custom: CustomPreprocess) -> Told:
    """Facts of a user's preprocessing: its code, and what it closes over."""
    facts = Facts()
    facts.value("the function", custom.function)
    return facts.told()


def code_facts(
    before: Mapping[str, Told],
    now: Mapping[str, Told],
    reductions: Sequence[Reduction | None],
    source: Mapping[str, Any],
) -> tuple[dict[str, Any], list[str]]:
    """(facts of all code of a run and the libraries that they can be compared by, what they do not cover).

    What is other than it was `before` the first forward pass says nothing. `source` is a source's fingerprint.
    """
    own = Facts()
    for reduction in reductions:
        if reduction is not None and not reduction.is_ours:
            own.value(f"reducer {reduction.name}", reduction.apply)
    told = {**now, "reducers": own.told()}
    packages = set(source.get("packages", ())).union(*(part.packages for part in told.values()))
    code: dict[str, Any] = {"by": {"python": interpreter(), **_versions_of(packages)}}
    unknown: list[str] = []
    for name, part in told.items():
        facts = settled(before[name].facts, part.facts) if name in before else dict(part.facts)
        code |= {name: facts} if facts else {}
        unknown += [f"{name}: {what}" for what in (*part.unknown, *changing(facts))]
    return code, [*unknown, *(f"source: {what}" for what in source.get("not_covered", ()))]


def describe_run(
    loaded: loading.LoadedModel, source: Source, out: Path, *, ready: bool, command: str | None
) -> RunInfo:
    """What a file says of its run into `out`, which `command` asked for.

    `ready`: images were the model's inputs as they came.
    """
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    by = f"written by fmextract {_version('fmextract')}"
    info: RunInfo = {
        "title": f"Activations of {loaded.name} for {len(source)} images",
        "source": source.name,
        "history": f"{now} {by}" + (f": {command}" if command else ""),
        "model": loaded.name,
        "weights": loaded.weights,
        "weights_sha256": loaded.weights_sha256,
        "origin": dict(loaded.origin),
        "input_dtype": str(loaded.input_dtype).removeprefix("torch."),
        "preprocess": preprocessing.describe_preprocess(None if ready else loaded.preprocess),
        "created": now,
    }
    if (folder := folder_of(source)) is not None:  # for pictures that are drawn later
        info["images"] = remembered(folder, out.parent if is_single_file(out) else out)
    if names := _label_names(source):
        info["label_names"] = names
    return info


def _label_names(source: Source) -> str:
    """What the labels are called, as JSON, where a Dataset says it and an attribute holds it; else nothing."""
    names = source.label_names() if isinstance(source, DatasetSource) else ()
    known = strict_json.dumps(list(names), ensure_ascii=False)
    return known if names and len(known.encode("utf-8", "replace")) < LONGEST_NAMES else ""


def versions(packages: Iterable[str] = ()) -> dict[str, str]:
    """Of what makes the values: libraries that are installed, those of the model too, Python, the kind of machine."""
    installed = {name: _version(name) for name in _MADE_BY}
    return {name: version for name, version in installed.items() if version} | {
        **_versions_of(name for name in packages if name not in _DISTRIBUTIONS),
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def versions_for(identity: Mapping[str, Any]) -> dict[str, str]:
    """Those of a run, by what its identity names."""
    return versions(identity["code"]["by"].keys() - {"python"})


_DISTRIBUTIONS = {"PIL": "pillow"}
"""What packages are installed as, of those that are met in most runs: to find it out takes long."""


def _versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Of installed libraries by the name that they are imported by; "unknown" where nothing says it.

    That of a library that is developed in place has a digest of its source besides.
    """
    return {name: _version_of(name) for name in sorted(packages)}


def _version_of(package: str) -> str:
    version = _version(package) or _version(_DISTRIBUTIONS.get(package) or _distribution(package)) or "unknown"
    digest = source_digest(package)
    return f"{version} (source {digest})" if digest else version


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except (metadata.PackageNotFoundError, ValueError):
        return None


@functools.cache
def _distribution(package: str) -> str:
    """What a package is installed as: `PIL` by pillow."""
    return next(iter(metadata.packages_distributions().get(package, ())), package)


def file_info(plan: Plan) -> FileInfo:
    info = plan.info
    config = {"options": plan.config, "identity": plan.identity, "batch_size": plan.batch_size, "device": plan.device}
    config |= {"memory_format": plan.memory_format, "weights": info["weights"], "origin": info["origin"]}
    config |= {"input_dtype": info["input_dtype"]}
    config |= {"run_id": plan.run_id, "forward_threads": plan.forward_threads}
    config |= {"fused": [list(pair) for pair in plan.fused], "pooling": plan.pooling, "prepacked": plan.prepacked}
    config |= {"notes": list(plan.notes)}
    return FileInfo(
        title=info["title"],
        source=info["source"],
        history=info["history"],
        config=config,
        model=info["model"],
        weights_sha256=info["weights_sha256"],
        preprocess=info["preprocess"],
        precision=plan.precision,
        versions=plan.versions,
        created=info["created"],
        extra={name: value for name, value in info.items() if name in ("images", "label_names")},
    )
