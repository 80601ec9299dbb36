"""Prepares a run: checks the recipe, finds the base, and tokenises the data, before any worker starts."""

from __future__ import annotations

from typing import NamedTuple

from transformers import AutoTokenizer

from jobs.driver.data import fetched
from jobs.driver.evaluation import check_measurable
from loray.bases.registry import BaseModel, ensure_base, list_bases
from loray.errors import SpecError
from loray.recipes.load import Recipe
from loray.recipes.resolve import check_token_budget, resolve
from loray.settings import Settings
from loray.spec import TrainSpec
from loray.train.data.dataset import Dataset, load_data


class Prepared(NamedTuple):
    """`spec` is the recipe with every default that affects the result filled in, so that it reproduces the run."""

    spec: TrainSpec
    base: BaseModel
    data: Dataset


def prepare(recipe: Recipe, settings: Settings) -> Prepared:
    """Checks the recipe against this machine and reads the data. Raises LorayError that says what to change."""
    spec = recipe.spec
    if spec.name in {base.name for base in list_bases(settings.home)}:
        raise SpecError(f"name {spec.name!r} is a base model's; adapters and bases share their names: choose another")
    base = ensure_base(settings.home, spec.base)
    max_length = resolve(spec, base.config).row_length
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
    check_token_budget(spec.batch, max(data.train.lengths.tolist(), default=0))
    resolved = spec.data.model_copy(update={"max_length": max_length})
    return Prepared(spec.model_copy(update={"data": resolved}), base, data)
