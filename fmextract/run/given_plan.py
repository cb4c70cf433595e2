"""Run what a plan says that was made before: nothing is measured again, and nothing else is done under its name."""

from __future__ import annotations

import dataclasses
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fmextract import planning
from fmextract.common import strict_json
from fmextract.errors import ConfigError, OutputError
from fmextract.planning import Identity, Plan
from fmextract.reading import activations
from fmextract.run import estimate, make_plan, provenance, same_run, working
from fmextract.run.prepare import Prepared

SHOWN = 5  # differences that a message tells
_OF_FILE = ("batch_size", "memory_format", "forward_threads", "pooling", "prepacked")


def loaded(plan: Plan | str | os.PathLike[str] | None) -> Plan | None:
    """The plan, or what is saved at this path. Raises OutputError, FormatError, ConfigError for what is neither."""
    if plan is None or isinstance(plan, Plan):
        return plan
    if not isinstance(plan, (str, os.PathLike)):
        raise ConfigError(f"plan={plan!r:.80}: expected what plan() returned, or the file it was saved to")
    return Plan.load(Path(plan).expanduser())


def check(plan: Plan, prepared: Prepared, asked: Mapping[str, Any]) -> None:
    """Raises ConfigError where the plan was made for another run than that with the identity `asked`."""
    then, now = same_run.comparable(plan.identity, strict_json.plain(asked))
    then |= {"device": plan.device, "rows": plan.rows, "keys": plan.identity["source"].get("keys")}
    now |= {"device": str(prepared.device), "rows": len(prepared.source), "keys": asked["source"].get("keys")}
    changed = list(planning.differences(then, now))
    if changed:
        raise ConfigError(
            f"the plan was made for another run ({_told(changed, 'in the plan', 'here')}). Give the arguments that it"
            " was made with, or plan again with these."
        )
    check_fits(plan, prepared, asked)


def check_fits(plan: Plan, prepared: Prepared, asked: Mapping[str, Any]) -> None:
    """Raises ConfigError where a plan says something else than the run with the identity `asked` must do.

    Only what is measured is its own affair; a plan may have been changed since, or be somebody else's.
    """
    changed = list(planning.differences(_said(plan), _known(plan, prepared, asked)))
    if not changed:
        given = {layer.name: (layer.compute_dtype, layer.shape) for layer in plan.layers}
        changed = list(planning.differences(given, working.stored_types(prepared, plan)))
    if changed:
        raise ConfigError(f"the plan does not fit ({_told(changed, 'in the plan', 'here')}): plan again.")
    if plan.shard_rows % planning.step(plan.layers, plan.batch_size):
        raise ConfigError(
            f"the plan does not fit: shards of {plan.shard_rows} rows do not hold whole batches of {plan.batch_size}"
            " and whole chunks: plan again."
        )


_ASKED = ("dtype", "clip", "keep_bits", "codec", "top_k")
_ABOUT = {"model": "model", "weights_sha256": "weights", "preprocess": "preprocess"}
"""What the file will say of the run, and what that is called in its identity."""


def _said(plan: Plan) -> dict[str, Any]:
    """What the run decides, as a plan has it."""
    return {
        **{name: getattr(plan, name) for name in _ASKED},
        "rows": plan.rows,
        "device": plan.device.partition(":")[0],
        "info": {name: plan.info.get(name) for name in _ABOUT},
        "layers": [layer.name for layer in plan.layers],
        **{layer.name: dataclasses.asdict(layer) for layer in plan.layers},
    }


def _known(plan: Plan, prepared: Prepared, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The same as it must be, with what only a plan can say."""
    names = [probed.tap.name for probed in prepared.probed]
    known = {
        **{name: asked[name] for name in _ASKED},
        "rows": len(prepared.source),
        "device": asked["device"],
        "info": {
            name: plan.info.get(name) if name == "preprocess" and prepared.ready else asked[of]
            for name, of in _ABOUT.items()
        },
        "layers": names,
    }
    if [layer.name for layer in plan.layers] != names:
        return {**_said(plan), **known}
    for i, layer in enumerate(plan.layers):
        must = make_plan.known_of_layer(prepared, i)
        must["dtype"] = make_plan.type_on_disk(layer.compute_dtype, asked["dtype"])
        for name in ("number", "number_from_end", "classes", "further_paths"):
            if not getattr(layer, name):  # the first plans do not say it
                del must[name]
        if must["field"] is not None:
            must["field"] = dataclasses.asdict(must["field"])
        known[layer.name] = {**dataclasses.asdict(layer), **must}
    return known


def check_taken_up(plan: Plan, prepared: Prepared, asked: Mapping[str, Any], target: Path) -> None:
    """Raises OutputError where the plan that lies in an output that goes on is not one of this run."""
    try:
        check_fits(plan, prepared, asked)
    except ConfigError as error:
        raise OutputError(
            f"{target} cannot go on, as its plan.json is damaged or not of this run: {error} --overwrite begins anew,"
            " -o names another."
        ) from error


def followed(plan: Plan, prepared: Prepared, target: Path, asked: Identity, command: str | None = None) -> Plan:
    """The plan for a new run into `target`. Raises ConfigError where it was made for another one."""
    check(plan, prepared, asked)
    return dataclasses.replace(
        plan,
        run_id=uuid.uuid4().hex,
        config=prepared.config.as_json(),
        identity=asked,
        info=provenance.describe_run(prepared.loaded, prepared.source, target, ready=prepared.ready, command=command),
        versions=provenance.versions_for(asked),
        estimate=dataclasses.replace(plan.estimate, bytes_free=estimate.free_space(target)),
    )


def check_begun(plan: Plan, begun: Plan, target: Path) -> None:
    """Raises OutputError where the run that goes on there is not what `plan` says."""
    _compare({**_decisions(begun), "shard_rows": begun.shard_rows}, plan, target)


def check_finished(plan: Plan, target: Path) -> None:
    """Raises OutputError where the output that is complete there is not what `plan` says."""
    with activations.open(target) as acts:
        config = acts.config
        there = {name: config.get(name) for name in _OF_FILE}
        there |= {"precision": acts.attrs.get("precision"), "fused": len(config.get("fused", ()))}
    _compare(there, plan, target)


def _decisions(plan: Plan) -> dict[str, Any]:
    """What was decided by measuring, and changes values."""
    decided = {name: getattr(plan, name) for name in _OF_FILE}
    return decided | {"precision": plan.precision, "fused": len(plan.fused)}


def _compare(there: Mapping[str, Any], plan: Plan, target: Path) -> None:
    wanted = {**_decisions(plan), "shard_rows": plan.shard_rows}
    changed = list(planning.differences(there, {name: wanted[name] for name in there}))
    if changed:
        raise OutputError(
            f"{target} was made by another plan ({_told(changed, 'there', 'in the plan')}). Leave the plan out to keep"
            " it, --overwrite replaces it, -o names another."
        )


def _told(changed: list[tuple[str, Any, Any]], old: str, new: str) -> str:
    told = [f"{name}: {_short(a)} {old}, {_short(b)} {new}" for name, a, b in changed[:SHOWN]]
    more = len(changed) - SHOWN
    return "; ".join([*told, f"and {more} more"] if more > 0 else told)


def _short(value: Any) -> str:
    said = "not set" if value is None else repr(value)
    return said if len(said) <= 60 else f"{said[:28]} … {said[-28:]}"
