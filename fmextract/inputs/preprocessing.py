"""Turn a decoded photo into a model's input: resize, crop and normalise; and read how people say which."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import PIL.Image
import PIL.ImageFile
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode

from fmextract.errors import ConfigError
from fmextract.inputs.seeding import seeded
from fmextract.records import Preprocess


@dataclass(frozen=True, slots=True)
class CustomPreprocess:
    """A user's own preprocessing: RGB PIL image to float tensor (channels, height, width), the model's input.

    `size` is the (height, width) that it gives, None where that is not known. `thread_safe`: several threads may call
    it at once.
    """

    function: Callable[[PIL.Image.Image], Tensor]
    origin: str
    size: tuple[int, int] | None = None
    thread_safe: bool = False


Preprocessing = Preprocess | CustomPreprocess


def normalise(batch: Tensor, preprocess: Preprocess, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return (pixel / 255 - mean) / std of a uint8 batch (B, 3, H, W), on its device, in its memory format.

    Computed in float32, with the very bits that torchvision's to_tensor and normalize give, then cast to `dtype`.
    """
    mean, std = _constants(preprocess.mean, preprocess.std, batch.device)
    return batch.to(torch.float32).div_(255).sub_(mean).div_(std).to(dtype)


@functools.lru_cache(maxsize=32)
def _constants(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and std as (C, 1, 1) on the device: made once, since each upload would wait for the device."""
    made = torch.tensor([mean, std], dtype=torch.float32).to(device)[..., None, None]
    return made[0], made[1]


# --------------------------------------------------------------------------------------------- what users write

PREPROCESS_HELP = (
    "Say how with --preprocess (preprocess=): the name of a model whose preprocessing to take, module:callable, "
    "none (the images are the model's inputs already), or as in "
    "size=256,crop=224,mean=0.485/0.456/0.406,std=0.229/0.224/0.225,interpolation=bilinear"
)


def parse_preprocess(text: str, default: Preprocess | None = None) -> Preprocess:
    """Return the inline form of --preprocess: `key=value` separated by commas, the parts of a value by slashes.

    size: N, the shorter side, or HxW, both sides. crop: N or HxW; where it is not given, N x N after size=N, none after
    size=HxW. mean and std: one number, or one per channel, from 0 to 1. interpolation: nearest, bilinear, bicubic.
    What is not given comes from `default`, except size and crop. Raises ConfigError.
    """
    fields = _fields(text)
    if "resize" not in fields and default is None:
        raise ConfigError(f"--preprocess {text!r}: size= is missing. {PREPROCESS_HELP}")
    if default is None and not {"mean", "std"} <= fields.keys():
        raise ConfigError(f"--preprocess {text!r}: mean= and std= are missing (mean=0,std=1 for the plain 0..1 scale)")
    base = default or Preprocess(resize=None, crop=None)
    try:
        changes = {name: _READERS[name](value) for name, value in fields.items()}
        if "resize" in changes and "crop" not in changes:
            size = changes["resize"]
            changes["crop"] = (size, size) if isinstance(size, int) else None
        return replace(base, **changes, origin=f"--preprocess {text}")
    except ValueError as error:
        raise ConfigError(f"--preprocess {text!r}: {error}") from error


def _fields(text: str) -> Mapping[str, str]:
    names = {"size": "resize"}
    fields: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        name = names.get(key, key)
        if not equals or name not in _READERS or name in fields:
            raise ConfigError(
                f"--preprocess {text!r}: expected size, crop, mean, std, interpolation, once each, got {part!r}"
            )
        fields[name] = value
    return fields


def _read_size(text: str) -> int | tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    sides = [int(side) for side in match.groups() if side is not None] if match else []
    if not sides or min(sides) < 1:
        raise ValueError(f"expected a size as 224 or 192x256 (height x width), got {text!r}")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def _read_crop(text: str) -> tuple[int, int]:
    size = _read_size(text)
    return size if isinstance(size, tuple) else (size, size)


def _read_numbers(text: str) -> tuple[float, ...]:
    values = tuple(float(part) for part in text.split("/"))
    if len(values) not in (1, 3) or not all(map(math.isfinite, values)):
        raise ValueError(f"expected one number or three as 0.5/0.5/0.5, got {text!r}")
    return values * 3 if len(values) == 1 else values


_READERS: dict[str, Callable[[str], Any]] = {
    "resize": _read_size,
    "crop": _read_crop,
    "mean": _read_numbers,
    "std": _read_numbers,
    "interpolation": str,
}


def apply_size(preprocess: Preprocess, size: str | int) -> Preprocess:
    """Return the same preprocessing with inputs of exactly `size`: N (square) or HxW.

    Where there is a centre crop, the shorter side grows in the same proportion (232 and 224 become 298 and 288); where
    there is none, the image is resized to that size, without keeping its proportions. Raises ConfigError.
    """
    try:
        height, width = _read_crop(str(size))
    except ValueError as error:
        raise ConfigError(f"--size: {error}") from error
    if preprocess.crop is None:
        return replace(preprocess, resize=(height, width))
    factor = max(height / preprocess.crop[0], width / preprocess.crop[1])
    resize = preprocess.resize
    if isinstance(resize, tuple):
        resize = (round(resize[0] * height / preprocess.crop[0]), round(resize[1] * width / preprocess.crop[1]))
    elif resize is not None:
        # An image as long as it is wide must still cover the crop's longer side.
        resize = max(round(resize * factor), height, width)
    return replace(preprocess, resize=resize, crop=(height, width))


def describe_preprocess(preprocess: Preprocessing | None) -> dict[str, Any]:
    """Return the preprocessing as JSON-able values, for the file."""
    if preprocess is None:
        return {"kind": "none"}
    if isinstance(preprocess, CustomPreprocess):
        return {"kind": "custom", "callable": preprocess.origin, "size": _listed(preprocess.size)}
    described = {key: _listed(value) for key, value in asdict(preprocess).items()}
    return {"kind": "standard", **described, "size": _listed(preprocess.size)}


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def as_preprocessing(value: Any, origin: str = "") -> Preprocessing | None:
    """Return as preprocessing what Python code may give: ours, one of torchvision's presets, or a callable."""
    if value is None or isinstance(value, (Preprocess, CustomPreprocess)):
        return value
    if type(value).__name__ in PRESETS and type(value).__module__.startswith("torchvision."):
        return from_preset(value, origin)
    if not callable(value):
        raise ConfigError(f"expected a callable from PIL image to float tensor, got {type(value).__name__}")
    named = getattr(value, "__qualname__", type(value).__name__)
    return CustomPreprocess(value, origin or f"{getattr(value, '__module__', type(value).__module__)}:{named}")


PRESETS = ("ImageClassification", "SemanticSegmentation", "ObjectDetection", "VideoClassification", "OpticalFlow")


def from_preset(preset: Any, origin: str) -> Preprocess | None:
    """Return a torchvision preset, as `weights.transforms()` gives it, as a Preprocess. Optical flow takes two images.

    The video preset resizes with antialias=False, even if asked for True.
    """
    kind = type(preset).__name__
    if kind == "OpticalFlow":
        return None
    resize, crop = getattr(preset, "resize_size", None), getattr(preset, "crop_size", None)
    return Preprocess(
        resize=None if resize is None else resize[0] if len(resize) == 1 else (resize[0], resize[1]),
        crop=None if crop is None else (crop[0], crop[-1]),
        mean=tuple(getattr(preset, "mean", (0.0, 0.0, 0.0))),
        std=tuple(getattr(preset, "std", (1.0, 1.0, 1.0))),
        interpolation=InterpolationMode(getattr(preset, "interpolation", "bilinear")).value,
        antialias=kind != "VideoClassification",
        origin=origin,
    )


def measured(custom: CustomPreprocess) -> CustomPreprocess:
    """Return it with the size that it gives, measured with one grey picture."""
    if custom.size is not None:
        return custom
    try:
        with seeded(0, 0):
            shape = custom.function(PIL.Image.new("RGB", (320, 256), (128, 128, 128))).shape
        _channels, height, width = shape
    except Exception as error:  # a user's function: it may raise anything
        raise ConfigError(
            f"--preprocess {custom.origin}: expected a function from a PIL image to a float tensor "
            f"(channels, height, width); a grey 320 x 256 picture gave {type(error).__name__}: {error}"
        ) from error
    return replace(custom, size=(height, width))
