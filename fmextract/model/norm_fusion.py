"""Fold batch norm into the convolution before it, where no other code reads what the convolution gives.

Outside of training, batch norm is a scale and a shift of each channel, and both can be in the weights of the
convolution before it: this saves a pass over the activations, and in half precision one rounding. The output of the
convolution itself is lost. So it is done only where one batch norm alone reads that output, which is found out by
watching every operation of a forward pass, including those of the hooks on the wanted layers. What no dispatch mode
sees (an alias, another thread, a call of `forward` itself) shows in the wanted layers, which the caller compares.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from fmextract.capture.taps import Probed
from fmextract.errors import FormatError
from fmextract.model.prepacked import has_weight


class Pair(NamedTuple):
    """A convolution and the batch norm that alone reads its output."""

    conv: nn.Conv2d
    norm: nn.BatchNorm2d

    def fused(self) -> tuple[Tensor, Tensor]:
        """Return (weight, bias) of a convolution that gives what the two give in turn, in their precision."""
        conv, norm = self.conv, self.norm
        with torch.no_grad():
            scale = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            weight, bias = fuse_conv_bn_weights(conv.weight, conv.bias, *scale)  # type: ignore[arg-type]
        return weight.detach(), bias.detach()


def paths_of(model: nn.Module, pairs: Sequence[Pair]) -> tuple[tuple[str, str], ...]:
    """Return the paths of each pair's convolution and norm in `model`; `pairs_at` is the inverse."""
    path = {module: path for path, module in model.named_modules()}
    return tuple((path[pair.conv], path[pair.norm]) for pair in pairs)


def pairs_at(model: nn.Module, paths: Sequence[tuple[str, str]]) -> tuple[Pair, ...]:
    """Return the pairs at `paths` of `model`. Raises FormatError where it has no such convolution or norm there."""
    modules = dict(model.named_modules())
    pairs = []
    for conv, norm in ((modules.get(conv), modules.get(norm)) for conv, norm in paths):
        if not (isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)):
            raise FormatError(
                f"the plan names convolutions and batch norms that the model does not have: {paths!r:.200}"
            )
        pairs.append(Pair(conv, norm))
    return tuple(pairs)


def readers(model: nn.Module, probed: Sequence[Probed]) -> Readers | None:
    """Return what watches a forward pass of `model`, with hooks on `probed`, for pairs; None if there can be none.

    The pass must run as a run does: in evaluation mode, to the same stop.
    """
    tapped_paths = {p.tap.module for p in probed}
    modules = [m for path, m in model.named_modules() if path not in tapped_paths and not _hooked(m)]
    convolutions = [m for m in modules if _is_convolution(m)]
    norms = [m for m in modules if _is_norm(m)]
    return Readers(convolutions, norms) if convolutions and norms else None


def _is_convolution(module: nn.Module) -> bool:
    return type(module) is nn.Conv2d and module.padding_mode == "zeros" and has_weight(module)


def _is_norm(module: nn.Module) -> bool:
    return type(module) is nn.BatchNorm2d and module.running_mean is not None and module.running_var is not None


def _hooked(module: nn.Module) -> bool:
    """Return whether other code sees what goes in or out (a hook), or has replaced the forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


@dataclass(slots=True)
class _Output:
    """An output of a convolution: how many operations read it, and how many of those in the first batch norm."""

    conv: nn.Conv2d
    reads: int = 0
    norm: nn.BatchNorm2d | None = None
    reads_of_norm: int = 0


class Readers(TorchDispatchMode):
    """Sees every operation of a forward pass inside the `with` block; knows the pairs after it."""

    def __init__(self, convolutions: Sequence[nn.Module], norms: Sequence[nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._convolutions, self._norms = convolutions, norms
        self._handles: list[Any] = []
        self._known: Any = WeakTensorKeyDictionary()
        self._outputs: list[_Output] = []
        self._calls: Counter[nn.Module] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for value in tree_leaves((args, kwargs)):
            if (output := self._output(value)) is not None:
                output.reads += 1
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Any:
        for module in self._convolutions:
            self._handles.append(module.register_forward_hook(self._convolved))
        for module in self._norms:
            self._handles.append(module.register_forward_pre_hook(self._before_norm))
            self._handles.append(module.register_forward_hook(self._after_norm))
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *exc_info: Any) -> None:
        super().__exit__(*exc_info)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def pairs(self) -> tuple[Pair, ...]:
        """Return the pairs that were called once each, the norm right on the output, which nothing else has read."""
        return tuple(
            Pair(output.conv, output.norm)
            for output in self._outputs
            if output.norm is not None
            and output.reads == output.reads_of_norm > 0
            and self._calls[output.conv] == self._calls[output.norm] == 1
        )

    def _output(self, value: Any) -> _Output | None:
        return self._known.get(value) if isinstance(value, Tensor) else None

    def _convolved(self, conv: nn.Conv2d, args: Any, made: Any) -> None:
        self._calls[conv] += 1
        output = _Output(conv)
        self._known[made] = output
        self._outputs.append(output)

    def _before_norm(self, norm: nn.BatchNorm2d, args: Any) -> None:
        self._calls[norm] += 1
        output = self._output(args[0]) if args else None
        if output is not None and output.reads == 0:
            output.norm = norm

    def _after_norm(self, norm: nn.BatchNorm2d, args: Any, made: Any) -> None:
        output = self._output(args[0]) if args else None
        if output is not None and output.norm is norm:
            output.reads_of_norm = output.reads
