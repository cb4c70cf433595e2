"""Describe what decides a network's values beside its weights: its modules, their settings and code, and hooks."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import torch
from torch import nn

from fmextract.common.facts import Facts, Told, is_library

_ENTRIES = ("forward", "__call__", "__getattr__", "__getattribute__")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_INTERNAL = re.compile(
    r"_parameters|_buffers|_modules|_non_persistent_buffers_set|training|_is_full_backward_hook|_compiled_call_impl"
    r"|_.*_hooks(_with_kwargs|_always_called)?"
)


def structure(module: nn.Module) -> Told:
    """Collect the facts of a network: how many modules of which class, how they are nested, settings, code, hooks."""
    modules = list(module.named_modules(remove_duplicate=False))
    first: dict[int, str] = {}
    for path, one in modules:
        first.setdefault(id(one), path)
    facts = Facts(first)
    nesting = [(path, type(one).__qualname__.rpartition("<locals>.")[2], first[id(one)]) for path, one in modules]
    facts.value("nesting", facts.digest("nesting", nesting))
    groups: dict[type, list[tuple[str, dict[str, Any]]]] = {}
    for path, one in modules:
        if first[id(one)] == path:
            facts.names |= one._non_persistent_buffers_set
            groups.setdefault(type(one), []).append((path, _attributes(one)))
            _tell_hooks(facts, path or "the model", vars(one))
            if isinstance(one, torch.jit.ScriptModule):
                facts.value(f"script of {path or 'the model'}", _script(one))
    _tell_hooks(facts, "every module", {name: getattr(nn.modules.module, f"_global{name}") for name in _HOOKS})
    facts.objects(groups, _ENTRIES)
    told = facts.told()
    counts = dict(sorted(Counter(kind for path, kind, place in nesting if path == place).items()))
    packages = told.packages | {cls.__module__.partition(".")[0] for cls in groups if is_library(cls.__module__)}
    return Told({"modules": counts, **told.facts}, packages, told.unknown)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return what a module holds beside parameters and what is described elsewhere."""
    held = {name: value for name, value in vars(module).items() if not _INTERNAL.fullmatch(name)}
    return held | {name: module._buffers[name] for name in module._non_persistent_buffers_set}


def _tell_hooks(facts: Facts, where: str, held: dict[str, Any]) -> None:
    for kind in _HOOKS:
        for number, hook in enumerate((held.get(kind) or {}).values()):
            facts.value(f"{kind[1:-1].replace('_', ' ')} {number} of {where}", hook)


def _script(module: torch.jit.ScriptModule) -> str:
    """Return the source of a scripted module, without the numbers that a process gives to types of the same name."""
    try:
        return re.sub(r"___torch_mangle_\d+", "", str(module.code))
    except (AttributeError, RuntimeError):  # one without a forward
        return ""
