"""Tinker's protocol: messages, requests, results and paths (https://tinker-docs.thinkingmachines.ai)."""
