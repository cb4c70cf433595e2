"""What `auto` chooses, and that it says why: precision by the measured error, batch size by time and memory."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fmextract.capture import probe, resolve, survey
from fmextract.common import system
from fmextract.errors import ConfigError, LayerError
from fmextract.model import modes, precision, run_mode
from fmextract.run import autotune

CPU = torch.device("cpu")
SHAPE = (3, 8, 8)


def question(model: nn.Module, layers: Sequence[str] = ("*",), **changes: Any) -> autotune.Question:
    """`auto` for everything but the memory format, over every leaf of `model`, a thousand images to come."""
    batch = torch.randn(2, *SHAPE)
    with run_mode.RunMode(model, CPU), precision.numerics("fp32", CPU):
        seen = survey.survey(model, model, batch)
        probed, refused = probe.probe(model, model, resolve.resolve(layers, seen), SHAPE, CPU)
    assert not refused
    given: dict[str, Any] = {
        "subject": modes.Subject(model, model, CPU, probed, [None] * len(probed), None),
        "inputs": inputs,
        "precision": "auto",
        "max_error": 0.02,
        "memory_format": "contiguous",
        "batch_size": None,
        "compile": False,
        "rows": 1000,
    }
    return autotune.Question(**{**given, **changes})


def inputs(n: int) -> torch.Tensor:
    return torch.randn((n, *SHAPE), generator=torch.Generator().manual_seed(n))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 10)).eval()


Clock = Callable[[modes.Trial, int], float]
"""Seconds of a pass over so many images."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Clock], list[tuple[str, int]]]:
    """Pretend that passes take so long; gives the precision and images of each that is timed."""

    def pretend(seconds: Clock) -> list[tuple[str, int]]:
        timed_passes: list[tuple[str, int]] = []

        def timed(asked: autotune.Question, trial: modes.Trial, batch: torch.Tensor) -> float:
            timed_passes.append((trial.precision, len(batch)))
            return seconds(trial, len(batch))

        monkeypatch.setattr(autotune, "_timed", timed)
        return timed_passes

    monkeypatch.setattr(autotune, "_is_fast", lambda name, device: name == "bf16")
    return pretend


@pytest.fixture
def times(clock: Any) -> Callable[[dict[str, float]], list[tuple[str, int]]]:
    """Pretend that passes take so many seconds an image in each precision."""
    return lambda seconds: clock(lambda trial, images: seconds[trial.precision] * images)


def test_the_faster_precision_is_taken_while_its_error_allows(times: Any) -> None:
    times({"fp32": 0.01, "bf16": 0.003})
    chosen = autotune.tune(question(network(), batch_size=4))
    assert chosen.precision == "bf16"
    assert "bf16 is 3.3 times as fast" in chosen.notes[0]
    strict = autotune.tune(question(network(), batch_size=4, max_error=1e-5))
    assert strict.precision == "fp32"
    assert "too much" in strict.notes[0]


def test_a_precision_that_is_not_faster_is_not_taken(times: Any) -> None:
    times({"fp32": 0.01, "bf16": 0.0098})
    chosen = autotune.tune(question(network(), batch_size=4))
    assert chosen.precision == "fp32"
    assert "a tie" in chosen.notes[0]


def test_a_machine_that_is_busy_at_times_changes_nothing(clock: Any) -> None:
    """What takes turns is slowed down together; where it is not, the measurement is not to be believed."""
    load = iter([1, 1, 9, 9, 2, 2])  # of fp32 and bf16 in each round
    clock(lambda trial, images: next(load) * images * (0.3 if trial.precision == "bf16" else 1))
    chosen = autotune.tune(question(network(), batch_size=4))
    assert chosen.precision == "bf16"
    assert "bf16 is 3.3 times as fast" in chosen.notes[0]
    load = iter([1, 1, 1, 9, 1, 1])
    clock(lambda trial, images: next(load) * images * (0.3 if trial.precision == "bf16" else 1))
    chosen = autotune.tune(question(network(), batch_size=4))
    assert chosen.precision == "fp32"
    assert "bf16 is 0.4 to 3.3 times as fast" in chosen.notes[0]
    assert "too short a measurement to be sure" in chosen.notes[0]


@pytest.mark.parametrize(("gain", "taken"), [(1.3, "fp32"), (1.8, "bf16")])
def test_a_short_measurement_has_to_show_more(gain: float, taken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "_is_fast", lambda name, device: name == "bf16")
    real = modes.run

    def run(subject: modes.Subject, name: str, *rest: Any) -> Any:
        return len(rest[1]) * (1.0 if name == "fp32" else 1 / gain), real(subject, name, *rest)[1]

    monkeypatch.setattr(modes, "run", run)
    chosen = autotune.tune(question(network(), batch_size=4, rows=12))
    assert chosen.precision == taken
    assert ("too short" in chosen.notes[0]) is (taken == "fp32")


def test_errors_are_those_of_autocast_against_fp32(times: Any) -> None:
    times({"fp32": 0.01, "bf16": 0.001})
    model = network()
    asked = question(model, batch_size=4)
    chosen = autotune.tune(asked)
    batch = inputs(autotune._sample_size(asked))
    with torch.no_grad():
        exact = model[0](batch).double()
        with torch.autocast("cpu", torch.bfloat16):
            rough = model[0](batch).double()
    expected = float((rough - exact).norm() / exact.norm())
    assert chosen.rel_errors[0] == pytest.approx(expected, rel=1e-6)
    assert 1e-4 < expected < 1e-2
    assert chosen.sample[0].dtype == torch.bfloat16


def test_fp16_is_never_tried_on_a_cpu() -> None:
    asked = question(network())
    assert "fp16" not in autotune._candidates(asked)
    with pytest.raises(ConfigError, match="15 times slower"):
        autotune.tune(question(network(), precision="fp16"))


class Loud(nn.Module):
    """Values beyond the range of float16."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Conv2d(3, 4, 1)
        with torch.no_grad():
            self.scale.weight.fill_(1e6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.scale(x)
        return made


def test_a_precision_that_overflows_is_not_taken(times: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    times({"fp32": 0.01, "fp16": 0.001})
    monkeypatch.setattr(autotune, "_is_fast", lambda name, device: name == "fp16")
    chosen = autotune.tune(question(Loud().eval(), batch_size=2))
    assert chosen.precision == "fp32"
    assert "overflows" in chosen.notes[0] or "too much" in chosen.notes[0]


def test_a_given_precision_is_kept_and_its_error_told() -> None:
    chosen = autotune.tune(question(network(), precision="bf16", batch_size=4))
    assert chosen.precision == "bf16"
    assert chosen.rel_errors[0] is not None
    assert 0 < chosen.rel_errors[0] < 0.05
    assert "median error" in chosen.notes[0]


def test_batch_size_is_the_fastest_of_those_measured(clock: Any) -> None:
    per_image = {8: 0.010, 16: 0.006, 32: 0.009}
    clock(lambda trial, images: per_image.get(images, 0.01) * images)
    chosen = autotune.tune(question(network(), precision="fp32", rows=100_000))
    assert chosen.batch_size == 16
    assert chosen.seconds_per_image == 0.006
    assert "batch size 16 (auto; 8: 100.0/s, 16: 166.7/s, 32: 111.1/s)" in chosen.notes


def test_a_batch_size_that_is_hardly_faster_is_not_taken(clock: Any) -> None:
    clock(lambda trial, images: images * (0.0095 if images == 16 else 0.01))
    assert autotune.tune(question(network(), precision="fp32", rows=100_000)).batch_size == 8


def test_batch_sizes_take_turns_with_the_usual_one(clock: Any) -> None:
    """A machine that gets busy with every pass, so that each is slower than the one before."""
    load = [1.0]

    def slower(trial: modes.Trial, images: int) -> float:
        load[0] *= 1.05
        return load[0] * images * {8: 1.0, 16: 0.5}.get(images, 0.6)

    timed = clock(slower)
    chosen = autotune.tune(question(network(), precision="fp32", rows=10_000_000))
    assert chosen.batch_size == 16
    assert [images for _, images in timed][-12:-6] == [8, 16] * 3


@pytest.mark.parametrize(("name", "images"), [("fp32", 8), ("bf16", 16)])
def test_a_short_run_takes_as_many_images_as_take_the_same_memory(name: str, images: int) -> None:
    assert autotune.tune(question(network(), precision=name, rows=20)).batch_size == images


def test_measuring_stops_at_a_tenth_of_the_run(clock: Any) -> None:
    timed = clock(lambda trial, images: 1.0)
    chosen = autotune.tune(question(network(), precision="fp32", rows=20))
    assert timed == [], "20 images pay for the sample alone"
    assert chosen.batch_size == 8


def test_running_out_of_memory_ends_the_search(clock: Any) -> None:
    def seconds(trial: modes.Trial, images: int) -> float:
        if images > 16:
            raise torch.OutOfMemoryError
        return 0.01 * images / (1 + images)

    clock(seconds)
    chosen = autotune.tune(question(network(), precision="fp32", rows=100_000))
    assert chosen.batch_size == 16
    assert any(note.startswith("batch size 16 (auto; 8: ") and "32: not enough memory" in note for note in chosen.notes)


def trial_of(*shape: int) -> modes.Trial:
    way = run_mode.RunMode(nn.Identity(), CPU, "fp32", run_mode.PLAIN)
    return modes.Trial("fp32", run_mode.PLAIN, way, frozenset(), (torch.zeros(*shape),), 1e-3)


def test_where_not_even_the_usual_batch_fits_this_is_said(clock: Any) -> None:
    def seconds(trial: modes.Trial, images: int) -> float:
        if images == 8:
            raise torch.OutOfMemoryError
        return 0.01 * images

    clock(seconds)
    asked = question(network(), precision="fp32", rows=100_000)
    size, _, note = autotune._batch_size(asked, trial_of(8, 4), 1e-3, inputs(8), time.perf_counter())
    assert (size, note) == (8, "batch size 8 (auto; 8: not enough memory)")


def test_a_batch_fits_into_the_memory_for_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "IN_FLIGHT_BYTES", 3 * 5 * 4 * (16 * 36 * 2 + 16 * 16 * 2 + 10))
    chosen = autotune.tune(question(network(), precision="fp32", rows=10))
    assert chosen.batch_size == 4  # five images would fit; a batch begins as a power of two


class OnAccelerator:
    """A stand-in for a device, on which a pass takes `start` seconds and `image` more for each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, start: float, image: float) -> None:
        self.seconds, self.sizes = (start, image), []
        monkeypatch.setattr(autotune, "_timed", self.timed)

    def timed(self, asked: autotune.Question, trial: modes.Trial, batch: torch.Tensor) -> float:
        self.sizes.append(len(batch))
        return self.seconds[0] + self.seconds[1] * len(batch)

    def chosen(self, rows: int, of_an_image: int) -> int:
        asked = question(network(), precision="fp32", rows=rows)
        asked = replace(asked, subject=replace(asked.subject, device=torch.device("cuda", 0)))
        return autotune._batch_size(asked, trial_of(8, of_an_image), 1e-3, inputs(8), time.perf_counter())[0]


def test_an_accelerator_takes_many_images_even_in_a_short_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch costs some hundred calls whatever its size."""
    device = OnAccelerator(monkeypatch, start=5e-3, image=1e-5)
    assert device.chosen(rows=2000, of_an_image=10) == 512
    assert list(dict.fromkeys(device.sizes)) == [64, 128, 256, 512]
    monkeypatch.setattr(autotune, "host_memory", lambda: 8 << 30)  # of which an eighth is 1 GiB, for three batches
    assert device.chosen(rows=2000, of_an_image=(1 << 20) // 4) == 256
    assert device.chosen(rows=100, of_an_image=10) == 64


def test_a_container_s_memory_is_the_host_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "CONTAINER_LIMIT", tmp_path / "memory.max")
    whole = system.host_memory()
    assert whole == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for written, memory in (("max\n", whole), (f"{1 << 30}\n", 1 << 30), (f"{1 << 60}\n", whole)):
        (tmp_path / "memory.max").write_text(written)
        assert system.host_memory() == memory


def test_of_sizes_that_are_as_fast_an_accelerator_takes_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    assert OnAccelerator(monkeypatch, start=0.0, image=1e-5).chosen(rows=2000, of_an_image=10) == 512


class OnlyFull(nn.Module):
    """Works in float32 alone, as operations without a half-precision kernel do."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.scale(x)
        if made.dtype != torch.float32:
            raise RuntimeError(f"not implemented for {made.dtype}")
        return made


def test_a_precision_that_the_model_fails_in_is_passed_over_or_refused(times: Any) -> None:
    times({"fp32": 0.01, "bf16": 0.001})
    chosen = autotune.tune(question(OnlyFull().eval(), batch_size=2))
    assert chosen.precision == "fp32"
    assert "fails in it" in chosen.notes[0]
    assert "not implemented for torch.bfloat16" in chosen.notes[0]
    with pytest.raises(ConfigError, match=r"bf16: the model fails in it.*--precision fp32"):
        autotune.tune(question(OnlyFull().eval(), precision="bf16", batch_size=2))


class Small(nn.Module):
    """Fails on more than three images, whatever they show."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > 3:
            raise ValueError("three are enough")
        made: torch.Tensor = self.scale(x)
        return made


def test_a_model_that_always_fails_is_refused_in_its_own_words() -> None:
    with pytest.raises(LayerError, match="fails on a batch of 8 images: ValueError: three are enough"):
        autotune.tune(question(Small().eval(), precision="fp32"))


class Tight(nn.Module):
    """Has no memory for the second pass over eight images: that of another memory format."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Conv2d(3, 4, 1)
        self.passes: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes.append(len(x))
        if len(x) == 8 and self.passes.count(8) == 2:
            raise torch.OutOfMemoryError("too much")
        return self.scale(x)  # type: ignore[no-any-return]


def test_other_ways_are_tried_on_fewer_images_where_memory_is_short() -> None:
    model = Tight().eval()
    asked = question(model, precision="fp32", batch_size=1, memory_format="channels_last")
    model.passes.clear()
    chosen = autotune.tune(asked)
    assert chosen.mode == run_mode.Mode("channels_last")
    assert model.passes[:4] == [8, 8, 1, 1]
    assert [len(tensor) for tensor in chosen.sample] == [1]
    assert any("measured on one image: there is not enough memory for 8" in note for note in chosen.notes)


class Dark(nn.Module):
    """Fails on a large batch that is not black, and notes whether what that pass made is in memory at the next."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Conv2d(3, 4, 1)
        self.failed: weakref.ref[torch.Tensor] | None = None
        self.kept: list[bool] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.failed is not None:
            self.kept.append(self.failed() is not None)
        made: torch.Tensor = self.scale(x)
        if len(x) > 3 and x.any():
            self.failed = weakref.ref(made)
            raise ValueError("too bright")
        return made


def test_a_failed_pass_gives_its_memory_back_before_the_next_one() -> None:
    model = Dark().eval()
    chosen = autotune.tune(question(model, precision="fp32", batch_size=8))
    assert any("measured on black images" in note and "too bright" in note for note in chosen.notes)
    assert model.kept
    assert not any(model.kept)
