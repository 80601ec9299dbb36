"""Recipes by part: adapters (methods), context and attention (context), rows (data), and the whole (recipe)."""
