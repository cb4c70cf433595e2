"""The probe: small batches run through a model to learn where the rows of each wanted tensor are, and what it is.

Shapes propose where the batch is in a tensor, values decide. A tap whose rows would not belong to one image each is
refused. What is overwritten after a hook saw it is found out, and what each axis means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch
from torch import nn

from fmextract.axes import AxisTracer
from fmextract.capture.atoms import image_axes, name_axes, without_batch
from fmextract.errors import CaptureError
from fmextract.taps import ROOT, Forward, Hooks, Probed, Refused, RowLayout, Tap, is_plain, plain

_SAMPLED = 1 << 14  # values of a row that are compared: more than enough to tell two images apart

Layouts = Mapping[int, Sequence["RowLayout"]]


class _Watch:
    """One forward pass over `batch` with every wanted tensor watched.

    Of each it takes samples in the hook, since what is written later is lost: of the whole, to see whether that
    happens, and of its rows, in each of the layouts that are given or, where they are not, that the survey's shape and
    this one allow.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        taps: Sequence[Tap],
        batch: torch.Tensor,
        layouts: Layouts | None = None,
    ) -> None:
        self.tensors: dict[int, torch.Tensor] = {}
        self.shapes: dict[int, tuple[int, ...]] = {}
        self.flaws: dict[int, str] = {}
        self.layouts: dict[int, Sequence[RowLayout]] = {}
        self.rows: dict[tuple[int, RowLayout], list[torch.Tensor]] = {}
        self._taps, self._given, self._images = taps, layouts, len(batch)
        self._before: dict[int, tuple[int, torch.Tensor]] = {}
        hooks = Hooks(taps, self._take)
        with hooks.on(model), torch.no_grad():
            hooks.run(forward, batch)
        self.counts = hooks.counts

    def _take(self, i: int, tensor: torch.Tensor | None) -> None:
        flaw = _flaw(tensor)
        if tensor is None or flaw:
            self.flaws[i] = flaw
            return
        self.tensors[i], self.shapes[i] = tensor, tuple(tensor.shape)
        self._before[i] = (-1 if tensor.is_inference() else tensor._version, _sampled(tensor))
        if self._given is None:
            self.layouts[i] = _proposed_layouts(self._taps[i].shape, self.shapes[i])
        else:
            self.layouts[i] = self._given.get(i, ())
        for layout in self.layouts[i]:
            with suppress(CaptureError):  # another shape than proposed: `_judge` says so
                rows = layout.rows_first(plain(tensor), self._images)
                self.rows[i, layout] = [_sampled(row) for row in rows]

    def overwritten(self) -> set[int]:
        """Taps whose tensor was written after the hook saw it: by its version counter, or by its values.

        The values also show writes through `.data` or foreign memory, which leave the counter as it was.
        """
        return {i for i, (version, sample) in self._before.items() if _changed(self.tensors[i], version, sample)}

    def lasting(self, earlier: _Watch) -> set[int]:
        """Taps whose memory an earlier pass used too, though its tensors are still alive: a buffer of the model's own.

        What is kept of it must be copied, since the next pass writes it while this one's values are on their way.
        """
        used = {_storage(tensor) for tensor in earlier.tensors.values()} - {0}
        return {i for i, tensor in self.tensors.items() if _storage(tensor) in used}


def _changed(tensor: torch.Tensor, version: int, sample: torch.Tensor) -> bool:
    if tensor.is_inference() or tensor._version != version:
        return True
    return not torch.equal(_sampled(tensor).nan_to_num(), sample.nan_to_num())


def _flaw(tensor: torch.Tensor | None) -> str:
    """Why the values cannot be stored, "" where they can."""
    if tensor is None:
        return "it is not a tensor in every forward pass"
    if not is_plain(tensor):
        return "it is a sparse or nested tensor"
    if tensor.is_complex():
        return "its values are complex; a module that gives view_as_real or abs of them can be stored"
    return ""


def _storage(tensor: torch.Tensor) -> int:
    """The address of its memory; 0 where it has none."""
    return tensor.untyped_storage().data_ptr()


def _sampled(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of some _SAMPLED values spread over the tensor, in float32 or wider."""
    flat = plain(tensor.detach()).reshape(-1)
    flat = flat[:: max(1, flat.numel() // _SAMPLED)]
    return flat.to(torch.float64 if flat.dtype == torch.float64 else torch.float32, copy=True)


def probe(
    model: nn.Module, forward: Forward, taps: Sequence[Tap], image_shape: Sequence[int], device: torch.device
) -> tuple[list[Probed], list[Refused]]:
    """Decide for each tap where its rows are, what its axes mean and whether it is overwritten later.

    Four noise images run as (A, B), (B, C, A) and (D, C, B). Shapes at the two batch sizes propose the axis of the
    batch; values decide, since each image must come out the same at any place among any neighbours.
    `image_shape` is (channel, y, x). The model must already be in the mode in which it will run, and runs in its own
    precision under `no_grad`.
    """
    noise = _distinct_noise(image_shape, device)
    three = _Watch(model, forward, taps, noise[[1, 2, 0]])
    with AxisTracer() as tracer:
        traced = noise[[3, 2, 1]]
        tracer.seed(traced, image_axes(traced.shape))
        others = _Watch(model, forward, taps, traced, three.layouts)
    copied = three.overwritten() | others.overwritten() | others.lasting(three)
    traces = {i: tracer.axes(tensor) for i, tensor in others.tensors.items()}
    dtypes = {i: torch.float32 if t.is_quantized else t.dtype for i, t in others.tensors.items()}
    for watch in (three, others):  # activations of whole images: not kept longer than needed
        watch.tensors.clear()
    pair = _Watch(model, forward, taps, noise[[0, 1]], three.layouts)
    copied |= pair.overwritten()
    probed: list[Probed] = []
    refused: list[Refused] = []
    for i, tap in enumerate(taps):
        layout = _judge(tap, i, pair, three, others)
        if isinstance(layout, Refused):
            refused.append(layout)
            continue
        shape = tuple(layout.rows_first(torch.empty(others.shapes[i], device="meta"), 3).shape[1:])
        per_image = without_batch(traces[i], layout.axis, layout.k, layout.outer)
        axes = _defined(model, tap, layout, name_axes(per_image, len(shape)))
        probed.append(Probed(tap, layout, shape, axes, dtypes[i], overwritten=i in copied))
    return probed, refused


def _defined(model: nn.Module, tap: Tap, layout: RowLayout, axes: tuple[str, ...]) -> tuple[str, ...]:
    """`axes` with the channel where the definition of a convolution or a batch norm puts it, if they were lost."""
    if tap.tap != "out" or tap.path or layout != RowLayout(0) or not all(name.startswith("axis_") for name in axes):
        return axes
    module = model if tap.module == ROOT else model.get_submodule(tap.module)
    if not axes or not {cls.__name__ for cls in type(module).__mro__} & {"_ConvNd", "_NormBase"}:
        return axes
    return ("channel", *axes[1:]) if len(axes) > 1 else ("feature",)


def _distinct_noise(image_shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """Four images that even a network of random weights keeps apart: other noise, contrast, colour and gradient."""
    generator = torch.Generator().manual_seed(20_240_229)
    noise = torch.randn((4, *image_shape), generator=generator, dtype=torch.float32)
    ramp = torch.linspace(-1, 1, image_shape[-1], dtype=torch.float32)
    for i, (contrast, tilt) in enumerate([(0.4, 1.5), (1.0, -1.0), (1.6, 0.2), (0.7, -0.4)]):
        noise[i] = noise[i] * contrast + tilt * ramp
        noise[i, i % image_shape[0]] += 1.5
    return noise.to(device)


def overwritten(model: nn.Module, forward: Forward, taps: Sequence[Tap], batch: torch.Tensor) -> set[int]:
    """Indices of the taps whose tensor is written in place after the hook saw it, in a pass over `batch`.

    Asked again in the precision of the run: what autocast copies in one precision it may not in another.
    """
    return _Watch(model, forward, taps, batch).overwritten()


def _judge(tap: Tap, i: int, pair: _Watch, three: _Watch, others: _Watch) -> RowLayout | Refused:
    """The layout of one tap's rows, from what it was in the passes over (A, B), (B, C, A) and (D, C, B)."""
    passes = (pair, three, others)
    counts = [tap.calls, *(watch.counts[tap.module, tap.tap] for watch in passes)]
    if len(set(counts)) > 1:
        times = ", ".join(map(str, counts))
        return Refused(tap, f"{tap.module!r} is called a varying number of times: {times} times in four forward passes")
    flaw = next((watch.flaws[i] for watch in passes if i in watch.flaws), "")
    if flaw:
        return Refused(tap, flaw)
    two, shape = tap.shape, three.shapes[i]
    if not three.layouts[i]:
        return Refused(tap, f"its shape does not follow the batch: {two} for 2 images and {shape} for 3")
    for watch, usual, images in ((pair, two, 2), (others, shape, 3)):
        if watch.shapes[i] != usual:
            return Refused(tap, f"its shape changes with the images: {usual} and {watch.shapes[i]} for {images} each")
    if 0 in shape:
        return Refused(tap, f"it holds no values: its shape is {two} for 2 images")
    for layout in three.layouts[i]:
        few, rows, again = (watch.rows[i, layout] for watch in passes)
        # The size of the batch changes last bits, which deep networks amplify, and so does the place in it for some
        # kernels; other neighbours alone change none. So C, which keeps its place, must come out the same.
        if (
            _rows_agree(few, rows, [(0, 2), (1, 0)], 1e-2)
            and _rows_agree(rows, again, [(0, 2)], 1e-2)
            and _rows_agree(rows, again, [(1, 1)], 1e-6)
        ):
            return layout
    return Refused(
        tap, "its rows change with the other images of the batch, or at random: no row belongs to one image alone"
    )


def _proposed_layouts(two: tuple[int, ...], three: tuple[int, ...]) -> list[RowLayout]:
    differing = [axis for axis, (m, n) in enumerate(zip(two, three, strict=False)) if m != n]
    if len(two) != len(three) or len(differing) != 1:
        return []
    axis = differing[0]
    k = two[axis] // 2
    if k == 0 or (2 * k, 3 * k) != (two[axis], three[axis]):
        return []
    return [RowLayout(axis)] if k == 1 else [RowLayout(axis, k, outer=True), RowLayout(axis, k, outer=False)]


def _rows_agree(
    rows: Sequence[torch.Tensor], others: Sequence[torch.Tensor], same: Sequence[tuple[int, int]], tolerance: float
) -> bool:
    """Whether row i of `rows` is row j of `others`, for (i, j) in `same`: by far closer to it than to any other.

    `tolerance` is relative. It is not all, since rows of an untrained network may be nearly alike themselves.
    """
    for i, j in same:
        row = _finite(rows[i])
        scale = float(row.norm())
        away = [float((row - _finite(other)).norm()) for other in others]
        to_self = away.pop(j)
        if to_self > tolerance * scale or to_self > max(0.25 * min(away), 1e-4 * scale):
            return False
    return True


def _finite(sample: torch.Tensor) -> torch.Tensor:
    return sample.double().nan_to_num(nan=0.0, posinf=1e30, neginf=-1e30)
