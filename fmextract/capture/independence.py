"""Whether the rows of a layer are each of one image alone: found out by putting other images in the places beside them.

Whatever a model does, an image that reaches the row of another one changes that row when it is replaced. So each pair
of places is tried: one stays, the other gets a stranger. It needs no two rows to be unlike, and no rounding is in it,
since the size of the batch and the places stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from fmextract.capture.writes import unwatched

ROUNDING = 1e-6
"""Relative L2 distance up to which two rows are the same."""

Run = Callable[[torch.Tensor], Sequence[torch.Tensor]]
"""From a batch (B, …) of inputs to the rows (B, …) of every layer."""


def leaking(run: Run, batch: torch.Tensor, strangers: torch.Tensor, rows: Mapping[int, torch.Tensor]) -> set[int]:
    """Those of `rows` in which some row changes when other images of the batch are replaced by `strangers`.

    `rows[i]` is layer i as `run(batch)` gave it. Takes two passes for each binary digit of the length of the batch: any
    two places differ in one of them.
    """
    places = torch.arange(len(batch), device=batch.device)
    found: set[int] = set()
    for digit in range((len(batch) - 1).bit_length()):
        for side in (0, 1):
            stays = (places >> digit) & 1 == side
            again = run(torch.where(stays.view(-1, *[1] * (batch.dim() - 1)), batch, strangers))
            with unwatched():
                found |= {i for i, own in rows.items() if not same(again[i][stays], own[stays])}
    return found


def same(values: torch.Tensor, others: torch.Tensor, tolerance: float = ROUNDING) -> bool:
    """Whether two tensors of one shape hold the same, but for rounding."""
    if torch.equal(values, others):
        return True
    a, b = finite(values), finite(others)
    return float((a - b).norm()) <= tolerance * float(a.norm())


def finite(values: torch.Tensor) -> torch.Tensor:
    """The values in float64, NaN as zero and the infinite ones as large."""
    return values.double().nan_to_num(nan=0.0, posinf=1e30, neginf=-1e30)


def kinds(rows: torch.Tensor, most: int = 3) -> int:
    """How many different rows there are; counts no further than to `most`."""
    if len(rows) and torch.equal(rows, rows[:1].expand_as(rows)):
        return 1
    found: list[torch.Tensor] = []
    for row in rows:
        if not any(same(row, other) for other in found):
            found.append(row)
        if len(found) == most:
            break
    return len(found)
