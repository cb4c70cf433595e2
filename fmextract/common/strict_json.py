"""Write JSON that every reader takes: NaN and infinities become null. All JSON of the package is written here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def dumps(value: Any, **options: Any) -> str:
    """Return `value` as JSON text; `options` are those of `json.dumps`."""
    return json.dumps(plain(value), allow_nan=False, **options)


def plain(value: Any, digits: int | None = None) -> Any:
    """Return what JSON holds of `value`: numpy's types as Python's, tuples as lists, null for what is not finite.

    Floats are rounded to `digits` significant digits, where given.
    """
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else str(key): plain(one, digits) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one, digits) for one in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist(), digits)
    if isinstance(value, np.generic):
        return plain(value.item(), digits)
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return value if digits is None else float(f"{value:.{digits}g}")
    return value
