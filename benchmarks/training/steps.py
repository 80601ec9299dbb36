"""Training steps of SmolLM2 on this machine: workers in processes of their own, as with `loray train`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

from benchmarks import processes as workers
from loray.bases.registry import BaseModel
from loray.spec import TrainSpec


@dataclass(frozen=True, slots=True)
class Case:
    """One row of `tokens`; `dense`: the recipe, but with the fastest dense attention. `lean`: LoRA alone is trained,
    and what tensors take in a step is watched: an embedding's gradients, the same on every worker, would hide it.
    """

    tokens: int
    adapter: str
    checkpointing: bool
    sequence: int = 1
    strategy: str = "ddp"
    dense: bool = False
    lean: bool = False

    @property
    def label(self) -> str:
        parallel = f" P={self.sequence}" if self.sequence > 1 else ""
        return f"{self.adapter} {self.tokens}{' checkpointing' if self.checkpointing else ''}{parallel}"

    @property
    def recipe(self) -> TrainSpec:
        """LongLoRA stretches a window of half as much; G is a quarter of the row."""
        adapter: dict[str, Any] = {"method": self.adapter, "rank": 8, "alpha": 16}
        if self.adapter == "longlora":
            adapter["long_context"] = {
                "original_context": self.tokens // 2,
                "rope_scaling": {"factor": 2},
                "train_embeddings": not self.lean,
                "train_norms": not self.lean,
            }
        return TrainSpec.model_validate(
            {
                "name": "bench",
                "adapter": adapter,
                "data": {"train": "unused", "max_length": self.tokens},
                "batch": {"rows": 1},
                "optimizer": {"learning_rate": 1e-4},
                "max_steps": 1,
                "gradient_checkpointing": self.checkpointing,
                "num_workers": self.sequence,
                "parallel": {"sequence": self.sequence, "strategy": self.strategy},
            }
        )


@dataclass(frozen=True, slots=True)
class Measured:
    """The most that any worker had: resident bytes above the interpreter's, bytes of tensors that came and went in a
    step (0 where that was not watched), bytes of halos sent in a step, seconds of its quickest step.
    """

    peak_bytes: int
    activation_bytes: int
    halo_bytes: int
    step_s: float


def measure(case: Case, base: BaseModel, num_steps: int, *, num_threads: int | None = None) -> Measured:
    options = ["--dense"] * case.dense + ["--tensors"] * case.lean
    return measure_recipe(case.recipe, base, num_steps, options, num_threads=num_threads)


def measure_recipe(
    recipe: TrainSpec, base: BaseModel, num_steps: int, options: Sequence[str] = (), *, num_threads: int | None = None
) -> Measured:
    """A recipe on `base`; `options` are `step_worker`'s."""
    home, on_base = str(base.path.parent.parent), recipe.model_copy(update={"base": base.name})
    command = ["benchmarks.training.workers.step", home, on_base.model_dump_json(), str(num_steps), *options]
    with tempfile.TemporaryDirectory(prefix="steps-") as folder:
        commands = [command]
        if recipe.num_workers > 1:
            where = ["--rendezvous", f"{folder}/rendezvous"]
            commands = [[*command, *where, "--rank", str(rank)] for rank in range(recipe.num_workers)]
        found = [Measured(**figures) for figures in workers.run(commands, num_threads)]
    return Measured(*(max(values) for values in zip(*map(astuple, found), strict=True)))
