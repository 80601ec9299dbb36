"""Output that all benchmarks share: the line that describes the machine, and the JSON file of the figures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def machine_line(machine: Mapping[str, str], **more: str) -> str:
    """`describe_machine`'s names and values, and further ones, on one line."""
    return "  ".join(f"{name} {value}" for name, value in {**machine, **more}.items())


def write_json(path: Path | None, figures: object) -> None:
    """Write `figures` to `path` as indented JSON; do nothing if `path` is None."""
    if path is not None:
        path.write_text(json.dumps(without_nan(figures), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def without_nan(value: Any) -> Any:
    """NaN becomes None, since JSON has no NaN."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
