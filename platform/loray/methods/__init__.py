"""Adapter methods: LoRA, DoRA and VeRA as tensors, as modules, and as what PEFT makes of them."""
