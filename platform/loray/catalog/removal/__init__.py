"""What leaves: names and versions that are deleted and restored, and what the store must keep."""
