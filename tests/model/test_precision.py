"""A model lent to a run comes back as it was; fp32 is IEEE while a run lasts, and nothing stays changed afterwards."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import extract, make_photos
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fmextract.common import allocator
from fmextract.errors import ConfigError
from fmextract.model import modes, norm_fusion, precision, run_mode
from fmextract.pipeline import pipeline

CPU = torch.device("cpu")
POOLING = run_mode.Mode(pooling=True)


class Tied(nn.Module):
    """Two linear layers that share a weight, a convolution, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm2d(4)
        self.register_buffer("table", torch.arange(4.0))


def state(model: nn.Module) -> list[object]:
    """All that must be as before: identities, memory, types, strides, flags, values."""
    found: list[object] = [(name, module.training) for name, module in model.named_modules()]
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
        where = (id(tensor), tensor.data_ptr(), tensor.dtype, tensor.stride(), tensor.requires_grad, tensor.device)
        found.append((name, where, tensor.detach().clone().flatten().tolist()))
    return found


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("prepacked", [True, False])
def test_a_lent_model_comes_back_as_it_was(name: str, memory_format: str, prepacked: bool) -> None:
    model = Tied()
    model.norm.eval()  # flags that differ between modules
    before = state(model)
    replaced = prepacked and name != "fp32"
    with run_mode.RunMode(model, CPU, name, run_mode.Mode(memory_format, prepacked=prepacked)) as lent:
        assert lent is model
        assert not any(module.training for module in model.modules())
        assert model.a.weight is model.b.weight
        laid_out = memory_format == "channels_last" and not replaced
        assert model.conv.weight.is_contiguous(memory_format=torch.channels_last) is laid_out
        assert {p.dtype for p in model.parameters()} == {torch.float32}  # whoever else reads a weight gets it as it is
        assert [("forward" in vars(m)) for m in (model.conv, model.a, model.b, model.norm)] == [replaced] * 3 + [False]
    assert state(model) == before


def test_two_ready_take_turns() -> None:
    model = Tied()
    before, batch = state(model), torch.randn(2, 3, 8, 8)
    modes = (("fp32", run_mode.Mode("channels_last")), ("bf16", run_mode.Mode("channels_last", prepacked=True)))
    ready = [run_mode.RunMode(model, CPU, *mode) for mode in modes]
    made = []
    for _ in range(2):
        for way, (name, _mode) in zip(ready, modes, strict=True):
            with way as lent, precision.numerics(name, CPU):
                made.append(lent.conv(precision.to_memory_format(batch, "channels_last")))
            assert state(model) == before
    assert [m.dtype for m in made] == [torch.float32, torch.bfloat16] * 2
    assert torch.equal(made[0], made[2])
    assert torch.equal(made[1], made[3])


def interrupted_while_replaced(model: Tied) -> None:
    assert {"forward"} <= vars(model.conv).keys() & vars(model.norm).keys()
    raise KeyboardInterrupt


@pytest.mark.parametrize("prepacked", [True, False])
def test_a_lent_model_comes_back_after_an_exception(prepacked: bool) -> None:
    model = Tied()
    before = state(model)
    mode = run_mode.Mode("channels_last", (norm_fusion.Pair(model.conv, model.norm),), prepacked=prepacked)
    with pytest.raises(KeyboardInterrupt), run_mode.RunMode(model, CPU, "bf16", mode):
        interrupted_while_replaced(model)
    assert state(model) == before
    assert not any("forward" in vars(module) for module in model.modules())


class Kernels(TorchDispatchMode):
    """Notes in which layout the kernels of max pooling are called."""

    def __init__(self) -> None:
        super().__init__()
        self.channels_last: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "max_pool2d" in str(func):
            self.channels_last.append(not args[0].is_contiguous())
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("pool", [nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d(3, 1, 0, 2)])
def test_max_pooling_on_a_cpu_takes_the_fast_kernel_and_gives_the_same_bits(pool: nn.MaxPool2d) -> None:
    x = torch.randn(3, 16, 19, 21, generator=torch.Generator().manual_seed(0))
    x[:, :, ::5, ::3], x[0, 0, 4, 4], x[1, 3, 7], x[2, :, 3, 3] = 0, torch.nan, torch.inf, -torch.inf
    expected = pool(x)
    with run_mode.RunMode(pool, CPU, mode=POOLING), run_mode.RunMode(pool, CPU, mode=POOLING), Kernels() as kernels:
        made = pool(x)
        pool(x[:, :2].contiguous())  # too few channels for it to pay
        pool(x.bfloat16())  # of whose NaN that kernel makes another one
    assert kernels.channels_last == [True, False, False]
    assert made.stride() == expected.stride()
    assert torch.equal(made.view(torch.int32), expected.view(torch.int32))
    with Kernels() as kernels:
        pool(x)
    assert kernels.channels_last == [False]
    assert "forward" not in vars(pool)


class OwnPool(nn.MaxPool2d):
    """Somebody's own way of pooling."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.is_contiguous()
        return super().forward(x)


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2, return_indices=True), OwnPool(2)])
def test_other_ways_of_pooling_are_left_alone(pool: nn.MaxPool2d) -> None:
    with run_mode.RunMode(pool, CPU, mode=POOLING), Kernels() as kernels:
        pool(torch.randn(1, 16, 8, 8))
    assert kernels.channels_last == [False]


def test_casting_weights_beforehand_changes_no_value() -> None:
    """bf16 is what autocast alone would give, bit for bit: casting the weights once saves time only."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    batch = torch.randn(4, 3, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(batch)
    for mode in (run_mode.PLAIN, run_mode.Mode(prepacked=True)):
        with run_mode.RunMode(model, CPU, "bf16", mode), precision.numerics("bf16", CPU):
            torch.testing.assert_close(model(batch), expected, rtol=2**-7, atol=2**-9)


def test_numerics_are_restored() -> None:
    torch.set_float32_matmul_precision("medium")
    cudnn = torch.backends.cudnn.allow_tf32
    try:
        with precision.numerics("fp32", CPU):
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cudnn.allow_tf32
            assert not torch.is_grad_enabled()
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cudnn.allow_tf32 is cudnn
        assert torch.is_grad_enabled()
        with precision.numerics("bf16", CPU):
            assert torch.is_autocast_enabled("cpu")
        with pytest.raises(ValueError), precision.numerics("bf16", CPU):
            raise ValueError
        assert not torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_callers_autocast_does_not_reach_into_fp32() -> None:
    layer, batch = nn.Linear(4, 4), torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16), precision.numerics("fp32", CPU):
        assert layer(batch).dtype == torch.float32


@pytest.mark.parametrize(("name", "words"), [("fp16", "15 times slower"), ("tf32", "NVIDIA")])
def test_what_a_cpu_cannot_run_is_refused(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        precision.check(name, CPU)


def test_memory_format_follows_the_network() -> None:
    convolutional = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    patches = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(2), nn.Linear(4, 4))
    assert modes.formats("auto", convolutional) == ("channels_last", "contiguous")
    assert modes.formats("auto", patches) == ("contiguous",)
    assert modes.formats("contiguous", convolutional) == ("contiguous",)


KEPT = """
from pathlib import Path
from fmextract.common.allocator import give_back_freed_memory, keep_freed_memory

def held():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024

keep_freed_memory()
before = held()
blocks = [b"1" * (1 << 20) for _ in range(200)]
del blocks
kept = held() - before
give_back_freed_memory()
print(kept, held() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    found = subprocess.run([sys.executable, "-c", KEPT], check=True, capture_output=True, text=True).stdout
    kept, left = map(float, found.split())
    if allocator._of_libc("malloc_trim") is not None:  # glibc
        assert kept > 150
    assert left < 50


@pytest.mark.parametrize(("patience", "times"), [((0.0, 0.0), 5), ((1000.0, 1000.0), 1)])
def test_a_run_gives_freed_memory_back_between_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: tuple[float, float], times: int
) -> None:
    calls: list[None] = []
    monkeypatch.setattr(pipeline, "GIVING_BACK", patience)
    monkeypatch.setattr(pipeline, "give_back_freed_memory", lambda: calls.append(None))
    extract(make_photos(tmp_path / "photos", 10), tmp_path / "acts.h5", batch_size=2, shard_size=None)
    assert len(calls) == times
