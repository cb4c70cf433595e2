"""Whole runs on an accelerator: what is stored is what hooks give that clone on the device.

Each runs twice: on the accelerator that torch finds, and, so that the tests themselves are known to work without one,
on the CPU with the device's transfers on the simulated accelerator, whose copies arrive late.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import simulated_device
import torch
from simulated_device import installed

from fmextract.errors import DeviceLost
from fmextract.inputs import decoding, preprocessing
from fmextract.pipeline import pipeline
from fmextract.pipeline.statistics import ShardStatistics
from fmextract.pipeline.transfers import DeviceTransfers, _DeviceDownload
from fmextract.reading import activations

TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-3}  # relative L2 against a plain pass of the same precision or fp32
ROWS = 11


@pytest.fixture(
    params=[
        "simulated",
        pytest.param(
            "accelerator",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.accelerator.is_available(), reason="torch finds no accelerator here"),
            ],
        ),
    ]
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    if request.param == "accelerator":
        found = torch.accelerator.current_accelerator(check_available=True)
        assert found is not None
        yield torch.device(found.type, 0)
        return
    with installed(monkeypatch, {"copy": 0.002, "jitter": 0.002}):
        # The forward pass is the CPU's, which does not wait for an upload: here alone it is there at once.
        monkeypatch.setattr(DeviceTransfers, "upload", lambda self, buffer: buffer.clone())
        monkeypatch.setattr(pipeline, "transfers_for", lambda _, depth: DeviceTransfers(simulated_device.DEVICE, depth))
        yield torch.device("cpu")


def hooked(photos: Path, device: torch.device) -> dict[str, np.ndarray[Any, Any]]:
    """What hooks clone on the device, in fp32: the usual recipe, written without the package but for decoding."""
    network = runs.Tiny().to(device)
    preprocess = preprocessing.parse_preprocess(runs.OPTIONS["preprocess"])
    kept: dict[str, list[torch.Tensor]] = {name: [] for name in runs.LAYERS}
    for name, into in kept.items():
        network.get_submodule(name).register_forward_hook(lambda _m, _a, out, into=into: into.append(out.clone()))
    pixels = torch.stack([decoding.decode(photo.read_bytes(), preprocess).pixels for photo in sorted(photos.iterdir())])
    with torch.no_grad():
        network(preprocessing.normalise(pixels, preprocess).to(device))
    return {name: torch.cat(parts).cpu().numpy() for name, parts in kept.items()}


def off(stored: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    return float(np.linalg.norm(stored - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_what_is_stored_is_what_cloning_hooks_give(
    device: torch.device, tmp_path: Path, precision: str, memory_format: str
) -> None:
    """A ReLU in place follows the convolution, so that a hook without a clone would hold the wrong values."""
    if precision == "fp16" and device.type == "cpu":
        pytest.skip("a CPU runs no fp16")
    photos = runs.make_photos(tmp_path / "photos", ROWS)
    run = partial(
        runs.extract, photos, device=str(device), precision=precision, memory_format=memory_format, shard_size="1MiB"
    )
    run(out=tmp_path / "one.h5")
    run(out=tmp_path / "two.h5")
    runs.same(tmp_path / "one.h5", tmp_path / "two.h5")  # bit for bit, statistics included
    expected = hooked(photos, device)
    with activations.open(tmp_path / "one.h5") as acts:
        for name in runs.LAYERS:
            assert off(acts[name][:], expected[name]) < TOLERANCE[precision]


def test_statistics_and_the_strongest_images_are_those_of_what_is_stored(device: torch.device, tmp_path: Path) -> None:
    photos = runs.make_photos(tmp_path / "photos", ROWS, bad={5: b"no picture"})
    runs.extract(photos, tmp_path / "out.h5", device=str(device), max_failures=1)
    with activations.open(tmp_path / "out.h5") as acts:
        assert acts.status.tolist() == [0] * 5 + [2] + [0] * 5
        for name in runs.LAYERS:
            values = acts[name][:].astype(np.float64)
            assert np.isnan(values[5]).all()
            good = np.delete(values, 5, axis=0).swapaxes(0, 1).reshape(values.shape[1], ROWS - 1, -1)
            stats = acts[name].stats
            np.testing.assert_allclose(stats.mean, good.mean((1, 2)), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(stats.std, good.std((1, 2)), rtol=1e-5)
            np.testing.assert_array_equal(stats.max, good.max((1, 2)))
            strongest = np.delete(np.arange(ROWS), 5)[good.max(2).argmax(1)]
            np.testing.assert_array_equal(stats.top_sample[:, 0], strongest)


def test_reducers_and_an_early_stop(device: torch.device, tmp_path: Path) -> None:
    photos = runs.make_photos(tmp_path / "photos", ROWS)
    runs.extract(photos, tmp_path / "out.h5", device=str(device), layers=["conv=mean", "conv"])
    expected = hooked(photos, device)["conv"]
    with activations.open(tmp_path / "out.h5") as acts:
        assert off(acts["conv"][:], expected) < TOLERANCE["fp32"]
        assert off(acts["conv=mean"][:], expected.mean((2, 3))) < TOLERANCE["fp32"]


def test_processes_store_what_threads_store(device: torch.device, tmp_path: Path) -> None:
    photos = runs.make_photos(tmp_path / "photos", ROWS, bad={5: b"no picture"})
    for kind in ("threads", "processes"):
        runs.extract(photos, tmp_path / kind, device=str(device), worker_kind=kind, max_failures=1)
    runs.same(tmp_path / "threads", tmp_path / "processes")


def test_a_run_that_was_ended_goes_on_to_the_same_values(device: torch.device, tmp_path: Path) -> None:
    photos = runs.make_photos(tmp_path / "photos", ROWS)
    runs.extract(photos, tmp_path / "whole", device=str(device))
    runs.extract_until(8, photos, tmp_path / "ended", device=str(device))
    assert runs.extract(photos, tmp_path / "ended", device=str(device)).resumed_images >= 4
    runs.same(tmp_path / "ended", tmp_path / "whole")


class Deep(runs.Tiny):
    """Long to compute, quick to queue."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grid = torch.ones(4096, 4096, device=x.device)
        for _ in range(100):
            grid = grid @ grid * 1e-4
        return super().forward(x + 0 * grid[0, 0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="torch finds no accelerator here")
def test_the_forward_pass_is_told_to_limit_a_run_where_it_does(tmp_path: Path) -> None:
    """By the device's clock: the host only queues it."""
    where = torch.accelerator.current_accelerator(check_available=True)
    assert where is not None
    photos = runs.make_photos(tmp_path / "photos", ROWS)
    result = runs.extract(photos, tmp_path / "out.h5", model=Deep(), device=str(where), batch_size=1)
    assert result.limiting_stage == "forward"
    model, pixels = Deep().to(where), torch.zeros(1, 3, 8, 8, device=where)
    passes = []
    for _ in range(4):
        started = time.perf_counter()
        model(pixels)
        torch.accelerator.synchronize(where)
        passes.append(time.perf_counter() - started)
    assert result.stages["forward"]["busy_seconds"] > 0.5 * ROWS * min(passes)


def test_a_batch_that_does_not_fit_is_halved(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = runs.make_photos(tmp_path / "photos", ROWS)
    model = runs.Tiny()
    plain = model.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        if len(x) > 4:  # beyond what the probe asks for
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(x)

    monkeypatch.setattr(model, "forward", forward)
    runs.extract(photos, tmp_path / "out.h5", model=model, device=str(device), batch_size=8)
    expected = hooked(photos, device)
    with activations.open(tmp_path / "out.h5") as acts:
        for name in runs.LAYERS:
            assert off(acts[name][:], expected[name]) < TOLERANCE["fp32"]


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.accelerator.is_available() or not hasattr(torch.accelerator, "max_memory_allocated"),
    reason="torch finds no accelerator here whose memory it counts",
)
def test_memory_on_the_device_does_not_grow_with_the_images(tmp_path: Path) -> None:
    found = torch.accelerator.current_accelerator(check_available=True)
    peaks = []
    for batches in (4, 4, 40):  # the first warms up: libraries take memory once
        photos = runs.make_photos(tmp_path / f"photos{len(peaks)}", 4 * batches)
        torch.accelerator.reset_peak_memory_stats()
        runs.extract(photos, tmp_path / f"{len(peaks)}.h5", device=str(found), shard_size="64MiB")
        peaks.append(torch.accelerator.max_memory_allocated())
    assert peaks[2] == pytest.approx(peaks[1], rel=0.05, abs=1 << 20)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("Tried to allocate 2 GiB."), "no memory left: Tried to allocate 2 GiB. What is done"),
        (
            getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: an illegal memory access"),  # torch 2.8
            "failed: CUDA error: an illegal memory access",
        ),
        (
            RuntimeError("CUDA error: device-side assert\nCompile with …"),
            "failed: CUDA error: device-side assert. What",
        ),
    ],
)
@pytest.mark.parametrize("place", ["statistics", "download", "wait"])
def test_an_error_of_the_device_ends_a_run_that_resumes(
    device: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: RuntimeError,
    said: str,
    place: str,
) -> None:
    """Wherever it surfaces: where statistics are queued, copies are queued, or a copy is waited for."""
    photos = runs.make_photos(tmp_path / "photos", ROWS)
    owner, name = {
        "statistics": (ShardStatistics, "update"),
        "download": (DeviceTransfers, "download"),
        "wait": (_DeviceDownload, "wait"),
    }[place]
    calls, good = iter(range(100)), getattr(owner, name)

    def failing(self: Any, *args: Any) -> Any:
        if next(calls) == 1:
            raise error
        return good(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        with pytest.raises(DeviceLost, match=said):
            runs.extract(photos, tmp_path / "out.h5", device=str(device))
    assert not (tmp_path / "out.h5").exists()
    result = runs.extract(photos, tmp_path / "out.h5", device=str(device))
    assert result.images == ROWS
