"""Write sizes, durations and aligned tables for people, and keys that cannot harm a terminal."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Collection, Sequence

from fmextract.records import Field

ELLIPSIS = "…"
NARROWEST = 8
"""A column is not cut below this many characters: narrower says nothing."""


def printable(text: object) -> str:
    """Return `text` on one line, with control characters, bidirectional marks and lone surrogates shown as escapes.

    File names may hold anything but "/" and NUL; printed as they are, they could move the cursor or paint the screen.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))


def byte_count(count: float) -> str:
    """Write 1536 as `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1000 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"


def duration(seconds: float) -> str:
    """Write 3725 as `1 h 02 min`, 65 as `1 min 05 s`, 2.5 as `2.5 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"


def rate(per_second: float) -> str:
    """Write 1234.5 as `1,234`, 12.34 as `12.3`."""
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"


def share(fraction: float | None) -> str:
    """Write 0.125 as `12.5%`; a small share keeps its digits, 0 is `0`, None is empty."""
    if not fraction:
        return "" if fraction is None else "0"
    return f"{100 * fraction:.1f}%" if fraction >= 0.0095 else f"{100 * fraction:.2g}%"


def shape(sizes: Sequence[int] | None) -> str:
    """Write (64, 56, 56) as `64×56×56`; None, of what never ran, as nothing."""
    return "" if sizes is None else "×".join(map(str, sizes))


def seen(field: Field) -> str:
    """`43×43 px`, `at most 43×43 px` where that is a bound, or `the whole image`: what a receptive field covers."""
    if field.whole:
        return "the whole image"
    return f"{'at most ' if field.bound else ''}{shape([round(side) for side in field.size])} px"


def count(number: int, noun: str) -> str:
    """Write 1 as `1 image`, 1200 as `1,200 images`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def some(names: Sequence[str], most: int = 4) -> str:
    """Return the first of `names`, quoted, and how many more there are."""
    return ", ".join(repr(n) for n in names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def table(
    head: Sequence[str], rows: Sequence[Sequence[object]], *, right: Collection[str] = (), width: int | None = None
) -> str:
    """Write rows under their head, in aligned columns; the columns named in `right` are set to the right.

    A column without a value in any row is left out. Where the table is wider than `width`, the widest columns of text
    are cut in the middle (both ends of a module's path matter). Without `width` nothing is cut.
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    kept = [i for i in range(len(head)) if not cells or any(row[i] for row in cells)]
    columns = [[head[i], *(row[i] for row in cells)] for i in kept]
    widths = [max(map(_columns, column)) for column in columns]
    if width is not None:
        widths = _fitted(widths, [head[i] not in right for i in kept], width)
    padded = [
        [_padded(_cut(cell, wide), wide, head[i] in right) for cell in column]
        for i, column, wide in zip(kept, columns, widths, strict=True)
    ]
    return "\n".join("  ".join(line).rstrip() for line in zip(*padded, strict=True))


class Tabled:
    """A result that `print` shows as the command line does, and a notebook as well."""

    __slots__ = ()

    def table(self, width: int | None = None) -> str:
        """Return lines of text, cut to `width` characters where it is given."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.table())}</pre>"


def _fitted(widths: list[int], may_shrink: list[bool], width: int) -> list[int]:
    """Shrink the widest column that may shrink, until all of them fit or none can shrink further."""
    widths = list(widths)
    while sum(widths) + 2 * (len(widths) - 1) > width:
        widest = max((i for i, may in enumerate(may_shrink) if may), key=widths.__getitem__, default=None)
        if widest is None or widths[widest] <= NARROWEST:
            break
        widths[widest] -= 1
    return widths


def _columns(text: str) -> int:
    """Return how many columns of a terminal `text` takes: wide East Asian characters take two, combining marks none."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def _cut(text: str, width: int) -> str:
    if _columns(text) <= width:
        return text
    head, tail = text[: len(text) // 2], text[len(text) // 2 :]
    while _columns(head) + _columns(tail) + 1 > width:
        if len(head) > len(tail):
            head = head[:-1]
        else:
            tail = tail[1:]
    return head + ELLIPSIS + tail


def _padded(text: str, width: int, right: bool) -> str:
    space = " " * (width - _columns(text))
    return space + text if right else text + space


def size_change(before: float, after: float) -> str:
    """Say by how much something shrank or grew: `3.2 times smaller`, `1.4 times larger`."""
    ratio = max(before, after) / max(1, min(before, after))
    if round(ratio, 1) == 1.0:
        return "no smaller"
    return f"{ratio:.1f} times {'smaller' if after < before else 'larger'}"
