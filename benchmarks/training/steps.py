"""Training steps of SmolLM2 on this machine, with workers in separate processes as in `loray train`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Literal

from benchmarks.world import on_this_machine, run_modules
from loray.bases.registry import BaseModel
from loray.recommend import recipe_of
from loray.spec import ATTENTION_MODULES, AdapterSpec, LongLoraSpec, LoraSpec, ParallelSpec, RopeScaling, TrainSpec


@dataclass(frozen=True, slots=True)
class RowStep:
    """A step over one row of `tokens`.

    dense   with the fastest dense attention instead of the recipe's
    lean    trains LoRA alone and measures the size of all tensors in a step. The embedding's gradients, the same on
            every worker, would hide what a sequence group saves.
    """

    tokens: int
    adapter: str
    checkpointing: bool
    sequence: int = 1
    strategy: Literal["ddp", "zero2", "zero3", "fsdp2"] = "ddp"
    dense: bool = False
    lean: bool = False

    @property
    def label(self) -> str:
        parallel = f" P={self.sequence}" if self.sequence > 1 else ""
        return f"{self.adapter} {self.tokens}{' checkpointing' if self.checkpointing else ''}{parallel}"

    @property
    def recipe(self) -> TrainSpec:
        """LongLoRA extends a context of half as many tokens; G is a quarter of the row."""
        adapter: AdapterSpec = LoraSpec(rank=8, alpha=16, target_modules=ATTENTION_MODULES)
        scaling = None
        if self.adapter == "longlora":
            adapter = LongLoraSpec(rank=8, alpha=16, train_embeddings=not self.lean, train_norms=not self.lean)
            scaling = RopeScaling(factor=2, original_context=self.tokens // 2)
        parallel = ParallelSpec(sequence=self.sequence, strategy=self.strategy)
        recipe = recipe_of(adapter, self.tokens, rope_scaling=scaling, checkpointing=self.checkpointing)
        recipe = recipe.model_copy(update={"num_workers": self.sequence, "parallel": parallel})
        return on_this_machine(recipe)


@dataclass(frozen=True, slots=True)
class Measured:
    """The largest of all workers' figures.

    peak_bytes         resident set above what interpreter and libraries hold
    activation_bytes   size of all tensors in a step, above that before it; 0 where it was not measured
    halo_bytes         sent in a step
    step_s             seconds of the worker's fastest step
    """

    peak_bytes: int
    activation_bytes: int
    halo_bytes: int
    step_s: float


def measure(case: RowStep, base: BaseModel, num_steps: int, *, num_threads: int | None = None) -> Measured:
    options = ["--dense"] * case.dense + ["--tensors"] * case.lean
    return measure_recipe(case.recipe, base, num_steps, options, num_threads=num_threads)


def measure_recipe(
    recipe: TrainSpec, base: BaseModel, num_steps: int, options: Sequence[str] = (), *, num_threads: int | None = None
) -> Measured:
    """Measure steps of a recipe on `base`; `options` are those of `benchmarks.training.workers.step`."""
    home, on_base = str(base.path.parent.parent), recipe.model_copy(update={"base": base.name})
    command = ["benchmarks.training.workers.step", home, on_base.model_dump_json(), str(num_steps), *options]
    with tempfile.TemporaryDirectory(prefix="steps-") as folder:
        commands = [command]
        if recipe.num_workers > 1:
            where = ["--rendezvous", f"{folder}/rendezvous"]
            commands = [[*command, *where, "--rank", str(rank)] for rank in range(recipe.num_workers)]
        found = [Measured(**figures) for figures in run_modules(commands, num_threads)]
    return Measured(*(max(values) for values in zip(*map(astuple, found), strict=True)))
