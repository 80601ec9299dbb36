"""Output that all benchmarks share: the line that describes the machine, and the JSON file of the figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


def machine_line(machine: Mapping[str, str], **more: str) -> str:
    """`describe_machine`'s names and values, and further ones, on one line."""
    return "  ".join(f"{name} {value}" for name, value in {**machine, **more}.items())


def write_json(path: Path | None, figures: object) -> None:
    """Write `figures` to `path` as indented JSON; do nothing if `path` is None."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
