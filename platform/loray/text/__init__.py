"""Text on the way to the engine and back: the tokenizer of a base, and the text of a request's tokens."""
