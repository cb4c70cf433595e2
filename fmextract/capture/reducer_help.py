"""The reducers in words, for help and docs: how each is written, what it keeps, the shapes it gives. No torch."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["REDUCER_HELP", "ReducerHelp"]


class ReducerHelp(NamedTuple):
    """One reducer: `shapes` of one image before and after it, in the words of the file's axes."""

    usage: str
    keeps: str
    shapes: str
    needs: str


REDUCER_HELP: dict[str, ReducerHelp] = {
    "mean": ReducerHelp(
        "mean",
        "the average over all positions or tokens (prefix tokens included), per channel",
        "(channel, y, x) → (feature)",
        "positions",
    ),
    "max": ReducerHelp(
        "max", "the largest value over all positions or tokens, per channel", "(channel, y, x) → (feature)", "positions"
    ),
    "pool": ReducerHelp("pool:k", "averages of k × k cells", "(channel, y, x) → (channel, k, k)", "y and x"),
    "flatten": ReducerHelp("flatten", "every value, in one axis", "(channel, y, x) → (channel·y·x)", "nothing"),
    "cls": ReducerHelp("cls", "token 0, the class token", "(token, feature) → (feature)", "tokens"),
    "tokens": ReducerHelp(
        "tokens or tokens:P",
        "all tokens but the first P (class and register tokens); without P, the largest square grid at the end",
        "(token, feature) → (token − P, feature)",
        "tokens",
    ),
    "channels": ReducerHelp(
        "channels:A-B",
        "channels A to B, both included, from 0; channels:A keeps one",
        "(channel, y, x) → (B − A + 1, y, x)",
        "channels or features",
    ),
    "top": ReducerHelp(
        "top",
        "no values: only the statistics and strongest images of the whole map",
        "(channel, y, x) → nothing stored",
        "channels or features",
    ),
}
"""By the reducer's name. `module:callable` stands beside these: a function from (B, …) to (B, …)."""
