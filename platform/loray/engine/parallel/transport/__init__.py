"""How ranks find each other, and how values become bytes."""
