"""A run: prepare, plan, extract, fold."""
