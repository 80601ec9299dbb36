"""Evaluation before publishing: measures base, base under the adapter's RoPE, and adapter, as the recipe says.

The gate reads the results. On a cluster workers as those of the run measure, which share what one alone cannot hold;
without a cluster this process does. Base and adapter also answer a few held-out prompts, for people to look at.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.train import Checkpoint, TrainingFailedError
from transformers import AutoTokenizer

from jobs.controller import is_lost
from jobs.driver.fit import build_measuring, cause
from jobs.events import Emit, appending, first_line
from jobs.runs.folders import RunFolder
from jobs.workers.measuring import Findings, Measurement, measure_here
from jobs.workers.sink import start_sink
from loray.bases.registry import BaseModel
from loray.errors import EvaluationError, SpecError
from loray.fetching import fetched
from loray.planning.memory import num_shards
from loray.recipes.load import Recipe
from loray.recipes.resolve import resolve
from loray.settings import Settings
from loray.spec import Evaluation, Frozen, PerplexitySpec, Subject, TrainSpec
from loray.telemetry import get_logger
from loray.train.evaluation.documents import Documents, HeldOutPrompt, read_documents, stage_tokens
from loray_kernels.memory import is_out_of_memory

log = get_logger(__name__)

_EVALUATIONS = "evaluations.json"
_MEASURE_LATER = (
    "to measure it, publish it again with `--publish-checkpoint` and a recipe whose workers share the base "
    "(`parallel.strategy: fsdp2`, or more `num_workers`), or with shorter context lengths"
)


class MeasuredCheckpoint(NamedTuple):
    """`problem`: why there are no evaluations although the recipe asks for them, and how to get them."""

    evaluations: tuple[Evaluation, ...]
    problem: str | None = None


def check_measurable(recipe: Recipe, base: BaseModel, settings: Settings) -> int:
    """Counts the tokens that go through models for what the recipe asks to be measured after training. Raises SpecError
    or DataError where it could not be.

    Also refuses an alias that the gate could never grant to this run.
    """
    spec = recipe.spec
    perplexity, documents, wanted = spec.evaluation.perplexity, None, spec.evaluation
    if perplexity is not None:
        documents = _documents(recipe, base, settings)
        wanted = wanted.model_copy(update={"perplexity": _with_contexts(perplexity, spec, base)})
    elif spec.rope_scaling is not None and spec.publish.aliases and spec.publish.no_gate is None:
        raise SpecError(
            "an alias of an adapter with a longer context is granted by its perplexity: set evaluation.perplexity, "
            "leave out publish.aliases, or say in publish.no_gate why it needs none"
        )
    for task in spec.evaluation.retrieval:
        from loray.train.evaluation.retrieval import make_prompt  # imports PEFT and models

        make_prompt(task.task, AutoTokenizer.from_pretrained(base.path), min(task.context_lengths), 0.0)
    models: list[Subject] = ["base", "base_scaled", "adapter"] if spec.rope_scaling else ["base", "adapter"]
    return sum(stage_tokens(models, wanted, documents).values())


def measure_checkpoint(
    checkpoint: Checkpoint,
    step: int,
    recipe: Recipe,
    base: BaseModel,
    run: RunFolder,
    settings: Settings,
    events: Path,
    prompts: tuple[HeldOutPrompt, ...],
) -> MeasuredCheckpoint:
    """Measures what `recipe.spec.evaluation` asks for, on workers of `recipe.spec`, and lets base and adapter answer
    `prompts`. The file `events`, the run's, is told how far it is.

    The results are saved in the run's folder. Publishing the same checkpoint again reads them from there, so it
    publishes the same adapter. A measurement that was interrupted goes on with the windows that its machine has kept.
    """
    spec, wanted, documents, emit = recipe.spec, recipe.spec.evaluation, None, appending(events)
    if num_shards(spec) > 1:
        prompts = ()  # no worker has a model whole
    is_measured = wanted.perplexity is not None or bool(wanted.retrieval)
    if not is_measured and not prompts:
        return MeasuredCheckpoint(())
    if wanted.perplexity is not None:
        wanted = wanted.model_copy(update={"perplexity": _with_contexts(wanted.perplexity, spec, base)})
        documents = _documents(recipe, base, settings)
    rope = resolve(spec, base.config).rope
    facts = base.fingerprint, settings.home, settings.log_level
    measurement = Measurement(spec, wanted, checkpoint, documents, rope, *facts, prompts)
    if not is_measured:
        _show_samples(measurement, run, settings, events)
        return MeasuredCheckpoint(())
    asked = {
        "step": step,
        "evaluation": wanted.model_dump(mode="json", include={"perplexity", "retrieval"}),
        "data_sha256": documents and documents.sha256,
    }
    saved = run.read_model(_Saved, _EVALUATIONS)
    if saved is None or saved.asked != asked:
        tasks = [*(["perplexity"] if documents else []), *(f"{task.task} retrieval" for task in wanted.retrieval)]
        emit({"event": "measure", "tasks": tasks})
        try:
            found = _measure(measurement, run, settings, events)
        except RuntimeError as e:
            if not is_out_of_memory(e):
                raise
            return MeasuredCheckpoint((), f"not measured, out of memory: {first_line(e)}; {_MEASURE_LATER}")
        if found.samples:
            emit({"event": "samples", "samples": found.samples})
        saved = _Saved(asked=asked, evaluations=found.evaluations)
        run.write_model(_EVALUATIONS, saved)
    return MeasuredCheckpoint(saved.evaluations)


def _show_samples(measurement: Measurement, run: RunFolder, settings: Settings, events: Path) -> None:
    """Tells what the models answer, or why they do not: no run fails for that. On a cluster that is this machine alone,
    without GPUs, this process asks them: workers would take longer to start.
    """
    emit: Emit = appending(events)
    is_alone = not ray.is_initialized() or sum(node["Alive"] for node in ray.nodes()) == 1
    try:
        if is_alone and not measurement.spec.use_gpu:
            found = measure_here(measurement, emit)
        else:
            found = _measure(measurement, run, settings, events)
        if found.samples:
            emit({"event": "samples", "samples": found.samples})
    except Exception as e:  # whatever a model raises
        log.debug("held-out prompts are not answered", exc_info=True)
        emit({"event": "warning", "message": f"no held-out prompt is answered: {first_line(e)}"})


class _Saved(Frozen):
    """The run's `evaluations.json`: what was asked for, and the results."""

    asked: dict[str, Any]
    evaluations: tuple[Evaluation, ...]


def _measure(measurement: Measurement, run: RunFolder, settings: Settings, events: Path) -> Findings:
    """Raises the worker's error: LorayError, or another one."""
    if not ray.is_initialized():
        return measure_here(measurement, appending(events))
    sink = start_sink(events)
    try:
        found: Findings = build_measuring(measurement._replace(events=sink), run, settings).fit().return_value
    except TrainingFailedError as e:
        error = cause(e)
        raise EvaluationError(f"measuring failed: {first_line(error)}") if is_lost(error) else error from e
    finally:
        ray.kill(sink)
    return found


def _documents(recipe: Recipe, base: BaseModel, settings: Settings) -> Documents:
    sources = recipe.data()
    if not sources.eval_sources:
        raise SpecError("evaluation.perplexity is measured on the documents of data.eval: give that file")
    paths = [source.path for source in sources.eval_sources]
    tokenizer, columns = AutoTokenizer.from_pretrained(base.path), sources.columns
    with fetched(paths, settings, columns) as copies:
        return read_documents(paths, tokenizer, columns=columns, fetched=copies)


def _with_contexts(perplexity: PerplexitySpec, spec: TrainSpec, base: BaseModel) -> PerplexitySpec:
    """Fills in the context lengths that the gate compares, if the recipe names none."""
    if perplexity.context_lengths:
        return perplexity
    resolved = resolve(spec, base.config)
    lengths = tuple(dict.fromkeys((resolved.original_context, resolved.context)))
    return perplexity.model_copy(update={"context_lengths": lengths})
