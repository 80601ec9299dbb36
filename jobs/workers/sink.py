"""The file of a run's events, which an actor writes. Torch is not imported: it would take longer than all its work."""

from __future__ import annotations

from pathlib import Path

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


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
