"""Two trials on a real cluster: the store is away for a minute, and one tenant floods."""
