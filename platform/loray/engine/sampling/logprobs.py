"""Log-probabilities of tokens, and of a prompt's tokens. Shapes: R rows, V vocabulary."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from loray.engine.model.batch import Scored
from loray.spec import TokenLogprobs
from loray_kernels.sampling import Scores, TokenScores, read_scores, score_tokens

_ROWS = 32  # at a time, to bound the memory that is needed beside the logits


def logprobs_of(scores: Scores) -> TokenLogprobs:
    return TokenLogprobs(scores.logprob, tuple(zip(scores.tokens, scores.logprobs, strict=True)), scores.rank)


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
        self._found: list[TokenScores] = []
        self._num = 0

    def add(self, logits_RV: Tensor) -> None:
        """Take the logits of the next R tokens of the parts."""
        if self._tokens_T is None:
            self._tokens_T = torch.tensor(self._tokens, device=logits_RV.device)
        for rows_RV in torch.split(logits_RV, _ROWS):
            rows = slice(self._num, self._num + len(rows_RV))
            self._found.append(score_tokens(rows_RV, self._tokens_T[rows], max(self._num_top[rows])))
            self._num += len(rows_RV)

    def of(self, parts: Collection[Scored]) -> Iterator[tuple[Scored, list[TokenLogprobs] | None]]:
        """Give those parts' log-probabilities of the prompt's next tokens; None if they are not finite."""
        scores = map(logprobs_of, read_scores(self._found, self._num_top) if self._found else ())
        for part in self._parts:
            own = [*islice(scores, part.stop - part.start)]
            if part in parts:
                yield part, own if all(math.isfinite(s.logprob) for s in own) else None
