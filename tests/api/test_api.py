"""The public functions: what they are called, what they take, and that they agree with the command line."""

from __future__ import annotations

import html
import importlib.util
import inspect
import logging
import pickle
import pkgutil
import re
import subprocess
import sys
import typing
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
import typer

import fmextract as fm
from fmextract.cli.app import app
from fmextract.common.progress import shown
from fmextract.config import Config
from fmextract.options import RunOptions

FUNCTIONS = [
    "bench", "compare", "export", "extract", "layers", "open", "pack", "plan", "report",
    "show_depth", "show_filters", "show_maps", "show_top", "show_where", "verify",
]  # fmt: skip
OPTIONS = {name: value for name, value in runs.OPTIONS.items() if name != "layers"}


def commands() -> dict[str, Any]:
    """The commands by the names of their functions."""
    found: dict[str, Any] = {}
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found |= {name: command} if inner is None else {f"{name}_{word}": one for word, one in inner.items()}
    return found


COMMANDS = commands()
# Of every command: how it is shown. Of some: an argument that has another name there, or has no meaning in Python.
SHOWN = {"as_json", "debug", "quiet", "verbose", "help"}
OTHER_NAMES: dict[str, dict[str, str]] = {
    "extract": {"plan_file": "plan", "like_file": "like"},
    "plan": {"like_file": "like"},
    "layers": {"selectors": "layers"},
    "verify": {"out": "acts"},
    "report": {"out": "acts", "page": "out"},
    "show_maps": {"kind": "format"},
}
ONLY_A_COMMAND = {
    "extract": {"dry_run", "config_file"},
    "plan": {"save", "save_config", "config_file"},
    "bench": {"config_file"},
}
ONLY_PYTHON = {"plan": {"plan"}, "verify": {"seed"}}


def choices(kind: Any) -> set[str]:
    """The texts that a type allows, none where it allows any."""
    return set(re.findall(r"'([\w-]+)'", "".join(re.findall(r"Literal\[(.*?)\]", str(kind)))))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_takes_what_its_command_takes(name: str) -> None:
    renamed = OTHER_NAMES.get(name, {})
    command = {renamed.get(p.name, p.name): p for p in COMMANDS[name].params} if name != "open" else {}
    taken = {*inspect.signature(getattr(fm, name)).parameters} - {"progress"}
    if name != "open":
        assert set(command) - SHOWN - ONLY_A_COMMAND.get(name, set()) == taken - ONLY_PYTHON.get(name, set())


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name in COMMANDS])
def test_defaults_and_choices_are_those_of_the_command(name: str) -> None:
    renamed = OTHER_NAMES.get(name, {})
    own = inspect.signature(getattr(fm, name)).parameters
    for parameter in COMMANDS[name].params:
        there = own.get(renamed.get(parameter.name, parameter.name))
        if there is None or parameter.name in SHOWN:
            continue
        if parameter.default not in (None, ()) and not parameter.required and not parameter.multiple:
            assert str(there.default) == str(parameter.default), parameter.name
        allowed = choices(there.annotation)
        if allowed and allowed != {"auto"}:
            assert set(parameter.metavar.split("|")) == allowed, parameter.name


def test_the_typed_options_are_the_fields_of_config() -> None:
    assert [*RunOptions.__annotations__] == [field.name for field in fields(Config) if field.name != "layers"]
    signature = inspect.signature(fm.extract).parameters
    for field in fields(Config):
        assert Config.of(**{field.name: signature[field.name].default}) == Config(), field.name
        if typing.get_origin(signature[field.name].annotation) is typing.Literal:
            for choice in typing.get_args(signature[field.name].annotation):
                Config.of(**{field.name: choice})
        elif field.type == "bool":
            assert signature[field.name].annotation is bool


def test_plan_and_bench_take_the_options_of_extract() -> None:
    taken = [set(inspect.signature(function).parameters) for function in (fm.extract, fm.plan, fm.bench)]
    assert taken[0] == taken[1] == taken[2] - {"repeats", "plot", "theme", "dpi"} | {"out", "plan", "like", "trust"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_follows_the_first_arguments_is_by_keyword_only(name: str) -> None:
    kinds = inspect.signature(getattr(fm, name)).parameters.values()
    assert sum(kind.kind is not kind.KEYWORD_ONLY for kind in kinds) <= 4
    assert all(kind.kind in (kind.KEYWORD_ONLY, kind.POSITIONAL_OR_KEYWORD) for kind in kinds)


def test_every_submodule_can_be_imported_and_every_name_is_still_what_it_was() -> None:
    names = [module.name for module in pkgutil.walk_packages(fm.__path__, "fmextract.")]
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is not None and str(spec.origin).endswith(".py"):  # the kernels are loaded by ctypes
            importlib.import_module(name)
    assert all(callable(getattr(fm, name)) for name in fm.__all__ if name != "__version__")
    assert not [name for name in fm.__all__ if inspect.ismodule(getattr(fm, name))]
    assert {name.split(".")[1] for name in names}.isdisjoint(fm.__all__)


def test_all_names_are_there_without_torch() -> None:
    code = "import fmextract as fm, inspect, sys; assert set(fm.__all__) <= {*dir(fm)}\n"
    code += f"for name in {FUNCTIONS}: inspect.signature(getattr(fm, name))\n"
    code += "assert not {'torch', 'h5py', 'numpy'} & {*sys.modules}\n"
    code += "from fmextract import *; assert Activations and linear_cka and extract is fm.extract"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", sorted(set(fm.__all__) - {"__version__"}))
def test_a_name_can_be_pickled(name: str) -> None:
    assert pickle.loads(pickle.dumps(getattr(fm, name))) is getattr(fm, name)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six photos, acts.h5 of one file, and the same as shards/."""
    folder = tmp_path_factory.mktemp("api")
    photos = runs.make_photos(folder / "photos", 6)
    for out in ("acts.h5", "shards"):
        fm.extract(photos, runs.Tiny(), folder / out, layers=runs.LAYERS, progress=False, **OPTIONS).close()
    return folder


USES: dict[str, Callable[[Any, Path], Any]] = {
    "verify": lambda acts, out: fm.verify(acts, progress=False).rows,
    "export": lambda acts, out: fm.export(acts, to="npy", out=out / "npy", layers="conv", progress=False).rows,
    "compare": lambda acts, out: fm.compare(acts, acts, layers="conv", out=out / "d.png").images,
    "report": lambda acts, out: fm.report(acts, out=out / "r.html").layers * 2,
    "show_maps": lambda acts, out: 6 * len(fm.show_maps(acts, "0000.png", out, layers="conv", count=1)),
    "show_depth": lambda acts, out: 2 * len(fm.show_depth(acts, layers=["conv", "relu", "fc"])),
    "show_top": lambda acts, out: 6 * len(fm.show_top(acts, "conv", 1, out / "t.png", k=1)),
    "show_where": lambda acts, out: 6 * len(fm.show_where(acts, "0000.png", "conv", out / "w.png", k=1).peaks),
}


@pytest.mark.parametrize("name", USES)
def test_an_output_is_a_path_or_open(name: str, place: Path, tmp_path: Path) -> None:
    with fm.open(place / "acts.h5") as acts:
        for i, given in enumerate((place / "acts.h5", str(place / "shards"), acts)):
            (tmp_path / str(i)).mkdir()
            assert USES[name](given, tmp_path / str(i)) == 6
        assert acts["conv"][0].shape == (4, 8, 8)  # it is still open
    with pytest.raises(fm.ConfigError, match=r"expected the path of an output, or what open\(\) returned, got int 5"):
        USES[name](5, tmp_path)


def test_a_run_like_that_of_an_output(place: Path, tmp_path: Path) -> None:
    with fm.open(place / "acts.h5") as acts:
        options = {"like": acts, "progress": False, "limit": 3, "layers": ["conv"], "num_workers": 1}
        plan = fm.plan(place / "photos", runs.Tiny(), tmp_path / "like.h5", **options)
        assert (plan.precision, plan.batch_size, plan.rows, len(plan.layers)) == ("fp32", 4, 3, 1)
        with fm.extract(place / "photos", runs.Tiny(), tmp_path / "like.h5", top=2, **options) as made:
            np.testing.assert_array_equal(made["conv"][:], acts["conv"][:3])
            assert made["conv"].stats.top_value.shape == (4, 2)
    with pytest.raises(fm.ConfigError, match="it only means something with like="):
        fm.extract(place / "photos", runs.Tiny(), tmp_path / "x.h5", trust=True)


def test_pack_gives_the_file(place: Path, tmp_path: Path) -> None:
    with fm.open(place / "shards") as shards, fm.pack(shards, tmp_path / "one.h5") as packed:
        np.testing.assert_array_equal(packed["conv"][:], shards["conv"][:])
    with pytest.raises(fm.ConfigError, match="not-rows"):
        fm.pack(place / "shards", tmp_path / "two.h5", leave_out=["not-rows"])


def test_a_plan_is_printed_as_the_command_shows_it(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fmextract.cli import main

    words = [word for name, value in OPTIONS.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    model = f"{Path(runs.__file__)}:Tiny"
    out = tmp_path / "acts.h5"
    assert main(["plan", str(place / "photos"), "-m", model, "-l", "conv", *words, "-o", str(out)]) == 0
    plan = fm.plan(place / "photos", model, out, layers="conv", progress=False, **OPTIONS)

    def without_times(text: str) -> list[str]:
        return [line for line in text.strip().splitlines() if "on disk, about" not in line]

    assert without_times(capsys.readouterr().out) == without_times(str(plan))
    assert repr(plan).startswith("<Plan: 6 images, 1 layer, fp32 on cpu, about ")
    assert plan._repr_html_() == f"<pre>{str(plan).replace('&', '&amp;')}</pre>"
    assert not out.exists()


def test_a_plan_replaces_an_earlier_plan_and_nothing_else(place: Path, tmp_path: Path) -> None:
    plan = fm.plan(place / "photos", runs.Tiny(), layers="conv", progress=False, **OPTIONS)
    plan.save(tmp_path / "plan.json")
    plan.save(tmp_path / "plan.json")
    for name, content in {"photo.png": b"\x89PNG", "mine.json": b"{}", "empty": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(fm.OutputError, match=f"{name} exists, and is not a plan"):
            plan.save(tmp_path / name)
        assert (tmp_path / name).read_bytes() == content


def test_what_is_said_of_a_picture_holds_no_arrays(place: Path, tmp_path: Path) -> None:
    for found in (
        fm.show_maps(place / "acts.h5", "0000.png", tmp_path, layers="conv", count=1)[0],
        fm.show_where(place / "acts.h5", "0000.png", "conv", tmp_path / "w.png"),
        fm.show_filters(runs.Tiny(), "conv", tmp_path / "f.png"),
    ):
        assert "layer='conv'" in repr(found)
        assert "array" not in repr(found)


def test_a_size_is_one_number_or_two() -> None:
    assert fm.Preprocess(resize=32, crop=24) == fm.Preprocess(resize=32, crop=(24, 24))  # type: ignore[arg-type]
    wrong: list[Any] = [0, "32", (8,), (8, 0), 2.5, True, (8, 8, 8)]
    for side in wrong:
        with pytest.raises(fm.ConfigError, match=r"crop=.*expected"):
            fm.Preprocess(resize=None, crop=side)
        with pytest.raises(fm.ConfigError, match=r"resize=.*expected"):
            fm.Preprocess(resize=side, crop=(8, 8))


def test_layers_are_printed_as_the_command_shows_them(capsys: pytest.CaptureFixture[str]) -> None:
    from fmextract.cli import main

    model = f"{Path(runs.__file__)}:Tiny"
    assert main(["layers", model, "--size", "8x8", "--preprocess", "mean=0,std=1,size=8,crop=8"]) == 0
    rows = fm.layers(model, size=(8, 8), preprocess="mean=0,std=1,size=8,crop=8")
    assert capsys.readouterr().out == f"{rows}\n"
    assert [row.path for row in rows[:2]] == ["conv", "relu"]
    assert repr(rows) == f"<ModelLayers: {len(rows)} rows>"


@pytest.mark.parametrize("name", ["verify", "compare", "export"])
def test_what_is_said_of_an_output_is_printed_as_the_command_shows_it(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    from fmextract.cli import main

    acts, out = place / "acts.h5", tmp_path / "arrays"
    words = {"verify": [], "compare": [str(acts)], "export": ["--to", "npy", "-o", str(out), "--overwrite", "-q"]}[name]
    asked: dict[str, Callable[[], Any]] = {
        "verify": lambda: fm.verify(acts, progress=False),
        "compare": lambda: fm.compare(acts, acts),
        "export": lambda: fm.export(acts, to="npy", out=out, overwrite=True, progress=False),
    }
    assert main([name, str(acts), *words]) == 0
    found = asked[name]()
    assert capsys.readouterr().out == f"{found}\n"
    assert str(acts if name != "export" else out) in str(found)
    assert re.fullmatch(f"<{type(found).__name__}: .*>", repr(found))
    assert found._repr_html_() == f"<pre>{html.escape(str(found))}</pre>"


def test_progress_is_a_bar_nothing_or_an_object(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def extract(progress: Any, out: str) -> str:
        made = fm.extract(place / "photos", runs.Tiny(), tmp_path / out, layers="conv", progress=progress, **OPTIONS)
        made.close()
        return capfd.readouterr().err

    assert "6 images in" in extract(True, "a.h5")
    with caplog.at_level(logging.DEBUG, logger="fmextract"):
        assert extract(False, "b.h5") == ""
        notes = runs.Notes()
        assert extract(notes, "b.h5") == ""
    said = [record.getMessage() for record in caplog.records if record.name.startswith("fmextract")]
    assert "published shard-00000.h5: rows 0-3, 0 of them failed" in said
    assert f"{tmp_path / 'b.h5'} is complete already" in said
    assert f"{tmp_path / 'b.h5'} is complete already" in notes.notes
    for nobody in (1, "yes", None):
        with pytest.raises(fm.ConfigError, match="expected True, False, or an object with the methods of Progress"):
            shown(nobody)  # type: ignore[arg-type]


def test_a_model_in_the_place_of_the_images_is_named(place: Path, tmp_path: Path) -> None:
    for function in (fm.extract, fm.plan):
        with pytest.raises(fm.SourceError, match="the source is a model, Tiny: images come first"):
            function(runs.Tiny(), str(place / "photos"), tmp_path / "x.h5", progress=False)  # type: ignore[arg-type]


def test_looking_at_a_network_of_ones_own_needs_no_preprocessing(tmp_path: Path) -> None:
    model = f"{Path(runs.__file__)}:Tiny"
    assert fm.layers(model, size=8) == fm.layers(runs.Tiny(), size=8)
    with pytest.raises(fm.SourceError, match="give --size"):
        fm.layers(model)
    for layer, size in (("conv", None), ("conv#0", 8)):
        assert fm.show_filters(model, layer, tmp_path / "f.png", size=size).layer == "conv"
    make = runs.make_photos(tmp_path / "photos", 1)
    with pytest.raises(fm.ConfigError, match="brings no preprocessing"):
        fm.show_filters(model, "conv", tmp_path / "f.png", image=next(make.iterdir()))


def test_the_library_installs_no_handler() -> None:
    code = "import fmextract, logging; log = logging.getLogger('fmextract'); log.info('x'); log.warning('y')\n"
    code += "assert [type(one) for one in log.handlers] == [logging.NullHandler] and not logging.getLogger().handlers"
    ended = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not ended.stderr


WRONG = [
    ({"batchsize": 3}, "unknown option 'batchsize'; the closest: batch_size"),
    ({"selectors": "conv"}, "unknown option 'selectors'"),
    ({"layer": "conv"}, "unknown option 'layer'; the closest: layers"),
    ({"worker": 3}, "the closest: num_workers|the closest: worker_kind"),
    ({"exif": "no"}, "--exif 'no': expected True or False"),
    ({"compile": 1}, "--compile 1: expected True or False"),
    ({"batch_size": 2.5}, "--batch-size 2.5: expected a whole number or 'auto'"),
    ({"limit": True}, "--limit True: expected a whole number"),
    ({"limit": 1.0}, "--limit 1.0: expected a whole number"),
    ({"keep_bits": "eight"}, "--keep-bits 'eight': expected a whole number"),
    ({"precision": 32}, "--precision 32: expected one of auto, fp32"),
    ({"plan": 5}, r"plan=5: expected what plan\(\) returned, or the file it was saved to"),
    ({"like": 5}, r"expected the path of an output, or what open\(\) returned, got int 5"),
    ({"layers": 5}, "expected a text or several, got 5"),
    ({"layers": [1, 2]}, r"expected a text or several, got \[1, 2\]"),
]


@pytest.mark.parametrize(("options", "words"), WRONG)
def test_a_wrong_option_is_refused_in_words(options: dict[str, Any], words: str, place: Path, tmp_path: Path) -> None:
    for function in (fm.extract, fm.plan):
        with pytest.raises(fm.ConfigError, match=words):
            function(place / "photos", runs.Tiny(), tmp_path / "x.h5", **options)


def test_what_numpy_and_torch_call_things_will_do() -> None:
    given = Config.of(dtype=torch.float16, device=torch.device("cpu"), limit=np.int64(3), size=(8, 16), batch_size="4")
    assert given == Config(dtype="float16", device="cpu", limit=3, size="8x16", batch_size=4)
    assert type(given.limit) is int
    assert Config.of(dtype=np.float32) == Config(dtype="float32")


@pytest.mark.parametrize("model", [5, None, runs.Tiny, b"resnet18"])
def test_what_is_no_model_is_refused_in_words(model: Any, place: Path, tmp_path: Path) -> None:
    with pytest.raises(fm.ModelError, match="expected a model's name or a torch module, got"):
        fm.extract(place / "photos", model, tmp_path / "x.h5")


@pytest.mark.parametrize("source", [5, None, {"a": 1}, iter([])])
def test_what_is_no_source_is_refused_in_words(source: Any, tmp_path: Path) -> None:
    with pytest.raises(fm.SourceError):
        fm.extract(source, runs.Tiny(), tmp_path / "x.h5")


@pytest.mark.parametrize("given", [{}, {"acts": "acts.h5"}, {"model": "resnet18"}, {"image": "a", "model": "resnet18"}])
def test_maps_are_of_an_output_or_of_a_model(given: dict[str, Any]) -> None:
    with pytest.raises(fm.ConfigError, match="either an output and the key of an image in it, or model= and input="):
        fm.show_maps(out="maps", **given)
    with pytest.raises(TypeError, match="unexpected keyword argument 'columns'"):
        fm.show_maps("acts.h5", "a", "maps", columns=3)  # type: ignore[call-overload]
