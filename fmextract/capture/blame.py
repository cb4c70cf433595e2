"""What is known of an error that a model raised: in which module, with which inputs, and whether a shape did it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn

_CALLS = ("_call_impl", "inner")  # where torch calls a module, with what it was given as `args` and `kwargs`
_OF_SHAPE = re.compile(
    r"shape|\bsizes?\b|dimension|spatial|height|width|resolution|mat1|padding|kernel size|channels|divisible",
    re.IGNORECASE,
)
_OF_TYPE = re.compile(r"dtype|scalar type|input type|not implemented for", re.IGNORECASE)
_OF_ARGUMENTS = re.compile(r"missing \d+ required|unexpected keyword|positional arguments?|specify .*(ids|embeds)")
SIZE = " Another input size is set by --size, another preprocessing by --preprocess."
ARGUMENTS = (
    " It wants other inputs than a batch of images: give a model that takes just those, as a path.py:callable that"
    " returns it."
)


def told(error: BaseException, model: nn.Module) -> str:
    """The error with its type, where in `model` it was raised and with which inputs; what to do where that is known."""
    said = str(error).strip().rstrip(".")
    what = f"{type(error).__name__}: {said}" if said else type(error).__name__
    place = _place(error, model)
    return f"{what}{f' ({place})' if place else ''}.{_advice(error, said)}"


def _advice(error: BaseException, said: str) -> str:
    if _OF_ARGUMENTS.search(said):
        return ARGUMENTS
    if not isinstance(error, (RuntimeError, ValueError, AssertionError, IndexError)) or _OF_TYPE.search(said):
        return ""
    return SIZE if _OF_SHAPE.search(said) else ""


def _place(error: BaseException, model: nn.Module) -> str:
    """The innermost module whose call had not ended, and its inputs; "" where no module was called."""
    paths = {module: path for path, module in model.named_modules()}
    place = ""
    for frame in _frames(error):
        module = frame.f_locals.get("self")
        if not isinstance(module, nn.Module) or module not in paths:
            continue
        named = f"module {paths[module]!r}" if paths[module] else "the model itself"
        if frame.f_code.co_name in _CALLS and "args" in frame.f_locals:
            given = [*frame.f_locals["args"], *(frame.f_locals.get("kwargs") or {}).values()]
            shown = ", ".join(map(_shown, given)) or "nothing"
            place = f"in {named}, {type(module).__name__}, given {shown}"
        elif not place.startswith(f"in {named}, "):
            place = f"in {named}, {type(module).__name__}"
    return place


def _frames(error: BaseException) -> Iterator[FrameType]:
    at = error.__traceback__
    while at is not None:
        yield at.tb_frame
        at = at.tb_next


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{' x '.join(map(str, value.shape)) or 'one number'} {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__
