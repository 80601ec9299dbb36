"""The catalog at a hundred thousand adapters: what a gateway and the catalog API wait for."""
