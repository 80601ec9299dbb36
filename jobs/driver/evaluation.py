"""Evaluation before publishing: measures base, base under the adapter's RoPE, and adapter, as the recipe says.

The gate reads the results. On a cluster a Ray task measures, because the driver's node may have no GPU; without a
cluster this process does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import ray
import torch
from ray.exceptions import RayTaskError
from ray.train import Checkpoint
from transformers import AutoTokenizer

from jobs.driver.data import fetched
from jobs.events.schema import Emit
from jobs.runs.folders import RunFolder
from jobs.workers.placement import worker_resources
from jobs.workers.threads import num_threads
from loray.bases.registry import BaseModel, ensure_base
from loray.errors import SpecError
from loray.recipes.load import Recipe
from loray.recipes.resolve import resolve
from loray.settings import Settings
from loray.spec import (
    Evaluation,
    EvaluationSpec,
    Frozen,
    PerplexitySpec,
    RopeParameters,
    TrainingGroup,
    TrainSpec,
)
from loray.telemetry import configure_logging, get_logger
from loray.train.checkpoint import ADAPTER
from loray.train.evaluation.documents import Documents, cut_windows, read_documents
from loray.train.evaluation.prompts import make_prompt

log = get_logger(__name__)

_EVALUATIONS = "evaluations.json"


def check_measurable(recipe: Recipe, base: BaseModel, settings: Settings) -> None:
    """Raises SpecError or DataError if `measure_checkpoint` could not measure what the recipe asks for after training.

    Also refuses an alias that the gate could never grant to this run.
    """
    spec = recipe.spec
    perplexity = spec.evaluation.perplexity
    if perplexity is not None:
        documents = _documents(recipe, base, settings)
        for length in _with_contexts(perplexity, spec, base).context_lengths:
            cut_windows(documents, length, stride=perplexity.stride, max_windows=1)
    elif spec.rope_scaling is not None and spec.publish.aliases and spec.publish.no_gate is None:
        raise SpecError(
            "an alias of an adapter with a longer context is granted by its perplexity: set evaluation.perplexity, "
            "leave out publish.aliases, or say in publish.no_gate why it needs none"
        )
    for task in spec.evaluation.retrieval:
        make_prompt(task.task, AutoTokenizer.from_pretrained(base.path), min(task.context_lengths), 0.0)


def measure_checkpoint(
    checkpoint: Checkpoint,
    step: int,
    recipe: Recipe,
    base: BaseModel,
    run: RunFolder,
    settings: Settings,
    emit: Emit = lambda event: None,
) -> tuple[Evaluation, ...]:
    """Measures what `recipe.spec.evaluation` asks for. Emits one event before it begins.

    The results are saved in the run's folder. Publishing the same checkpoint again reads them from there, so it
    publishes the same adapter. A measurement that was interrupted goes on with the windows that its machine has kept.
    """
    spec, wanted, documents = recipe.spec, recipe.spec.evaluation, None
    if wanted.perplexity is None and not wanted.retrieval:
        return ()
    if wanted.perplexity is not None:
        wanted = wanted.model_copy(update={"perplexity": _with_contexts(wanted.perplexity, spec, base)})
        documents = _documents(recipe, base, settings)
    asked = {
        "step": step,
        "evaluation": wanted.model_dump(mode="json", include={"perplexity", "retrieval"}),
        "data_sha256": documents and documents.sha256,
    }
    saved = _read(run)
    if saved is None or saved.asked != asked:
        tasks = [*(["perplexity"] if documents else []), *(f"{task.task} retrieval" for task in wanted.retrieval)]
        emit({"event": "measure", "tasks": tasks})
        rope = resolve(spec, base.config).rope
        task = _Task(spec, wanted, checkpoint, documents, rope, base.fingerprint, settings.home, settings.log_level)
        found = _run(task, settings.training_group)
        saved = _Saved(asked=asked, evaluations=tuple(e.model_dump(mode="json") for e in found))
        run.write(_EVALUATIONS, json.dumps(saved.model_dump(), indent=2).encode() + b"\n")
    return tuple(Evaluation.parse(e, source=f"{_EVALUATIONS} of {run}") for e in saved.evaluations)


class _Saved(Frozen):
    """The run's `evaluations.json`: what was asked for, and the results as JSON."""

    asked: dict[str, Any]
    evaluations: tuple[dict[str, Any], ...]


def _read(run: RunFolder) -> _Saved | None:
    """None where nothing was measured yet, or the file is damaged."""
    data = run.read(_EVALUATIONS)
    try:
        return None if data is None else _Saved.parse(json.loads(data), source=f"{_EVALUATIONS} of {run}")
    except ValueError as e:
        log.warning("what the run has is measured again: %s", e)
        return None


class _Task(NamedTuple):
    """The arguments of a measurement, sent to the process that runs it."""

    spec: TrainSpec
    evaluation: EvaluationSpec
    checkpoint: Checkpoint
    documents: Documents | None
    rope: RopeParameters | None
    base_fingerprint: str
    home: Path
    log_level: str


def _run(task: _Task, group: TrainingGroup | None) -> tuple[Evaluation, ...]:
    if not ray.is_initialized():
        return _measure(task)
    takes = worker_resources(task.spec, group)
    num_cpus, num_gpus = takes.pop("CPU", 0), takes.pop("GPU", 0)
    remote: Any = ray.remote(_measure_on_worker).options(
        num_cpus=num_cpus, num_gpus=num_gpus, resources=takes, max_retries=1
    )
    try:
        measured: tuple[Evaluation, ...] = ray.get(remote.remote(task))
    except RayTaskError as e:
        raise e.cause from None
    return measured


def _measure_on_worker(task: _Task) -> tuple[Evaluation, ...]:
    configure_logging(task.log_level)
    torch.set_num_threads(num_threads(1))
    return _measure(task)


def _measure(task: _Task) -> tuple[Evaluation, ...]:
    # Late: PEFT and models take two seconds to import, which the driver spares itself.
    from loray.train.evaluation.kept import KeptFigures
    from loray.train.evaluation.measure import measure
    from loray.train.evaluation.subjects import subjects

    base = ensure_base(task.home, task.spec.base, fingerprint=task.base_fingerprint)
    with task.checkpoint.as_directory() as folder:
        return measure(
            base,
            subjects(task.rope, Path(folder) / ADAPTER, compare=True),
            documents=task.documents,
            perplexity=task.evaluation.perplexity,
            retrieval=task.evaluation.retrieval,
            dtype=task.spec.chosen_dtype,
            device=torch.device("cuda" if task.spec.use_gpu else "cpu"),
            kept=KeptFigures(task.home),
        )


def _documents(recipe: Recipe, base: BaseModel, settings: Settings) -> Documents:
    sources = recipe.data()
    if not sources.eval_sources:
        raise SpecError("evaluation.perplexity is measured on the documents of data.eval: give that file")
    paths = [source.path for source in sources.eval_sources]
    with fetched(paths, settings) as copies:
        return read_documents(paths, AutoTokenizer.from_pretrained(base.path), fetched=copies)


def _with_contexts(perplexity: PerplexitySpec, spec: TrainSpec, base: BaseModel) -> PerplexitySpec:
    """Fills in the context lengths that the gate compares, if the recipe names none."""
    if perplexity.context_lengths:
        return perplexity
    resolved = resolve(spec, base.config)
    lengths = tuple(dict.fromkeys((resolved.original_context, resolved.context)))
    return perplexity.model_copy(update={"context_lengths": lengths})
