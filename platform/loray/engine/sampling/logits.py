"""Changes to logits before a token is chosen, greedily or not. Shapes: S sampled requests, V vocabulary, W words of 32
bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from loray.engine.request import Request
from loray.engine.sampling.grammar import Masks
from loray.engine.sampling.history import Occurrences, Tokens, Values, history_of
from loray_kernels.sampling.draws import allowed

_MANY = 4096  # tokens of a row
_Entry = tuple[int, Tokens, Values | float]  # a row, its tokens, a value of each or one of all


def process(
    logits_SV: Tensor, requests: Sequence[Request], eos_token_ids: Sequence[int], masks: Masks | None = None
) -> Tensor:
    """Apply constraints, allowed tokens, bad words, minimum length, biases and penalties, in vLLM's order.

    Returns `logits_SV` itself if no request has any.
    """
    changed = [(i, r) for i, r in enumerate(requests) if r.changes_logits]
    rows = [(i, r, h) for i, r in changed if (h := history_of(r, eos_token_ids)) is not None]
    if not rows and masks is None:
        return logits_SV
    logits_SV = logits_SV.clone() if masks is None else _masked(masks, logits_SV, requests)
    for i, _, history in rows:
        if history.allowed is not None:
            _keep(logits_SV[i], history.allowed)
    ended = masks.ended if masks is not None else ()
    forbidden = [(i, h.forbidden(r.output_ids, may_end=r in ended), -math.inf) for i, r, h in rows]
    _assign(logits_SV, forbidden)
    _add(logits_SV, [(i, *h.bias) for i, _, h in rows])
    _penalise(logits_SV, [(i, h.repeated) for i, _, h in rows if h.repeated is not None], _scale, _scaled)
    _penalise(logits_SV, [(i, h.produced) for i, _, h in rows if h.produced is not None], _add, torch.add)
    return logits_SV


def _penalise(
    logits_SV: Tensor,
    rows: Sequence[tuple[int, Occurrences]],
    some: Callable[[Tensor, Sequence[_Entry]], None],
    whole: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """With `some`, or on a CPU with `whole` rows where that is less work than to look up so many tokens."""
    most = math.inf if logits_SV.is_cuda else _MANY
    some(logits_SV, [(i, found.tokens, found.values) for i, found in rows if len(found) <= most])
    for i, found in ((i, found) for i, found in rows if len(found) > most):
        logits_SV[i] = whole(logits_SV[i], torch.from_numpy(found.dense(logits_SV.shape[1])))


def _masked(masks: Masks, logits_SV: Tensor, requests: Sequence[Request]) -> Tensor:
    """A copy, in which tokens that a request's constraint does not allow have −∞."""
    mask_of = {r: m for m, r in enumerate(masks.requests)}
    return allowed(logits_SV.clone(), [mask_of.get(r, -1) for r in requests], torch.from_numpy(masks.words_MW))


def _keep(logits_V: Tensor, tokens: Tokens) -> None:
    """All other tokens get −∞."""
    at = torch.from_numpy(tokens).to(logits_V.device)
    kept = logits_V[at]
    logits_V.fill_(-math.inf)
    logits_V[at] = kept


def _index(logits_SV: Tensor, entries: Sequence[_Entry]) -> tuple[tuple[Tensor, Tensor], Tensor] | None:
    """Where the entries are, and their values; None if there are none."""
    lengths = [len(tokens) for _, tokens, _ in entries]
    if not any(lengths):
        return None
    rows = np.repeat(np.array([row for row, _, _ in entries]), lengths)
    tokens = np.concatenate([tokens for _, tokens, _ in entries])
    values = np.concatenate([np.broadcast_to(np.asarray(v, dtype=np.float64), t.shape) for _, t, v in entries])
    device = logits_SV.device
    at = (torch.from_numpy(rows).to(device), torch.from_numpy(tokens).to(device))
    return at, torch.from_numpy(values).to(device, logits_SV.dtype)


def _assign(logits_SV: Tensor, entries: Sequence[_Entry]) -> None:
    if (found := _index(logits_SV, entries)) is not None:
        at, values = found
        logits_SV[at] = values


def _add(logits_SV: Tensor, entries: Sequence[_Entry]) -> None:
    """No (row, token) may occur twice."""
    if (found := _index(logits_SV, entries)) is not None:
        at, values = found
        logits_SV[at] += values


def _scale(logits_SV: Tensor, entries: Sequence[_Entry]) -> None:
    """Keskar et al., 2019 (CTRL), equation 3: logits that are positive are divided, others multiplied."""
    if (found := _index(logits_SV, entries)) is not None:
        at, values = found
        logits_SV[at] = _scaled(logits_SV[at], values)


def _scaled(logits: Tensor, values: Tensor) -> Tensor:
    return torch.where(logits > 0, logits / values, logits * values)
