"""The training driver: `python -m jobs.train RECIPE`, alone or as a Ray job.

Checks the recipe, starts Ray Train's workers, follows them, publishes the best checkpoint, and records in the catalog
how the job ended. `jobs.runs.folders` describes where runs are stored.
"""

from __future__ import annotations

from functools import partial

import click
from ray.train import Result

from jobs.driver.fit import connect, find_workers, fit
from jobs.driver.prepare import as_begun, prepare, share_workload
from jobs.driver.publication import already_published, driver_of, publish_best
from jobs.driver.record import Interrupts, JobRecord, recorded, reported
from jobs.driver.tokenising import RayTasks
from jobs.events import Emit, Event, PublishedEvent, Stages, describe, encode
from jobs.runs.folders import RunFolder, locked_with_its_job, open_runs
from jobs.trackers import TrackedRun, tracked
from loray.catalog import Catalog
from loray.cli.recipes import RecipeSource, recipe_options
from loray.errors import CatalogError, EvaluationError, StoreError, TrainingError
from loray.recipes.load import Recipe
from loray.settings import Settings
from loray.spec import DEFAULT_TENANT, qualified_name
from loray.store import open_store
from loray.telemetry import configure_logging
from loray.train.evaluation.documents import HeldOutPrompt, held_out_prompts


@click.command()
@recipe_options
@click.option("--events", "as_events", is_flag=True, help="Say what happens as JSON, one object a line.")
@click.option(
    "--resume", is_flag=True, help="Go on with the latest unpublished run of this recipe, from its last checkpoint."
)
@click.option("--tenant", default=DEFAULT_TENANT, help="Whose the adapter and the run are.")
@click.option("--no-plan", is_flag=True, help="Start even what the plan says cannot fit.")
@click.option("--publish-checkpoint", is_flag=True, help="Train nothing: publish the latest run's best checkpoint.")
def main(
    source: RecipeSource, as_events: bool, resume: bool, tenant: str, no_plan: bool, publish_checkpoint: bool
) -> None:
    """Train an adapter and publish it: that of RECIPE (a YAML file, a shipped recipe's name, or a JSON object; -
    for one on standard input), with the options on top of it, or that of the options alone.
    """

    def emit(event: Event) -> None:
        click.echo(encode(event) if as_events else describe(event))

    with reported(emit):
        settings = Settings.from_env()
        configure_logging(settings.log_level)
        loaded = source.load(settings.home)
        if publish_checkpoint:
            publish_latest(loaded, settings, emit, tenant=tenant)
        else:
            train(loaded, settings, emit, resume=resume, tenant=tenant, is_planned=not no_plan)


def train(
    recipe: Recipe,
    settings: Settings,
    emit: Emit,
    *,
    resume: bool = False,
    tenant: str = DEFAULT_TENANT,
    is_planned: bool = True,
) -> None:
    """Trains and publishes for `tenant`, passing events to `emit`. Runs in the main thread, which SIGTERM interrupts.
    Without `is_planned` a run starts that may not fit its workers' memory.

    If it raises LorayError, nothing is published.
    """
    whole = Catalog(settings.catalog)
    catalog, name = whole.view(driver_of(tenant)), qualified_name(tenant, recipe.spec.name)
    with recorded(catalog, recipe.spec) as job:
        catalog.adapters.check_name(recipe.spec.name, recipe.spec.publish.aliases)
        open_store(settings.store).check()  # publishing needs it: fail before training if it is wrong
        stages, runs = Stages(emit), open_runs(settings)
        run = runs.resumable(name) if resume else None
        begun = recipe if run is None else as_begun(recipe, run)
        connected = partial(connect, recipe.spec, settings, job.interrupts)
        workers_of = partial(find_workers, settings=settings, interrupts=job.interrupts)
        run_tasks = RayTasks(recipe.spec, settings.training_group, connected, stages)
        prepared = prepare(
            begun, settings, catalog, run_tasks, workers_of=workers_of, is_planned=is_planned, stages=stages
        )
        for warning in prepared.warnings:
            emit({"event": "warning", "message": warning})
        base = prepared.base
        whole.bases.add(base.name, base.fingerprint, base.of)  # refuses other weights under a known name
        published = None if run is None else already_published(run, recipe)
        if published is None:
            connect(prepared.spec, settings, job.interrupts)
            run = run or runs.new(name, job.job_id)
            tracked_run = TrackedRun(name, f"{name}/{run.name}", prepared.spec)
            held = locked_with_its_job(run, settings, job.job_id, job.interrupts.raise_in_main_thread)
            with held, tracked(tracked_run, emit) as trackers:
                result = fit(share_workload(prepared), run, settings, trackers.emit, on_interrupt=job.stop)
                if result.return_value is not None:
                    hint = f", or publish it with {_how_to_publish(recipe, tenant)}" if result.checkpoint else ""
                    raise TrainingError(f"{result.return_value}{hint}")
                prompts = held_out_prompts(prepared.data.evaluation, prepared.spec.objective.sequences_per_row)
                published = _publish(result, run, recipe, settings, emit, tenant, prompts)
                trackers.tell(published)
        job.end("succeeded", version=published["version"])
    emit(published)


def publish_latest(recipe: Recipe, settings: Settings, emit: Emit, *, tenant: str = DEFAULT_TENANT) -> None:
    """Publishes the best checkpoint of the latest run, finished or not, and records that run's job as succeeded. What
    the recipe measures is measured on its workers.
    """
    run = open_runs(settings).latest(qualified_name(tenant, recipe.spec.name))
    with Interrupts() as interrupts, run.locked("publication", interrupts.raise_in_main_thread):
        if recipe.spec.evaluation.perplexity is not None or recipe.spec.evaluation.retrieval:
            connect(recipe.spec, settings, interrupts)
        published = publish_best(run.result(), run, recipe, settings, emit, tenant=tenant)
    if run.job_id is not None:
        catalog = Catalog(settings.catalog).view(driver_of(tenant))
        JobRecord(catalog, run.job_id, interrupts).end("succeeded", version=published["version"])
    emit(published)


def _publish(
    result: Result,
    run: RunFolder,
    recipe: Recipe,
    settings: Settings,
    emit: Emit,
    tenant: str = DEFAULT_TENANT,
    prompts: tuple[HeldOutPrompt, ...] = (),
) -> PublishedEvent:
    try:
        return publish_best(result, run, recipe, settings, emit, tenant=tenant, prompts=prompts)
    except (CatalogError, EvaluationError, StoreError) as e:
        raise type(e)(f"{e}; training is complete: publish it later, with {_how_to_publish(recipe, tenant)}") from e


def _how_to_publish(recipe: Recipe, tenant: str) -> str:
    whose = "" if tenant == DEFAULT_TENANT else f" --tenant {tenant}"
    return f"`python -m jobs.train {recipe.path or 'RECIPE'} --publish-checkpoint{whose}`"


if __name__ == "__main__":
    main()
