"""What many layers cost in HDF5, counted; and that what is written with few calls is what h5py's many calls write."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import nn

import fmextract as fm
from fmextract.capture import inspection
from fmextract.storage import contents, digest, objects, schema

FEW, MANY = 10, 30


def run(folder: Path, layers: int) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.ReLU() if i % 2 else nn.Conv2d(2, 2, 1) for i in range(layers))).eval()
    out = folder / f"{layers}.h5"
    fm.extract([torch.randn(2, 4, 4) for _ in range(3)], model, out, layers=["*"], preprocess="none").close()
    return out


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Counter[str]:
    """Calls a layer of what opens, wraps and writes in a whole run: those of MANY layers less those of FEW."""
    folder, counts = tmp_path_factory.mktemp("counted"), Counter[str]()
    with pytest.MonkeyPatch.context() as patch:
        watched: list[tuple[Any, str]] = [
            (h5py.File, "__init__"),
            (h5py.Dataset, "__init__"),
            (h5py.Group, "__init__"),
            (h5py.AttributeManager, "create"),
            (h5py.AttributeManager, "__getitem__"),
            (schema, "scales"),
            (digest, "_put_values"),
            (digest, "_attribute_parts"),
            (inspection, "_output"),
            (Counter, "__eq__"),
        ]
        for owner, name in watched:
            patch.setattr(owner, name, counting(counts, f"{owner.__name__}.{name}", getattr(owner, name)))
        run(folder, FEW)
        few = Counter(counts)
        counts.clear()
        run(folder, MANY)
    return Counter({name: counts[name] - few[name] for name in counts})


def counting(counts: Counter[str], name: str, function: Any) -> Any:
    def counted(*args: Any, **kwargs: Any) -> Any:
        counts[name] += 1
        return function(*args, **kwargs)

    return counted


def test_a_layer_costs_few_of_h5pys_objects(counted: Counter[str]) -> None:
    layers = MANY - FEW
    assert counted["AttributeManager.create"] == counted["AttributeManager.__getitem__"] == 0
    most = {"File.__init__": 1, "Dataset.__init__": 2, "Group.__init__": 2}
    assert {name: counted[name] / layers for name in most if counted[name] > most[name] * layers} == {}


def test_the_digest_reads_nothing_of_a_layer_that_was_just_written(counted: Counter[str]) -> None:
    assert counted["fmextract.storage.digest._put_values"] == counted["fmextract.storage.digest._attribute_parts"] == 0
    assert counted["fmextract.storage.schema.scales"] == 0  # nor does the run look through the file that it wrote


def test_what_a_layer_costs_does_not_grow_with_the_layers(counted: Counter[str]) -> None:
    # Of all layers for each it would be 2 * MANY.
    assert counted["fmextract.capture.inspection._output"] <= 12 * (MANY - FEW)
    assert counted["Counter.__eq__"] == 0  # the probe compares all counts of two passes once


def test_the_digest_of_what_was_written_is_that_of_the_file(tmp_path: Path) -> None:
    out = run(tmp_path, FEW)
    with fm.open(out) as acts:
        assert digest.content_digest(out) == acts.attrs["content_digest"]


def test_scales_are_attached_as_libhdf5_attaches_them(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    with h5py.File(tmp_path / "ours.h5", "w", track_order=True) as file:
        for name, size in (("y", 2), ("x", 3)):
            objects.create(file.id, objects.Values(name, np.arange(size), attrs={"units": "pixel"}))
        for name in ("a", "b"):
            objects.create(file.id, objects.Values(name, values, ("/y", "/x")))
        objects.attach_scales(file, [("/a", ("/y", "/x")), ("/b", ("/y", "/x"))])
    with h5py.File(tmp_path / "theirs.h5", "w", track_order=True) as file:
        for name, size in (("y", 2), ("x", 3)):
            file[name] = np.arange(size)
            file[name].make_scale(name)
            file[name].attrs["units"] = "pixel"
        for name in ("a", "b"):
            file[name] = values
            for axis, scale in enumerate(("y", "x")):
                file[name].dims[axis].attach_scale(file[scale])
    with h5py.File(tmp_path / "ours.h5") as ours, h5py.File(tmp_path / "theirs.h5") as theirs:
        assert list(ours) == list(theirs)
        for name in ours:
            assert np.array_equal(ours[name], theirs[name])
            assert set(ours[name].attrs) == set(theirs[name].attrs)
            for attribute in ours[name].attrs:
                kinds = [h5py.h5a.open(file[name].id, attribute.encode()).get_type() for file in (ours, theirs)]
                assert kinds[0].equal(kinds[1]), (name, attribute)
                assert said(ours, name, attribute) == said(theirs, name, attribute)
        assert h5py.h5ds.is_attached(ours["b"].id, ours["x"].id, 1)
        with pytest.raises(RuntimeError):
            h5py.h5ds.attach_scale(ours["x"].id, ours["y"].id, 0)  # a scale has none itself


def said(file: h5py.File, name: str, attribute: str) -> Any:
    """An attribute with references as the names of what they point to."""
    value = file[name].attrs[attribute]
    if attribute == "DIMENSION_LIST":
        return [[file[reference].name for reference in one] for one in value]
    if attribute == "REFERENCE_LIST":
        return [(file[reference].name, int(axis)) for reference, axis in value]
    return value


def test_a_file_is_opened_once_for_many_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, counts = run(tmp_path, FEW), Counter[str]()
    monkeypatch.setattr(contents, "open_file", counting(counts, "opened", contents.open_file))
    with fm.open(out) as acts:
        counts.clear()
        with acts.held():
            means = [acts[name].stats.mean for name in acts.layers]
        assert counts["opened"] == 1
        counts.clear()
        assert np.array_equal(means[0], fm.open(out)[acts.layers[0]].stats.mean)
        assert counts["opened"] > 1
