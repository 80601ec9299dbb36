"""`Sampler`: from logits to tokens.

The order is vLLM's: constraints, minimum length and biases, penalties (`process`), then greedy, or temperature, min-p,
top-k, top-p and a draw. A draw uses one uniform number, a hash of the request's seed and the token's position. There is
no generator whose state a batch, a preemption or another replica could change, so a row's token depends only on the
row.

Rows without top-k and top-p are the kernels' (`Ops.sample`), constraints included; so most batches are one call that
writes nothing as large as the vocabulary. Where the backend has a chooser, all else is its as well (`Ops.chooser`):
nothing is read but tokens and log-probabilities.

Shapes: S sampled requests, P of them with processed logits, N rows cut by top-k or top-p, V vocabulary, C candidates.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from hashlib import blake2b
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loray.engine.request import Request
from loray.engine.sampling.grammar import Masks
from loray.engine.sampling.logprobs import token_logprobs
from loray.errors import RequestError
from loray.spec import GenerateRequest, SamplingParams, TokenLogprobs
from loray_kernels import Change, Chooser, Draws, Ops, TokenEdits, TokenSet, TokenSlots
from loray_kernels.sampling import allowed, draw, rows_of, scaled

_MANY = 4096  # tokens of a row
_GREEDY_BELOW = 1e-5  # temperature: such a softmax is an argmax, and dividing by less overflows
_CANDIDATES = (72, 512, 4096)  # numbers of best tokens to try; if top-k or top-p may need more, the row is sorted
_GROUP = 32

N = TypeVar("N", bound=np.generic)
Tokens = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]
_Entry = tuple[int, Tokens, Values | float]  # a row, its tokens, a value of each or one of all
_Choice = tuple[int, float]  # a token, and a number that is finite if the row's best logit is

# -- the history of a request ------------------------------------------------------------------------------------------


class Occurrences:
    """Distinct tokens in the order of their first occurrence, with how often each occurred, and a value of each."""

    def __init__(self, token_ids: Iterable[int] = (), *, value: float = 0.0, others: float = 0.0) -> None:
        """`value`: of all of `token_ids`; `others`: of tokens that have not occurred."""
        counts: dict[int, int] = {}
        for token in token_ids:
            counts[token] = counts.get(token, 0) + 1
        self._places = {token: place for place, token in enumerate(counts)}
        self._counts = list(counts.values())
        self._tokens = np.array([*counts], dtype=np.int64)
        self._values: Values = np.full(len(counts), value)
        self._others = others
        self._dense: npt.NDArray[np.float32] | None = None

    @property
    def tokens(self) -> Tokens:
        return self._tokens[: len(self._counts)]

    @property
    def values(self) -> Values:
        return self._values[: len(self._counts)]

    def __len__(self) -> int:
        return len(self._counts)

    def dense(self, vocab_size: int) -> npt.NDArray[np.float32]:
        """Give a value for each token of the vocabulary. Made at the first call, and kept from then on."""
        if self._dense is None:
            self._dense = np.full(vocab_size, self._others, dtype=np.float32)
            self._dense[self.tokens] = self.values
        return self._dense

    def add(self, token: int) -> int:
        """Count one more occurrence; returns how many there are now."""
        place = self._places.setdefault(token, len(self._counts))
        if place == len(self._counts):
            self._counts.append(0)
            if place == len(self._tokens):
                self._tokens, self._values = _grown(self._tokens), _grown(self._values)
            self._tokens[place] = token
        self._counts[place] += 1
        return self._counts[place]

    def set_value(self, token: int, value: float) -> None:
        self._values[self._places[token]] = value
        if self._dense is not None:
            self._dense[token] = value


class BadWords:
    """The bad_words of a request, as vLLM's: a word's last token may not follow its other tokens."""

    def __init__(self, words: Sequence[tuple[int, ...]]) -> None:
        self._always = [word[0] for word in words if len(word) == 1]
        self._by_previous: dict[int, list[tuple[int, ...]]] = {}
        for word in words:
            if len(word) > 1:
                self._by_previous.setdefault(word[-2], []).append(word)

    def after(self, output_ids: Sequence[int]) -> list[int]:
        """List the tokens that may not be next."""
        words = self._by_previous.get(output_ids[-1], ()) if output_ids else ()
        return self._always + [w[-1] for w in words if tuple(output_ids[1 - len(w) :]) == w[:-1]]


class SamplingState:
    """The history of one request. `read` takes in its tokens; the rest is what they mean for the next one's logits.

    repeated  tokens of prompt and output, with their repetition penalty
    produced  tokens of the output, with what frequency and presence penalty add to their logits
    """

    def __init__(self, spec: GenerateRequest, eos_token_ids: Sequence[int]) -> None:
        p = self._params = spec.params
        self._ends = p.stop_token_ids if p.ignore_eos else (*p.stop_token_ids, *eos_token_ids)
        self._bad_words = BadWords(p.bad_words) if p.bad_words else None
        self._num_read = 0
        self.allowed = None if p.allowed_token_ids is None else np.array(sorted({*p.allowed_token_ids}), dtype=np.int64)
        self.bias = np.array([*p.logit_bias], dtype=np.int64), np.array([*p.logit_bias.values()], dtype=np.float64)
        self.repeated: Occurrences | None = None
        if (penalty := p.repetition_penalty) != 1:
            self.repeated = Occurrences(spec.prompt_ids, value=penalty, others=1.0)
        self.produced = Occurrences() if p.presence_penalty or p.frequency_penalty else None
        self._edits: TokenEdits | None = None
        self._allowed_set: TokenSet | None = None

    def read(self, output_ids: Sequence[int]) -> None:
        """Take in the tokens that came since the last call."""
        p = self._params
        for token in output_ids[self._num_read :]:
            factor = added = None
            if self.repeated is not None and self.repeated.add(token) == 1:
                factor = p.repetition_penalty
                self.repeated.set_value(token, factor)
            if self.produced is not None:
                added = -(p.frequency_penalty * self.produced.add(token) + p.presence_penalty)
                self.produced.set_value(token, added)
            if self._edits is not None and (factor is not None or added is not None):
                self._edits.set(token, factor, added)
        self._num_read = len(output_ids)

    @property
    def edits(self) -> TokenEdits | None:
        """Biases and penalties, for a device: made at the first call, and followed by `read` from then on."""
        has_none = self.repeated is None and self.produced is None and not self._params.logit_bias
        if self._edits is None and not has_none:
            edits = self._edits = TokenEdits()
            edits.set_all("bias", *self.bias)
            for name, found in (("factor", self.repeated), ("added", self.produced)):
                if found is not None:
                    edits.set_all(name, found.tokens, found.values)
        return self._edits

    def allowed_set(self, vocab_size: int) -> TokenSet | None:
        """Give `allowed` for a device."""
        if self._allowed_set is None and self.allowed is not None:
            self._allowed_set = TokenSet(self.allowed, vocab_size)
        return self._allowed_set

    @property
    def is_over(self) -> bool:
        """No later token's logits are changed: there was a minimum length alone."""
        steady = (self._bad_words, self.allowed, self.repeated, self.produced, self._params.logit_bias or None)
        return self._num_read >= self._params.min_tokens and all(cause is None for cause in steady)

    def forbidden(self, output_ids: Sequence[int], *, may_end: bool) -> Tokens:
        """List the tokens that may not be next. `may_end`: also before min_tokens, as nothing else is allowed."""
        tokens = [] if self._bad_words is None else self._bad_words.after(output_ids)
        if len(output_ids) < self._params.min_tokens and not may_end:
            tokens.extend(self._ends)
        return np.array(tokens, dtype=np.int64)


def history_of(request: Request, eos_token_ids: Sequence[int]) -> SamplingState | None:
    """Give the request's history, with all tokens of its output; None where it changes nothing any more."""
    history = request.history
    if not isinstance(history, SamplingState):
        history = request.history = SamplingState(request.spec, eos_token_ids)
    history.read(request.output_ids)
    request.changes_logits = not history.is_over
    return history if request.changes_logits else None


def _grown(array: npt.NDArray[N]) -> npt.NDArray[N]:
    return np.concatenate((array, np.zeros(max(64, len(array)), dtype=array.dtype)))


# -- processed logits --------------------------------------------------------------------------------------------------


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
            _allow_only(logits_SV[i], history.allowed)
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
    """Apply `some`, or on a CPU `whole` to rows where that is less work than to look up so many tokens."""
    most = math.inf if logits_SV.is_cuda else _MANY
    some(logits_SV, [(i, found.tokens, found.values) for i, found in rows if len(found) <= most])
    for i, found in ((i, found) for i, found in rows if len(found) > most):
        logits_SV[i] = whole(logits_SV[i], torch.from_numpy(found.dense(logits_SV.shape[1])))


def _masked(masks: Masks, logits_SV: Tensor, requests: Sequence[Request]) -> Tensor:
    """Copy the logits, with −∞ for tokens that a request's constraint does not allow."""
    mask_of = {r: m for m, r in enumerate(masks.requests)}
    return allowed(logits_SV.clone(), [mask_of.get(r, -1) for r in requests], torch.from_numpy(masks.words_MW))


def _allow_only(logits_V: Tensor, tokens: Tokens) -> None:
    at = torch.from_numpy(tokens).to(logits_V.device)
    own = logits_V[at]
    logits_V.fill_(-math.inf)
    logits_V[at] = own


def _index(logits_SV: Tensor, entries: Sequence[_Entry]) -> tuple[tuple[Tensor, Tensor], Tensor] | None:
    """Find the places of the entries, and their values; None if there are none."""
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


# -- the sampler -------------------------------------------------------------------------------------------------------


class Sampled(NamedTuple):
    token: int
    logprobs: TokenLogprobs | None


# Of a row: None if its logits have no finite maximum; an error if no token is allowed.
Outcome = Sampled | RequestError | None
_Found = tuple[dict[int, _Choice], list[TokenLogprobs | None]]  # by row


class Sampler:
    """Samples the tokens of steps. `eos_token_ids` are not sampled before a request's min_tokens."""

    def __init__(self, ops: Ops, eos_token_ids: Collection[int] = ()) -> None:
        self._ops, self._eos_token_ids = ops, tuple(eos_token_ids)
        self._salt = os.urandom(16)
        self._chooser: Chooser | None = None

    def __call__(
        self,
        logits_SV: Tensor,
        requests: Sequence[Request],
        masks: Masks | None = None,
        slots: TokenSlots | None = None,
    ) -> Callable[[], list[Outcome]]:
        """Draw one token for each row, also into `slots`; they are read by the result, before the call after the next
        one, and where a request `needs_history` before the logits change.

        Requested log-probabilities are those of the unchanged logits.
        """
        if not requests:
            return list
        found = self._found(logits_SV, requests, masks, slots)
        return lambda: _outcomes(found(), logits_SV, requests)

    def _found(
        self, logits_SV: Tensor, requests: Sequence[Request], masks: Masks | None, slots: TokenSlots | None
    ) -> Callable[[], _Found]:
        other = [i for i, r in enumerate(requests) if r.changes_logits or _cuts(r.spec.params, logits_SV.shape[1])]
        scored = [i for i, r in enumerate(requests) if r.spec.params.logprobs is not None]
        if (other or scored) and self._chooser is None:
            self._chooser = self._ops.chooser(logits_SV)
        plain = sorted(set(range(len(requests))) - set(other))
        if self._chooser is not None and (other or scored):
            own = sorted({*other, *scored})
            plain = sorted(set(plain) - set(own))
            return self._choose(self._chooser, logits_SV, requests, plain, own, masks, slots)
        drawn = self._whole(logits_SV, requests, plain, masks, slots)
        if not other and not scored:
            return lambda: (drawn(), [None] * len(requests))
        chosen = drawn() | self._processed(logits_SV, requests, other, masks)
        tokens = [chosen[i][0] for i in range(len(requests))]
        if slots is not None:
            slots.tokens[slots.slots_S] = torch.tensor(tokens, device=slots.tokens.device)
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
        slots: TokenSlots | None,
    ) -> Callable[[], _Found]:
        """Choose tokens of all rows, those of `own` with changes, where the logits are."""
        ended, vocab = masks.ended if masks is not None else (), logits_SV.shape[1]
        changes = [self._change(requests[i], vocab, may_end=requests[i] in ended) for i in own]
        plain_draws, own_draws = (self._draws(requests, rows, masks) for rows in (plain, own))
        chosen, rows = choose(logits_SV, plain_draws, own_draws, changes, slots), [*plain, *own]

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
        slots: TokenSlots | None = None,
    ) -> Callable[[], dict[int, _Choice]]:
        """Draw tokens of rows from which any token may be drawn that `masks` allow."""
        if not rows:
            return dict
        drawn = self._ops.sample(logits_SV, self._draws(requests, rows, masks), slots)
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
        """Draw tokens of rows whose logits change, or whose candidates are cut."""
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
        """A number in [0, 1): a function of the token's position and the seed, or the request if it has no seed."""
        seed = request.spec.params.seed
        key, name = (self._salt, request.arrival) if seed is None else (b"", seed)
        position = len(request.output_ids) + request.num_in_flight
        digest = blake2b(f"{name}:{position}".encode(), digest_size=8, key=key).digest()
        return (int.from_bytes(digest, "little") >> 12) * 2.0**-52


def needs_history(request: Request) -> bool:
    """Say whether its next token is drawn only when all tokens before it have been read."""
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
    """Say whether top-k or top-p may take something away."""
    return params.temperature >= _GREEDY_BELOW and (0 < params.top_k < vocab or params.top_p < 1)


class Candidates(NamedTuple):
    """Weights of the tokens that may be drawn, for these rows; they need not sum to 1."""

    rows: list[int]
    p_NC: Tensor
    ids_NC: Tensor


def candidates(logits_NV: Tensor, best_N: Tensor, params: Sequence[SamplingParams]) -> list[Candidates]:
    """Apply temperature, min-p (Nguyen et al., 2024), top-k, top-p (Holtzman et al., 2020), each renormalised.

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
    """Sort: the best first, equals by their ids."""
    ids_NC, order_NC = ids_NC.sort(dim=1)
    p_NC, order_NC = p_NC.gather(1, order_NC).sort(dim=1, descending=True, stable=True)
    return p_NC, ids_NC.gather(1, order_NC)


def _best(p_NV: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Find torch.topk over fewer columns: the best tokens are in the groups with the best maxima."""
    num_groups, odd = divmod(p_NV.shape[1], _GROUP)
    if odd or 4 * width > num_groups:
        best = p_NV.topk(width)
        return best.values, best.indices
    group_NC = p_NV.view(-1, _GROUP, num_groups).amax(dim=1).topk(width).indices
    members = num_groups * torch.arange(_GROUP, device=p_NV.device).unsqueeze(1)
    ids_NC = (group_NC.unsqueeze(1) + members).flatten(1)
    best = p_NV.gather(1, ids_NC).topk(width)
    return best.values, ids_NC.gather(1, best.indices)
