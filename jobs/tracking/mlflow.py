"""A run in MLflow, at MLFLOW_TRACKING_URI, in the experiment MLFLOW_EXPERIMENT_NAME or `loray`."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from jobs.tracking.trackers import TrackedRun, Tracker

_LONGEST = 6000  # characters of a parameter's value
_MOST = 100  # parameters in one request


class _MlflowRun:
    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client, self._id = client, run_id

    def log(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def tag(self, tags: Mapping[str, str]) -> None:
        self._client.log_batch(self._id, tags=[RunTag(name, value) for name, value in tags.items()])

    def end(self, *, succeeded: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if succeeded else "FAILED")


def open_run(run: TrackedRun) -> Tracker:
    """The run with the tag `loray.run`, made with the recipe as its parameters where there is none."""
    client = MlflowClient()
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "loray")
    experiment = client.get_experiment_by_name(name)
    at = client.create_experiment(name) if experiment is None else experiment.experiment_id
    found = client.search_runs([at], f"tags.`loray.run` = '{run.at}'", max_results=1)
    if found:
        run_id = found[0].info.run_id
        client.update_run(run_id, status="RUNNING")
        return _MlflowRun(client, run_id)
    run_id = client.create_run(at, run_name=run.at, tags=run.tags).info.run_id
    parameters = [Param(key, value[:_LONGEST]) for key, value in run.parameters.items()]
    for first in range(0, len(parameters), _MOST):
        client.log_batch(run_id, params=parameters[first : first + _MOST])
    return _MlflowRun(client, run_id)
