"""Runs a sweep's trials by Ray Tune: several at once, those with a high held-out loss stopped early by ASHA.

What became of a trial is written into the sweep's folder as it happens. A sweep that goes on after it was killed starts
the trials that have not ended, which continue from their checkpoints, and gives ASHA the losses of the others first:
Tune's own restoration would forget them, since it does not keep a scheduler's state.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from jobs.events.messages import first_line
from jobs.runs.folders import RunFolder
from jobs.sweeps.trial import LOSS, PERCENT, TrialTask, run_trial
from jobs.sweeps.trials import SweepPlan, TrialRecord, record_file
from jobs.workers.placement import worker_resources
from loray.errors import SpecError, TrainingError
from loray.settings import Settings
from loray.spec import TrainSpec

_REDUCTION = 3  # of the trials that reach a rung, one of so many goes on
_FIRST_RUNG = 100 / _REDUCTION**2  # per cent of a trial's steps
_MAX_LOST_DRIVERS = 3  # of a trial, whose process died
_OF_DRIVER = (
    0.001  # of the resource that each node has one of: trials' drivers run on the sweep's node, as its own does
)
_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the runs have their events
    "RAY_AIR_NEW_OUTPUT": "0",  # prints a table on stdout, whatever `verbose` is
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # the driver has its own
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a run that fails before its first evaluation has no loss
}


class Records:
    """The records of a sweep's trials, one file each. `changed` is called with each that has changed."""

    def __init__(self, folder: RunFolder, plan: SweepPlan, changed: Callable[[TrialRecord], None]) -> None:
        self._folder, self._changed = folder, changed
        self._records = [self._read(i, trial.values) for i, trial in enumerate(plan.trials)]

    def __iter__(self) -> Iterator[TrialRecord]:
        return iter(tuple(self._records))

    def __getitem__(self, trial: int) -> TrialRecord:
        return self._records[trial]

    def put(self, record: TrialRecord) -> None:
        self._records[record.trial] = record
        self._folder.write(record_file(record.trial), record.model_dump_json().encode() + b"\n")
        self._changed(record)

    def _read(self, trial: int, values: dict[str, str]) -> TrialRecord:
        try:
            return TrialRecord.parse(
                json.loads(self._folder.read(record_file(trial)) or b""), source=record_file(trial)
            )
        except (ValueError, SpecError):  # not written yet, or in part by a killed driver
            return TrialRecord(trial=trial, values=values)


def search(
    plan: SweepPlan, records: Records, tasks: Mapping[int, TrialTask], settings: Settings, num_at_once: int
) -> None:
    """Runs the trials of `tasks`, those that have not ended, to their end."""
    os.environ.update(_SETTINGS)
    here = f"node:{ray.util.get_node_ip_address()}"
    with_data = tune.with_parameters(run_trial, tasks=tasks, settings=settings)
    trainable = tune.with_resources(with_data, tune.PlacementGroupFactory([{here: _OF_DRIVER}]))
    with tempfile.TemporaryDirectory(prefix="loray-sweep-") as scratch:
        tune.Tuner(
            trainable,
            param_space={"trial": tune.grid_search(sorted(tasks))},
            tune_config=tune.TuneConfig(
                scheduler=_scheduler(plan, records),
                max_concurrent_trials=num_at_once,
                trial_dirname_creator=lambda trial: f"trial_{trial.config['trial']:04}",
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=scratch,
                failure_config=tune.FailureConfig(max_failures=_MAX_LOST_DRIVERS),
                callbacks=[_Watch(records)],
                verbose=0,
            ),
        ).fit()


def num_at_once(specs: Sequence[TrainSpec], settings: Settings) -> int:
    """How many of the largest trials the cluster has place for; at least one."""
    have, fitting = ray.cluster_resources(), []
    for spec in specs:
        for resource, each in worker_resources(spec, settings.training_group).items():
            fitting.append(int(have.get(resource, 0) / (each * spec.num_workers)))
    return max(1, min(fitting))


def _scheduler(plan: SweepPlan, records: Records) -> TrialScheduler:
    if not plan.stops_early:
        return FIFOScheduler()
    scheduler = ASHAScheduler(
        time_attr=PERCENT,
        metric=LOSS,
        mode="min",
        max_t=100,
        grace_period=_FIRST_RUNG,
        reduction_factor=_REDUCTION,
        stop_last_trials=False,
    )
    for record in records:
        if record.has_ended and record.num_steps:
            known = SimpleNamespace(trial_id=f"ended-{record.trial}")
            scheduler.on_trial_add(None, known)
            for step, loss in record.losses:
                scheduler.on_trial_result(None, known, {PERCENT: 100 * step / record.num_steps, LOSS: loss})
    return scheduler


class _Watch(tune.Callback):  # type: ignore[misc]
    """Keeps the records up to date, in the driver's process."""

    def __init__(self, records: Records) -> None:
        self._records = records

    def __reduce__(self) -> tuple[Any, ...]:
        return tune.Callback, ()  # Tune saves its callbacks, for a restoration that nobody asks for

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        record = self._records[trial.config["trial"]]
        if LOSS in result:
            record = record.with_loss(result["step"], result[LOSS], result["num_steps"])
        if result.get("ended"):
            failure = result["failure"]
            ended = {"status": "failed", "message": failure} if failure else {"status": "completed"}
            record = record.model_copy(update=ended)
        self._records.put(record)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        record = self._records[trial.config["trial"]]
        if not record.has_ended:
            self._records.put(record.model_copy(update={"status": "stopped"}))

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        record = self._records[trial.config["trial"]]
        error = trial.get_pickled_error() or TrainingError(f"its driver died {_MAX_LOST_DRIVERS + 1} times")
        self._records.put(record.model_copy(update={"status": "failed", "message": first_line(error)}))
