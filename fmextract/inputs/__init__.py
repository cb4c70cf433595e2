"""Where images come from, and from bytes to pixels."""
