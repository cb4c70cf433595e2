"""Modules whose calls no hook sees, and why: scripted, compiled, wrapped, or still without weights."""

from __future__ import annotations

import torch
from torch import nn

from fmextract.errors import LayerError

# Inside these, calls pass hooks by, or each replica sees a part of the batch; and the attribute with what is wrapped.
_WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}


UNREADY = "its parameters are lazy and not initialised: run the model once on an image, then give it"


def is_unready(module: nn.Module) -> bool:
    """Whether parameters or buffers of its own wait for a first pass to get a shape."""
    own = (*module._parameters.values(), *module._buffers.values())
    return any(isinstance(tensor, torch.Tensor) and nn.parameter.is_lazy(tensor) for tensor in own)


def out_of_reach(model: nn.Module) -> dict[str, str]:
    """Why hooks miss the calls of some modules of `model`, by their paths.

    Raises LayerError where that is the model itself.
    """
    found: dict[str, str] = {}
    inside: dict[str, str] = {}
    for path, module in model.named_modules():
        name = type(module).__name__
        above = path.rpartition(".")[0]
        if path and above in inside:
            found[path] = inside[path] = inside[above]
        elif isinstance(module, torch.jit.ScriptModule):
            found[path] = inside[path] = "it is scripted (torch.jit), which takes no hooks; use it as it was before"
        elif getattr(module, "_compiled_call_impl", None) is not None:
            found[path] = inside[path] = (
                "it was compiled by its compile(), where hooks miss calls; use it before, with --compile"
            )
        elif is_unready(module):
            found[path] = UNREADY
        elif name in _WRAPPERS:
            inner = ".".join(filter(None, ("model", path, _WRAPPERS[name])))
            inside[path] = f"it is wrapped in {name}, where hooks miss calls; use what it wraps: {inner}"
            if not path:
                found[path] = inside[path]
    if "" in found:
        raise LayerError(f"the model: {found['']}")
    return found
