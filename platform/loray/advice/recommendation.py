"""The answer to "which method?": the score card, our own estimates, and remarks on both."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from loray.advice.estimates import Estimate, estimate_methods
from loray.advice.remarks import remarks
from loray.advice.scorecard import Answers, Score, score_methods
from loray.bases.config import ModelConfig
from loray.planning.devices import Device


@dataclass(frozen=True, slots=True)
class Recommendation:
    answers: Answers
    base: str
    device: str
    scores: tuple[Score, ...]
    estimates: tuple[Estimate, ...]
    remarks: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON. Bytes, seconds, tokens, shares."""
        return asdict(self)


def recommend(answers: Answers, base: str, model: ModelConfig, device: Device) -> Recommendation:
    scores, estimates = score_methods(answers), estimate_methods(answers, model, device)
    said = tuple(remarks(answers, scores, estimates, model))
    return Recommendation(answers, base, device.name, tuple(scores), tuple(estimates), said)
