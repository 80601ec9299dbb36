"""`loray keys` and `loray tenants`: who may use a deployment."""
