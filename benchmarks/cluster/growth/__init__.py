"""Replicas that follow a working set, of two bases in one deployment."""
