"""What runs in Ray Train's controller: events, the size of a run, and restarts."""
