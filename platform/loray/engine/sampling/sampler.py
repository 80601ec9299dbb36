"""`Sampler`: from logits to tokens.

The order is vLLM's: constraints, minimum length and biases, penalties, then greedy, or temperature, min-p, top-k, top-p
and a draw. A draw uses one uniform number, a hash of the request's seed and the token's position. There is no generator
whose state a batch, a preemption or another replica could change, so a row's token depends only on the row.

The backend computes it: rows without top-k and top-p, changes and log-probabilities in `Ops.sample`, constraints
included, so most batches are one call that writes nothing as large as the vocabulary; all others in its chooser
(`Ops.chooser`). Here is what a request changes about its logits, kept from step to step.

Shapes: S sampled requests, V vocabulary.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from loray.engine.request import Request
from loray.engine.sampling.grammar import Masks
from loray.engine.sampling.logprobs import logprobs_of
from loray.errors import RequestError
from loray.spec import GenerateRequest, SamplingParams, TokenLogprobs
from loray_kernels import Change, Chooser, Draws, Ops, TokenEdits, TokenSet, TokenSlots
from loray_kernels.sampling import Scores

_GREEDY_BELOW = 1e-5  # temperature: such a softmax is an argmax, and dividing by less overflows


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

    edits  biases and penalties; None: it has none
    """

    def __init__(self, spec: GenerateRequest, eos_token_ids: Sequence[int]) -> None:
        p = self._params = spec.params
        self._ends = p.stop_token_ids if p.ignore_eos else (*p.stop_token_ids, *eos_token_ids)
        self._bad_words = BadWords(p.bad_words) if p.bad_words else None
        self._num_read = 0
        self._allowed: TokenSet | None = None
        self._repeated = dict.fromkeys(spec.prompt_ids) if p.repetition_penalty != 1 else None  # in prompt and output
        self._produced = Counter[int]() if p.presence_penalty or p.frequency_penalty else None  # in the output
        self.edits: TokenEdits | None = None
        if p.logit_bias or self._repeated is not None or self._produced is not None:
            self.edits = TokenEdits()
            bias = p.logit_bias
            self.edits.set_all("bias", np.array([*bias], dtype=np.int64), np.array([*bias.values()], dtype=np.float64))
            if self._repeated is not None:
                tokens = np.array([*self._repeated], dtype=np.int64)
                self.edits.set_all("factor", tokens, np.full(len(tokens), p.repetition_penalty))

    def read(self, output_ids: Sequence[int]) -> None:
        """Take in the tokens that came since the last call."""
        p = self._params
        for token in output_ids[self._num_read :]:
            factor = added = None
            if self._repeated is not None and token not in self._repeated:
                self._repeated[token] = None
                factor = p.repetition_penalty
            if self._produced is not None:
                self._produced[token] += 1
                added = -(p.frequency_penalty * self._produced[token] + p.presence_penalty)
            if self.edits is not None and (factor is not None or added is not None):
                self.edits.set(token, factor, added)
        self._num_read = len(output_ids)

    def allowed(self, vocab_size: int) -> TokenSet | None:
        """Give the tokens of allowed_token_ids; None: all."""
        if self._allowed is None and self._params.allowed_token_ids is not None:
            self._allowed = TokenSet(sorted({*self._params.allowed_token_ids}), vocab_size)
        return self._allowed

    @property
    def is_over(self) -> bool:
        """No later token's logits are changed: there was a minimum length alone."""
        is_steady = self._bad_words is None and self.edits is None and self._params.allowed_token_ids is None
        return is_steady and self._num_read >= self._params.min_tokens

    def forbidden(self, output_ids: Sequence[int], *, may_end: bool) -> list[int]:
        """List the tokens that may not be next. `may_end`: also before min_tokens, as nothing else is allowed."""
        tokens = [] if self._bad_words is None else self._bad_words.after(output_ids)
        if len(output_ids) < self._params.min_tokens and not may_end:
            tokens.extend(self._ends)
        return tokens


def history_of(request: Request, eos_token_ids: Sequence[int]) -> SamplingState | None:
    """Give the request's history, with all tokens of its output; None where it changes nothing any more."""
    history = request.history
    if not isinstance(history, SamplingState):
        history = request.history = SamplingState(request.spec, eos_token_ids)
    history.read(request.output_ids)
    request.changes_logits = not history.is_over
    return history if request.changes_logits else None


class Sampled(NamedTuple):
    token: int
    logprobs: TokenLogprobs | None


# Of a row: None if its logits have no finite maximum; an error if no token is allowed.
Outcome = Sampled | RequestError | None


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
        one, and where a request `needs_history` before the logits change. A request that stands several times has its
        next tokens there, one after the other.

        Requested log-probabilities are those of the unchanged logits.
        """
        if not requests:
            return list
        vocab = logits_SV.shape[1]
        params = [r.spec.params for r in requests]
        wants_more = (p.logprobs is not None or _cuts(p, vocab) for p in params)
        own = [i for i, wants in enumerate(wants_more) if wants or requests[i].changes_logits]
        plain = [*range(len(requests))] if not own else sorted(set(range(len(requests))) - set(own))
        plain_draws = self._draws(requests, plain, masks)
        if not own:
            drawn = self._ops.sample(logits_SV, plain_draws, slots)
            no_scores = [None] * len(requests)
            return lambda: _outcomes(logits_SV, requests, zip(plain, *drawn(), no_scores, strict=True))
        if self._chooser is None:
            self._chooser = self._ops.chooser(logits_SV)
        ended = masks.ended if masks is not None else ()
        changes = [self._change(requests[i], vocab, may_end=requests[i] in ended) for i in own]
        chosen = self._chooser(logits_SV, plain_draws, self._draws(requests, own, masks), changes, slots)
        return lambda: _outcomes(logits_SV, requests, zip([*plain, *own], *chosen(), strict=True))

    def _change(self, request: Request, vocab: int, *, may_end: bool) -> Change:
        p = request.spec.params
        cut = (p.top_k, p.top_p) if _cuts(p, vocab) else (0, 1.0)
        history = history_of(request, self._eos_token_ids) if request.changes_logits else None
        if history is None:
            return Change(None, (), None, *cut, p.logprobs)
        forbidden = dict.fromkeys(history.forbidden(request.output_ids, may_end=may_end))
        return Change(history.edits, [*forbidden], history.allowed(vocab), *cut, p.logprobs)

    def _draws(self, requests: Sequence[Request], rows: Sequence[int], masks: Masks | None) -> Draws:
        params = [requests[i].spec.params for i in rows]
        temperature = [p.temperature if p.temperature >= _GREEDY_BELOW else 0.0 for p in params]
        numbered = [*_numbered(requests)]
        mask_of = {} if masks is None else {row: m for m, row in enumerate(_numbered(masks.requests))}
        return Draws(
            rows,
            temperature,
            [p.min_p for p in params],
            [self._uniform(*numbered[i]) if t else 0.0 for i, t in zip(rows, temperature, strict=True)],
            [mask_of.get(numbered[i], -1) for i in rows],
            None if masks is None else torch.from_numpy(masks.words_MW),
        )

    def _uniform(self, request: Request, number: int = 0) -> float:
        """A number in [0, 1): a function of the token's position and the seed, or the request if it has no seed.
        `number`: of its next tokens.
        """
        seed = request.spec.params.seed
        key, name = (self._salt, request.arrival) if seed is None else (b"", seed)
        position = len(request.output_ids) + request.num_in_flight + number
        digest = blake2b(f"{name}:{position}".encode(), digest_size=8, key=key).digest()
        return (int.from_bytes(digest, "little") >> 12) * 2.0**-52


def _numbered(requests: Iterable[Request]) -> Iterator[tuple[Request, int]]:
    """Give each request with the number of times that it stood just before."""
    last, number = None, 0
    for request in requests:
        last, number = request, number + 1 if request is last else 0
        yield request, number


def needs_history(request: Request) -> bool:
    """Say whether its next token is drawn only when all tokens before it have been read."""
    return request.changes_logits or request.spec.params.structured is not None or request.ends_thought


def _outcomes(
    logits_SV: Tensor, requests: Sequence[Request], found: Iterable[tuple[int, int, float, Scores | None]]
) -> list[Outcome]:
    """`found`: of each row its number, its token, its best logit and its scores."""
    out: list[Outcome] = [None] * len(requests)
    for row, token, best, scores in found:
        if math.isfinite(best):
            out[row] = Sampled(token, None if scores is None else logprobs_of(scores))
        elif needs_history(requests[row]) and math.isfinite(logits_SV[row].max()):
            out[row] = RequestError(
                "no token is left that the answer's constraint, allowed_token_ids, bad_words and min_tokens allow "
                "together; relax one of them"
            )
    return out


def _cuts(params: SamplingParams, vocab: int) -> bool:
    """Say whether top-k or top-p may take something away."""
    return params.temperature >= _GREEDY_BELOW and (0 < params.top_k < vocab or params.top_p < 1)
