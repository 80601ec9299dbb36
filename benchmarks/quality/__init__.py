"""The benchmark of quality: what methods learn in equal steps, ours and PEFT's, on tasks with scores."""
