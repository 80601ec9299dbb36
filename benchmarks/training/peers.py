"""Cases that compare steps with those of PEFT, with its modules alone or with transformers' Trainer around them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any, ClassVar

from benchmarks import workers
from benchmarks.training.rows import Row, Setting, Target


@dataclass(frozen=True, slots=True)
class Vera:
    """Training steps of VeRA on all linear modules, in turn with PEFT's VeRA in fp32, its default, and in bf16."""

    tokens: int
    rank: int
    target: Target | None = None
    columns: ClassVar = ("ours s", "PEFT s", "PEFT/ours", "PEFT bf16 s", "bf16/ours", "loss apart")

    @property
    def name(self) -> str:
        return f"VeRA r{self.rank}, {self.tokens}"

    def run(self, setting: Setting) -> Row:
        found = _found("vera", setting, self.tokens, self.rank, 3 * setting.repeats)
        ours, peft, bf16 = (statistics.median(found["seconds"][name]) for name in ("ours", "peft", "peft-bf16"))
        own, *others = found["losses"].values()
        apart = max(abs(a - b) for other in others for a, b in zip(own, other, strict=True))
        cells = (
            f"{ours:.3f}",
            f"{peft:.3f}",
            f"{peft / ours:.2f}",
            f"{bf16:.3f}",
            f"{bf16 / ours:.2f}",
            f"{apart:.3f}",
        )
        return Row(cells, found | {"ratio": peft / ours, "bf16_ratio": bf16 / ours, "apart": apart}, peft / ours)


@dataclass(frozen=True, slots=True)
class Trainer:
    """Training steps of a method by its recipe, in turn with those of PEFT's method in transformers' Trainer, in bf16.

    LongLoRA's peer has the same adapter, embeddings, norms and RoPE, and dense attention: PEFT has no other.
    """

    method: str
    rows: int
    tokens: int
    target: Target | None = None
    columns: ClassVar = ("ours s", "Trainer s", "Trainer/ours", "loss apart")

    @property
    def name(self) -> str:
        return f"{self.method} {self.rows} × {self.tokens}"

    def run(self, setting: Setting) -> Row:
        found = _found("trainer", setting, self.method, self.rows, self.tokens, 2 * setting.repeats)
        ours, theirs = (statistics.median(found["seconds"][name]) for name in ("ours", "trainer"))
        apart = max(abs(a - b) for a, b in zip(found["losses"]["ours"], found["losses"]["trainer"], strict=True))
        cells = f"{ours:.3f}", f"{theirs:.3f}", f"{theirs / ours:.2f}", f"{apart:.3f}"
        return Row(cells, found | {"ratio": theirs / ours, "apart": apart}, theirs / ours)


def _found(worker: str, setting: Setting, *arguments: object) -> dict[str, Any]:
    home = setting.base.path.parent.parent
    command = [f"benchmarks.training.workers.{worker}", str(home), setting.base.name, *map(str, arguments)]
    (found,) = workers.run([command], setting.num_threads)
    return found
