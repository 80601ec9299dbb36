"""The events' way from workers on any node to the file that the driver follows: an actor on the driver's node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.events.messages import encode


class _EventSink:
    """Appends lines to the run's file, each in one write. It has no state, so Ray may start it again."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def append(self, line: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")


def start_sink(path: Path) -> Any:
    """A handle of the actor that appends to `path`, a file of this node. It ends with this driver."""
    here = ray.get_runtime_context().get_node_id()
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_EventSink)
    return actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False)).remote(str(path))


class EventSender:
    """One sender's events arrive in its order. At most one is on its way, so that a step waits for none of its own."""

    def __init__(self, sink: Any) -> None:
        self._sink = sink
        self._sent: Any = None

    def send(self, event: dict[str, Any]) -> None:
        self.flush()
        self._sent = self._sink.append.remote(encode(event))

    def flush(self) -> None:
        """Wait until everything has been written."""
        if self._sent is not None:
            ray.get(self._sent)
            self._sent = None
