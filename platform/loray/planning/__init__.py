"""Plans: the memory, traffic and time of a training run, computed in plain Python without torch."""
