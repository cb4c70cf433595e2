"""One call says what of a forward pass is stored: against the model's own layers."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from fmextract.capture import inspection
from fmextract.capture.untouched import untouched
from fmextract.errors import LayerError


class Model(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))


def inspected(model: nn.Module, layers: Sequence[str]) -> inspection.Inspection:
    photos = torch.rand(4, 3, 8, 8)
    with untouched(model.eval()) as state, torch.no_grad():
        return inspection.inspect(model, model, layers, (3, 8, 8), torch.device("cpu"), lambda n: photos[:n], state)


def test_layers_reducers_fields_and_the_end_of_a_pass_come_together() -> None:
    model = Model()
    layers = inspected(model, ["0", "1=mean"])
    with torch.no_grad():
        conv = model[0](torch.rand(1, 3, 8, 8))
    assert [probed.tap.name for probed in layers.probed] == ["0", "1=mean"]
    assert [output.shape for output in layers.outputs] == [tuple(conv.shape[1:]), (4,)]
    assert [output.axes for output in layers.outputs] == [("channel", "y", "x"), ("feature",)]
    assert layers.fields[0] is not None
    assert tuple(layers.fields[0].size) == (3, 3)
    assert layers.stop is not None, "the linear layer is not needed"
    assert not layers.draws
    reduce = layers.reduce[1]
    assert layers.reduce[0] is None
    assert reduce is not None
    torch.testing.assert_close(reduce(conv), conv.mean((2, 3)))


def test_all_that_cannot_be_had_is_told_at_once() -> None:
    with pytest.raises(LayerError, match=r"(?s)zero.*one"):
        inspected(Model(), ["zero", "one"])
