"""What runs in Ray Train's controller: the events that only the controller can report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray.train
from ray.actor import ActorHandle
from ray.train import Checkpoint

from jobs.events.messages import first_line
from jobs.events.schema import CheckpointEvent
from jobs.events.sink import EventSender


class EventLog(ray.train.UserCallback):  # type: ignore[misc]
    """Reports saved checkpoints and lost workers. `run` is the name of the run's folder, as shown to people."""

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

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        rank, error = next(iter(worker_exceptions.items()))
        self._events.send({"event": "worker_lost", "message": f"rank {rank}: {first_line(error)}"})
        self._events.flush()
