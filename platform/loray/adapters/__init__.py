"""LoRA, VeRA and LongLoRA adapters as data and as modules; reading and writing PEFT's on-disk format."""
