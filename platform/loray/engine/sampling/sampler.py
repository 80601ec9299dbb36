"""Samples tokens from logits, for the whole batch at once.

The order is vLLM's: constraints, minimum length and biases, penalties (`logits.process`), then greedy, or temperature,
min-p, top-k, top-p and a draw. A draw uses one uniform number, a hash of the request's seed and the token's position.
There is no generator whose state a batch, a preemption or another replica could change, so a row's token depends only
on the row.

Shapes: S sampled requests, R of them drawn, N rows cut by top-k or top-p, V vocabulary, C candidates, B columns of a
block.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Sequence
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor

from loray.engine.request import Request
from loray.engine.sampling.grammar import Masks
from loray.engine.sampling.logits import process
from loray.engine.sampling.logprobs import token_logprobs
from loray.errors import RequestError
from loray.spec import SamplingParams, TokenLogprobs

_GREEDY_BELOW = 1e-5  # temperature: such a softmax is an argmax, and dividing by less overflows
_CANDIDATES = (64, 512, 4096)  # numbers of best tokens to try; if top-k or top-p may need more, the row is sorted
_GROUP = 32
_BLOCK = 512
_BELOW_ONE = 1 - 2**-52


class Sampled(NamedTuple):
    token: int
    logprobs: TokenLogprobs | None


class Sampler:
    """`eos_token_ids` are not sampled before a request's min_tokens."""

    def __init__(self, eos_token_ids: Collection[int] = ()) -> None:
        self._eos_token_ids = tuple(eos_token_ids)
        self._salt = os.urandom(16)

    def __call__(
        self, logits_SV: Tensor, requests: Sequence[Request], masks: Masks | None = None
    ) -> list[Sampled | RequestError | None]:
        """One token for each row; None if its logits have no finite maximum; an error if no token is allowed.

        Requested log-probabilities are those of the unchanged logits.
        """
        if not requests:
            return []
        processed_SV = process(logits_SV, requests, self._eos_token_ids, masks)
        best_S, token_S = processed_SV.max(dim=1)  # max() gives NaN if there is one, so no second pass is needed
        tokens = token_S.tolist()
        finite = [math.isfinite(best) for best in best_S.tolist()]
        drawn = [i for i, r in enumerate(requests) if finite[i] and r.spec.params.temperature >= _GREEDY_BELOW]
        if drawn:
            ours = processed_SV is not logits_SV and len(drawn) == len(requests)  # then it may be overwritten
            drawn_RV = processed_SV if ours else processed_SV[drawn]
            chosen = self._draw(drawn_RV, best_S[drawn], [requests[i] for i in drawn])
            for i, token in zip(drawn, chosen, strict=True):
                tokens[i] = token
        num_top = [r.spec.params.logprobs if ok else None for r, ok in zip(requests, finite, strict=True)]
        logprobs = token_logprobs(logits_SV, tokens, num_top)
        out: list[Sampled | RequestError | None] = [Sampled(t, lp) for t, lp in zip(tokens, logprobs, strict=True)]
        if not all(finite):
            for i in (i for i, ok in enumerate(finite) if not ok):
                out[i] = _nothing_allowed() if math.isfinite(logits_SV[i].max()) else None
        if masks is not None and masks.errors:
            out = [masks.errors.get(r, sampled) for r, sampled in zip(requests, out, strict=True)]
        return out

    def _draw(self, logits_RV: Tensor, best_R: Tensor, requests: Sequence[Request]) -> list[int]:
        """`logits_RV` is overwritten."""
        uniform_R = torch.tensor([self._uniform(r) for r in requests], dtype=torch.float64, device=logits_RV.device)
        tokens = [0] * len(requests)
        for rows, p_NC, ids_NC in candidates(logits_RV, best_R, [r.spec.params for r in requests]):
            column_N1 = draw(p_NC, uniform_R[rows])[:, None]
            token_N1 = column_N1 if ids_NC is None else ids_NC.gather(1, column_N1)
            for row, token in zip(rows, token_N1.flatten().tolist(), strict=True):
                tokens[row] = token
        return tokens

    def _uniform(self, request: Request) -> float:
        """In [0, 1); a function of the token's position and the seed, or the request if it has no seed."""
        seed = request.spec.params.seed
        key, name = (self._salt, request.arrival) if seed is None else (b"", seed)
        digest = blake2b(f"{name}:{len(request.output_ids)}".encode(), digest_size=8, key=key).digest()
        return (int.from_bytes(digest, "little") >> 12) * 2.0**-52


def _nothing_allowed() -> RequestError:
    return RequestError(
        "no token is left that the answer's constraint, allowed_token_ids, bad_words and min_tokens allow together; "
        "relax one of them"
    )


class Candidates(NamedTuple):
    """Weights of the tokens that may be drawn, for these rows; they need not sum to 1. `ids_NC` None: C is V."""

    rows: list[int]
    p_NC: Tensor
    ids_NC: Tensor | None


def candidates(logits_RV: Tensor, best_R: Tensor, params: Sequence[SamplingParams]) -> list[Candidates]:
    """After temperature, min-p (Nguyen et al., 2024), top-k, top-p (Holtzman et al., 2020), each renormalised.

    `best_R` is each row's maximum; `logits_RV` is overwritten.
    """

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=logits_RV.dtype, device=logits_RV.device).unsqueeze(1)

    logits_RV -= best_R.unsqueeze(1)
    if any(p.temperature != 1 for p in params):
        logits_RV /= column([p.temperature for p in params])
    if any(p.min_p for p in params):
        floor_R1 = column([math.log(p.min_p) if p.min_p else -math.inf for p in params])
        logits_RV.masked_fill_(logits_RV < floor_R1, -math.inf)
    p_RV = logits_RV.softmax(dim=1)
    vocab = p_RV.shape[1]
    cut = [i for i, p in enumerate(params) if 0 < p.top_k < vocab or p.top_p < 1]
    whole = sorted(set(range(len(params))) - set(cut))
    out = [Candidates(whole, p_RV[whole] if cut else p_RV, None)] if whole else []
    for width in (*(n for n in _CANDIDATES if n < vocab), vocab):
        if cut:
            p_NC, ids_NC, complete = _cut(p_RV[cut], [params[i] for i in cut], width)
            done = [i for i, ok in enumerate(complete) if ok]
            out.append(Candidates([cut[i] for i in done], p_NC[done], ids_NC[done]))
            cut = [row for row, ok in zip(cut, complete, strict=True) if not ok]
    return out


def _cut(p_NV: Tensor, params: Sequence[SamplingParams], width: int) -> tuple[Tensor, Tensor, list[bool]]:
    """The weights and ids of each row's `width` best tokens, 0 beyond top-k and top-p; and for each row whether the
    tokens beyond `width` would all be cut.
    """
    p_NC, ids_NC = _best(p_NV, width)
    vocab = p_NV.shape[1]
    k_N1 = torch.tensor([min(p.top_k or vocab, vocab) for p in params], device=p_NV.device).unsqueeze(1)
    top_p_N1 = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=p_NV.device).unsqueeze(1)
    p_NC = p_NC.masked_fill(torch.arange(width, device=p_NV.device) >= k_N1, 0)
    mass_NC = p_NC.cumsum(dim=1, dtype=torch.float64)
    wanted_N1 = torch.where(k_N1 <= width, top_p_N1 * mass_NC[:, -1:], top_p_N1)
    complete_N1 = (k_N1 <= width) | ((k_N1 == vocab) & (mass_NC[:, -1:] >= wanted_N1))
    p_NC = p_NC.masked_fill(mass_NC - p_NC >= wanted_N1, 0)  # the mass before this token has reached top_p
    return p_NC, ids_NC, complete_N1.flatten().tolist()


def _best(p_NV: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """torch.topk over fewer columns: the best tokens are in the groups with the best maxima."""
    num_groups, odd = divmod(p_NV.shape[1], _GROUP)
    if odd or 4 * width > num_groups:
        best = p_NV.topk(width)
        return best.values, best.indices
    group_NC = p_NV.view(-1, _GROUP, num_groups).amax(dim=1).topk(width).indices
    members = num_groups * torch.arange(_GROUP, device=p_NV.device).unsqueeze(1)
    ids_NC = (group_NC.unsqueeze(1) + members).flatten(1)
    best = p_NV.gather(1, ids_NC).topk(width)
    return best.values, ids_NC.gather(1, best.indices)


def draw(p_NC: Tensor, uniform_N: Tensor) -> Tensor:
    """Columns (N), by inverting the cumulative distribution: first over blocks of columns, then in one block."""
    num_columns = p_NC.shape[1]
    num_whole = num_columns // _BLOCK
    rest = p_NC[:, num_whole * _BLOCK :].sum(dim=1, keepdim=True, dtype=torch.float64)
    blocks = p_NC[:, : num_whole * _BLOCK].view(len(p_NC), num_whole, _BLOCK).sum(dim=2)
    block_N1, within_N1 = _invert(torch.cat((blocks, rest), dim=1), uniform_N.unsqueeze(1))
    column_NB = block_N1 * _BLOCK + torch.arange(_BLOCK, device=p_NC.device)
    p_NB = p_NC.gather(1, column_NB.clamp(max=num_columns - 1)).masked_fill(column_NB >= num_columns, 0)
    offset_N1, _ = _invert(p_NB, within_N1)
    return (block_N1 * _BLOCK + offset_N1).squeeze(1)


def _invert(weight_NM: Tensor, uniform_N1: Tensor) -> tuple[Tensor, Tensor]:
    """The column in which the cumulative weight passes the uniform share of its total, and how far into it, [0, 1)."""
    mass_NM = weight_NM.cumsum(dim=1, dtype=torch.float64)
    target_N1 = uniform_N1 * mass_NM[:, -1:]
    found_N1 = torch.searchsorted(mass_NM, target_N1, right=True)  # never finds a column without weight
    weight_N1 = weight_NM.gather(1, found_N1).double()
    before_N1 = mass_NM.gather(1, found_N1) - weight_N1
    return found_N1, ((target_N1 - before_N1) / weight_N1).clamp(0, _BELOW_ONE)
