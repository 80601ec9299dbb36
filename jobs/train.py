"""The training driver: `python -m jobs.train RECIPE`, alone or as a Ray job.

Checks everything, starts Ray Train's workers, and publishes the best checkpoint. Runs lie in
`LORAY_HOME/runs/<name>/<time>`: checkpoints, `events.jsonl`, and `published.json` once it is.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import ray
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, Result, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from jobs import events, worker
from jobs.events import EventTail
from jobs.prepare import Prepared, prepare
from jobs.recipe import Recipe, load_recipe
from loray.bases.registry import get_base
from loray.catalog import Catalog
from loray.errors import BaseMismatch, ConflictError, LorayError, SpecError, TrainingError
from loray.publishing import publish
from loray.settings import Settings
from loray.store import AdapterStore, open_store
from loray.telemetry import configure_logging, get_logger
from loray.train.checkpoint import ADAPTER, RunState, check_publishable, read_state
from loray.train.model import context_length, rope_parameters

log = get_logger(__name__)

_EVENTS = "events.jsonl"
_JOB_ID = "job_id"
_LOCK = "lock"
_PUBLISHED = "published.json"
_RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray Train writes it with the first checkpoint
_MAX_LOST_WORKERS = 3
_HEALTH_CHECK_S = "0.2"  # Ray's own 2 s is what a rank waits for when it reports a checkpoint


@click.command()
@click.argument("recipe")
@click.option("--events", "as_events", is_flag=True, help="Say what happens as JSON, one object a line.")
@click.option("--resume", is_flag=True, help="Go on with the latest run of this recipe, from its last checkpoint.")
@click.option("--publish-checkpoint", is_flag=True, help="Train nothing: publish the latest run's best checkpoint.")
def main(recipe: str, as_events: bool, resume: bool, publish_checkpoint: bool) -> None:
    """Train the adapter of RECIPE (a YAML file, or a shipped recipe's name) and publish it."""

    def emit(event: dict[str, Any]) -> None:
        click.echo(events.encode(event) if as_events else events.describe(event))

    try:
        settings = Settings.from_env()
        configure_logging(settings.log_level)
        loaded = load_recipe(recipe)
        if publish_checkpoint:
            publish_latest(loaded, settings, emit)
        else:
            train(loaded, settings, emit, resume=resume)
    except LorayError as e:
        emit({"event": "error", "kind": type(e).__name__, "message": str(e)})
        sys.exit(1)
    except Exception as e:
        log.debug("unexpected error", exc_info=True)
        message = f"{worker.first_line(e)} (LORAY_LOG_LEVEL=DEBUG shows where)"
        emit({"event": "error", "kind": type(e).__name__, "message": message})
        sys.exit(1)


def train(recipe: Recipe, settings: Settings, emit: events.Emit, *, resume: bool = False) -> None:
    """Train and publish, handing events to `emit`. Raises LorayError; then nothing is published."""
    catalog = Catalog(settings.catalog)
    catalog.check_name(recipe.spec.name, recipe.spec.publish.aliases)
    open_store(settings.store)  # needed at the end, as the catalog is: find out now that they can be reached
    prepared = prepare(recipe, settings)
    catalog.add_base(prepared.base.name, prepared.base.fingerprint)  # refuses other weights under a known name
    folder = _latest_run(settings, recipe) if resume else None
    if folder is not None and (done := _already_published(folder, recipe)) is not None:
        emit(done)
        return
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    _check_resources(recipe)
    with _locked(folder or _new_run(settings, recipe)) as folder:
        with EventTail(folder / _EVENTS, emit):
            result = _fit(prepared, folder, settings)
        if result.return_value is not None:
            hint = f", or publish it with `python -m jobs.train {recipe.path} --publish-checkpoint`"
            raise TrainingError(f"{result.return_value}{hint if result.checkpoint else ''}")
        _publish_best(result, folder, recipe, settings, emit)


def publish_latest(recipe: Recipe, settings: Settings, emit: events.Emit) -> None:
    """Publish the best checkpoint of the latest run, finished or not."""
    folder = _latest_run(settings, recipe)
    if not (folder / _RAY_SNAPSHOT).is_file():
        raise TrainingError(f"the run in {folder} has no checkpoint to publish; train it with --resume")
    with _locked(folder):
        _publish_best(Result.from_path(str(folder)), folder, recipe, settings, emit)


def _fit(prepared: Prepared, folder: Path, settings: Settings) -> Any:
    spec = prepared.spec
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", _HEALTH_CHECK_S)  # Ray hands it to its controller
    ranked = spec.evaluation.keep_best and len(prepared.data.evaluation) > 0
    trainer = TorchTrainer(
        worker.run,
        train_loop_config=worker.WorkerConfig(
            recipe=spec.model_dump(mode="json"),
            home=str(settings.home),
            base_fingerprint=prepared.base.fingerprint,
            log_level=settings.log_level,
            events=str(folder / _EVENTS),
            data=ray.put(prepared.data),
        ),
        scaling_config=ScalingConfig(
            num_workers=spec.num_workers,
            use_gpu=spec.use_gpu,
            resources_per_worker={"CPU": 1} | ({"GPU": 1} if spec.use_gpu else {}),
        ),
        run_config=RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            failure_config=FailureConfig(max_failures=_MAX_LOST_WORKERS),
            checkpoint_config=CheckpointConfig(
                num_to_keep=spec.checkpoint.keep,
                checkpoint_score_attribute=worker.SCORE if ranked else None,
                checkpoint_score_order="min",
            ),
            callbacks=[worker.EventLog(str(folder / _EVENTS))],
        ),
    )
    try:
        return trainer.fit()
    except TrainingFailedError as e:
        failures = getattr(e, "worker_failures", None) or {0: e}
        raise TrainingError(
            f"training failed: {worker.first_line(next(iter(failures.values())))}; "
            f"go on from the last checkpoint with --resume, details are in {folder}"
        ) from e


def _check_resources(recipe: Recipe) -> None:
    """Ray would wait for ever for what the cluster will never have."""
    have = ray.cluster_resources()
    for resource in ("CPU", "GPU") if recipe.spec.use_gpu else ("CPU",):
        if have.get(resource, 0) < recipe.spec.num_workers:
            raise SpecError(
                f"num_workers is {recipe.spec.num_workers}, but the cluster has {have.get(resource, 0):g} {resource}s; "
                "lower it, or use a larger cluster"
            )


# -- run folders ------------------------------------------------------------------------------------------------------


def _new_run(settings: Settings, recipe: Recipe) -> Path:
    folder = settings.home / "runs" / recipe.spec.name / datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
    folder.mkdir(parents=True)
    (folder / _JOB_ID).write_text(_job_id() or "", encoding="utf-8")
    return folder


@contextmanager
def _locked(folder: Path) -> Iterator[Path]:
    """One driver a run folder; the lock ends with its process. Raises ConflictError."""
    with (folder / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise ConflictError(f"another driver is at work on the run in {folder}; wait for it, or stop it") from e
        yield folder


def _latest_run(settings: Settings, recipe: Recipe) -> Path:
    runs = settings.home / "runs" / recipe.spec.name
    folders = sorted(path for path in runs.glob("*") if path.is_dir())
    if not folders:
        raise SpecError(f"there is no run of {recipe.spec.name!r} in {runs} to go on with; train it without --resume")
    return folders[-1]


def _already_published(folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The event of an earlier publication from this run by the same recipe: resuming it has nothing left to do."""
    path = folder / _PUBLISHED
    if not path.is_file():
        return None
    saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return saved["event"] if saved["recipe"] == recipe.spec.model_dump(mode="json") else None


# -- publishing -------------------------------------------------------------------------------------------------------


def _publish_best(result: Any, folder: Path, recipe: Recipe, settings: Settings, emit: events.Emit) -> None:
    """By the recipe that the checkpoint was trained with; the one at hand says only how to publish it."""
    latest = result.checkpoint
    if latest is None:
        raise TrainingError(f"the run in {folder} ended without a checkpoint; nothing was published")
    keep_best = _state(latest).recipe.evaluation.keep_best
    with _best(result, by_loss=keep_best).as_directory() as path:
        event = _publish(Path(path), folder, recipe, settings)
    saved = {"recipe": recipe.spec.model_dump(mode="json"), "event": event}
    (folder / _PUBLISHED).write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")
    emit(event)


def _state(checkpoint: Checkpoint) -> RunState:
    with checkpoint.as_directory() as path:
        return read_state(Path(path))


def _best(result: Any, *, by_loss: bool) -> Checkpoint:
    evaluated = [
        (metrics["eval_loss"], checkpoint)
        for checkpoint, metrics in result.best_checkpoints or ()
        if metrics.get("eval_loss") is not None
    ]
    return min(evaluated, key=lambda pair: pair[0])[1] if by_loss and evaluated else result.checkpoint


def _publish(checkpoint: Path, run: Path, recipe: Recipe, settings: Settings) -> dict[str, Any]:
    state = read_state(checkpoint)
    check_publishable(state)
    spec = state.recipe.model_copy(update={"publish": recipe.spec.publish})
    base = get_base(settings.home, spec.base)
    if base.fingerprint != state.base_fingerprint:
        raise BaseMismatch(
            f"the run was trained on {spec.base} ({state.base_fingerprint[:12]}), but {spec.base} is now another model "
            f"({base.fingerprint[:12]}); add the one it was trained on"
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "adapter"
        shutil.copytree(checkpoint / ADAPTER, folder)  # the manifest is written beside the weights, not into the run
        long_context = spec.adapter.long_context
        version = publish(
            folder,
            name=spec.name,
            base=base,
            store=AdapterStore(open_store(settings.store)),
            catalog=Catalog(settings.catalog),
            aliases=spec.publish.aliases,
            recipe=spec,
            job_id=_first_job_id(run),
            data_fingerprint=state.data_fingerprint,
            evaluations=state.evaluations(),
            licence=spec.publish.licence,
            description=spec.publish.description,
            rope_parameters=long_context and rope_parameters(base, long_context),
            context_length=context_length(base, spec),
        )
    return {
        "event": "published",
        "name": spec.name,
        "version": version.version,
        "label": version.label,
        "digest": version.digest,
        "nbytes": version.manifest.nbytes,
        "aliases": list(spec.publish.aliases),
        "step": state.step,
        "evaluations": [e.model_dump(mode="json") for e in state.evaluations()],
    }


def _first_job_id(run: Path) -> str | None:
    """Of the job that created the run: part of the adapter's identity, so a resumed job must not bring its own."""
    path = run / _JOB_ID
    return (path.read_text(encoding="utf-8") or None) if path.is_file() else None


def _job_id() -> str | None:
    """The submission id that `ray job` shows, where the driver runs as a Ray job."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    submission: str | None = job.get("metadata", {}).get("job_submission_id")
    return submission


if __name__ == "__main__":
    main()
