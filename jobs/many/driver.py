"""The driver of a job that trains several adapters, `python -m jobs.many.driver PLAN`.

It prepares all recipes, reading data that several have once, divides them into cohorts, deals each cohort to workers
that have a base of their own (`jobs.workers.many`), and publishes adapters as they end. The catalog has a job for each
adapter beside this one: who ends it there stops the adapter. `jobs.many.resume` describes the folders.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import cache, partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import BinaryIO, cast

import click
import ray
from ray.actor import ActorHandle
from ray.train import Checkpoint

from jobs.driver.fit import WorkerHardware, connect, find_workers
from jobs.driver.prepare import Prepared, as_begun, prepare
from jobs.driver.publication import already_published, driver_of, publish_checkpoint
from jobs.driver.record import Interrupts, recorded, reported
from jobs.driver.tokenising import RayTasks
from jobs.events import (
    AdapterOutcome,
    Emit,
    EndEvent,
    Event,
    PublishedEvent,
    Stages,
    adapter_of,
    describe,
    encode,
    first_line,
    following,
)
from jobs.many.publication import Outcome, Publisher, Ready
from jobs.many.resume import PLAN, begun, read_shares, write_shares
from jobs.many.shares import Dealt, below_root, deal_shares, make_share
from jobs.many.team import Team, start_sink
from jobs.runs.folders import BATCH, PART_OF, RunFolder, open_runs
from jobs.trackers import TrackedRun, replay
from jobs.workers.many import ENDED, EndedRun, Places, Share
from loray.bases.rounding import form_trained_on
from loray.catalog import Catalog
from loray.errors import LorayError, SpecError, TrainingError
from loray.planning.devices import ASSUMED_GPU, PRESETS, Device, device_on
from loray.recipes.load import Recipe
from loray.recipes.many import ManyPlan, on_one_worker
from loray.settings import Settings
from loray.spec import DEFAULT_TENANT, EndStatus, TrainSpec, qualified_name
from loray.store import open_store
from loray.telemetry import configure_logging, get_logger
from loray.train.data.rows import Dataset
from loray.train.many.cohort import cohorts

log = get_logger(__name__)

_STOPS_S = 2.0  # between two looks whether somebody has stopped an adapter
_NUM_NAMED = 5
_NUM_THREADS = 4  # that tell trackers
_UNLIMITED = 1 << 60  # bytes, where a plan is not to refuse


@click.command()
@click.argument("plan", type=click.File("rb"))
@click.option("--events", "as_events", is_flag=True, help="Say what happens as JSON, one object a line.")
@click.option("--resume", is_flag=True, help="Go on with the latest job of these adapters, from its last snapshot.")
@click.option("--tenant", default=DEFAULT_TENANT, help="Whose the adapters and their runs are.")
@click.option("--no-plan", is_flag=True, help="Start even what the plan says cannot fit.")
def main(plan: BinaryIO, as_events: bool, resume: bool, tenant: str, no_plan: bool) -> None:
    """Train the adapters of PLAN, which `loray train` writes for several recipes, and publish each as it ends."""

    def emit(event: Event) -> None:
        click.echo(encode(event) if as_events else describe(event))

    with reported(emit):
        settings = Settings.from_env()
        configure_logging(settings.log_level)
        try:
            read = ManyPlan.parse(json.loads(plan.read()), source=plan.name)
        except ValueError as e:
            raise SpecError(f"{plan.name} is no plan of a job of several adapters: {e}") from e
        train_adapters(read, settings, emit, resume=resume, tenant=tenant, is_planned=not no_plan)


def train_adapters(
    plan: ManyPlan,
    settings: Settings,
    emit: Emit,
    *,
    resume: bool = False,
    tenant: str = DEFAULT_TENANT,
    is_planned: bool = True,
) -> None:
    """Trains and publishes all adapters for `tenant`. Runs in the main thread, which SIGTERM interrupts.

    Nothing starts where one recipe is refused. An adapter that fails later does so alone: then TrainingError is raised
    once all others are published.
    """
    whole = Catalog(settings.catalog)
    catalog = whole.view(driver_of(tenant))
    with recorded(catalog, plan.recipe) as job:
        open_store(settings.store).check()
        for member in plan.members:
            catalog.adapters.check_name(member.recipe.name, member.recipe.publish.aliases)
        stages = Stages(emit)
        connected = partial(connect, _of_workers(plan), settings, job.interrupts)
        run_tasks = RayTasks(plan.recipe, settings.training_group, connected, stages)
        runs, folders = open_runs(settings), open_runs(settings, "many")
        names = [member.recipe.name for member in plan.members]
        at, known = begun(names, tenant, runs) if resume else (None, {})
        before = {name: runs.make(run) for name, run in known.items()}
        prepared = prepare_all(
            plan, before, settings, catalog, run_tasks, job.interrupts, is_planned=is_planned, stages=stages
        )
        for name, each in prepared.items():
            for warning in each.warnings:
                emit({"event": "warning", "message": f"{name}: {warning}"})
        base = next(iter(prepared.values())).base
        whole.bases.add(base.name, base.fingerprint, base.of)
        connected()
        saved = {} if at is None else read_shares(folders.make(at))
        device = _device(plan, next(iter(prepared.values())).spec, settings, job.interrupts, is_planned=is_planned)
        cohorts([each.spec for each in prepared.values()], base.config)  # refuses what cannot be trained in one job
        whole_ones = _whole(before, plan)
        to_train = {name: each for name, each in prepared.items() if name not in whole_ones}
        shares = deal_shares(to_train, saved, device, plan.num_workers, emit)
        folder = folders.new(qualified_name(tenant, plan.name), job.job_id) if at is None else folders.make(at)
        with folder.locked(job.job_id, job.interrupts.raise_in_main_thread):
            parts = {name: f"{job.job_id}.{number}" for number, name in enumerate(prepared, 1)}
            catalog.jobs.add_parts(job.job_id, {parts[each.recipe.name]: each.recipe for each in plan.members})
            work = _Job(plan, prepared, settings, emit, tenant, catalog, job.job_id, parts, folder)
            try:
                work.run(shares, before)
            except KeyboardInterrupt:
                work.end_all("stopped", "its job was stopped; go on from the last snapshot with --resume")
                job.stop()
            except BaseException as e:
                work.end_all("failed", f"its job failed: {first_line(e)}")
                raise
        failed = [outcome for outcome in work.outcomes() if outcome["status"] == "failed"]
        if failed:
            listed = ", ".join(outcome["name"] for outcome in failed[:_NUM_NAMED])
            more = f" and {len(failed) - _NUM_NAMED} more" if len(failed) > _NUM_NAMED else ""
            raise TrainingError(
                f"{len(failed)} of {len(prepared)} adapters failed: {listed}{more}; the others are published. The same "
                "command with --resume goes on with those that failed"
            )
        num_published = sum(bool(outcome["label"]) for outcome in work.outcomes())
        job.end("succeeded", message=f"{num_published} of {len(prepared)} adapters published")


def prepare_all(
    plan: ManyPlan,
    before: Mapping[str, RunFolder],
    settings: Settings,
    catalog: Catalog,
    run_tasks: RayTasks,
    interrupts: Interrupts,
    *,
    is_planned: bool,
    stages: Stages,
) -> dict[str, Prepared]:
    """Checks every recipe, and reads its data: what several have in common once. Raises LorayError, which names the
    adapter.

    An adapter is trained by one worker, or one sequence group: `num_workers` share the adapters.
    """
    datasets: dict[object, Dataset] = {}
    found: dict[str, Prepared] = {}

    @cache
    def workers_of(num_workers: int, use_gpu: bool | str) -> WorkerHardware:
        spec = _of_workers(plan).model_copy(update={"use_gpu": use_gpu})
        return find_workers(spec, settings, interrupts)

    def look(spec: TrainSpec) -> WorkerHardware:
        return workers_of(spec.num_workers, spec.use_gpu)

    for number, member in enumerate(plan.members):
        stages("checking the recipes", number, len(plan.members))
        recipe = Recipe(on_one_worker(member.recipe), None, Path(member.folder))
        if (run := before.get(recipe.spec.name)) is not None:
            recipe = as_begun(recipe, run)
        try:
            found[recipe.spec.name] = prepare(recipe, settings, catalog, run_tasks, datasets, look, is_planned)
        except LorayError as e:
            e.args = (f"adapter {recipe.spec.name}: {e}", *e.args[1:])
            raise
    return found


def _whole(runs: Mapping[str, RunFolder], plan: ManyPlan) -> Set[str]:
    """Returns the adapters that are trained to the end of the recipe at hand, published or not."""

    def length(spec: TrainSpec) -> tuple[object, ...]:
        return spec.max_steps, spec.num_epochs, spec.early_stopping

    found = set()
    for member in plan.members:
        run = runs.get(member.recipe.name)
        ended = None if run is None else run.read_model(EndedRun, ENDED)
        if ended is not None and ended.status == "succeeded" and length(ended.recipe) == length(member.recipe):
            found.add(member.recipe.name)
    return found


def _device(plan: ManyPlan, spec: TrainSpec, settings: Settings, interrupts: Interrupts, *, is_planned: bool) -> Device:
    """Describes what each worker has."""
    workers = find_workers(_of_workers(plan).model_copy(update={"use_gpu": spec.use_gpu}), settings, interrupts)
    found = device_on(workers.hardware, workers.per_node, use_gpu=spec.use_gpu is True) or PRESETS[ASSUMED_GPU]
    return found if is_planned else found.model_copy(update={"memory_bytes": _UNLIMITED})


def _of_workers(plan: ManyPlan) -> TrainSpec:
    """Returns a recipe that asks for all workers of the job."""
    spec = plan.recipe
    return spec.model_copy(update={"num_workers": plan.num_workers * spec.parallel.sequence, "min_workers": None})


class _Job:
    """One driver's work on a job whose folder it has locked. `parts`: the jobs of the adapters."""

    def __init__(
        self,
        plan: ManyPlan,
        prepared: Mapping[str, Prepared],
        settings: Settings,
        emit: Emit,
        tenant: str,
        catalog: Catalog,
        job_id: str,
        parts: Mapping[str, str],
        folder: RunFolder,
    ) -> None:
        self.plan, self.prepared, self.settings, self.emit, self.tenant = plan, prepared, settings, emit, tenant
        self.catalog, self.job_id, self.parts, self.folder = catalog, job_id, parts, folder
        self.all_runs = open_runs(settings)
        self.recipes = {m.recipe.name: Recipe(on_one_worker(m.recipe), None, Path(m.folder)) for m in plan.members}
        self.runs: dict[str, RunFolder] = {}
        self.boards: dict[str, tuple[Path, Path]] = {}  # events and TensorBoard's folder of each
        self.ended: dict[str, AdapterOutcome] = {}
        self.told: SimpleQueue[tuple[str, EndEvent]] = SimpleQueue()  # adapters whose training has ended
        self.to_measure: list[Ready] = []
        self.versions: dict[str, PublishedEvent] = {}

    def run(self, shares: Mapping[str, Dealt], known: Mapping[str, RunFolder]) -> None:
        """Trains the adapters of the shares, and publishes all. `known`: the runs that are begun already."""
        first = next(iter(self.prepared.values()))
        form = form_trained_on(first.base, first.spec, self.settings.home)
        Catalog(self.settings.catalog).bases.add(form.name, form.fingerprint, form.of)
        self.folder.write(PLAN, self.plan.model_dump_json().encode() + b"\n")
        write_shares(self.folder, read_shares(self.folder) | {share: dealt.names for share, dealt in shares.items()})
        with ExitStack() as stack:
            for name in self.prepared:
                self.runs[name] = known[name] if name in known else self._begin(name)
                self.boards[name] = stack.enter_context(self.runs[name].history())
            events, _ = stack.enter_context(self.folder.history())
            self.emit({"event": "adapters", "adapters": dict(self.parts), "num_workers": self.plan.num_workers})
            publisher = Publisher(self.settings, self.tenant, first.base, form, self._published)
            stack.enter_context(publisher)
            to_train = {name for dealt in shares.values() for name in dealt.names}
            for name in self.prepared:
                if name not in to_train:
                    self._publish(name, publisher)
            if shares:
                with following(events, self._follow):
                    self._train(shares, publisher, events)
                self._take_ended(publisher)
            publisher.finish()
            for ready in self.to_measure:
                self._publish_measured(ready)
            with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="trackers") as pool:
                list(pool.map(self._track, self.prepared))
        self.emit({"event": "outcomes", "adapters": self.outcomes()})

    def outcomes(self) -> list[AdapterOutcome]:
        return [self.ended[name] for name in self.prepared if name in self.ended]

    def end_all(self, status: EndStatus, message: str) -> None:
        """Records the end of the adapters that have none."""
        for name in self.parts:
            if name not in self.ended:
                self._note(name, status, message)

    def _begin(self, name: str) -> RunFolder:
        run = self.all_runs.new(qualified_name(self.tenant, name), self.parts[name])
        if self.prepared[name].batch_reason:
            run.write_model(BATCH, self.prepared[name].spec.batch)
        run.write(PART_OF, below_root(self.folder, open_runs(self.settings, "many")).encode())
        return run

    # -- training --

    def _train(self, shares: Mapping[str, Dealt], publisher: Publisher, events: Path) -> None:
        """Runs the shares, as many at a time as there are workers, to their ends. One whose worker is lost starts again
        from its last snapshot.
        """
        files = {name: str(path) for name, (path, _) in self.boards.items()}
        sink = start_sink(events, files)
        team = Team(self.plan.num_workers, self.emit)
        try:
            for share, dealt in shares.items():
                team.add(share, partial(self._share, share, dealt, sink))
            looked_at = time.monotonic()
            for done in team.run():
                self._take_ended(publisher)
                publisher.register()
                if done.share is not None and done.error is not None:
                    message = str(done.error) if isinstance(done.error, LorayError) else first_line(done.error)
                    for name in set(shares[done.share].names) - ray.get(sink.ended.remote()):
                        self._note(name, "failed", message)
                if time.monotonic() - looked_at > _STOPS_S:
                    looked_at = time.monotonic()
                    self._stop_ended(sink)
        finally:
            team.kill()
            ray.kill(sink)

    def _share(self, share: str, dealt: Dealt, sink: ActorHandle) -> Share:
        prepared = {name: self.prepared[name] for name in dealt.names}
        return make_share(
            prepared,
            dealt,
            self.settings,
            runs=Places("runs", {name: below_root(self.runs[name], self.all_runs) for name in prepared}),
            snapshots=Places("many", {share: f"{below_root(self.folder, open_runs(self.settings, 'many'))}/{share}"}),
            num_workers=self.plan.num_workers,
            sink=sink,
        )

    def _follow(self, event: Event) -> None:
        """Is told, in a thread, what the workers tell."""
        name = adapter_of(event)
        if event["event"] == "end" and name is not None:
            self.told.put((name, event))
        self.emit(event)

    def _take_ended(self, publisher: Publisher) -> None:
        with suppress(Empty):
            while True:
                name, event = self.told.get_nowait()
                if event["status"] == "succeeded":
                    self._publish(name, publisher)
                elif name not in self.ended:
                    self._note(name, event["status"], event["message"] or "stopped", step=event["step"])

    def _stop_ended(self, sink: ActorHandle) -> None:
        """Has those adapters end whose jobs somebody has ended in the catalog."""
        try:
            ended = self.catalog.jobs.ended_parts(self.job_id)
        except LorayError as e:
            log.warning("whether an adapter is to be stopped is not known: %s", e)
            return
        stopped = [name for name, part in self.parts.items() if part in ended and name not in self.ended]
        if stopped:
            sink.end.remote(stopped)

    # -- publication --

    def _publish(self, name: str, publisher: Publisher) -> None:
        """Publishes an adapter that is trained; one that is measured before, once all are trained."""
        ready = Ready(name, self.runs[name], self.recipes[name])
        published = already_published(ready.run, ready.recipe)
        wanted = ready.recipe.spec.evaluation
        if published is not None:
            self._published(ready, published)
        elif wanted.perplexity is not None or wanted.retrieval:
            self.to_measure.append(ready)
        else:
            publisher.add(ready)

    def _publish_measured(self, ready: Ready) -> None:
        ended = ready.run.read_model(EndedRun, ENDED)
        try:
            if ended is None or ended.checkpoint is None:
                raise TrainingError(f"the run in {ready.run} ended without a checkpoint; nothing was published")
            path = f"{ready.run.path}/{ended.checkpoint}"
            checkpoint = Checkpoint(path, ready.run.filesystem)
            tell = partial(self._tell, ready.name)
            self._published(
                ready,
                publish_checkpoint(checkpoint, ready.run, ready.recipe, self.settings, tell, tenant=self.tenant),
            )
        except LorayError as e:
            self._published(ready, e)

    def _tell(self, name: str, event: Event) -> None:
        self.emit(cast("Event", {**event, "adapter": name}))

    def _published(self, ready: Ready, outcome: Outcome) -> None:
        if isinstance(outcome, LorayError):
            self._note(ready.name, "failed", f"not published: {outcome}")
            return
        self._tell(ready.name, outcome)
        self.versions[ready.name] = outcome
        message = outcome.get("refusal") or ""
        version, label = outcome["version"], outcome["label"]
        self._note(ready.name, "succeeded", message, step=outcome["step"], version=version, label=label)

    def _note(
        self, name: str, status: EndStatus, message: str, *, step: int = 0, version: int | None = None, label: str = ""
    ) -> None:
        """Keeps how an adapter has ended, in the catalog too, which may not be there at the moment."""
        part = self.parts[name]
        self.ended[name] = {
            "name": name, "job_id": part, "status": status, "step": step, "label": label, "message": message,
        }  # fmt: skip
        try:
            self.catalog.jobs.end(part, status, message=message, version=version)
        except LorayError as e:
            log.warning("the end of job %s (%s) is not recorded: %s", part, status, e)

    def _track(self, name: str) -> None:
        """Tells trackers what has happened to an adapter, once it is over: a job may have more than they follow."""
        run = TrackedRun(
            qualified_name(self.tenant, name), below_root(self.runs[name], self.all_runs), self.prepared[name].spec
        )
        replay(run, *self.boards[name], self.versions.get(name), self.emit)


if __name__ == "__main__":
    main()
