"""Whether an axis that is called y follows the image's y: by changing the image at its sides, not by what we trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from fmextract.capture import hooks, probe, resolve, survey, taps

SIDES = {"y": 2, "x": 3}
FEWEST = 4  # cells of an axis on which a change at one side can be told from one at the other
LEAST = 0.06  # of an axis: what moves less is the same everywhere (attention of untrained networks)


def probed(model: nn.Module, shape: tuple[int, ...]) -> dict[str, taps.Probed]:
    """Every tensor that a module of `model` gives, by the name of its tap."""
    with torch.no_grad():
        seen = survey.survey(model, model, torch.randn(2, *shape))
        found, _ = probe.probe(model, model, resolve.resolve(["**", "."], seen), shape, torch.device("cpu"))
    return {one.tap.name: one for one in found}


def misnamed(model: nn.Module, shape: tuple[int, int, int]) -> tuple[dict[str, str], int]:
    """(layer → what is wrong with its axes, how many axes were told apart) of a model for images (channel, y, x).

    A thin band at one side of the image is changed. Along an axis called y the answer must lie elsewhere for the top
    than for the bottom, and in the same place for left and right; so for x. Tokens are put on their grid first. What
    answers in the same way everywhere tells nothing, and is not counted.
    """
    known = probed(model.eval(), shape)
    changes = _changes(model, list(known.values()), shape)
    wrong: dict[str, str] = {}
    told = 0
    for name, one in known.items():
        maps = {side: _on_grid(change[name], one.axes, shape) for side, change in changes.items()}
        for role in ("y", "x"):
            axes = next(iter(maps.values()))[1]
            if role not in axes or _length(maps, role) < FEWEST:
                continue
            centre = {side: _centre(values, axes.index(role)) for side, (values, axes) in maps.items()}
            along, across = (centre[f"{r} end"] - centre[f"{r} start"] for r in (role, "x" if role == "y" else "y"))
            if max(abs(along), abs(across)) < LEAST:
                continue
            told += 1
            if abs(across) >= along / 2:
                wrong[name] = f"{role} of {one.axes} {one.shape}: moves {along:.3f} along it, {across:.3f} across"
    return wrong, told


def _length(maps: Mapping[str, tuple[torch.Tensor, Sequence[str]]], role: str) -> int:
    values, axes = next(iter(maps.values()))
    return int(values.shape[axes.index(role)])


def _changes(
    model: nn.Module, wanted: Sequence[taps.Probed], shape: tuple[int, int, int]
) -> dict[str, dict[str, torch.Tensor]]:
    """Side of the image → layer → how much each of its values changes."""
    generator = torch.Generator().manual_seed(3)
    image = torch.randn((1, *shape), generator=generator)
    batch = [image[0]]
    for dim in (1, 2):
        width = max(1, shape[dim] // 4)
        for start in (0, shape[dim] - width):
            other = image[0].clone()
            band = other.narrow(dim, start, width)
            band += torch.randn(band.shape, generator=generator)
            batch.append(other)
    with hooks.tapped(model, wanted) as capture, torch.no_grad():
        rows = capture.forward(model, torch.stack(batch))
    names = ["y start", "y end", "x start", "x end"]
    return {
        name: {one.tap.name: (row[i + 1] - row[0]).double().abs() for one, row in zip(wanted, rows, strict=True)}
        for i, name in enumerate(names)
    }


def _on_grid(values: torch.Tensor, axes: Sequence[str], shape: Sequence[int]) -> tuple[torch.Tensor, Sequence[str]]:
    """Tokens as (…, y, x), where their number is that of a square grid and a few others before it."""
    if "token" not in axes or shape[1] != shape[2]:
        return values, axes
    at = axes.index("token")
    side = int(values.shape[at] ** 0.5)
    patches = values.movedim(at, -1)[..., values.shape[at] - side * side :]
    return patches.unflatten(-1, (side, side)), ("", "y", "x") if len(axes) > 1 else ("y", "x")


def _centre(change: torch.Tensor, axis: int) -> float:
    """Where along the axis the change lies, from 0 to 1."""
    profile = change.movedim(axis, 0).flatten(1).sum(1)
    places = torch.linspace(0, 1, len(profile), dtype=torch.float64)
    return float((profile * places).sum() / profile.sum().clamp_min(1e-300))
