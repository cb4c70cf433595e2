"""Before a run is planned: open the source, build the model, and inspect what it gives for the images."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fmextract.capture import hooks, inspection
from fmextract.capture.compiled import CompiledCapture
from fmextract.capture.inspection import Inspection, TapOutput
from fmextract.capture.taps import Probed
from fmextract.capture.untouched import State, untouched
from fmextract.common import allocator, devices
from fmextract.common.facts import Told
from fmextract.config import Config
from fmextract.errors import ConfigError, SampleError, SourceError
from fmextract.inputs import device_jpegs
from fmextract.inputs.reading import Reader, reading
from fmextract.inputs.sources import notes_of, open_source
from fmextract.model import loading, precision, run_mode
from fmextract.model.randomness import may_draw
from fmextract.records import Preprocess, Progress, Source
from fmextract.run import provenance
from fmextract.run.sampling import Sampler
from fmextract.storage import codecs

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything that a run needs to know of its source and model before it can be planned.

    The model is as it was given; `run_mode.as_written` and `run.working` make it ready for passes on `device`.
    `random`: whether anything that is random depends on the seed, as `_random` says. `before`: what code and attributes
    were before the first forward pass.
    """

    config: Config
    source: Source
    reader: Reader
    loaded: loading.LoadedModel
    device: torch.device
    sampler: Sampler
    inspection: Inspection
    random: str
    notes: tuple[str, ...]
    before: Mapping[str, Told]

    def forward(self, batch: torch.Tensor) -> Any:
        """The model's forward pass."""
        return self.loaded.forward(batch)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """That of one input of the model."""
        return self.sampler.input_shape

    @property
    def ready(self) -> bool:
        """Whether images are the model's inputs as they come: float, not to be normalised."""
        return self.sampler.ready

    @property
    def probed(self) -> tuple[Probed, ...]:
        """The layers, in the order in which they are stored."""
        return self.inspection.probed

    @property
    def outputs(self) -> tuple[TapOutput, ...]:
        """What each layer hands over to be stored."""
        return self.inspection.outputs

    @property
    def capture_kind(self) -> type[hooks.Capture]:
        """How its passes are run: as the model is written, or compiled."""
        return CompiledCapture if self.config.compile else hooks.Capture


@contextmanager
def prepare(source: Any, model: Any, config: Config, progress: Progress) -> Iterator[Prepared]:
    """Open, build, inspect. Raises SourceError, ModelError, LayerError or ConfigError, each with what to do."""
    codecs.codec_named(config.codec).checked_level(config.level)
    device = devices.pick(config.device)
    if config.jpeg_decoder == "device":
        device_jpegs.device_decoder(device)  # before the model is built, which may take long
    if config.precision != "auto":
        precision.check(config.precision, device)
    if isinstance(source, torch.nn.Module):
        raise SourceError(
            f"the source is a model, {type(source).__name__}: images come first, as in (source, model, out)"
        )
    opened = open_source(
        source,
        limit=config.limit,
        allow_outside=config.allow_outside,
        key=config.key,
        label=config.label,
        hidden=config.hidden,
    )
    loaded = loading.load_model(model, config.weights, config.preprocess, config.size)
    log.debug("built %s, weights %s", loaded.name, loaded.weights)
    before = provenance.code_of(loaded)
    with (
        untouched(loaded.module) as state,
        reading(
            opened,
            loaded.preprocess,
            exif=config.exif,
            seed=config.seed,
            workers=config.dataset_workers,
            say=progress.note,
        ) as reader,
    ):
        sampler = _sampler(opened, reader, loaded, device)
        if config.jpeg_decoder == "device":
            device_jpegs.check_fits_on_device(loaded.preprocess)
        own = _own_type(config.precision, loaded.input_dtype)
        inspected = _inspected(loaded, config, sampler, state)
        notes = (*own, *notes_of(opened), *inspected.notes)
        for note in notes:
            progress.note(note)
        yield Prepared(
            config=config,
            source=opened,
            reader=reader,
            loaded=loaded,
            device=device,
            sampler=sampler,
            inspection=inspected,
            random=_random(reader, loaded, inspected),
            notes=notes,
            before=before,
        )


def _sampler(source: Source, reader: Reader, loaded: loading.LoadedModel, device: torch.device) -> Sampler:
    input_shape, ready = _input_shape(source, reader, loaded)
    return Sampler(
        reader=reader,
        rows=len(source),
        preprocess=loaded.preprocess,
        input_shape=input_shape,
        ready=ready,
        device=device,
    )


def _input_shape(source: Source, reader: Reader, loaded: loading.LoadedModel) -> tuple[tuple[int, ...], bool]:
    """(channel, y, x) of the model's input, and whether images are inputs as they come.

    Looks at the first image that can be read, since a Dataset may give finished tensors of any shape.
    """
    preprocess = loaded.preprocess
    first: SampleError | None = None
    for row in range(min(len(source), 100)):
        try:
            image = reader.first(row)
            return tuple(image.pixels.shape), image.ready
        except SampleError as error:
            first = first or error
    if isinstance(preprocess, Preprocess) and preprocess.size is not None:
        return (len(preprocess.mean), *preprocess.size), False
    raise SourceError(f"none of the first images of {source.name} can be read. The first: {first}")


def _own_type(wanted: str, dtype: torch.dtype) -> list[str]:
    """What is to be said of a model in another type than float32. Raises ConfigError for a precision of float32."""
    if dtype == torch.float32:
        return []
    name = str(dtype).removeprefix("torch.")
    if wanted == "tf32" or (dtype == torch.float64 and wanted in precision.AUTOCAST):
        raise ConfigError(f"--precision {wanted}: the model is in {name}, which it does not change. Leave it out.")
    runs = f"autocast to {wanted}" if wanted in precision.AUTOCAST else "which precision fp32 means there"
    return [f"the model is in {name}: its inputs are cast to it, and it computes in it, {runs}"]


def _inspected(loaded: loading.LoadedModel, config: Config, sampler: Sampler, state: State) -> Inspection:
    device = sampler.device
    if device.type == "cpu":
        allocator.keep_freed_memory()
    with run_mode.as_written(loaded.module, device) as module:
        return inspection.inspect(
            module, loaded.forward, config.layers, sampler.input_shape, device, sampler.unlike, state
        )


def _random(reader: Reader, loaded: loading.LoadedModel, inspected: Inspection) -> str:
    """What is known of random numbers in a run, as its identity says it."""
    if reader.random or inspected.draws:
        return "seen"
    own_reducers = any(r is not None and not r.is_ours for r in inspected.reductions)
    return "not seen" if reader.may_draw or may_draw(loaded.module) or own_reducers else "none"
