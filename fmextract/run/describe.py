"""A model's layers as a forward pass uses them: what `fmextract layers` shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from fmextract.capture import probe, resolve, survey, taps
from fmextract.capture.inspection import failing_on, fields_of, noise, reduction, surveyed
from fmextract.capture.untouched import untouched
from fmextract.common import text
from fmextract.errors import SourceError
from fmextract.inputs import preprocessing
from fmextract.model import loading, run_mode
from fmextract.records import Field, ModuleRow, Preprocess

# --------------------------------------------------------------------------------------------- describe


class ModelLayers(tuple[ModuleRow, ...], text.Tabled):
    """A model's layers in the order of execution: a tuple of `ModuleRow`, which `print` shows as a table."""

    __slots__ = ()

    def table(self, width: int | None = None) -> str:
        """Return one line per layer, as `fmextract layers` shows it."""
        head = ("index", "path", "number", "type", "calls", "shape", "bytes/image", "sees", "note")
        lines = [
            (
                row.index if row.index >= 0 else "",
                row.path,
                row.number,
                row.type,
                row.calls if row.calls != 1 else "",
                text.shape(row.shape),
                text.byte_count(row.bytes) if row.bytes else "",
                text.seen(row.field) if row.field else "",
                row.refused or ("overwritten later; kept as it was" if row.overwritten else ""),
            )
            for row in self
        ]
        return text.table(head, lines, right=("index", "calls", "bytes/image", "sees"), width=width)

    def __repr__(self) -> str:
        return f"<ModelLayers: {text.count(len(self), 'row')}>"


def describe(
    model: Any,
    *,
    weights: str | None = None,
    preprocess: Any = "model",
    size: str | None = None,
    selectors: Sequence[str] = (),
) -> ModelLayers:
    """Every module of a model as a forward pass uses it: what `fmextract layers` shows. Downloads nothing by default.

    `model`: a name, built with random weights unless `weights` names others, or a module as it is, whose input is
    guessed (timm's configuration, else 224 x 224) where neither `preprocess` nor `size` says it.
    Rows in the order of execution (that in which calls end), modules that are never called last. A selector with a
    reducer gives the shape that would be stored. Raises ModelError, LayerError, SourceError, ConfigError.
    """
    if weights is None:
        weights = "default" if isinstance(model, torch.nn.Module) else "random:0"
    loaded = loading.load_model(model, weights, preprocess, size, without_photos=True)
    shape = input_shape(loaded, size, guess=isinstance(model, torch.nn.Module))
    if shape is None:
        raise SourceError("the input size is not known: give --size N (or HxW)")
    cpu = torch.device("cpu")
    with run_mode.as_written(loaded.module, cpu):
        seen = surveyed(loaded.module, loaded.forward, noise(shape, cpu))
        wanted = resolve.resolve(selectors or ["**", "."], seen)
        with failing_on(shape, loaded.module):
            probed, refused = probe.probe(loaded.module, loaded.forward, wanted, shape, cpu)
        fields = fields_of(loaded.module, loaded.forward, probed, shape, cpu)
    return ModelLayers(_module_rows(seen, wanted, probed, refused, fields, everything=not selectors))


def survey_model(loaded: loading.LoadedModel, shape: Sequence[int]) -> survey.Survey:
    """What one pass over noise of `shape` does, on the CPU; the model is as before afterwards. Raises LayerError."""
    cpu = torch.device("cpu")
    with untouched(loaded.module), run_mode.as_written(loaded.module, cpu):
        return surveyed(loaded.module, loaded.forward, noise(shape, cpu))


def input_shape(loaded: loading.LoadedModel, size: str | None, *, guess: bool = False) -> tuple[int, ...] | None:
    """Return (channel, y, x) of an input of a model that is only looked at, None where nothing says it.

    Where images are inputs as they are, `size` says it, or with `guess` the model's own configuration, else 224 x 224.
    """
    preprocess = loaded.preprocess
    if preprocess is None and (guess or size is not None):
        guessed = loading.guessed_input(loaded.module)
        preprocess = preprocessing.apply_size(guessed, size) if size is not None else guessed
    if not isinstance(preprocess, Preprocess) or preprocess.size is None:
        return None
    return (len(preprocess.mean), *preprocess.size)


def _module_rows(
    seen: survey.Survey,
    wanted: Sequence[taps.Tap],
    probed: Sequence[taps.Probed],
    refused: Sequence[taps.Refused],
    fields: Sequence[Field | None],
    everything: bool,
) -> list[ModuleRow]:
    known = {p.tap.name: p for p in probed}
    field_of = {p.tap.name: field for p, field in zip(probed, fields, strict=True)}
    why = {r.tap.name: r.why for r in refused}
    rows: list[ModuleRow] = []
    for tap in wanted:
        layer = known.get(tap.name)
        stored = layer and (reduction(layer) or layer)
        rows.append(
            ModuleRow(
                index=len(rows),
                path=tap.name,
                type=tap.module_type,
                number=tap.meant_by.number,
                calls=tap.calls,
                shape=stored.shape if stored else None,
                axes=stored.axes if stored else (),
                dtype=str(layer.dtype).removeprefix("torch.") if layer else "",
                bytes=math.prod(stored.shape) * layer.dtype.itemsize if layer and stored else 0,
                overwritten=layer.overwritten if layer else False,
                refused=why.get(tap.name, ""),
                field=field_of.get(tap.name),
            )
        )
    if everything:
        silent = [path for path in seen.types if path not in seen.counts]
        rows += [
            ModuleRow(-1, path, seen.types[path], "", 0, None, (), "", 0, False, seen.missed.get(path, "never called"))
            for path in silent
        ]
    return rows
