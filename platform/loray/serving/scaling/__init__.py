"""How many replicas run: what each measures of its demand, and the number that follows."""
