"""Serving on Ray Serve: the gateway (HTTP), the engine's replicas, and `loray up`, `status` and `down`."""
