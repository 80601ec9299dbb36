"""Decisions and reports of serving in plain Python, without torch, Ray or HTTP: demand, routing, scaling."""
