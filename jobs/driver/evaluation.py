"""Evaluation before publishing: measures base, base under the adapter's RoPE, and adapter, as the recipe says.

The gate reads the results. On a cluster workers as those of the run measure, which share what one alone cannot hold;
without a cluster this process does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import ray
from ray.train import Checkpoint, TrainingFailedError
from transformers import AutoTokenizer

from jobs.controller import is_lost
from jobs.driver.fit import build_measuring, cause
from jobs.events import Emit, first_line
from jobs.runs.folders import RunFolder
from jobs.workers.measuring import Measurement, measure_here
from loray.bases.registry import BaseModel
from loray.errors import EvaluationError, SpecError
from loray.fetching import fetched
from loray.recipes.load import Recipe
from loray.recipes.resolve import resolve
from loray.settings import Settings
from loray.spec import Evaluation, Frozen, PerplexitySpec, TrainSpec
from loray.train.evaluation.documents import Documents, cut_windows, read_documents
from loray_kernels.memory import is_out_of_memory

_EVALUATIONS = "evaluations.json"
_MEASURE_LATER = (
    "to measure it, publish it again with `--publish-checkpoint` and a recipe whose workers share the base "
    "(`parallel.strategy: fsdp2`, or more `num_workers`), or with shorter context lengths"
)


class MeasuredCheckpoint(NamedTuple):
    """`problem`: why there are no evaluations although the recipe asks for them, and how to get them."""

    evaluations: tuple[Evaluation, ...]
    problem: str | None = None


def check_measurable(recipe: Recipe, base: BaseModel, settings: Settings) -> None:
    """Raises SpecError or DataError if what the recipe asks for could not be measured after training.

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
        from loray.train.evaluation.retrieval import make_prompt  # imports PEFT and models

        make_prompt(task.task, AutoTokenizer.from_pretrained(base.path), min(task.context_lengths), 0.0)


def measure_checkpoint(
    checkpoint: Checkpoint,
    step: int,
    recipe: Recipe,
    base: BaseModel,
    run: RunFolder,
    settings: Settings,
    emit: Emit = lambda event: None,
) -> MeasuredCheckpoint:
    """Measures what `recipe.spec.evaluation` asks for, on workers of `recipe.spec`. Emits one event before it begins.

    The results are saved in the run's folder. Publishing the same checkpoint again reads them from there, so it
    publishes the same adapter. A measurement that was interrupted goes on with the windows that its machine has kept.
    """
    spec, wanted, documents = recipe.spec, recipe.spec.evaluation, None
    if wanted.perplexity is None and not wanted.retrieval:
        return MeasuredCheckpoint(())
    if wanted.perplexity is not None:
        wanted = wanted.model_copy(update={"perplexity": _with_contexts(wanted.perplexity, spec, base)})
        documents = _documents(recipe, base, settings)
    asked = {
        "step": step,
        "evaluation": wanted.model_dump(mode="json", include={"perplexity", "retrieval"}),
        "data_sha256": documents and documents.sha256,
    }
    saved = run.read_model(_Saved, _EVALUATIONS)
    if saved is None or saved.asked != asked:
        tasks = [*(["perplexity"] if documents else []), *(f"{task.task} retrieval" for task in wanted.retrieval)]
        emit({"event": "measure", "tasks": tasks})
        rope = resolve(spec, base.config).rope
        facts = base.fingerprint, settings.home, settings.log_level
        try:
            found = _measure(Measurement(spec, wanted, checkpoint, documents, rope, *facts), run, settings)
        except RuntimeError as e:
            if not is_out_of_memory(e):
                raise
            return MeasuredCheckpoint((), f"not measured, out of memory: {first_line(e)}; {_MEASURE_LATER}")
        saved = _Saved(asked=asked, evaluations=found)
        run.write_model(_EVALUATIONS, saved)
    return MeasuredCheckpoint(saved.evaluations)


class _Saved(Frozen):
    """The run's `evaluations.json`: what was asked for, and the results."""

    asked: dict[str, Any]
    evaluations: tuple[Evaluation, ...]


def _measure(measurement: Measurement, run: RunFolder, settings: Settings) -> tuple[Evaluation, ...]:
    """Raises the worker's error: LorayError, or another one."""
    if not ray.is_initialized():
        return measure_here(measurement)
    try:
        evaluations: tuple[Evaluation, ...] = build_measuring(measurement, run, settings).fit().return_value
    except TrainingFailedError as e:
        error = cause(e)
        raise EvaluationError(f"measuring failed: {first_line(error)}") if is_lost(error) else error from e
    return evaluations


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
