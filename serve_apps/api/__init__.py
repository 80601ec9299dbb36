"""The catalog's REST API, /api/v1: adapters, aliases, placement and training jobs. It is a Serve application itself."""
