"""The catalog's REST API, /api/v1: adapters, aliases, placement and training jobs. A Serve application of its own."""
