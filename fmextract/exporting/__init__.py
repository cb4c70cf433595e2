"""Stored layers in the formats of other tools."""
