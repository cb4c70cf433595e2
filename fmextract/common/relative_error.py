"""Measure how far values are from others: one number, over what is finite in both."""

from __future__ import annotations

import math

import torch


def relative_error(tensor: torch.Tensor, reference: torch.Tensor) -> float | None:
    """Return |a - b| / |b| over the values that are finite in both, summed in float64.

    None for integers, and where no value is finite in both; infinite where the reference is zero and the other is not.
    """
    if not reference.is_floating_point():
        return None
    error, scale = _norm(tensor - reference), _norm(reference)
    if not (math.isfinite(error) and math.isfinite(scale)):
        finite = reference.isfinite() & tensor.isfinite()
        if not bool(finite.any()):
            return None
        error, scale = _norm(tensor[finite] - reference[finite]), _norm(reference[finite])
    return error / scale if scale else (0.0 if error == 0 else math.inf)


def _norm(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))
