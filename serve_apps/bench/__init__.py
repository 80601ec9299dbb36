"""Benchmarks of serving. Each prints what it ran, on what, against what, side by side in one run."""
