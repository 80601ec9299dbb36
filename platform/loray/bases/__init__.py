"""Base models: architectures, configuration, RoPE, fingerprints, and the local folder of them."""
