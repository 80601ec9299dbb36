"""Ray Train's controller: restarts after losses, elastic sizes, and the events of checkpoints.

A lost process or node, a peer that no longer answers, and a disk, network or storage that failed say nothing about the
run, which goes on from its last checkpoint: a few times, and again after each further checkpoint. Nodes whose end was
announced count for nothing. Every other error would come again, and ends the run at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.train import Checkpoint, FailureConfig, ScalingConfig
from ray.train.v2._internal.exceptions import RayTrainError
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision  # private: no hook
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
from ray.train.v2.api.exceptions import PreemptionError, TrainingFailedError, WorkerGroupError

from jobs.events import CheckpointEvent, Emit, first_line
from jobs.workers.placement import leaving_nodes
from jobs.workers.reporting import EventSender
from loray.errors import StoreError
from loray_kernels.memory import is_out_of_memory

_PAUSES_S = (0.0, 5.0, 20.0)  # before the workers start again, for each loss without a checkpoint since the one before
# Beside these types: what gloo, which has no type of its own, and a device that failed say.
_LOST = (RayError, RayTrainError, torch.distributed.DistError, OSError, StoreError)
_WORDS_OF_LOST = ("gloo/", "CUDA error")
_WORDS_OF_BUGS = ("device-side assert",)  # an index that is out of range, as a GPU says it


class WholeGroupScaling(ElasticScalingPolicy):  # type: ignore[misc]
    """Ray Train's elastic policy, with numbers of workers that are multiples of `group_size`, on nodes that live.

    It decides when to resize, and restarts the workers from the last checkpoint. It has no public setting for the size
    of a group, so a private method of it is overridden. What it knows of nodes may be 20 s old: workers that it places
    on a node that was just lost would be waited for until Ray Train's timeout, a minute.
    """

    def __init__(self, scaling_config: ScalingConfig, group_size: int) -> None:
        super().__init__(scaling_config)
        self._group_size = group_size

    def _count_possible_workers(self, reserved_resources: Any) -> int:  # private: Ray has no public hook for the number
        live = {node["NodeID"] for node in ray.nodes() if node["Alive"]} - leaving_nodes()
        reserved = {node: resources for node, resources in reserved_resources.items() if node in live}
        possible: int = super()._count_possible_workers(reserved)
        return possible - possible % self._group_size


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


class Restarts(DefaultFailurePolicy):  # type: ignore[misc]
    """Allows three losses in a row, with longer and longer pauses; a checkpoint between two begins a new row. Nodes
    whose end was announced, and workers that could not start, are Ray Train's to decide.
    """

    def __init__(
        self,
        tell: Emit = lambda event: None,
        last_step: Callable[[], int | None] = lambda: None,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        """`tell` gets an event of each restart; `last_step` is that of the last checkpoint."""
        super().__init__(FailureConfig())
        self._tell, self._last_step, self._pause = tell, last_step, pause
        self._num_lost = 0
        self._lost_at: int | None = None

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        error, decision = training_failed_error, super().make_decision(training_failed_error)
        if decision is not FailureDecision.RETRY and isinstance(error, WorkerGroupError):
            is_loss = any(map(is_lost, error.worker_failures.values()))
            decision = FailureDecision.RETRY if is_loss and self._take() else FailureDecision.RAISE
        if decision is FailureDecision.RETRY and isinstance(error, PreemptionError):
            num_nodes = len(error.preemption_info.preempted_node_ids)
            self._tell({"event": "worker_lost", "message": f"{num_nodes} of the run's nodes, as announced"})
        failures = getattr(error, "worker_failures", None)
        if decision is FailureDecision.RETRY and failures:
            rank, failure = next(iter(failures.items()))
            self._tell({"event": "worker_lost", "message": f"rank {rank}: {first_line(failure)}"})
        return decision

    def _take(self) -> bool:
        """Says whether one more loss is allowed, after a pause, and counts it."""
        step = self._last_step()
        self._num_lost = self._num_lost + 1 if step == self._lost_at else 1
        self._lost_at = step
        if self._num_lost > len(_PAUSES_S):
            return False
        self._pause(_PAUSES_S[self._num_lost - 1])
        return True


def is_lost(error: BaseException) -> bool:
    """Says whether a worker failed by what is around it, and not by what it computes."""
    if is_out_of_memory(error) or any(words in str(error) for words in _WORDS_OF_BUGS):
        return False
    return isinstance(error, _LOST) or (
        isinstance(error, RuntimeError) and any(w in str(error) for w in _WORDS_OF_LOST)
    )
