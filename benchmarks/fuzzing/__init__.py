"""Random requests by the OpenAPI documents, with keys of every kind, while streams of other tenants go on."""
