"""Pictures of what was stored, and of the network itself; they need matplotlib, the extra `look`.

Reading and drawing needs no torch; only what runs a network, `show_filters` and `activations_of`, imports it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fmextract.look.canvas import Style
from fmextract.look.depth import LayerDepth, measure_depth, show_depth
from fmextract.look.differences import draw_comparison
from fmextract.look.maps import MapPicture, draw_maps, show_maps
from fmextract.look.top import Example, show_top, strongest, top_picture
from fmextract.look.where import Where, localize, show_where, where_picture

if TYPE_CHECKING:
    from fmextract.look.filters import Filters, show_filters
    from fmextract.look.live import activations_of, show_maps_of

_LAZY = {
    "Filters": "fmextract.look.filters",
    "activations_of": "fmextract.look.live",
    "show_filters": "fmextract.look.filters",
    "show_maps_of": "fmextract.look.live",
}

__all__ = [
    "Example",
    "Filters",
    "LayerDepth",
    "MapPicture",
    "Style",
    "Where",
    "activations_of",
    "draw_comparison",
    "draw_maps",
    "localize",
    "measure_depth",
    "show_depth",
    "show_filters",
    "show_maps",
    "show_maps_of",
    "show_top",
    "show_where",
    "strongest",
    "top_picture",
    "where_picture",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fmextract.look' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
