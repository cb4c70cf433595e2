"""Provide networks by the prefix of their name: from torchvision, timm, Python."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from fmextract.common import trust
from fmextract.common.imports import import_object, importing_for
from fmextract.errors import ConfigError, MissingExtra, ModelError
from fmextract.inputs.preprocessing import CustomPreprocess, Preprocessing, as_preprocessing, from_preset
from fmextract.model.weights import Weights
from fmextract.records import Preprocess


@dataclass(frozen=True, slots=True)
class Built:
    """What a provider gives: the network, its own preprocessing if it has one, and what its weights are called."""

    module: nn.Module
    preprocess: Preprocessing | None
    weights: str
    origin: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Provider:
    """A place that networks come from. Both functions raise ModelError for a name they do not know."""

    build: Callable[[str, Weights], Built]
    preprocess: Callable[[str], Preprocessing | None]


@contextlib.contextmanager
def _building(name: str, weights: Weights) -> Iterator[None]:
    """Seed where random weights are wanted, leave the caller's random state as it was, and keep stdout clean."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices), contextlib.redirect_stdout(sys.stderr):
        if weights.kind == "random":
            torch.manual_seed(int(weights.value))
        try:
            yield
        except ConfigError:
            raise
        except Exception as error:  # the constructor of any library, or of the user's: it may raise anything
            raise ModelError(f"building {name!r} raised {type(error).__name__}: {error}") from error


def _build_torchvision(name: str, weights: Weights) -> Built:
    name = _torchvision_name(name)
    sets = torchvision.models.get_model_weights(name)
    chosen = _torchvision_weights(name, sets, weights)
    builder = torchvision.models.get_model_builder(name)
    # Detection and segmentation models would otherwise fetch a trained backbone for untrained weights; and what is
    # called quantized would otherwise be the float model that can be quantized.
    fixed = {"weights_backbone": None, "quantize": True}
    options = {option: fixed[option] for option in fixed.keys() & inspect.signature(builder).parameters}
    with _building(name, weights), _download_explained(name, chosen), _weights_only(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # GoogLeNet and Inception announce a change of their initialisation
        module = builder(weights=chosen, **options)
    shown = f"{type(chosen).__name__}.{chosen.name}" if chosen is not None else str(weights)
    library = f"torchvision {metadata.version('torchvision')}"
    return Built(module, _torchvision_preprocess(name, chosen), shown, {"library": library})


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Load weights only, within the block: torchvision would unpickle a file in torch's cache that has their name."""
    names = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _torchvision_name(name: str) -> str:
    """Return the name in torchvision's own list; a folder before it, as in `detection/ssd300_vgg16`, is taken off."""
    known = torchvision.models.list_models()
    short = name.rpartition("/")[2]
    if short not in known:
        raise ModelError(f"torchvision has no model {name!r}. {_closest(short, known)}{_OTHER_PLACES}")
    return short


_OTHER_PLACES = "Other places have a prefix: timm:NAME, module:callable, path/file.py:callable"


def _closest(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name.lower(), known, n=4, cutoff=0.5)
    return f"Closest: {', '.join(found)}. " if found else ""


def _torchvision_weights(name: str, sets: Any, weights: Weights) -> Any:
    """Return the member of the model's WeightsEnum, None for random weights and files."""
    if weights.kind in ("random", "file"):
        return None
    if not list(sets):
        raise ModelError(f"torchvision has no trained weights for {name!r}: use --weights random:0 or a file")
    try:
        return sets.DEFAULT if weights.kind == "default" else sets.verify(weights.value)
    except KeyError as error:
        names = ", ".join(member.name for member in sets)
        raise ModelError(
            f"{name!r} has no weights {weights.value!r}, and there is no such file. "
            f"Expected default, {names}, random:SEED, or a file (.safetensors, .pth)"
        ) from error


def _torchvision_preprocess(name: str, chosen: Any = None) -> Preprocess | None:
    """Return the preprocessing of the chosen weights, else of the default ones."""
    sets = torchvision.models.get_model_weights(name)
    if chosen is None and not list(sets):
        return None
    member = chosen or sets.DEFAULT
    return from_preset(member.transforms(), f"torchvision:{type(member).__name__}.{member.name}")


@contextlib.contextmanager
def _download_explained(name: str, chosen: Any) -> Iterator[None]:
    if chosen is None:
        yield
        return
    cached = _in_torch_cache(chosen.url)
    was_there = cached.exists()
    if not was_there:
        trust.check_download(name)
    try:
        yield
    except Exception as error:
        if was_there or cached.exists():
            raise
        raise ModelError(
            f"the weights of {name!r} could not be downloaded from {chosen.url} ({error}). Without a network: put that "
            f"file at {cached}, or give a file with --weights FILE, or take untrained weights with --weights random:0"
        ) from error


def _in_torch_cache(url: str) -> Path:
    return Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])


def _build_timm(name: str, weights: Weights) -> Built:
    timm = _timm()
    arch = _timm_name(name)
    full = f"{arch}.{weights.value}" if weights.kind == "name" else name
    trained = weights.kind in ("default", "name")
    with (
        _building(name, weights),
        _hub_asked_once() if trained else contextlib.nullcontext(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            if (
                trained
                and not trust.downloads_are_allowed()
                and not _timm_is_on_this_disk(timm.get_pretrained_cfg(full))
            ):
                trust.check_download(f"timm:{full}")
            module = timm.create_model(full, pretrained=trained)
        except ConfigError:
            raise
        except Exception as error:
            hint = ". Without a network: --weights FILE (.safetensors, .pth), or --weights random:0" if trained else ""
            raise ModelError(f"timm could not build {full!r}: {str(error).rstrip('.')}{hint}") from error
    tag = module.pretrained_cfg.get("tag") or "default"
    shown = f"timm:{arch}.{tag}" if trained else str(weights)
    preprocess = _timm_preprocess(timm.data.resolve_model_data_config(module), f"timm:{name}")
    return Built(module, preprocess, shown, {"library": f"timm {timm.__version__}"})


@contextlib.contextmanager
def _hub_asked_once() -> Iterator[None]:
    """Let huggingface_hub, within the block, look only into its cache if its hub does not answer, not try for a minute.

    The same where downloads are not allowed, without asking the hub.
    """
    try:
        from huggingface_hub import constants

        utils: Any = import_module("huggingface_hub.utils")  # which does not say what it exports
    except ImportError:  # timm without it downloads by torch.hub, which gives up at once
        yield
        return
    before = constants.HF_HUB_OFFLINE
    if not trust.downloads_are_allowed():
        constants.HF_HUB_OFFLINE = True
    else:
        try:
            utils.get_session().head(constants.ENDPOINT, timeout=5)
        except Exception as error:  # its HTTP library may raise anything; an answer of any kind raises nothing
            print(
                f"{constants.ENDPOINT} does not answer ({error}): only weights that are here already", file=sys.stderr
            )
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _timm_is_on_this_disk(config: Any) -> bool:
    """Return whether the weights of timm's `config` are in the cache from which it takes them."""
    repository = getattr(config, "hf_hub_id", None)
    if repository and find_spec("huggingface_hub") is not None:
        from huggingface_hub import try_to_load_from_cache

        names = (config.hf_hub_filename, "model.safetensors", "pytorch_model.bin")
        return any(isinstance(try_to_load_from_cache(repository, name), str) for name in names if name)
    url = getattr(config, "url", None)
    return url is not None and _in_torch_cache(url).is_file()


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise MissingExtra("timm", "timm", "a model whose name begins with timm:") from error
    return timm


def _timm_name(name: str) -> str:
    """Return the architecture in `architecture.tag`."""
    timm = _timm()
    arch = name.partition(".")[0]
    if not timm.is_model(arch):
        raise ModelError(f"timm has no model {name!r}. {_closest(arch, timm.list_models())}")
    return arch


def _timm_preprocess(config: Mapping[str, Any], origin: str) -> Preprocessing:
    """Return what timm's own evaluation transform does; that transform itself if no form of ours describes it."""
    _, height, width = config["input_size"]
    mode, share, kind = config["crop_mode"], config["crop_pct"], config["interpolation"]
    ours = kind in ("nearest", "bilinear", "bicubic") and len(config["mean"]) == 3
    if not ours or mode not in ("center", "squash") or (mode == "center" and height != width):
        made = _timm().data.create_transform(**config, is_training=False)
        return CustomPreprocess(made, origin, (height, width), thread_safe=True)
    scaled = (math.floor(height / share), math.floor(width / share))
    return Preprocess(
        resize=scaled[0] if mode == "center" else scaled,
        crop=(height, width),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=kind,
        origin=origin,
    )


def _timm_preprocess_of(name: str) -> Preprocessing:
    timm = _timm()
    _timm_name(name)
    config = timm.get_pretrained_cfg(name)
    return _timm_preprocess(timm.data.resolve_data_config(pretrained_cfg=config.to_dict()), f"timm:{name}")


def _build_python(text: str, weights: Weights) -> Built:
    """Return the module, or (module, preprocessing), that a user's function returns; or the module of that name."""
    found = import_object(text, ModelError, "--model")
    given = isinstance(found, nn.Module)
    if weights.kind == "name" or (given and weights.kind == "random"):
        raise ModelError(
            f"--weights {weights.value!r} is no file, and {text} has no named weights and is built already"
        )
    with _building(text, weights), importing_for(text):
        made = found if given else found()
    module, preprocess = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, nn.Module):
        raise ModelError(
            f"{text}: expected a torch module or (module, preprocessing), got {type(made).__name__}. "
            "Name a function without arguments, a class, or a module"
        )
    return Built(module, as_preprocessing(preprocess, text), str(weights))


def _python_preprocess(text: str) -> Preprocessing | None:
    return as_preprocessing(import_object(text, ConfigError, "--preprocess"), text)


PROVIDERS: dict[str, Provider] = {
    "torchvision": Provider(_build_torchvision, lambda name: _torchvision_preprocess(_torchvision_name(name))),
    "timm": Provider(_build_timm, _timm_preprocess_of),
    "python": Provider(_build_python, _python_preprocess),
}
NOT_YET = ("hf", "hub", "open_clip")
"""Prefixes that users of other tools may expect: none of them is taken for the name of a user's module."""
