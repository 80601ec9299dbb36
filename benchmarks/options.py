"""Options that several benchmarks have."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def one_or_more(text: str) -> int:
    """A whole number. ValueError where it is none, ArgumentTypeError below 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def check_only(part: str, names: Sequence[str]) -> None:
    """SystemExit names all cases where no name contains what --only gives."""
    if not any(part in name for name in names):
        raise SystemExit(f"--only {part} is in no case's name; there are: {', '.join(names)}")
