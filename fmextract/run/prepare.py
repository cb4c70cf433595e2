"""Before a run: open the source, lend and probe the model, resolve every `auto`, and write down the plan."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from fmextract.capture import blame, hooks, probe, receptive_fields, reducers, resolve, survey, taps
from fmextract.capture.compiled import CompiledCapture
from fmextract.capture.untouched import RANDOM, Key, State, untouched
from fmextract.common import allocator, devices, strict_json, text
from fmextract.common.devices import is_out_of_memory
from fmextract.common.facts import Told
from fmextract.common.folders import remembered
from fmextract.config import Config, is_single_file
from fmextract.errors import ConfigError, FmextractError, LayerError, SampleError, SourceError
from fmextract.inputs import device_jpegs, preprocessing
from fmextract.inputs.datasets import DatasetSource
from fmextract.inputs.reading import Reader, reading
from fmextract.inputs.sources import folder_of, notes_of, open_source
from fmextract.model import loading, norm_fusion, precision, run_mode
from fmextract.model.randomness import may_draw
from fmextract.pipeline import work
from fmextract.planning import Plan
from fmextract.records import Field, Preprocess, Progress, Source
from fmextract.run import provenance
from fmextract.storage import codecs

T = TypeVar("T")


LONGEST_NAMES = 60_000
"""An attribute of HDF5 holds 64 KiB: of more classes the names are not stored."""


FEW_PHOTOS = 2  # up to which number any of the source will do


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything a run needs to know of its source and model before it can be planned.

    The model is on `device`, in evaluation mode, and given back when the `prepare` block ends.
    """

    config: Config
    source: Source
    reader: Reader
    loaded: loading.LoadedModel
    device: torch.device
    input_shape: tuple[int, ...]
    ready: bool
    probed: tuple[taps.Probed, ...]
    reductions: tuple[reducers.Reduction | None, ...]
    fields: tuple[Field | None, ...]
    largest: int  # bytes of the largest tensor that a module gives for one image in fp32
    stop: taps.Event | None
    random: str  # whether anything that is random depends on the seed: as `_random` says
    notes: tuple[str, ...]
    before: Mapping[str, Told]  # what code and attributes were before the first forward pass

    def forward(self, batch: torch.Tensor) -> Any:
        """The model's forward pass."""
        return self.loaded.forward(batch)

    @property
    def capture_kind(self) -> type[hooks.Capture]:
        """How its passes are run: as the model is written, or compiled."""
        return CompiledCapture if self.config.compile else hooks.Capture

    @property
    def captured(self) -> tuple[work.Captured, ...]:
        """What each tap hands over once its reducer has run in the hook."""
        return tuple(map(_captured, self.probed, self.reductions))

    def captured_of(self, i: int) -> work.Captured:
        """What one of the taps hands over; `captured` makes that of all of them, each time it is asked."""
        return _captured(self.probed[i], self.reductions[i])


@contextmanager
def prepare(source: Any, model: Any, config: Config, progress: Progress) -> Iterator[Prepared]:
    """Open, build, survey, probe. Raises SourceError, ModelError, LayerError or ConfigError, each with what to do."""
    codecs.codec_named(config.codec).checked_level(config.level)
    where = devices.pick(config.device)
    if config.jpeg_decoder == "device":
        device_jpegs.device_decoder(where)  # before the model is built, which may take long
    if config.precision != "auto":
        precision.check(config.precision, where)
    opened = open_source(
        source,
        limit=config.limit,
        allow_outside=config.allow_outside,
        key=config.key,
        label=config.label,
        hidden=config.hidden,
    )
    loaded = loading.load_model(model, config.weights, config.preprocess, config.size)
    before = provenance.code_of(loaded)
    with (
        untouched(loaded.module) as found,
        reading(
            opened,
            loaded.preprocess,
            exif=config.exif,
            seed=config.seed,
            workers=config.dataset_workers,
            say=progress.note,
        ) as reader,
    ):
        yield _prepared(opened, reader, loaded, before, found, where, config, progress)


def _prepared(
    opened: Source,
    reader: Reader,
    loaded: loading.LoadedModel,
    before: Mapping[str, Told],
    found: State,
    where: torch.device,
    config: Config,
    progress: Progress,
) -> Prepared:
    input_shape, ready = _input_shape(opened, reader, loaded)
    if config.jpeg_decoder == "device":
        device_jpegs.check_fits_on_device(loaded.preprocess)
    own = _own_type(config.precision, loaded.input_dtype)
    if where.type == "cpu":
        allocator.keep_freed_memory()
    with run_mode.lent(loaded.module, where), precision.numerics("fp32", where):
        photos = partial(_photos, reader, len(opened), loaded, input_shape, ready, where)
        with found.guarded():
            probed, stop, largest, notes, usual = _probe(loaded, config.layers, input_shape, where, photos)
        reductions = tuple(_reduction(p) for p in probed)
        ended = State(loaded.module)
        fields = _fields(loaded, probed, reductions, stop, input_shape, where)
        if stop is not None and (left := ended.changed() - usual):
            ended.restore(left)
            places = text.some(sorted({place for place, _ in left}))
            notes.append(f"passes run to their end, where the model tidies up what it did to {places}")
            stop = None
    notes = [*own, *notes_of(opened), *notes]
    for note in notes:
        progress.note(note)
    return Prepared(
        config,
        opened,
        reader,
        loaded,
        where,
        input_shape,
        ready,
        probed,
        reductions,
        fields,
        largest,
        stop,
        _random(reader, loaded, reductions, usual),
        tuple(notes),
        before,
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


def _probe(
    loaded: loading.LoadedModel,
    selectors: Sequence[str],
    input_shape: tuple[int, ...],
    where: torch.device,
    photos: probe.Photos,
) -> tuple[tuple[taps.Probed, ...], taps.Event | None, int, list[str], set[Key]]:
    """(the layers, where a pass may end, the bytes of the largest tensor, notes, what a pass changes in the model)."""
    noise = _noise(input_shape, where)
    seen = surveyed(loaded, noise)
    before = State(loaded.module)  # what a first pass alone sets up is there now
    wanted, errors = resolve.found(selectors or resolve.default_selectors(loaded.module, seen), seen)
    probed: list[taps.Probed] = []
    refused: list[taps.Refused] = []
    notes: list[str] = []
    if wanted:
        with failing_on(input_shape, loaded.module):
            look = partial(probe.probe, loaded.module, loaded.forward, wanted, input_shape, where, tell=notes.append)
            probed, refused = _with_photos_or_without(look, photos, loaded.module, notes)
    notes += [f"left out {path!r}: {why}" for path, why in resolve.left_out(selectors, seen).items()]
    changed = before.changed()
    if probed and changed:
        with failing_on(input_shape, loaded.module):
            probed, changing = _steady(loaded, probed, changed, input_shape, where, photos, notes)
        refused += changing
        if probed and any(place == RANDOM for place, _ in changed):
            notes.append(
                "the model draws random numbers in its forward pass; what is stored was the same in many passes over"
                " the same images, which does not show what it does rarely"
            )
    for refusal in refused:
        if (selectors and refusal.tap.explicit) or not probed:
            errors.append(LayerError(f"layer {refusal.tap.name!r} cannot be stored row by row: {refusal.why}"))
        notes.append(f"left out {refusal.tap.name!r}: {refusal.why}")
    for one in probed:
        try:
            _reduction(one)
        except LayerError as error:
            errors.append(error)
    if errors:
        raise resolve.at_once(errors)
    largest = max(4 * math.prod(info.shape) // len(noise) for infos in seen.tensors.values() for info in infos)
    return tuple(probed), seen.stop_before([p.tap for p in probed]), largest, notes, changed


def _steady(
    loaded: loading.LoadedModel,
    probed: Sequence[taps.Probed],
    changed: Collection[Key],
    input_shape: tuple[int, ...],
    where: torch.device,
    photos: probe.Photos,
    notes: list[str],
) -> tuple[list[taps.Probed], list[taps.Refused]]:
    """The layers, without those that come out otherwise from one pass to the next in a model that a pass changes."""
    look = partial(probe.unsteady, loaded.module, loaded.forward, probed, input_shape, where)
    found = _with_photos_or_without(look, photos, loaded.module, notes)
    cause = "random numbers" if any(place == RANDOM for place, _ in changed) else "what the model remembers of others"
    why = f"its values change from one pass over the same images to the next, with {cause}"
    refused = [taps.Refused(one.tap, why) for i, one in enumerate(probed) if i in found]
    return [one for i, one in enumerate(probed) if i not in found], refused


def _random(
    reader: Reader, loaded: loading.LoadedModel, reductions: Sequence[reducers.Reduction | None], usual: set[Key]
) -> str:
    """What is known of random numbers in a run, as its identity says it. `usual`: what a pass changes in the model."""
    if reader.random or any(place == RANDOM for place, _ in usual):
        return "seen"
    users = reader.may_draw or may_draw(loaded.module) or any(r is not None and not r.is_ours for r in reductions)
    return "not seen" if users else "none"


def _own_type(wanted: str, dtype: torch.dtype) -> list[str]:
    """What is to be said of a model in another type than float32. Raises ConfigError for a precision of float32."""
    if dtype == torch.float32:
        return []
    name = str(dtype).removeprefix("torch.")
    if wanted == "tf32" or (dtype == torch.float64 and wanted in precision.AUTOCAST):
        raise ConfigError(f"--precision {wanted}: the model is in {name}, which it does not change. Leave it out.")
    runs = f"autocast to {wanted}" if wanted in precision.AUTOCAST else "which precision fp32 means there"
    return [f"the model is in {name}: its inputs are cast to it, and it computes in it, {runs}"]


def _with_photos_or_without(
    look: Callable[[probe.Photos | None], T], photos: probe.Photos, model: torch.nn.Module, notes: list[str]
) -> T:
    """A probe with images of the source; with noise alone where the model fails on one, which is a failed row's."""
    try:
        return look(photos)
    except Exception as error:
        if isinstance(error, FmextractError) or is_out_of_memory(error):
            raise
        why = blame.told(error, model)
    found = look(None)
    notes.append(f"{probe.ON_PHOTOS}, so that its layers were looked at with noise alone: {why}")
    return found


def _noise(input_shape: Sequence[int], where: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn((2, *input_shape), generator=generator, dtype=torch.float32).to(where)


def _fields(
    loaded: loading.LoadedModel,
    probed: Sequence[taps.Probed],
    reductions: Sequence[reducers.Reduction | None],
    stop: taps.Event | None,
    input_shape: tuple[int, ...],
    where: torch.device,
) -> tuple[Field | None, ...]:
    """Theoretical receptive fields of what each layer stores. Takes a pass to `stop`, of whatever shape the input."""
    if len(input_shape) != 3 and stop is not None:
        with hooks.tapped(loaded.module, probed, stop=stop) as capture:
            capture.forward(loaded.forward, _noise(input_shape, where))
    if len(input_shape) != 3:
        return (None,) * len(probed)
    noise = _noise(input_shape, where)

    def traced(batch: torch.Tensor) -> tuple[Field | None, ...]:
        return tuple(
            receptive_fields.trace_fields(loaded.module, loaded.forward, probed, batch, _kept(reductions), stop)
        )

    try:
        return traced(torch.zeros_like(noise))
    except Exception as error:
        if isinstance(error, FmextractError) or is_out_of_memory(error):
            raise
    with failing_on(input_shape, loaded.module):  # a model may refuse black images
        return traced(noise)


def _kept(reductions: Sequence[reducers.Reduction | None]) -> list[receptive_fields.Reduced | None]:
    return [None if r is None or not r.stores else (r.apply, r.axes) for r in reductions]


def survey_model(loaded: loading.LoadedModel, shape: Sequence[int]) -> survey.Survey:
    """What one pass over noise of `shape` does, on the CPU; the model is as before afterwards. Raises LayerError."""
    cpu = torch.device("cpu")
    with untouched(loaded.module), run_mode.lent(loaded.module, cpu), precision.numerics("fp32", cpu):
        return surveyed(loaded, _noise(tuple(shape), cpu))


def surveyed(loaded: loading.LoadedModel, noise: torch.Tensor) -> survey.Survey:
    with failing_on(noise.shape[1:], loaded.module):
        try:
            seen = survey.survey(loaded.module, loaded.forward, noise)
        except (FmextractError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # a model may refuse inputs beyond the range of photos
            noise = (noise / 4).clamp(-1, 1)
            try:
                seen = survey.survey(loaded.module, loaded.forward, noise)
            except Exception:
                raise error from None
        if {path for path, _ in loaded.module.named_modules() if path} <= seen.types.keys():
            return seen
        return survey.survey(loaded.module, loaded.forward, noise)  # the first pass has made modules


@contextmanager
def failing_on(shape: Sequence[int], model: torch.nn.Module) -> Iterator[None]:
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


def _reduction(probed: taps.Probed) -> reducers.Reduction | None:
    if not probed.tap.reducer:
        return None
    try:
        made = reducers.reduction(probed.tap.reducer, probed.shape, probed.axes)
        if not made.stores:
            _captured(probed, made)
        return made
    except LayerError as error:
        raise LayerError(f"layer {probed.tap.name!r}: {error}") from error


def lent(prepared: Prepared, made: Plan) -> AbstractContextManager[torch.nn.Module]:
    """The model as the plan runs it, for as long as the block lasts. Raises FormatError for pairs it does not have."""
    module = prepared.loaded.module
    mode = run_mode.Mode(made.memory_format, norm_fusion.pairs_at(module, made.fused), made.pooling, made.prepacked)
    return run_mode.lent(module, torch.device(made.device), made.precision, mode)


def captured_types(prepared: Prepared, made: Plan) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of what is stored of each layer, as a pass over two images shows that runs as planned."""
    inputs = precision.to_memory_format(sample_inputs(prepared, 2)[0], made.memory_format)
    with (
        lent(prepared, made) as module,
        precision.numerics(made.precision, prepared.device),
        hooks.tapped(module, copied_as_planned(prepared, made), reduce_functions(prepared), prepared.stop) as capture,
    ):
        rows = capture.forward(prepared.forward, inputs)
        stored = [t if c.finish is None else c.finish(t) for t, c in zip(rows, prepared.captured, strict=True)]
        return {
            p.tap.name: (str(t.dtype).removeprefix("torch."), tuple(t.shape[1:]))
            for p, t in zip(prepared.probed, stored, strict=True)
        }


def copied_as_planned(prepared: Prepared, made: Plan) -> list[taps.Probed]:
    """The taps, those marked as overwritten that the plan says are: in the run's precision as in fp32."""
    return [
        replace(probed, overwritten=layer.copied) for probed, layer in zip(prepared.probed, made.layers, strict=True)
    ]


def _images(source: Source, out: Path) -> dict[str, Any]:
    """Where the files of a source lie, for pictures that are drawn later."""
    folder = folder_of(source)
    base = out.parent if is_single_file(out) else out
    return {} if folder is None else {"images": remembered(folder, base)}


def _classes(source: Source) -> dict[str, Any]:
    """What the labels are called, where a Dataset says it."""
    names = source.label_names() if isinstance(source, DatasetSource) else ()
    known = strict_json.dumps(list(names), ensure_ascii=False)
    return {"label_names": known} if names and len(known.encode("utf-8", "replace")) < LONGEST_NAMES else {}


def _captured(probed: taps.Probed, reduction: reducers.Reduction | None) -> work.Captured:
    if reduction is None:
        return work.Captured(probed.shape, probed.axes)
    if reduction.stores:
        return work.Captured(reduction.shape, reduction.axes)
    # `=top`: statistics and positions are of the whole map, of which each channel's maximum is stored.
    return work.Captured(probed.shape, probed.axes, reducers.reduction("max", probed.shape, probed.axes).apply)


def reduce_functions(prepared: Prepared) -> list[Callable[[torch.Tensor], torch.Tensor] | None]:
    """What each tap's tensor becomes in the hook, None where it is kept whole."""
    return [r.apply if r is not None and r.stores else None for r in prepared.reductions]


def sample_inputs(prepared: Prepared, n: int) -> tuple[torch.Tensor, float]:
    """(`n` images spread over the source as inputs of the model, seconds that decoding one took on one core).

    Images that fail are passed over; where fewer can be read than are asked for, they are repeated.
    """
    made, seconds = _some_images(prepared.reader, len(prepared.source), prepared.input_shape, n)
    if not made:
        made = [torch.zeros(prepared.input_shape, dtype=torch.float32 if prepared.ready else torch.uint8)]
    made = [made[i % len(made)] for i in range(n)]
    batch = _as_inputs(made, prepared.loaded, prepared.ready, prepared.device)
    return batch, seconds


def _some_images(reader: Reader, rows: int, shape: Sequence[int], n: int) -> tuple[list[torch.Tensor], float]:
    """(the pixels of up to `n` images spread over the source that can be read, seconds that decoding one took)."""
    made: list[torch.Tensor] = []
    tried, started = 0, time.perf_counter()
    for row in _spread(rows, 4 * n):
        if len(made) == n:
            break
        tried += 1
        try:
            image = reader.image(row)
        except SampleError:
            continue
        if image.pixels.shape == tuple(shape):
            made.append(image.pixels)
    return made, (time.perf_counter() - started) / max(1, tried)


def _as_inputs(
    pixels: Sequence[torch.Tensor], loaded: loading.LoadedModel, ready: bool, where: torch.device
) -> torch.Tensor:
    batch = torch.stack(list(pixels)).to(where)
    if ready:
        return batch
    assert isinstance(loaded.preprocess, Preprocess)
    return preprocessing.normalise(batch, loaded.preprocess)


def _photos(
    reader: Reader,
    rows: int,
    loaded: loading.LoadedModel,
    shape: Sequence[int],
    ready: bool,
    where: torch.device,
    n: int,
) -> torch.Tensor:
    """Up to `n` images of the source as inputs of the model; those that are most unlike, where many are asked for."""
    made, _ = _some_images(reader, rows, shape, n if n <= FEW_PHOTOS else 4 * n)
    if not made:
        return torch.empty((0, *shape), device=where)
    return _most_unlike(_as_inputs(made, loaded, ready, where), n)


def _most_unlike(batch: torch.Tensor, n: int) -> torch.Tensor:
    """`n` of a batch: the first, and each time the one that is farthest from all that were taken."""
    flat = batch.flatten(1).double()
    taken = [0]
    away = (flat - flat[0]).norm(dim=1)
    while len(taken) < min(n, len(batch)):
        taken.append(int(away.argmax()))
        away = torch.minimum(away, (flat - flat[taken[-1]]).norm(dim=1))
    return batch[taken]


def _spread(rows: int, tries: int) -> list[int]:
    """Up to `tries` different rows, the first quarter of them spread evenly, as are the others between."""
    step = max(1, rows * 4 // tries)
    order = [start + offset for offset in range(0, step, max(1, step // 4)) for start in range(0, rows, step)]
    return [row for row in dict.fromkeys(order) if row < rows][:tries]


def describe_run(prepared: Prepared, out: Path, command: str | None = None) -> dict[str, Any]:
    """What the file says of a run into `out`, which `command` asked for."""
    loaded, source = prepared.loaded, prepared.source
    said = provenance.describe_run(loaded, source.name, len(source), ready=prepared.ready, command=command)
    return {**said, **_images(source, out), **_classes(source)}
