"""Evaluation on long contexts: dense perplexity by window, and retrieval by depth and length."""
