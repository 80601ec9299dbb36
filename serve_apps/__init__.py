"""Serving on Ray Serve: the gateway, the engine's replicas, the catalog's API, and `loray up`, `status` and `down`."""
