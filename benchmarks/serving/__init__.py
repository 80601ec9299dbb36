"""The benchmark of serving: adapters from a store, requests of a known distribution, and peers in the same run."""
