"""Sweeps: one recipe trained with several values of its fields, and the best of them published."""
