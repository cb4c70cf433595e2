"""Writes that leave no trace: seen in the probe by all values and all operations, else by running again with clones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import Notes
from torch import nn

import fmextract as fm
from fmextract.capture import writes
from fmextract.verification import verify

Tensor = torch.Tensor


class Writing(nn.Module):
    """A convolution whose output something writes to, then a layer that keeps passes from ending before."""

    def __init__(self, write: Callable[[Tensor], Any]) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.c = nn.Conv2d(3, 8, 3, padding=1)
        self.write = write
        self.end = nn.Flatten()

    def forward(self, x: Tensor) -> Any:
        y = self.c(x)
        self.write(y)
        return self.end(y)


def images(count: int, size: int = 32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn((3, size, size), generator=generator) for _ in range(count)]


def extract(model: nn.Module, out: Path, inputs: Sequence[Tensor]) -> Path:
    options = {"precision": "fp32", "batch_size": 2, "num_workers": 1, "device": "cpu", "memory_format": "contiguous"}
    fm.extract(inputs, model.eval(), out, layers=["c", "end"], progress=Notes(), **options).close()
    return out


def one_value(y: Tensor) -> None:
    y.data[:, 3, 5, 9] = 100.0


def by_numpy(y: Tensor) -> None:
    y.detach().numpy()[:, 3, 5, 9] = 100.0


def by_dlpack(y: Tensor) -> None:
    np.from_dlpack(y.detach())
    torch.from_dlpack(y.detach())[:, 3, 5, 9] = 100.0


def by_foreach(y: Tensor) -> None:
    torch._foreach_add_([y.data[:, :1, :1, :1]], 1.0)


def by_an_alias(y: Tensor) -> None:
    alias = torch.empty(0)
    alias.set_(y.untyped_storage(), y.storage_offset(), y.shape, y.stride())
    alias[:, 3, 5, 9] += 1


def swap(y: Tensor) -> None:
    y.data[..., :2] = y[..., :2].flip(3)


SILENT = {
    "one value by .data": one_value,
    "one value by numpy": by_numpy,
    "one value by DLPack": by_dlpack,
    "the last value by detach": lambda y: y.detach().flatten(1)[:, -1:].mul_(2),
    "two values that change places": swap,
    "a list of tensors": by_foreach,
    "another tensor in the same memory": by_an_alias,
    "a bound that noise does not reach": lambda y: y.data.clamp_(max=25.0),
}


@pytest.mark.parametrize("name", list(SILENT))
def test_a_write_that_leaves_no_trace_is_seen_in_the_probe(name: str, tmp_path: Path) -> None:
    inputs = [image * (40 if i > 3 else 1) for i, image in enumerate(images(6))]
    model = Writing(SILENT[name])
    with torch.no_grad():
        right = model.c(torch.stack(inputs[:2])).numpy()
        last = model.c(torch.stack(inputs[4:])).numpy()
    with fm.open(extract(model, tmp_path / "x.h5", inputs)) as acts:
        assert acts["c"].attrs["copied"]
        assert np.array_equal(acts["c"][:2], right)
        assert np.array_equal(acts["c"][4:], last)


def for_one_image_only(y: Tensor) -> None:
    if y.amax() > 20:
        y.numpy()[:, 3, 5, 9] = 100.0


def test_what_only_some_image_does_is_found_by_running_again(tmp_path: Path) -> None:
    inputs = images(6)
    inputs[1] *= 100
    model = Writing(for_one_image_only)
    out = extract(model, tmp_path / "x.h5", inputs)
    with fm.open(out) as acts:
        assert not acts["c"].attrs["copied"], "the probe has seen nothing of it"
    report = verify(out, rerun=len(inputs), model=model, source=inputs)
    told = [str(problem) for problem in report.problems]
    assert told
    assert all(", layer c, " in problem for problem in told), "the layer that was overwritten, and no other"


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int16, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 3, 4, 5), (1030, 1025)])
def test_a_digest_tells_any_changed_value(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.rand(shape) * 100).to(dtype)
    before, copy = writes.digest(tensor), tensor.clone()
    flat = tensor.view(-1)
    for place in {0, len(flat) // 2, len(flat) - 1}:
        was = flat[place].clone()
        flat[place] = not was if dtype == torch.bool else was + 1
        assert writes.digest(tensor) != before
        flat[place] = was
    assert writes.digest(tensor) == before == writes.digest(copy)


def test_the_digest_of_a_small_tensor_is_exact() -> None:
    values = torch.arange(64, dtype=torch.float64).view(4, 16)
    assert writes.digest(values) == values.numpy().tobytes(), "no two of them share one"
    assert writes.digest(-torch.zeros(3)) != writes.digest(torch.zeros(3)), "by their bits"


def test_a_digest_is_of_any_layout_of_memory() -> None:
    x = torch.randn(2, 6, 4, 5).to(memory_format=torch.channels_last)
    for view in (x, x[:, 1:], x[..., ::2], x.transpose(1, 3), x[:0], x[:, :1].expand(-1, 7, -1, -1)):
        before = writes.digest(view)
        assert before == writes.digest(view)
        if view.numel():
            x[-1, 1, 1, 0] += 1
            x[-1, 0, 1, 0] += 1
            assert before != writes.digest(view)


def test_a_digest_is_of_values_whose_sign_is_turned_when_they_are_read() -> None:
    imaginary = torch.randn(4, 6, dtype=torch.cfloat).conj().imag
    assert imaginary.is_neg()
    assert writes.digest(imaginary) == writes.digest(imaginary.resolve_neg())


def test_a_layer_whose_values_are_the_imaginary_part_of_a_conjugate(tmp_path: Path) -> None:
    class Imaginary(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft2(x).conj().imag

    inputs = [torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    model = nn.Sequential(Imaginary(), nn.Flatten()).eval()
    with fm.extract(inputs, model, tmp_path / "x.h5", layers=["0"], device="cpu", precision="fp32") as acts:
        assert np.array_equal(acts["0"][...], -torch.fft.rfft2(torch.stack(inputs)).imag.numpy())
