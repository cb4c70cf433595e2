"""What decides the values of a network beside its weights is told, and nothing else; alike in every process."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from fmextract.common.facts import CHANGES, settled
from fmextract.model.structure import structure

SCALE = 1.0
SETTINGS = types.SimpleNamespace(scale=1.0)


def scaled(x: torch.Tensor, by: float = 2.0) -> torch.Tensor:
    return x * by * SCALE


def shifted(x: torch.Tensor) -> torch.Tensor:
    return x + 2


class Net(nn.Module):
    """A network with one of everything that can decide a value."""

    limit = 6.0

    def __init__(self, alpha: float = 0.5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.act: nn.Module = nn.ReLU()
        self.alpha = alpha
        self.finish: Callable[[torch.Tensor], torch.Tensor] = scaled
        self.log_dir = "runs/1"
        self.mask = torch.ones(4, 1, 1)
        self.register_buffer("window", torch.ones(4, 1, 1), persistent=False)
        self.blocks = [functools.partial(scaled, by=2.0), functools.partial(scaled, by=3.0)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.conv(x)) * self.alpha * self.window * self.mask
        return self.finish(self.blocks[1](y)).clamp(max=self.limit) * SETTINGS.scale * self._gain()

    def _gain(self) -> float:
        return 1.0

    def training_step(self, x: torch.Tensor) -> torch.Tensor:
        return self(x) * 2


def _patched(module: nn.Module) -> None:
    module.forward = types.MethodType(lambda self, x: torch.tanh(x), module)  # type: ignore[method-assign]


def _hooked(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))


class Halved(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


CHANGED: dict[str, tuple[Callable[[Net], Any], str]] = {
    "another activation": (lambda net: setattr(net, "act", nn.Tanh()), "modules"),
    "a setting of a library's module": (lambda net: setattr(net.conv, "stride", (2, 2)), "settings of Conv2d"),
    "a flag": (lambda net: setattr(net, "alpha", 0.7), "Net.alpha"),
    "a function that is an attribute": (lambda net: setattr(net, "finish", shifted), "shifted"),
    "a tensor that is no buffer": (lambda net: net.mask.data.fill_(2.0), "Net.mask"),
    "a buffer that is not saved": (lambda net: net.window.data.fill_(2.0), "Net.window"),
    "the order of functions": (lambda net: net.blocks.reverse(), "Net.blocks"),
    "a patched forward": (lambda net: _patched(net.act), "settings of ReLU"),
    "a hook": (lambda net: _hooked(net.conv), "forward hook 0 of conv"),
    "a class attribute": (lambda net: setattr(Net, "limit", 3.0), "class Net.limit"),
    "a method that forward calls": (lambda net: setattr(Net, "_gain", lambda self: 2.0), "<lambda>"),
    "a global": (lambda net: globals().update(SCALE=2.0), "SCALE"),
    "an attribute of a global": (lambda net: setattr(SETTINGS, "scale", 2.0), "SETTINGS"),
    "a default": (lambda net: setattr(scaled, "__defaults__", (9.0,)), "scaled(by=)"),
    "the forward of a library": (lambda net: setattr(nn.ReLU, "forward", lambda self, x: x), "<lambda>"),
    "a parametrization": (lambda net: parametrize.register_parametrization(net.conv, "weight", Halved()), "modules"),
}


@pytest.fixture
def unharmed() -> Any:
    before = Net.limit, Net._gain, SCALE, scaled.__defaults__, nn.ReLU.forward
    yield
    Net.limit, Net._gain, globals()["SCALE"], scaled.__defaults__, nn.ReLU.forward = before  # type: ignore[method-assign]
    SETTINGS.scale = 1.0


@pytest.mark.parametrize("what", CHANGED)
def test_what_decides_values_is_told(what: str, unharmed: Any) -> None:
    change, name = CHANGED[what]
    net = Net()
    before = structure(net).facts
    change(net)
    now = structure(net).facts
    assert before.get(name) != now.get(name), sorted(now)


@pytest.mark.parametrize(
    "change",
    [
        lambda net: setattr(net, "log_dir", "runs/2"),
        lambda net: setattr(Net, "training_step", lambda self, x: None),
        lambda net: net.train(),
        lambda net: net.requires_grad_(False),
    ],
)
def test_what_no_forward_uses_is_not_told(change: Callable[[Net], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Net, "training_step", Net.training_step)
    net = Net()
    before = structure(net)
    change(net)
    assert structure(net) == before


def test_parametrizations_are_told_by_their_code() -> None:
    told = []
    for kind in (Halved, Doubled):
        conv = nn.Conv2d(3, 4, 3)
        parametrize.register_parametrization(conv, "weight", kind())
        told.append(structure(conv).facts)
    assert told[0]["modules"] != told[1]["modules"]
    assert "Halved.forward" in told[0]


def test_readable_facts() -> None:
    facts = structure(Net()).facts
    assert facts["modules"] == {"Conv2d": 1, "Net": 1, "ReLU": 1}
    assert (facts["Net.alpha"], facts["SCALE"], facts["class Net.limit"]) == (0.5, 1.0, 6.0)
    json.dumps(facts, allow_nan=False)


def test_state_that_a_pass_changes_is_told_as_such() -> None:
    class Counting(Net):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return super().forward(x)

    net = Counting()
    before = structure(net).facts
    net(torch.zeros(1, 3, 8, 8))
    facts = settled(before, structure(net).facts)
    assert facts["Counting.calls"] == CHANGES
    assert facts["Counting.alpha"] == 0.5


def test_what_cannot_be_told_is_named(tmp_path: Path) -> None:
    net = Net()
    with (tmp_path / "table").open("w+b") as file:
        net.finish = lambda x: x * file.tell()
        (named,) = structure(net).unknown
        assert "file" in named
        assert "BufferedRandom" in named


SCRIPT = '''
import json, sys, types
import numpy as np
import torch
from torch import nn
from fmextract.model.structure import structure
{comment}
LEVELS = {{"a", "bb", "ccc", "dddd", "eeeee"}}
TABLE = {{name: name * 2 for name in LEVELS}}
def build():
    class Net(nn.Module):
        """{doc}"""
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.levels = set(LEVELS)
            self.f = lambda x: x + len(TABLE)  # {doc}
            self.weights = [np.arange(4.0), torch.arange(3)]
            self.conv.register_forward_hook(lambda m, i, o: o if len(TABLE) else None)
        def forward(self, x):
            """{doc}"""
            {comment}
            return self.f(self.conv(x)) if "a" in self.levels else self.weights[0]
    return Net()
print(json.dumps(structure(build()).facts, sort_keys=True))
'''


def test_another_process_and_another_comment_change_nothing(tmp_path: Path) -> None:
    said = set()
    for seed, comment, name in (("1", "pass", "one"), ("2", "pass  # said otherwise\n", "other"), ("3", "pass", "one")):
        script = tmp_path / f"{name}{seed}.py"
        script.write_text(SCRIPT.format(comment=comment, doc=f"of {name}"))
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        ended = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
        said.add(ended.stdout)
    assert len(said) == 1
    assert '"TABLE"' in said.pop()


def test_content_of_data_is_told() -> None:
    from PIL import Image

    from fmextract.common.facts import Facts

    def digest(value: Any) -> str:
        return Facts().digest("x", value)

    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    equal: list[tuple[Any, Any]] = [
        (pixels, pixels[::-1][::-1]),
        (torch.from_numpy(pixels), torch.from_numpy(pixels).clone()),
        (Image.fromarray(pixels), Image.fromarray(pixels)),
        ({"a": 1, "b": [2.0]}, {"b": [2.0], "a": 1}),
        ([(str(i), i) for i in range(200)], [(str(i), i) for i in range(200)]),
        (b"12", b"12"),
        (torch.zeros(2, 2).to_sparse(), torch.zeros(2, 2).to_sparse()),
    ]
    for one, other in equal:
        assert digest(one) == digest(other)
    changed = pixels.copy()
    changed[1, 2, 0] += 1
    different = [
        pixels,
        changed,
        pixels.reshape(4, 12),
        pixels.astype(np.int64),
        [pixels],
        (pixels,),
        Image.fromarray(pixels),
        Image.fromarray(changed),
        torch.from_numpy(pixels),
        torch.from_numpy(changed).to(torch.bfloat16),
        b"12",
        "12",
        ["1", "2"],
        ["12"],
        12,
        12.0,
        True,
        None,
        float("nan"),
    ]
    assert len({digest(value) for value in different}) == len(different)


def test_parts_of_a_dataset_are_told_apart_from_what_they_count() -> None:
    """A counter in the Dataset that a Subset is of leaves the indices told."""
    from torch.utils.data import Dataset, Subset

    from fmextract.inputs.sources import open_source

    class Counting(Dataset[np.ndarray]):
        calls = 0

        def __len__(self) -> int:
            return 4

        def __getitem__(self, row: int) -> np.ndarray:
            self.calls += 1
            return np.full((8, 8, 3), row, np.uint8)

    told = []
    for rows in ([0, 1], [0, 1], [1, 2]):
        source = open_source(Subset(Counting(), rows))
        source.load(0)
        told.append(source.fingerprint())
    assert told[0]["code"] == told[1]["code"]
    assert told[0]["code"]["settings of Subset"] != told[2]["code"]["settings of Subset"]
    assert told[0]["not_covered"] == [f"Counting.calls ({CHANGES})"]
