"""Pictures of what was stored; they need matplotlib, the extra `look`, and no torch."""

from fmextract.look.maps import draw_maps

__all__ = ["draw_maps"]
