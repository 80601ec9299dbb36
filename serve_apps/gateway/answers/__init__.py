"""Answers to generation requests: their headers, their texts, events or one body, and the connection to the client."""
