"""Accounts of requests: quotas, usage, and the access log."""
