"""Adapters from one replica to another: who has what, gateways say with each request; the bytes go through Ray."""
