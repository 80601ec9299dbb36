"""The engine in this process: what single features of it cost a step."""
