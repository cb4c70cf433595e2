"""Hooks on a model for as long as a run lasts: they take what is wanted, and end the pass behind the last of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn

from fmextract.capture.independence import kinds, leaking, same
from fmextract.capture.survey import inputs_of, member_of, named_modules
from fmextract.capture.taps import Event, Forward, Probed, Reduce, Tap, is_plain, without
from fmextract.errors import CaptureError

# --------------------------------------------------------------------------------------------- capture


class _StopForward(BaseException):
    """Ends a forward pass after the last wanted tap. Not an Exception, since models swallow those."""


class Hooks:
    """Hooks that call `take(i, tensor)` whenever the tensor of tap i comes by, and count calls.

    `take` gets None where the value has no such member. Before `stop`, a pass ends once every call has been counted.
    """

    def __init__(
        self, taps: Sequence[Tap], take: Callable[[int, torch.Tensor | None], None], stop: Event | None = None
    ) -> None:
        self._taps: dict[tuple[str, str], list[tuple[int, Tap]]] = {}
        for i, tap in enumerate(taps):
            self._taps.setdefault((tap.module, tap.tap), []).append((i, tap))
        self._calls = {(tap.module, tap.tap): tap.calls for tap in taps}
        self._take, self._stop = take, stop
        self._stop_seen = 0
        self._over = False
        self.counts: Counter[tuple[str, str]] = Counter()

    def run(self, forward: Forward, batch: torch.Tensor) -> None:
        """One forward pass, to the stop or to its end. Raises whatever the model raises."""
        self.counts = Counter()
        self._stop_seen, self._over = 0, False
        try:
            forward(batch)
        except _StopForward:
            return
        except Exception:
            if not self._over:
                raise
        if self._over:  # the model swallows even a BaseException: let its next passes run to their end
            self._stop = None

    def end(self) -> NoReturn:
        """Called in `take`: nothing more of this pass is wanted. A model that swallows this is not listened to."""
        self._over = True
        raise _StopForward

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Hooked for as long as the block lasts."""
        modules = named_modules(model)
        handles = []
        try:
            if self._stop is not None:
                handles.append(modules[self._stop.module].register_forward_pre_hook(self._maybe_stop))
            for path, side in self._taps:
                if side == "in":
                    handles.append(modules[path].register_forward_pre_hook(self._before(path), with_kwargs=True))
                else:
                    handles.append(modules[path].register_forward_hook(self._after(path)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, path: str) -> Callable[..., None]:
        return lambda module, args, kwargs: self._fire((path, "in"), inputs_of(args, kwargs))

    def _after(self, path: str) -> Callable[..., None]:
        return lambda module, args, output: self._fire((path, "out"), output)

    def _fire(self, key: tuple[str, str], value: Any) -> None:
        if self._over:
            return
        self.counts[key] += 1
        for i, tap in self._taps[key]:
            if tap.number == self.counts[key]:
                self._take(i, member_of(value, tap.path))

    def _maybe_stop(self, module: nn.Module, args: Any) -> None:
        if self._stop is None or self._over:
            return
        self._stop_seen += 1
        complete = all(self.counts[key] >= calls for key, calls in self._calls.items())
        if complete and self._stop_seen >= self._stop.number:
            self.end()


class Capture:
    """The hooks of one run; `forward` runs one batch and gives the wanted tensors, rows first.

    Made by `tapped`. Tensors that are overwritten later are copied or reduced in the hook; the others are kept by
    reference, and their version counters are compared when the pass has ended.
    """

    def __init__(
        self, taps: Sequence[Probed], reducers: Sequence[Reduce | None], stop: Event | None, asking: bool = False
    ) -> None:
        self._taps = taps
        self._reducers = reducers
        self._hooks = Hooks([p.tap for p in taps], self._take, stop)
        self._kept: dict[int, torch.Tensor] = {}
        self._watched: dict[int, tuple[torch.Tensor, int]] = {}
        self._batch = self._wanted = 0
        self._gradients = False
        self._error: Exception | None = None
        self._pads = not all(p.alone for p in taps)
        self._undecided = {i for i, p in enumerate(taps) if asking and p.undecided}
        self._usual: dict[int, torch.Tensor] = {}
        self._asked: Counter[int] = Counter()

    def on(self, model: nn.Module) -> AbstractContextManager[None]:
        """Hook the model for as long as the block lasts."""
        return self._hooks.on(model)

    def forward(self, forward: Forward, batch: torch.Tensor) -> list[torch.Tensor]:
        """One forward pass over `batch` (B, …); one tensor (B, …) a tap, in the order of the taps.

        The tensors may be the model's own: read them only. The next pass leaves them as they are. A single image is run
        twice side by side where the probe says that the model does something else with one.
        Raises CaptureError when the pass does something else than the probe saw, and whatever the model raises.
        """
        asked = batch.clone() if self._undecided and len(batch) > 1 else None  # a model may write into its input
        rows = self._rows(forward, batch)
        if asked is not None:
            self._ask_again(forward, asked, rows)
        return rows

    def _rows(self, forward: Forward, batch: torch.Tensor) -> list[torch.Tensor]:
        self._wanted = len(batch)
        if self._pads and len(batch) == 1:
            batch = torch.cat([batch, batch])
        self._batch, self._gradients = len(batch), torch.is_grad_enabled()
        with torch.set_grad_enabled(self._gradients):  # as it is, also after a model that sets it for good
            return self._run(forward, batch)

    def _run(self, forward: Forward, batch: torch.Tensor) -> list[torch.Tensor]:
        self._error = None
        try:
            self._hooks.run(forward, batch)
            if self._error is not None:
                raise self._error
            self._check_counts(self._hooks.counts)
            self._check_versions()
            return [self._kept[i] for i in range(len(self._taps))]
        finally:
            self._kept.clear()
            self._watched.clear()

    def _ask_again(self, forward: Forward, batch: torch.Tensor, rows: Sequence[torch.Tensor]) -> None:
        """Whether the rows of undecided layers are of one image each, once they are not what they were all the time.

        Raises CaptureError where they are not.
        """
        changed = {i: rows[i] for i in self._undecided if not self._is_usual(i, rows[i])}
        if not changed:
            return
        leaks = leaking(partial(self._rows, forward), batch, batch.roll(1, 0), changed)
        if leaks:
            raise CaptureError(
                f"layer {self._taps[min(leaks)].tap.name!r} was the same for every image that the probe tried; now it"
                " is not, and its rows change with the other images of the batch, or at random: they cannot be stored"
                f"{without([self._taps[n].tap.name for n in sorted(leaks)], len(self._taps))}"
            )
        for i, values in changed.items():
            found = kinds(values)
            self._asked[i] += found > 1
            # A single image that is unlike the others may stand where it shows nothing: in the middle, say.
            if found >= min(3, len(values)) or self._asked[i] >= 4:
                self._undecided.discard(i)
            elif found == 1:
                self._usual[i] = values[:1].clone()

    def _is_usual(self, i: int, rows: torch.Tensor) -> bool:
        return i in self._usual and same(rows, self._usual[i].expand_as(rows))

    def _take(self, i: int, tensor: torch.Tensor | None) -> None:
        """Called by the hooks. Never raises an Exception: a model could swallow it and go on."""
        try:
            self._kept[i] = self._taken(i, tensor)
        except CaptureError as error:
            name = self._taps[i].tap.name
            self._error = CaptureError(
                f"layer {name!r}: {error}, unlike in the probe; its rows cannot be trusted"
                f"{without([name], len(self._taps))}"
            )
        except Exception as error:  # a reducer's, or no memory for a copy: for the caller, not for the model
            self._error = error
        if self._error is not None:
            self._hooks.end()

    def _taken(self, i: int, tensor: torch.Tensor | None) -> torch.Tensor:
        probed, reduce = self._taps[i], self._reducers[i]
        if tensor is None or not is_plain(tensor):
            raise CaptureError("the model gives no plain tensor here")
        with torch.set_grad_enabled(self._gradients):  # a model may have enabled gradients that nobody asked for
            rows = self._own_rows(probed, tensor)
            if reduce is not None:
                return reduce(rows)
            if tensor.is_quantized:  # made plain: a copy already
                return rows
            if probed.overwritten or tensor.is_inference():
                return rows.clone()
        self._watched[i] = (tensor, tensor._version)
        return rows

    def _own_rows(self, probed: Probed, tensor: torch.Tensor) -> torch.Tensor:
        """The rows of the images that were asked for, without gradients unless the caller wants them.

        A tensor of our own over the same memory, since the model may give its own another shape or memory later.
        """
        tensor = tensor.view_as(tensor) if self._gradients else tensor.detach()
        rows = probed.rows(tensor, self._batch)
        return rows if self._wanted == self._batch else rows[: self._wanted]

    def _check_counts(self, counts: Mapping[tuple[str, str], int]) -> None:
        others = [p.tap for p in self._taps if counts.get((p.tap.module, p.tap.tap), 0) != p.tap.calls]
        if others:
            first = others[0]
            raise CaptureError(
                f"module {first.module!r} was called {counts.get((first.module, first.tap), 0)} times in a forward pass"
                f" and {first.calls} times in the probe. What a model calls for some images alone cannot be stored row"
                f" by row{without([tap.name for tap in others], len(self._taps))}"
            )

    def _check_versions(self) -> None:
        for i, (tensor, version) in self._watched.items():
            if tensor._version != version:
                raise CaptureError(
                    f"layer {self._taps[i].tap.name!r} was overwritten in place after it was captured, unlike in the"
                    " probe: its values are lost. A layer that this happens to only for some images cannot be stored"
                    f"{without([self._taps[i].tap.name], len(self._taps))}"
                )


@contextmanager
def tapped(
    model: nn.Module,
    taps: Sequence[Probed],
    reducers: Sequence[Reduce | None] | None = None,
    stop: Event | None = None,
    kind: type[Capture] = Capture,
    asking: bool = False,
) -> Iterator[Capture]:
    """Hooks on `model` for as long as the block lasts; they are gone on every way out.

    `reducers[i]` maps the (B, …) tensor of tap i to what is kept of it, on its device, before anything is copied.
    `stop` (from `Survey.stop_before`) is the call before which a forward pass may end. `kind` is how passes are run.
    `asking`: of undecided layers it is asked whether their rows are of one image each as soon as they are unlike.
    """
    capture = kind(taps, reducers or [None] * len(taps), stop, asking)
    with capture.on(model):
        yield capture
