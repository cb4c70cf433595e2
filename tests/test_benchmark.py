"""`fmextract bench`: its figures hang together, and its picture is drawn."""

from __future__ import annotations

import json
from pathlib import Path

import PIL.Image
import pytest
import torch
import torchvision
from runs import OPTIONS, Tiny, make_photos
from torch import nn

from fmextract import benchmark
from fmextract.cli import app
from fmextract.common.progress import Quiet
from fmextract.config import Config
from fmextract.errors import OutputError
from fmextract.run.prepare import prepare
from fmextract.visual.stages import draw_stages


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> benchmark.Benchmark:
    photos = make_photos(tmp_path_factory.mktemp("bench") / "photos", 8)
    return benchmark.bench(photos, Tiny(), Config.of(**OPTIONS | {"num_workers": 2}), Quiet(), repeats=1)


def test_the_limit_is_that_of_the_stages(measured: benchmark.Benchmark) -> None:
    """On a CPU the stages share the cores: the least time of an image is the sum of theirs."""
    stages = {stage.name: stage for stage in measured.stages if stage.part}
    assert list(stages) == ["decode", "forward", "statistics", "encode", "write"]
    write = stages["write"]
    assert write.core_seconds is not None
    assert write.core_seconds < 2.5 / write.images_per_second  # two threads, of which one also waits for the disk
    seconds = {name: 1 / stage.images_per_second for name, stage in stages.items()}
    seconds["write"] = write.core_seconds / 2
    assert 1 / measured.limit == pytest.approx(sum(seconds.values()))
    assert measured.share == pytest.approx(measured.end_to_end / measured.limit)
    assert measured.limiting_stage == max(seconds, key=lambda name: seconds[name])
    others = [stage.name for stage in measured.stages if not stage.part]
    assert others == ["encode: zstd", "encode: lz4", "encode: none"]
    assert measured.flop > 2 * 8 * 8 * 27
    assert measured.flop_per_second > 1e8
    assert len(measured.runs) == 1
    assert measured.machine["torch"]
    assert json.loads(json.dumps(measured.as_json()))["layers"] == ["conv", "relu", "fc"]
    for stage in measured.stages:
        assert stage.name in str(measured)
    assert repr(measured).startswith("<Benchmark: ")


def test_the_picture(measured: benchmark.Benchmark, tmp_path: Path) -> None:
    made = draw_stages(measured, tmp_path / "bench.png")
    with PIL.Image.open(made) as picture:
        assert min(picture.size) > 300
        assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 10
    with pytest.raises(OutputError, match="a picture's name ends in"):
        draw_stages(measured, tmp_path / "bench.txt")


def test_repeats_are_at_least_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["bench", "-m", "resnet18", "--repeats", "0"]) == 2
    assert "--repeats 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("network", "last", "weights"),
    [
        ("resnet18", "fc", "ResNet18_Weights"),
        ("vit_b_16", "heads.head", "ViT_B_16_Weights"),
        ("mobilenet_v3_large", "classifier.3", "MobileNet_V3_Large_Weights"),
    ],
)
def test_the_operations_of_a_forward_pass(network: str, last: str, weights: str, tmp_path: Path) -> None:
    """Against torchvision's own table, in which a multiplication and its addition are one."""
    known = getattr(torchvision.models, weights).IMAGENET1K_V1.meta["_ops"]
    photos = make_photos(tmp_path / "photos", 1)
    with prepare(photos, network, Config.of(weights="random:0", layers=[last]), Quiet()) as prepared:
        assert benchmark._flop(prepared, Quiet()) / 2e9 == pytest.approx(known, rel=0.01)


class Squeezing(nn.Module):
    """No batch of one image goes through it; `gradients`: nor does torch's counter of operations."""

    def __init__(self, gradients: bool = False) -> None:
        super().__init__()
        self.conv, self.fc, self.gradients = nn.Conv2d(3, 4, 3), nn.Linear(4, 5), gradients

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gradients:
            with torch.enable_grad():
                z = x.detach().requires_grad_()
                x = x * torch.autograd.grad(self.conv(z).pow(2).sum(), z)[0].detach()
        return self.fc(self.conv(x).mean((2, 3), keepdim=True).squeeze())


@pytest.mark.parametrize("gradients", [False, True])
def test_whatever_a_run_can_do_is_counted_or_left_out(gradients: bool, tmp_path: Path) -> None:
    notes: list[str] = []
    progress = Quiet()
    progress.note = notes.append  # type: ignore[method-assign]
    config = Config.of(**OPTIONS | {"layers": ("fc",)})
    with prepare(make_photos(tmp_path / "photos", 2), Squeezing(gradients), config, Quiet()) as prepared:
        found = benchmark._flop(prepared, progress)
    assert found == (0 if gradients else 2 * (6 * 6 * 27 * 4 + 4 * 5))
    assert [("not counted" in note) for note in notes] == [True] * gradients
