"""Base models: architectures, configuration, RoPE, fingerprints, and the local folder that holds them."""
