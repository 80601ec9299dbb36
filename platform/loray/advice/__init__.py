"""Advice on which method to train with: a well-known score card, and estimates of each method's costs."""
