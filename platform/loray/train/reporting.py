"""Where a run's news go. The loop knows this protocol; Ray is one implementation, a folder another."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple, Protocol

Metrics = dict[str, Any]


class Reporter(Protocol):
    def report(self, metrics: Metrics, checkpoint: Path | None) -> None:
        """Called equally often on every rank. `metrics["event"]` is start, step, eval or checkpoint.

        `checkpoint` is a folder on rank 0 that is deleted when the call returns; move or copy what is to stay.
        """


class SavedCheckpoint(NamedTuple):
    path: Path
    step: int
    eval_loss: float | None


class FolderReporter:
    """Keeps every event in `events` and checkpoints as `folder/step_000010`: the `keep` best, and always the latest."""

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self._folder, self._keep = folder, keep
        self.events: list[Metrics] = []
        self.checkpoints: list[SavedCheckpoint] = []

    def report(self, metrics: Metrics, checkpoint: Path | None) -> None:
        self.events.append(metrics)
        if checkpoint is None:
            return
        path = self._folder / f"step_{metrics['step']:06d}"
        shutil.copytree(checkpoint, path)
        latest = SavedCheckpoint(path, metrics["step"], metrics.get("eval_loss"))
        self.checkpoints.append(latest)
        for old in self._ranked()[self._keep :]:
            if old != latest:
                shutil.rmtree(old.path)
                self.checkpoints.remove(old)

    @property
    def best(self) -> SavedCheckpoint:
        """Lowest evaluation loss; the latest where none was evaluated. IndexError where there is none."""
        return self._ranked()[0]

    def _ranked(self) -> list[SavedCheckpoint]:
        return sorted(self.checkpoints, key=lambda c: (float("inf") if c.eval_loss is None else c.eval_loss, -c.step))
