"""What came of many requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.cluster.trials.client import Answer
from benchmarks.serving.figures.rows import quantile


@dataclass(frozen=True, slots=True)
class Tail:
    """Times to the first token of those that were answered, and how many were not."""

    num: int
    num_failed: int
    p50_s: float
    p99_s: float

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> Tail:
        ttft = sorted(a.ttft for a in answers if not a.error)
        return cls(len(answers), len(answers) - len(ttft), quantile(ttft, 0.5), quantile(ttft, 0.99))
