"""Draw pictures of what was stored, and of the network itself; they need matplotlib, the extra `look`.

Reading and drawing needs no torch; only what runs a network, `show_filters` and `activations_of`, imports it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fmextract.visual.canvas import Style
from fmextract.visual.depth import LayerDepth, measure_depth, show_depth
from fmextract.visual.differences import draw_comparison
from fmextract.visual.maps import MapPicture, draw_maps, show_maps
from fmextract.visual.top import Example, show_top, strongest, top_picture
from fmextract.visual.where import Where, localize, show_where, where_picture

if TYPE_CHECKING:
    from fmextract.visual.filters import Filters, show_filters
    from fmextract.visual.live import activations_of, show_maps_of

_LAZY = {
    "Filters": "fmextract.visual.filters",
    "activations_of": "fmextract.visual.live",
    "show_filters": "fmextract.visual.filters",
    "show_maps_of": "fmextract.visual.live",
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
        raise AttributeError(f"module 'fmextract.visual' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
