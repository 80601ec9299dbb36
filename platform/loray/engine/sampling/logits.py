"""Changes to logits before a token is chosen, greedily or not. Shapes: S sampled requests, V vocabulary."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from loray.engine.request import Request

_Entry = tuple[int, int, float]  # row, token, value


def process(logits_SV: Tensor, requests: Sequence[Request], eos_token_ids: Sequence[int]) -> Tensor:
    """Apply minimum length, biases and penalties, in vLLM's order. Returns `logits_SV` itself if no request has any."""
    rows = [(i, r) for i, r in enumerate(requests) if _changes(r)]
    if not rows:
        return logits_SV
    logits_SV = logits_SV.clone()
    _assign_minus_infinity(logits_SV, [e for i, r in rows for e in _too_early(i, r, eos_token_ids)])
    _add(logits_SV, [(i, t, bias) for i, r in rows for t, bias in r.spec.params.logit_bias.items()])
    _scale(logits_SV, [e for i, r in rows for e in _repeated(i, r)])
    _add(logits_SV, [e for i, r in rows for e in _penalties(i, r)])
    return logits_SV


def _changes(request: Request) -> bool:
    p = request.spec.params
    return bool(
        p.logit_bias
        or p.presence_penalty
        or p.frequency_penalty
        or p.repetition_penalty != 1
        or len(request.output_ids) < p.min_tokens
    )


def _too_early(row: int, request: Request, eos_token_ids: Sequence[int]) -> Iterable[_Entry]:
    """Tokens that would end the request before its min_tokens."""
    params = request.spec.params
    if len(request.output_ids) < params.min_tokens:
        ends = params.stop_token_ids if params.ignore_eos else (*params.stop_token_ids, *eos_token_ids)
        yield from ((row, token, -math.inf) for token in ends)


def _repeated(row: int, request: Request) -> Iterable[_Entry]:
    """Keskar et al., 2019 (CTRL), equation 3, over prompt and output."""
    penalty = request.spec.params.repetition_penalty
    if penalty != 1:
        yield from ((row, token, penalty) for token in {*request.spec.prompt_ids, *request.output_ids})


def _penalties(row: int, request: Request) -> Iterable[_Entry]:
    """OpenAI's: logit − frequency · count − presence · [count > 0], over the output."""
    p = request.spec.params
    if p.presence_penalty or p.frequency_penalty:
        for token, count in Counter(request.output_ids).items():
            yield row, token, -(p.frequency_penalty * count + p.presence_penalty)


def _index(logits_SV: Tensor, entries: Sequence[_Entry]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    rows, tokens, values = zip(*entries, strict=True)
    device = logits_SV.device
    at = (torch.tensor(rows, device=device), torch.tensor(tokens, device=device))
    return at, torch.tensor(values, dtype=logits_SV.dtype, device=device)


def _assign_minus_infinity(logits_SV: Tensor, entries: Sequence[_Entry]) -> None:
    if entries:
        at, values = _index(logits_SV, entries)
        logits_SV[at] = values


def _add(logits_SV: Tensor, entries: Sequence[_Entry]) -> None:
    """No (row, token) may occur twice."""
    if entries:
        at, values = _index(logits_SV, entries)
        logits_SV[at] += values


def _scale(logits_SV: Tensor, entries: Sequence[_Entry]) -> None:
    if entries:
        at, values = _index(logits_SV, entries)
        logits = logits_SV[at]
        logits_SV[at] = torch.where(logits > 0, logits / values, logits * values)
