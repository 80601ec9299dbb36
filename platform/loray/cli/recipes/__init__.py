"""`loray recipes`, and the options from which commands make a recipe."""
