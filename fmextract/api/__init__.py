"""The public functions: signatures, words and examples. What they do is imported when they are called; no torch here.

Their keywords are those of the command line, and an output is given by its path or as `open` returned it.
"""
