"""Find out whether anything in a model may draw a random number in evaluation mode, by a look at its code."""

from __future__ import annotations

from torch import nn

_LIBRARIES = ("torch.nn.", "torchvision.", "timm.")
"""Packages whose modules draw nothing for single images: they draw in training mode, for every image, or never. Modules
that run a user's program, as scripted and traced ones do, do not count."""


def may_draw(model: nn.Module) -> bool:
    """Return whether code runs in the forward pass that is not a library's, and so may draw for some image alone.

    What draws for every image is seen in any pass.
    """
    return any(_is_users(module) for module in model.modules())


def _is_users(module: nn.Module) -> bool:
    known = type(module).__module__.startswith(_LIBRARIES) and "forward" not in vars(module)
    return not known or bool(module._forward_hooks) or bool(module._forward_pre_hooks)
