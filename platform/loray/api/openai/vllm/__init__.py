"""Requests and answers of routes that vLLM has and OpenAI does not."""
