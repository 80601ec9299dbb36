"""Plans: what a run will cost in memory, traffic and time, as plain Python without torch."""
