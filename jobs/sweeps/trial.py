"""What runs in the process of a trial: the training driver's part that runs Ray Train, reporting to Ray Tune.

Ray's documentation has a trial start a trainer, and so it is here. The losses that Tune gets are those of the run's
events and not of its checkpoints: with `checkpoint.interval_steps`, not every evaluation has a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ray import tune

from jobs.driver.fit import fit
from jobs.driver.trainer import Workload
from jobs.events.schema import Event
from jobs.runs.folders import open_runs
from jobs.tracking.trackers import TrackedRun, tracked
from loray.errors import LorayError, TrainingError
from loray.settings import Settings
from loray.telemetry import configure_logging

PERCENT, LOSS = "percent", "eval_loss"  # of the trial's steps; what is minimised


class TrialTask(NamedTuple):
    """A trial's workload, where its run is (below the sweeps of `open_runs`), and what trackers show of it."""

    work: Workload
    run: str
    tracked: TrackedRun


class Results:
    """Passes a run's held-out losses to Tune, the last one only when the run has ended: Tune may stop a trial at any
    result, and a finished run must have saved its last checkpoint.
    """

    def __init__(self) -> None:
        self._num_steps = 0
        self._last: dict[str, Any] | None = None

    def emit(self, event: Event) -> None:
        match event["event"]:
            case "start":
                self._num_steps = event["num_steps"]
            case "eval" if event["subject"] == "adapter" and event["eval_loss"] is not None:
                result = self._result(event["step"], event["eval_loss"])
                if event["step"] < self._num_steps:
                    tune.report(result)
                else:
                    self._last = result

    def end(self, failure: str | None, latest: Mapping[str, Any]) -> None:
        """`latest`: of the last checkpoint. A run that had ended before its end was recorded has no event of it."""
        if self._last is None and latest.get("eval_loss") is not None and self._num_steps:
            self._last = self._result(latest["step"], latest["eval_loss"])
        tune.report({**(self._last or {}), "ended": True, "failure": failure})

    def _result(self, step: int, loss: float) -> dict[str, Any]:
        return {"step": step, "num_steps": self._num_steps, PERCENT: 100 * step / self._num_steps, LOSS: loss}


def run_trial(config: Mapping[str, Any], *, tasks: Mapping[int, TrialTask], settings: Settings) -> None:
    """Trains trial `config["trial"]`, from its last checkpoint if it has one."""
    configure_logging(settings.log_level)
    task, results = tasks[config["trial"]], Results()
    failure: str | None = None
    latest: Mapping[str, Any] = {}
    try:
        with tracked(task.tracked, results.emit) as trackers:
            result = fit(task.work, open_runs(settings, "sweeps").make(task.run), settings, trackers.emit)
            if result.return_value is not None:
                raise TrainingError(result.return_value)
            latest = result.metrics or {}
    except LorayError as e:
        failure = str(e)
    results.end(failure, latest)
