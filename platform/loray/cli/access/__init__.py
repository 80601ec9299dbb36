"""`loray keys`, `loray tenants` and `loray adapters share`: who may use a deployment, and what of it."""
