"""Log-probabilities of sampled tokens and of a prompt's tokens. Shapes: R rows, V vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence

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


def score(logits_RV: Tensor, parts: Sequence[Scored]) -> list[list[TokenLogprobs] | None]:
    """For each part the log-probabilities of the prompt's next tokens; None if its logits are not finite.

    `logits_RV` has the rows of the parts one after the other.
    """
    tokens = [t for part in parts for t in part.request.spec.prompt_ids[part.start + 1 : part.stop + 1]]
    num_top = [part.request.spec.params.prompt_logprobs for part in parts for _ in range(part.start, part.stop)]
    scores = iter(token_logprobs(logits_RV, tokens, num_top))
    out: list[list[TokenLogprobs] | None] = []
    for part in parts:
        own = [s for _, s in zip(range(part.start, part.stop), scores, strict=False) if s is not None]
        out.append(own if all(math.isfinite(s.logprob) for s in own) else None)
    return out
