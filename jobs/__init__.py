"""Training on Ray: the driver behind `python -m jobs.train`, its workers, the `loray train` command, and recipes."""
