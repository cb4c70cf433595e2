"""`open(path)` and everything that only reads."""
