"""The reducers in words say what the reducers do."""

from __future__ import annotations

import re

import pytest
import torch

from fmextract.capture.reducer_help import REDUCER_HELP
from fmextract.capture.reducers import REDUCERS, reduction

AXES = {"token": ("token", "feature"), "channel": ("channel", "y", "x")}
SIZES = {"channel": 6, "y": 4, "x": 5, "token": 10, "feature": 3, "k": 2, "A": 1, "B": 3, "P": 1}
WRITTEN = {"pool": "pool:2", "channels": "channels:1-3", "tokens": "tokens:1"}


def test_every_reducer_is_described_and_no_other() -> None:
    assert list(REDUCER_HELP) == list(REDUCERS)


@pytest.mark.parametrize("name", [name for name in REDUCERS if name != "top"])
def test_the_shapes_are_those_that_it_gives(name: str) -> None:
    before, after = REDUCER_HELP[name].shapes.split(" → ")
    axes = tuple(before.strip("()").split(", "))
    shape = tuple(SIZES[axis] for axis in axes)
    expected = [_value(word, shape[0]) for word in after.strip("()").split(", ")]
    made = reduction(WRITTEN.get(name, name), shape, axes)
    assert list(made.shape) == expected
    assert list(made.apply(torch.randn(2, *shape)).shape) == [2, *expected]


def _value(words: str, features: int) -> int:
    """`token − P`, `channel·y·x`, or `feature`: of a map, its channels."""
    if words == "feature" and features == SIZES["channel"]:
        return features
    return int(eval(re.sub(r"\w*[A-Za-z]\w*", lambda m: str(SIZES[m[0]]), words.replace("−", "-").replace("·", "*"))))
