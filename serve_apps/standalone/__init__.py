"""`loray serve`: gateway, engine and catalog API in one process, without Ray."""
