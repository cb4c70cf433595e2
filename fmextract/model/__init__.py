"""Load a network and make it ready to run, in the fastest way that gives the same values as its code."""
