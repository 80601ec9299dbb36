"""When workers that failed are started again, decided in Ray Train's controller.

A lost process or node, a peer that no longer answers, and a disk, network or storage that failed say nothing about the
run, which goes on from its last checkpoint. Every other error would come again, and ends the run at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from ray.exceptions import RayError
from ray.train import FailureConfig
from ray.train.v2._internal.exceptions import RayTrainError
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision  # private: no hook
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from jobs.events.messages import first_line
from jobs.events.schema import Emit
from loray.errors import StoreError
from loray_kernels.memory import is_out_of_memory

_MAX_AT_ONCE = 3
_REFILL_S = 3600.0  # after which one more loss is allowed again, up to `_MAX_AT_ONCE`
# Beside these types: what gloo, which has no type of its own, and a device that failed say.
_LOST = (RayError, RayTrainError, torch.distributed.DistError, OSError, StoreError)
_WORDS_OF_LOST = ("gloo/", "CUDA error")


class Restarts(DefaultFailurePolicy):  # type: ignore[misc]
    """Allows three losses at once and one more an hour, over a run of any length. Nodes whose end was announced, and
    workers that could not start, are Ray Train's to decide.
    """

    def __init__(self, tell: Emit = lambda event: None, clock: Callable[[], float] = time.monotonic) -> None:
        """`tell` gets an event of each restart."""
        super().__init__(FailureConfig())
        self._tell, self._clock = tell, clock
        self._left, self._counted_at = float(_MAX_AT_ONCE), 0.0

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        decision = self._decide(training_failed_error)
        failures = getattr(training_failed_error, "worker_failures", None)
        if decision is FailureDecision.RETRY and failures:
            rank, error = next(iter(failures.items()))
            self._tell({"event": "worker_lost", "message": f"rank {rank}: {first_line(error)}"})
        return decision

    def _decide(self, error: TrainingFailedError) -> FailureDecision:
        decision: FailureDecision = super().make_decision(error)
        if decision is FailureDecision.RETRY or not isinstance(error, WorkerGroupError):
            return decision
        if not any(map(is_lost, error.worker_failures.values())):
            return FailureDecision.RAISE
        return FailureDecision.RETRY if self._take() else FailureDecision.RAISE

    def _take(self) -> bool:
        """Return whether one more loss is allowed, and count it."""
        now = self._clock()
        self._left = min(float(_MAX_AT_ONCE), self._left + (now - self._counted_at) / _REFILL_S)
        self._counted_at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


def is_lost(error: BaseException) -> bool:
    """Return whether a worker failed by what is around it, and not by what it computes."""
    if is_out_of_memory(error):
        return False
    return isinstance(error, _LOST) or (
        isinstance(error, RuntimeError) and any(w in str(error) for w in _WORDS_OF_LOST)
    )
