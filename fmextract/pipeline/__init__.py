"""The stages from a row to a published shard."""
