"""What a model is worth on long contexts: dense perplexity by window, retrieval by depth and length, compared."""
