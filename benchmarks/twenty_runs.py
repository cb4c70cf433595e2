"""Twenty runs, and whether another state of the program stores the same: for changes that must not change a file.

    python -m benchmarks.twenty_runs make /tmp/before        (before the change)
    python -m benchmarks.twenty_runs make /tmp/after         (after it, on the same machine)
    python -m benchmarks.twenty_runs compare /tmp/before /tmp/after

Files are compared object by object: paths, types, shapes, chunks, filters, scales, attributes, and every chunk as it
lies on the disk. What names a moment or a run may differ (`MAY_DIFFER`); attributes that are new are listed by name.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image

import fmextract as fm
from fmextract.config import RENAMED

MAY_DIFFER = ("source", "images", "created", "history", "content_digest", "throughput")
"""Root attributes that hold a place, a moment, a run's id, or a digest over those."""
CONFIG_MAY_DIFFER = ("run_id", "identity", "notes")
"""Parts of `fmextract_config`. The names of its options may differ, too, as far as `RENAMED` says."""

SMALL = "size=64,crop=64,mean=0.5,std=0.25"
FIXED: dict[str, Any] = {
    "weights": "random:0",
    "precision": "fp32",
    "batch_size": 4,
    "device": "cpu",
    "memory_format": "contiguous",
    "num_workers": 2,
    "effective_fields": "always",
    "preprocess": SMALL,
}

RUNS: dict[str, dict[str, Any]] = {
    "resnet": {"layers": ["conv#0", "layer*"]},
    "resnet-bf16": {"layers": ["layer*"], "precision": "bf16"},
    "channels-last": {"layers": ["layer*"], "memory_format": "channels_last"},
    "default-layers": {},
    "every-convolution": {"layers": ["type:Conv2d"]},
    "in-place": {"layers": ["bn1", "relu", "layer1.0.bn1", "layer1.0.relu"]},
    "reducers": {"layers": ["layer1=mean", "layer2=max", "layer3=pool:2", "layer4=flatten", "layer4=channels:3-7"]},
    "statistics-only": {"layers": ["layer1=top", "layer4=top"], "top_k": 3},
    "inputs-and-calls": {"layers": ["fc@in", "layer1.0.relu:2", "avgpool"]},
    "mobilenet": {"model": "mobilenet_v3_small", "layers": ["features.*"]},
    "vit": {"model": "benchmarks.twenty_runs:small_vit", "layers": ["encoder.layers.*", "encoder.ln=cls"]},
    "swin": {"model": "swin_t", "layers": ["features.1", "features.7"]},
    "densenet": {"model": "densenet121", "layers": ["features.denseblock1", "features.norm5"]},
    "float16": {"layers": ["layer3", "layer4"], "dtype": "float16", "clip": True},
    "rounded": {"layers": ["layer2", "layer3"], "keep_bits": 7, "level": 1},
    "no-codec": {"layers": ["layer3", "layer4"], "codec": "none"},
    "shards": {"layers": ["layer2", "layer4=mean"], "shard_size": "256KiB", "directory": True},
    "shards-in-one-file": {"layers": ["layer2", "layer4=mean"], "shard_size": "256KiB"},
    "failures": {"layers": ["layer1", "fc"], "source": "broken", "max_failures": "50%"},
    "labels": {"layers": ["layer4=mean"], "source": "labels.csv", "limit": 7},
}


def small_vit() -> Any:
    """A vision transformer for inputs of 64 x 64."""
    import torchvision

    return torchvision.models.VisionTransformer(
        image_size=64, patch_size=16, num_layers=3, num_heads=2, hidden_dim=32, mlp_dim=64
    )


def make(folder: Path) -> None:
    """All runs into `folder`, on images that are the same every time."""
    folder.mkdir(parents=True)
    images(folder / "images")
    for name, told in RUNS.items():
        options = {**FIXED, **told}
        source = folder / "images" / options.pop("source", "good")
        out = folder / (name if options.pop("directory", False) else f"{name}.h5")
        fm.extract(source, model=options.pop("model", "resnet18"), out=out, **options)
        print(name, file=sys.stderr)


def images(folder: Path) -> None:
    """Thirteen good ones, the same with two broken among them, and a manifest with labels."""
    random = np.random.default_rng(0)
    for kind in ("good", "broken"):
        (folder / kind).mkdir(parents=True)
    for i in range(13):
        coarse = random.integers(0, 256, (9, 12, 3), np.uint8)
        picture = Image.fromarray(coarse).resize((96 + 8 * i, 80), Image.Resampling.BICUBIC)
        picture.save(folder / "good" / f"{i:02}.{'png' if i % 2 else 'jpg'}")
    for path in sorted((folder / "good").iterdir()):
        shutil.copy(path, folder / "broken")
    (folder / "broken" / "03.png").write_bytes(b"no image")
    (folder / "broken" / "08.jpg").write_bytes((folder / "good" / "08.jpg").read_bytes()[:500])
    lines = [f"good/{path.name},{i % 3}" for i, path in enumerate(sorted((folder / "good").iterdir()))]
    (folder / "labels.csv").write_text("\n".join(["path,label", *lines]) + "\n")


def compare(before: Path, after: Path) -> int:
    """Print every difference; gives how many there are, attributes that are new not counted."""
    new: set[str] = set()
    found = 0
    files = sorted(path.relative_to(before) for path in before.rglob("*.h5"))
    for path in files:
        if not (after / path).exists():
            print(f"{path}: missing")
            found += 1
            continue
        with h5py.File(before / path) as a, h5py.File(after / path) as b:
            for line in differences(a, b, new):
                print(f"{path}: {line}")
                found += 1
        with fm.open(before / path) as acts:  # files of before still open
            assert acts.layers
    print(f"{len(files)} files, {found} differences; new: {', '.join(sorted(new)) or 'nothing'}")
    return found


def differences(a: h5py.File, b: h5py.File, new: set[str]) -> Iterator[str]:
    """What differs in the objects that `a` has; what only `b` has goes into `new`."""
    theirs: dict[str, Any] = {"/": b}
    b.visititems(lambda name, node: theirs.__setitem__(f"/{name}", node))
    ours: dict[str, Any] = {"/": a}
    a.visititems(lambda name, node: ours.__setitem__(f"/{name}", node))
    new |= {name.rpartition("/")[2] for name in theirs.keys() - ours.keys()}
    for name, node in ours.items():
        if name not in theirs:
            yield f"{name} is gone"
            continue
        new |= set(theirs[name].attrs) - set(node.attrs)
        for key in node.attrs:
            if key not in theirs[name].attrs:
                yield f"{name}@{key} is gone"
            else:
                then, now = described(node, key), described(theirs[name], key)
                new |= {f"{key}.{part}" for part in now.keys() - then.keys()}
                changed = [f"{part}: {then[part]} → {now.get(part)}" for part in then if then[part] != now.get(part)]
                yield from (f"{name}@{key} {line}"[:300] for line in changed)
        if isinstance(node, h5py.Dataset) and stored(node) != stored(theirs[name]):
            yield f"{name}: {stored(node)} → {stored(theirs[name])}"[:300]


def described(node: Any, key: str) -> Mapping[str, Any]:
    """What can be compared of an attribute: the parts of JSON by name, else the whole; nothing of what may differ."""
    if key in MAY_DIFFER or key in ("DIMENSION_LIST", "REFERENCE_LIST", "_Netcdf4Coordinates"):
        return {}
    value = node.attrs[key]
    if key != "fmextract_config":
        return {"": value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value}
    told = json.loads(value)
    parts = {name: part for name, part in told.items() if name != "options"}
    parts |= {f"options.{RENAMED.get(name, name)}": part for name, part in told["options"].items()}
    return {name: part for name, part in parts.items() if name not in CONFIG_MAY_DIFFER}


def stored(node: h5py.Dataset) -> tuple[Any, ...]:
    """Type, shape, layout, filters, scales and content of a data set."""
    filters = [node.id.get_create_plist().get_filter(i) for i in range(node.id.get_create_plist().get_nfilters())]
    scales = [[scale.name for scale in dim.values()] for dim in node.dims]
    about = (str(node.dtype), node.shape, node.maxshape, node.chunks, filters, scales)
    if h5py.check_string_dtype(node.dtype) is not None:
        return (*about, node[...].tolist())
    digest = hashlib.blake2b(digest_size=16)
    if node.chunks is None:
        digest.update(np.ascontiguousarray(node[...]).tobytes())
    else:
        for i in range(node.id.get_num_chunks()):
            offset = node.id.get_chunk_info(i).chunk_offset
            digest.update(repr(offset).encode() + node.id.read_direct_chunk(offset)[1])
    return (*about, digest.hexdigest())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("make").add_argument("folder", type=Path)
    of_two = commands.add_parser("compare")
    of_two.add_argument("before", type=Path)
    of_two.add_argument("after", type=Path)
    told = parser.parse_args()
    if told.command == "make":
        make(told.folder)
        return 0
    return int(compare(told.before, told.after) > 0)


if __name__ == "__main__":
    sys.exit(main())
