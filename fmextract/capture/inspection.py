"""What of a forward pass is taken, and what it means: survey, resolve, probe and receptive fields, in one call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from fmextract.capture import blame, hooks, probe, receptive_fields, reducers, resolve, survey
from fmextract.capture.taps import Event, Forward, Probed, Reduce, Refused, Tap
from fmextract.capture.untouched import RANDOM, State
from fmextract.common import devices, text
from fmextract.common.devices import is_out_of_memory
from fmextract.errors import CaptureError, FmextractError, LayerError
from fmextract.records import Field

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TapOutput:
    """What a tap hands over, after a reducer in the hook: the shape and axes of one image.

    Statistics are of this. `finish` makes what is stored of it where that is less (`=top` stores each map's maximum).
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    finish: Callable[[torch.Tensor], torch.Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Inspection:
    """The layers that are wanted of a model, and what is known of them. One value a layer, in the order of the pass.

    `stop`: before which call a pass may end. `largest`: bytes of the largest tensor that a module gives for one image
    in fp32. `draws`: a pass draws random numbers.
    """

    probed: tuple[Probed, ...]
    reductions: tuple[reducers.Reduction | None, ...]
    fields: tuple[Field | None, ...]
    stop: Event | None
    largest: int
    draws: bool
    notes: tuple[str, ...]

    @property
    def outputs(self) -> tuple[TapOutput, ...]:
        """What each tap hands over once its reducer has run in the hook."""
        return tuple(map(self.output, range(len(self.probed))))

    def output(self, i: int) -> TapOutput:
        """What tap `i` hands over."""
        return _output(self.probed[i], self.reductions[i])

    @property
    def reduce(self) -> list[Reduce | None]:
        """What each tap's tensor becomes in the hook, None where it is kept whole."""
        return [r.apply if r is not None and r.stores else None for r in self.reductions]

    @property
    def reduced(self) -> list[receptive_fields.Reduced | None]:
        """The same with the axes that are left, for receptive fields."""
        return _reduced(self.reductions)


def inspect(
    module: nn.Module,
    forward: Forward,
    selectors: Sequence[str],
    input_shape: tuple[int, ...],
    device: torch.device,
    photos: probe.Photos,
    state: State,
) -> Inspection:
    """Find the layers that `selectors` name, and look at passes over noise and over `photos` of the source.

    `module` is on `device`, in evaluation mode; `state` is how it was before, to which passes are put back. Raises
    LayerError, for all selectors that have no layer and all layers that cannot be stored at once.
    """
    model = _Model(module, forward, input_shape, device)
    notes: list[str] = []
    with state.guarded():
        seen = model.surveyed()
        before = State(module)  # what a first pass alone sets up is there now
        wanted, errors = resolve.found(selectors or resolve.default_selectors(module, seen), seen)
        probed, refused = _probed(model, wanted, photos, notes)
        notes += [f"left out {path!r}: {why}" for path, why in resolve.left_out(selectors, seen).items()]
        changes = before.changed()
        draws = any(place == RANDOM for place, _ in changes)
        if probed and changes:
            probed, changing = _steady(model, probed, draws, photos, notes)
            refused += changing
        if probed and draws:
            notes.append(
                "the model draws random numbers in its forward pass; what is stored was the same in many passes over"
                " the same images, which does not show what it does rarely"
            )
        _check(selectors, probed, refused, errors, notes)
    reductions = tuple(map(reduction, probed))
    stop = seen.stop_before([p.tap for p in probed])
    ended = State(module)
    fields = _fields(model, probed, reductions, stop)
    if stop is not None and (left := ended.changed() - changes):
        ended.restore(left)
        places = text.some(sorted({place for place, _ in left}))
        notes.append(f"passes run to their end, where the model tidies up what it did to {places}")
        stop = None
    return Inspection(
        probed=tuple(probed),
        reductions=reductions,
        fields=fields,
        stop=stop,
        largest=_largest(seen),
        draws=draws,
        notes=tuple(notes),
    )


@dataclass(frozen=True, slots=True)
class _Model:
    """What is inspected, and what it takes."""

    module: nn.Module
    forward: Forward
    input_shape: tuple[int, ...]
    device: torch.device

    def surveyed(self) -> survey.Survey:
        return surveyed(self.module, self.forward, noise(self.input_shape, self.device))

    @contextmanager
    def failing(self) -> Iterator[None]:
        with failing_on(self.input_shape, self.module):
            yield


def _probed(
    model: _Model, wanted: Sequence[Tap], photos: probe.Photos, notes: list[str]
) -> tuple[list[Probed], list[Refused]]:
    if not wanted:
        return [], []
    look = partial(probe.probe, model.module, model.forward, wanted, model.input_shape, model.device, tell=notes.append)
    with model.failing():
        return _with_photos_or_without(look, photos, model.module, notes)


def _steady(
    model: _Model, probed: Sequence[Probed], draws: bool, photos: probe.Photos, notes: list[str]
) -> tuple[list[Probed], list[Refused]]:
    """The layers, without those that come out otherwise from one pass to the next in a model that a pass changes."""
    look = partial(probe.unsteady, model.module, model.forward, probed, model.input_shape, model.device)
    with model.failing():
        unsteady = _with_photos_or_without(look, photos, model.module, notes)
    cause = "random numbers" if draws else "what the model remembers of others"
    why = f"its values change from one pass over the same images to the next, with {cause}"
    refused = [Refused(layer.tap, why) for i, layer in enumerate(probed) if i in unsteady]
    return [layer for i, layer in enumerate(probed) if i not in unsteady], refused


def _check(
    selectors: Sequence[str],
    probed: Sequence[Probed],
    refused: Sequence[Refused],
    errors: list[LayerError],
    notes: list[str],
) -> None:
    """Raises LayerError for all that was asked for by name and cannot be had, and tells what is left out."""
    for refusal in refused:
        if (selectors and refusal.tap.explicit) or not probed:
            errors.append(LayerError(f"layer {refusal.tap.name!r} cannot be stored row by row: {refusal.why}"))
        notes.append(f"left out {refusal.tap.name!r}: {refusal.why}")
    for layer in probed:
        try:
            reduction(layer)
        except LayerError as error:
            errors.append(error)
    if errors:
        raise resolve.at_once(errors)


def _largest(seen: survey.Survey) -> int:
    """Bytes of the largest tensor for one image, of a survey over two."""
    return max(4 * math.prod(info.shape) // IMAGES for infos in seen.tensors.values() for info in infos)


def _with_photos_or_without(
    look: Callable[[probe.Photos | None], T], photos: probe.Photos, model: nn.Module, notes: list[str]
) -> T:
    """A probe with images of the source; with noise alone where the model fails on one, which is a failed row's."""
    try:
        return look(photos)
    except Exception as error:
        if isinstance(error, FmextractError) or is_out_of_memory(error):
            raise
        why = blame.told(error, model)
    seen = look(None)
    notes.append(f"{probe.ON_PHOTOS}, so that its layers were looked at with noise alone: {why}")
    return seen


def _fields(
    model: _Model, probed: Sequence[Probed], reductions: Sequence[reducers.Reduction | None], stop: Event | None
) -> tuple[Field | None, ...]:
    """Theoretical receptive fields of what each layer stores. Takes a pass to `stop`, of whatever shape the input."""
    images = noise(model.input_shape, model.device)
    if len(model.input_shape) != 3:
        if stop is not None:
            with hooks.tapped(model.module, probed, stop=stop) as capture:
                capture.forward(model.forward, images)
        return (None,) * len(probed)

    def traced(batch: torch.Tensor) -> tuple[Field | None, ...]:
        reduced = _reduced(reductions)
        return tuple(receptive_fields.trace_fields(model.module, model.forward, probed, batch, reduced, stop))

    try:
        return traced(torch.zeros_like(images))
    except Exception as error:
        if isinstance(error, FmextractError) or is_out_of_memory(error):
            raise
    with model.failing():  # a model may refuse black images
        return traced(images)


def fields_of(
    module: nn.Module, forward: Forward, probed: Sequence[Probed], input_shape: tuple[int, ...], device: torch.device
) -> tuple[Field | None, ...]:
    """Return the theoretical receptive fields of what each layer would store, None for one without maps.

    All are None for a model that does not do the same in every pass.
    """
    reductions = list(map(reduction, probed))
    try:
        fields = _fields(_Model(module, forward, input_shape, device), probed, reductions, stop=None)
    except CaptureError:
        return (None,) * len(probed)
    axes = [_output(one, reduced).axes for one, reduced in zip(probed, reductions, strict=True)]
    return tuple(map(of_maps, axes, fields))


def of_maps(axes: Sequence[str], field: Field | None) -> Field | None:
    """Return the field of a layer that has maps; others have no cells that could each have one."""
    return field if {"y", "x"} <= set(axes) else None


def _reduced(reductions: Sequence[reducers.Reduction | None]) -> list[receptive_fields.Reduced | None]:
    return [None if r is None or not r.stores else (r.apply, r.axes) for r in reductions]


# ------------------------------------------------------------------------------------------------- parts of a look

IMAGES = 2
"""Images of a batch of noise."""


def noise(input_shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """A batch of noise, the same every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn((IMAGES, *input_shape), generator=generator, dtype=torch.float32).to(device)


def surveyed(module: nn.Module, forward: Forward, batch: torch.Tensor) -> survey.Survey:
    """What one pass over `batch` (B, …) does. Raises LayerError where the model fails on it, and on a weaker one."""
    with failing_on(batch.shape[1:], module):
        try:
            seen = survey.survey(module, forward, batch)
        except (FmextractError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # a model may refuse inputs beyond the range of photos
            batch = (batch / 4).clamp(-1, 1)
            try:
                seen = survey.survey(module, forward, batch)
            except Exception:
                raise error from None
        if {path for path, _ in module.named_modules() if path} <= seen.types.keys():
            return seen
        return survey.survey(module, forward, batch)  # the first pass has made modules


@contextmanager
def failing_on(shape: Sequence[int], model: nn.Module) -> Iterator[None]:
    """Whatever the model raises for inputs of `shape`, as a LayerError that says what is known of it."""
    try:
        yield
    except FmextractError:
        raise
    except Exception as error:
        if (gone := devices.lost(error)) is not None:
            raise gone from error
        shown = " x ".join(map(str, shape))
        raise LayerError(
            f"the model fails on an input of {shown} (channel x height x width): {blame.told(error, model)}"
        ) from error


def reduction(probed: Probed) -> reducers.Reduction | None:
    """The reducer of a layer, for its shape and axes; None where it has none. Raises LayerError."""
    if not probed.tap.reducer:
        return None
    try:
        made = reducers.reduction(probed.tap.reducer, probed.shape, probed.axes)
        if not made.stores:
            _output(probed, made)
        return made
    except LayerError as error:
        raise LayerError(f"layer {probed.tap.name!r}: {error}") from error


def _output(probed: Probed, reduction: reducers.Reduction | None) -> TapOutput:
    if reduction is None:
        return TapOutput(probed.shape, probed.axes)
    if reduction.stores:
        return TapOutput(reduction.shape, reduction.axes)
    # `=top`: statistics and positions are of the whole map, of which each channel's maximum is stored.
    return TapOutput(probed.shape, probed.axes, reducers.reduction("max", probed.shape, probed.axes).apply)
