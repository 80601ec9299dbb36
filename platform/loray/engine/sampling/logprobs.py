"""Log-probabilities of sampled tokens and of a prompt's tokens. Shapes: R rows, V vocabulary."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from loray.engine.model.batch import Scored
from loray.spec import TokenLogprobs

_ROWS = 32  # at a time, to bound the memory that is needed beside the logits


def token_logprobs(
    logits_RV: Tensor, tokens: Sequence[int], num_top: Sequence[int | None]
) -> list[TokenLogprobs | None]:
    """For each row the log-probability of its token and those of its `num_top` best tokens; None if `num_top` is."""
    out: list[TokenLogprobs | None] = [None] * len(tokens)
    asked = [(i, n) for i, n in enumerate(num_top) if n is not None]
    for start in range(0, len(asked), _ROWS):
        rows = [i for i, _ in asked[start : start + _ROWS]]
        counts = [n for _, n in asked[start : start + _ROWS]]
        logprobs_RV = logits_RV[rows].log_softmax(dim=1)
        own_R1 = logprobs_RV.gather(1, torch.tensor([[tokens[i]] for i in rows], device=logits_RV.device))
        ranks = ((logprobs_RV > own_R1).sum(dim=1) + 1).tolist()
        top = logprobs_RV.topk(max(counts), dim=1)
        for i, n, own, rank, ids, values in zip(
            rows, counts, own_R1.flatten().tolist(), ranks, top.indices.tolist(), top.values.tolist(), strict=True
        ):
            out[i] = TokenLogprobs(own, tuple(zip(ids[:n], values[:n], strict=True)), rank)
    return out


class PromptScores:
    """The log-probabilities of parts of prompts in one step; their logits come slice by slice."""

    def __init__(self, parts: Sequence[Scored]) -> None:
        self._parts = parts
        self._tokens = [t for part in parts for t in part.request.spec.prompt_ids[part.start + 1 : part.stop + 1]]
        self._num_top = [
            part.request.spec.params.prompt_logprobs for part in parts for _ in range(part.start, part.stop)
        ]
        self._scores: list[TokenLogprobs | None] = []

    def add(self, logits_RV: Tensor) -> None:
        """The rows of the next R tokens of the parts."""
        rows = slice(len(self._scores), len(self._scores) + len(logits_RV))
        self._scores += token_logprobs(logits_RV, self._tokens[rows], self._num_top[rows])

    def of(self, parts: Collection[Scored]) -> Iterator[tuple[Scored, list[TokenLogprobs] | None]]:
        """Of those of the parts the log-probabilities of the prompt's next tokens; None if they are not finite."""
        scores = iter(self._scores)
        for part in self._parts:
            own = [s for s in islice(scores, part.stop - part.start) if s is not None]
            if part in parts:
                yield part, own if all(math.isfinite(s.logprob) for s in own) else None
