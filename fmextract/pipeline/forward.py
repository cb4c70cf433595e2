"""Forward passes over the batches of a run: in pieces that memory has room for, image by image where one makes it fail.

Position and neighbours never change a bit of a row, so however a batch is run, its rows come out the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from fmextract.capture import blame
from fmextract.common.devices import TOO_SMALL, is_out_of_memory, lost
from fmextract.errors import CaptureError, ConfigError, DeviceLost, SampleError
from fmextract.inputs import preprocessing
from fmextract.model.precision import to_memory_format
from fmextract.pipeline.work import Tally, Work
from fmextract.records import Preprocess, SampleTable, Status


class ForwardPasses:
    """The model of a run. `batch_size` is that of its passes: the plan's, until memory forces a smaller one."""

    def __init__(self, work: Work, tally: Tally) -> None:
        self._work, self._tally = work, tally
        self.batch_size = work.plan.batch_size

    def over(
        self, pixels: torch.Tensor, rows: range, samples: SampleTable, before: Callable[[], None]
    ) -> Iterator[tuple[range, list[torch.Tensor]]]:
        """(some of `rows`, their captured tensors), until all have come; `before` is called before each pass.

        `pixels` are those of a whole batch on the device, black beyond `rows`. An image that makes the model raise is a
        failed row in `samples`, and its values are of no meaning. Raises DeviceLost, CaptureError or ConfigError for
        what no image is to blame for.
        """
        inputs = self._inputs(pixels)
        at = 0
        while at < len(rows):
            piece = slice(at, at + self.batch_size)
            some = rows[piece]
            before()
            try:
                tensors = self._forward(inputs[piece], some, samples, partial(self._inputs, pixels, piece))
            except (torch.OutOfMemoryError, MemoryError) as error:
                self._halve(error)
                tensors = None
            if tensors is None:  # only here: the error holds on to the frames of the pass, and they to its activations
                inputs = self._inputs(pixels)
                continue
            at += len(some)
            yield some, [tensor[: len(some)] for tensor in tensors]

    def _inputs(self, pixels: torch.Tensor, piece: slice = slice(None)) -> torch.Tensor:
        if self._work.ready:
            inputs = pixels.clone()
        else:
            assert isinstance(self._work.preprocess, Preprocess)
            inputs = preprocessing.normalise(pixels, self._work.preprocess)
        return to_memory_format(inputs, self._work.plan.memory_format)[piece]

    def _halve(self, error: BaseException) -> None:
        if self.batch_size == 1:
            raise DeviceLost(TOO_SMALL.format(error)) from error
        self.batch_size = (self.batch_size + 1) // 2

    def _forward(
        self, inputs: torch.Tensor, rows: range, samples: SampleTable, again: Callable[[], torch.Tensor]
    ) -> list[torch.Tensor]:
        """The captured tensors. `again` makes the inputs once more: a model may write into them before it fails."""
        try:
            return self._pass(inputs)
        except (CaptureError, ConfigError, torch.OutOfMemoryError, MemoryError):  # a ConfigError: it cannot be compiled
            raise
        except Exception as error:
            _raise_if_no_image_is_to_blame(error)
            why = blame.told(error, self._work.model)
        # Only here: the error holds on to the frames of the pass, and they to its activations.
        return self._one_by_one(again(), rows, samples, why)

    def _one_by_one(self, inputs: torch.Tensor, rows: range, samples: SampleTable, why: str) -> list[torch.Tensor]:
        """The batch made the model raise: run each image among black ones, and fail those that raise alone.

        Raises MemoryError, DeviceLost or CaptureError for what no image is to blame for.
        """
        neutral = torch.zeros_like(inputs)
        try:
            merged = [t.clone() for t in self._pass(neutral.clone())]
        except Exception as error:
            _raise_if_no_image_is_to_blame(error)
            raise CaptureError(
                f"the model fails on any input from row {rows.start} on, also on black images, though it did not before"
                f" the run: {why} What is done is kept."
            ) from error
        for i, row in enumerate(rows):
            if samples.status[row - samples.start] != Status.OK:
                continue
            alone = neutral.clone()
            alone[i] = inputs[i]
            try:
                tensors = self._pass(alone)
            except CaptureError:
                raise
            except Exception as its:  # whatever else a model raises for this one image is that image's verdict
                _raise_if_no_image_is_to_blame(its)
                verdict = SampleError(Status.FORWARD_FAILED, f"{type(its).__name__}: {its}")
                self._tally.fail(samples, row, verdict)
                continue
            for kept, tensor in zip(merged, tensors, strict=True):
                kept[i] = tensor[i]
        return merged

    def _pass(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        return self._work.capture.forward(self._work.forward, inputs)


def _raise_if_no_image_is_to_blame(error: Exception) -> None:
    """MemoryError for memory that ran out, of which smaller batches need less; DeviceLost for a device that failed."""
    if is_out_of_memory(error):
        raise MemoryError(str(error)) from error
    if (told := lost(error)) is not None:
        raise told from error
