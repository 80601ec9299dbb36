"""What serving decides and says, as plain Python: neither torch, nor Ray, nor HTTP."""
