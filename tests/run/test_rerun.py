"""What a file names is not run, loaded or downloaded unless the user says so; libraries' models and photos are used."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import pytest
import runs
import torch
import torchvision
from safetensors.torch import save_file

from fmextract.cli import app
from fmextract.common.imports import import_object
from fmextract.common.trust import names_from_a_file
from fmextract.errors import ConfigError, ModelError
from fmextract.model import loading
from fmextract.storage.digest import digest_of_open
from fmextract.verification import verify

EVIL = """
import pathlib, sys
sys.path.insert(0, {tests!r})
from runs import Tiny
pathlib.Path({sentinel!r}).write_text("I ran")
make = Tiny
def prepare(picture):
    import torchvision.transforms.functional as f
    return f.to_tensor(f.resize(picture, [8, 8])) * 2 - 1
def half(rows):
    return rows / 2
def photos():
    return Photos()
class Photos:
    paths = sorted(pathlib.Path({photos!r}).iterdir())
    def __len__(self):
        return len(self.paths)
    def __getitem__(self, row):
        return self.paths[row]
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with photos, and code beside them that leaves a trace where it is imported."""
    runs.make_photos(tmp_path / "photos", 3)
    names = {"tests": str(Path(runs.__file__).parent), "photos": str(tmp_path / "photos")}
    (tmp_path / "evil.py").write_text(EVIL.format(sentinel=str(tmp_path / "ran"), **names))
    (tmp_path / "importable_evil.py").write_text(EVIL.format(sentinel=str(tmp_path / "ran"), **names))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path


def forget(place: Path) -> None:
    """As in a new process."""
    for name in ("evil", "importable_evil"):
        sys.modules.pop(name, None)
    (place / "ran").unlink(missing_ok=True)


def ran(place: Path) -> bool:
    return (place / "ran").exists()


EVIL_RUNS: Mapping[str, tuple[Any, Any, dict[str, Any], str]] = {
    "model": ("photos", "evil.py:make", {}, "-m evil.py:make"),
    "module": ("photos", "importable_evil:make", {}, "-m importable_evil:make"),
    "preprocess": ("photos", "evil.py:make", {"preprocess": "evil.py:prepare"}, "--preprocess evil.py:prepare"),
    "source": ("evil.py:photos", "evil.py:make", {}, "--source evil.py:photos"),
    "reducer": ("photos", "evil.py:make", {"layers": ["conv=evil:half"]}, "'evil:half'"),
}
"""What the run that made a file named, and what the message says of it."""


@pytest.mark.parametrize("what", EVIL_RUNS)
def test_code_that_a_file_names_is_not_run(place: Path, what: str) -> None:
    source, model, options, said = EVIL_RUNS[what]
    runs.extract(source, place / "acts.h5", model=model, **options)
    assert ran(place)
    forget(place)
    assert verify(place / "acts.h5").ok
    with pytest.raises(ConfigError) as error:
        verify(place / "acts.h5", rerun=2)
    assert said in str(error.value)
    assert "--trust" in str(error.value)
    assert app.main(["verify", "acts.h5", "--rerun", "2"]) == 2
    assert not ran(place)
    assert verify(place / "acts.h5", rerun=2, trust=True).ok
    assert ran(place)


def test_what_is_given_again_is_run_and_nothing_else(place: Path) -> None:
    options = {"preprocess": "evil.py:prepare", "layers": ["conv"]}
    runs.extract("evil.py:photos", place / "acts.h5", model="evil.py:make", **options)
    forget(place)
    out = place / "acts.h5"
    for given in (
        {"model": "evil.py:make"},
        {"model": runs.Tiny(), "source": place / "photos"},
        {"source": "photos", "preprocess": "evil.py:prepare"},
    ):
        with pytest.raises(ConfigError, match="names code"):
            verify(out, rerun=2, **given)
        assert not ran(place)
    everything = ["-m", "evil.py:make", "--source", "evil.py:photos", "--preprocess", "evil.py:prepare"]
    assert app.main(["verify", "acts.h5", "--rerun", "2", *everything]) == 0
    assert app.main(["verify", "acts.h5", "--rerun", "2", "--trust"]) == 0


def test_all_of_it_is_said_at_once(place: Path) -> None:
    runs.extract("evil.py:photos", place / "acts.h5", model="evil.py:make", preprocess="evil.py:prepare")
    with pytest.raises(ConfigError) as error:
        verify(place / "acts.h5", rerun=2)
    assert "(-m evil.py:make --source evil.py:photos --preprocess evil.py:prepare)" in str(error.value)


def test_whatever_imports_asks(place: Path) -> None:
    """Also what nobody thought of: no name becomes code while names are those of a file."""
    with names_from_a_file(Path("acts.h5"), ["evil.py:make"]):
        with pytest.raises(ConfigError, match=r"acts\.h5 names the code 'importable_evil:make'"):
            import_object("importable_evil:make", ConfigError, "anything")
        assert not ran(place)
        import_object("evil.py:make", ConfigError, "anything")
        with pytest.raises(ConfigError, match="names the code"):
            loading.load_model("importable_evil:make")
    assert import_object("importable_evil:make", ConfigError, "anything") is not None


# ---- weights


class Opened:
    """A pickle that leaves a trace where it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return exec, (f"open({str(self.trace)!r}, 'w').close()",)


SMALL = {"layers": ["features.0"], "preprocess": "size=32,crop=32,mean=0.5,std=0.5", "limit": 2}


def rewritten(out: Path, config: Callable[[dict[str, Any]], None]) -> None:
    """Another configuration in a file, whose digest is right again."""
    with h5py.File(out, "r+") as file:
        said = json.loads(file.attrs["fmextract_config"])
        config(said)
        file.attrs["fmextract_config"] = json.dumps(said)
        file.attrs["content_digest"] = digest_of_open(file, {})


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".txt", ""])
def test_a_pickle_is_not_unpickled(place: Path, suffix: str) -> None:
    out, pickled = place / "acts.h5", place / f"weights{suffix}"
    runs.extract("photos", out, model="squeezenet1_1", weights="random:0", **SMALL)
    pickled.write_bytes(pickle.dumps(Opened(place / "ran")))
    rewritten(out, lambda config: config["options"].update(weights=str(pickled)))
    with pytest.raises(ConfigError, match=r"its digest was not recorded.*-w"):
        verify(out, rerun=1)
    digest = hashlib.sha256(pickled.read_bytes()).hexdigest()
    rewritten(out, lambda config: config["origin"].update(weights_file_sha256=digest))
    with pytest.raises(ConfigError, match="pickled objects are not loaded"):
        verify(out, rerun=1)
    rewritten(out, lambda config: config["origin"].update(weights_file_sha256="0" * 64))
    with pytest.raises(ConfigError, match="is not the one of the run"):
        verify(out, rerun=1)
    for given in ({"weights": str(pickled)}, {"trust": True}):
        with pytest.raises(ConfigError, match="pickled objects are not loaded"):
            verify(out, rerun=1, **given)
    assert not ran(place)


def test_a_weight_file_is_read_where_it_is_the_one_of_the_run(place: Path) -> None:
    torch.manual_seed(3)
    module = torchvision.models.squeezenet1_1(weights=None)
    save_file(module.state_dict(), place / "weights.safetensors")
    runs.extract("photos", place / "acts.h5", model="squeezenet1_1", weights="weights.safetensors", **SMALL)
    assert verify(place / "acts.h5", rerun=1).largest_error == 0
    save_file({name: value + 1 for name, value in module.state_dict().items()}, place / "weights.safetensors")
    with pytest.raises(ConfigError, match="is not the one of the run"):
        verify(place / "acts.h5", rerun=1)
    with pytest.raises(ConfigError, match="weights: "):  # given again, and read, and others
        verify(place / "acts.h5", rerun=1, weights="weights.safetensors")


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What somebody wanted to talk to; nobody answers."""
    asked: list[Any] = []

    def connect(self: socket.socket, address: Any) -> None:
        asked.append(address)
        raise OSError("there is no network in this test")

    def look_up(*address: Any, **how: Any) -> Any:
        asked.append(address)
        raise OSError("there is no network in this test")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return asked


def test_weights_in_the_cache_are_used_and_nothing_is_downloaded(place: Path, network: list[Any]) -> None:
    torch.manual_seed(3)
    module, url = torchvision.models.squeezenet1_1(weights=None), torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url
    cached = place / "hub" / "checkpoints" / url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    torch.save(module.state_dict(), cached)
    runs.extract("photos", place / "acts.h5", model="squeezenet1_1", **SMALL)
    assert verify(place / "acts.h5", rerun=1).largest_error == 0
    torch.save({name: value + 1 for name, value in module.state_dict().items()}, cached)
    with pytest.raises(ConfigError, match="weights: "):
        verify(place / "acts.h5", rerun=1)
    cached.unlink()
    with pytest.raises(ConfigError, match=r"squeezenet1_1, whose weights are not on this disk.*-m"):
        verify(place / "acts.h5", rerun=1)
    assert not network
    with pytest.raises(ConfigError, match="could not be downloaded"):
        verify(place / "acts.h5", rerun=1, model="squeezenet1_1")
    assert network


class Evil:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = str(sentinel)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.sentinel,)


def test_a_pickle_in_the_cache_is_not_unpickled(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchvision itself would: a name in a file is enough to have it read what lies there."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    cached = place / "hub" / "checkpoints" / torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    torch.save({"payload": Evil(place / "ran")}, cached)
    with names_from_a_file(place / "acts.h5", []), pytest.raises(ModelError, match="squeezenet1_1"):
        loading.load_model("squeezenet1_1")
    assert not ran(place)
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_nothing_is_downloaded_for_timm_either(
    place: Path, network: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place / "hf"))
    for name in ("timm:resnet18", "timm:resnet18.a1_in1k"):
        with names_from_a_file(place / "acts.h5", []), pytest.raises(ConfigError, match="are not on this disk"):
            loading.load_model(name)
    with names_from_a_file(place / "acts.h5", []):
        loading.load_model("timm:resnet18", "random:0")
        with pytest.raises(ConfigError, match="timm has no model"):
            loading.load_model("timm:hf-hub:somebody/anything")
    assert not network
    assert not constants.HF_HUB_OFFLINE
