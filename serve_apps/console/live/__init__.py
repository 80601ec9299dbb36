"""What the console keeps between two looks at what changes: the server's state, and a job's losses."""
