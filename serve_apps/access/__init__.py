"""Who asks, in front of the gateway and of the catalog's API: keys, tenants, and what a browser may be tricked into."""
