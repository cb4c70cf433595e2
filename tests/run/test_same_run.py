"""Whether an output is that of the run that is asked for: everything that decides a value, and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import OPTIONS, Notes, Tiny, extract, extract_until, make_photos, picture, same
from torch import nn

from fmextract import planning, verification
from fmextract.errors import ConfigError, OutputError, TooManyFailures
from fmextract.model.randomness import may_draw
from fmextract.reading import activations
from fmextract.run import same_run
from fmextract.storage import shards

ROWS = 6
RATE = 1.0


def as_input(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image.resize((8, 8)), np.float32).transpose(2, 0, 1).copy()) / 255


def negative(image: Image.Image) -> torch.Tensor:
    return 1 - as_input(image)


def rated(image: Image.Image) -> torch.Tensor:
    return as_input(image) * RATE


class Tanh(Tiny):
    """The weights and layers of Tiny."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.Tanh()  # type: ignore[assignment]


Tanh.__name__ = Tanh.__qualname__ = "Tiny"


class Scaled(Tiny):
    """A flag and a buffer that are in no state dict."""

    def __init__(self, alpha: float = 0.5) -> None:
        super().__init__()
        self.alpha = alpha
        self.register_buffer("window", torch.ones(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = super().forward(x * self.alpha * self.window)
        return made


class Folder:
    """A Dataset of a user's, over something that lies in memory."""

    def __init__(self, seed: int = 0, invert: bool = False) -> None:
        self.pixels = np.random.default_rng(seed).integers(0, 256, (ROWS, 8, 8, 3), np.uint8)
        self.invert = invert
        self.asked = 0
        self.cache: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> np.ndarray:
        self.asked += 1
        self.cache[row] = self.pixels[row]
        return 255 - self.pixels[row] if self.invert else self.pixels[row]


def hooked(change: Callable[[torch.Tensor], torch.Tensor]) -> Tiny:
    model = Tiny()
    model.conv.register_forward_hook(lambda module, inputs, output: change(output))
    return model


def filled(value: float) -> Scaled:
    model = Scaled()
    model.window.data.fill_(value)
    return model


def pictures(seed: int) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (ROWS, 8, 8, 3), np.uint8))


class Noisy(Tiny):
    """Draws a random number in each pass, which changes no layer that is taken."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.rand(1)
        return super().forward(x)


class Jittered:
    """Random images, all of them or the row `only`; without random numbers if that is no row."""

    def __init__(self, only: int | None = None) -> None:
        self.only = only

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> np.ndarray:
        image = np.random.default_rng(row).integers(0, 256, (8, 8, 3), np.uint8)
        return np.random.permutation(image) if self.only in (row, None) else image


PRE = {"preprocess": as_input}
SEED = ({"seed": 0}, {"seed": 1})
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "an activation": ({"model": Tiny()}, {"model": Tanh()}, "model.modules.ReLU: 1 there, not set now"),
    "a hook": ({"model": Tiny()}, {"model": hooked(torch.zeros_like)}, "model.forward hook 0 of conv: not there then"),
    "another hook": ({"model": hooked(torch.abs)}, {"model": hooked(torch.zeros_like)}, "change: other than it was"),
    "a flag": ({"model": Scaled(0.5)}, {"model": Scaled(0.7)}, r"model.Tiny.alpha|model.Scaled.alpha: 0.5 there, 0.7"),
    "a buffer": ({"model": filled(1)}, {"model": filled(2)}, "model.Scaled.window: other than it was"),
    "a list of images": ({"source": pictures(0)}, {"source": pictures(1)}, "source: row 0: other than it was"),
    "a stack of images": (
        {"source": np.stack(pictures(0))},
        {"source": np.stack(pictures(1))},
        "source: row 0: other than it was",
    ),
    "a function": ({**PRE, "source": Folder()}, {"preprocess": negative, "source": Folder()}, "preprocess.callable"),
    "a Dataset's data": ({"source": Folder(0)}, {"source": Folder(1)}, "source: Folder.pixels: other than it was"),
    "a Dataset's flag": ({"source": Folder()}, {"source": Folder(invert=True)}, "Folder.invert: False there, True now"),
    "a seed of a random model": ({"model": Noisy(), **SEED[0]}, {"model": Noisy(), **SEED[1]}, "seed: 0 there, 1 now"),
    "a seed of random images": ({"source": Jittered(), **SEED[0]}, {"source": Jittered(), **SEED[1]}, "seed: 0 there"),
    "a seed of what is random for one image": (
        {"source": Jittered(only=ROWS - 3), **SEED[0]},
        {"source": Jittered(only=ROWS - 3), **SEED[1]},
        "seed: 0 there, 1 now|made again",
    ),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("same") / "photos", ROWS)


def run_with(given: dict[str, Any], photos: Path, out: Path, **options: Any) -> Any:
    return extract(given.get("source", photos), out, **{k: v for k, v in given.items() if k != "source"}, **options)


@pytest.mark.parametrize("what", CHANGES)
def test_a_finished_output_of_another_run_is_refused_by_name(what: str, photos: Path, tmp_path: Path) -> None:
    before, after, words = CHANGES[what]
    out = tmp_path / "out.h5"
    run_with(before, photos, out)
    content = out.read_bytes()
    for recheck in (True, False):
        with pytest.raises(OutputError, match=words):
            run_with(after, photos, out, recheck=recheck)
    notes = Notes()
    run_with(before, photos, out, notes=notes)
    assert "is complete already" in notes
    assert out.read_bytes() == content


def test_the_same_run_in_another_process_is_the_same(photos: Path, tmp_path: Path) -> None:
    """Whatever the seed of hashes; with a hook that records, a counter, a cache, a lambda as preprocessing."""
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import sys
sys.path[:0] = [{str(Path(__file__).parents[1])!r}, {str(Path(__file__).parent)!r}]
import torch
from runs import Notes, extract
from test_same_run import Folder, Scaled, as_input
KINDS = {{"a", "b", "c", "d"}}
class Counting(Scaled):
    kinds = {{kind: len(kind) for kind in KINDS}}
    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x) * self.kinds["a"]
for _ in range(2):
    model, seen = Counting(), []
    model.conv.register_forward_hook(lambda module, inputs, output: seen.append(output))
    notes = Notes()
    extract(Folder(), {str(tmp_path / "out.h5")!r} and __import__("pathlib").Path({str(tmp_path / "out.h5")!r}),
            model=model, preprocess=lambda image: as_input(image), notes=notes)
    extract(Folder(), __import__("pathlib").Path({str(tmp_path / "out.h5")!r}), model=model,
            preprocess=lambda image: as_input(image), notes=notes)
print("is complete already" in notes)
"""
    )
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        ended = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
        assert ended.stdout == "True\n", ended.stderr


def test_stimuli_made_anew_with_the_same_names_and_sizes(tmp_path: Path) -> None:
    folder = tmp_path / "stimuli"
    folder.mkdir()
    for row in range(ROWS):
        Image.open(make_photos(tmp_path / f"p{row}", 1) / "0000.png").save(folder / f"{row}.bmp")
    out = tmp_path / "out.h5"
    extract(folder, out)
    sizes = {path: path.stat().st_size for path in folder.iterdir()}
    changed = folder / "3.bmp"
    Image.fromarray(np.full((8, 8, 3), 7, np.uint8)).save(changed)
    os.utime(changed, ns=(1, 1))
    assert {path: path.stat().st_size for path in folder.iterdir()} == sizes
    with pytest.raises(OutputError, match=r"other content than then: '3.bmp'\)"):
        extract(folder, out, recheck=False)


def test_photos_that_were_only_touched_or_copied_are_the_same(photos: Path, tmp_path: Path) -> None:
    import shutil

    out = tmp_path / "out"
    extract_until(5, photos, out)
    shutil.copytree(photos, tmp_path / "photos", copy_function=shutil.copyfile)
    for path in (tmp_path / "photos").iterdir():
        os.utime(path, ns=(1, 1))
    notes = Notes()
    extract(tmp_path / "photos", out, notes=notes)
    assert "4 are compared with what was stored" in notes
    with activations.open(out) as acts:
        assert acts.num_rows == ROWS


@pytest.mark.parametrize("finished", [False, True])
def test_photos_that_are_others_are_named(finished: bool, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", 8)
    out = tmp_path / "out"
    if finished:
        extract(photos, out)
    else:
        extract_until(5, photos, out)
    (photos / "0002.png").rename(photos / "0002b.png")
    words = "source.keys: gone: '0002.png'" + (", new: '0002b.png'" if finished else "")
    with pytest.raises(OutputError, match=words):
        extract(photos, out)
    (photos / "0002b.png").unlink()
    with pytest.raises(OutputError, match=r"source.count: 8 there, 7 now, gone: '0002.png'"):
        extract(photos, out)
    (photos / "0002.png").write_bytes(picture(2) + b" ")
    with pytest.raises(OutputError, match=r"other content than then: '0002.png'"):
        extract(photos, out)
    (photos / "0002.png").write_bytes(picture(2))
    assert extract(photos, out).failed == 0


def test_a_photo_that_is_still_to_come_may_change(tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", 8)
    extract_until(5, photos, tmp_path / "out")
    (photos / "0006.png").write_bytes(picture(99) + b" ")
    assert extract(photos, tmp_path / "out").resumed_images == 4


def test_another_python_or_library_leaves_it_to_the_stored_rows() -> None:
    old = {"model": "m", "source": {"keys": "1", "count": 1}, "code": {"by": {"torch": "1"}, "model": {"a": "x"}}}
    new = {"model": "m", "source": {"keys": "1", "count": 1}, "code": {"by": {"torch": "2"}, "model": {"a": "y"}}}
    told: list[str] = []
    asked = same_run.Asked(new, None)  # type: ignore[arg-type]
    assert same_run.changed(old, asked, [], told.append) == []
    assert "torch 1 then, 2 now" in told[0]
    assert same_run.changed({**old, "code": {**new["code"], "model": {"a": "x"}}}, asked, [], told.append)  # type: ignore[dict-item]


def test_an_output_of_an_earlier_version_is_taken_up(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    extract_until(5, photos, out)
    plan = json.loads((out / "plan.json").read_text())
    for name in ("code", "seed", "random", "max_error", "not_covered"):
        del plan["identity"][name]
    del plan["identity"]["source"]["times"], plan["digest"]
    (out / "plan.json").write_text(json.dumps(plan))
    assert extract(photos, out).resumed_images == 4
    assert planning.Plan.from_json(plan).identity == plan["identity"]


# -------------------------------------------------------------------------------------------------- rows that failed


class Keyed:
    """A Dataset that asks for the wrong key until somebody corrects it."""

    key = "picture"

    def __len__(self) -> int:
        return 8

    def __getitem__(self, row: int) -> np.ndarray:
        return {"image": np.full((8, 8, 3), row, np.uint8)}[self.key]


@pytest.mark.parametrize("name", ["out", "out.h5"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_dataset_that_was_corrected_is_not_refused(name: str, overwrite: bool, tmp_path: Path) -> None:
    out = tmp_path / name
    dataset = Keyed()
    for _ in range(2):
        with pytest.raises(TooManyFailures, match=r"every one of the 8 images failed.*KeyError: 'picture'"):
            extract(dataset, out, overwrite=overwrite)
    dataset.key = "image"
    result = extract(dataset, out, overwrite=overwrite)
    assert (result.images, result.failed) == (8, 0)


class Away:
    """The same every time, but for what the disk gives."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __len__(self) -> int:
        return 8

    def __getitem__(self, row: int) -> np.ndarray:
        if str(row) in self.place.read_text().split():
            raise OSError("the disk was away")
        return np.full((8, 8, 3), row, np.uint8)


@pytest.mark.parametrize("name", ["out", "out.h5"])
def test_rows_that_failed_are_tried_again(name: str, tmp_path: Path) -> None:
    place, out = tmp_path / "away.txt", tmp_path / name
    place.write_text("")
    extract(Away(place), tmp_path / "whole")
    place.write_text("2 5")
    assert extract(Away(place), out).failed == 2
    before = {path: path.stat().st_mtime_ns for path in sorted(out.rglob("*") if out.is_dir() else [out])}
    assert extract(Away(place), out).failed == 2  # still away: nothing is made again
    assert extract(Away(place), out, keep_failures=True).failed == 2
    assert {path: path.stat().st_mtime_ns for path in before} == before
    place.write_text("5")
    notes = Notes()
    result = extract(Away(place), out, notes=notes)
    assert (result.failed, result.resumed_images) == (1, 4 if name == "out" else 0)
    assert "what failed before is there now, and is extracted: '000002'" in notes
    place.write_text("")
    assert extract(Away(place), out).failed == 0
    same(out, tmp_path / "whole") if name == "out" else None
    assert verification.verify(out).ok
    assert sorted(path.name for path in tmp_path.iterdir()) == ["away.txt", name, "whole"]


def test_rows_that_failed_are_tried_again_when_a_run_is_taken_up(tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", 12, bad={1: b"broken", 6: b"broken"})
    out = tmp_path / "out"
    extract_until(11, photos, out)
    assert sum(record.failed for record in shards.load_records(out)) == 2
    (photos / "0001.png").write_bytes(picture(1))
    result = extract(photos, out)
    assert (result.failed, result.resumed_images) == (1, 4)


def test_rows_that_failed_in_the_forward_pass_are_tried_again(tmp_path: Path) -> None:
    images = [np.full((8, 8, 3), 255 if row == 6 else row, np.uint8) for row in range(8)]
    holds = tmp_path / "holds.txt"
    holds.write_text("yes")

    class Reading(Tiny):
        """Fails for the brightest pictures while something does not hold."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if holds.read_text() != "yes" and bool((x > 0.95).flatten(1).all(1).any()):
                raise RuntimeError("too bright")
            return super().forward(x)

    class Stumbling(Notes):
        def start(self, total: int, done: int) -> None:
            holds.write_text("no")

    assert extract(images, tmp_path / "out", model=Reading(), notes=Stumbling()).failed == 1
    assert extract(images, tmp_path / "out", model=Reading()).failed == 1
    holds.write_text("yes")
    result = extract(images, tmp_path / "out", model=Reading())
    assert (result.failed, result.resumed_images) == (0, 4)


def test_every_failure_is_counted_against_the_budget_once(tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", 8, bad={1: b"broken", 2: b"broken"})
    with pytest.raises(TooManyFailures):
        extract(photos, tmp_path / "out", max_failures="1")
    with pytest.raises(TooManyFailures):
        extract(photos, tmp_path / "out", max_failures="1")
    assert extract(photos, tmp_path / "out", max_failures="2").failed == 2


# -------------------------------------------------------------------------------------------------------- provenance


class Inputs:
    """Finished inputs, as a Dataset with a transform of its own gives them."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.full((3, 8, 8), row / ROWS)


def test_finished_inputs_are_not_said_to_be_preprocessed(photos: Path, tmp_path: Path) -> None:
    extract(Inputs(), tmp_path / "inputs.h5")
    extract(photos, tmp_path / "photos.h5")
    with activations.open(tmp_path / "inputs.h5") as acts, activations.open(tmp_path / "photos.h5") as others:
        assert acts.preprocess == {"kind": "none"}
        assert others.preprocess["kind"] == "standard"


def test_the_library_of_a_model_and_the_command_are_said(photos: Path, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    from fmextract.cli import main

    out = tmp_path / "out.h5"
    line = ["extract", str(photos), "-m", "timm:test_vit.r160_in1k", "-w", "random:0", "-l", "blocks.0", "-o", str(out)]
    assert main([*line, "--precision", "fp32", "--batch-size", "2"]) == 0
    with activations.open(out) as acts:
        assert acts.versions["timm"] == timm.__version__
        assert f"fmextract extract {photos} -m timm:test_vit.r160_in1k -w random:0" in acts.attrs["history"]
    assert OPTIONS["precision"] == "fp32"


def half(row: int, item: Any) -> int:
    return row // 2


def third(row: int, item: Any) -> int:
    return row // 3


@pytest.mark.parametrize("name", ["list", "array", "tensor"])
def test_the_changed_item_in_memory_is_named(name: str, tmp_path: Path) -> None:
    made = {"list": list, "array": np.stack, "tensor": lambda images: torch.from_numpy(np.stack(images))}[name]
    images = pictures(0)
    extract(made(images), tmp_path / "a.h5")
    extract(made(images), tmp_path / "a.h5")
    images[4] = images[4] // 2
    with pytest.raises(OutputError, match=r"made otherwise \(source: row 4: other than it was\)"):
        extract(made(images), tmp_path / "a.h5")
    many = [np.full((8, 8, 3), row, np.uint8) for row in range(130)]
    extract(many, tmp_path / "b.h5")
    many[70][:] = 255
    with pytest.raises(OutputError, match=r"\(source: rows 69 to 71: other than it was\)"):
        extract(many, tmp_path / "b.h5")


def test_a_function_that_gives_the_labels_is_part_of_the_run(tmp_path: Path) -> None:
    for number, data in enumerate([pictures(0), Folder()]):
        out = tmp_path / f"{number}.h5"
        extract(data, out, label=half)
        extract(data, out, label=half)
        with pytest.raises(OutputError, match=r"source: (half|label=)"):
            extract(data, out, label=third)


def test_the_files_that_a_dataset_lists_are_part_of_the_run(tmp_path: Path) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    (tmp_path / "photos").mkdir()
    for folder in ("cats", "dogs"):
        make_photos(tmp_path / "photos" / folder, 3)
    data = datasets.ImageFolder(tmp_path / "photos")
    for given in (data, torch.utils.data.Subset(data, [4, 1]), torch.utils.data.ConcatDataset([data])):
        out, notes = tmp_path / f"{type(given).__name__}.h5", Notes()
        extract(given, out)
        changed = sorted((tmp_path / "photos" / "cats").iterdir())[1]
        os.utime(changed, (1, len(list(tmp_path.glob("*.h5")))))
        extract(given, out, notes=notes)
        assert "files have other times than they had" in notes
        with changed.open("ab") as file:
            file.write(b"more")
        with pytest.raises(OutputError, match="files have other sizes"):
            extract(given, out)


def test_another_model_or_size_is_said_once(photos: Path, tmp_path: Path) -> None:
    extract(photos, tmp_path / "a.h5", model="resnet18", layers=["conv1"], weights="random:0", size="32")
    with pytest.raises(OutputError, match=r"otherwise \(model: 'resnet18' there, 'resnet34' now\)"):
        extract(photos, tmp_path / "a.h5", model="resnet34", layers=["conv1"], weights="random:0", size="32")
    with pytest.raises(OutputError, match=r"otherwise \(input_shape: \[3, 32, 32\] there, \[3, 64, 64\] now\)"):
        extract(photos, tmp_path / "a.h5", model="resnet18", layers=["conv1"], weights="random:0", size="64")


# -------------------------------------------------------------------------------------------------- seeds, and --ignore


def library_model() -> nn.Sequential:
    tiny = Tiny()
    return nn.Sequential(tiny.conv, tiny.relu, nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), tiny.fc).eval()


@pytest.mark.parametrize("finished", [True, False])
def test_the_seed_of_a_run_without_anything_random_does_not_count(finished: bool, photos: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "out", {"model": library_model(), "layers": ["0", "5"]}
    if finished:
        extract(photos, out, **options)
    else:
        extract_until(5, photos, out, **options)
    notes = Notes()
    assert extract(photos, out, seed=7, notes=notes, **options).resumed_images == (ROWS if finished else 4)
    assert ("is complete already" in notes) is finished
    assert "the seed" not in notes


def test_where_code_of_the_users_might_draw_many_stored_rows_decide(tmp_path: Path) -> None:
    images, out = Jittered(only=-1), tmp_path / "out.h5"
    extract(images, out)
    notes = Notes()
    extract(images, out, seed=1, notes=notes)
    assert "the earlier run had the seed 0: nothing was seen to be random" in notes
    assert "is complete already" in notes
    with pytest.raises(OutputError, match="seed: 0 there, 1 now"):
        extract(images, out, seed=1, recheck=False)


def test_a_seed_that_might_count_is_the_same_for_the_rest_of_a_run(tmp_path: Path) -> None:
    images = Jittered(only=ROWS - 1)
    extract_until(5, images, tmp_path / "out")
    with pytest.raises(OutputError, match="seed: 0 there, 1 now"):
        extract(images, tmp_path / "out", seed=1)
    extract(images, tmp_path / "done")
    (tmp_path / "done" / "shard-00001.h5").unlink()
    with pytest.raises(OutputError, match="give --seed 0, or --ignore seed"):
        extract(images, tmp_path / "done", seed=1)


def test_a_field_that_is_ignored_is_told_and_stands_in_the_history(photos: Path, tmp_path: Path) -> None:
    renamed = type("Renamed", (Tiny,), {})
    for name in ("out", "out.h5"):
        out = tmp_path / name
        extract_until(5, photos, out)
        with pytest.raises(OutputError, match=r"model: 'Tiny' there, 'Renamed' now.*--ignore FIELD"):
            extract(photos, out, model=renamed())
        notes = Notes()
        assert extract(photos, out, model=renamed(), ignore=["model"], notes=notes).resumed_images == 4
        assert "not compared, as --ignore says: model: 'Tiny' there, 'Renamed' now" in notes
        notes = Notes()
        extract(photos, out, model=renamed(), ignore="model", notes=notes)
        assert "not compared, as --ignore says: model: 'Tiny' there, 'Renamed' now" in notes
        assert "is complete already" in notes
        extract(photos, out)
    with activations.open(tmp_path / "out.h5") as acts:
        _, second = str(acts.attrs["history"]).splitlines()
    assert "ignoring what differs: model: 'Tiny' there, 'Renamed' now" in second
    assert "ignoring" in json.loads((tmp_path / "out/plan.json").read_text())["info"]["history"]


@pytest.mark.parametrize("finished", [True, False])
def test_what_is_ignored_is_still_compared_by_its_values(finished: bool, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    if finished:
        extract(photos, out)
    else:
        extract_until(5, photos, out)
    with pytest.raises(OutputError, match="cannot be made again"):
        extract(photos, out, model=Tiny(seed=1), ignore=["weights"])
    with pytest.raises(OutputError, match=r"model\.modules\.ReLU"):
        extract(photos, out, model=Tanh(), ignore=["weights", "seed"])
    notes, refused = Notes(), pytest.raises(OutputError, match=r"relu\.module_type: 'ReLU' in the plan, 'Tanh' here")
    with contextlib.nullcontext() if finished else refused:
        extract(photos, out, model=Tanh(), ignore=["model"], recheck=False, notes=notes)
    assert "model.modules.ReLU: 1 there, not set now" in notes


def test_all_of_the_code_is_a_field(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    extract(photos, out)
    notes = Notes()
    extract(photos, out, model=Tanh(), ignore=["code"], recheck=False, notes=notes)
    assert "model.modules.Tanh: not set there, 1 now" in notes
    with pytest.raises(OutputError, match="cannot be made again"):
        extract(photos, out, model=Tanh(), ignore=["code"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_scripted_module_may_draw_for_some_images() -> None:
    assert not may_draw(library_model())
    assert may_draw(nn.Sequential(torch.jit.script(library_model())))
    assert may_draw(Tiny())
    hooked_model = library_model()
    hooked_model[0].register_forward_hook(lambda module, inputs, output: output)
    assert may_draw(hooked_model)


@pytest.mark.parametrize("begun", [True, False])
def test_a_field_to_ignore_is_one_that_there_is(begun: bool, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    if begun:
        extract(photos, out)
    for name, words in {
        "weight": "--ignore weight: no such field; expected one as weights",
        "layers": "--ignore layers: it says what lies in an output",
        "source.count": "--ignore source.count: it says what lies in an output",
    }.items():
        with pytest.raises(ConfigError, match=words):
            extract(photos, out, ignore=[name])
    with pytest.raises(OutputError, match=r"source\.count") if begun else contextlib.nullcontext():
        extract(photos, out, limit=ROWS - 1, ignore=["source"])
