"""Carries events from workers on any node to a file on the driver's node, through an actor on that node."""

from __future__ import annotations

from pathlib import Path

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.events.messages import encode
from jobs.events.schema import Event


class _EventSink:
    """Appends lines to the run's file, each in one write."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def append(self, line: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")


def start_sink(path: Path) -> ActorHandle:
    """Starts the actor that appends to `path`, a file of this node. The actor ends with this driver."""
    here = ray.get_runtime_context().get_node_id()
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_EventSink)
    strategy = NodeAffinitySchedulingStrategy(here, soft=False)
    started: ActorHandle = actor.options(scheduling_strategy=strategy).remote(str(path))
    return started


class EventSender:
    """Sends events to the sink in order, one at a time: a call waits until the event before it has been written."""

    def __init__(self, sink: ActorHandle) -> None:
        self._sink = sink
        self._sent: ObjectRef | None = None

    def send(self, event: Event) -> None:
        self.flush()
        self._sent = self._sink.append.remote(encode(event))

    def flush(self) -> None:
        """Waits until every event has been written."""
        if self._sent is not None:
            ray.get(self._sent)
            self._sent = None
