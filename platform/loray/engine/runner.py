"""`ModelRunner`, which launches steps and reads what they gave.

A captured decode step is launched before the tokens of the step before it have been read: the device has drawn them,
and takes them from where they are (`TokenSlots`). So while a device computes a step, the host reads the one before it
and schedules the one after it. A token that ends its request without anybody having known leaves a row of the next
step without use, whose result is dropped.

Every other step is read at once: one with a prompt or on a CPU; of several ranks, since one of them draws; with a
request whose next token depends in Python on those before it (`needs_history`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import NamedTuple

import torch

from loray.engine.metrics import Counters
from loray.engine.model.batch import Batch, Scored
from loray.engine.model.decode_batch import DecodeBatch, Resident
from loray.engine.model.decoder import Decoder
from loray.engine.pool.pool import Pool
from loray.engine.request import Chunk, Request, RequestState, StepWork
from loray.engine.sampling.grammar import Grammars
from loray.engine.sampling.logprobs import PromptScores
from loray.engine.sampling.pooling import PooledStates
from loray.engine.sampling.sampler import Outcome, Sampled, Sampler, needs_history
from loray.spec import TokenLogprobs


class NextToken(NamedTuple):
    """The next token of a request. `was_guessed`: its keys and values have been computed with those before it."""

    request: Request
    outcome: Outcome
    was_guessed: bool = False


class StepResults(NamedTuple):
    """The results of one step, for requests that have not ended.

    computed  the requests of the step's chunks
    outcomes  of those that were sampled, each one's in order: where guesses were right, more than one
    scores    of parts of prompts; None if they are not finite
    """

    computed: list[Request]
    outcomes: list[NextToken]
    scores: list[tuple[Scored, list[TokenLogprobs] | None]]


class _Launched(NamedTuple):
    chunks: Sequence[Chunk]
    num_tokens: int
    batch: Batch | DecodeBatch
    work: StepWork
    began: float
    scores: PromptScores
    outcomes: Callable[[], list[Outcome]]
    computed: torch.cuda.Event | None  # None: what is read of it has been
    is_ahead: bool  # the next step can be launched before this one is read


class ModelRunner:
    """Runs steps, in one thread. `observe` gets the work of steps and their seconds."""

    def __init__(
        self,
        model: Decoder,
        pool: Pool,
        sampler: Sampler,
        grammars: Grammars,
        counters: Counters,
        resident: Resident,
        observe: Callable[[StepWork, float], None],
    ) -> None:
        self._model, self._pool, self._sampler, self._grammars = model, pool, sampler, grammars
        self._counters, self._resident, self._observe = counters, resident, observe
        self._launched: deque[_Launched] = deque()  # the oldest first, at most two
        self._last_chunks: deque[Sequence[Chunk]] = deque([()], maxlen=2)  # the older ones may be in flight
        self._read_at = 0.0
        self._on_gpu = pool.tensor.is_cuda

    def launch(self, chunks: Sequence[Chunk], work: StepWork) -> bool:
        """Queue a step of `chunks`, or of those whose turn it is; `work` is that of all. False, and nothing has
        happened, if it needs tokens that are in flight. Nothing is kept of a step whose launch fails, but what its
        chunks' requests count as computed.
        """
        began = time.monotonic()
        self._last_chunks.append(chunks)
        batch = self._model.batch(chunks, self._resident, self._pool)
        if batch is None:
            return False
        if len(batch.chunks) < len(chunks):  # of each of which one token is computed
            chunks, keys = batch.chunks, sum(chunk.start + 1 for chunk in batch.chunks)
            self._last_chunks[-1], work = chunks, StepWork(1, len(chunks), keys)
        self._counters.scheduled((chunk.request for chunk in chunks), began)
        scores = PromptScores(batch.scored)
        self._grammars.begin_guesses(batch.sampled)
        logits_SV = self._model.forward(batch, self._pool, scores.add, PooledStates(batch.pooled).add)
        for chunk in chunks:
            chunk.request.num_computed += chunk.num_tokens - len(chunk.guesses)
            self._counters.computed(chunk.request)
        requests = [chunk.request for chunk in batch.sampled for _ in range(1 + len(chunk.guesses))]
        slots = self._model.slots(batch)
        is_ahead = slots is not None and not any(map(needs_history, requests))
        with torch.inference_mode():
            outcomes = self._sampler(logits_SV, requests, self._grammars.masks(requests), slots)
        for chunk in batch.sampled:
            chunk.request.num_in_flight += 1
        computed = None
        if self._on_gpu and not (batch.sampled or batch.scored):
            # Nothing is read of it, so it has only been queued. Other streams, on which adapters are copied, go on.
            computed = torch.cuda.Event()  # type: ignore[no-untyped-call]
            computed.record()
        num_tokens = sum(chunk.num_tokens for chunk in chunks)
        self._launched.append(_Launched(chunks, num_tokens, batch, work, began, scores, outcomes, computed, is_ahead))
        return True

    @property
    def last_chunks(self) -> Sequence[Chunk]:
        """The chunks of the last step that was launched, or should have been."""
        return self._last_chunks[-1]

    @property
    def last_adapters(self) -> frozenset[str]:
        """Digests of the adapters in the last step that was launched, or in the one that was in flight then."""
        requests = (chunk.request for chunks in self._last_chunks for chunk in chunks)
        return frozenset(r.adapter.digest for r in requests if r.adapter is not None)

    def forget(self) -> None:
        """Hold no request of the last steps, which nobody asks for once all have ended."""
        self._last_chunks.extend(((), ()))

    @property
    def num_in_flight(self) -> int:
        """The number of steps that have not been read."""
        return len(self._launched)

    @property
    def num_ahead(self) -> int:
        """The number of them that need not be read before the next step is scheduled: the last one, or none."""
        return int(bool(self._launched) and self._launched[-1].is_ahead)

    @contextmanager
    def collected(self) -> Iterator[StepResults]:
        """Read the oldest step in flight, which ends where the context does."""
        step = self._launched.popleft()
        batch = step.batch
        for chunk in batch.sampled:
            chunk.request.num_in_flight -= 1
        with torch.inference_mode():
            outcomes, scores = step.outcomes(), [*step.scores.of(batch.scored)]
        yield StepResults(
            [chunk.request for chunk in step.chunks if chunk.request.state is not RequestState.FINISHED],
            [*self._next_tokens(batch.sampled, outcomes)],
            scores,
        )
        if step.computed is not None:
            step.computed.synchronize()
        now = time.monotonic()
        seconds, self._read_at = now - max(step.began, self._read_at), now
        self._observe(step.work, seconds)
        self._counters.stepped(step.num_tokens, len(batch.residents), seconds)

    def _next_tokens(self, sampled: Sequence[Chunk], outcomes: Sequence[Outcome]) -> Iterator[NextToken]:
        """Give the tokens of requests that have not ended. What follows a guess counts while the guess is what was
        drawn; where what follows is no token, the next step finds out again, as if nothing had been guessed.
        """
        rows = iter(outcomes)
        for chunk in sampled:
            outcome, *others = islice(rows, 1 + len(chunk.guesses))
            if chunk.request.state is RequestState.FINISHED:
                continue
            self._counters.num_draft_tokens += len(chunk.guesses)
            for guess, following in zip(chunk.guesses, others, strict=True):
                if not (isinstance(outcome, Sampled) and outcome.token == guess and isinstance(following, Sampled)):
                    break
                yield NextToken(chunk.request, outcome, was_guessed=True)
                outcome = following
            yield NextToken(chunk.request, outcome)
