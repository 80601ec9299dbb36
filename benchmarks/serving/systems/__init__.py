"""The systems under test: loray's engine in process and over HTTP, transformers + PEFT, vLLM."""
