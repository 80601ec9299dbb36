"""Publishes a run: its best checkpoint becomes a version in the catalog, with the recipe that trained it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from ray.train import Checkpoint, Result

from jobs.driver.evaluation import measure_checkpoint
from jobs.events import Emit, PublishedEvent, Stages, appending, following
from jobs.runs.folders import RunFolder
from jobs.runs.history import PUBLISHED
from loray.adapters.manifest import ManifestDetails
from loray.bases.registry import BaseModel, ensure_base
from loray.bases.rounding import form_trained_on
from loray.catalog import AdapterVersion, Catalog
from loray.errors import GateRefused, TrainingError
from loray.publishing import Destination, publish
from loray.recipes.load import Recipe
from loray.recipes.resolve import resolve
from loray.settings import Settings
from loray.spec import DEFAULT_TENANT, Evaluation, Frozen, Principal, TrainSpec
from loray.store import AdapterStore, open_store
from loray.train.checkpoint import ADAPTER, RunState, check_publishable, read_state
from loray.train.evaluation.documents import HeldOutPrompt


class _Publication(Frozen):
    """The run's `published.json`: the recipe at hand as JSON, and the event."""

    recipe: dict[str, Any]
    event: dict[str, Any]


def publish_best(
    result: Result,
    run: RunFolder,
    recipe: Recipe,
    settings: Settings,
    emit: Emit = lambda event: None,
    *,
    tenant: str = DEFAULT_TENANT,
    sweep: str | None = None,
    prompts: tuple[HeldOutPrompt, ...] = (),
) -> PublishedEvent:
    """Publishes the run's best checkpoint for `tenant` with the recipe that it was trained with, and returns the event.

    The given recipe decides only how the checkpoint is measured and published. If the gate refuses the aliases, the
    checkpoint is published without them, and the event's `refusal` says why; its `unmeasured` says why the version has
    no evaluations, where the workers have too little memory for them. `sweep`: of which the run is the best
    trial. `prompts` are answered by base and adapter. What happens goes into the run's history, and to `emit`. Raises
    LorayError.
    """
    if result.checkpoint is None:
        raise TrainingError(f"the run in {run} ended without a checkpoint; nothing was published")
    checkpoint = best(result, by_loss=_state(result.checkpoint).recipe.evaluation.keep_best)
    return publish_checkpoint(checkpoint, run, recipe, settings, emit, tenant=tenant, sweep=sweep, prompts=prompts)


def publish_checkpoint(
    checkpoint: Checkpoint,
    run: RunFolder,
    recipe: Recipe,
    settings: Settings,
    emit: Emit = lambda event: None,
    *,
    tenant: str = DEFAULT_TENANT,
    sweep: str | None = None,
    prompts: tuple[HeldOutPrompt, ...] = (),
) -> PublishedEvent:
    """Publishes this checkpoint of the run, as `publish_best` does."""
    state = _state(checkpoint)
    check_publishable(state)
    spec = to_publish(state.recipe, recipe.spec)
    base = ensure_base(settings.home, spec.base, fingerprint=state.base_fingerprint)
    form = form_trained_on(base, spec, settings.home)
    on_workers = recipe._replace(spec=_on_workers_of(spec, recipe.spec))
    with run.history() as (events, _), following(events, emit):
        measured = measure_checkpoint(checkpoint, state.step, on_workers, base, run, settings, events, prompts)
        Stages(appending(events))("publishing")
    with checkpoint.as_directory() as path, tempfile.TemporaryDirectory() as temporary:
        folder, details = staged(Path(path), Path(temporary), spec, run, base, measured.evaluations, sweep)
        whole = Catalog.of(settings)
        for each in (base, form):
            whole.bases.add(each.name, each.fingerprint, each.of)
        catalog = whole.view(driver_of(tenant))
        plain = Destination(spec.name, AdapterStore(open_store(settings.store)), catalog)
        aliases, refusal = spec.publish.aliases, None
        try:
            to = replace(plain, aliases=aliases, no_gate=spec.publish.no_gate)
            version = publish(folder, form, to, details)
        except GateRefused as e:  # the version can be measured again later, and promoted
            aliases, refusal = (), str(e)
            version = publish(folder, form, plain, details)
    return record_published(version, run, recipe, state.step, aliases, refusal, measured.problem)


def staged(
    checkpoint: Path,
    into: Path,
    spec: TrainSpec,
    run: RunFolder,
    base: BaseModel,
    evaluations: Sequence[Evaluation] = (),
    sweep: str | None = None,
) -> tuple[Path, ManifestDetails]:
    """Copies the adapter of a checkpoint to where it is published from, and says what its manifest has beside it."""
    folder, state, resolved = into / "adapter", read_state(checkpoint), resolve(spec, base.config)
    shutil.copytree(checkpoint / ADAPTER, folder)  # publishing adds a manifest, which the run must not contain
    return folder, ManifestDetails(
        recipe=spec,
        dtype_reason=state.dtype_reason,
        job_id=run.job_id,
        data_fingerprint=state.data_fingerprint,
        parent=state.parent,
        sweep=sweep,
        evaluations=(*state.evaluations(), *evaluations),
        licence=spec.publish.licence,
        description=spec.publish.description,
        rope_parameters=resolved.rope,
        context_length=resolved.context,
        created_at=state.saved_at,
    )


def record_published(
    version: AdapterVersion,
    run: RunFolder,
    recipe: Recipe,
    step: int,
    aliases: Sequence[str],
    refusal: str | None = None,
    unmeasured: str | None = None,
) -> PublishedEvent:
    """Keeps in the run what was published of it, and returns the event."""
    event: PublishedEvent = {
        "event": "published",
        "name": version.name,
        "version": version.version,
        "label": version.label,
        "digest": version.digest,
        "nbytes": version.manifest.nbytes,
        "aliases": list(aliases),
        "refusal": refusal,
        "unmeasured": unmeasured,
        "step": step,
        "evaluations": [e.model_dump(mode="json", exclude_none=True) for e in version.manifest.evaluations],
    }
    keep_published(run, recipe.spec, event)
    return event


def keep_published(run: RunFolder, spec: TrainSpec, event: PublishedEvent) -> None:
    """Records that the run is published by this recipe, so that resuming it has nothing left to do."""
    run.write_model(PUBLISHED, _Publication(recipe=spec.model_dump(mode="json"), event=dict(event)))


def already_published(run: RunFolder, recipe: Recipe) -> PublishedEvent | None:
    """Returns the event of an earlier publication of this run with the same recipe; None if there is none.

    Resuming a published run has nothing left to do.
    """
    saved = run.read_model(_Publication, PUBLISHED)
    if saved is None or saved.recipe != recipe.spec.model_dump(mode="json"):
        return None
    return cast("PublishedEvent", saved.event)


def best(result: Result, *, by_loss: bool) -> Checkpoint:
    """Returns the checkpoint with the lowest held-out loss; the latest without `by_loss`, or if none was evaluated."""
    evaluated = [
        (metrics["eval_loss"], checkpoint)
        for checkpoint, metrics in result.best_checkpoints or ()
        if metrics.get("eval_loss") is not None
    ]
    return min(evaluated, key=lambda pair: pair[0])[1] if by_loss and evaluated else result.checkpoint


def _state(checkpoint: Checkpoint) -> RunState:
    with checkpoint.as_directory() as path:
        return read_state(Path(path))


def driver_of(tenant: str) -> Principal:
    """Returns who a job acts as: for its tenant alone."""
    return Principal(tenant=tenant, scopes=frozenset({"publish", "promote", "train"}))


def to_publish(trained: TrainSpec, at_hand: TrainSpec) -> TrainSpec:
    """Returns the recipe that trained the checkpoint, with name, measurements and `publish` of the given recipe. Its
    tensors were written in the dtype that the first one asks for.
    """
    measured = {name: getattr(at_hand.evaluation, name) for name in ("perplexity", "retrieval")}
    evaluation = trained.evaluation.model_copy(update=measured)
    publish = at_hand.publish.model_copy(update={"dtype": trained.publish.dtype})
    return trained.model_copy(update={"name": at_hand.name, "evaluation": evaluation, "publish": publish})


def _on_workers_of(trained: TrainSpec, at_hand: TrainSpec) -> TrainSpec:
    """Returns the recipe that trained the checkpoint, on workers in number and sharing as the given recipe asks for."""
    names = ("num_workers", "min_workers", "parallel", *(() if at_hand.use_gpu == "auto" else ("use_gpu",)))
    return trained.model_copy(update={name: getattr(at_hand, name) for name in names})
