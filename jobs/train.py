"""The training driver: `python -m jobs.train RECIPE`, alone or as a Ray job.

Checks the recipe, starts Ray Train's workers, follows them, publishes the best checkpoint, and records in the catalog
how the job ended. `jobs.runs.folders` describes where runs are stored.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click
import ray
from ray.train import Result, TrainingFailedError

from jobs.driver.prepare import Prepared, prepare
from jobs.driver.publication import already_published, driver_of, publish_best
from jobs.driver.record import Interrupted, Interrupts, JobRecord, recorded
from jobs.driver.trainer import build_trainer
from jobs.events.messages import EventTail, describe, encode, first_line
from jobs.events.schema import Emit, Event, PublishedEvent
from jobs.events.sink import start_sink
from jobs.events.tensorboard import TensorBoardWriter
from jobs.runs.folders import RunFolder, open_runs
from jobs.workers.placement import worker_resources
from loray.catalog import Catalog
from loray.cli.recipes.options import RecipeSource, recipe_options
from loray.errors import CatalogError, EvaluationError, LorayError, SpecError, StoreError, TrainingError
from loray.recipes.load import Recipe
from loray.settings import Settings
from loray.spec import DEFAULT_TENANT, qualified_name
from loray.store import open_store
from loray.telemetry import configure_logging, get_logger

log = get_logger(__name__)

_RAY_UP_CONFIG = Path("~/ray_bootstrap_config.yaml")  # on the head node of a cluster that `ray up` has started
_STOPPED = 143  # the exit code that a shell reports for a process ended by SIGTERM


@click.command()
@recipe_options
@click.option("--events", "as_events", is_flag=True, help="Say what happens as JSON, one object a line.")
@click.option("--resume", is_flag=True, help="Go on with the latest run of this recipe, from its last checkpoint.")
@click.option("--tenant", default=DEFAULT_TENANT, help="Whose the adapter and the run are.")
@click.option("--publish-checkpoint", is_flag=True, help="Train nothing: publish the latest run's best checkpoint.")
def main(source: RecipeSource, as_events: bool, resume: bool, tenant: str, publish_checkpoint: bool) -> None:
    """Train an adapter and publish it: that of RECIPE (a YAML file, a shipped recipe's name, or a JSON object), with
    the options on top of it, or that of the options alone.
    """

    def emit(event: Event) -> None:
        click.echo(encode(event) if as_events else describe(event))

    try:
        settings = Settings.from_env()
        configure_logging(settings.log_level)
        loaded = source.load(settings.home)
        if publish_checkpoint:
            publish_latest(loaded, settings, emit, tenant=tenant)
        else:
            train(loaded, settings, emit, resume=resume, tenant=tenant)
    except LorayError as e:
        emit({"event": "error", "kind": type(e).__name__, "message": str(e)})
        sys.exit(1)
    except Interrupted as e:
        emit({"event": "error", "kind": "Interrupted", "message": str(e)})
        sys.exit(_STOPPED)
    except Exception as e:
        log.debug("unexpected error", exc_info=True)
        message = f"{first_line(e)} (LORAY_LOG_LEVEL=DEBUG shows where)"
        emit({"event": "error", "kind": type(e).__name__, "message": message})
        sys.exit(1)


def train(
    recipe: Recipe, settings: Settings, emit: Emit, *, resume: bool = False, tenant: str = DEFAULT_TENANT
) -> None:
    """Trains and publishes for `tenant`, passing events to `emit`. Runs in the main thread, which SIGTERM interrupts.

    If it raises LorayError, nothing is published.
    """
    whole = Catalog(settings.catalog)
    catalog, name = whole.view(driver_of(tenant)), qualified_name(tenant, recipe.spec.name)
    with Interrupts() as interrupts, recorded(catalog, recipe.spec) as job:
        catalog.check_name(recipe.spec.name, recipe.spec.publish.aliases)
        open_store(settings.store).check()  # publishing needs it: fail before training if it is wrong
        try:
            prepared = prepare(recipe, settings, catalog, lambda: _connect(recipe, settings, interrupts))
        except KeyboardInterrupt:  # raised by ray.get while data is tokenised
            raise interrupts.interrupted() from None
        whole.add_base(prepared.base.name, prepared.base.fingerprint)  # refuses other weights under a known name
        runs = open_runs(settings)
        run = runs.latest(name) if resume else None
        published = None if run is None else already_published(run, recipe)
        if published is None:
            _connect(recipe, settings, interrupts)
            run = run or runs.new(name, job.job_id)
            with run.locked(job.job_id, interrupts.raise_in_main_thread):
                result = _fit(prepared, run, settings, emit, job, interrupts)
                if result.return_value is not None:
                    hint = f", or publish it with {_how_to_publish(recipe, tenant)}"
                    raise TrainingError(f"{result.return_value}{hint if result.checkpoint else ''}")
                try:
                    published = _publish(result, run, recipe, settings, emit, tenant)
                except KeyboardInterrupt:  # raised by ray.get while the adapter is measured
                    raise interrupts.interrupted() from None
        job.end("succeeded", version=published["version"])
    emit(published)


def publish_latest(recipe: Recipe, settings: Settings, emit: Emit, *, tenant: str = DEFAULT_TENANT) -> None:
    """Publishes the best checkpoint of the latest run, finished or not, and records that run's job as succeeded."""
    run = open_runs(settings).latest(qualified_name(tenant, recipe.spec.name))
    with Interrupts() as interrupts, run.locked("publication", interrupts.raise_in_main_thread):
        published = publish_best(run.result(), run, recipe, settings, emit, tenant=tenant)
    if run.job_id is not None:
        JobRecord(Catalog(settings.catalog).view(driver_of(tenant)), run.job_id).end(
            "succeeded", version=published["version"]
        )
    emit(published)


def _publish(
    result: Result, run: RunFolder, recipe: Recipe, settings: Settings, emit: Emit, tenant: str = DEFAULT_TENANT
) -> PublishedEvent:
    try:
        return publish_best(result, run, recipe, settings, emit, tenant=tenant)
    except (CatalogError, EvaluationError, StoreError) as e:
        raise type(e)(f"{e}; training is complete: publish it later, with {_how_to_publish(recipe, tenant)}") from e


def _how_to_publish(recipe: Recipe, tenant: str) -> str:
    whose = "" if tenant == DEFAULT_TENANT else f" --tenant {tenant}"
    return f"`python -m jobs.train {recipe.path or 'RECIPE'} --publish-checkpoint{whose}`"


def _fit(
    prepared: Prepared, run: RunFolder, settings: Settings, emit: Emit, job: JobRecord, interrupts: Interrupts
) -> Result:
    def write_and_emit(event: Event) -> None:
        board.write(event)
        emit(event)

    with run.history() as history, TensorBoardWriter(history.board) as board, EventTail(history.events, write_and_emit):
        sink = start_sink(history.events)
        try:
            return build_trainer(prepared, run, settings, sink).fit()
        except TrainingFailedError as e:
            failures = getattr(e, "worker_failures", None) or {0: e}
            raise TrainingError(
                f"training failed: {first_line(next(iter(failures.values())))}; "
                f"go on from the last checkpoint with --resume, details are in {run}"
            ) from e
        except KeyboardInterrupt:
            interrupted = interrupts.interrupted()
            job.end("stopped", message=str(interrupted))  # at once: `ray job stop` kills a driver that ends slowly
            raise interrupted from None
        finally:
            ray.kill(sink)


def _connect(recipe: Recipe, settings: Settings, interrupts: Interrupts) -> None:
    """To the cluster, or to one on this machine alone. Raises SpecError if it has too few resources."""
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    interrupts.arm()
    _check_resources(recipe, settings)


def _check_resources(recipe: Recipe, settings: Settings) -> None:
    """Raises SpecError if the cluster has too few resources, for which Ray would wait without end.

    With an autoscaler, which may add nodes, it only logs a warning.
    """
    have, spec = ray.cluster_resources(), recipe.spec
    name, needed = ("num_workers", spec.num_workers) if spec.min_workers is None else ("min_workers", spec.min_workers)
    for resource, each in worker_resources(spec, settings.training_group).items():
        if have.get(resource, 0) >= needed * each:
            continue
        unit = f"{resource}s" if resource.isupper() else f"of the resource {resource}"
        lack = f"{name} is {needed}, but the cluster has {have.get(resource, 0):g} {unit}"
        if not _has_autoscaler():
            raise SpecError(f"{lack}; lower it, or use a larger cluster")
        log.warning("%s: waiting for its autoscaler to add them, as long as that takes", lack)


def _has_autoscaler() -> bool:
    """Whether an autoscaler may add nodes, judged by traces on the driver's node. Ray has no API for it.

    KubeRay starts the head with --no-monitor if it runs the autoscaler itself, which does not show on other nodes;
    `ray up` leaves its configuration file.
    """
    command = os.environ.get("KUBERAY_GEN_RAY_START_CMD", "")
    is_worker = bool(command) and "--head" not in command
    return is_worker or "--no-monitor" in command or _RAY_UP_CONFIG.expanduser().exists()


if __name__ == "__main__":
    main()
