"""What is trained: the methods, the modules that they are on, the recipe that they share, and the learning rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from benchmarks.world import on_this_machine
from loray.spec import ATTENTION_MODULES, LINEAR_MODULES, AdapterSpec, LoraSpec, TrainSpec, VeraSpec
from loray.spec.methods import Ia3Spec

System = Literal["loray", "peft"]
MODULES: dict[str, tuple[str, ...]] = {
    "qv": ("q_proj", "v_proj"),
    "attention": ATTENTION_MODULES,
    "linear": LINEAR_MODULES,
}

# Each method's adapter, and the rate around which its sweep begins; neighbouring rates are `FACTOR` apart.
METHODS: dict[str, tuple[AdapterSpec, float]] = {
    "LoRA r16": (LoraSpec(rank=16, alpha=32), 1e-3),
    "rsLoRA r16": (LoraSpec(rank=16, alpha=32, use_rslora=True), 1e-3),
    "VeRA r256": (VeraSpec(rank=256), 1e-1),
    "IA³": (Ia3Spec(), 1e-1),
}
FACTOR = 10**0.5


@dataclass(frozen=True, slots=True)
class Setting:
    """One method on some modules on one task in one system. With `rates` each is trained with each seed; without, the
    first seed sweeps for the best rate.
    """

    home: str
    base: str
    folder: str  # holds train.jsonl and eval.jsonl, and gets the adapters
    system: System
    method: str
    modules: str
    steps: int
    batch_tokens: int
    seeds: tuple[int, ...]
    rates: tuple[float, ...] = ()
    max_rates: int = 4

    def recipe(self, rate: float, seed: int) -> TrainSpec:
        adapter, _ = METHODS[self.method]
        recipe = TrainSpec.model_validate(
            {
                "name": "quality",
                "base": self.base,
                "adapter": adapter.model_dump() | {"target_modules": MODULES[self.modules]},
                "data": {
                    "train": str(Path(self.folder) / "train.jsonl"),
                    "eval": str(Path(self.folder) / "eval.jsonl"),
                    "max_length": 512,
                    "format": "raw",  # questions are asked as they stand, too
                },
                "batch": {"tokens": self.batch_tokens, "order": "length_grouped"},
                "optimizer": {"learning_rate": rate, "warmup_ratio": 0.1},
                "evaluation": {"max_rows": 48, "keep_best": False},
                "max_steps": self.steps,
                "seed": seed,
            }
        )
        return on_this_machine(recipe)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Self:
        return cls(**raw | {name: tuple(raw[name]) for name in ("seeds", "rates")})


@dataclass(frozen=True, slots=True)
class Run:
    """One training: `losses` and `seconds` by step, the loss `held_out` after the last step, `nbytes` of the weights'
    file, and the adapter's `folder`.
    """

    rate: float
    seed: int
    losses: tuple[float, ...]
    held_out: float
    seconds: tuple[float, ...]
    num_parameters: int
    nbytes: int
    folder: str

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Self:
        return cls(**raw | {name: tuple(raw[name]) for name in ("losses", "seconds")})


def best_of(runs: Sequence[Run]) -> Run:
    """The run with the lowest held-out loss. A diverged run, whose loss is NaN, comes last."""
    return min(runs, key=lambda r: (math.isnan(r.held_out), r.held_out))
