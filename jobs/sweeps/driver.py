"""The driver of a sweep, `python -m jobs.sweeps.driver`: trains the trials together, stops the worse ones early (ASHA),
and publishes the best.

It checks all recipes and reads the data once. Trials are adapters of cohorts, as those of `jobs.many` are; one that no
cohort takes is trained alone, as a run is, after the others. The best trial is published under the recipe's name,
through the same gate as a run.

What became of a trial is written into the sweep's folder as it happens. By these records trials are stopped, so that a
sweep that goes on after it was killed knows the losses of those that have ended. The others continue from the last
snapshot of their worker.

The folder is `sweeps/NAME/TIME`, beside the runs:

plan.json            the trials (`jobs.sweeps.spec.SweepPlan`)
trial_0003.json      what became of one
TIME-0003/…          a run's folder, of trial 3
events.jsonl         of all trials
share_…/             the snapshots of a worker, and shares.json its trials
trials.svg           held-out losses by step
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, BinaryIO, cast

import click
import numpy as np
import ray
from ray.actor import ActorHandle
from ray.train import Checkpoint

from jobs.driver.fit import WorkerHardware, connect, find_workers, fit
from jobs.driver.prepare import Prepared, as_begun, prepare, share_workload
from jobs.driver.publication import driver_of, publish_best, publish_checkpoint
from jobs.driver.record import recorded, reported
from jobs.driver.tokenising import RayTasks
from jobs.events import (
    SILENT,
    Emit,
    Event,
    PublishedEvent,
    Stages,
    TrialEvent,
    adapter_of,
    decode,
    describe,
    encode,
    first_line,
    following,
)
from jobs.many.resume import read_shares, write_shares
from jobs.many.shares import Dealt, below_root, deal_shares, make_share
from jobs.many.team import Team, start_sink
from jobs.runs.folders import BATCH, RunFolder, Runs, open_runs
from jobs.sweeps.command import draw
from jobs.sweeps.halving import Halving, name_of_trial, told, trial_of
from jobs.sweeps.spec import PLAN, SweepPlan, TrialRecord, best, record_file
from jobs.trackers import TrackedRun, replay, tracked
from jobs.workers.many import ENDED, EndedRun, Places, Share
from jobs.workers.placement import worker_resources
from loray.bases.registry import ensure_base
from loray.catalog import Catalog
from loray.errors import LorayError, SpecError, TrainingError, UnsupportedError
from loray.planning.devices import ASSUMED_GPU, PRESETS, device_on
from loray.recipes.load import Recipe
from loray.recipes.many import on_one_worker
from loray.settings import Settings
from loray.spec import DEFAULT_TENANT, TrainSpec, qualified_name
from loray.store import open_store
from loray.telemetry import configure_logging
from loray.train.data.batches import TokenizedRows
from loray.train.data.corpus import Runner, run_here
from loray.train.data.rows import Dataset
from loray.train.evaluation.documents import held_out_prompts
from loray.train.many.cohort import cohorts

PICTURE = "trials.svg"


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


def num_at_once(specs: Sequence[TrainSpec], settings: Settings) -> int:
    """Returns how many workers train trials: as many as the cluster has GPUs for, else one on each node."""
    if specs[0].use_gpu is not True:
        return max(1, sum(node["Alive"] for node in ray.nodes()) // specs[0].parallel.sequence)
    have, fitting = ray.cluster_resources(), []
    for spec in specs:
        for resource, each in worker_resources(spec, settings.training_group).items():
            fitting.append(int(have.get(resource, 0) / (each * spec.num_workers)))
    return max(1, min(fitting))


def is_shared(spec: TrainSpec, settings: Settings) -> bool:
    """Says whether a cohort trains it."""
    try:
        cohorts([spec], ensure_base(settings.home, spec.base).config)
    except UnsupportedError:
        return False
    return True


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

        @cache
        def found(num_workers: int, use_gpu: bool | str) -> WorkerHardware:
            of = plan.recipe.model_copy(update={"num_workers": num_workers, "use_gpu": use_gpu})
            return find_workers(of, settings, job.interrupts)

        def workers_of(spec: TrainSpec) -> WorkerHardware:
            return found(spec.num_workers, spec.use_gpu)

        specs = [trial.recipe for trial in plan.trials]
        specs = [on_one_worker(spec) if is_shared(spec, settings) else spec for spec in specs]
        trials = [Recipe(spec, None, Path(plan.folder)) for spec in specs]
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
                found_workers = partial(workers_of, prepared[0].spec)
                work = _Sweep(plan, prepared, runs, folder, settings, emit, tenant, found_workers)
                published = work.run(job.job_id)
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
    workers: Callable[[], WorkerHardware]
    told: SimpleQueue[Event] = field(default_factory=SimpleQueue)

    @property
    def at(self) -> str:
        """Its folder below those of all sweeps."""
        return below_root(self.folder, self.runs)

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
            ended = run.read_model(EndedRun, ENDED)
            if ended is not None and ended.checkpoint is not None:  # of a cohort
                checkpoint = Checkpoint(f"{run.path}/{ended.checkpoint}", run.filesystem)
                published = publish_checkpoint(checkpoint, run, recipe, self.settings, self.emit, **options)
            else:
                published = publish_best(run.result(), run, recipe, self.settings, self.emit, **options)
            trackers.tell(published)
        return published

    def _train(self, trials: Sequence[int], records: TrialRecords, job_id: str) -> None:
        """Trains these to their end: those of cohorts, then those that are trained alone."""
        if not trials:
            return
        if self.plan.stops_early and self.plan.recipe.evaluation.interval_steps is None:
            message = "no trial is stopped early: without evaluation.interval_steps they are evaluated at their end"
            self.emit({"event": "warning", "message": message})
        alone = []
        together: dict[object, dict[str, Prepared]] = {}  # by what a cohort has in common
        with ExitStack() as stack:
            files = {}
            for trial in trials:
                spec, run = self.prepared[trial].spec, self.runs.open(run_of(self.runs, self.folder, trial), job_id)
                if not is_shared(spec, self.settings):
                    alone.append(trial)
                    continue
                if self.prepared[trial].batch_reason:
                    run.write_model(BATCH, spec.batch)
                events, board = stack.enter_context(run.history())
                files[trial] = events, board
                if self._has_ended(trial, run, events, records):
                    continue
                common = (spec.chosen_dtype, spec.quantization and spec.quantization.model_dump_json())
                together.setdefault(common, {})[name_of_trial(trial)] = self.prepared[trial]
            if together:
                shares = self._dealt(together.values())
                write_shares(self.folder, read_shares(self.folder) | {s: dealt.names for s, dealt in shares.items()})
                job_events, _ = stack.enter_context(self.folder.history())
                self._train_together(shares, records, job_events, {trial: of for trial, (of, _) in files.items()})
            for trial, (events, board) in files.items():
                replay(self._tracked(trial), events, board, None, self.emit)
        for trial in alone:
            self._train_alone(trial, records)

    def _has_ended(self, trial: int, run: RunFolder, events: Path, records: TrialRecords) -> bool:
        """Says whether a trial had ended before its record said so, which a killed driver leaves; the record has all
        that the run tells from then on.
        """
        lines = events.read_text(encoding="utf-8").splitlines() if events.is_file() else []
        record = records[trial]
        for line in lines:
            if (event := decode(line)) is not None and event["event"] != "end":
                record = told(record, event)
        ended = run.read_model(EndedRun, ENDED)
        if ended is not None and ended.status == "succeeded":
            record = record.model_copy(update={"status": "completed"})
        if record != records[trial]:
            records.put(record)
        return record.has_ended

    def _dealt(self, cohorts: Iterable[dict[str, Prepared]]) -> dict[str, Dealt]:
        """Deals trials to workers. Those that do not fit together are trained one after the other."""
        saved, found = read_shares(self.folder), {}
        for prepared in cohorts:
            spec, workers = next(iter(prepared.values())).spec, self.workers()
            device = device_on(workers.hardware, workers.per_node, use_gpu=spec.use_gpu is True) or PRESETS[ASSUMED_GPU]
            most, places = self.plan.max_concurrent, num_at_once([spec], self.settings)
            found |= deal_shares(prepared, saved, device, places, self.emit, most=most, splits=True)
        return found

    def _train_together(
        self, shares: dict[str, Dealt], records: TrialRecords, events: Path, files: dict[int, Path]
    ) -> None:
        judge = Halving(records, stops_early=self.plan.stops_early)
        by_name = {name_of_trial(trial): str(path) for trial, path in files.items()}
        sink = start_sink(events, by_name, judge)
        specs = [self.prepared[trial].spec for trial in files]
        team = Team(num_at_once(specs, self.settings), self.emit)
        try:
            with following(events, self.told.put):
                for share, dealt in shares.items():
                    team.add(share, partial(self._share, share, dealt, sink))
                for done in team.run():
                    self._take(records)
                    if done.share is not None and done.error is not None:
                        ended = ray.get(sink.ended.remote())
                        message = str(done.error) if isinstance(done.error, LorayError) else first_line(done.error)
                        for name in set(shares[done.share].names) - ended:
                            record = records[trial_of(name)]
                            records.put(record.model_copy(update={"status": "failed", "message": message}))
        finally:
            team.kill()
            ray.kill(sink)
        self._take(records)

    def _take(self, records: TrialRecords) -> None:
        """Keeps what workers have told."""
        with suppress(Empty):
            while True:
                event = self.told.get_nowait()
                name = adapter_of(event)
                if name is None:
                    if event["event"] in ("progress", "warning"):
                        self.emit(event)
                    continue
                record = records[trial_of(name)]
                if not record.has_ended and (now := told(record, event)) != record:
                    records.put(now)

    def _share(self, share: str, dealt: Dealt, sink: ActorHandle) -> Share:
        at = {name: run_of(self.runs, self.folder, trial_of(name)) for name in dealt.names}
        return make_share(
            {name: self.prepared[trial_of(name)] for name in dealt.names},
            dealt,
            self.settings,
            runs=Places("sweeps", at),
            snapshots=Places("sweeps", {share: f"{below_root(self.folder, self.runs)}/{share}"}),
            num_workers=self.workers().per_node,
            sink=sink,
        )

    def _train_alone(self, trial: int, records: TrialRecords) -> None:
        """Trains a trial that no cohort takes, as a run is; it is not stopped early."""

        def tell(event: Event) -> None:
            if (now := told(records[trial], event)) != records[trial]:
                records.put(now)

        prepared, run = self.prepared[trial], self.runs.make(run_of(self.runs, self.folder, trial))
        failure = None
        try:
            with tracked(self._tracked(trial), tell) as trackers:
                result = fit(share_workload(prepared), run, self.settings, trackers.emit)
                failure = result.return_value
        except LorayError as e:
            failure = str(e)
        ended = {"status": "failed", "message": failure} if failure else {"status": "completed"}
        records.put(records[trial].model_copy(update=ended))

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
