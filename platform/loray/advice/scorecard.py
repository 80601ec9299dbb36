"""The score card of a widely read article on adapter methods: points for each method, from four answers.

It does not depend on the base or the machine, unlike `loray.advice.estimates`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from loray.errors import SpecError

Constraint = Literal["low", "medium", "high"]
Scale = Literal["single", "distributed"]

_LONG_CONTEXT = 8192
_MANY_TASKS = 100
_SERVED_TASKS = 10


@dataclass(frozen=True, slots=True)
class Answers:
    """Answers to the four questions.

    context_length  tokens of the longest row
    num_tasks       number of adapters
    constraint      how scarce memory and money are
    scale           one machine, or a cluster
    """

    context_length: int
    num_tasks: int
    constraint: Constraint = "medium"
    scale: Scale = "single"

    def __post_init__(self) -> None:
        # A row of one token has nothing to be trained on.
        for name, value, least in (("context length", self.context_length, 2), ("number of tasks", self.num_tasks, 1)):
            if value < least:
                raise SpecError(f"the {name} is {value}; it must be at least {least}")


@dataclass(frozen=True, slots=True)
class Score:
    method: str
    score: float
    reason: str


def score_methods(answers: Answers) -> list[Score]:
    """Scores, the best first; of equal ones the more specialised method first."""
    context, tasks = answers.context_length, answers.num_tasks
    tens = min(tasks / 10, 10)
    found: list[Score] = []
    if context > _LONG_CONTEXT:
        score = min(context / 4096, 10) * 0.3
        found.append(Score("LongLoRA", score, f"{context:,} tokens are more than {_LONG_CONTEXT:,}"))
    if answers.constraint == "high" or tasks > _MANY_TASKS:
        why = []
        if answers.constraint == "high":
            why.append("resources are scarce")
        if tasks > _MANY_TASKS:
            why.append(f"{tasks:,} tasks are more than {_MANY_TASKS}")
        score = (10 if answers.constraint == "high" else 5) + tens * 0.2
        found.append(Score("VeRA", score, " and ".join(why) + ": an adapter is two vectors a module"))
    if answers.scale == "distributed" and tasks > _SERVED_TASKS:
        reason = f"{tasks:,} adapters on a cluster: one pool and one batch for all of them"
        found.append(Score("S-LoRA", tens * 0.4 + 5, reason))
    found.append(Score("LoRA", 5.0, "the baseline: every tool knows it"))
    return sorted((Score(s.method, round(s.score, 9), s.reason) for s in found), key=lambda s: -s.score)
