"""A recommendation: the score card, the estimates, and remarks on both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loray.advice.estimates import NUM_ROWS, NUM_SERVED, Estimate, estimate_methods
from loray.advice.scorecard import Answers, Score, score_methods
from loray.bases.config import ModelConfig
from loray.planning.devices import Device
from loray.spec import format_size


@dataclass(frozen=True, slots=True)
class Recommendation:
    answers: Answers
    base: str
    device: str
    scores: tuple[Score, ...]
    estimates: tuple[Estimate, ...]
    remarks: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As a dictionary for JSON, in bytes, seconds, tokens and shares."""
        return asdict(self)


def recommend(answers: Answers, base: str, model: ModelConfig, device: Device) -> Recommendation:
    scores, estimates = score_methods(answers), estimate_methods(answers, model, device)
    said = tuple(remarks(answers, scores, estimates, model))
    return Recommendation(answers, base, device.name, tuple(scores), tuple(estimates), said)


def remarks(
    answers: Answers, scores: Sequence[Score], estimates: Sequence[Estimate], model: ModelConfig
) -> Iterator[str]:
    yield (
        "methods combine: S-LoRA is how adapters are served, not how they are trained. The engine serves LoRA, VeRA "
        "and LongLoRA of any rank in one batch, so VeRA trained and S-LoRA served is one choice, not two"
    )
    window, context = model.max_position_embeddings, answers.context_length
    if context > window:
        yield (
            f"the base reads {window:,} tokens: for {context:,} its RoPE must be scaled, which LongLoRA does and LoRA "
            "or VeRA alone do not, whatever the score says"
        )
    elif any(score.method == "LongLoRA" for score in scores):
        yield f"the base reads {window:,} tokens as it is: {context:,} need no LongLoRA, which saves attention alone"
    by_method = {estimate.method: estimate for estimate in estimates}
    lora, vera = by_method["lora"], by_method["vera"]
    if answers.num_tasks > 1:
        yield (
            f"{answers.num_tasks:,} adapters are {format_size(answers.num_tasks * lora.adapter_bytes)} as LoRA and "
            f"{format_size(answers.num_tasks * vera.adapter_bytes)} as VeRA; {NUM_SERVED:,} in the pool at once take "
            f"{format_size(lora.served_pool_bytes)} and {format_size(vera.served_pool_bytes)}, and a batch on "
            f"{NUM_ROWS} of them reaches at most {lora.throughput:.0%} and {vera.throughput:.0%} of the base's speed"
        )
