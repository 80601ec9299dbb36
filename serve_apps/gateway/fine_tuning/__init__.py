"""OpenAI's fine-tuning routes. A job of theirs is a training job of loray: nothing is kept beside it."""
