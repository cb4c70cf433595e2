"""The tools that people use today to store activations, and the script they write: each through its own public API.

A contender runs a `Task` and reads back what it left, with its own reader where it has one. Everything is set as its
own documentation shows it; where a tool offers a faster way at no cost in what it does, it is given that way.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import json
import re
import sys
import time
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Task:
    """What every contender is asked for: the outputs of `layers` for all photos, as files in `out`.

    `means`: not the maps, but their means over y and x, (sample, channel).
    """

    model: Any
    photos: Path
    out: Path
    layers: Sequence[str]
    means: bool = False
    batch: int = 8
    device: str = "cpu"
    workers: int = 2


class Contender(ABC):
    """One tool. `packages` must be importable; `means` says whether it can reduce maps before it stores them."""

    packages: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()
    means = True

    def load(self) -> None:
        """Import what it needs, before the clock of the run starts."""
        for name in self.imports or self.packages:
            importlib.import_module(name)

    @abstractmethod
    def run(self, task: Task) -> dict[str, float]:
        """Carry out the task; gives the seconds of its parts where the loop is ours to time."""

    @abstractmethod
    def read(self, out: Path, layer: str) -> list[Any]:
        """What is stored of `layer`: an array (sample, ...) for each of its calls that was kept."""

    def names(self, out: Path) -> list[str] | None:
        """The photo that each row belongs to, where the output says so."""
        return None


# -------------------------------------------------------------------------------------- the usual script


def transform() -> Any:
    """The preprocessing of torchvision's own weights."""
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.Resize(SIZE * 256 // 224),
            transforms.CenterCrop(SIZE),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


class Folder:
    """The Dataset that everybody writes."""

    def __init__(self, root: Path) -> None:
        self.paths = sorted(root.glob("*.jpg"))
        self.transform = transform()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> Any:
        from PIL import Image

        return self.transform(Image.open(self.paths[row]).convert("RGB"))


def _loader(task: Task) -> Any:
    from torch.utils.data import DataLoader

    folder: Any = Folder(task.photos)  # as everybody writes it: no class of torch
    return DataLoader(folder, task.batch, num_workers=task.workers, pin_memory=task.device != "cpu")


def _to_hdf5(task: Task, extract: Callable[[Any], dict[str, Any]]) -> dict[str, float]:
    """The loop that everybody writes: load, run, store with gzip. Gives the seconds of each."""
    import h5py
    import torch

    loader, at = _loader(task), 0
    spent = {"wait for the loader": 0.0, "forward": 0.0, "store": 0.0}
    with h5py.File(task.out / "maps.h5", "w") as file, torch.inference_mode():
        file["photo"] = [path.name for path in loader.dataset.paths]
        began = time.perf_counter()
        for batch in loader:
            loaded = time.perf_counter()
            maps = {name: t.cpu() for name, t in extract(batch.to(task.device, non_blocking=True)).items()}
            done = time.perf_counter()
            for name, tensor in maps.items():
                values = tensor.mean((2, 3)) if task.means else tensor
                data = file.get(name)
                if data is None:
                    shape = tuple(values.shape[1:])
                    rows = len(loader.dataset)
                    data = file.create_dataset(name, (rows, *shape), "f4", chunks=(1, *shape), compression="gzip")
                data[at : at + len(batch)] = values.numpy()
            at += len(batch)
            stored = time.perf_counter()
            for part, seconds in zip(spent, (loaded - began, done - loaded, stored - done), strict=True):
                spent[part] += seconds
            began = stored
    return spent


class _Hdf5(Contender):
    def read(self, out: Path, layer: str) -> list[Any]:
        import h5py

        with h5py.File(out / "maps.h5") as file:
            return [file[layer][:]]

    def names(self, out: Path) -> list[str] | None:
        import h5py

        with h5py.File(out / "maps.h5") as file:
            return list(file["photo"].asstr()[:])


class Script(_Hdf5):
    """What a competent user writes: torchvision's extractor, a DataLoader with two workers, h5py with gzip."""

    packages = ("h5py", "torchvision")
    imports = ("h5py", "torchvision.models.feature_extraction")

    def run(self, task: Task) -> dict[str, float]:
        from torchvision.models.feature_extraction import create_feature_extractor

        return _to_hdf5(task, create_feature_extractor(task.model, list(task.layers)).eval())


class TorchExtractor(_Hdf5):
    """torchextractor captures; loading and storing are the script's."""

    packages = ("torchextractor",)

    def run(self, task: Task) -> dict[str, float]:
        import torchextractor

        extractor = torchextractor.Extractor(task.model, list(task.layers))
        return _to_hdf5(task, lambda batch: extractor(batch)[1])


# ------------------------------------------------------------------------------------------ tools


class ThingsVision(Contender):
    """thingsvision, one folder of .npy files a layer. It has no mean over y and x."""

    packages = ("thingsvision", "timm")
    imports = ("thingsvision", "thingsvision.utils.data")
    means = False

    def load(self) -> None:
        _without_tensorflow()
        super().load()

    def run(self, task: Task) -> dict[str, float]:
        from thingsvision import get_extractor_from_model
        from thingsvision.utils.data import ImageDataset
        from torch.utils.data import DataLoader

        extractor = get_extractor_from_model(model=task.model, device="cpu", backend="pt")
        transform = extractor.get_transformations(resize_dim=SIZE * 256 // 224, crop_dim=SIZE)
        photos = ImageDataset(root=str(task.photos), out_path=str(task.out), backend="pt", transforms=transform)
        extractor.extract_features(
            # Its own loader has no workers; it takes torch's as well.
            batches=DataLoader(photos, task.batch, num_workers=2),
            module_names=list(task.layers),
            flatten_acts=False,
            output_type="ndarray",
            output_dir=str(task.out),
            step_size=1,
        )
        return {}

    def read(self, out: Path, layer: str) -> list[Any]:
        return [np.concatenate([np.load(file) for file in self._files(out, layer)])]

    def _files(self, out: Path, layer: str) -> list[Path]:
        """By the last row that the name tells: the first one is right for the first layer only."""
        return sorted((out / layer).glob("features_*.npy"), key=lambda file: int(re.findall(r"\d+", file.stem)[-1]))

    def names(self, out: Path) -> list[str] | None:
        return (out / "file_names.txt").read_text().split()


def _without_tensorflow() -> None:
    """Let thingsvision 2.7.3 import beside numpy 2 and without TensorFlow, which its way through torch never uses."""
    import torch

    if not hasattr(np, "AxisError"):
        vars(np)["AxisError"] = np.exceptions.AxisError

    def stub(name: str, **content: Any) -> types.ModuleType:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__dict__.update(content)
        sys.modules[name] = module
        return module

    if importlib.util.find_spec("tensorflow") is None:
        applications = stub("tensorflow.keras.applications")
        keras = stub("tensorflow.keras", applications=applications, layers=stub("tensorflow.keras.layers"))
        keras.layers.Lambda = object
        config = types.SimpleNamespace(list_physical_devices=lambda kind: [])
        stub("tensorflow", keras=keras, Tensor=object, config=config)
    if importlib.util.find_spec("torchtyping") is None:
        subscript = classmethod(lambda cls, item: torch.Tensor)
        stub("torchtyping", TensorType=type("TensorType", (), {"__class_getitem__": subscript}))
    if importlib.util.find_spec("requests") is None:
        stub("requests")


class Captum(Contender):
    """captum's AV, one .pt file a layer and batch. It has no reduction."""

    packages = ("captum",)
    imports = ("captum._utils.av",)
    means = False

    def run(self, task: Task) -> dict[str, float]:
        from captum._utils.av import AV

        AV.generate_dataset_activations(str(task.out), task.model, "model", list(task.layers), _loader(task))
        return {}

    def read(self, out: Path, layer: str) -> list[Any]:
        from captum._utils.av import AV

        parts = AV.load(str(out), "model", "default", layer)
        return [np.concatenate([parts[i].detach().numpy() for i in range(len(parts))])]


class TorchLens(Contender):
    """torchlens' extract_dataset, one file a batch with all layers; it reads the photos itself, without workers."""

    packages = ("torchlens",)

    def run(self, task: Task) -> dict[str, float]:
        import torchlens

        photos = Folder(task.photos)
        torchlens.extract_dataset(
            task.model,
            _Counted(photos),
            list(task.layers),
            batch_size=task.batch,
            output_dir=str(task.out / "torchlens"),
            progress=False,
            stimulus_ids=[path.name for path in photos.paths],
            pool="spatial_mean" if task.means else None,
        )
        return {}

    def read(self, out: Path, layer: str) -> list[Any]:
        from torchlens.dataset_extraction import load_extraction

        return [load_extraction(out / "torchlens", [layer]).activations[layer].numpy()]

    def names(self, out: Path) -> list[str] | None:
        return list(json.loads((out / "torchlens" / "stimulus_ids.json").read_text())["ids"])


class _Counted:
    """A Dataset as an iterable with a length."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Any:
        return (self.data[row] for row in range(len(self.data)))


# --------------------------------------------------------------------------------------- fmextract


class Ours(Contender):
    """fmextract, with its statistics of every channel and its durable, verified output."""

    packages = ("fmextract",)
    imports = ("fmextract.run.extract",)
    preprocess = (
        f"size={SIZE * 256 // 224},crop={SIZE},mean={'/'.join(map(str, MEAN))},std={'/'.join(map(str, STD))},"
        "interpolation=bilinear"
    )

    def __init__(self, **options: Any) -> None:
        self.options = options

    def run(self, task: Task) -> dict[str, float]:
        from fmextract.config import Config
        from fmextract.run.extract import run

        layers = [f"{layer}=mean" if task.means else layer for layer in task.layers]
        options: dict[str, Any] = {"batch_size": task.batch, "preprocess": self.preprocess} | self.options
        clock, began = _Clock(), time.perf_counter()
        result = run(task.photos, task.model, task.out / "acts.h5", Config.of(layers=layers, **options), clock)
        whole = time.perf_counter() - began
        busy = {stage: float(found["busy_seconds"]) for stage, found in result.stages.items()}
        return {"prepare, plan, finish": whole - clock.seconds, "images": clock.seconds} | busy

    def read(self, out: Path, layer: str) -> list[Any]:
        import fmextract

        with fmextract.open(out / "acts.h5") as acts:
            return [acts[name][:] for name in acts.layers if re.split("[:=]", name)[0] == layer]

    def names(self, out: Path) -> list[str] | None:
        import fmextract

        with fmextract.open(out / "acts.h5") as acts:
            return [str(key) for key in acts.keys]


class _Clock:
    """A Progress that takes the time from the first image to the last."""

    seconds = 0.0

    def note(self, text: str) -> None:
        """Nothing to say."""

    def step(self, what: str, done: int, total: int) -> None:
        """Nothing to say."""

    def start(self, total: int, done: int) -> None:
        self.began = time.perf_counter()

    def advance(self, images: int, failed: int) -> None:
        """Nothing to show."""

    def finish(self) -> None:
        self.seconds = time.perf_counter() - self.began


CONTENDERS: dict[str, Contender] = {
    "script": Script(),
    "fmextract-fp32": Ours(precision="fp32", memory_format="contiguous"),
    "thingsvision": ThingsVision(),
    "fmextract-fp32-channels_last": Ours(precision="fp32", memory_format="channels_last"),
    "torchextractor": TorchExtractor(),
    "fmextract-bf16": Ours(precision="bf16", memory_format="channels_last"),
    "captum": Captum(),
    "fmextract-auto": Ours(batch_size="auto"),
    "torchlens": TorchLens(),
}
"""In the order in which they take turns: ours and theirs alternate."""


def missing(name: str) -> list[str]:
    """The packages of a contender that are not installed."""
    wanted: Iterable[str] = CONTENDERS[name].packages
    return [package for package in wanted if importlib.util.find_spec(package) is None]
