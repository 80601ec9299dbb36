"""The driver of a sweep, `python -m jobs.sweeps.driver`: runs the trials, stops the worse ones early (ASHA), and
publishes the best.

It checks all recipes and reads the data once. A trial's process starts a trainer, as a run's driver does. Tune gets the
losses of the run's events and not of its checkpoints: with `checkpoint.interval_steps`, not every evaluation has a
checkpoint. The best trial is published under the recipe's name, through the same gate as a run.

What became of a trial is written into the sweep's folder as it happens. A sweep that goes on after it was killed starts
the trials that have not ended, which continue from their checkpoints, and gives ASHA the losses of the others first:
Tune's own restoration would forget them, since it does not keep a scheduler's state.

The folder is `sweeps/NAME/TIME`, beside the runs:

plan.json            the trials (`jobs.sweeps.spec.SweepPlan`)
trial_0003.json      what became of one
TIME-0003/…          a run's folder, of trial 3
trials.svg           held-out losses by step
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import click
import numpy as np
import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from jobs.driver.fit import WorkerHardware, Workload, connect, find_workers, fit
from jobs.driver.prepare import Prepared, prepare, share_workload
from jobs.driver.publication import driver_of, publish_best
from jobs.driver.record import Interrupts, JobRecord, recorded, reported
from jobs.driver.tokenising import RayTasks
from jobs.events import Emit, Event, PublishedEvent, TrialEvent, describe, encode, first_line
from jobs.runs.folders import RunFolder, Runs, open_runs
from jobs.sweeps.command import draw
from jobs.sweeps.spec import PLAN, SweepPlan, TrialRecord, best, record_file
from jobs.trackers import TrackedRun, tracked
from jobs.workers.placement import worker_resources
from loray.catalog import Catalog
from loray.errors import LorayError, SpecError, TrainingError
from loray.recipes.load import Recipe
from loray.settings import Settings
from loray.spec import DEFAULT_TENANT, TrainSpec, qualified_name
from loray.store import open_store
from loray.telemetry import configure_logging
from loray.train.data.batches import TokenizedRows
from loray.train.data.corpus import Runner, run_here
from loray.train.data.rows import Dataset

PICTURE = "trials.svg"
PERCENT, LOSS = "percent", "eval_loss"  # of the trial's steps; what is minimised
_REDUCTION = 3  # of the trials that reach a rung, one of so many goes on
_FIRST_RUNG = 100 / _REDUCTION**2  # per cent of a trial's steps
_MAX_LOST_DRIVERS = 3  # of a trial, whose process died
# Of the resource that each node has one of: trials' drivers run on the sweep's node, as its own does.
_OF_DRIVER = 0.001
_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the runs have their events
    "RAY_AIR_NEW_OUTPUT": "0",  # prints a table on stdout, whatever `verbose` is
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # the driver has its own
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a run that fails before its first evaluation has no loss
}


class TrialTask(NamedTuple):
    """A trial: its workload, where its run is (below the sweeps of `open_runs`), and what trackers show of it."""

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
        """Reports the end. `latest`: of the last checkpoint; a run that had ended before has no event of its loss."""
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


class TrialRecords:
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
        name = record_file(trial)
        try:
            return TrialRecord.parse(json.loads(self._folder.read(name) or b""), source=name)
        except (ValueError, SpecError):  # not written yet, or in part by a killed driver
            return TrialRecord(trial=trial, values=values)


def search(
    plan: SweepPlan, records: TrialRecords, tasks: Mapping[int, TrialTask], settings: Settings, num_at_once: int
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
    """Returns how many of the largest trials the cluster has place for; at least one."""
    have, fitting = ray.cluster_resources(), []
    for spec in specs:
        for resource, each in worker_resources(spec, settings.training_group).items():
            fitting.append(int(have.get(resource, 0) / (each * spec.num_workers)))
    return max(1, min(fitting))


def _scheduler(plan: SweepPlan, records: TrialRecords) -> TrialScheduler:
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

    def __init__(self, records: TrialRecords) -> None:
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


@click.command()
@click.argument("plan", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--resume", "resumed", metavar="NAME", help="Go on with the latest sweep of this adapter.")
@click.option("--events", "as_events", is_flag=True, help="Say what happens as JSON, one object a line.")
@click.option("--tenant", default=DEFAULT_TENANT, help="Whose the adapter and the sweep are.")
@click.option("--no-plan", is_flag=True, help="Start even what the plan says cannot fit.")
def main(plan: Path | None, resumed: str | None, as_events: bool, tenant: str, no_plan: bool) -> None:
    """Run the sweep of PLAN, which `loray sweep` writes, and publish its best trial."""

    def emit(event: Event) -> None:
        click.echo(encode(event) if as_events else describe(event))

    with reported(emit):
        settings = Settings.from_env()
        configure_logging(settings.log_level)
        if plan is not None and resumed is None:
            sweep(_parse_plan(plan.read_bytes(), str(plan)), settings, emit, tenant=tenant, is_planned=not no_plan)
        elif plan is None and resumed is not None:
            sweep(resumed, settings, emit, tenant=tenant, is_planned=not no_plan)
        else:
            raise SpecError("give a sweep's plan, or --resume NAME")


def sweep(
    plan: SweepPlan | str,
    settings: Settings,
    emit: Emit,
    *,
    tenant: str = DEFAULT_TENANT,
    is_planned: bool = True,
) -> PublishedEvent:
    """Runs all trials and publishes the best. A name instead of a plan: goes on with the latest sweep of that name.

    Runs in the main thread, which SIGTERM interrupts. If it raises LorayError, nothing is published.
    """
    runs, folder = open_runs(settings, "sweeps"), None
    if isinstance(plan, str):
        folder = runs.latest(qualified_name(tenant, plan))
        plan = _parse_plan(folder.read(PLAN) or b"", f"{PLAN} of {folder}")
    whole = Catalog(settings.catalog)
    catalog, name = whole.view(driver_of(tenant)), qualified_name(tenant, plan.name)
    with Interrupts() as interrupts, recorded(catalog, plan.recipe) as job:
        catalog.adapters.check_name(plan.name, plan.recipe.publish.aliases)
        open_store(settings.store).check()
        try:
            connected = partial(connect, plan.recipe, settings, interrupts)
            run = RayTasks(plan.recipe, settings.training_group, connected)
            workers_of = partial(find_workers, settings=settings, interrupts=interrupts)
            prepared = _prepare(plan, settings, catalog, run, workers_of, is_planned=is_planned)
        except KeyboardInterrupt:  # raised by ray.get while data is tokenised
            raise interrupts.interrupted() from None
        whole.bases.add(prepared[0].base.name, prepared[0].base.fingerprint)
        for each in prepared:
            connect(each.spec, settings, interrupts)
        folder = folder or runs.new(name, job.job_id)
        with folder.locked(job.job_id, interrupts.raise_in_main_thread):
            folder.write(PLAN, plan.model_dump_json().encode() + b"\n")
            try:
                published = _Sweep(plan, prepared, runs, folder, settings, emit, tenant).run(job)
            except KeyboardInterrupt:
                interrupted = interrupts.interrupted()
                job.end("stopped", message=str(interrupted))  # at once, as a run's driver does
                raise interrupted from None
        job.end("succeeded", version=published["version"])
    emit(published)
    return published


class _Sweep:
    """One driver's work on a sweep whose folder it has locked."""

    def __init__(
        self,
        plan: SweepPlan,
        prepared: list[Prepared],
        runs: Runs,
        folder: RunFolder,
        settings: Settings,
        emit: Emit,
        tenant: str,
    ) -> None:
        self._plan, self._prepared, self._runs, self._folder = plan, prepared, runs, folder
        self._settings, self._emit, self._tenant = settings, emit, tenant
        self._name = qualified_name(tenant, plan.name)
        self._at = folder.path.removeprefix(f"{runs.root}/")
        self._records = TrialRecords(folder, plan, self._say)

    def run(self, job: JobRecord) -> PublishedEvent:
        for record in self._records:
            if record.has_ended:
                self._say(record)
        tasks = self._tasks(job)
        if tasks:
            specs = [self._prepared[i].spec for i in tasks]
            at_once = min(len(tasks), self._plan.max_concurrent or num_at_once(specs, self._settings))
            self._warn_of_late_evaluations()
            # Trials need no catalog, and no key of the API.
            search(self._plan, self._records, tasks, replace(self._settings, catalog="", api_key=None), at_once)
            self._end_stopped(tasks)
        keep_best = self._plan.recipe.evaluation.keep_best
        chosen = best(tuple(self._records), keep_best=keep_best)
        number = None if chosen is None else chosen.trial
        picture = draw(f"{self._plan.name}: held-out loss", tuple(self._records), number, keep_best=keep_best)
        self._folder.write(PICTURE, picture.encode())
        self._emit(
            {
                "event": "sweep",
                "sweep": self._at,
                "folder": str(self._folder),
                "picture": PICTURE,
                "best": number,
                "keep_best": keep_best,
            }
        )
        if chosen is None:
            reasons = {record.message for record in self._records if record.message}
            raise TrainingError(
                f"no trial was completed with a held-out loss: {'; '.join(sorted(reasons)) or 'see their records'}"
            )
        return self._publish(chosen)

    def _tasks(self, job: JobRecord) -> dict[int, TrialTask]:
        """Returns the tasks of the trials that have not ended. Trials with the same rows share them."""
        datasets = {id(each.data): each.data for each in self._prepared}
        shared = {key: ray.put(data) for key, data in datasets.items()}
        tasks = {}
        for record in self._records:
            if not record.has_ended:
                prepared, at = self._prepared[record.trial], self._run_of(record.trial)
                self._runs.open(at, job.job_id)
                work = share_workload(prepared, shared[id(prepared.data)])
                tasks[record.trial] = TrialTask(work, at, self._tracked(record.trial))
        return tasks

    def _run_of(self, trial: int) -> str:
        """Names a trial's run. Workers keep checkpoints by the last part of it, which no other sweep's trial has."""
        return f"{self._at}/{self._folder.name}-{trial:04}"

    def _publish(self, chosen: TrialRecord) -> PublishedEvent:
        run, spec = self._runs.make(self._run_of(chosen.trial)), self._plan.trials[chosen.trial].recipe
        recipe = Recipe(spec, None, Path(self._plan.folder))
        sweep = f"{self._at}, trial {chosen.trial} of {len(self._plan.trials)}"
        with tracked(self._tracked(chosen.trial)) as trackers:
            published = publish_best(
                run.result(), run, recipe, self._settings, self._emit, tenant=self._tenant, sweep=sweep
            )
            trackers.tell(published)
        return published

    def _tracked(self, trial: int) -> TrackedRun:
        return TrackedRun(self._name, self._run_of(trial), self._prepared[trial].spec, sweep=self._at)

    def _say(self, record: TrialRecord) -> None:
        fields = record.model_dump(mode="json")
        self._emit(cast("TrialEvent", {"event": "trial", "num_trials": len(self._plan.trials), **fields}))

    def _warn_of_late_evaluations(self) -> None:
        if self._plan.stops_early and self._plan.recipe.evaluation.interval_steps is None:
            message = "no trial is stopped early: without evaluation.interval_steps they are evaluated at their end"
            self._emit({"event": "warning", "message": message})

    def _end_stopped(self, trials: Iterable[int]) -> None:
        """Ends what nobody ended in the processes of stopped trials: their trackers, and the checkpoints that their
        workers left on this machine for workers that would have replaced them.
        """
        for trial in trials:
            if self._records[trial].status == "stopped":
                with tracked(self._tracked(trial)):
                    pass
        kept = Path(self._settings.home, "checkpoints", self._plan.name)
        for path in kept.glob(f"{self._folder.name}-*"):
            shutil.rmtree(path, ignore_errors=True)


def _prepare(
    plan: SweepPlan,
    settings: Settings,
    catalog: Catalog,
    run: Runner = run_here,
    workers_of: Callable[[TrainSpec], WorkerHardware] = WorkerHardware.here,
    *,
    is_planned: bool = True,
) -> list[Prepared]:
    """Checks all trials. What has the same rows is read and tokenised once. Raises LorayError."""
    datasets: dict[object, Dataset] = {}
    folder = Path(plan.folder)
    recipes = [Recipe(trial.recipe, None, folder) for trial in plan.trials]
    prepared = [prepare(r, settings, catalog, run, datasets, workers_of, is_planned) for r in recipes]
    held_out = [data.evaluation for data in datasets.values()]
    if not len(held_out[0]):
        raise SpecError("a sweep compares trials by their held-out loss: give data.eval, or a data.eval_fraction")
    if not all(_are_same(held_out[0], rows) for rows in held_out[1:]):
        raise SpecError(
            "the trials would be measured on different rows, and their losses could not be compared: give data.eval "
            "and data.max_length, and vary no seed or batch.order that changes what is held out"
        )
    return prepared


def _are_same(a: TokenizedRows, b: TokenizedRows) -> bool:
    return (
        np.array_equal(a.lengths, b.lengths)
        and np.array_equal(a.ids_N, b.ids_N)
        and np.array_equal(a.targets_N, b.targets_N)
    )


def _parse_plan(data: bytes, source: str) -> SweepPlan:
    try:
        return SweepPlan.parse(json.loads(data), source=source)
    except ValueError as e:
        raise SpecError(f"{source} is no sweep's plan: {e}") from e


if __name__ == "__main__":
    main()
