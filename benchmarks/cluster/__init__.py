"""Routers on a real cluster over HTTP, side by side on one trace; and the simulator on the same trace."""
