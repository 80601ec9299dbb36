"""loray: train, publish and serve thousands of LoRA, VeRA and LongLoRA adapters on one base model, on Ray."""

__version__ = "0.1.0"
