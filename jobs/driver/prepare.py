"""From a recipe to everything a run needs, checked before any worker starts."""

from __future__ import annotations

from typing import NamedTuple

from transformers import AutoTokenizer

from jobs.bases import ensure_base
from jobs.driver.data import fetched
from jobs.driver.evaluation import check_measurable
from loray.bases.registry import BaseModel, list_bases
from loray.errors import SpecError
from loray.recipes.load import Recipe
from loray.recipes.resolve import context_length, rope_parameters
from loray.settings import Settings
from loray.spec import TrainSpec
from loray.train.data.batches import check_budget
from loray.train.data.dataset import Dataset, load_data

_MAX_LENGTH = 1024


class Prepared(NamedTuple):
    """`spec` is the recipe with nothing left open that decides the result: what is published reproduces the run."""

    spec: TrainSpec
    base: BaseModel
    data: Dataset


def prepare(recipe: Recipe, settings: Settings) -> Prepared:
    """Check the recipe against this machine, and read the data. Raises LorayError with what to change."""
    spec = recipe.spec
    if spec.name in {base.name for base in list_bases(settings.home)}:
        raise SpecError(f"name {spec.name!r} is a base model's; adapters and bases share their names: choose another")
    base = ensure_base(settings.home, spec.base)
    max_length = row_length(spec, base)
    check_measurable(recipe, base, settings)
    sources = recipe.data()
    with fetched(sources, settings) as copies:
        data = load_data(
            sources,
            AutoTokenizer.from_pretrained(base.path),
            max_length=max_length,
            max_eval_rows=spec.evaluation.max_rows,
            seed=spec.seed,
            whole_windows=spec.adapter.long_context is not None,
            fetched=copies,
        )
    check_budget(max(data.train.lengths.tolist(), default=0), spec.batch)
    resolved = spec.data.model_copy(update={"max_length": max_length})
    return Prepared(spec.model_copy(update={"data": resolved}), base, data)


def row_length(spec: TrainSpec, base: BaseModel) -> int:
    """Tokens of the longest row: `data.max_length`. Where it is not given, a long-context adapter gets rows of its
    whole context, and a small base rows that fit into its window.

    Raises SpecError where rows would be longer than the context, UnsupportedError where RoPE cannot be scaled.
    """
    context = context_length(base, spec)
    long_context = spec.adapter.long_context
    if long_context is not None:
        rope_parameters(base, long_context)
    if spec.data.max_length is None:
        return context if long_context is not None else min(_MAX_LENGTH, context)
    if spec.data.max_length > context:
        raise SpecError(
            f"data.max_length is {spec.data.max_length}, but the adapter's context is {context} tokens; lower it"
            + ("" if long_context else f", or extend {base.name} with method longlora")
        )
    return spec.data.max_length
