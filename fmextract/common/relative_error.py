"""How far values are from others: one number, of what is finite in both."""

from __future__ import annotations

import math

import torch


def relative_error(tensor: torch.Tensor, reference: torch.Tensor) -> float | None:
    """Return |a - b| / |b| over the values that are finite in both, in float64.

    None for integers, and where no value is finite in both; infinite where the reference is zero and the other is not.
    """
    if not reference.is_floating_point():
        return None
    finite = reference.isfinite() & tensor.isfinite()
    if not bool(finite.all()):
        tensor, reference = tensor[finite], reference[finite]
    if not reference.numel():
        return None
    exact = reference.double()
    scale = float(exact.norm())
    error = float((tensor.double() - exact).norm())
    return error / scale if scale else (0.0 if error == 0 else math.inf)
