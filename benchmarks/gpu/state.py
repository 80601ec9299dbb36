"""What has been done: a file in the folder of the results, beside each phase's log and figures."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Outcome = Literal["done", "failed", "out of time", "skipped"]


@dataclass
class State:
    """`card` and `commit`: what was measured, and of which source; results of others are not continued."""

    card: str
    commit: str
    phases: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, card: str, commit: str) -> State:
        """The folder's state, or an empty one. ValueError if it is of another card or commit."""
        file = folder / "state.json"
        if not file.exists():
            return cls(card, commit)
        state = cls(**json.loads(file.read_text(encoding="utf-8")))
        if (state.card, state.commit) != (card, commit):
            raise ValueError(
                f"{folder} has results of {state.card} at {state.commit}, this is {card} at {commit}; name another "
                "folder with --folder, or remove that one"
            )
        return state

    def is_done(self, phase: str) -> bool:
        return self.phases.get(phase, {}).get("outcome") == "done"

    def note(self, folder: Path, phase: str, outcome: Outcome, seconds: float, why: str = "") -> None:
        self.phases[phase] = {"outcome": outcome, "seconds": round(seconds, 1), "why": why}
        made = folder / "state.json.part"
        made.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        made.replace(folder / "state.json")


class Figures:
    """Rows of a measurement by case, written after each, so that a phase that was stopped goes on where it was."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.rows: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            self.rows = json.loads(path.read_text(encoding="utf-8"))["rows"]

    def add(self, case: str, row: dict[str, Any]) -> None:
        self.rows[case] = row
        if self._path is not None:
            made = self._path.with_suffix(".part")
            made.write_text(json.dumps({"rows": self.rows}, indent=2) + "\n", encoding="utf-8")
            made.replace(self._path)
