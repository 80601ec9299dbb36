"""What runs in Ray Train's controller and reports saved checkpoints, which only the controller knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray.train
from ray.actor import ActorHandle
from ray.train import Checkpoint

from jobs.events.schema import CheckpointEvent
from jobs.events.sink import EventSender


class EventLog(ray.train.UserCallback):  # type: ignore[misc]
    """Reports saved checkpoints. `run` is the name of the run's folder, as shown to people."""

    def __init__(self, sink: ActorHandle, run: str) -> None:
        self._events = EventSender(sink)
        self._run = run

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        if checkpoint is not None:
            event: CheckpointEvent = {
                "event": "checkpoint",
                "step": metrics[0]["step"],
                "eval_loss": metrics[0]["eval_loss"],
                "path": f"{self._run}/{Path(checkpoint.path).name}",
            }
            self._events.send(event)
            self._events.flush()
