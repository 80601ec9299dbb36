"""Base models: what architectures are covered, their configuration, RoPE, fingerprints, and the local folder of them."""
