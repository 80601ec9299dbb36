"""Experiment trackers that a recipe names in `tracking`, beside the run's own history: MLflow, and Weights & Biases."""
