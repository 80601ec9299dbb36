"""Tokens that are guessed, so that one step gives a request several: n-gram speculation, without a model of its own.

A step of few requests takes about as long as reading the weights does, and a few rows more cost little. So a request
that repeats its prompt or itself (a quotation, code, JSON) computes beside its newest token those that followed when
its latest tokens stood there before. The sampler draws after each of them what it would have drawn without; while that
is the guess, the next row counts too. So guesses change how fast tokens come, and never which.

Sources: Saxena, "Prompt Lookup Decoding", 2023; Leviathan et al., "Fast Inference from Transformers via Speculative
Decoding", ICML 2023 (what k guesses are expected to give, here with a chance for each of them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from loray.engine.request import Chunk, Request, StepWork
from loray.engine.scheduling.step_budget import MIN_CHUNK, StepTimeModel

MAX_GUESSES = MIN_CHUNK - 1
MAX_MATCH = 8  # tokens; longer matches are as good
_LEAST_CHANCE = 0.2  # of a guess; below, the chances are known too badly to gain by it
_ROW = 1.25  # times of its time that a guessed row must be worth: chances that look good are often too high
_CANDIDATES = 8  # places that are compared for the longest match
_PIECE = 4096  # tokens of a prompt that are taken in a step
_LEAD, _KEPT, _MOST_OWNERS = 4, 512, 256  # tokens before an answer, and of the answers that are kept, and of how many
_NEW, _NEW_OF_ALL = 0.2, 0.02  # weight of what has just come in a rate of one request, and in one of all
_FIRST_RATE = 0.3  # before anything has come


_Owner = tuple[str, str | None, str]


def new_rates() -> list[float]:
    """Give the rates before anything has come, by the length of a match up to MAX_MATCH."""
    return [_FIRST_RATE] * (MAX_MATCH + 1)


class NgramIndex:
    """The tokens of one request, and where the latest of them stood before: the longest match, of equals the last one.

    Each pair of tokens knows where the same pair ended before it, as in LZ77 with hash chains. So a token costs a
    bounded time, however long the text is; while the next token is the guessed one, the match only moves on.

    length  of the match; 0: there is none
    rates   by the length of a match, how often the token after it was the one that came. Nothing is computed for that:
            what would have been guessed is compared with what comes, guessed or not. So a request that stops repeating
            itself costs nothing, and one that begins is noticed at once.
    """

    def __init__(self, of_all: list[float], earlier: Sequence[int] = ()) -> None:
        """`of_all`: the rates of all requests, with which this one begins, and which it changes. `earlier`: tokens that
        are looked at as if they stood before the prompt.
        """
        self.rates, self._of_all = [*of_all], of_all
        self._num_earlier = len(earlier)
        self._tokens: list[int] = []
        self._before: list[int] = []  # by place: where the pair that ends there ended before; 0: nowhere
        self._latest: dict[int, int] = {}  # by pair: where it ended last
        self._next = 0  # the place after the match: what stands there is guessed
        self.length = 0
        for token in earlier:
            self._append(token)

    def read(self, request: Request) -> bool:
        """Take in what is new of its prompt and output; False if there is more, for a later call."""
        known, first_output = len(self._tokens) - self._num_earlier, request.num_prompt_tokens
        stop = min(request.num_tokens, known + _PIECE)
        new = request.tokens(known, stop)
        num_prompt = max(0, min(first_output, stop) - known)
        for token in islice(new, num_prompt):
            self._append(token)
        if num_prompt and stop >= first_output:
            self._find()
        for token in islice(new, num_prompt, None):
            is_hit = False
            if self.length:
                is_hit, i = self._tokens[self._next] == token, min(self.length, MAX_MATCH)
                self.rates[i] += _NEW * (is_hit - self.rates[i])
                self._of_all[i] += _NEW_OF_ALL * (is_hit - self._of_all[i])
            self._append(token)
            if is_hit:
                self._next += 1
                self.length += 1
            else:
                self._find()
        return stop == request.num_tokens

    def chances(self, least: float, most: int) -> list[float]:
        """Give the chances that the first guess is right, that the first two are, and so on: as long as they are more
        than `least`, and at most `most`.
        """
        out: list[float] = []
        chance = 1.0
        for length in range(self.length, self.length + most) if self.length else ():
            chance *= self.rates[min(length, MAX_MATCH)]
            if chance <= least:
                break
            out.append(chance)
        return out

    def guesses(self, num: int) -> list[int]:
        """Give the next tokens, if there is a match. One that reaches the end goes on with what it has guessed: the
        text repeats itself.
        """
        period, out = len(self._tokens) - self._next, self._tokens[self._next : self._next + num]
        while len(out) < num:
            out.append(out[len(out) - period])
        return out

    def _append(self, token: int) -> None:
        place = len(self._tokens)
        self._tokens.append(token)
        if not place:
            self._before.append(0)
            return
        pair = self._tokens[place - 1] << 32 | token
        self._before.append(self._latest.get(pair, 0))
        self._latest[pair] = place

    def _find(self) -> None:
        """Find the longest match among the latest ones."""
        tokens, last = self._tokens, len(self._tokens) - 1
        self.length, at = 0, self._before[last]
        for _ in range(_CANDIDATES):
            if not at:
                return
            n = 2
            while n < MAX_MATCH and n <= at and tokens[at - n] == tokens[last - n]:
                n += 1
            if n > self.length:
                self.length, self._next = n, at + 1
            if n == MAX_MATCH:
                return
            at = self._before[at]


class Speculation:
    """Says which tokens a step guesses. It owns the `ngrams` of requests.

    A request also looks at the latest answers to its tenant with its adapter and cache salt: what such an adapter
    writes, an object's keys or an address, is often the same. The salt keeps apart who may not notice it by the time.

    allowed  leaves of a request's guesses the first ones that its constraint allows
    """

    def __init__(
        self,
        steps: StepTimeModel,
        allowed: Callable[[Request, Sequence[int]], Sequence[int]] = lambda request, guesses: guesses,
    ) -> None:
        self._steps, self._allowed, self._rates = steps, allowed, new_rates()
        self._answers: dict[_Owner, list[int]] = {}  # the owner of the latest one is last

    def guesses(self, chunks: Sequence[Chunk], work: StepWork, most: int) -> Iterator[tuple[int, Sequence[int]]]:
        """Give the places of chunks that guess, and their guesses: of all together at most `most`, so many that the
        expected tokens of a second are most. `work` is that of the chunks, each of which gives its request a token.

        A guess of chance p adds p tokens and the time of a row. It is worth it if p ÷ that time is more than what the
        step has without it; so guesses are taken by their chances, until one is not worth it. Where a step is bound by
        operations, a row costs about what a token does, and none is.
        """
        seconds, row_s = self._steps.predict(work), _ROW * self._steps.predict(StepWork(num_decoded=1, num_keys=1))
        if not seconds or row_s * len(chunks) >= seconds:
            return
        least = max(_LEAST_CHANCE, row_s * len(chunks) / seconds)
        chances = [(chance, i) for i, chunk in enumerate(chunks) for chance in self._chances(chunk, least)]
        num_tokens, num_guesses = float(len(chunks)), dict.fromkeys((i for _, i in chances), 0)
        for chance, i in islice(sorted(chances, reverse=True), max(0, most)):
            if chance * seconds <= row_s * num_tokens:
                break
            num_tokens, seconds = num_tokens + chance, seconds + row_s
            num_guesses[i] += 1
        for i, num in num_guesses.items():
            request = chunks[i].request
            assert isinstance(request.ngrams, NgramIndex)
            if num and (found := self._allowed(request, request.ngrams.guesses(num))):
                yield i, found

    def ended(self, request: Request) -> None:
        """Keep the answer of a request that guessed, or could have."""
        if not isinstance(request.ngrams, NgramIndex):
            return
        text = request.tokens(max(0, request.num_prompt_tokens - _LEAD), request.num_tokens)
        owner = _owner(request)
        self._answers[owner] = [*self._answers.pop(owner, ()), *text][-_KEPT:]
        if len(self._answers) > _MOST_OWNERS:
            del self._answers[next(iter(self._answers))]

    def most(self, chunk: Chunk) -> int:
        """Return how many tokens the chunk's request may guess: none beyond its last one, while tokens are in flight,
        or where what changes its logits depends on the tokens before.
        """
        request = chunk.request
        if request.changes_logits or request.num_in_flight or not chunk.is_last:
            return 0
        return max(0, min(MAX_GUESSES, request.max_tokens - request.num_tokens - 1))

    def _chances(self, chunk: Chunk, least: float) -> Sequence[float]:
        request, most = chunk.request, self.most(chunk)
        if not most:
            return ()
        if not isinstance(request.ngrams, NgramIndex):
            request.ngrams = NgramIndex(self._rates, self._answers.get(_owner(request), ()))
        return request.ngrams.chances(least, most) if request.ngrams.read(request) else ()


def _owner(request: Request) -> _Owner:
    return request.tenant, request.adapter_digest, request.spec.cache_salt
