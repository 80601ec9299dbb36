"""Options that several benchmarks have."""

from __future__ import annotations


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between them. ValueError, of which argparse makes its own."""
    return tuple(int(n) for n in text.split(","))
