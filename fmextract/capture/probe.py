"""The probe: small batches run through a model to learn where the rows of each wanted tensor are, and what it is.

Shapes propose where the batch is in a tensor, values decide. A tap whose rows would not belong to one image each is
refused. What is overwritten after a hook saw it is found out, and what each axis means. Where the values of noise say
nothing, since a layer is the same for every image, it is looked at again with images of the source and stronger ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass

import torch
from torch import nn

from fmextract.capture import blame
from fmextract.capture.atoms import Axes, image_axes, name_axes, without_batch
from fmextract.capture.axes import AxisTracer
from fmextract.capture.hooks import Hooks, tapped
from fmextract.capture.independence import finite, kinds, leaking, same
from fmextract.capture.taps import Forward, Probed, Refused, RowLayout, Tap, is_plain, is_transformed, plain
from fmextract.capture.writes import Writes, digest, memory, unwatched
from fmextract.common.devices import is_out_of_memory
from fmextract.common.text import some
from fmextract.errors import CaptureError, FmextractError
from fmextract.selector import ROOT

_SAMPLED = 1 << 14  # values of a row that are compared: more than enough to tell two images apart
_MOVED = 1e-2  # relative L2 distance of a row among other images, or at another place, that kernels explain
_ALIKE = 1e-4  # of two rows of a network of random weights, which may be that of any two of its images

Layouts = Mapping[int, Sequence[RowLayout]]
Photos = Callable[[int], torch.Tensor]
"""Up to n images (n, channel, y, x) of the source as inputs of the model, as unlike each other as there are."""

_REPEATS = 16  # passes over three images each, in which what is done now and then is likely to show

ON_PHOTOS = "the model fails on images of the source"
LEAKING = "its rows change with the other images of the batch, or at random: no row belongs to one image alone"


class _WatchedPass:
    """One forward pass over `batch` with every wanted tensor watched.

    Of each it takes in the hook, since what is written later is lost: a digest of all of it, to see whether that
    happens, and samples of its rows, in each of the layouts that are given or, where they are not, that the survey's
    shape and this one allow. `keeps`: a row that is kept whole. `seen`: this pass sees every operation, and so what
    writes in place whatever it writes. `tracer`: what knows the axes, which may be turned in place later.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        taps: Sequence[Tap],
        batch: torch.Tensor,
        layouts: Layouts | None = None,
        keeps: int | None = None,
        seen: bool = False,
        tracer: AxisTracer | None = None,
    ) -> None:
        self.tensors: dict[int, torch.Tensor] = {}
        self.shapes: dict[int, tuple[int, ...]] = {}
        self.flaws: dict[int, str] = {}
        self.layouts: dict[int, Sequence[RowLayout]] = {}
        self.rows: dict[tuple[int, RowLayout], torch.Tensor] = {}
        self.whole: dict[tuple[int, RowLayout], torch.Tensor] = {}
        self.axes: dict[int, Axes | None] = {}
        self._taps, self._given, self._images, self._keeps, self._tracer = taps, layouts, len(batch), keeps, tracer
        self._before: dict[int, tuple[int, int | bytes]] = {}
        self._at: dict[int, set[int]] = {}
        self._written: set[int] = set()
        hooks = Hooks(taps, self._take)
        with hooks.on(model), torch.no_grad(), Writes(self._note_write) if seen else nullcontext():
            hooks.run(forward, batch)
        self.counts = hooks.counts

    def _take(self, i: int, tensor: torch.Tensor | None) -> None:
        flaw = _flaw(tensor)
        if tensor is None or flaw:
            self.flaws[i] = flaw
            return
        with unwatched():
            self._look_at(i, tensor)

    def _look_at(self, i: int, original: torch.Tensor) -> None:
        tensor = original.detach()  # its shape too may be changed in place
        self.tensors[i], self.shapes[i] = tensor, tuple(tensor.shape)
        self.axes[i] = self._tracer.axes(original) if self._tracer is not None else None
        self._before[i] = (-1 if tensor.is_inference() else tensor._version, digest(tensor))
        self._at.setdefault(memory(tensor), set()).add(i)
        if self._given is None:
            self.layouts[i] = _proposed_layouts(self._taps[i].shape, self.shapes[i])
        else:
            self.layouts[i] = self._given.get(i, ())
        for layout in self.layouts[i]:
            with suppress(CaptureError):  # another shape than proposed: `_judge` says so
                rows = layout.rows_first(plain(tensor), self._images)
                self.rows[i, layout] = _sampled(rows)
                if self._keeps is not None:
                    self.whole[i, layout] = rows[self._keeps].clone()

    def _note_write(self, tensor: torch.Tensor) -> None:
        self._written |= self._at.get(memory(tensor), set())

    def overwritten(self) -> set[int]:
        """Taps whose tensor was written after the hook saw it: by its version counter, by its values, or as seen.

        The values also show writes through foreign memory, which leave no other trace.
        """
        with unwatched():
            return self._written | {i for i, before in self._before.items() if _changed(self.tensors[i], *before)}

    def lasting(self, earlier: _WatchedPass) -> set[int]:
        """Taps whose memory an earlier pass used too, though its tensors are still alive: a buffer of the model's own.

        What is kept of it must be copied, since the next pass writes it while this one's values are on their way.
        """
        used = {memory(tensor) for tensor in earlier.tensors.values()} - {0}
        return {i for i, tensor in self.tensors.items() if memory(tensor) in used}


def _changed(tensor: torch.Tensor, version: int, before: int | bytes) -> bool:
    return tensor.is_inference() or tensor._version != version or digest(tensor) != before


def _flaw(tensor: torch.Tensor | None) -> str:
    """Why the values cannot be stored, "" where they can."""
    if tensor is None:
        return "it is not a tensor in every forward pass"
    if is_transformed(tensor):
        return "it is called inside torch.vmap or another transform of functions, where no tensor holds the batch"
    if not is_plain(tensor):
        return "it is a sparse or nested tensor"
    if tensor.is_complex():
        return "its values are complex; a module that gives view_as_real or abs of them can be stored"
    return ""


def _sampled(rows: torch.Tensor) -> torch.Tensor:
    """Of each row a copy of some _SAMPLED values spread over it, (B, values), in float32 or wider."""
    flat = plain(rows).flatten(1) if rows.dim() > 1 else plain(rows)[:, None]
    flat = flat[:, :: max(1, flat.shape[1] // _SAMPLED)]
    return flat.to(torch.float64 if flat.dtype == torch.float64 else torch.float32, copy=True)


def overwritten(model: nn.Module, forward: Forward, taps: Sequence[Tap], batch: torch.Tensor) -> set[int]:
    """Indices of the taps whose tensor is written in place after the hook saw it, in a pass over `batch`.

    Asked again in the precision of the run: what autocast copies in one precision it may not in another.
    """
    return _WatchedPass(model, forward, taps, batch, seen=True).overwritten()


def unsteady(
    model: nn.Module,
    forward: Forward,
    probed: Sequence[Probed],
    image_shape: Sequence[int],
    device: torch.device,
    photos: Photos | None = None,
) -> set[int]:
    """Indices of the taps that are not the same in every one of some passes over the same images.

    For models that draw random numbers or remember what they did: they may do something only now and then.
    """
    batch = torch.stack(_filled(photos, 3, _distinct_noise(image_shape, device)))
    found: set[int] = set()
    with tapped(model, probed) as capture, torch.no_grad():
        first = [rows.clone() for rows in capture.forward(forward, batch.clone())]
        for _ in range(_REPEATS):
            again = capture.forward(forward, batch.clone())
            found |= {i for i, rows in enumerate(again) if i not in found and not same(first[i], rows)}
    return found


# ------------------------------------------------------------------------------------------------ four passes


def probe(
    model: nn.Module,
    forward: Forward,
    taps: Sequence[Tap],
    image_shape: Sequence[int],
    device: torch.device,
    photos: Photos | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> tuple[list[Probed], list[Refused]]:
    """Decide for each tap where its rows are, what its axes mean and whether it is overwritten later.

    Three images of noise and two of the source run as (B, P, A), (Q, P, C), (C, B) and (C): shapes at two batch sizes
    propose the axis of the batch; values decide, since each image must come out the same at any place among any
    neighbours. P has no neighbour twice, a dark one in one pass and a bright one in the other, so that neither their
    mean nor the largest value of a batch is the same. Without `photos` noise stands for them. `image_shape` is
    (channel, y, x). The model must already be in the mode in which it will run, and runs in its own precision under
    `no_grad`. `tell` takes a note on each kind of image that the model fails on. Raises what the forward raises.
    """
    noise = _distinct_noise(image_shape, device)
    first: Exception | None = None
    tries = [*((*kind, photos) for kind in _NOISES), *([(*_NOISES[-1], None)] if photos is not None else [])]
    for spread, contrast, shown in tries:
        notes: list[str] = []
        try:
            images = noise if contrast == 1 else (contrast * noise).clamp(-1, 1)
            found = _probe(model, forward, taps, images, spread, shown, notes.append)
        except FmextractError:
            raise
        except Exception as error:  # the model's own: it may refuse inputs beyond a range, which no photo leaves
            if is_out_of_memory(error):
                raise
            first = first or error  # an image that the model fails on is a matter of its row
            continue
        if shown is None and photos is not None and first is not None:
            tell(f"{ON_PHOTOS}, so that its layers were looked at with noise alone: {blame.told(first, model)}")
        for note in notes:
            tell(note)
        return found
    assert first is not None
    raise first


_NOISES = ((1.0, 1.0), (0.0, 1.0), (0.0, 0.25))
"""How much darker and brighter than the rest two images of noise are, and the contrast of all: tried in turn."""


def _probe(
    model: nn.Module,
    forward: Forward,
    taps: Sequence[Tap],
    noise: torch.Tensor,
    spread: float,
    photos: Photos | None,
    tell: Callable[[str], None],
) -> tuple[list[Probed], list[Refused]]:
    """As `probe`, with `noise` of which one image is darker by `spread`, and one brighter."""
    a, b, c = noise[0] - spread, noise[1], noise[6] + spread
    p, q = _filled(photos, 2, noise[2:])
    three = _WatchedPass(model, forward, taps, torch.stack([b, p, a]), keeps=1)
    with AxisTracer() as tracer:
        traced = torch.stack([q, p, c])
        tracer.seed(traced, image_axes(traced.shape))
        others = _WatchedPass(model, forward, taps, traced, three.layouts, keeps=1, seen=True, tracer=tracer)
    copied = three.overwritten() | others.overwritten() | others.lasting(three)
    dtypes = {i: torch.float32 if t.is_quantized else t.dtype for i, t in others.tensors.items()}
    for watch in (three, others):  # activations of whole images: not kept longer than needed
        watch.tensors.clear()
    pair = _WatchedPass(model, forward, taps, torch.stack([c, b]), three.layouts)
    copied |= pair.overwritten()
    pair.tensors.clear()
    alone = _same_alone(model, forward, taps, c[None], pair, tell)

    def described(i: int, layout: RowLayout, undecided: bool) -> Probed:
        shape = tuple(layout.rows_first(torch.empty(others.shapes[i], device="meta"), 3).shape[1:])
        per_image = without_batch(others.axes[i], layout.axis, layout.k, layout.outer)
        axes = _defined(model, taps[i], layout, name_axes(per_image, len(shape)))
        # A write over values that are always the same may leave no trace.
        return Probed(taps[i], layout, shape, axes, dtypes[i], undecided or i in copied, i in alone, undecided)

    with unwatched():
        verdicts = [_judge(tap, i, pair, three, others) for i, tap in enumerate(taps)]
    tries = {(i, layout): described(i, layout, True) for i, v in enumerate(verdicts) for layout in v.undecided}
    settled, refuted, failed = set[tuple[int, RowLayout]](), set[tuple[int, RowLayout]](), ""
    if tries:
        settled, refuted, failed = _look_again(model, forward, tries, _stronger(photos, noise))
    right, wrong = _by_tap(settled), _by_tap(refuted)
    probed: list[Probed] = []
    refused: list[Refused] = []
    for i, verdict in enumerate(verdicts):
        verdict = verdict.after(right.get(i, set()), wrong.get(i, set()), failed)
        if verdict.layout is None:
            refused.append(Refused(taps[i], verdict.why))
        else:
            probed.append(described(i, verdict.layout, bool(verdict.undecided)))
    if failed and (left := [one.tap.name for one in probed if one.undecided]):
        tell(
            f"{some(left)}: the same for every image that was tried, and {failed}. Whether their rows are of one image"
            " each is asked again during the run."
        )
    return probed, refused


def _by_tap(found: set[tuple[int, RowLayout]]) -> dict[int, set[RowLayout]]:
    layouts: dict[int, set[RowLayout]] = {}
    for i, layout in found:
        layouts.setdefault(i, set()).add(layout)
    return layouts


def _defined(model: nn.Module, tap: Tap, layout: RowLayout, axes: tuple[str, ...]) -> tuple[str, ...]:
    """`axes` with the channel where the definition of a convolution or a batch norm puts it, if they were lost."""
    if tap.tap != "out" or tap.path or layout != RowLayout(0) or not all(name.startswith("axis_") for name in axes):
        return axes
    module = model if tap.module == ROOT else model.get_submodule(tap.module)
    if not axes or not {cls.__name__ for cls in type(module).__mro__} & {"_ConvNd", "_NormBase"}:
        return axes
    return ("channel", *axes[1:]) if len(axes) > 1 else ("feature",)


def _distinct_noise(image_shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """Images that even a network of random weights keeps apart: other noise, contrast, colour and gradient."""
    generator = torch.Generator().manual_seed(20_240_229)
    kinds_of = [(0.4, 1.5), (1.0, -1.0), (1.6, 0.2), (0.7, -0.4), (1.3, 0.8), (0.5, -1.7), (2.0, 0.5), (0.9, 1.2)]
    noise = torch.randn((len(kinds_of), *image_shape), generator=generator, dtype=torch.float32)
    ramp = torch.linspace(-1, 1, image_shape[-1], dtype=torch.float32)
    for i, (contrast, tilt) in enumerate(kinds_of):
        noise[i] = noise[i] * contrast + tilt * ramp
        noise[i, i % image_shape[0]] += 1.5
    return noise.to(device)


def _filled(photos: Photos | None, count: int, noise: torch.Tensor) -> list[torch.Tensor]:
    """`count` images: of the source, and of noise where it has not as many."""
    return [*(photos(count) if photos is not None else ()), *noise][:count]


def _same_alone(
    model: nn.Module,
    forward: Forward,
    taps: Sequence[Tap],
    one: torch.Tensor,
    pair: _WatchedPass,
    tell: Callable[[str], None],
) -> set[int]:
    """The taps for which a batch of one image gives what its first row is in `pair`, of the same shape.

    Not those behind a `squeeze()`, whose axes move; none at all of a model that fails on a single image.
    """
    try:
        single = _WatchedPass(model, forward, taps, one, pair.layouts)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # It is no error of the run's, which takes two.
        tell(f"the model fails on a batch of one image, which is run twice side by side: {blame.told(error, model)}")
        return set()
    with unwatched():
        return _alike_alone(single, pair)


def _alike_alone(single: _WatchedPass, pair: _WatchedPass) -> set[int]:
    found: set[int] = set()
    if single.counts != pair.counts:
        return found
    for i, layout in ((i, layout) for i, layouts in pair.layouts.items() for layout in layouts):
        rows, shape = single.rows.get((i, layout)), list(pair.shapes.get(i, ()))
        if rows is None or i not in single.shapes:
            continue
        shape[layout.axis] = layout.k
        if list(single.shapes[i]) == shape and same(pair.rows[i, layout][0], rows[0], _MOVED):
            found.add(i)
    return found


# --------------------------------------------------------------------------------------------------- judging


@dataclass(frozen=True, slots=True)
class _Verdict:
    """Where the rows of a tap are; or, without a `layout`, why it has none. `undecided`: the layouts that may be it."""

    layout: RowLayout | None
    why: str = ""
    undecided: tuple[RowLayout, ...] = ()

    def after(self, settled: set[RowLayout], refuted: set[RowLayout], failed: str) -> _Verdict:
        """The last word, once it was looked at again. `failed`: what of that came to nothing."""
        if not self.undecided:
            return self
        left = tuple(layout for layout in self.undecided if layout not in refuted)
        if decided := [layout for layout in left if layout in settled]:
            return _Verdict(decided[0])
        if not left:
            return _Verdict(None, LEAKING)
        if len(left) == 1:
            return _Verdict(left[0], undecided=left)
        return _Verdict(
            None,
            "it is the same for every image that was tried, noise and some of the source, so that nothing tells which"
            f" of its rows belong to which image{f'; {failed}' if failed else ''}",
        )


def _judge(tap: Tap, i: int, pair: _WatchedPass, three: _WatchedPass, others: _WatchedPass) -> _Verdict:
    """The layout of one tap's rows, from what it was in the passes over (C, B), (B, P, A) and (Q, P, C)."""
    passes = (pair, three, others)
    counts = [tap.calls, *(watch.counts[tap.module, tap.tap] for watch in passes)]
    if len(set(counts)) > 1:
        times = ", ".join(map(str, counts))
        return _Verdict(
            None, f"{tap.module!r} is called a varying number of times: {times} times in four forward passes"
        )
    flaw = next((watch.flaws[i] for watch in passes if i in watch.flaws), "")
    if flaw:
        return _Verdict(None, flaw)
    two, shape = tap.shape, three.shapes[i]
    if not three.layouts[i]:
        return _Verdict(None, f"its shape does not follow the batch: {two} for 2 images and {shape} for 3")
    for watch, usual, images in ((pair, two, 2), (others, shape, 3)):
        if watch.shapes[i] != usual:
            return _Verdict(None, f"its shape changes with the images: {usual} and {watch.shapes[i]} for {images} each")
    if 0 in shape:
        return _Verdict(None, f"it holds no values: its shape is {two} for 2 images")
    possible = []
    for layout in three.layouts[i]:
        # The size of the batch changes last bits, which deep networks amplify, and so does the place in it for some
        # kernels; other neighbours alone change none. So P, which keeps its place, must come out the same.
        if not same(three.whole[i, layout], others.whole[i, layout]):
            continue
        few, rows, again = (watch.rows[i, layout] for watch in passes)
        moved = _moved(few, rows, {1: 0}), _moved(few, again, {0: 2})
        if all(moved):
            return _Verdict(layout)
        if False not in moved:
            possible.append(layout)
    return _Verdict(possible[0] if possible else None, LEAKING, tuple(possible))


def _proposed_layouts(two: tuple[int, ...], three: tuple[int, ...]) -> list[RowLayout]:
    differing = [axis for axis, (m, n) in enumerate(zip(two, three, strict=False)) if m != n]
    if len(two) != len(three) or len(differing) != 1:
        return []
    axis = differing[0]
    k = two[axis] // 2
    if k == 0 or (2 * k, 3 * k) != (two[axis], three[axis]):
        return []
    return [RowLayout(axis)] if k == 1 else [RowLayout(axis, k, outer=True), RowLayout(axis, k, outer=False)]


def _moved(rows: torch.Tensor, others: torch.Tensor, to: Mapping[int, int]) -> bool | None:
    """Whether row i of `rows` is row `to[i]` of `others`: by far closer to it than to any other.

    None where they are too much alike to tell, as those of an untrained network may be.
    """
    decided = True
    own, theirs = finite(rows), finite(others)
    scales = own.norm(dim=1).tolist()
    distances = (own[:, None] - theirs).norm(dim=2).tolist()
    for i, j in to.items():
        scale, away = scales[i], distances[i]
        to_self = away.pop(j)
        if to_self > _MOVED * scale:
            return False
        if to_self > 0.25 * min(away) or not min(away):
            if to_self > _ALIKE * scale:
                return False
            decided = False
    return decided or None


# ----------------------------------------------------------------------------------------------- a second look


def _stronger(photos: Photos | None, noise: torch.Tensor) -> Iterator[torch.Tensor]:
    """Six images at a time, ever more unlike what the first passes saw: of the source, then with other contrast."""
    base = torch.stack(_filled(photos, 6, noise))
    spread = float(base.double().std()) or 1.0
    yield base
    for factor, brighter in ((4, 0), (-4, 0), (1, 4), (1, -4), (30, 0), (-30, 0)):
        yield base * factor + brighter * spread


def _look_again(
    model: nn.Module, forward: Forward, tries: Mapping[tuple[int, RowLayout], Probed], images: Iterator[torch.Tensor]
) -> tuple[set[tuple[int, RowLayout]], set[tuple[int, RowLayout]], str]:
    """Of the taps by their number, each with a layout that it may have: (those that are right, those that are wrong,
    what of these looks failed, and why).

    For neither nothing was found that tells its rows apart.
    """
    looks, failures = 0, list[str]()
    settled: set[tuple[int, RowLayout]] = set()
    refuted: set[tuple[int, RowLayout]] = set()
    usual: dict[tuple[int, RowLayout], torch.Tensor] = {}
    for six in images:
        known = {i for i, _ in settled}
        open_ = [key for key in tries if key not in refuted and key[0] not in known]
        if not open_:
            break
        looks += 1
        try:
            decided, leaks = _independent(model, forward, {key: tries[key] for key in open_}, six, usual)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            failures.append(blame.told(error, model))
            continue  # not images for this model; the next may be
        settled |= decided
        refuted |= leaks
    why = f"{len(failures)} of {looks} looks at others failed, the first with {failures[0]}" if failures else ""
    return settled, refuted, why.rstrip(".")


def _independent(
    model: nn.Module,
    forward: Forward,
    tries: Mapping[tuple[int, RowLayout], Probed],
    six: torch.Tensor,
    usual: dict[tuple[int, RowLayout], torch.Tensor],
) -> tuple[set[tuple[int, RowLayout]], set[tuple[int, RowLayout]]]:
    """(those that follow each of the first three images and nothing else, those that follow another one too).

    `usual`: a row of each as it was for the first images, which is put down here.
    """
    with tapped(model, list(tries.values())) as capture, torch.no_grad():
        rows = dict(zip(tries, capture.forward(forward, six[:3].clone()), strict=True))
    with unwatched():
        unlike = {key: kinds(values) for key, values in rows.items()}
        # Where all rows are alike, but not as before, something of the images is in them: perhaps of all of them.
        told = {key for key, row in rows.items() if unlike[key] > 1 or not same(row[0], usual.get(key, row[0]))}
        usual |= {key: row[0].clone() for key, row in rows.items() if unlike[key] == 1 and key not in usual}
    telling = [key for key in tries if key in told]
    if not telling:
        return set(), set()
    with tapped(model, [tries[key] for key in telling]) as capture, torch.no_grad():

        def run(batch: torch.Tensor) -> list[torch.Tensor]:
            return capture.forward(forward, batch.clone())

        leaks = leaking(run, six[:3], six[3:], {n: rows[key] for n, key in enumerate(telling)})
        fewer = run(six[:2])
        with unwatched():
            leaks |= {n for n, key in enumerate(telling) if not same(rows[key][:2], fewer[n], _MOVED)}
    refuted = {telling[n] for n in leaks}
    return {key for key in telling if unlike[key] == 3} - refuted, refuted
