"""What people use at a terminal: chat, top, logs, open, completion."""
