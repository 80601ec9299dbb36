"""Benchmarks of training, serving, quality and kernels. Nothing imports them, and the wheel leaves them out."""
