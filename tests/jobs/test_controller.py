"""Which failures of workers are overcome by starting them again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.exceptions import WorkerGroupError

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


def test_ten_kills_in_twelve_hours_pass() -> None:
    now, told = 0.0, []
    restarts = Restarts(told.append, clock=lambda: now)
    for _ in range(10):
        now += 12 / 10 * 3600
        assert restarts.make_decision(failure(KILLED)) is RETRY
    message = "rank 0: WorkerHealthCheckFailedError: the worker is gone"
    assert told == [{"event": "worker_lost", "message": message}] * 10


def test_three_losses_at_once_are_the_most_and_an_hour_allows_another() -> None:
    now, told = 99.0, []
    restarts = Restarts(told.append, clock=lambda: now)
    assert [restarts.make_decision(failure(KILLED)) for _ in range(4)] == [RETRY, RETRY, RETRY, RAISE]
    now += 3600
    assert [restarts.make_decision(failure(KILLED)) for _ in range(2)] == [RETRY, RAISE]
    assert len(told) == 4  # a run that ends does not go on from the last checkpoint


@pytest.mark.parametrize(
    "error",
    [
        *(ValueError("a bug"), TrainingError("out of memory"), RuntimeError("shapes differ")),
        *(torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory")),
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
    assert Restarts().make_decision(failure(*errors)) is RETRY


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
