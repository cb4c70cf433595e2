"""What the summary of a run counts of each layer, over all shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from torch import nn

from fmextract.reading import activations, files


class _Logarithm(nn.Module):
    """One number an image, and so no channels; not finite where the mean is negative."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((1, 2, 3)).log()


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu, self.log = nn.ReLU(), _Logarithm()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(x).sum((1, 2, 3)) + self.log(x)


def test_all_shards_are_counted_and_each_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(2, 3, 3, generator=generator) + (1 if number < 4 else -1) for number in range(12)]
    opened: list[Path] = []
    opening = files.File.__init__

    def note(self: files.File, part: files.Part) -> None:
        opened.append(part.path)
        opening(self, part)

    monkeypatch.setattr(files, "FILES_OPEN", 1)
    result = runs.extract(
        images, tmp_path / "out", model=_Model(), layers=["relu", "log"], preprocess="none", shard_size=1, batch_size=2
    )
    with activations.open(tmp_path / "out") as acts:
        shards = len(acts.files)
        assert shards > 2
        said = {layer.name: layer for layer in result.layers}
        stored = {layer["name"]: layer["bytes_stored"] for layer in acts.info()["layers"]}
        for name, layer in said.items():
            values = acts[name][:]
            assert layer.nonfinite == np.count_nonzero(~np.isfinite(values))
            assert layer.bytes_stored == stored[name] == acts[name].info()["bytes_stored"]
        assert said["log"].nonfinite == 8
        assert said["log"].sparsity is None
        assert said["relu"].sparsity == pytest.approx(np.mean(acts["relu"][:] == 0))
        monkeypatch.setattr(files.File, "__init__", note)
        acts.totals()
        assert len(opened) <= shards
