"""Requests of a run: from traces of production, or made up."""
