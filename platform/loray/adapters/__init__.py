"""LoRA, VeRA and LongLoRA as data and as modules; PEFT's on-disk format both ways; shared projections."""
