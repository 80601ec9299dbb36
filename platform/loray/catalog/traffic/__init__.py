"""Canaries: their rows, and when what was counted of one is outside its bounds."""
