"""What times, checks and compares fmextract; no part of the package.

This file makes the folder a package, so that a library's own `benchmarks` (pyarrow 17 has one) is not taken for it.
"""
