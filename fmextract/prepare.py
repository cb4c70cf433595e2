"""Before a run: open the source, lend and probe the model, resolve every `auto`, and write down the plan."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from fmextract import choose, estimate, planning, provenance
from fmextract.capture import blame, effective_fields, hooks, probe, receptive_fields, reducers, resolve, survey, taps
from fmextract.capture.compiled import CompiledCapture
from fmextract.capture.untouched import RANDOM, Key, State, untouched
from fmextract.common import allocator, devices, kernels, strict_json, text
from fmextract.common.devices import is_out_of_memory
from fmextract.common.facts import Told
from fmextract.common.folders import remembered
from fmextract.common.system import cores
from fmextract.config import Config, is_single_file
from fmextract.errors import ConfigError, FmextractError, LayerError, SampleError, SourceError
from fmextract.inputs import device_jpegs, preprocessing
from fmextract.inputs.datasets import DatasetSource
from fmextract.inputs.reading import Reader, reading
from fmextract.inputs.sources import folder_of, notes_of, open_source
from fmextract.model import loading, norm_fusion, precision, run_mode
from fmextract.model.modes import Subject
from fmextract.model.randomness import may_draw
from fmextract.pipeline import work, workers
from fmextract.planning import Plan
from fmextract.records import Field, LayerSpec, ModuleRow, Preprocess, Progress, Source
from fmextract.storage import codecs

T = TypeVar("T")


EFFECTIVE_IMAGES = 2  # photos that an effective receptive field is measured on


LONGEST_NAMES = 60_000
"""An attribute of HDF5 holds 64 KiB: of more classes the names are not stored."""


EFFECTIVE_SHARE = 0.04  # of a run that measuring may take


EFFECTIVE_SECONDS = 0.3  # that it may take of any run, however short


FEW_PHOTOS = 2  # up to which number any of the source will do


NEAR_ZERO = 0.01  # of the root mean square of a layer's values: what is not above it counts as near zero


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
    if config.decode == "device":
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
    if config.decode == "device":
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
    seen = _surveyed(loaded, noise)
    before = State(loaded.module)  # what a first pass alone sets up is there now
    wanted, errors = resolve.found(selectors or resolve.default_selectors(loaded.module, seen), seen)
    probed: list[taps.Probed] = []
    refused: list[taps.Refused] = []
    notes: list[str] = []
    if wanted:
        with _failing_on(input_shape, loaded.module):
            look = partial(probe.probe, loaded.module, loaded.forward, wanted, input_shape, where, tell=notes.append)
            probed, refused = _with_photos_or_without(look, photos, loaded.module, notes)
    notes += [f"left out {path!r}: {why}" for path, why in resolve.left_out(selectors, seen).items()]
    changed = before.changed()
    if probed and changed:
        with _failing_on(input_shape, loaded.module):
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
    with _failing_on(input_shape, loaded.module):  # a model may refuse black images
        return traced(noise)


def _kept(reductions: Sequence[reducers.Reduction | None]) -> list[receptive_fields.Reduced | None]:
    return [None if r is None or not r.stores else (r.apply, r.axes) for r in reductions]


def survey_model(loaded: loading.LoadedModel, shape: Sequence[int]) -> survey.Survey:
    """What one pass over noise of `shape` does, on the CPU; the model is as before afterwards. Raises LayerError."""
    cpu = torch.device("cpu")
    with untouched(loaded.module), run_mode.lent(loaded.module, cpu), precision.numerics("fp32", cpu):
        return _surveyed(loaded, _noise(tuple(shape), cpu))


def _surveyed(loaded: loading.LoadedModel, noise: torch.Tensor) -> survey.Survey:
    with _failing_on(noise.shape[1:], loaded.module):
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
def _failing_on(shape: Sequence[int], model: torch.nn.Module) -> Iterator[None]:
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
    inputs = precision.to_memory_format(_sample_inputs(prepared, 2)[0], made.memory_format)
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


# ----------------------------------------------------------------------------------------------- plan


def plan_for(
    prepared: Prepared,
    out: Path,
    progress: Progress,
    asked: Mapping[str, Any] | None = None,
    command: str | None = None,
) -> Plan:
    """What a run of `prepared` into `out` will do. Measures what `auto` leaves open, and what the run will cost.

    `asked` is its identity, if that is known; `command` the line that asked for it.
    """
    config, rows = prepared.config, len(prepared.source)
    chosen = choose.choose(
        choose.Question(
            subject=_subject(prepared),
            inputs=lambda n: _sample_inputs(prepared, n)[0],
            precision=_asked(prepared),
            max_error=config.max_error,
            memory_format=config.memory_format,
            batch_size=config.batch_size,
            compile=config.compile,
            rows=rows,
        )
    )
    sizes, left_out = _effective_sizes(prepared, chosen, progress)
    layers = tuple(_layer_spec(prepared, i, chosen, rows, sizes) for i in range(len(prepared.probed)))
    level = codecs.codec_named(config.codec).checked_level(config.level)
    threads = config.workers or cores()
    reading_seconds, decoding_seconds = _decoding(prepared, threads)
    cost = _estimate(prepared, chosen, layers, level, threads, decoding_seconds)
    needed = planning.rows_of_shard(cost, rows, config.shard_size, is_single_file(out))
    said = identity(prepared) if asked is None else asked
    layers = tuple(planning.within_shard(layer, needed) for layer in layers)
    shard_rows = planning.shard_length(layers, chosen.batch_size, rows, needed)
    free = estimate.free_space(out)
    stored, needed = _on_disk(cost, layers, -(-rows // shard_rows), out)
    cost = replace(cost, bytes_stored=stored, bytes_needed=needed, bytes_free=free)
    left_out += _without_statistics(prepared)
    left_out += _slow_reading(prepared, reading_seconds, chosen.seconds_per_image)
    notes = [*chosen.notes, *left_out, *_not_compiled(prepared.device), *estimate.advice(layers, cost, rows, free)]
    for note in notes:
        progress.note(note)
    return Plan(
        run_id=uuid.uuid4().hex,
        rows=rows,
        layers=layers,
        precision=chosen.precision,
        memory_format=chosen.mode.memory_format,
        fused=norm_fusion.paths_of(prepared.loaded.module, chosen.mode.fused),
        pooling=chosen.mode.pooling,
        prepacked=chosen.mode.prepacked,
        batch_size=chosen.batch_size,
        device=str(prepared.device),
        threads=threads,
        forward_threads=torch.get_num_threads(),
        codec=config.codec,
        level=level,
        store=config.store,
        keep_bits=config.keep_bits,
        clip=config.clip,
        top=config.top,
        shard_rows=shard_rows,
        identity=said,
        config=config.as_json(),
        info=describe_run(prepared, out, command),
        versions=provenance.versions_for(said),
        estimate=cost,
        notes=(*prepared.notes, *prepared.reader.notes, *notes),
    )


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


def _asked(prepared: Prepared) -> str:
    """The precision to choose: of a model in another type than float32 its own, if none is named."""
    own = prepared.loaded.input_dtype != torch.float32
    return "fp32" if own and prepared.config.precision == "auto" else prepared.config.precision


def _subject(prepared: Prepared) -> Subject:
    return Subject(
        module=prepared.loaded.module,
        forward=prepared.forward,
        device=prepared.device,
        probed=prepared.probed,
        reducers=reduce_functions(prepared),
        stop=prepared.stop,
    )


def _without_statistics(prepared: Prepared) -> list[str]:
    """A note on the layers that have no axis of channels."""
    pairs = zip(prepared.probed, prepared.captured, strict=True)
    names = [probed.tap.name for probed, captured in pairs if not {"channel", "feature"} & set(captured.axes)]
    if not names:
        return []
    of = f"{len(names)} of {len(prepared.probed)} layers"
    return [f"no statistics of {of}, in which no axis of channels is known: {text.some(names)}"]


def _not_compiled(where: torch.device) -> list[str]:
    if where.type != "cpu" or kernels.are_there():
        return []
    why = "statistics and encoding take longer than they need, as fmextract was installed without a C compiler"
    return [f"{why}; with gcc or clang on the path, install it again (by pip with --no-cache-dir)"]


def _estimate(
    prepared: Prepared, chosen: choose.Chosen, layers: Sequence[LayerSpec], level: int, threads: int, decode: float
) -> planning.Estimate:
    config = prepared.config
    stored_values = [
        tensor if captured.finish is None else captured.finish(tensor)
        for tensor, captured in zip(chosen.sample, prepared.captured, strict=True)
    ]
    stored, encode = estimate.encode_sample(layers, stored_values, config.codec, level, config.keep_bits)
    statistics = estimate.describe_sample(layers, prepared.captured, chosen.sample, config.top)
    costs = estimate.Costs(decode, chosen.seconds_per_image, statistics, encode, stored)
    return estimate.estimate(
        layers,
        len(prepared.source),
        chosen.batch_size,
        threads,
        costs,
        device=prepared.device.type,
        largest=prepared.largest,
        kept=_kept_bytes(prepared, chosen) + prepared.reader.workers * estimate.DATASET_PROCESS,
        processes=partial(workers.are_processes, threads, config.worker_kind),
    )


def _decoding(prepared: Prepared, threads: int) -> tuple[float, float]:
    """Seconds an image that the user's code takes by itself, and that all of decoding would, shared by `threads`."""
    reader = prepared.reader
    before = reader.seconds
    seconds = _sample_inputs(prepared, 4)[1]
    alone = min(seconds, (reader.seconds - before) / 4) / max(1, reader.workers) if reader.serial else 0.0
    return alone, seconds - alone * max(1, reader.workers) + alone * threads


def _slow_reading(prepared: Prepared, seconds: float, forward: float) -> list[str]:
    """What to do where the user's code takes longer than the forward pass, and the run is long enough for it."""
    if prepared.reader.workers or seconds < forward or seconds * len(prepared.source) < workers.WORTH:
        return []
    pace = f"at {seconds * 1000:.3g} ms an image; the forward pass takes {forward * 1000:.3g} ms"
    what_to_do = "--dataset-workers N reads it in N processes, threads do where its class says thread_safe = True"
    return [f"one thread reads {prepared.source.name}, {pace}. {what_to_do}"]


def _on_disk(cost: planning.Estimate, layers: Sequence[LayerSpec], shards: int, out: Path) -> tuple[int, int]:
    """Bytes of the output, and bytes that must be free for it: several shards become one file beside them."""
    if shards == 1:
        return cost.bytes_stored, cost.bytes_stored
    parts = cost.bytes_stored + shards * estimate.shared_bytes(layers)
    return (cost.bytes_stored, parts + cost.bytes_stored) if is_single_file(out) else (parts, parts)


def _kept_bytes(prepared: Prepared, chosen: choose.Chosen) -> int:
    """Host memory that a run holds all the time: weights laid out or cast anew, and what was captured of the sample."""
    state = prepared.loaded.module.state_dict().values()
    weights = sum(t.numel() * t.element_size() for t in state if isinstance(t, torch.Tensor) and not is_lazy(t))
    as_it_is = chosen.mode in (run_mode.PLAIN, run_mode.Mode(pooling=True))
    # Twice: the reference in fp32 lives beside what the chosen precision captured.
    sample = 2 * sum(4 * t.numel() for t in chosen.sample)
    return sample + (0 if as_it_is else weights)


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


def _sample_inputs(prepared: Prepared, n: int) -> tuple[torch.Tensor, float]:
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


# How a tensor of the forward pass lies on disk. Everything of half precision is widened, exactly.
_ON_DISK = {
    torch.float32: "float32",
    torch.bfloat16: "float32",
    torch.float16: "float32",
    torch.float64: "float64",
    torch.bool: "uint8",
    torch.uint8: "uint8",
    torch.int8: "int8",
    torch.int16: "int16",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.uint16: "uint16",
    torch.uint32: "uint32",
    torch.uint64: "uint64",
}


def _effective_sizes(
    prepared: Prepared, chosen: choose.Chosen, progress: Progress
) -> tuple[Sequence[float | None], list[str]]:
    """(effective receptive fields, a note where they were left out): three passes a layer and image.

    `auto` measures them where that is short, or small beside the run: on one image if it must be.
    """
    spatial = sum({"y", "x"} <= set(p.axes) for p in prepared.probed)
    none: list[float | None] = [None] * len(prepared.probed)
    if not spatial or len(prepared.input_shape) != 3 or prepared.config.effective_fields == "never":
        return none, []
    seconds = math.inf
    if prepared.config.effective_fields == "auto":
        run, cost = len(prepared.source) * chosen.seconds_per_image, 3 * spatial * chosen.seconds_per_image
        seconds = max(EFFECTIVE_SHARE * run, EFFECTIVE_SECONDS)
        if cost > seconds:
            why = f"they would take {cost:.0f} s or more" if cost >= 1 else "the run is short"
            return none, [f"effective receptive fields are not measured, as {why}; --effective-fields always does it"]
    failures: list[str] = []
    with run_mode.lent(prepared.loaded.module, prepared.device), precision.numerics("fp32", prepared.device):
        inputs, _ = _sample_inputs(prepared, EFFECTIVE_IMAGES)
        sizes = effective_fields.effective_sizes(
            prepared.loaded.module,
            prepared.forward,
            prepared.probed,
            prepared.fields,
            inputs,
            reductions=_kept(prepared.reductions),
            stop=prepared.stop,
            seconds=seconds,
            tell=failures.append,
            step=partial(progress.step, "effective receptive fields"),
        )
    captured = zip(prepared.probed, prepared.captured, sizes, strict=True)
    without = [p.tap.name for p, c, size in captured if size is None and {"y", "x"} <= set(c.axes)]
    why = failures[0] if failures else "the model has no gradient there"
    return sizes, [f"no effective receptive field of {text.some(without)}: {why}"] if without else []


def _layer_spec(
    prepared: Prepared, i: int, chosen: choose.Chosen, rows: int, erf_sizes: Sequence[float | None]
) -> LayerSpec:
    probed, captured, config = prepared.probed[i], prepared.captured_of(i), prepared.config
    sample = chosen.sample[i] if captured.finish is None else captured.finish(chosen.sample[i])
    dtype = sample.dtype
    if dtype not in _ON_DISK:
        raise LayerError(f"layer {probed.tap.name!r}: values of type {dtype} cannot be stored")
    on_disk = _stored_type(dtype, config.store)
    shape = tuple(sample.shape[1:])
    known = known_of_layer(prepared, i)
    return LayerSpec(
        **known,
        shape=shape,
        dtype=on_disk,
        compute_dtype=str(dtype).removeprefix("torch."),
        chunk=planning.chunk_shape(shape, known["axes"], np.dtype(on_disk).itemsize, rows),
        copied=probed.overwritten or i in chosen.overwritten,
        rel_error=chosen.rel_errors[i],
        erf_size=erf_sizes[i] if {"y", "x"} <= set(captured.axes) else None,
        near_zero_below=_near_zero_below(chosen.sample[i]) if {"channel", "feature"} & set(captured.axes) else None,
    )


def known_of_layer(prepared: Prepared, i: int) -> dict[str, Any]:
    """The fields of a layer's LayerSpec that nothing has to be measured for."""
    tap, captured = prepared.probed[i].tap, prepared.captured_of(i)
    return {
        "name": tap.name,
        "module": tap.module,
        "module_type": tap.module_type,
        "call": tap.number,
        "calls": tap.calls,
        "number": tap.numbers,
        "tap": tap.tap,
        "member": tap.member,
        "reducer": tap.reducer,
        "axes": captured.axes if captured.finish is None else ("feature",),
        "field": prepared.fields[i] if {"y", "x"} <= set(captured.axes) else None,
    }


def _stored_type(dtype: torch.dtype, store: str) -> str:
    on_disk = _ON_DISK[dtype]
    return "float16" if store == "float16" and on_disk == "float32" else on_disk


def type_on_disk(compute_dtype: str, store: str) -> str | None:
    """How what was computed in a type (torch's name) is stored; None where that is no type of a layer."""
    dtype = getattr(torch, compute_dtype, None)
    return _stored_type(dtype, store) if dtype in _ON_DISK else None


def _near_zero_below(sample: torch.Tensor) -> float | None:
    """The bound of what counts as near zero, from what was captured of a few images; None where that says nothing.

    In the precision of float32, in which most values are compared with it.
    """
    squares, count = 0.0, 0
    for image in sample:
        values = image.cpu().double()
        if not math.isfinite(square := float(values.square().sum())):
            values = values[values.isfinite()]
            square = float(values.square().sum())
        squares, count = squares + square, count + values.numel()
    bound = float(np.float32(NEAR_ZERO * math.sqrt(squares / count))) if count and math.isfinite(squares) else math.inf
    return bound if math.isfinite(bound) else None


def identity(prepared: Prepared) -> dict[str, Any]:
    """What must be the same for a run to be taken up again: everything that decides a stored value."""
    config, loaded = prepared.config, prepared.loaded
    source = dict(prepared.source.fingerprint())
    code, not_covered = provenance.code_facts(prepared.before, provenance.code_of(loaded), prepared.reductions, source)
    return {
        "model": loaded.name,
        "weights": loaded.weights_sha256,
        "preprocess": preprocessing.describe_preprocess(loaded.preprocess),
        "input_shape": list(prepared.input_shape),
        "exif": config.exif,
        "decode": config.decode,
        "layers": [p.tap.name for p in prepared.probed],
        "precision": config.precision,
        "memory_format": config.memory_format,
        "compile": config.compile,
        "batch_size": config.batch_size,
        "device": prepared.device.type,
        "store": config.store,
        "clip": config.clip,
        "keep_bits": config.keep_bits,
        "codec": config.codec,
        "level": config.level,
        "top": config.top,
        "seed": config.seed,
        "random": prepared.random,
        "max_error": config.max_error if config.precision == "auto" else None,
        "source": {name: value for name, value in source.items() if name not in ("packages", "not_covered")},
        "code": code,
        "not_covered": not_covered,
    }


def describe_run(prepared: Prepared, out: Path, command: str | None = None) -> dict[str, Any]:
    """What the file says of a run into `out`, which `command` asked for."""
    loaded, source = prepared.loaded, prepared.source
    said = provenance.describe_run(loaded, source.name, len(source), ready=prepared.ready, command=command)
    return {**said, **_images(source, out), **_classes(source)}


# --------------------------------------------------------------------------------------------- describe


def describe(
    model: Any,
    *,
    weights: str | None = None,
    preprocess: Any = "model",
    size: str | None = None,
    selectors: Sequence[str] = (),
) -> list[ModuleRow]:
    """Every module of a model as a forward pass uses it: what `fmextract layers` shows. Downloads nothing by default.

    `model`: a name, built with random weights unless `weights` names others, or a module as it is, whose input is
    guessed (timm's configuration, else 224 x 224) where neither `preprocess` nor `size` says it.
    Rows in the order of execution (that in which calls end), modules that are never called last. A selector with a
    reducer gives the shape that would be stored. Raises ModelError, LayerError, SourceError, ConfigError.
    """
    if weights is None:
        weights = "default" if isinstance(model, torch.nn.Module) else "random:0"
    loaded = loading.load_model(model, weights, preprocess, size)
    shape = _described_input(loaded, model, size)
    cpu = torch.device("cpu")
    with run_mode.lent(loaded.module, cpu), precision.numerics("fp32", cpu):
        seen = _surveyed(loaded, _noise(shape, cpu))
        wanted = resolve.resolve(selectors or ["**", "."], seen)
        with _failing_on(shape, loaded.module):
            probed, refused = probe.probe(loaded.module, loaded.forward, wanted, shape, cpu)
    return _module_rows(seen, wanted, probed, refused, everything=not selectors)


def _described_input(loaded: loading.LoadedModel, model: Any, size: str | None) -> tuple[int, ...]:
    """(channel, y, x) of an input of a model that is only looked at."""
    preprocess = loaded.preprocess
    if preprocess is None and isinstance(model, torch.nn.Module):
        guessed = loading.guessed_input(model)
        preprocess = preprocessing.apply_size(guessed, size) if size is not None else guessed
    if not isinstance(preprocess, Preprocess) or preprocess.size is None:
        raise SourceError("the input size is not known: give --size N (or HxW)")
    return (len(preprocess.mean), *preprocess.size)


def _module_rows(
    seen: survey.Survey,
    wanted: Sequence[taps.Tap],
    probed: Sequence[taps.Probed],
    refused: Sequence[taps.Refused],
    everything: bool,
) -> list[ModuleRow]:
    known = {p.tap.name: p for p in probed}
    why = {r.tap.name: r.why for r in refused}
    rows: list[ModuleRow] = []
    for tap in wanted:
        found = known.get(tap.name)
        stored = found and (_reduction(found) or found)
        rows.append(
            ModuleRow(
                index=len(rows),
                path=tap.name,
                type=tap.module_type,
                number=tap.numbers,
                calls=tap.calls,
                shape=stored.shape if stored else None,
                axes=stored.axes if stored else (),
                dtype=str(found.dtype).removeprefix("torch.") if found else "",
                bytes=math.prod(stored.shape) * found.dtype.itemsize if found and stored else 0,
                overwritten=found.overwritten if found else False,
                refused=why.get(tap.name, ""),
            )
        )
    if everything:
        silent = [path for path in seen.types if path not in seen.counts]
        rows += [
            ModuleRow(-1, path, seen.types[path], "", 0, None, (), "", 0, False, seen.missed.get(path, "never called"))
            for path in silent
        ]
    return rows
