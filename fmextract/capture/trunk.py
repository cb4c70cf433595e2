"""Which convolutions lie on a shortcut: found by what is added to what, whatever the modules are called.

Texts on feature maps number the convolutions of a residual network without those of its shortcuts: of ResNet-50 there
are 49, and 4 that only make the input of a block fit what is added to it. A convolution is such a projection if it
stands alone on one side of an addition, since the sides parted, and the other side has more of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from fmextract.capture.axes import tensors_in


class ShortcutTracer(TorchDispatchMode):
    """Follow which convolutions each tensor has come through; `passed` tells of one, when it has ended.

    >>> with ShortcutTracer() as tracer:
    ...     model(x)  # hooks call tracer.passed("layer1.0.conv1", output)
    >>> tracer.shortcuts
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._behind: Any = WeakTensorKeyDictionary()  # tensor → a bit for each convolution it has come through
        self._paths: list[str] = []
        self.shortcuts: set[str] = set()

    def passed(self, path: str, output: Any) -> None:
        """The convolution at `path` gave `output`."""
        self._paths.append(path)
        for tensor in tensors_in((output,)):
            self._behind[tensor] = self._behind.get(tensor, 0) | 1 << (len(self._paths) - 1)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        sources = [self._behind.get(tensor, 0) for tensor in tensors_in((*args, *kwargs.values()))]
        out = func(*args, **kwargs)
        behind = 0
        for source in sources:
            behind |= source
        if behind:
            for tensor in tensors_in(out if isinstance(out, (list, tuple)) else (out,)):
                self._behind[tensor] = behind
        if func.overloadpacket.__name__ in ("add", "add_") and len(sources) == 2:
            self._joined(*sources)
        return out

    def _joined(self, one: int, other: int) -> None:
        """Two tensors are added: what each has come through that the other has not are the two sides."""
        sides = sorted((one & ~other, other & ~one), key=int.bit_count)
        if sides[0].bit_count() == 1 < sides[1].bit_count():
            self.shortcuts.add(self._paths[sides[0].bit_length() - 1])
