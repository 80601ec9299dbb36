"""A fault every few seconds under load: what breaks, what clients see of it, and what is left behind."""
