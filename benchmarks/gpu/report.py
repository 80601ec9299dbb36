"""The results of `make gpu`: one table for people, one JSON file for programs."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu.state import State


def write_results(folder: Path, state: State) -> str:
    """Writes results.md and results.json to `folder`; returns the table."""
    figures = {name: _rows(folder / f"{name}.json") for name in state.phases}
    text = table(state, {name: rows for name, rows in figures.items() if rows})
    (folder / "results.md").write_text(text, encoding="utf-8")
    results = asdict(state) | {"date": time.strftime("%Y-%m-%d"), "figures": figures}
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return text


def table(state: State, figures: dict[str, dict[str, dict[str, Any]]]) -> str:
    lines = [f"# {state.card}, commit {state.commit}", "", "| phase | outcome | seconds | |", "|---|---|---|---|"]
    lines += [f"| {name} | {p['outcome']} | {p['seconds']} | {p['why']} |" for name, p in state.phases.items()]
    for name, rows in figures.items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        lines += ["", f"## {name}", "| case | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        lines += [
            f"| {case} | " + " | ".join(str(row.get(c, "")) for c in columns) + " |" for case, row in rows.items()
        ]
    return "\n".join(lines) + "\n"


def _rows(file: Path) -> dict[str, dict[str, Any]]:
    if not file.exists():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))
    if "rows" in found:
        return dict(found["rows"])
    # benchmarks.kernels.gpu
    return {
        c["case"]: {
            "us": round(1e3 * c["ours"], 1),
            "recorded_us": round(1e3 * c["recorded"], 1),
            "floor_us": round(1e3 * c["floor"], 1),
            "of_floor": round(c["floor"] / c["recorded"], 3),
        }
        for c in found["milliseconds"]
    }
