"""Load the network that a user names, with its weights and its preprocessing.

`PROVIDERS` holds where networks come from, by the prefix of their name. No pickle is ever executed: weight files are
safetensors, or are read with `weights_only=True`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from fmextract.capture.reach import is_unready
from fmextract.common import strict_json, trust
from fmextract.errors import ConfigError, ModelError
from fmextract.inputs.preprocessing import (
    PREPROCESS_HELP,
    CustomPreprocess,
    Preprocessing,
    apply_size,
    as_preprocessing,
    describe_preprocess,
    measured,
    parse_preprocess,
)
from fmextract.model.providers import NOT_YET, PROVIDERS, Built
from fmextract.model.weights import Weights, load_file, weights_digest
from fmextract.records import Preprocess

__all__ = ["LoadedModel", "load_model"]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A network ready for extraction.

    `module` is on the CPU and in eval mode where it was built here; a caller's own module is left as it is.
    `preprocess` is None where the images must be the model's inputs already (float tensors). `weights` says where the
    values came from, `weights_sha256` what they are. `origin` is JSON-able: provider, name, library.
    `input_dtype`: what inputs are cast to, the type of the first floating-point parameter. `unready`: modules whose
    parameters are lazy and not initialised; a pass ends before the first of them, since what follows has no values.
    """

    module: nn.Module
    name: str
    preprocess: Preprocessing | None
    weights: str
    weights_sha256: str
    origin: Mapping[str, Any]
    input_dtype: torch.dtype = torch.float32
    unready: tuple[nn.Module, ...] = ()

    def forward(self, batch: Tensor) -> Any:
        """Return the forward pass over `batch` (B, …), in the type of the model's inputs.

        Torchvision's detection models take a list of images.
        """
        batch = batch.to(self.input_dtype)
        transform = getattr(self.module, "transform", None)
        inputs = list(batch) if isinstance(transform, GeneralizedRCNNTransform) else batch
        if not self.unready:
            return self.module(inputs)
        ends = [module.register_forward_pre_hook(_end, prepend=True) for module in self.unready]
        try:
            return self.module(inputs)
        except _UnreadyError:
            return None
        finally:
            for end in ends:
                end.remove()


class _UnreadyError(BaseException):
    """A forward pass came to a module without weights. Not an Exception, since models swallow those."""


def _end(module: nn.Module, args: Any) -> None:
    raise _UnreadyError


def load_model(
    model: Any,
    weights: str = "default",
    preprocess: str | Preprocessing | Callable[..., Tensor] | None = "model",
    size: str | int | None = None,
    *,
    without_photos: bool = False,
) -> LoadedModel:
    """Build the network, load its weights, and settle how images become its inputs.

    `model`: `resnet50` (torchvision), `torchvision:…`, `timm:…`, `module:callable`, `path/file.py:callable`, or a
    module. `weights`: default, the name of a set of weights, random:SEED, or a file. `preprocess`: model, none, the
    name of a model, an inline form, module:callable, a Preprocess or a callable (PIL image to float tensor); None and
    "none" mean that images are the model's inputs already, as "model" does for a caller's module. `size`: the exact
    input size, N or HxW. `without_photos`: no photo is going to be an input, so that nothing need say how it becomes
    one. The caller's random state is left as it was.

    Raises ModelError where the network or its weights cannot be had, ConfigError where the preprocessing is missing
    or gives inputs of no fixed size.
    """
    wanted = Weights.parse(weights)
    if isinstance(model, nn.Module):
        name, provider = type(model).__name__, "python"
        built = Built(model, None, "as given")
        if wanted.kind != "default":
            raise ModelError(f"weights={weights!r} needs a model's name; a module given is never changed")
    elif not isinstance(model, str):
        made = " Call it first, and give what it returns" if callable(model) else ""
        raise ModelError(f"expected a model's name or a torch module, got {type(model).__name__} {model!r:.80}.{made}")
    else:
        provider, name = _find_provider(model)
        built = PROVIDERS[provider].build(name, wanted)
        built.module.eval()
    origin = {"provider": provider, "model": name, **built.origin}
    if wanted.kind == "file":
        origin["weights_file_sha256"] = load_file(built.module, Path(wanted.value))
    digest = weights_digest(built.module)
    if without_photos and preprocess == "model" and built.preprocess is None:
        preprocess = None
    settled = _settle(preprocess, built.preprocess, model, size)
    trust.check_model(digest, strict_json.plain(describe_preprocess(settled)))
    return LoadedModel(
        module=built.module,
        name=model if isinstance(model, str) else name,
        preprocess=settled,
        weights=f"file:{Path(wanted.value).name}" if wanted.kind == "file" else built.weights,
        weights_sha256=digest,
        origin=origin,
        input_dtype=_input_dtype(built.module),
        unready=tuple(module for module in built.module.modules() if is_unready(module)),
    )


_INPUTS = (torch.float16, torch.bfloat16, torch.float64)


def _input_dtype(module: nn.Module) -> torch.dtype:
    """Return the type that a model computes in: that of its first floating-point parameter, if images can have it."""
    first = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    return first if first in _INPUTS else torch.float32


def guessed_input(module: nn.Module) -> Preprocess:
    """Return the inputs that a caller's module most likely takes: by timm's configuration, else photos of 224 x 224."""
    config = getattr(module, "pretrained_cfg", None)
    said = config.get("input_size") if isinstance(config, Mapping) else None
    first = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
    channels, *size = said if said and len(said) == 3 else (first.in_channels if first is not None else 3, 224, 224)
    return Preprocess(None, (size[0], size[1]), (0.0,) * channels, (1.0,) * channels)


# ----------------------------------------------------------------------------------------------- preprocessing


def _settle(
    wanted: str | Preprocessing | Callable[..., Tensor] | None,
    own: Preprocessing | None,
    model: str | nn.Module,
    size: str | int | None,
) -> Preprocessing | None:
    """Return the preprocessing that `wanted` names, with inputs of `size`."""
    found = _named(wanted, own) if isinstance(wanted, str) else as_preprocessing(wanted)
    if found is None:
        if wanted == "model" and isinstance(model, str):
            raise ConfigError(f"the model {model!r} brings no preprocessing. {PREPROCESS_HELP}")
        return None
    if isinstance(found, CustomPreprocess):
        if size is not None:
            raise ConfigError(f"--size cannot change what {found.origin} does; leave it out")
        return measured(found)
    if size is not None:
        found = apply_size(found, size)
    if found.size is None:
        shown = model if isinstance(model, str) else type(model).__name__
        raise ConfigError(
            f"the preprocessing of {shown} keeps the proportions of each photo, but inputs must have one size. "
            "Give it with --size N or --size HxW, for example --size 320x320"
        )
    return found


def _named(text: str, own: Preprocessing | None) -> Preprocessing | None:
    if text == "model":
        return own
    if text == "none":
        return None
    if "=" in text:
        return parse_preprocess(text, own if isinstance(own, Preprocess) else None)
    provider, name = _find_provider(text)
    found = PROVIDERS[provider].preprocess(name)
    if found is None:
        raise ConfigError(f"the model {text!r} brings no preprocessing. {PREPROCESS_HELP}")
    return found


# ---------------------------------------------------------------------------------------------------- building


def _find_provider(model: str) -> tuple[str, str]:
    """Return the provider and its name of the model: by a known prefix, as module:callable, else torchvision's."""
    prefix, colon, name = model.partition(":")
    if colon and prefix in PROVIDERS:
        return prefix, name
    if colon and prefix in NOT_YET:
        raise ConfigError(
            f"{model}: models with the prefix {prefix}: are not supported in this version. Supported: "
            f"torchvision names, timm:NAME, module:callable, path/file.py:callable"
        )
    return ("python", model) if colon else ("torchvision", model)


def is_code(model: str) -> bool:
    """Return whether a text names a user's own code, as a model or as its preprocessing (unless that is inline)."""
    return "=" not in model and _find_provider(model)[0] == "python"
