"""Recipes: what a file, its defaults, a base and the hardware make of a training run."""
