"""Which failures of workers are overcome by starting them again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.exceptions import PreemptionError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from jobs.controller import Restarts
from jobs.driver.fit import Workload, build_trainer
from jobs.runs.folders import open_runs
from loray.errors import StoreError, TrainingError
from loray.settings import Settings
from tests.fixtures.recipes import write

RETRY, RAISE = FailureDecision.RETRY, FailureDecision.RAISE
KILLED = WorkerHealthCheckFailedError("the worker is gone", failure=ActorDiedError())
CLOSED = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")


def failure(*errors: Exception) -> WorkerGroupError:
    return WorkerGroupError("failed", dict(enumerate(errors)))


def test_losses_with_a_checkpoint_between_them_pass() -> None:
    told, pauses, steps = list[Any](), list[float](), iter(range(10, 110, 10))
    restarts = Restarts(told.append, lambda: next(steps), pauses.append)
    assert [restarts.make_decision(failure(KILLED)) for _ in range(10)] == [RETRY] * 10
    message = "rank 0: WorkerHealthCheckFailedError: the worker is gone"
    assert told == [{"event": "worker_lost", "message": message}] * 10
    assert pauses == [0] * 10


def test_three_losses_without_a_checkpoint_are_the_most() -> None:
    step, told, pauses = None, list[Any](), list[float]()
    restarts = Restarts(told.append, lambda: step, pauses.append)
    assert [restarts.make_decision(failure(KILLED)) for _ in range(4)] == [RETRY, RETRY, RETRY, RAISE]
    assert pauses == [0, 5, 20]
    step = 10
    assert [restarts.make_decision(failure(KILLED)) for _ in range(4)] == [RETRY, RETRY, RETRY, RAISE]
    assert len(told) == 6  # a run that ends does not go on from the last checkpoint


def test_nodes_whose_end_was_announced_do_not_count() -> None:
    told: list[Any] = []
    restarts = Restarts(told.append, pause=told.append)
    taken = PreemptionError(PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a": [0, 1]}))
    assert [restarts.make_decision(taken) for _ in range(9)] == [RETRY] * 9
    assert told == [{"event": "worker_lost", "message": "1 of the run's nodes, as announced"}] * 9


@pytest.mark.parametrize(
    "error",
    [
        *(ValueError("a bug"), TrainingError("out of memory"), RuntimeError("shapes differ")),
        *(torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory")),
        RuntimeError("CUDA error: device-side assert triggered"),
    ],
)
def test_an_error_that_would_come_again_ends_the_run_at_once(error: Exception) -> None:
    told: list[Any] = []
    assert Restarts(told.append).make_decision(failure(error)) is RAISE
    assert not told


@pytest.mark.parametrize(
    "errors",
    [
        (CLOSED,),
        (CLOSED, KILLED),
        (torch.distributed.DistBackendError("NCCL error: remote process exited"),),
        (OSError("No space left on device"),),
        (StoreError("the bucket does not answer"),),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"),),
    ],
)
def test_what_is_around_a_worker_may_be_better_the_next_time(errors: tuple[Exception, ...]) -> None:
    assert Restarts(pause=lambda seconds: None).make_decision(failure(*errors)) is RETRY


@pytest.mark.parametrize("min_workers", [None, 2])
def test_the_controller_gets_our_policy(
    min_workers: int | None, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings.from_env({"LORAY_HOME": str(tmp_path)})
    spec = write(tmp_path, num_workers=4, min_workers=min_workers, use_gpu=False).spec
    work = Workload(spec, SimpleNamespace(fingerprint="0" * 64), None, False, None, "")  # type: ignore[arg-type]
    trainer = build_trainer(work, open_runs(settings).new("a", "job"), settings, None)  # type: ignore[arg-type]
    passed: dict[str, Any] = {}

    monkeypatch.setattr(
        "ray.train.torch.TorchTrainer._initialize_and_run_controller", lambda self, **kwargs: passed.update(kwargs)
    )
    trainer._initialize_and_run_controller(failure_policy=None, scaling_policy=None)
    assert isinstance(passed["failure_policy"], Restarts)
    assert (type(passed["scaling_policy"]).__name__ == "WholeGroupScaling") is (min_workers is not None)
