"""From a recipe to everything a run needs, checked before any worker starts."""

from __future__ import annotations

from typing import NamedTuple

from transformers import AutoTokenizer

from jobs.driver.data import fetched
from jobs.driver.evaluation import check_measurable
from loray.bases.registry import BaseModel, ensure_base, list_bases
from loray.errors import SpecError
from loray.recipes.load import Recipe
from loray.recipes.resolve import resolve
from loray.settings import Settings
from loray.spec import TrainSpec
from loray.train.data.batches import check_budget
from loray.train.data.dataset import Dataset, load_data


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
    check_budget(max(data.train.lengths.tolist(), default=0), spec.batch)
    resolved = spec.data.model_copy(update={"max_length": max_length})
    return Prepared(spec.model_copy(update={"data": resolved}), base, data)
