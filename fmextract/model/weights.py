"""Read what `--weights` says and files of weights, and compute their digest.

No pickle is ever executed: files are safetensors, or are read with `weights_only=True`.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fmextract.common import trust
from fmextract.errors import ModelError
from fmextract.storage import shards


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


def weights_digest(module: nn.Module) -> str:
    """Return the SHA-256 of a state dict: names in order, types, shapes, bytes. Equal values give equal digests."""
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
    if flatten is not None:  # a tensor made of several: its values are theirs
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


# ------------------------------------------------------------------------------------------------ weight files


def load_file(module: nn.Module, path: Path) -> str:
    """Load every tensor of the file into the module. Returns the file's SHA-256.

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
    """Return the state dict inside the usual wrappers, under the names that the model (`own`) uses."""
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(f"{path} holds no state dict (names and tensors), but {type(state).__name__}")
    for prefix in ("module.", "_orig_mod."):  # left by DataParallel and by torch.compile
        if all(name.startswith(prefix) for name in state) and not any(name.startswith(prefix) for name in own):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return {name if name in own else _DENSENET.sub(r"\1\2", name): value for name, value in state.items()}
