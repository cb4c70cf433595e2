"""fmextract beside the tools and the script that people use today: same photos, network, weights and layers, one run.

    python -m benchmarks.peers [--images 128] [--repeats 3] [--only script,fmextract-bf16] [--json FILE]

Every contender runs in a process of its own, by turns, and is timed from its first look at the folder to its last byte
on disk, without imports and without building the network; medians are given. `peak` is the memory above a process that
has imported torch and built the network. Values are compared with those of torchvision's network in fp32 on the same
photos (relative L2 error over all layers, the worst of the first batch). Contenders that are not installed are named.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

LAYERS = ["layer1", "layer2", "layer3", "layer4"]
BATCH = 16
SIZE = 224


def network() -> Any:
    """ResNet-50 with the random weights of seed 0: speed and sizes on disk do not need a download."""
    import torch
    import torchvision

    torch.manual_seed(0)
    return torchvision.models.resnet50(weights=None).eval()


def _transform() -> Any:
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.Resize(int(SIZE * 256 / 224)),
            transforms.CenterCrop(SIZE),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )


class Folder:
    """The Dataset that everybody writes."""

    def __init__(self, root: Path) -> None:
        self.paths = sorted(root.glob("*.jpg"))
        self.transform = _transform()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> Any:
        from PIL import Image

        return self.transform(Image.open(self.paths[row]).convert("RGB"))


def _loader(photos: Path) -> Any:
    from torch.utils.data import DataLoader

    return DataLoader(Folder(photos), BATCH, num_workers=2)


# ------------------------------------------------------------------------------------------ contenders


def script(model: Any, photos: Path, out: Path) -> Path:
    """What a competent user writes: torchvision's extractor, a DataLoader with workers, h5py with gzip."""
    import h5py
    import torch
    from torchvision.models.feature_extraction import create_feature_extractor

    extractor = create_feature_extractor(model, LAYERS).eval()
    loader = _loader(photos)
    rows, at = len(loader.dataset), 0
    with h5py.File(out / "script.h5", "w") as file, torch.inference_mode():
        for batch in loader:
            for name, maps in extractor(batch).items():
                data = file.get(name)
                if data is None:
                    shape = tuple(maps.shape[1:])
                    data = file.create_dataset(name, (rows, *shape), "f4", chunks=(1, *shape), compression="gzip")
                data[at : at + len(batch)] = maps.numpy()
            at += len(batch)
    return out / "script.h5"


def _fmextract(precision: str, memory_format: str) -> Callable[[Any, Path, Path], Path]:
    def contender(model: Any, photos: Path, out: Path) -> Path:
        import fmextract as fm
        from fmextract.progress import Quiet

        fm.extract(
            photos, model, out / "ours.h5", layers=LAYERS, precision=precision, memory_format=memory_format,
            preprocess=_PREPROCESS, progress=Quiet(),
        )  # fmt: skip
        return out / "ours.h5"

    return contender


_PREPROCESS = (
    f"size={int(SIZE * 256 / 224)},crop={SIZE},mean=0.485/0.456/0.406,std=0.229/0.224/0.225,interpolation=bilinear"
)


def thingsvision(model: Any, photos: Path, out: Path) -> Path:
    from thingsvision import get_extractor_from_model
    from thingsvision.utils.data import DataLoader, ImageDataset

    extractor = get_extractor_from_model(model=model, device="cpu", backend="pt")
    transform = extractor.get_transformations(resize_dim=int(SIZE * 256 / 224), crop_dim=SIZE)
    data = ImageDataset(root=str(photos), out_path=str(out), backend="pt", transforms=transform)
    extractor.extract_features(
        batches=DataLoader(dataset=data, batch_size=BATCH, backend="pt"), module_names=LAYERS, flatten_acts=False,
        output_type="ndarray", output_dir=str(out), step_size=4,
    )  # fmt: skip
    return out


def torchextractor(model: Any, photos: Path, out: Path) -> Path:
    import h5py
    import torch
    import torchextractor as tx

    extractor, loader, at = tx.Extractor(model, LAYERS), _loader(photos), 0
    with h5py.File(out / "tx.h5", "w") as file, torch.inference_mode():
        for batch in loader:
            for name, maps in extractor(batch)[1].items():
                data = file.get(name)
                if data is None:
                    shape = tuple(maps.shape[1:])
                    rows = len(loader.dataset)
                    data = file.create_dataset(name, (rows, *shape), "f4", chunks=(1, *shape), compression="gzip")
                data[at : at + len(batch)] = maps.numpy()
            at += len(batch)
    return out / "tx.h5"


def captum(model: Any, photos: Path, out: Path) -> Path:
    from captum._utils.av import AV

    AV.generate_dataset_activations(str(out), model, "resnet50", LAYERS, _loader(photos))
    return out


def torchlens(model: Any, photos: Path, out: Path) -> Path:
    import torchlens as tl

    tl.extract_dataset(model, Folder(photos), LAYERS, batch_size=BATCH, output_dir=str(out), progress=False)
    return out


CONTENDERS: dict[str, Callable[[Any, Path, Path], Path]] = {
    "script": script,
    "fmextract-fp32-contiguous": _fmextract("fp32", "contiguous"),
    "fmextract-fp32-channels_last": _fmextract("fp32", "channels_last"),
    "fmextract-bf16": _fmextract("bf16", "channels_last"),
    "fmextract-auto": _fmextract("auto", "auto"),
    "thingsvision": thingsvision,
    "torchextractor": torchextractor,
    "captum": captum,
    "torchlens": torchlens,
}


# ---------------------------------------------------------------------------------------------- running


def _memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _one(name: str, photos: Path, out: Path) -> dict[str, Any]:
    """In the contender's own process: its seconds, peak memory and bytes, and how far its values are from the truth."""
    model = network()
    before = _memory()
    started = time.perf_counter()
    made = CONTENDERS[name](model, photos, out)
    seconds = time.perf_counter() - started
    peak = _memory() - before
    written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    error = _error(network(), photos, made) if made.suffix == ".h5" else None
    return {"seconds": seconds, "peak": peak, "bytes": written, "error": error}


def _error(model: Any, photos: Path, made: Path) -> float:
    """The largest relative L2 error of a layer over the first batch, against hooks that clone."""
    import h5py
    import torch

    truth: dict[str, Any] = {}
    for name in LAYERS:
        hook = lambda module, args, output, name=name: truth.__setitem__(name, output.clone())  # noqa: E731
        model.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad():
        model(torch.stack([Folder(photos)[row] for row in range(BATCH)]))
    errors = []
    with h5py.File(made) as file:
        for name, exact in truth.items():
            data = file[f"layers/{name}/activation"] if "layers" in file else file[name]
            maps = np.asarray(data[:BATCH], np.float64)
            reference = exact.double().numpy()
            errors.append(float(np.linalg.norm(maps - reference) / np.linalg.norm(reference)))
    return max(errors)


def _measure(name: str, photos: Path) -> dict[str, Any] | str:
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "benchmarks.peers", "--one", name, str(photos), out]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        return ended.stderr.strip().splitlines()[-1]
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, photos, out = options.one
        print(json.dumps(_one(name, Path(photos), Path(out))))
        return
    from fmextract.bench import machine, make_photos

    names = options.only.split(",") if options.only else list(CONTENDERS)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        photos = make_photos(Path(scratch) / "photos", options.images)
        for _ in range(options.repeats):
            for name in names:
                if name not in missing:
                    one = _measure(name, photos)
                    if isinstance(one, str):
                        missing[name] = one
                    else:
                        found[name].append(one)
                        print(f"{name}: {options.images / one['seconds']:.1f} images/s", file=sys.stderr)
    rows = {name: _summary(runs, options.images) for name, runs in found.items() if runs}
    if options.json:
        report = {"machine": machine(), "images": options.images, "contenders": rows, "missing": missing}
        options.json.write_text(json.dumps(report, indent=2))
    _print(rows, missing)


def _summary(runs: list[dict[str, Any]], images: int) -> dict[str, Any]:
    return {
        "images_per_second": images / statistics.median(run["seconds"] for run in runs),
        "bytes_per_image": runs[0]["bytes"] / images,
        "peak": statistics.median(run["peak"] for run in runs),
        "error": runs[0]["error"],
        "runs": [images / run["seconds"] for run in runs],
    }


def _print(rows: dict[str, dict[str, Any]], missing: dict[str, str]) -> None:
    base = rows.get("script", {}).get("images_per_second")
    print("| contender | images/s | times the script | MB an image | peak memory, MB | worst error |")
    print("|---|--:|--:|--:|--:|--:|")
    for name, row in rows.items():
        times = f"{row['images_per_second'] / base:.1f}" if base else "–"
        error = "not read back" if row["error"] is None else f"{row['error']:.1e}"
        print(
            f"| {name} | {row['images_per_second']:.1f} | {times} | {row['bytes_per_image'] / 1e6:.2f}"
            f" | {row['peak'] / 1e6:.0f} | {error} |"
        )
    for name, why in missing.items():
        print(f"\n{name} did not run: {why}")


if __name__ == "__main__":
    main()
