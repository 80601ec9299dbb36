"""Defaults of a recipe's fields, and their reasons: the one place of both.

`complete` fills a recipe in, `loray recipes show` prints the reasons, and the reference has them as a table. A
field without a value here has the specification's own default (`loray.spec.TrainSpec`), or none.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, get_args

from loray.bases.config import ModelConfig
from loray.methods import METHODS
from loray.spec import OBJECTIVES, BaseSize, ColumnNames, Default, Method, ObjectiveType

BASE_SIZES: tuple[BaseSize, ...] = get_args(BaseSize)
FIRST_METHOD: Method = "lora"
FIRST_OBJECTIVE: ObjectiveType = "sft"

LARGE_BASE = 10**9  # parameters from which a base is large
# Of the fields of a group a recipe gives one: with it, the others have no default.
GROUPS = (
    ("batch.rows", "batch.tokens"),
    ("optimizer.warmup_steps", "optimizer.warmup_ratio"),
    ("max_steps", "num_epochs"),
)


_EVERY_METHOD: Mapping[str, Default] = {
    "name": Default("what requests call it; each publication is its next version"),
    "base": Default("loray makes it from a package, and it trains on two cores"),
    "objective.type": Default(
        "learns completions; dpo, orpo, simpo which of two is better, kto which are good", FIRST_OBJECTIVE
    ),
    "adapter.method": Default("the first to try: it has the fewest surprises", FIRST_METHOD),
    "adapter.dropout": Default("adapters have few parameters; raise it where the held-out loss rises while loss falls"),
    "adapter.target_modules": Default("all linear layers: attention alone learns less (Schulman et al., 2025)"),
    "adapter.train_embeddings": Default("without them long contexts do not recover (LongLoRA's paper)"),
    "adapter.train_norms": Default("likewise, for almost no parameters"),
    "attention.type": Default("while training; s2 costs less on long rows. Evaluated and served dense"),
    "attention.group_size": Default("of s2: a quarter of the context; smaller groups raise the loss"),
    "quantization": Default("where the base is too large for the device; a step takes longer"),
    "quantization.bnb_4bit_quant_type": Default("QLoRA's: levels for normally distributed weights"),
    "quantization.bnb_4bit_use_double_quant": Default("a tenth less memory for almost nothing"),
    "rope_scaling": Default("only for rows longer than the base's window"),
    "rope_scaling.type": Default("LongLoRA's position interpolation"),
    "rope_scaling.factor": Default("trained for so many times the original context"),
    "rope_scaling.original_context": Default("the base's own window"),
    "init_adapter": Default("a published adapter to go on from, as NAME@VERSION; its RoPE is taken over"),
    "data.train": Default("files, folders or globs of chats, prompts with completions, or texts"),
    "data.eval": Default("without it, a part of `train` is held out"),
    "data.eval_fraction": Default("enough rows to tell checkpoints apart, few to lose"),
    "data.format": Default("the columns say it, and rows go through the base's chat template; raw: as they stand"),
    "data.columns": Default("the names that rows have; or yours, as {prompt: question, completion: answer}"),
    **{f"data.columns.{name}": Default(f"what your files call `{name}`") for name in ColumnNames.model_fields},
    "data.system": Default("rows have their own, or the template's; requests have to bring the same"),
    "data.max_length": Default("of one row, in tokens: LongLoRA's context, else 1024 or the base's shorter window"),
    "data.max_rows": Default("all of them; the first ones of every source"),
    "batch.rows": Default("of a worker at once; halve it and double `accumulation` where memory is short", 8),
    "batch.tokens": Default("instead of `rows`: a budget, padding included, where rows differ much in length"),
    "batch.accumulation": Default("micro-batches of a step: more rows in the same memory; auto: as few as fit it"),
    "batch.order": Default("shuffled; length_grouped pads less, packed not at all, concat joins texts"),
    "optimizer.learning_rate": Default("ten times that of training all weights, whatever the rank", 1e-3, 2e-4),
    "optimizer.weight_decay": Default("an adapter is small: early stopping on held-out loss regularises better"),
    "optimizer.beta1": Default("Adam's"),
    "optimizer.beta2": Default("Adam's"),
    "optimizer.eps": Default("Adam's"),
    "optimizer.schedule": Default("ends at rate 0, so that the last checkpoint is a good one"),
    "optimizer.warmup_steps": Default("instead of warmup_ratio, where the length of a run is known"),
    "optimizer.warmup_ratio": Default("Adam's moments are noise in the first steps", 0.05),
    "optimizer.max_grad_norm": Default("one bad batch moves the weights no further than another"),
    "optimizer.loraplus_lr_ratio": Default("LoRA+: B learns at that many times the rate of A; 16 in its paper"),
    "optimizer.vera_d_lr_ratio": Default("d and b learn at one rate, as in the paper"),
    "max_steps": Default("instead of num_epochs"),
    "num_epochs": Default("one pass; a few hundred rows may need three", 1),
    "evaluation.interval_steps": Default("before and after training; with one, the best checkpoint is published"),
    "evaluation.max_rows": Default("held-out rows that a measurement takes, so that it stays short"),
    "evaluation.keep_best": Default("the lowest held-out loss, not the last step, is what to serve"),
    "evaluation.perplexity": Default("measured before publishing, for the gate of LongLoRA's aliases"),
    "evaluation.perplexity.context_lengths": Default("the context that was extended, and the adapter's own"),
    "evaluation.perplexity.stride": Default("the paper's: tokens from one window to the next"),
    "evaluation.perplexity.max_windows": Default("of each length, evenly spread, so that it ends"),
    "evaluation.retrieval": Default("likewise: whether a key is found in long text"),
    "early_stopping": Default("ends a run whose held-out loss has stopped falling; the best checkpoint is published"),
    "early_stopping.patience": Default("evaluations in a row without a better loss; one alone may be noise"),
    "early_stopping.min_delta": Default("by how much a loss must be lower than the best to count"),
    "checkpoint.interval_steps": Default("at evaluations and at the end"),
    "checkpoint.interval_minutes": Default("what a lost worker costs at most; writing does not stop the steps"),
    "checkpoint.keep": Default("the last and the best"),
    "tracking": Default("files in the run's folder; mlflow and wandb are extras, and reached by their own variables"),
    "publish.aliases": Default("look at the answers first, then `loray adapters promote`"),
    "publish.dtype": Default("the base checkpoint's: what a model computes in 16 bits needs no more in its adapter"),
    "publish.no_gate": Default("the gate holds"),
    "publish.licence": Default("of the adapter, where it has one"),
    "publish.description": Default("shown by `loray adapters show`"),
    "metadata": Default("strings of yours by name; nothing reads them"),
    "max_nonfinite_steps": Default("so many skipped steps are no accident"),
    "gradient_checkpointing": Default("a third slower; `loray plan` says where memory needs it"),
    "dtype": Default("of weights and activations, by the workers' device; masters and moments are float32"),
    "num_workers": Default("one process, or one GPU, for each"),
    "min_workers": Default("a run waits for all its workers, or goes on with fewer: as many as this"),
    "parallel.sequence": Default("workers that share a row; for rows that do not fit on one"),
    "parallel.strategy": Default("an adapter's gradients and moments are small enough to be on each worker"),
    "use_gpu": Default("one GPU a worker where it is true; auto: where there are as many GPUs"),
    "seed": Default("of initial values, order and dropout: a run can be repeated"),
    "deterministic": Default("a GPU's fastest backward passes add in any order; true: a run repeats bit for bit"),
}

_CONTINUED_RATE = "as for a new adapter: at half of it a second stage learnt a quarter less in as many steps"


def size_of(model: ModelConfig | None) -> BaseSize:
    """Call a base large from a billion weights on, and where the base is not known: this machine rarely has a large
    one.
    """
    return "small" if model is not None and model.num_matrix_elements < LARGE_BASE else "large"


def defaults_of(
    method: Method, objective: ObjectiveType = FIRST_OBJECTIVE, *, is_continued: bool = False
) -> dict[str, Default]:
    """List the defaults of all fields of a recipe of `method` with that objective, by field.

    `is_continued`: it has an `init_adapter`, which changes a reason and no value.
    """
    found = {**_EVERY_METHOD, **METHODS[method].defaults, **OBJECTIVES[objective].defaults}
    if OBJECTIVES[objective].compares_answers:
        found["optimizer.learning_rate"] = METHODS[method].pair_rate
    elif is_continued:
        found["optimizer.learning_rate"] = found["optimizer.learning_rate"]._replace(why=_CONTINUED_RATE)
    return found


def complete(fields: Mapping[str, Any], size: BaseSize) -> dict[str, Any]:
    """Copy a recipe's `fields`, and give those that it leaves out their defaults.

    A field that is null is given. What is not as a recipe should be is left for its parser to refuse. `batch: auto`, or
    `accumulation: auto` without rows, stands for as many rows in a step as by default, cut to fit.
    """
    filled = copy.deepcopy(dict(fields))
    batch = {"accumulation": "auto"} if filled.get("batch") == "auto" else filled.get("batch")
    is_cut_to_fit = False
    if isinstance(batch, dict) and batch.get("accumulation") == "auto" and not {"rows", "tokens"} & {*batch}:
        is_cut_to_fit = True
        del batch["accumulation"]
        fields, filled["batch"] = {**fields, "batch": dict(batch)}, batch
    method, objective = named_method(fields), _kind(fields, "objective", "type", FIRST_OBJECTIVE)
    known = next((name for name in OBJECTIVES if name == objective), None)
    defaults = {} if method is None or known is None else defaults_of(method, known)
    for path, default in defaults.items():
        value = default.on(size)
        if value is not None and not any(_has(fields, other) for other in alternatives(path)):
            _put(filled, path, value)
    if is_cut_to_fit:
        filled["batch"] = cut_to_fit(filled["batch"])
    return filled


def cut_to_fit(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Leave the micro-batches of a complete section `batch` to the plan, with as many rows in a step."""
    rows, accumulation = batch.get("rows"), batch.get("accumulation", 1)
    if isinstance(rows, int) and isinstance(accumulation, int):
        return {**batch, "rows": rows * accumulation, "accumulation": "auto"}
    return {**batch, "accumulation": "auto"}


def named_method(fields: Mapping[str, Any]) -> Method | None:
    """Find the method that the recipe names, the first one where it names none; None where there is no such method."""
    named = _kind(fields, "adapter", "method", FIRST_METHOD)
    return next((method.name for method in METHODS.values() if method.name == named), None)


def _kind(fields: Mapping[str, Any], section: str, name: str, first: str) -> object:
    given = fields.get(section, {})
    return given.get(name, first) if isinstance(given, Mapping) else None


def alternatives(path: str) -> tuple[str, ...]:
    """List the fields with which this one has no default, itself included."""
    if path == "batch.accumulation":  # who says how large a micro-batch is, says how many there are
        return (path, "batch.rows", "batch.tokens")
    return next((group for group in GROUPS if path in group), (path,))


def _has(fields: Mapping[str, Any], path: str) -> bool:
    """True where the field is given, or something that is no section in its place."""
    at: Any = fields
    for name in path.split("."):
        if not isinstance(at, Mapping):
            return True
        if name not in at:
            return False
        at = at[name]
    return True


def _put(fields: dict[str, Any], path: str, value: object) -> None:
    *sections, name = path.split(".")
    for section in sections:
        fields = fields.setdefault(section, {})
    fields[name] = value
