"""From what a user names to a network, its weights and its preprocessing.

`PROVIDERS` holds where networks come from, by the prefix of their name. No pickle is ever executed: weight files are
safetensors, or are read with `weights_only=True`.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import inspect
import math
import os
import re
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
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from fmextract.capture.reach import is_unready
from fmextract.common import trust
from fmextract.common.imports import import_object, importing_for
from fmextract.errors import ConfigError, MissingExtra, ModelError
from fmextract.inputs.preprocessing import (
    PREPROCESS_HELP,
    CustomPreprocess,
    Preprocessing,
    apply_size,
    as_preprocessing,
    from_preset,
    measured,
    parse_preprocess,
)
from fmextract.records import Preprocess
from fmextract.storage import shards

__all__ = ["LoadedModel", "load_model", "weights_digest"]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A network ready for extraction.

    `module` is on the CPU and in eval mode where it was built here; a caller's own module is left as it is.
    `preprocess` is None where the images must be the model's inputs already (float tensors). `weights` says where the
    values came from, `weights_sha256` what they are. `origin` is JSON-able: provider, name, library.
    `input_dtype`: what inputs are cast to, the type of the first floating-point parameter. `unready`: modules whose
    parameters are lazy and not initialised; a pass ends before the first of them, since what follows has no values yet.
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
        """The forward pass over `batch` (B, …), in the type of the model's inputs.

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
    """A pass has come to a module without weights. Not an Exception, since models swallow those."""


def _end(module: nn.Module, args: Any) -> None:
    raise _UnreadyError


@dataclass(frozen=True, slots=True)
class Weights:
    """What --weights says. `kind` is default, random, file or name; `value` the seed, the path or the name."""

    kind: str
    value: str = ""

    @classmethod
    def parse(cls, text: str) -> Weights:
        if text == "default":
            return cls("default")
        if text.startswith("random:"):
            seed = text.removeprefix("random:")
            if not re.fullmatch(r"\d{1,19}", seed):
                raise ModelError(f"--weights {text!r}: expected random:SEED with a whole number from 0")
            return cls("random", seed)
        path = Path(text)
        if path.suffix.lower() in WEIGHT_FILES or path.is_file():
            return cls("file", text)
        return cls("name", text)

    def __str__(self) -> str:
        return self.kind if self.kind == "default" else f"{self.kind}:{self.value}"


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


def load_model(
    model: Any,
    weights: str = "default",
    preprocess: str | Preprocessing | Callable[..., Tensor] | None = "model",
    size: str | int | None = None,
) -> LoadedModel:
    """Build the network, load its weights, and settle how images become its inputs.

    `model`: `resnet50` (torchvision), `torchvision:…`, `timm:…`, `module:callable`, `path/file.py:callable`, or a
    module. `weights`: default, the name of a set of weights, random:SEED, or a file. `preprocess`: model, none, the
    name of a model, an inline form, module:callable, a Preprocess or a callable (PIL image to float tensor); None and
    "none" mean that images are the model's inputs already, as "model" does for a caller's module. `size`: the exact
    input size, N or HxW. The caller's random state is left as it was.

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
        origin["weights_file_sha256"] = _load_file(built.module, Path(wanted.value))
    return LoadedModel(
        module=built.module,
        name=model if isinstance(model, str) else name,
        preprocess=_settle(preprocess, built.preprocess, model, size),
        weights=f"file:{Path(wanted.value).name}" if wanted.kind == "file" else built.weights,
        weights_sha256=weights_digest(built.module),
        origin=origin,
        input_dtype=_input_dtype(built.module),
        unready=tuple(module for module in built.module.modules() if is_unready(module)),
    )


_INPUTS = (torch.float16, torch.bfloat16, torch.float64)


def _input_dtype(module: nn.Module) -> torch.dtype:
    """The type that a model computes in: that of its first floating-point parameter, where it is a type of images."""
    first = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    return first if first in _INPUTS else torch.float32


def guessed_input(module: nn.Module) -> Preprocess:
    """The inputs that a module of the caller's most likely takes: by timm's configuration, else photos of 224 x 224."""
    config = getattr(module, "pretrained_cfg", None)
    said = config.get("input_size") if isinstance(config, Mapping) else None
    first = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
    channels, *size = said if said and len(said) == 3 else (first.in_channels if first is not None else 3, 224, 224)
    return Preprocess(None, (size[0], size[1]), (0.0,) * channels, (1.0,) * channels)


def weights_digest(module: nn.Module) -> str:
    """SHA-256 over the state dict: names in order, types, shapes, bytes. Equal for equal values on any device."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, Tensor):
            _digest_tensor(digest, name, value)
        else:  # the extra state of a module: quantised ones keep scales and types here
            digest.update(f"{name}\0{value!r}\0".encode())
    return digest.hexdigest()


def _digest_tensor(digest: Any, name: str, value: Tensor) -> None:
    if nn.parameter.is_lazy(value):
        digest.update(f"{name}\0{value.dtype}\0not initialised\0".encode())
        return
    digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
    flatten = getattr(value, "__tensor_flatten__", None)
    if flatten is not None:  # a tensor of several: its values are theirs
        inner, context = flatten()
        digest.update(f"{context!r}\0".encode())
        parts = {part: getattr(value, part) for part in inner}
    elif value.layout == torch.sparse_coo:
        parts = {"indices": value.coalesce().indices(), "values": value.coalesce().values()}
    elif value.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = {"rows": value.crow_indices(), "columns": value.col_indices(), "values": value.values()}
    elif value.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts = {"columns": value.ccol_indices(), "rows": value.row_indices(), "values": value.values()}
    elif value.is_nested:
        parts = {str(i): part for i, part in enumerate(value.unbind())}
    else:
        plain = value.detach().dequantize() if value.is_quantized else value.detach()
        plain = plain.to_dense() if plain.layout != torch.strided else plain
        flat = plain.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
        return
    for part, tensor in parts.items():
        _digest_tensor(digest, f"{name}\0{part}", tensor)


# ----------------------------------------------------------------------------------------------- preprocessing


def _settle(
    wanted: str | Preprocessing | Callable[..., Tensor] | None,
    own: Preprocessing | None,
    model: str | nn.Module,
    size: str | int | None,
) -> Preprocessing | None:
    """The preprocessing that `wanted` names, with inputs of `size`."""
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
    """The provider and the name that it knows: by a known prefix first, then module:callable, then torchvision."""
    prefix, colon, name = model.partition(":")
    if colon and prefix in PROVIDERS:
        return prefix, name
    return ("python", model) if colon else ("torchvision", model)


def is_code(model: str) -> bool:
    """Whether a text names code of somebody's own, as a model or as its preprocessing (where it is not in words)."""
    return "=" not in model and _find_provider(model)[0] == "python"


@contextlib.contextmanager
def _building(name: str, weights: Weights) -> Iterator[None]:
    """Seeds where random weights are wanted, leaves the caller's random state as it was, and keeps stdout clean."""
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
    """Torchvision would unpickle whatever lies in torch's cache under the name of its weights."""
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
    """The name in torchvision's own list; a folder before it, as in `detection/ssd300_vgg16`, is taken off."""
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
    """The member of the model's WeightsEnum, None for random weights and files."""
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
    """That of the chosen weights, else of the default ones."""
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
    """Where its hub does not answer, huggingface_hub looks into its cache alone, instead of trying for a minute.

    So it does where downloads are not allowed, without being asked.
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
        except Exception as error:  # whatever its HTTP library raises; an answer of any kind raises nothing
            print(
                f"{constants.ENDPOINT} does not answer ({error}): only weights that are here already", file=sys.stderr
            )
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _timm_is_on_this_disk(config: Any) -> bool:
    """Whether the weights of timm's `config` are in the cache from which it takes them."""
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
    """The architecture in `architecture.tag`."""
    timm = _timm()
    arch = name.partition(".")[0]
    if not timm.is_model(arch):
        raise ModelError(f"timm has no model {name!r}. {_closest(arch, timm.list_models())}")
    return arch


def _timm_preprocess(config: Mapping[str, Any], origin: str) -> Preprocessing:
    """What timm's own evaluation transform does; that transform itself where it is none of our forms."""
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
    """A module, or (module, preprocessing), that a function of the user's returns; or a module that has that name."""
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


def _not_yet(prefix: str) -> Provider:
    def refuse(name: str, weights: Weights | None = None) -> Any:
        raise ConfigError(
            f"{prefix}:{name}: models with the prefix {prefix}: are not supported in this version. Supported: "
            f"torchvision names, timm:NAME, module:callable, path/file.py:callable"
        )

    return Provider(refuse, refuse)


PROVIDERS: dict[str, Provider] = {
    "torchvision": Provider(_build_torchvision, lambda name: _torchvision_preprocess(_torchvision_name(name))),
    "timm": Provider(_build_timm, _timm_preprocess_of),
    "python": Provider(_build_python, _python_preprocess),
    "hf": _not_yet("hf"),
    "hub": _not_yet("hub"),
    "open_clip": _not_yet("open_clip"),
}


# ------------------------------------------------------------------------------------------------ weight files


def _load_file(module: nn.Module, path: Path) -> str:
    """Every tensor of the file into the module. Gives the file's SHA-256.

    Raises ModelError unless names and shapes fit exactly.
    """
    sha256 = shards.file_sha256(path) if path.is_file() else ""
    trust.check_weights_file(str(path), sha256)
    state = _unwrapped(_read_file(path), path, set(module.state_dict()))
    try:
        missing, unexpected = module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ModelError(f"the weights in {path} do not fit the model: {' '.join(str(error).split())[:500]}") from error
    problems = [
        f"{len(names)} {what}: {', '.join(names[:4])}{' …' if len(names) > 4 else ''}"
        for what, names in (("missing", missing), ("not in the model", unexpected))
        if names
    ]
    if problems:
        raise ModelError(f"the weights in {path} do not fit the model: {'; '.join(problems)}")
    return sha256


def _read_file(path: Path) -> Any:
    if not path.is_file():
        raise ModelError(f"--weights: there is no file {str(path)!r}")
    try:
        return WEIGHT_FILES.get(path.suffix.lower(), _read_torch)(path)
    except Exception as error:  # pickle.UnpicklingError, RuntimeError, EOFError, SafetensorError …
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(
            f"cannot load weights from {path}: {why}. Expected a state dict "
            "(torch.save(model.state_dict(), …)) or safetensors; pickled objects are not loaded, for they may run code"
        ) from error


def _read_torch(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_safetensors(path: Path) -> Any:
    from safetensors.torch import load_file

    return load_file(path)


WEIGHT_FILES: dict[str, Callable[[Path], Any]] = {
    ".safetensors": _read_safetensors,
    **dict.fromkeys((".pth", ".pt", ".bin", ".ckpt", ".tar"), _read_torch),
}


# The published files of torchvision's DenseNets spell `denselayer1.norm.1.weight` what the model calls `norm1.weight`.
_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.\w+)$")


def _unwrapped(state: Any, path: Path, own: set[str]) -> dict[str, Tensor]:
    """The state dict inside the usual wrappers, under the names that the model (`own`) uses."""
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(f"{path} holds no state dict (names and tensors), but {type(state).__name__}")
    for prefix in ("module.", "_orig_mod."):  # left by DataParallel and by torch.compile
        if all(name.startswith(prefix) for name in state) and not any(name.startswith(prefix) for name in own):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return {name if name in own else _DENSENET.sub(r"\1\2", name): value for name, value in state.items()}
