"""What a reducer must keep to: each image alone, whatever stands beside it, and nothing else is changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fmextract.testing.promises import attempt, keeps

if TYPE_CHECKING:
    import torch

IMAGES = 5
AXES = {1: ("feature",), 2: ("token", "feature"), 3: ("channel", "y", "x")}
TOLERANCE = 1e-4
"""Share of the largest value by which a sum may differ that was made in another order."""


def check_reducer(
    reducer: str | Callable[[torch.Tensor], torch.Tensor],
    shape: tuple[int, ...] = (6, 8, 8),
    axes: tuple[str, ...] | None = None,
) -> None:
    """Check that a reducer maps (B, …) to (B, …), row by row, and leaves its input, and itself, as they were.

    It is tried on float32, on the half precisions that a run may give it, and on memory that is laid out
    channels-last.

    Args:
        reducer: a function from a batch to a batch, or what a selector says after `=`: `mean`, `module:callable`.
        shape: that of one image of the layer.
        axes: their names, as `("channel", "y", "x")`; of a text they are needed to know what to reduce.

    Raises:
        AssertionError: which promise it breaks.

    >>> check_reducer("mean")
    >>> check_reducer(lambda maps: maps - maps.mean())  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    AssertionError: reducer <lambda>: an image must give the same alone and beside others; ...
    """
    import torch

    if axes is None:
        axes = AXES.get(len(shape), tuple(f"axis_{i + 1}" for i in range(len(shape))))
    name, apply, declared = _resolved(reducer, shape, axes)
    dice = torch.Generator().manual_seed(0)
    rows = torch.randn((IMAGES, *shape), generator=dice)
    whole = _reduced(apply, rows, name, "float32")
    if declared is not None:
        keeps(
            tuple(whole.shape[1:]) == declared,
            f"{name}: one image must have the shape {declared}",
            f"it has {tuple(whole.shape[1:])}",
        )
    _check_state(apply, rows, whole, name)
    _check_rows(apply, rows, whole, name)
    for dtype in (torch.bfloat16, torch.float16):
        half = _reduced(apply, rows.to(dtype), name, str(dtype))
        keeps(half.shape == whole.shape, f"{name}: the shape must not depend on the type", f"{dtype} gave {half.shape}")
    if len(shape) == 3:
        last = rows.to(memory_format=torch.channels_last)
        _same(_reduced(apply, last, name, "channels-last"), whole, f"{name}: how memory is laid out must not count")


def _resolved(reducer: Any, shape: tuple[int, ...], axes: tuple[str, ...]) -> tuple[str, Any, tuple[int, ...] | None]:
    """A word for a reducer, its function, and the shape that it declares."""
    if callable(reducer):
        return f"reducer {getattr(reducer, '__name__', type(reducer).__name__)}", reducer, None
    from fmextract.capture.reducers import reduction

    made = reduction(reducer, shape, axes)
    promise = f"reducer {reducer}: each axis must have a name"
    keeps(len(made.axes) == len(made.shape), promise, f"{made.shape} has {made.axes}")
    return f"reducer {reducer}", made.apply, made.shape


def _reduced(apply: Any, rows: torch.Tensor, name: str, of: str) -> torch.Tensor:
    """What a reducer makes of rows, of which it must leave the values alone."""
    import torch

    before = rows.clone()
    with torch.no_grad():
        made: Any = attempt(lambda: apply(rows), f"{name}: must take {of} maps {tuple(rows.shape)}")
    keeps(isinstance(made, torch.Tensor), f"{name}: must return a tensor", f"it returned a {type(made).__name__}")
    unchanged = torch.allclose(rows, before, rtol=0, atol=0, equal_nan=True)
    keeps(unchanged, f"{name}: must not change its input", "it did")
    keeps(
        made.ndim > 0 and len(made) == len(rows),
        f"{name}: must give a row per image",
        f"{tuple(rows.shape)} became {tuple(made.shape)}",
    )
    keeps(not made.is_complex(), f"{name}: must return real numbers", f"they are {made.dtype}")
    keeps(made.device == rows.device, f"{name}: must stay on the device", f"{rows.device} became {made.device}")
    copy: torch.Tensor = made.clone()
    return copy


def _check_state(apply: Any, rows: torch.Tensor, whole: torch.Tensor, name: str) -> None:
    """The same again, also after something else was seen."""
    _same(_reduced(apply, rows, name, "the same"), whole, f"{name}: must give the same for the same maps")
    _reduced(apply, rows.flip(0) * 100, name, "other")
    promise = f"{name}: must keep nothing of what it saw before"
    _same(_reduced(apply, rows, name, "the same"), whole, promise)


def _check_rows(apply: Any, rows: torch.Tensor, whole: torch.Tensor, name: str) -> None:
    """An image alone, among others in another order, and beside one of NaN."""
    promise = f"{name}: an image must give the same alone and beside others"
    for row in range(len(rows)):
        alone = _reduced(apply, rows[row : row + 1], name, "single")
        keeps(
            alone.shape[1:] == whole.shape[1:],
            f"{name}: the shape must not depend on how many images there are",
            f"{tuple(alone.shape[1:])} of one image, {tuple(whole.shape[1:])} of several",
        )
        keeps(
            alone.dtype == whole.dtype,
            f"{name}: the type must not depend on how many images there are",
            f"{alone.dtype} of one image, {whole.dtype} of several",
        )
        _same(alone[0], whole[row], promise)
    _same(_reduced(apply, rows.flip(0), name, "turned"), whole.flip(0), f"{name}: images must keep their order")
    spoilt = rows.clone()
    spoilt[0] = float("nan")
    _same(_reduced(apply, spoilt, name, "partly NaN")[1:], whole[1:], promise)


def _same(made: torch.Tensor, expected: torch.Tensor, promise: str) -> None:
    import torch

    keeps(made.shape == expected.shape, promise, f"{tuple(made.shape)} is not {tuple(expected.shape)}")
    keeps(made.dtype == expected.dtype, promise, f"{made.dtype} is not {expected.dtype}")
    a, b = made.double(), expected.double()
    largest = float(b[b.isfinite()].abs().max()) if b.isfinite().any() else 1.0
    close = torch.isclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * largest, equal_nan=True)
    keeps(bool(close.all()), promise, f"{int((~close).sum())} of {close.numel()} values differ")
