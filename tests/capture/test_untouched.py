"""What a forward does to its model and to the process: undone on every way out, and not by half."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import Notes
from torch import nn
from torch.nn import functional

import fmextract as fm
from fmextract.capture import untouched
from fmextract.capture.untouched import State
from fmextract.capture.writes import Writes

Tensor = torch.Tensor


class Busy(nn.Module):
    """Does something before its layers and something after them."""

    def __init__(self, before: Callable[[Any], Any], after: Callable[[Any], Any] = lambda model: None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv, self.norm, self.tail = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten()
        self.register_buffer("average", torch.zeros(4))
        self.before, self.after = before, after
        self.handles: list[Any] = []
        self.busy, self.calls = False, 0
        self.fails = False
        self.ran: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        self.before(self)
        y = self.norm(self.conv(x))
        self.ran.append("tail")
        y = self.tail(y)
        if self.fails and x.amax() > 50:
            raise ValueError("too bright")
        self.after(self)
        return y


def hooked(model: Busy) -> None:
    model.handles.append(model.conv.register_forward_hook(lambda module, args, output: None))


def unhooked(model: Busy) -> None:
    model.handles.pop().remove()


def marked(model: Busy) -> None:
    model.busy = True


def unmarked(model: Busy) -> None:
    model.busy = False


def patched(model: Busy) -> None:
    forward = model.conv.forward
    model.conv.forward = lambda x: forward(x * 1)  # type: ignore[method-assign]


def unpatched(model: Busy) -> None:
    del model.conv.forward


class Scaled(nn.Flatten):
    factor = staticmethod(lambda: 1)


def patched_class(model: Busy) -> None:
    model.tail.__class__ = nn.Flatten
    functional.relu, model.busy = functional.gelu, functional.relu


def unpatched_class(model: Busy) -> None:
    functional.relu, model.busy = model.busy, False


def global_hook(model: Busy) -> None:
    model.handles.append(nn.modules.module.register_module_forward_hook(lambda module, args, output: None))


TIDY = {
    "hooks": (hooked, unhooked),
    "an attribute": (marked, unmarked),
    "a patched method": (patched, unpatched),
    "a patched function of torch": (patched_class, unpatched_class),
    "hooks of all modules": (global_hook, unhooked),
    "a stack": (lambda model: model.ran.append("x"), lambda model: model.ran.clear()),
    "the default type": (
        lambda model: torch.set_default_dtype(torch.float64),
        lambda model: torch.set_default_dtype(torch.float32),
    ),
}


def images(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn((3, 8, 8), generator=generator) for _ in range(count)]


def extract(model: nn.Module, out: Path, inputs: list[Tensor], notes: Any = None, **options: Any) -> None:
    chosen = {"batch_size": 2, "num_workers": 1, "device": "cpu", "precision": "fp32", **options}
    fm.extract(inputs, model, out / "x.h5", layers=["conv"], progress=notes or Notes(), **chosen).close()


def state(model: nn.Module) -> Any:
    """What can be seen from outside, without the package's own means."""
    hooks = [
        (name, key, list(value or []))
        for name, m in model.named_modules()
        for key, value in vars(m).items()
        if "hook" in key
    ]
    attributes = [(name, key) for name, m in model.named_modules() for key in vars(m)]
    tensors = (*model.named_parameters(), *model.named_buffers())
    values = [(name, id(t), t.data_ptr(), t.dtype, t.requires_grad, t.tolist()) for name, t in tensors]
    calls = (getattr(model, "calls", 0), getattr(model, "busy", False))
    process = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(), functional.relu)
    process += (torch.are_deterministic_algorithms_enabled(), torch.is_anomaly_enabled(), np.geterr())
    process += (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, list(warnings.filters))
    chance = (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate())
    return hooks, attributes, values, calls, process, chance, list(nn.modules.module._global_forward_hooks)


@pytest.mark.parametrize("name", list(TIDY))
def test_a_model_that_tidies_up_behind_itself_runs_to_its_end(name: str, tmp_path: Path) -> None:
    model, notes = Busy(*TIDY[name]).eval(), Notes()
    before = state(model)
    extract(model, tmp_path, images(12), notes)
    assert state(model) == before
    assert not model.handles
    assert "passes run to their end" in notes


def test_a_model_that_does_not_is_stopped_early(tmp_path: Path) -> None:
    ran, notes = [], Notes()
    model = Busy(lambda model: None, lambda model: ran.append(1)).eval()
    counts = []
    for count in (2, 8):
        extract(model, tmp_path, images(count), notes, overwrite=True)
        counts.append(len(ran))
    assert counts[1] == 2 * counts[0], "no pass of a run comes to its end"
    assert "passes run to their end" not in notes


def count(model: Busy) -> None:
    model.calls += 1


def move_average(model: Busy) -> None:
    model.average.mul_(0.9).add_(0.1)


def replace_average(model: Busy) -> None:
    model.average = model.average * 0.9 + 0.1


def learn(model: Busy) -> None:
    with torch.no_grad():
        model.conv.weight.add_(1e-7)


def train_norm(model: Busy) -> None:
    model.norm.momentum = 1e-9
    model.norm.training = True


def draw(model: Busy) -> None:
    torch.rand(3), np.random.rand(3), random.random()


def enable(model: Busy) -> None:
    torch.set_grad_enabled(True)


def add_child(model: Busy) -> None:
    model.extra = nn.Flatten()


def move(model: Busy) -> None:
    model.conv.weight.data = model.conv.weight.data.clone()


def settle(model: Busy) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = torch.backends.cudnn.deterministic = True
    torch.autograd.set_detect_anomaly(True)
    np.seterr(all="raise")
    warnings.simplefilter("ignore")


DOES: dict[str, Callable[[Busy], Any]] = {
    "counts": count,
    "keeps an average": move_average,
    "replaces an average": replace_average,
    "writes a parameter": learn,
    "draws": draw,
    "enables gradients": enable,
    "makes children": add_child,
    "hooks for good": hooked,
    "attributes": lambda model: setattr(model, "last", torch.zeros(3)),
    "a default type for good": lambda model: torch.set_default_dtype(torch.float32),
    "moves a parameter": move,
    "halves a parameter and back": lambda model: model.conv.half().float(),
    "freezes": lambda model: model.requires_grad_(False),
    "settings of the process": settle,
}


@pytest.mark.parametrize("ending", ["done", "an image fails", "a layer is refused", "interrupted"])
@pytest.mark.parametrize("name", list(DOES))
def test_what_a_forward_does_is_undone_on_every_way_out(name: str, ending: str, tmp_path: Path) -> None:
    model = Busy(DOES[name]).eval()
    model.fails = ending == "an image fails"
    inputs = images(6)
    inputs[1] = inputs[1] + 100
    before = state(model)

    class Interrupting(Notes):
        def advance(self, images: int, failed: int) -> None:
            raise KeyboardInterrupt

    notes = Interrupting() if ending == "interrupted" else Notes()
    layers = ["conv", "nothing"] if ending == "a layer is refused" else ["conv", "tail"]
    with contextlib.suppress(KeyboardInterrupt, fm.LayerError):
        fm.extract(
            inputs, model, tmp_path / "x.h5", layers=layers, progress=notes, device="cpu", batch_size=2, num_workers=1
        ).close()
    assert state(model) == before


def teeter(model: Busy) -> None:
    """Every second pass undoes what the one before did."""
    model.calls += 1
    model.conv.weight.data.add_(0.25 if model.calls % 2 else -0.25)


@pytest.mark.parametrize("small", [0, 1 << 20], ids=["as a large model", "as a small one"])
@pytest.mark.parametrize("does", [learn, teeter])
def test_parameters_of_small_and_large_models(
    does: Callable[[Busy], Any], small: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(untouched, "_SMALL", small)
    model = Busy(does).eval()
    before = state(model)
    with contextlib.suppress(fm.LayerError):
        extract(model, tmp_path, images(3))
    assert state(model) == before


def test_what_has_not_changed_is_not_written() -> None:
    model = Busy(lambda model: None)
    found = State(model)
    with found.guarded():
        model.conv.bias.data.add_(1)
    writes: list[int] = []
    with Writes(lambda tensor: writes.append(tensor.data_ptr())):
        found.restore()
    assert model.conv.bias.data_ptr() in writes
    assert model.conv.weight.data_ptr() not in writes


def test_a_norm_that_a_forward_trains(tmp_path: Path) -> None:
    model = Busy(lambda model: model.norm.train()).eval()
    before = state(model)
    extract(model, tmp_path, images(4))
    assert state(model) == before


def test_a_state_says_what_has_changed() -> None:
    model = Busy(lambda model: None)
    found = State(model)
    chance = found.changed()
    model.busy, model.norm.eps = True, 1e-3
    model.average.add_(1)
    hooked(model)
    changed = found.changed() - chance
    assert {("(model)", "busy"), ("norm", "eps"), ("average", "values")} < changed
    found.restore()
    assert found.changed() == chance | {("(model)", "[handles]")}, "a list of the model's own is its own affair"
