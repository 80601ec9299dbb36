"""Reinforcement learning without Ray: losses on given log-probabilities, advantages of groups, rewards."""
