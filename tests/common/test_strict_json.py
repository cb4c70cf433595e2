"""JSON that every reader takes."""

from __future__ import annotations

import json
import math

import numpy as np

from fmextract.common import strict_json


def test_what_json_cannot_hold_is_null() -> None:
    said = {1: np.float32(0.1), "a": (np.inf, np.int8(3), True), "b": np.array([[math.nan, 2.0]])}
    assert json.loads(strict_json.dumps(said)) == {
        "1": float(np.float32(0.1)),
        "a": [None, 3, True],
        "b": [[None, 2.0]],
    }


def test_rounded_to_digits() -> None:
    said = strict_json.plain({"a": [math.pi, 123456789.0, np.float32(1e-9), math.nan, 3, True]}, digits=6)
    assert said == {"a": [3.14159, 123457000.0, 1e-09, None, 3, True]}
    assert strict_json.plain(math.pi) == math.pi
