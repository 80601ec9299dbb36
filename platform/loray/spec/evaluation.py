"""Evaluations of a long-context adapter before it is published, and the names of their metrics."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from loray.spec.fields import Frozen

# Values of `Evaluation.metric`. Those of retrieval carry the task's name in front: see `retrieval_metric`.
PERPLEXITY, LOSS = "perplexity", "loss"
EXACT_MATCH, LOG_LIKELIHOOD = "exact_match", "log_likelihood"

# Of pairs, by TRL's names: means of the answers' rewards, the share told apart, the mean difference.
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")

RetrievalTask = Literal["passkey", "topics"]
ContextLength = Annotated[int, Field(gt=1)]
Depth = Annotated[float, Field(ge=0, le=1)]
# Why an alias is set although the gate refuses it. The catalog records the reason.
NoGateReason = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=500)]


def retrieval_metric(task: str, metric: str) -> str:
    """`passkey`, EXACT_MATCH → "passkey_exact_match"."""
    return f"{task}_{metric}"


class PerplexitySpec(Frozen):
    """Dense perplexity by LongLoRA's rule: windows of the context length, a new one every `stride` tokens of a
    document, the mean loss over the whole window.
    """

    context_lengths: tuple[ContextLength, ...] = Field(
        default=(), description="empty: the context that was extended, and the adapter's own"
    )
    stride: int = Field(default=256, gt=0)
    max_windows: int | None = Field(
        default=16, gt=0, description="for each context length, evenly spread; None: every window"
    )


class RetrievalSpec(Frozen):
    """Finding a key in long filler: by depth (0: at the beginning, 1: at the end) and length, `samples` prompts each.

    passkey  a five-digit number (Mohtashami & Jaggi, 2023)
    topics   the topic of one conversation of many (LongChat's LongEval)
    """

    task: RetrievalTask = "passkey"
    context_lengths: tuple[ContextLength, ...] = Field(min_length=1)
    depths: tuple[Depth, ...] = Field(default=(0.0, 0.25, 0.5, 0.75, 1.0), min_length=1)
    samples: int = Field(default=4, gt=0)
    seed: int = Field(default=0, ge=0)
