"""A network, ready to run: which of the faster ways of running it give what it gives as it is written."""
