"""How far a row that was run again is from the stored one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fmextract.run.recheck import distance

ROW = np.array([3.0, -4.0, 0.0], np.float32)


@pytest.mark.parametrize(
    ("stored", "again", "expected"),
    [
        (ROW, ROW.copy(), 0.0),
        (ROW, ROW * 1.5, 0.5),
        (ROW.astype(np.float16), ROW.astype(np.float16) * 2, 1.0),
        (np.zeros(3), np.ones(3), math.inf),
        (np.array([1, 2]), np.array([1, 2]), 0.0),
        (np.array([3, 4]), np.array([3, 9]), 1.0),
        (np.array([2**60]), np.array([2**60 + 1]), math.inf),
        (np.array([np.nan, 1.0]), np.array([np.nan, 1.0]), 0.0),
        (np.array([np.nan, 1.0]), np.array([np.nan, 2.0]), 1.0),
        (np.array([np.nan, 1.0]), np.array([1.0, np.nan]), math.inf),
        (np.array([np.inf, 1.0]), np.array([-np.inf, 1.0]), math.inf),
        (np.array([np.inf, 1.0]), np.array([np.nan, 1.0]), math.inf),
        (np.array([np.inf, 1.0]), np.array([np.inf, 1.5]), 0.5),
        (np.array([0.0]), np.array([-0.0]), 0.0),
        (np.float32(2.0), np.float32(3.0), 0.5),
    ],
)
def test_distance(stored: Any, again: Any, expected: float) -> None:
    assert distance(stored, again) == pytest.approx(expected)
