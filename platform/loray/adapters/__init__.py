"""Adapters as files: PEFT's format read and written, manifests, and other forms of an adapter."""
