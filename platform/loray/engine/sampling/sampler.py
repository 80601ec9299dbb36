"""Samples tokens from logits, for the whole batch at once.

The order is vLLM's: constraints, minimum length and biases, penalties (`logits.process`), then greedy, or temperature,
min-p, top-k, top-p and a draw. A draw uses one uniform number, a hash of the request's seed and the token's position.
There is no generator whose state a batch, a preemption or another replica could change, so a row's token depends only
on the row.

Rows without top-k and top-p are the kernels' (`Ops.sample`), constraints included; so most batches are one call that
writes nothing as large as the vocabulary. Where the backend has a chooser, all else is its as well (`Ops.chooser`):
nothing is read but tokens and log-probabilities.

Shapes: S sampled requests, P of them with processed logits, N rows cut by top-k or top-p, V vocabulary, C candidates.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Sequence
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor

from loray.engine.request import Request
from loray.engine.sampling.grammar import Masks
from loray.engine.sampling.history import history_of
from loray.engine.sampling.logits import process
from loray.engine.sampling.logprobs import token_logprobs
from loray.errors import RequestError
from loray.spec import SamplingParams, TokenLogprobs
from loray_kernels import Change, Chooser, Draws, Ops, TokenSeats
from loray_kernels.sampling.draws import draw, rows_of, scaled

_GREEDY_BELOW = 1e-5  # temperature: such a softmax is an argmax, and dividing by less overflows
_CANDIDATES = (72, 512, 4096)  # numbers of best tokens to try; if top-k or top-p may need more, the row is sorted
_GROUP = 32


_Choice = tuple[int, float]  # a token, and a number that is finite if the row's best logit is


class Sampled(NamedTuple):
    token: int
    logprobs: TokenLogprobs | None


# Of a row: None if its logits have no finite maximum; an error if no token is allowed.
Outcome = Sampled | RequestError | None
_Found = tuple[dict[int, _Choice], list[TokenLogprobs | None]]  # by row


class Sampler:
    """`eos_token_ids` are not sampled before a request's min_tokens."""

    def __init__(self, ops: Ops, eos_token_ids: Collection[int] = ()) -> None:
        self._ops, self._eos_token_ids = ops, tuple(eos_token_ids)
        self._salt = os.urandom(16)
        self._chooser: Chooser | None = None

    def __call__(
        self,
        logits_SV: Tensor,
        requests: Sequence[Request],
        masks: Masks | None = None,
        seats: TokenSeats | None = None,
    ) -> Callable[[], list[Outcome]]:
        """Draws one token for each row, also for `seats`; they are read by the result, before the call after the next
        one, and where a request `needs_history` before the logits change.

        Requested log-probabilities are those of the unchanged logits.
        """
        if not requests:
            return list
        found = self._found(logits_SV, requests, masks, seats)
        return lambda: _outcomes(found(), logits_SV, requests)

    def _found(
        self, logits_SV: Tensor, requests: Sequence[Request], masks: Masks | None, seats: TokenSeats | None
    ) -> Callable[[], _Found]:
        other = [i for i, r in enumerate(requests) if r.changes_logits or _cuts(r.spec.params, logits_SV.shape[1])]
        scored = [i for i, r in enumerate(requests) if r.spec.params.logprobs is not None]
        if (other or scored) and self._chooser is None:
            self._chooser = self._ops.chooser(logits_SV)
        plain = sorted(set(range(len(requests))) - set(other))
        if self._chooser is not None and (other or scored):
            own = sorted({*other, *scored})
            plain = sorted(set(plain) - set(own))
            return self._choose(self._chooser, logits_SV, requests, plain, own, masks, seats)
        drawn = self._whole(logits_SV, requests, plain, masks, seats)
        if not other and not scored:
            return lambda: (drawn(), [None] * len(requests))
        chosen = drawn() | self._processed(logits_SV, requests, other, masks)
        tokens = [chosen[i][0] for i in range(len(requests))]
        if seats is not None:
            seats.tokens[seats.seats_S] = torch.tensor(tokens, device=seats.tokens.device)
        asked = [r.spec.params.logprobs if math.isfinite(chosen[i][1]) else None for i, r in enumerate(requests)]
        logprobs = token_logprobs(logits_SV, tokens, asked)
        return lambda: (chosen, logprobs)

    def _choose(
        self,
        choose: Chooser,
        logits_SV: Tensor,
        requests: Sequence[Request],
        plain: Sequence[int],
        own: Sequence[int],
        masks: Masks | None,
        seats: TokenSeats | None,
    ) -> Callable[[], _Found]:
        """Of all rows, those of `own` with changes, where the logits are."""
        ended, vocab = masks.ended if masks is not None else (), logits_SV.shape[1]
        changes = [self._change(requests[i], vocab, may_end=requests[i] in ended) for i in own]
        plain_draws, own_draws = (self._draws(requests, rows, masks) for rows in (plain, own))
        chosen, rows = choose(logits_SV, plain_draws, own_draws, changes, seats), [*plain, *own]

        def read() -> _Found:
            found = chosen()
            logprobs: list[TokenLogprobs | None] = [None] * len(requests)
            for i, best, s in zip(rows, found.best, found.scores, strict=True):
                if s is not None and math.isfinite(best):
                    logprobs[i] = TokenLogprobs(s.logprob, tuple(zip(s.tokens, s.logprobs, strict=True)), s.rank)
            return dict(zip(rows, zip(found.tokens, found.best, strict=True), strict=True)), logprobs

        return read

    def _change(self, request: Request, vocab: int, *, may_end: bool) -> Change:
        p = request.spec.params
        cut = (p.top_k, p.top_p) if _cuts(p, vocab) else (0, 1.0)
        history = history_of(request, self._eos_token_ids) if request.changes_logits else None
        if history is None:
            return Change(None, (), None, *cut, p.logprobs)
        forbidden = dict.fromkeys(history.forbidden(request.output_ids, may_end=may_end).tolist())
        return Change(history.edits, [*forbidden], history.allowed_set(vocab), *cut, p.logprobs)

    def _whole(
        self,
        logits_SV: Tensor,
        requests: Sequence[Request],
        rows: Sequence[int],
        masks: Masks | None,
        seats: TokenSeats | None = None,
    ) -> Callable[[], dict[int, _Choice]]:
        """Of rows from which any token may be drawn that `masks` allow."""
        if not rows:
            return dict
        drawn = self._ops.sample(logits_SV, self._draws(requests, rows, masks), seats)
        return lambda: dict(zip(rows, zip(*drawn(), strict=True), strict=True))

    def _draws(self, requests: Sequence[Request], rows: Sequence[int], masks: Masks | None) -> Draws:
        params = [requests[i].spec.params for i in rows]
        temperature = [p.temperature if p.temperature >= _GREEDY_BELOW else 0.0 for p in params]
        mask_of = {} if masks is None else {r: m for m, r in enumerate(masks.requests)}
        return Draws(
            rows,
            temperature,
            [p.min_p for p in params],
            [self._uniform(requests[i]) if t else 0.0 for i, t in zip(rows, temperature, strict=True)],
            [mask_of.get(requests[i], -1) for i in rows],
            None if masks is None else torch.from_numpy(masks.words_MW),
        )

    def _processed(
        self, logits_SV: Tensor, requests: Sequence[Request], rows: Sequence[int], masks: Masks | None
    ) -> dict[int, _Choice]:
        """Of rows whose logits change, or whose candidates are cut."""
        own = [requests[i] for i in rows]
        logits_PV = process(rows_of(logits_SV, rows), own, self._eos_token_ids, masks)
        cut = [n for n, r in enumerate(own) if _cuts(r.spec.params, logits_PV.shape[1])]
        found = self._whole(logits_PV, own, sorted(set(range(len(own))) - set(cut)), None)()
        if cut:
            best_P = logits_PV.amax(dim=1)
            best = best_P.tolist()
            finite = [n for n in cut if math.isfinite(best[n])]
            tokens = self._draw(rows_of(logits_PV, finite), best_P[finite], [own[n] for n in finite]) if finite else []
            found |= dict.fromkeys(cut, (0, math.nan)) | {n: (t, 0.0) for n, t in zip(finite, tokens, strict=True)}
        return {rows[n]: choice for n, choice in found.items()}

    def _draw(self, logits_NV: Tensor, best_N: Tensor, requests: Sequence[Request]) -> list[int]:
        uniform_N = torch.tensor([self._uniform(r) for r in requests], dtype=torch.float64, device=logits_NV.device)
        tokens = [0] * len(requests)
        for rows, p_NC, ids_NC in candidates(logits_NV, best_N, [r.spec.params for r in requests]):
            token_N1 = ids_NC.gather(1, draw(p_NC, uniform_N[rows])[:, None])
            for row, token in zip(rows, token_N1.flatten().tolist(), strict=True):
                tokens[row] = token
        return tokens

    def _uniform(self, request: Request) -> float:
        """In [0, 1); a function of the token's position and the seed, or the request if it has no seed."""
        seed = request.spec.params.seed
        key, name = (self._salt, request.arrival) if seed is None else (b"", seed)
        position = len(request.output_ids) + request.num_in_flight
        digest = blake2b(f"{name}:{position}".encode(), digest_size=8, key=key).digest()
        return (int.from_bytes(digest, "little") >> 12) * 2.0**-52


def needs_history(request: Request) -> bool:
    """Its next token is drawn only when all tokens before it have been read."""
    return request.changes_logits or request.spec.params.structured is not None


def _outcomes(found: _Found, logits_SV: Tensor, requests: Sequence[Request]) -> list[Outcome]:
    chosen, logprobs = found
    out: list[Outcome] = [Sampled(chosen[i][0], lp) for i, lp in enumerate(logprobs)]
    for i, request in enumerate(requests):
        if not math.isfinite(chosen[i][1]):
            is_cut = needs_history(request) and math.isfinite(logits_SV[i].max())
            out[i] = _nothing_allowed() if is_cut else None
    return out


def _nothing_allowed() -> RequestError:
    return RequestError(
        "no token is left that the answer's constraint, allowed_token_ids, bad_words and min_tokens allow together; "
        "relax one of them"
    )


def _cuts(params: SamplingParams, vocab: int) -> bool:
    """Top-k or top-p may take something away."""
    return params.temperature >= _GREEDY_BELOW and (0 < params.top_k < vocab or params.top_p < 1)


class Candidates(NamedTuple):
    """Weights of the tokens that may be drawn, for these rows; they need not sum to 1."""

    rows: list[int]
    p_NC: Tensor
    ids_NC: Tensor


def candidates(logits_NV: Tensor, best_N: Tensor, params: Sequence[SamplingParams]) -> list[Candidates]:
    """After temperature, min-p (Nguyen et al., 2024), top-k, top-p (Holtzman et al., 2020), each renormalised.

    `best_N` is each row's maximum.
    """
    p_NV = scaled(logits_NV, best_N, [p.temperature for p in params], [p.min_p for p in params]).softmax(dim=1)
    vocab = p_NV.shape[1]
    left = list(range(len(params)))
    out = []
    for width in (*(n for n in _CANDIDATES if n < vocab), vocab):
        if left:
            p_NC, ids_NC, complete = _cut(p_NV[left], [params[i] for i in left], width)
            done = [i for i, ok in enumerate(complete) if ok]
            out.append(Candidates([left[i] for i in done], p_NC[done], ids_NC[done]))
            left = [row for row, ok in zip(left, complete, strict=True) if not ok]
    return out


def _cut(p_NV: Tensor, params: Sequence[SamplingParams], width: int) -> tuple[Tensor, Tensor, list[bool]]:
    """The weights and ids of each row's `width` best tokens, equals by their ids, 0 beyond top-k and top-p; and for
    each row whether the tokens beyond `width` would all be cut.
    """
    p_NC, ids_NC = _by_token(*_best(p_NV, width))
    vocab, last_N1 = p_NV.shape[1], p_NC[:, -1:]
    k_N1 = torch.tensor([min(p.top_k or vocab, vocab) for p in params], device=p_NV.device).unsqueeze(1)
    top_p_N1 = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=p_NV.device).unsqueeze(1)
    p_NC = p_NC.masked_fill(torch.arange(width, device=p_NV.device) >= k_N1, 0)
    mass_NC = p_NC.cumsum(dim=1, dtype=torch.float64)
    wanted_N1 = torch.where(k_N1 <= width, top_p_N1 * mass_NC[:, -1:], top_p_N1)
    complete_N1 = (k_N1 <= width) | ((k_N1 == vocab) & (mass_NC[:, -1:] >= wanted_N1))
    p_NC = p_NC.masked_fill(mass_NC - p_NC >= wanted_N1, 0)  # the mass before this token has reached top_p
    if width < vocab:  # equals of the last token, some of which are not among the candidates, are taken by their ids
        complete_N1 &= p_NC.where(p_NC > 0, math.inf).amin(dim=1, keepdim=True) > last_N1
    return p_NC, ids_NC, complete_N1.flatten().tolist()


def _by_token(p_NC: Tensor, ids_NC: Tensor) -> tuple[Tensor, Tensor]:
    """The best first, equals by their ids."""
    ids_NC, order_NC = ids_NC.sort(dim=1)
    p_NC, order_NC = p_NC.gather(1, order_NC).sort(dim=1, descending=True, stable=True)
    return p_NC, ids_NC.gather(1, order_NC)


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
