"""Training on Ray: the driver (`python -m jobs.train`), its workers, and the command `loray train`."""
