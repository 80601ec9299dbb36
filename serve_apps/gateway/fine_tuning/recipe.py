"""The recipe of a fine-tuning request, and the request's fields of a recipe."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from loray.bases.presets import shapes_in
from loray.catalog import Catalog
from loray.catalog.entries import check_name
from loray.errors import NotFoundError, RequestError, SpecError
from loray.policy.auth import check_model
from loray.recipes.defaults import complete, defaults_of
from loray.recipes.fields import merge
from loray.recipes.load import size_of_base
from loray.recipes.sources import UPLOADED
from loray.schemas.openai.fine_tuning import RECIPE, DpoHyperparameters, FineTuningRequest, Reinforcement
from loray.spec import RlSpec, TrainSpec
from loray.spec.fields import mistakes

_OF_REQUEST = {  # fields of a recipe that the request has under other names
    "name": "suffix",
    "base": "model",
    "init_adapter": "model",
    "seed": "seed",
    "metadata": "metadata",
    "data.train": "training_file",
    "data.eval": "validation_file",
}
_GROUP_SIZE: int = RlSpec.model_fields["group_size"].default  # answers to a prompt, of compute_multiplier 1
_FROM_PARENT = {"base", "adapter", "quantization"}  # what an adapter's recipe says and a run that goes on needs


def recipe_of(asked: FineTuningRequest, job: str, catalog: Catalog, home: Path) -> TrainSpec:
    """The recipe that `asked` stands for, of the caller whose catalog this is. `job`: what the job is called, and the
    adapter where the request gives no name. Raises RequestError that names the field.
    """
    fields = _begun(asked.model, catalog)
    if asked.suffix is not None:
        try:
            check_name(asked.suffix, "suffix")
        except SpecError as e:
            raise RequestError(str(e), "suffix") from e
    hyper = asked.chosen
    fields |= {
        "name": asked.suffix or f"ft-{fields['base']}-{job}",
        "data": {"train": UPLOADED + asked.training_file},
        "batch": "auto" if hyper.batch_size == "auto" else {"rows": hyper.batch_size, "accumulation": "auto"},
        "seed": secrets.randbelow(1 << 31) if asked.seed is None else asked.seed,
        "metadata": asked.metadata or None,
    }
    if asked.validation_file is not None:
        fields["data"]["eval"] = UPLOADED + asked.validation_file
    if hyper.n_epochs != "auto":
        fields["num_epochs"] = hyper.n_epochs
    if asked.method is not None and asked.method.type == "dpo":
        fields["objective"] = {"type": "dpo"}
        if isinstance(hyper, DpoHyperparameters) and hyper.beta != "auto":
            fields["objective"]["beta"] = hyper.beta
    if asked.method is not None and asked.method.type == "reinforcement":
        assert asked.method.reinforcement is not None
        del fields["batch"]  # bounds a pass alone
        fields |= _rewarded(asked.method.reinforcement)
    merge(fields, _further(asked.metadata.get(RECIPE)))
    fields = complete(fields, size_of_base(fields["base"], shapes_in(home)))
    rate = fields.get("optimizer", {}).get("learning_rate") if isinstance(fields.get("optimizer"), dict) else None
    if hyper.learning_rate_multiplier != "auto" and isinstance(rate, int | float):
        fields["optimizer"]["learning_rate"] = rate * hyper.learning_rate_multiplier
    try:
        return TrainSpec.model_validate(fields)
    except ValidationError as e:
        wrong = mistakes(e)
        paths = [".".join(map(str, error["loc"])) for error in wrong]
        told = "; ".join(
            f"{path}: {error['msg']}" if path else error["msg"] for path, error in zip(paths, wrong, strict=True)
        )
        param = next((theirs for ours, theirs in _OF_REQUEST.items() if paths[0] == ours), f"metadata.{RECIPE}")
        raise RequestError(told, param) from e


def _rewarded(method: Reinforcement) -> dict[str, Any]:
    """The sections of a recipe that learns from a grader, with `rl`'s own values: `grpo` divides rewards by their
    deviation, which makes much of the small differences between similar texts.
    """
    hyper = method.hyperparameters
    objective: dict[str, Any] = {"type": "rl", "reward": {"grader": method.grader.model_dump(exclude_none=True)}}
    evaluation = {}
    if hyper.batch_size != "auto":
        objective["prompts_per_step"] = hyper.batch_size
    if hyper.compute_multiplier != "auto":
        objective["group_size"] = round(_GROUP_SIZE * hyper.compute_multiplier)
    if hyper.eval_interval != "auto":
        evaluation["interval_steps"] = hyper.eval_interval
    if hyper.eval_samples != "auto":
        evaluation["max_rows"] = hyper.eval_samples
    return {"objective": objective, "evaluation": evaluation}


def _begun(model: str, catalog: Catalog) -> dict[str, Any]:
    """The base, and the adapter from which the run goes on where `model` is one, with the fields that it then needs."""
    check_model(catalog.principal, model)
    bases = catalog.bases.fingerprints()
    if model in bases:
        return {"base": model}
    try:
        ref = catalog.adapters.resolve(model)
        manifest = catalog.adapters.version(ref.name, ref.version).manifest
    except NotFoundError as e:
        known = ", ".join(sorted(bases)) or "none yet"
        raise RequestError(f"{e}; train from a base ({known}) or go on from an adapter, NAME@VERSION", "model") from e
    if manifest.recipe is not None:
        fields = manifest.recipe.model_dump(mode="json", include=_FROM_PARENT)
    else:
        of = {fingerprint: name for name, fingerprint in bases.items()}
        modules = list(manifest.target_modules)
        adapter = {"method": manifest.method, "rank": manifest.rank, "target_modules": modules}
        fields = {"base": of.get(ref.base_fingerprint, manifest.base), "adapter": adapter}
    return fields | {"init_adapter": ref.label}


def _further(given: str | None) -> dict[str, Any]:
    """The fields of `metadata["loray.recipe"]`. Raises RequestError."""
    if given is None:
        return {}
    param = f"metadata.{RECIPE}"
    try:
        fields = json.loads(given)
    except (ValueError, RecursionError) as e:
        raise RequestError(f"{param} is not valid JSON: {e}", param) from e
    if not isinstance(fields, dict):
        raise RequestError(f"{param} must be an object with fields of a recipe", param)
    data = fields.get("data", {})
    if not isinstance(data, dict):
        raise RequestError(f"{param}: data must be an object, not {type(data).__name__}", param)
    for path in sorted({*fields, *(f"data.{name}" for name in data)} & _OF_REQUEST.keys()):
        raise RequestError(f"{param} may not set {path}: the request has it as {_OF_REQUEST[path]}", param)
    return fields


# -- and back ---------------------------------------------------------------------------------------------------------


def file_of(source: str) -> str:
    """The id of an uploaded file; of data that is elsewhere, its path."""
    return source.removeprefix(UPLOADED)


def method_of(recipe: TrainSpec, home: Path) -> dict[str, Any]:
    """The method of a request that the recipe would stand for, with its hyperparameters; by the name of its objective
    where a request has none for it.
    """
    objective, hyper = recipe.objective, _hyperparameters_of(recipe, home)
    if isinstance(objective, RlSpec) and objective.reward is not None and objective.reward.grader is not None:
        grader = objective.reward.grader.model_dump(exclude_none=True)
        return {"type": "reinforcement", "reinforcement": {"grader": grader, "hyperparameters": hyper}}
    name = "supervised" if objective.type == "sft" else objective.type
    return {"type": name, name: {"hyperparameters": hyper}}


def _hyperparameters_of(recipe: TrainSpec, home: Path) -> dict[str, Any]:
    """What the recipe has for the hyperparameters that a request names; `auto` where it has no such value."""
    size, objective, evaluation = size_of_base(recipe.base, shapes_in(home)), recipe.objective, recipe.evaluation
    default = defaults_of(recipe.adapter.method, objective.type)["optimizer.learning_rate"].on(size)
    rate, rows, accumulation = recipe.optimizer.learning_rate, recipe.batch.rows, recipe.batch.accumulation
    epochs = recipe.num_epochs
    found: dict[str, Any] = {
        "n_epochs": "auto" if epochs is None else int(epochs) if epochs.is_integer() else epochs,
        "batch_size": "auto" if rows is None else rows * (1 if accumulation == "auto" else accumulation),
        "learning_rate_multiplier": rate / default if isinstance(default, float) else "auto",
    }
    if objective.type == "dpo":
        found["beta"] = objective.beta
    if isinstance(objective, RlSpec):
        found |= {
            "batch_size": objective.prompts_per_step,
            "compute_multiplier": objective.group_size / _GROUP_SIZE,
            "eval_interval": evaluation.interval_steps or "auto",
            "eval_samples": evaluation.max_rows,
            "reasoning_effort": "default",
        }
    return found
