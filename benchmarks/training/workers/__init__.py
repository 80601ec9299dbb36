"""Programs that measure in separate processes, which the cases start; each prints JSON."""
