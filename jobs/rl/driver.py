"""The driver of a recipe that learns from rewards, `python -m jobs.rl.driver RECIPE`, alone or as a Ray job.

It finds the deployment of the recipe's base in its cluster, which samples, starts or finds the base's trainer, runs the
steps (`jobs.rl.steps`), and publishes like any other run.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import click
import ray
from transformers import AutoTokenizer

from jobs.driver.publication import already_published, driver_of, keep_published
from jobs.driver.record import JobRecord, recorded, reported
from jobs.events import Emit, Event, PublishedEvent, Stages, appending, decode, describe, encode
from jobs.rl.environments import Environments
from jobs.rl.groups import Asker
from jobs.rl.steps import BEST, Steps, Told, kept_version
from jobs.runs.folders import RunFolder, open_runs
from jobs.sampling import Sampler
from jobs.trackers import TrackedRun, check_installed, tensorboard, tracked
from jobs.trainer import TrainerClient, trainer_of
from jobs.workers.reporting import TrainingGauges
from loray.adapters.manifest import check_recipe
from loray.bases.registry import BaseModel, ensure_base, list_bases
from loray.catalog import Catalog
from loray.cli.recipes import RecipeSource, recipe_options
from loray.errors import GateRefused, NotFoundError, SpecError
from loray.fetching import fetched
from loray.planning.run import count_base, count_trained
from loray.publishing import Destination, import_folder
from loray.recipes.load import Recipe
from loray.settings import Settings
from loray.spec import DEFAULT_TENANT, RlSpec, SampleCall, SamplingParams, TrainSpec, qualified_name
from loray.store import AdapterStore, open_store
from loray.telemetry import configure_logging
from loray.train.data.rows import Cut
from loray.train.rl.prompts import Prompt, Prompts, Speech, read_prompts

_TRAINED = "trained"  # a file of the run, once all steps are done: only publishing is left


@click.command()
@recipe_options
@click.option("--events", "as_events", is_flag=True, help="Say what happens as JSON, one object a line.")
@click.option(
    "--resume", is_flag=True, help="Go on with the latest unpublished run of this recipe, from its last step."
)
@click.option("--tenant", default=DEFAULT_TENANT, help="Whose the adapter and the run are.")
@click.option("--no-plan", is_flag=True, help="Does nothing here: the trainer refuses what has no room.")
def main(source: RecipeSource, as_events: bool, resume: bool, tenant: str, no_plan: bool) -> None:
    """Train an adapter by rewards and publish it."""

    def emit(event: Event) -> None:
        click.echo(encode(event) if as_events else describe(event))

    with reported(emit):
        settings = Settings.from_env()
        configure_logging(settings.log_level)
        train(source.load(settings.home), settings, emit, resume=resume, tenant=tenant)


def train(
    recipe: Recipe, settings: Settings, emit: Emit, *, resume: bool = False, tenant: str = DEFAULT_TENANT
) -> None:
    """Trains and publishes for `tenant`, passing events to `emit`. If it raises LorayError, nothing is published."""
    whole = Catalog(settings.catalog)
    catalog, name = whole.view(driver_of(tenant)), qualified_name(tenant, recipe.spec.name)
    with recorded(catalog, recipe.spec) as job:
        catalog.adapters.check_name(recipe.spec.name, recipe.spec.publish.aliases)
        open_store(settings.store).check()
        runs = open_runs(settings)
        run = runs.resumable(name) if resume else None
        published = None if run is None else already_published(run, recipe)
        if published is None:
            prepared = prepare(recipe, settings, catalog, tenant, Stages(emit))
            whole.bases.add(prepared.base.name, prepared.base.fingerprint, prepared.base.of)
            if not ray.is_initialized():
                ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
            job.interrupts.arm()
            run = run or runs.new(name, job.job_id)
            shown = TrackedRun(name, f"{name}/{run.name}", recipe.spec)
            with run.locked(job.job_id, job.interrupts.raise_in_main_thread), tracked(shown, emit) as trackers:
                published = _run(prepared, recipe, run, settings, trackers.emit, tenant, job)
                trackers.tell(published)
        job.end("succeeded", version=published["version"])
    emit(published)


class Prepared(NamedTuple):
    """A run before it starts. `initial`: digest of the adapter that it goes on from."""

    spec: TrainSpec
    objective: RlSpec
    base: BaseModel
    speech: Speech
    prompts: Prompts
    max_length: int
    num_steps: int
    initial: str | None


def prepare(recipe: Recipe, settings: Settings, catalog: Catalog, tenant: str, stages: Stages) -> Prepared:
    """Checks the recipe against this machine and reads the data. Raises LorayError that says what to change."""
    stages("checking the recipe")
    spec = recipe.spec
    objective = spec.objective
    if not isinstance(objective, RlSpec):
        raise SpecError(f"objective.type {objective.type} does not learn from rewards: `loray train` it as it is")
    if spec.name in {base.name for base in list_bases(settings.home)}:
        raise SpecError(f"name {spec.name!r} is a base model's; adapters and bases share their names: choose another")
    check_recipe(spec)
    check_installed(spec.tracking)
    if tenant != DEFAULT_TENANT and objective.runs_code is not None:
        raise SpecError(f"{objective.runs_code} is code of the recipe, which a tenant's job does not run: take builtin")
    base = ensure_base(settings.home, spec.base, progress=lambda stage, share: stages(stage, share, 1))
    initial = None
    if spec.init_adapter is not None:
        ref = catalog.adapters.resolve(spec.init_adapter)
        ref.check_base(base.name, base.fingerprint)
        initial = ref.digest
    stages("reading the data")
    window = base.config.max_position_embeddings
    max_length = min(spec.data.max_length or window, window)
    if objective.max_tokens >= max_length:
        raise SpecError(
            f"objective.max_tokens is {objective.max_tokens}, and a row has {max_length} tokens at most, which leaves "
            "none for a prompt: lower it"
        )
    tokenizer, sources = AutoTokenizer.from_pretrained(base.path), recipe.data()
    speech = Speech(tokenizer, raw=spec.data.format == "raw", system=spec.data.system)
    with fetched(sources.paths, settings, sources.columns) as copies:
        prompts = read_prompts(
            sources,
            speech,
            max_length=max_length - objective.max_tokens,
            max_eval_rows=spec.evaluation.max_rows,
            seed=spec.seed,
            needed=objective.reads,
            fetched=copies,
        )
    per_epoch = len(prompts.train) / objective.prompts_per_step
    num_steps = spec.max_steps or max(1, round((spec.num_epochs or 1) * per_epoch))
    return Prepared(spec, objective, base, speech, prompts, max_length, num_steps, initial)


def _run(
    prepared: Prepared,
    recipe: Recipe,
    run: RunFolder,
    settings: Settings,
    emit: Emit,
    tenant: str,
    job: JobRecord,
) -> PublishedEvent:
    has_board = "tensorboard" in prepared.spec.tracking
    with run.history() as (events, board), tensorboard(board) as write:
        told, append, stages = _told(events), appending(events), Stages(emit)

        gauges = TrainingGauges(recipe.spec.name, run.name, 0)

        def tell(event: Event) -> None:
            append(event)
            if event["event"] == "step":
                gauges.set_step(event)
            elif event["event"] == "eval":
                gauges.set_figures(event, "eval_")
            if has_board:
                write(event)
            emit(event)

        if run.read(_TRAINED) is None:
            try:
                asyncio.run(_sample_and_train(prepared, run, recipe.folder, tell, told, stages, tenant))
            except KeyboardInterrupt:
                job.stop()
        stages("publishing")
        event = publish_kept(run, recipe, prepared.base, settings, tenant)
    keep_published(run, recipe.spec, event)
    return event


async def _sample_and_train(
    prepared: Prepared, run: RunFolder, folder: Path, tell: Emit, told: Told, stages: Stages, tenant: str
) -> None:
    sampler = Sampler()
    await _check_served(sampler, prepared.base, prepared.prompts.train[0], tenant)
    stages("starting the environments")
    environments = Environments(prepared.objective, [str(folder)])
    try:
        await _check_reward(environments, prepared)
        await _train(prepared, run, sampler, environments, tell, told, stages, tenant)
    finally:
        environments.close()


async def _train(
    prepared: Prepared,
    run: RunFolder,
    sampler: Sampler,
    environments: Environments,
    tell: Emit,
    told: Told,
    stages: Stages,
    tenant: str,
) -> None:
    spec, base = prepared.spec, prepared.base
    stages("starting the trainer")
    trainer = TrainerClient(trainer_of(base.name, spec.dtype))
    model = f"{tenant}.{spec.name}.{run.name}"
    made: Mapping[str, Any] = await trainer.create(
        model, spec.adapter.model_dump(mode="json"), spec.seed, prepared.initial
    )
    asker = Asker(
        base.name,
        prepared.objective,
        sampler,
        environments,
        prepared.speech,
        tenant=tenant,
        seed=spec.seed,
        max_length=prepared.max_length,
        stop_ids=frozenset(base.config.eos_token_ids),
    )
    tell(_start(prepared, told.step, made["dtype"]))
    steps = Steps(
        spec,
        prepared.num_steps,
        model,
        trainer=trainer,
        retiring=sampler,
        asker=asker,
        prompts=prepared.prompts.train,
        held_out=prepared.prompts.held_out,
        speech=prepared.speech,
        folder=run,
        emit=tell,
        told=told,
        dtype=made["dtype"],
    )
    await steps.run(made["next_seq"])
    run.write(_TRAINED, b"")
    await trainer.remove(model)


async def _check_served(sampler: Sampler, base: BaseModel, prompt: Prompt, tenant: str) -> None:
    """Raises SpecError where nothing in the cluster serves this base."""
    params = SamplingParams(max_tokens=1, logprobs=0)
    call = SampleCall(base=base.name, adapter=None, prompt_ids=prompt.ids, params=params, tenant=tenant)
    try:
        await sampler.sample(call)
    except (SpecError, NotFoundError) as e:
        raise SpecError(
            f"answers are sampled by the deployment of {base.name}, and this cluster has none ({e}): "
            f"`loray up --base {base.name}` in this cluster first"
        ) from e


async def _check_reward(environments: Environments, prepared: Prepared) -> None:
    """Raises SpecError where the reward fails on the first row."""
    if prepared.objective.environment is not None:
        return
    row = prepared.prompts.train[0].row
    try:
        await environments.reward(row, "")
    except Exception as e:
        raise SpecError(f"the reward fails on the first row, {dict(row)}: {e}") from e


def _start(prepared: Prepared, step: int, dtype: str) -> Event:
    spec, base, prompts = prepared.spec, prepared.base, prepared.prompts
    trained = count_trained(base.config, spec.adapter).total
    lengths = [len(prompt.ids) for prompt in prompts.train]
    total = count_base(base.config).total + trained
    return {
        "event": "start",
        "step": step,
        "num_steps": prepared.num_steps,
        "num_parameters": total,
        "num_trainable": trained,
        "trainable_share": trained / total,
        "num_workers": 1,
        "num_threads": os.cpu_count() or 1,
        "device": "the trainer's device, and the deployment that samples",
        "dtype": dtype,
        "pid": os.getpid(),
        "data": {
            "format": "chat",
            "rendering": "prompts as a server renders them",
            "max_length": prepared.max_length,
            "num_rows": len(prompts.train),
            "num_eval_rows": len(prompts.held_out),
            "num_tokens": sum(lengths),
            "num_truncated": 0,
            "num_without_targets": 0,
            "cut": list(Cut(0.0, 0.0, max(lengths))),
        },
    }


def _told(events: Path) -> Told:
    """Reads what the run's events say already."""
    step, evaluated, num_tokens = 0, set[int](), 0
    lines = events.read_text(encoding="utf-8").splitlines() if events.is_file() else []
    for line in lines:
        event = decode(line)
        if event is not None and event["event"] == "rollout":
            step = max(step, event["step"])
        elif event is not None and event["event"] == "step":
            num_tokens = event["num_tokens"]
        elif event is not None and event["event"] == "eval":
            evaluated.add(event["step"])
    return Told(step, frozenset(evaluated), num_tokens)


def publish_kept(
    run: RunFolder, recipe: Recipe, base: BaseModel, settings: Settings, tenant: str = DEFAULT_TENANT
) -> PublishedEvent:
    """Publishes the version that a run has kept, with the digest under which engines have sampled it. Where the gate
    refuses the aliases, it is published without them, and the event's `refusal` says why.
    """
    kept = run.read(BEST)
    if kept is None:
        raise SpecError(f"the run in {run} has kept no version yet: let it go on with --resume")
    about, files = kept_version(kept)
    spec = recipe.spec
    catalog = Catalog.of(settings).view(driver_of(tenant))
    plain = Destination(spec.name, AdapterStore(open_store(settings.store)), catalog)
    aliases, refusal = spec.publish.aliases, None
    with tempfile.TemporaryDirectory(prefix="loray-kept-") as temporary:
        folder = Path(temporary)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        try:
            version = import_folder(folder, base, replace(plain, aliases=aliases, no_gate=spec.publish.no_gate))
        except GateRefused as e:
            aliases, refusal = (), str(e)
            version = import_folder(folder, base, plain)
    return {
        "event": "published",
        "name": version.name,
        "version": version.version,
        "label": version.label,
        "digest": version.digest,
        "nbytes": version.manifest.nbytes,
        "aliases": list(aliases),
        "refusal": refusal,
        "unmeasured": None,
        "step": about["step"],
        "evaluations": [],
    }


if __name__ == "__main__":
    main()
