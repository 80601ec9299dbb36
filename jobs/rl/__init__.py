"""Reinforcement learning: a driver between a trainer and the deployment that samples for it."""
