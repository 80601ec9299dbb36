"""What requests may use and have used: quotas, usage events, the access log."""
