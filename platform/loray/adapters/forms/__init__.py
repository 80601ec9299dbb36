"""Adapters in forms that other tools know: VeRA as LoRA, merged into the base, and llama.cpp's GGUF."""
