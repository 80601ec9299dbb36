"""The driver of a sweep, `python -m jobs.sweeps.driver`: runs the trials, stops the worse ones early (ASHA), and
publishes the best.

It checks all recipes and reads the data once. A trial's process starts a trainer, as a run's driver does. Tune gets the
losses of the run's events and not of its checkpoints: with `checkpoint.interval_steps`, not every evaluation has a
checkpoint. The best trial is published under the recipe's name, through the same gate as a run.

What became of a trial is written into the sweep's folder as it happens. By these records trials are stopped, so that a
sweep that goes on after it was killed knows the losses of those that have ended. It starts the others, which continue
from their checkpoints.

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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import click
import numpy as np
import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler

from jobs.driver.fit import WorkerHardware, Workload, connect, find_workers, fit
from jobs.driver.prepare import Prepared, as_begun, prepare, share_workload
from jobs.driver.publication import driver_of, publish_best
from jobs.driver.record import recorded, reported
from jobs.driver.tokenising import RayTasks
from jobs.events import SILENT, Emit, Event, PublishedEvent, Stages, TrialEvent, describe, encode, first_line
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
from loray.train.evaluation.documents import held_out_prompts

PICTURE = "trials.svg"
_RUNGS = (1 / 3, 1 / 9)  # parts of a trial's steps, the later one first
_BEST_PERCENT = 100 / 3  # of the trials that reach a rung, which go on
_MAX_LOST_DRIVERS = 3  # of a trial, whose process died
# Of the resource that each node has one of: trials' drivers run on the sweep's node, as its own does.
_OF_DRIVER = 0.001
_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the runs have their events
    "RAY_AIR_NEW_OUTPUT": "0",  # prints a table on stdout, whatever `verbose` is
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # the driver has its own
}


class TrialTask(NamedTuple):
    """A trial: its workload, where its run is (below the sweeps of `open_runs`), and what trackers show of it."""

    work: Workload
    run: str
    tracked: TrackedRun


def run_trial(config: Mapping[str, Any], *, tasks: Mapping[int, TrialTask], settings: Settings) -> None:
    """Trains trial `config["trial"]`, from its last checkpoint if it has one, and tells Tune its held-out losses.

    The last one is told with the end: Tune may stop a trial at any result, and a finished run must have saved its last
    checkpoint.
    """
    configure_logging(settings.log_level)
    task, num_steps = tasks[config["trial"]], 0
    end: dict[str, Any] = {"ended": True, "failure": None}

    def tell(event: Event) -> None:
        nonlocal num_steps
        match event["event"]:
            case "start":
                num_steps = event["num_steps"]
            case "eval" if event["subject"] == "adapter" and event["eval_loss"] is not None:
                if event["step"] < num_steps:
                    tune.report({"step": event["step"], "num_steps": num_steps, "eval_loss": event["eval_loss"]})

    try:
        with tracked(task.tracked, tell) as trackers:
            result = fit(task.work, open_runs(settings, "sweeps").make(task.run), settings, trackers.emit)
            if result.return_value is not None:
                raise TrainingError(result.return_value)
            latest = result.metrics or {}
            if num_steps and latest.get("eval_loss") is not None:
                end |= {"step": latest["step"], "num_steps": num_steps, "eval_loss": latest["eval_loss"]}
    except LorayError as e:
        end["failure"] = str(e)
    tune.report(end)


class TrialRecords:
    """The records of a sweep's trials, one file each. `changed` is called with each that has changed."""

    def __init__(self, folder: RunFolder, plan: SweepPlan, changed: Callable[[TrialRecord], None]) -> None:
        self._folder, self._changed = folder, changed
        self._records = [
            folder.read_model(TrialRecord, record_file(i)) or TrialRecord(trial=i, values=trial.values)
            for i, trial in enumerate(plan.trials)
        ]

    def __iter__(self) -> Iterator[TrialRecord]:
        return iter(tuple(self._records))

    def __getitem__(self, trial: int) -> TrialRecord:
        return self._records[trial]

    def put(self, record: TrialRecord) -> None:
        self._records[record.trial] = record
        self._folder.write_model(record_file(record.trial), record)
        self._changed(record)


class Halving(FIFOScheduler):  # type: ignore[misc]
    """Asynchronous successive halving (ASHA, Li et al., 2020) by the records of all trials, which it keeps up to date.

    At its first evaluation after a ninth of its steps, and again after a third, a trial goes on if it is among the best
    third of those that have come so far.
    """

    def __init__(self, records: TrialRecords, *, stops_early: bool) -> None:
        super().__init__()
        self._records, self._stops_early = records, stops_early

    def on_trial_result(self, controller: Any, trial: Any, result: Mapping[str, Any]) -> str:
        record = self._records[trial.config["trial"]]
        if record.has_ended:  # Tune repeats the last result at the end
            return str(self.CONTINUE)
        if "eval_loss" in result:
            record = record.with_loss(result["step"], result["eval_loss"], result["num_steps"])
        if result.get("ended"):
            failure = result["failure"]
            ended = {"status": "failed", "message": failure} if failure else {"status": "completed"}
            record = record.model_copy(update=ended)
        self._records.put(record)
        is_stopped = self._stops_early and not record.has_ended and falls_behind(record, self._records)
        return str(self.STOP if is_stopped else self.CONTINUE)

    def on_trial_complete(self, controller: Any, trial: Any, result: Mapping[str, Any]) -> None:
        record = self._records[trial.config["trial"]]
        if not record.has_ended:
            self._records.put(record.model_copy(update={"status": "stopped"}))

    def on_trial_error(self, controller: Any, trial: Any) -> None:
        """Ends a trial; not one that Tune starts again, of which it tells too, after it has stopped it."""
        if trial.status != "ERROR":
            error = trial.get_pickled_error() or TrainingError(f"its driver died {_MAX_LOST_DRIVERS + 1} times")
            record = self._records[trial.config["trial"]]
            self._records.put(record.model_copy(update={"status": "failed", "message": first_line(error)}))


def falls_behind(record: TrialRecord, records: Iterable[TrialRecord]) -> bool:
    """Says whether the last evaluation of `record` is its first one of a rung, and worse than those of most others."""
    for rung in _RUNGS:
        own = record.losses_from(rung)
        if own:
            others = [losses[0] for r in records if r.trial != record.trial and (losses := r.losses_from(rung))]
            return len(own) == 1 and bool(others) and own[0] > float(np.percentile(others, _BEST_PERCENT))
    return False


def search(
    records: TrialRecords, tasks: Mapping[int, TrialTask], settings: Settings, num_at_once: int, *, stops_early: bool
) -> None:
    """Runs the trials of `tasks`, those that have not ended, to their end."""
    os.environ.update(_SETTINGS)
    here = f"node:{ray.util.get_node_ip_address()}"
    with tempfile.TemporaryDirectory(prefix="loray-sweep-") as scratch:
        tune.run(
            tune.with_parameters(run_trial, tasks=tasks, settings=settings),
            name="tune",
            config={"trial": tune.grid_search(sorted(tasks))},
            resources_per_trial=tune.PlacementGroupFactory([{here: _OF_DRIVER}]),
            scheduler=Halving(records, stops_early=stops_early),
            max_concurrent_trials=num_at_once,
            max_failures=_MAX_LOST_DRIVERS,
            raise_on_failed_trial=False,
            storage_path=scratch,
            trial_dirname_creator=lambda trial: f"trial_{trial.config['trial']:04}",
            verbose=0,
        )


def num_at_once(specs: Sequence[TrainSpec], settings: Settings) -> int:
    """Returns how many of the largest trials the cluster has place for; at least one."""
    have, fitting = ray.cluster_resources(), []
    for spec in specs:
        for resource, each in worker_resources(spec, settings.training_group).items():
            fitting.append(int(have.get(resource, 0) / (each * spec.num_workers)))
    return max(1, min(fitting))


@click.command()
@click.argument("plan", required=False, type=click.File("rb"))
@click.option("--resume", "resumed", metavar="NAME", help="Go on with the latest sweep of this adapter.")
@click.option("--events", "as_events", is_flag=True, help="Say what happens as JSON, one object a line.")
@click.option("--tenant", default=DEFAULT_TENANT, help="Whose the adapter and the sweep are.")
@click.option("--no-plan", is_flag=True, help="Start even what the plan says cannot fit.")
def main(plan: BinaryIO | None, resumed: str | None, as_events: bool, tenant: str, no_plan: bool) -> None:
    """Run the sweep of PLAN, which `loray sweep` writes, and publish its best trial."""

    def emit(event: Event) -> None:
        click.echo(encode(event) if as_events else describe(event))

    with reported(emit):
        settings = Settings.from_env()
        configure_logging(settings.log_level)
        if plan is not None and resumed is None:
            sweep(_parse_plan(plan.read(), plan.name), settings, emit, tenant=tenant, is_planned=not no_plan)
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
    with recorded(catalog, plan.recipe) as job:
        catalog.adapters.check_name(plan.name, plan.recipe.publish.aliases)
        open_store(settings.store).check()
        connected = partial(connect, plan.recipe, settings, job.interrupts)
        stages = Stages(emit)
        run = RayTasks(plan.recipe, settings.training_group, connected, stages)
        workers_of = partial(find_workers, settings=settings, interrupts=job.interrupts)
        trials = [Recipe(trial.recipe, None, Path(plan.folder)) for trial in plan.trials]
        if folder is not None:
            trials = [as_begun(r, runs.make(run_of(runs, folder, trial))) for trial, r in enumerate(trials)]
        prepared = _prepare(trials, settings, catalog, run, workers_of, is_planned=is_planned, stages=stages)
        for warning in dict.fromkeys(warning for each in prepared for warning in each.warnings):
            emit({"event": "warning", "message": warning})
        base = prepared[0].base
        whole.bases.add(base.name, base.fingerprint, base.of)
        for each in prepared:
            connect(each.spec, settings, job.interrupts)
        folder = folder or runs.new(name, job.job_id)
        with folder.locked(job.job_id, job.interrupts.raise_in_main_thread):
            folder.write(PLAN, plan.model_dump_json().encode() + b"\n")
            try:
                published = _Sweep(plan, prepared, runs, folder, settings, emit, tenant).run(job.job_id)
            except KeyboardInterrupt:
                job.stop()
        job.end("succeeded", version=published["version"])
    emit(published)
    return published


@dataclass(frozen=True)
class _Sweep:
    """One driver's work on a sweep whose folder it has locked."""

    plan: SweepPlan
    prepared: list[Prepared]
    runs: Runs
    folder: RunFolder
    settings: Settings
    emit: Emit
    tenant: str

    @property
    def at(self) -> str:
        """Its folder below those of all sweeps."""
        return self.folder.path.removeprefix(f"{self.runs.root}/")

    def run(self, job_id: str) -> PublishedEvent:
        records = TrialRecords(self.folder, self.plan, self._say)
        for record in records:
            if record.has_ended:
                self._say(record)
        self._train([record.trial for record in records if not record.has_ended], records, job_id)
        keep_best = self.plan.recipe.evaluation.keep_best
        chosen = best(tuple(records), keep_best=keep_best)
        number = None if chosen is None else chosen.trial
        picture = draw(f"{self.plan.name}: held-out loss", tuple(records), number, keep_best=keep_best)
        self.folder.write(PICTURE, picture.encode())
        self.emit(
            {
                "event": "sweep",
                "sweep": self.at,
                "folder": str(self.folder),
                "picture": PICTURE,
                "best": number,
                "keep_best": keep_best,
            }
        )
        if chosen is None:
            reasons = {record.message for record in records if record.message}
            raise TrainingError(
                f"no trial was completed with a held-out loss: {'; '.join(sorted(reasons)) or 'see their records'}"
            )
        run = self.runs.make(run_of(self.runs, self.folder, chosen.trial))
        recipe = Recipe(self.plan.trials[chosen.trial].recipe, None, Path(self.plan.folder))
        sweep = f"{self.at}, trial {chosen.trial} of {len(self.plan.trials)}"
        data, spec = self.prepared[chosen.trial].data, self.prepared[chosen.trial].spec
        options: dict[str, Any] = {
            "tenant": self.tenant,
            "sweep": sweep,
            "prompts": held_out_prompts(data.evaluation, spec.objective.sequences_per_row),
        }
        with tracked(self._tracked(chosen.trial)) as trackers:
            published = publish_best(run.result(), run, recipe, self.settings, self.emit, **options)
            trackers.tell(published)
        return published

    def _train(self, trials: Sequence[int], records: TrialRecords, job_id: str) -> None:
        """Trains these to their end. Trials with the same rows share them."""
        if not trials:
            return
        if self.plan.stops_early and self.plan.recipe.evaluation.interval_steps is None:
            message = "no trial is stopped early: without evaluation.interval_steps they are evaluated at their end"
            self.emit({"event": "warning", "message": message})
        prepared = {trial: self.prepared[trial] for trial in trials}
        shared = {id(data): ray.put(data) for data in {id(each.data): each.data for each in prepared.values()}.values()}
        tasks = {}
        for trial, each in prepared.items():
            at = run_of(self.runs, self.folder, trial)
            self.runs.open(at, job_id)
            tasks[trial] = TrialTask(share_workload(each, shared[id(each.data)]), at, self._tracked(trial))
        places = num_at_once([each.spec for each in prepared.values()], self.settings)
        at_once = min(len(tasks), self.plan.max_concurrent or places)
        # Trials need no catalog, and no key of the API.
        settings = replace(self.settings, catalog="", api_key=None)
        search(records, tasks, settings, at_once, stops_early=self.plan.stops_early)
        # Nobody ended, in the processes of stopped trials, their trackers, and the checkpoints that their workers left
        # on this machine for workers that would have replaced them.
        for trial in trials:
            if records[trial].status == "stopped":
                with tracked(self._tracked(trial)):
                    pass
        for path in Path(self.settings.home, "checkpoints", self.plan.name).glob(f"{self.folder.name}-*"):
            shutil.rmtree(path, ignore_errors=True)

    def _tracked(self, trial: int) -> TrackedRun:
        name = qualified_name(self.tenant, self.plan.name)
        return TrackedRun(name, run_of(self.runs, self.folder, trial), self.prepared[trial].spec, sweep=self.at)

    def _say(self, record: TrialRecord) -> None:
        fields = record.model_dump(mode="json")
        self.emit(cast("TrialEvent", {"event": "trial", "num_trials": len(self.plan.trials), **fields}))


def run_of(runs: Runs, folder: RunFolder, trial: int) -> str:
    """Names a trial's run below the folder of all sweeps. Workers keep checkpoints by the last part of it, which no
    other sweep's trial has.
    """
    return f"{folder.path.removeprefix(f'{runs.root}/')}/{folder.name}-{trial:04}"


def _prepare(
    recipes: Sequence[Recipe],
    settings: Settings,
    catalog: Catalog,
    run: Runner = run_here,
    workers_of: Callable[[TrainSpec], WorkerHardware] = WorkerHardware.here,
    *,
    is_planned: bool = True,
    stages: Stages = SILENT,
) -> list[Prepared]:
    """Checks all trials. What has the same rows is read and tokenised once. Raises LorayError."""
    datasets: dict[object, Dataset] = {}
    prepared = [prepare(r, settings, catalog, run, datasets, workers_of, is_planned, stages) for r in recipes]
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
