"""The protocol through which the loop reports events and checkpoints, and an implementation that writes to a folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

Metrics = dict[str, Any]


class Reporter(Protocol):
    def report(self, metrics: Metrics, checkpoint: Path | None) -> None:
        """Every rank makes the same calls. `metrics["event"]` is start, step, eval or checkpoint.

        `checkpoint` is a folder on rank 0, which the loop deletes after the call: move or copy its files.
        """


def start_event(num_parameters: int, num_trainable: int, data: dict[str, Any]) -> Metrics:
    """What this process trains, and with what. `data` is the data set's report."""
    return {
        "event": "start",
        "num_parameters": num_parameters,
        "num_trainable": num_trainable,
        "trainable_share": num_trainable / num_parameters,
        "num_threads": torch.get_num_threads(),
        "pid": os.getpid(),
        "data": data,
    }


class SavedCheckpoint(NamedTuple):
    path: Path
    step: int
    eval_loss: float | None


class FolderReporter:
    """Keeps events in `events`, and checkpoints as `folder/step_000010`: the `keep` best, and the latest."""

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
        """The checkpoint with the lowest evaluation loss; the latest where none was evaluated. Raises IndexError where
        there is none.
        """
        return self._ranked()[0]

    def _ranked(self) -> list[SavedCheckpoint]:
        return sorted(self.checkpoints, key=lambda c: (float("inf") if c.eval_loss is None else c.eval_loss, -c.step))
