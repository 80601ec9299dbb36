"""Log-probabilities of sampled tokens and of a prompt's tokens. Shapes: R rows, V vocabulary."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from loray.engine.model.batch import Scored
from loray.spec import TokenLogprobs

_ROWS = 32  # at a time, to bound the memory that is needed beside the logits


class _Scores(NamedTuple):
    """The log-probability and rank of each row's token, and its K best tokens, where the logits are."""

    own_R: Tensor
    rank_R: Tensor
    ids_RK: Tensor
    logprobs_RK: Tensor


def token_logprobs(
    logits_RV: Tensor, tokens: Sequence[int], num_top: Sequence[int | None]
) -> list[TokenLogprobs | None]:
    """Compute for each row the log-probability of its token and those of its `num_top` best; None if `num_top` is."""
    out: list[TokenLogprobs | None] = [None] * len(tokens)
    asked = [(i, n) for i, n in enumerate(num_top) if n is not None]
    for start in range(0, len(asked), _ROWS):
        rows = [i for i, _ in asked[start : start + _ROWS]]
        counts = [n for _, n in asked[start : start + _ROWS]]
        tokens_R = torch.tensor([tokens[i] for i in rows], device=logits_RV.device)
        for i, scores in zip(rows, _read([_scores(logits_RV[rows], tokens_R, max(counts))], counts), strict=True):
            out[i] = scores
    return out


def _scores(logits_RV: Tensor, tokens_R: Tensor, num_top: int) -> _Scores:
    logprobs_RV = logits_RV.log_softmax(dim=1)
    own_R1 = logprobs_RV.gather(1, tokens_R[:, None])
    rank_R = (logprobs_RV > own_R1).sum(dim=1) + 1
    top = logprobs_RV.topk(num_top, dim=1)
    return _Scores(own_R1.flatten(), rank_R, top.indices, top.values)


def _read(found: Sequence[_Scores], num_top: Sequence[int]) -> Iterator[TokenLogprobs]:
    """Read all rows of `found`; each field is read at once. `num_top`: of each row."""
    own, ranks, ids, logprobs = (
        torch.cat([field.flatten() for field in fields]).tolist() for fields in zip(*found, strict=True)
    )
    widths = (scores.ids_RK.shape[1] for scores in found for _ in range(len(scores.own_R)))
    at = 0
    for value, rank, n, width in zip(own, ranks, num_top, widths, strict=True):
        yield TokenLogprobs(value, tuple(zip(ids[at : at + n], logprobs[at : at + n], strict=True)), rank)
        at += width


class PromptScores:
    """The log-probabilities of parts of prompts in one step; their logits come slice by slice. Nothing waits for a
    device before `of`, and what is kept of a slice is as small as its results.
    """

    def __init__(self, parts: Sequence[Scored]) -> None:
        self._parts = parts
        self._tokens = [t for part in parts for t in part.request.spec.prompt_ids[part.start + 1 : part.stop + 1]]
        self._num_top = [
            part.request.spec.params.prompt_logprobs or 0 for part in parts for _ in range(part.start, part.stop)
        ]
        self._tokens_T: Tensor | None = None
        self._found: list[_Scores] = []
        self._num = 0

    def add(self, logits_RV: Tensor) -> None:
        """Take the logits of the next R tokens of the parts."""
        if self._tokens_T is None:
            self._tokens_T = torch.tensor(self._tokens, device=logits_RV.device)
        for rows_RV in torch.split(logits_RV, _ROWS):
            rows = slice(self._num, self._num + len(rows_RV))
            self._found.append(_scores(rows_RV, self._tokens_T[rows], max(self._num_top[rows])))
            self._num += len(rows_RV)

    def of(self, parts: Collection[Scored]) -> Iterator[tuple[Scored, list[TokenLogprobs] | None]]:
        """Give those parts' log-probabilities of the prompt's next tokens; None if they are not finite."""
        scores = _read(self._found, self._num_top) if self._found else iter(())
        for part in self._parts:
            own = [*islice(scores, part.stop - part.start)]
            if part in parts:
                yield part, own if all(math.isfinite(s.logprob) for s in own) else None
