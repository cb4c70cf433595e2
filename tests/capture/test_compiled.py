"""Compiled passes store what cloning hooks see in the model as it is written; what cannot be compiled is refused."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from runs import LAYERS, OPTIONS, Notes, Tiny, extract, extract_until, make_photos
from test_hooks import sweep
from torch import nn

import fmextract as fm
from fmextract.capture import compiled, hooks, probe, resolve, survey, taps
from fmextract.capture.compiled import CompiledCapture
from fmextract.cli import main
from fmextract.errors import CaptureError, ConfigError, OutputError
from fmextract.records import Status
from fmextract.verification import verify

Tensor = torch.Tensor
CPU = torch.device("cpu")
CLOSE = 1e-4  # relative L2; fused kernels round otherwise in the last bits


def images(count: int = 5, shape: Sequence[int] = (3, 8, 8)) -> list[Tensor]:
    """Float inputs, all different; the last batch of 4 is a short one."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(tuple(shape), generator=generator) for _ in range(count)]


class Small(nn.Module):
    """Batch norm before a ReLU in place, one ReLU for all, a dict, a tail that needs the values themselves."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 6, 3, padding=1)
            self.norm = nn.BatchNorm2d(6)
            self.relu = nn.ReLU(inplace=True)
            self.again = nn.Conv2d(6, 6, 1)
            self.head = Branching()
        nn.init.uniform_(self.norm.running_mean, -0.3, 0.3)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv(x)))
        x = self.relu(self.again(x)).add_(1)
        return self.head(x)


class Branching(nn.Module):
    """What no graph can hold: another way for other values."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


def transformer() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
    model = torchvision.models.VisionTransformer(**sizes, num_classes=7)
    nn.init.normal_(model.heads.head.weight)
    return model.eval()


def stored(model: nn.Module, out: Path, layers: Sequence[str], inputs: Sequence[Any], **options: Any) -> fm.Activations:
    chosen = {"precision": "fp32", "batch_size": 4, "device": "cpu", "num_workers": 2, "memory_format": "contiguous"}
    chosen |= {"layers": layers, "progress": Notes(), "compile": True, **options}
    return fm.extract(inputs, model, out / "x.h5", **chosen)


def distance(rows: np.ndarray, expected: Tensor) -> float:
    assert rows.shape == expected.shape
    return float(np.linalg.norm(rows - expected.numpy()) / np.linalg.norm(expected.numpy()))


# ---------------------------------------------------------------------------------------------- values


def test_every_call_is_what_a_cloning_hook_sees_and_the_tail_is_not_compiled(tmp_path: Path) -> None:
    model, inputs = Small(), images()
    expected = sweep.reference(model, torch.stack(inputs))
    layers = ["conv", "norm", "relu", "again", "conv@in", "relu:2=mean", "norm=max"]
    with stored(model, tmp_path, layers, inputs) as acts:
        order = ["conv@in", "conv", "norm", "norm=max", "relu:1", "again", "relu:2", "relu:2=mean"]
        assert list(acts.layers) == order
        assert acts["norm"].attrs["copied"]
        plain = {"conv@in": torch.stack(inputs), "relu:1": expected["relu"][0], "relu:2": expected["relu"][1]}
        plain |= {name: expected[name][0] for name in ("conv", "norm", "again")}
        plain |= {"norm=max": plain["norm"].amax((2, 3)), "relu:2=mean": plain["relu:2"].mean((2, 3))}
        for name in acts.layers:
            assert distance(acts[name][:], plain[name]) < CLOSE, name
            assert acts[name].spec.rel_error is not None
            assert acts[name].spec.rel_error < CLOSE
        assert acts.config["options"]["compile"] is True
    # The head cannot be compiled: where it is wanted, or nothing ends the forward before it, this is said.
    with pytest.raises(
        ConfigError, match=r"--compile: torch.compile fails with this model: .*test_compiled.*without --comp"
    ):
        stored(model, tmp_path / "head", ["head"], inputs)


@pytest.mark.parametrize(
    ("build", "shape", "layers"),
    [
        (transformer, (3, 16, 16), ["conv_proj", "encoder.layers.*", "encoder.layers.*.ln_1", "heads"]),
        pytest.param(
            torchvision.models.resnet18, (3, 64, 64), ["bn1", "relu", "layer?", "layer1.*.bn?"], marks=pytest.mark.slow
        ),
    ],
)
def test_real_networks(build: Any, shape: Sequence[int], layers: Sequence[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = build().eval(), images(5, shape)
    expected = sweep.reference(model, torch.stack(inputs))
    with (
        stored(model, tmp_path, layers, inputs) as acts,
        stored(model, tmp_path / "eager", layers, inputs, compile=False) as plain,
    ):
        assert list(acts.layers) == list(plain.layers)
        assert len(acts.layers) >= 6
        for name in acts.layers:
            path, _, call = name.partition(":")
            assert distance(acts[name][:], expected[path][int(call or 1) - 1]) < CLOSE, name


def test_bf16_is_as_near_to_fp32_as_without(tmp_path: Path) -> None:
    layers = ["conv", "relu", "again"]
    with (
        stored(Small(), tmp_path, layers, images(), precision="bf16") as acts,
        stored(Small(), tmp_path / "eager", layers, images(), precision="bf16", compile=False) as plain,
    ):
        for name in acts.layers:
            compiled_error, error = acts[name].spec.rel_error, plain[name].spec.rel_error
            assert 0 < compiled_error < 2 * error
            assert acts[name].spec.compute_dtype == plain[name].spec.compute_dtype == "bfloat16"


# ----------------------------------------------------------------------------------------------- hooks


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.calls = 2
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.calls):
            x = self.fc(x)
        return x * 2


def probed(model: nn.Module, layers: Sequence[str]) -> list[taps.Probed]:
    seen = survey.survey(model, model, torch.randn(2, 4))
    found, refused = probe.probe(model, model, resolve.resolve(layers, seen), (4,), CPU)
    assert not refused
    return found


def test_one_graph_a_shape_runs_for_every_batch() -> None:
    model = Shared()
    wanted = probed(model, ["fc"])
    with torch.no_grad(), hooks.tapped(model, wanted, kind=CompiledCapture) as capture:
        first, second = torch.randn(3, 4), torch.randn(3, 4)
        held = capture.forward(model, first)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for batch in (second, first, second):
            capture.forward(model, batch)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
        capture.forward(model, torch.randn(2, 4))  # half a batch, as after running out of memory
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1
        linear = model.fc.weight, model.fc.bias
        once = torch.nn.functional.linear(first, *linear)
        torch.testing.assert_close(held[0], once)  # the passes after it left it alone
        torch.testing.assert_close(held[1], torch.nn.functional.linear(once, *linear))


def test_a_layer_that_fires_otherwise_than_in_the_probe_is_an_error() -> None:
    model = Shared()
    wanted = probed(model, ["fc"])
    model.calls = 1
    with torch.no_grad(), hooks.tapped(model, wanted, kind=CompiledCapture) as capture:
        with pytest.raises(CaptureError, match="called 1 times in a forward pass and 2 times in the probe"):
            capture.forward(model, torch.randn(3, 4))
        model.calls = 3  # what is compiled follows the model, or this is not seen
        with pytest.raises(CaptureError, match="called 3 times"):
            capture.forward(model, torch.randn(3, 4))


def test_two_runs_in_one_process_do_not_share_a_graph() -> None:
    model, batch = Shared(), torch.randn(3, 4)
    for layers in (["fc:1"], ["fc:2"], ["fc:1=mean", "fc:2"]):
        wanted = probed(model, layers)
        reducers = [torch.neg if p.tap.reducer else None for p in wanted]
        with torch.no_grad(), hooks.tapped(model, wanted, reducers, kind=CompiledCapture) as capture:
            got = capture.forward(model, batch)
        once = model.fc(batch)
        all_of_it = {"fc:1": once, "fc:2": model.fc(once), "fc:1=mean": -once}
        for p, tensor in zip(wanted, got, strict=True):
            torch.testing.assert_close(tensor, all_of_it[p.tap.name].detach())


def test_the_model_is_given_back_and_let_go(tmp_path: Path) -> None:
    model = Tiny().train()
    state = {name: (id(value), value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    extract(images(4), tmp_path / "x.h5", model=model, compile=True, preprocess="none")
    with pytest.raises(ConfigError):
        extract(
            images(4, (4, 8, 8)), tmp_path / "y.h5", model=Small(), compile=True, layers=["head"], preprocess="none"
        )
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(
        id(v) == state[n][0] and torch.equal(v, state[n][1]) for n, v in model.state_dict(keep_vars=True).items()
    )
    assert model(torch.zeros(2, 3, 8, 8)).requires_grad
    gone = weakref.ref(model)
    del model, state
    gc.collect()
    assert gone() is None, "what was compiled holds on to the caller's model"


# --------------------------------------------------------------------------------------- resume, verify


def test_resume_and_rerun_compile_again(tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", 10, bad={5: b"not an image"})
    out = tmp_path / "x.h5"
    extract_until(8, photos, out, compile=True)
    with pytest.raises(OutputError, match=r"compile.*True.*False"):
        extract(photos, out)
    notes = Notes()
    result = extract(photos, out, compile=True, notes=notes)
    assert result.resumed_images in (4, 8)  # the second shard may be published before the run ends
    assert (result.images, result.failed) == (10, 1)
    assert "come out a little otherwise" not in notes
    report = verify(out, rerun=10, model=Tiny(), source=photos)
    assert report.ok
    assert report.rerun == 10
    extract(photos, tmp_path / "eager.h5")
    with fm.open(out) as acts, fm.open(tmp_path / "eager.h5") as plain:
        for name in LAYERS:
            good = acts.status == 0
            assert good.sum() == 9
            assert distance(acts[name][good], torch.from_numpy(plain[name][good])) < CLOSE


@pytest.mark.parametrize(
    ("before", "then"),
    [
        (6, [4, 2, 2]),  # four passes of the plan, one that compiles, and the first batch
        (0, [4, 4, 4, 2, 2, 2, 2]),  # the plan, which does without; before the first image; the first batch, halved
    ],
)
def test_a_smaller_batch_is_compiled_when_memory_runs_out(
    before: int, then: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = CompiledCapture.forward
    passes: list[int] = []

    def short(self: CompiledCapture, forward: Any, batch: Tensor) -> list[Tensor]:
        passes.append(len(batch))
        if len(passes) > before and len(batch) > 2:
            raise torch.OutOfMemoryError("as a device would say")
        return whole(self, forward, batch)

    monkeypatch.setattr(CompiledCapture, "forward", short)
    result = extract(images(8), tmp_path / "x.h5", compile=True, preprocess="none")
    assert passes[before:] == then
    assert any("judged without compiling" in note for note in result.notes) == (not before)
    assert result.failed == 0
    monkeypatch.undo()
    extract(images(8), tmp_path / "eager.h5", preprocess="none")
    with fm.open(tmp_path / "x.h5") as acts, fm.open(tmp_path / "eager.h5") as plain:
        for name in LAYERS:
            assert distance(acts[name][:], torch.from_numpy(plain[name][:])) < CLOSE


class Careful(nn.Module):
    """Raises for an image with a large value, in a graph too."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Identity()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        torch._assert_async((x < 100).all(), "an image is too bright")
        made: Tensor = self.scale(x * 2)
        return made


def test_an_image_that_the_graph_fails_on_is_a_failed_row(tmp_path: Path) -> None:
    inputs = images(8)
    inputs[5][0, 0, 0] = 1000
    with stored(Careful(), tmp_path, ["scale"], inputs) as acts:
        assert acts.status.tolist() == [0, 0, 0, 0, 0, Status.FORWARD_FAILED, 0, 0]
        assert "too bright" in acts.messages[5]
        for row in (0, 4, 6, 7):
            assert np.array_equal(acts["scale"][row], 2 * inputs[row].numpy())


# --------------------------------------------------------------------------------------------- refusals


def test_torch_compile_switched_off_is_no_silent_fallback(tmp_path: Path) -> None:
    with torch.compiler.set_stance("force_eager"), pytest.raises(ConfigError, match=r"torch\.compile is switched off"):
        extract(images(4), tmp_path / "x.h5", compile=True, preprocess="none")


def test_a_machine_without_a_compiler_is_told_so(tmp_path: Path) -> None:
    """In a process of its own, without a cache of earlier kernels, as a user sees it: one message, no traceback."""
    photos = make_photos(tmp_path / "photos", 4)
    (tmp_path / "net.py").write_text("from runs import Tiny as model\n")
    command = [sys.executable, "-m", "fmextract", "extract", str(photos), "-m", f"{tmp_path}/net.py:model"]
    command += ["-o", str(tmp_path / "x.h5"), "-l", "conv", "--compile", "--batch-size", "4", "--precision", "fp32"]
    command += ["--preprocess", OPTIONS["preprocess"], "--device", "cpu"]
    place = {"PATH": str(tmp_path), "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    place |= {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    done = subprocess.run(command, env={**os.environ, **place}, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "error: --compile needs a working C++ compiler" in done.stderr
    assert not (tmp_path / "x.h5").exists()


def test_quantized_networks_are_refused(tmp_path: Path) -> None:
    model, shape = sweep.build("quantized_shufflenet_v2_x0_5")
    with pytest.raises(
        ConfigError, match=r"--compile: torch.compile fails with this model: .*Run it without --compile"
    ):
        stored(model, tmp_path, ["conv1"], images(2, shape), batch_size=2)


def test_a_model_that_counts_its_passes_is_refused() -> None:
    """Each pass would have to be compiled anew; torch gives up after some, in the middle of a run."""
    model = Shared()
    wanted = probed(model, ["fc"])
    model.register_forward_pre_hook(lambda module, args: setattr(module, "passes", getattr(module, "passes", 0) + 1))
    with torch.no_grad(), hooks.tapped(model, wanted, kind=CompiledCapture) as capture:
        batches = (torch.randn(3, 4) for _ in range(20))
        with pytest.raises(ConfigError, match=r"changes something of its own in every pass.* without --compile"):
            list(map(partial(capture.forward, model), batches))


def test_the_command_line_takes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = make_photos(tmp_path / "photos", 4)
    (tmp_path / "net.py").write_text("from runs import Tiny as model\n")
    command = ["plan", str(photos), "-m", f"{tmp_path}/net.py:model", "-l", "conv", "--batch-size", "4"]
    assert main([*command, "--compile", "--preprocess", OPTIONS["preprocess"], "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert "batch size 4, contiguous, compiled" in said.out
    assert "compiled (--compile) in" in said.err


# -------------------------------------------------------------------------------------------------- gpu


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need an NVIDIA GPU")
# Torch's own, while it loads its compiler and makes room for graphs.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:The CUDA Graph is empty:UserWarning")
def test_replays_of_a_cuda_graph_leave_what_was_captured_alone() -> None:
    device, model = torch.device("cuda"), Small()
    seen = survey.survey(model, model, torch.randn(2, 3, 8, 8))
    wanted, _ = probe.probe(model, model, resolve.resolve(["norm", "relu"], seen), (3, 8, 8), CPU)
    stop = seen.stop_before([p.tap for p in wanted])
    model.to(device)
    batches = [torch.randn(compiled.GRAPHED_BATCH, 3, 8, 8, device=device) for _ in range(6)]
    with torch.no_grad(), hooks.tapped(model, wanted, stop=stop, kind=CompiledCapture) as capture:
        held = [capture.forward(model, batch) for batch in batches]  # warmed up, recorded, replayed
    for batch, tensors in zip(batches, held, strict=True):
        expected = sweep.reference(model, batch)
        for tensor, clone in zip(tensors, [*expected["norm"], *expected["relu"]], strict=True):
            assert float((tensor - clone).norm() / clone.norm()) < CLOSE


def test_outputs_of_a_graph_are_copied_before_its_next_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same without a GPU: a stand-in for a graph that writes its outputs into the same memory every time."""
    static = torch.empty(3)
    marks: list[None] = []

    def replay_into_static(function: Any, **how: Any) -> Any:
        assert how == {"fullgraph": True, "dynamic": False, "mode": "reduce-overhead"}
        return lambda batch: ([static.copy_(batch), None], {}, True)

    monkeypatch.setattr(torch, "compile", replay_into_static)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(None))
    run = compiled._compile(lambda batch: ([], {}, True), graphed=True)  # type: ignore[arg-type, return-value]
    first = run(torch.ones(3))[0]
    second = run(torch.zeros(3))[0]
    assert first[0].tolist() == [1, 1, 1]
    assert second[0].tolist() == [0, 0, 0]
    assert first[1] is None
    assert len(marks) == 2
