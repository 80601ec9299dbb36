"""The command `loray`: bases, adapters, plans and evaluations; installed packages add commands by entry points."""
