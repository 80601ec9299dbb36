"""The base of a run: whole, or as the shards of its strategy."""
