"""Find out which code may run in several threads at once: what is known to be thread-safe, and what says so.

Most Datasets are not (a shared file, a decoder with a position), as they need not be. So one thread reads what is not
known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from fmextract.inputs.datasets import DatasetSource
from fmextract.inputs.files import FileSource
from fmextract.inputs.preprocessing import CustomPreprocess, Preprocessing
from fmextract.inputs.sources import unlimited
from fmextract.records import Source

_IN_MEMORY = (list, tuple, np.ndarray, np.memmap, torch.Tensor, TensorDataset)
_FOLDERS = {"ImageFolder", "DatasetFolder"}
_LOADERS = {("torchvision.datasets.folder", name) for name in ("default_loader", "pil_loader")}
_CONVERSIONS = {
    ("open_clip.transform", "_convert_to_rgb"),
    ("clip.clip", "_convert_image_to_rgb"),
}
_COMPOSE = {("torchvision.transforms.transforms", "Compose"), ("torchvision.transforms.v2._container", "Compose")}
# By where they are defined, as asking for the classes would import timm. None of them draws a random number or keeps
# anything of an image.
_PLAIN = {
    "torchvision.transforms.transforms": {
        *("ToTensor", "PILToTensor", "ConvertImageDtype", "ToPILImage", "Normalize", "Resize", "CenterCrop", "Pad"),
        *("Grayscale",),
    },
    "torchvision.transforms.v2._geometry": {"Resize", "CenterCrop", "Pad"},
    "torchvision.transforms.v2._color": {"Grayscale", "RGB"},
    "torchvision.transforms.v2._misc": {"Identity", "Normalize", "ToDtype", "ConvertImageDtype"},
    "torchvision.transforms.v2._type_conversion": {"PILToTensor", "ToImage", "ToPILImage", "ToPureTensor"},
    "torchvision.transforms.v2._deprecated": {"ToTensor"},
    "torchvision.transforms._presets": {"ImageClassification", "ObjectDetection", "SemanticSegmentation"},
    "timm.data.transforms": {"MaybeToTensor", "MaybePILToTensor", "ToNumpy", "ToTensor", "CenterCropOrPad"},
}


def source_is_known(source: Source) -> bool:
    """Return whether all code that `source` runs is ours, or a library's that is known to be thread-safe."""
    source = unlimited(source)
    if isinstance(source, DatasetSource):
        return data_is_known(source.data) and source.pick is None
    return isinstance(source, FileSource)


def source_says_so(source: Source) -> bool:
    """Return whether all unknown code in a source says `thread_safe = True`."""
    source = unlimited(source)
    if isinstance(source, DatasetSource):
        return source.pick is None and _bears(source.data)
    return _says_so(source)


def data_is_known(data: Any) -> bool:
    """Return whether a Dataset is a sequence in memory, a torchvision folder with its own loader, or parts of these."""
    if type(data) in _IN_MEMORY:
        return True
    parts = _parts(data)
    if parts is not None:
        return all(map(data_is_known, parts))
    return _is_folder(data) and all(map(transform_is_known, _transforms(data)))


def _bears(data: Any) -> bool:
    """Return whether a Dataset, and all that it consists of, is known or says so."""
    parts = _parts(data)
    if _says_so(data) or data_is_known(data):
        return True
    if parts is not None:
        return all(map(_bears, parts))
    return _is_folder(data) and all(map(_transform_bears, _transforms(data)))


def _parts(data: Any) -> Sequence[Any] | None:
    """Return the Datasets that one of torch's is made of."""
    if type(data) is Subset:
        return [data.dataset]
    return data.datasets if type(data) is ConcatDataset else None


def _is_folder(data: Any) -> bool:
    place, name = _where(type(data))
    return place == "torchvision.datasets.folder" and name in _FOLDERS and _where(data.loader) in _LOADERS


def _transforms(data: Any) -> list[Any]:
    both = (getattr(data, "transform", None), getattr(data, "target_transform", None))
    return [one for one in both if one is not None]


def preprocess_is_known(preprocess: Preprocessing | None) -> bool:
    """Return whether preprocessing is ours, a library's for its model, or made of transforms that are known."""
    if not isinstance(preprocess, CustomPreprocess) or preprocess.thread_safe:
        return True
    return transform_is_known(preprocess.function)


def preprocess_says_so(preprocess: Preprocessing | None) -> bool:
    """Return whether all unknown code in a user's function says `thread_safe = True`."""
    return isinstance(preprocess, CustomPreprocess) and _transform_bears(preprocess.function)


def transform_is_known(transform: Any) -> bool:
    """Return whether a transform is one of torchvision's or timm's without state and randomness, or made of these."""
    place, name = _where(type(transform))
    if (place, name) in _COMPOSE:
        return all(map(transform_is_known, transform.transforms))
    return name in _PLAIN.get(place, ()) or _where(transform) in _CONVERSIONS


def needs_no_process(source: Source) -> bool:
    """Return whether our code reads a source's files or memory: processes would do nothing faster."""
    source = unlimited(source)
    return isinstance(source, FileSource) or (isinstance(source, DatasetSource) and type(source.data) in _IN_MEMORY)


def _transform_bears(transform: Any) -> bool:
    """Return whether a transform, and all that it consists of, is known or says so."""
    if _where(type(transform)) in _COMPOSE:
        return all(map(_transform_bears, transform.transforms))
    return _says_so(transform) or transform_is_known(transform)


def _says_so(thing: Any) -> bool:
    return getattr(thing, "thread_safe", False) is True


def _where(thing: Any) -> tuple[str, str]:
    return getattr(thing, "__module__", ""), getattr(thing, "__qualname__", "")
