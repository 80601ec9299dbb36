"""The benchmark of quality: task scores after equally many training steps, by method, in loray and in PEFT."""
