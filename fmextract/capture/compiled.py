"""Forward passes through `torch.compile`: the hooks are traced with the model, and what they take is what comes out.

The function that is compiled runs the hooked model and returns the tensors that the hooks took, how often each of them
fired, and whether it was traced at all. So

* a layer is an output of the graph: nothing is left to a side effect that a compiler may drop, and a copy made in the
  hook holds the values of that moment, whatever is written in place later;
* the forward ends at trace time where it ends without compiling: what comes after the last wanted layer is in no graph;
* the counts are those of the graph that ran, and are compared with the probe for every batch.

`fullgraph=True`: what cannot be traced whole is refused. Half of a model in a graph and half outside it would run, but
hooks at the seams would be a matter of luck.
"""

from __future__ import annotations

import re
import types
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from fmextract.capture.hooks import Capture
from fmextract.capture.taps import Forward
from fmextract.common.devices import is_out_of_memory
from fmextract.errors import CaptureError, ConfigError

GRAPHED_BATCH = 32  # images a batch up to which a CUDA graph is recorded: of larger ones the launches do not count

Outcome = tuple[list[torch.Tensor | None], Counter[tuple[str, str]], bool]
"""(one tensor (B, …) a tap, None where it did not fire; how often each hook fired; whether it ran compiled)."""


class CompiledCapture(Capture):
    """A `Capture` whose passes are compiled, once for every shape of a batch. Made by `tapped(…, kind=…)`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._passes: dict[torch.Size, Callable[[torch.Tensor], Outcome]] = {}

    def _run(self, forward: Forward, batch: torch.Tensor) -> list[torch.Tensor]:
        """The first pass over a shape compiles, which takes seconds to minutes.

        Raises ConfigError where that fails, since the model cannot be compiled or this machine cannot compile.
        """
        run = self._passes.get(batch.shape) or self._compiled(forward, batch)
        try:
            return self._checked(run(batch))
        except Exception as error:
            if type(error).__module__ != "torch._dynamo.exc":
                raise
            raise ConfigError(_refusal(error)) from error  # it had to be compiled anew, and could not

    def _compiled(self, forward: Forward, batch: torch.Tensor) -> Callable[[torch.Tensor], Outcome]:
        """A pass over batches of this shape, tried on black images: what fails on those is not an image's fault."""
        graphed = batch.device.type == "cuda" and len(batch) <= GRAPHED_BATCH
        try:
            run = _compile(self._pass(forward), graphed)
            traced = run(torch.zeros_like(batch))[2]
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise ConfigError(_refusal(error)) from error
        if not traced:
            raise ConfigError(
                "--compile: torch.compile is switched off here and would run the model as it is (TORCH_COMPILE_DISABLE,"
                " torch.compiler.set_stance, torch._dynamo.config). Switch it on, or run without --compile."
            )
        self._passes[batch.shape] = run
        return run

    def _pass(self, forward: Forward) -> Callable[[torch.Tensor], Outcome]:
        def run(batch: torch.Tensor) -> Outcome:
            self._kept = {}
            self._hooks.run(forward, batch)
            kept, self._kept = self._kept, {}
            return [kept.get(i) for i in range(len(self._taps))], self._hooks.counts, torch.compiler.is_compiling()

        return run

    def _take(self, i: int, tensor: torch.Tensor | None) -> None:
        """Called by the hooks while they are traced. Always a copy: it costs nothing where nothing overwrites it."""
        if tensor is not None:
            rows, reduce = self._own_rows(self._taps[i], tensor), self._reducers[i]
            self._kept[i] = rows.clone() if reduce is None else reduce(rows)

    def _checked(self, outcome: Outcome) -> list[torch.Tensor]:
        tensors, counts, _ = outcome
        self._check_counts(counts)
        found = [tensor for tensor in tensors if tensor is not None]
        if len(found) < len(tensors):
            name = self._taps[tensors.index(None)].tap.name
            raise CaptureError(f"layer {name!r}: the compiled model gives no tensor here, unlike in the probe")
        return found


def _compile(function: Callable[[torch.Tensor], Outcome], graphed: bool) -> Callable[[torch.Tensor], Outcome]:
    """`function` through torch.compile, for one shape; `graphed`: its kernels are launched as one CUDA graph."""
    # What is compiled is kept with the code object, and hooks are not among what is checked before it is used again:
    # with a code object of its own, no run can get the graph of another, and the graph goes when the run does.
    own = types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, None, function.__closure__
    )
    mode = "reduce-overhead" if graphed else None
    compiled: Callable[[torch.Tensor], Outcome] = torch.compile(own, fullgraph=True, dynamic=False, mode=mode)

    def run(batch: torch.Tensor) -> Outcome:
        with _hooks_in_checkpoints():
            return compiled(batch)

    if not graphed:
        return run

    def replayed(batch: torch.Tensor) -> Outcome:
        # The outputs of a CUDA graph lie in memory that its next replay writes. They are copied on the stream that the
        # replays are queued on, so before that; the mark says that those of the pass before are not looked at again.
        torch.compiler.cudagraph_mark_step_begin()
        tensors, counts, traced = run(batch)
        return [None if tensor is None else tensor.clone() for tensor in tensors], counts, traced

    return replayed


def _hooks_in_checkpoints() -> AbstractContextManager[Any]:
    """Lets hooks take what is computed under gradient checkpointing, which would run them again in a backward pass:
    there is none here.
    """
    name = "skip_fwd_side_effects_in_bwd_under_checkpoint"
    config: Any = torch._dynamo.config
    patched: AbstractContextManager[Any] = config.patch(**{name: True}) if hasattr(config, name) else nullcontext()
    return patched


def _refusal(error: Exception) -> str:
    """Why it cannot be compiled, where, and what to do: of what torch says, the lines that matter to a person."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = " ".join(said[: 2 if said[0].endswith(":") else 1]).rstrip(".")  # "backend='inductor' raised:", and what
    if re.search(r"compiler.* found|find C compiler", reason):
        return (
            f"--compile needs a working C++ compiler: {reason}. Install one (g++ or clang; cl on Windows), or run"
            " without --compile."
        )
    if type(error).__name__ == "FailOnRecompileLimitHit":
        reason = "it changes something of its own in every pass, so that no two run the same code"
    places = re.findall(r'File "([^"]+)", line (\d+), in (\w+)', str(error))  # the last one is where tracing ended
    where = " (in {2}, {0}:{1})".format(*places[-1]) if places else ""
    return f"--compile: torch.compile fails with this model: {reason}{where}. Run it without --compile."
