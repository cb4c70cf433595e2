"""What the probe finds wrong and goes on without, and what a run that has to stop says can be left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import Notes, Tiny, extract
from torch import nn

from fmextract.capture import probe
from fmextract.capture.resolve import found
from fmextract.capture.survey import survey
from fmextract.errors import CaptureError

Tensor = torch.Tensor
PHOTOS = [np.random.default_rng(row).integers(0, 256, (8, 8, 3), np.uint8) for row in range(6)]
WHITE = np.full((8, 8, 3), 255, np.uint8)


class NotOne(Tiny):
    """Fails on a batch of one, for a reason that has nothing to do with its size."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 1:
            raise KeyError("a bug of one image")
        return super().forward(x)


class NotWhite(Tiny):
    """Fails on an image that is all white."""

    def forward(self, x: Tensor) -> Tensor:
        if (x == 1).flatten(1).all(1).any():
            raise ValueError("a white image")
        return super().forward(x)


def test_a_model_that_fails_on_one_image_is_told(tmp_path: Path) -> None:
    notes = Notes()
    result = extract(PHOTOS, tmp_path / "x.h5", model=NotOne(), notes=notes)
    assert result.failed == 0
    assert "the model fails on a batch of one image, which is run twice side by side: KeyError: 'a bug of one" in notes
    extract(PHOTOS, tmp_path / "y.h5", notes=(notes := Notes()))
    assert "fails on" not in notes


def test_a_model_that_fails_on_images_of_the_source_is_told(tmp_path: Path) -> None:
    notes = Notes()
    result = extract([WHITE, *PHOTOS], tmp_path / "x.h5", model=NotWhite(), notes=notes)
    assert [key for key, _ in result.failures] == ["000000"]
    assert "the model fails on images of the source, so that its layers were looked at with noise alone" in notes
    assert "ValueError: a white image (in the model itself, NotWhite" in notes
    extract(PHOTOS, tmp_path / "y.h5", model=NotWhite(), notes=(notes := Notes()))
    assert "fails on" not in notes


class Dead(nn.Module):
    """Its layer is zero for every image but one, and it fails on any image that is not like noise."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.function = nn.Identity(), function

    def forward(self, x: Tensor) -> Tensor:
        if (x.abs().amax((1, 2, 3)) > 20).any():
            raise ValueError("too bright")
        made: Tensor = self.inner(self.function(0 * x))
        return made


@pytest.mark.parametrize("twice", [False, True])
def test_looks_that_failed_are_not_called_looks(twice: bool) -> None:
    model = Dead(lambda x: torch.cat([x, x]) if twice else x)
    noise = torch.randn((2, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    wanted, errors = found(["inner"], survey(model, model, noise))
    assert not errors
    told: list[str] = []
    probed, refused = probe.probe(model, model, wanted, (3, 8, 8), torch.device("cpu"), tell=told.append)
    (said,) = [one.why for one in refused] if twice else told
    assert "the same for every image that was tried" in said
    assert "looks at others failed, the first with ValueError: too bright" in said
    assert len(probed) == (not twice)


class Experts(nn.Module):
    """Each image goes through one of two experts, as the routing of a mixture has it; the second is for few alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Identity()
        self.experts = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(2))
        self.head = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        best = (self.stem(x)[:, 0, 0, 0] == 7).long()
        made = torch.empty_like(x)
        for number, expert in enumerate(self.experts):
            mine = best == number
            if mine.any():
                made[mine] = expert(x[mine])
        result: Tensor = self.head(made)
        return result


@pytest.mark.parametrize("rows", [[8, 9, 10, 11], [9]])
def test_an_expert_that_only_some_images_go_through_can_be_left_out(rows: list[int], tmp_path: Path) -> None:
    images = [torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(row)) for row in range(12)]
    for row in rows:
        images[row][0, 0, 0] = 7
    what = "'experts.0' was called 0 times" if len(rows) == 4 else "'experts.0': axis 0 is 3 long"
    advice = "Leave out 'experts.0': name the other 2 layers by -l, with --overwrite or another -o"
    with pytest.raises(CaptureError, match=f"{what}.*{advice}"):
        extract(images, tmp_path / "x.h5", model=Experts().eval(), layers=["stem", "experts.0", "head"])
    assert extract(images, tmp_path / "y.h5", model=Experts().eval(), layers=["stem", "head"]).failed == 0


class NotBlack(Tiny):
    """Fails on an image that is all of one value, as what a pass over nothing but zeros has."""

    def forward(self, x: Tensor) -> Tensor:
        if (x.flatten(1).std(1) == 0).any():
            raise ValueError("a blank image")
        return super().forward(x)


def test_a_model_that_fails_on_black_images_alone_is_run(tmp_path: Path) -> None:
    """No image of the source is black: receptive fields, which need no values, are found with noise."""
    assert extract(PHOTOS[:4], tmp_path / "x.h5", model=NotBlack()).failed == 0
