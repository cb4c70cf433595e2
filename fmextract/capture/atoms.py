"""What one axis of a tensor is made of, and what it is called.

An axis is a tuple of atoms. A view merges atoms and splits them: `flatten(2)` of (batch, channel, y, x) makes an axis
of the atoms y and x, a window partition splits y and x and puts one half of each into the batch. An atom remembers
which part of its direction it is, so that an axis is called y only while it runs down the whole image: in coarse steps
or in fine ones, but not within a window, and not in another order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from fmextract.records import SPATIAL

BATCH, CHANNEL, TOKEN, UNKNOWN = "batch", "channel", "token", ""
MIXED = "mixed"
"""Features that a linear layer or a convolution made of positions: its channels, but in a sum with what is still in
place (a residual) the positions count.
"""
FREQUENCY = "frequency of "  # of a direction, after a Fourier transform; transformed back, it is the direction again


class Atom(NamedTuple):
    """`size` steps of one meaning. Of a direction that views have split, `outer` is how many coarser steps stand
    elsewhere, and `inner` how many finer ones. `parts` are the axes that `cat` joined to one (a class token, patches).
    """

    role: str
    size: int
    outer: int = 1
    inner: int = 1
    parts: tuple[tuple[Atom, ...], ...] = ()


Axis = tuple[Atom, ...]
Axes = tuple[Axis, ...]


def plain(role: str, size: int) -> Axis:
    """An axis that is all of one thing."""
    return (Atom(role, size),)


def image_axes(shape: Sequence[int]) -> Axes:
    """The axes of a model's input: (batch, channel, y, x), or (batch, channel, time, y, x) for a clip.

    A signal is (batch, channel, x); of more axes than a clip's nothing is known.
    """
    count = len(shape) - 2
    positions = SPATIAL[-count:] if 0 < count <= len(SPATIAL) else (UNKNOWN,) * count
    return tuple(map(plain, (BATCH, CHANNEL, *positions)[: len(shape)], shape))


def length(axis: Axis) -> int:
    """How many steps the axis has."""
    return math.prod(atom.size for atom in axis)


def lengths(axes: Axes) -> list[int]:
    """The shape."""
    return [length(axis) for axis in axes]


def is_positional(axis: Axis) -> bool:
    """Whether its steps are places of the image, whole or in part, and nothing else."""
    wide = _wide(axis)
    return bool(wide) and all(atom.role in (*SPATIAL, TOKEN) for atom in wide)


def _wide(axis: Axis) -> Axis:
    return tuple(atom for atom in axis if atom.size > 1) or axis[:1]


# ------------------------------------------------------------------------------------------- changed lengths


def resized(axis: Axis, size: int) -> Axis:
    """The axis after its length changed (slice, pad, pooling): it keeps a meaning only where that was one thing."""
    if length(axis) == size:
        return axis
    wide = _wide(axis)
    if len({atom.role for atom in wide}) != 1 or (len(wide) > 1 and wide[0].role in SPATIAL):
        return plain(UNKNOWN, size)
    first = wide[0]
    return plain(UNKNOWN, size) if first.role == TOKEN else (first._replace(size=size),)


def cut(axis: Axis, start: int, stop: int) -> Axis:
    """Steps `start` to `stop` of the axis: of one that was joined, the parts that it was made of."""
    if len(axis) != 1 or not axis[0].parts:
        return resized(axis, max(0, stop - start))
    kept, at = [], 0
    for part in axis[0].parts:
        if start <= at and at + length(part) <= stop:
            kept.append(part)
        at += length(part)
    if sum(map(length, kept)) != stop - start:
        return plain(UNKNOWN, max(0, stop - start))
    return joined(kept)


def joined(parts: Sequence[Axis]) -> Axis:
    """What `cat` makes of axes that it puts one behind the other."""
    if len(parts) == 1:
        return parts[0]
    size = sum(map(length, parts))
    longest = max(parts, key=length)
    if not any(map(is_positional, parts)):  # of channels, images, things unknown
        return resized(longest, size)
    wide = _wide(longest)
    if len(wide) == 1 and wide[0].role in SPATIAL:
        # A direction with padding at its ends is that direction; put together of pieces it may be in any order.
        others = sum(length(part) for part in parts if is_positional(part)) - length(longest)
        return resized(longest, size) if others < length(longest) else plain(UNKNOWN, size)
    flat = [inner for part in parts for inner in (part[0].parts if len(part) == 1 else ()) or (part,)]
    return (Atom(TOKEN, size, parts=tuple(flat)),)


# ----------------------------------------------------------------------------------------------------- views


def regroup(axes: Axes, shape: Sequence[int]) -> Axes | None:
    """The axes after a view to `shape`: atoms are merged and split in their order; None where they do not divide."""
    atoms = [atom for axis in axes for atom in axis]
    made: list[Axis] = []
    if 0 in shape:
        return None
    for size in shape:
        axis: list[Atom] = []
        have = 1
        while have < size:
            if not atoms:
                return None
            atom = atoms.pop(0)
            need = size // have
            if atom.size > need:
                if size % have or atom.size % need:
                    return None
                atom, rest = split(atom, need)
                atoms.insert(0, rest)
            elif need % atom.size:
                return None
            axis.append(atom)
            have *= atom.size
        if size == 1:
            axis.append(atoms.pop(0) if atoms and atoms[0].size == 1 else Atom(UNKNOWN, 1))
        made.append(_merged(axis))
    if atoms and made:
        if any(atom.size != 1 for atom in atoms):
            return None
        made[-1] = _merged([*made[-1], *atoms]) if made[-1] != plain(UNKNOWN, 1) else tuple(atoms)
    return tuple(made)


def split(atom: Atom, outer: int) -> tuple[Atom, Atom]:
    """`outer` coarse steps, and the fine ones within each of them."""
    size = atom.size // outer
    return (
        Atom(atom.role, outer, atom.outer, atom.inner * size),
        Atom(atom.role, size, atom.outer * outer, atom.inner),
    )


def _merged(atoms: Sequence[Atom]) -> Axis:
    """Neighbouring atoms of one role are one: a split that is merged back leaves no trace.

    The parts of a direction only in their order; of channels any: one is as good as another.
    """
    made: list[Atom] = []
    for atom in [atom for atom in atoms if atom.size > 1] or atoms:
        last = made[-1] if made else None
        if last is None or last.role != atom.role or not (atom.role not in SPATIAL or _follows(last, atom)):
            made.append(atom)
        else:
            outer, inner = min(last.outer, atom.outer), min(last.inner, atom.inner)
            made[-1] = Atom(atom.role, last.size * atom.size, outer, inner)
    return tuple(made)


def _follows(coarse: Atom, fine: Atom) -> bool:
    return fine.outer == coarse.outer * coarse.size and coarse.inner == fine.inner * fine.size


def of_both(axes: Sequence[Axis]) -> Axis:
    """What an axis means that several operands share, element by element: what all say that know it."""
    clear = [axis for axis in axes if not {UNKNOWN, MIXED} & {atom.role for atom in axis}]
    clear = clear or [axis for axis in axes if not any(atom.role == UNKNOWN for atom in axis)] or list(axes)
    first = clear[0]
    return first if all(_alike(first, other) for other in clear[1:]) else plain(UNKNOWN, length(first))


def _alike(one: Axis, other: Axis) -> bool:
    """Places must be the same ones; of channels and images any will do."""
    a, b = ([atom if atom.role in SPATIAL else atom.role for atom in _wide(axis)] for axis in (one, other))
    return a == b


# ---------------------------------------------------------------------------------------------------- naming


def role_of(axis: Axis) -> str:
    """The one thing that an axis means, UNKNOWN where it is none, or only a part of one."""
    wide = _wide(axis)
    roles = [atom.role for atom in wide]
    if not roles or {UNKNOWN, BATCH} & set(roles) or any(role.startswith(FREQUENCY) for role in roles):
        return roles[0] if len(roles) == 1 else UNKNOWN
    if {CHANNEL, MIXED} & set(roles):
        return CHANNEL
    if roles == [TOKEN]:
        return TOKEN if _ends_in_patches(wide[0]) else UNKNOWN
    # All are directions: whole ones, the slower ones first, as the pixels of a picture come.
    if any(atom.outer > 1 for atom in wide) or roles != [role for role in SPATIAL if role in roles]:
        return UNKNOWN
    return roles[0] if len(roles) == 1 else TOKEN


def _ends_in_patches(atom: Atom) -> bool:
    """Whether the patches of one picture stand last, row by row, and before them only others (a class token)."""
    *others, last = atom.parts or ((),)
    return role_of(last) == TOKEN and not any(role_of(part) == TOKEN for part in others)


def name_axes(axes: Axes | None, ndim: int) -> tuple[str, ...]:
    """Names for the axes of one image: `channel`, `y`, `x`, `time`, `token`, `feature`, or `axis_1` … where unknown.

    One axis of unknown meaning makes the positions of the others useless for geometry, so that they are unknown too;
    the channels are still the channels, where they are all of them.
    """
    unknown = tuple(f"axis_{i + 1}" for i in range(ndim))
    if axes is None:
        return unknown
    roles = [role_of(axis) for axis in axes]
    if sorted(roles) == [UNKNOWN, CHANNEL] and length(axes[roles.index(UNKNOWN)]) == 1:
        roles[roles.index(UNKNOWN)] = TOKEN  # one vector: a class token by itself
    if not all(role in (CHANNEL, TOKEN, *SPATIAL) for role in roles) or len(set(roles)) != len(roles):
        whole = [i for i, role in enumerate(roles) if role == CHANNEL and _all_channels(axes[i])]
        named = roles.count(CHANNEL) == len(whole) == 1
        return tuple(CHANNEL if named and i in whole else name for i, name in enumerate(unknown))
    if not set(roles) & set(SPATIAL):  # without positions a channel is called a feature
        roles = ["feature" if role == CHANNEL else role for role in roles]
    return tuple(roles)


def _all_channels(axis: Axis) -> bool:
    return all(atom.role == CHANNEL and atom.outer == atom.inner == 1 for atom in _wide(axis))


def without_batch(axes: Axes | None, axis: int, k: int, outer: bool) -> Axes | None:
    """The axes of one image, after the batch was taken out of `axis`, leaving `k` in its place where k > 1.

    `outer` says that the batch is the slow index of that axis. None where the trace saw the batch elsewhere.
    """
    if axes is None:
        return None
    atoms = axes[axis]
    if k == 1 and {atom.role for atom in atoms} <= {UNKNOWN}:  # the trace lost it, the probe's values found it
        atoms = plain(BATCH, length(atoms))
    at = 0 if outer else len(atoms) - 1
    elsewhere = any(atom.role == BATCH for i, other in enumerate(axes) if i != axis for atom in other)
    if not atoms or atoms[at].role != BATCH or elsewhere:
        return None
    rest = tuple(atom for i, atom in enumerate(atoms) if i != at)
    kept = (rest,) if k > 1 else ()
    return (*axes[:axis], *kept, *axes[axis + 1 :])
