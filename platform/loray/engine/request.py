"""One request inside the engine: `Request`, `Chunk` (its part of a step), `SchedulerOutput` (what a step computes)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from loray.spec import (
    BACKGROUND_PRIORITY,
    NEVER,
    AdapterRef,
    FinishReason,
    GenerateRequest,
    PoolingParams,
    TokenDelta,
    TokenLogprobs,
)


class RequestState(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class TokenOutput(NamedTuple):
    """The result of one step for one request: a token, or the error that ended it, or neither if max_tokens is 0 or a
    part of the prompt has been scored; an embedding with the finish reason.

    `prompt_logprobs` are those of the prompt's tokens from the second on, in parts: each step's are in its result, the
    last ones with the first token or the finish reason.
    """

    request_id: str
    token_id: int | None
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    embedding: tuple[float, ...] | None = None

    @property
    def delta(self) -> TokenDelta:
        return TokenDelta(
            token_ids=() if self.token_id is None else (self.token_id,),
            finish_reason=self.finish_reason,
            num_cached_tokens=self.num_cached_tokens,
            logprobs=None if self.logprobs is None else (self.logprobs,),
            prompt_logprobs=self.prompt_logprobs,
            embedding=self.embedding,
        )


@dataclass(slots=True, eq=False)
class Request:
    """The scheduler writes `state`, `num_computed`, `blocks` and the fields after it. The engine and its runner write
    `output_ids`, `num_scored`, `prompt_logprobs`, `num_computed` and `num_in_flight`; the counters write
    `num_prompt_counted` and `queued_at`. Nothing else writes.

    active_from         the token from which its adapter is active, see `AdapterRef.active_from`; 0 without an adapter
    blocks              a list that only grows: where a block is replaced or moved there is a new list
    queued_at           seconds of the engine's clock; None after it has been scheduled for the first time
    decoding_since      seconds of the scheduler's clock; infinite before its first token
    start_by            seconds of the scheduler's clock; infinite without a target, and after it has been admitted
    token_weight        see fairness.token_weight; 0 until it has been admitted
    virtual_finish      see fairness; infinite until it could run for the first time
    charged_until       tokens of its prompt that have been computed or found in the prefix cache, now or before
    num_input_charged   those of them for which its tenant has been charged; num_output_charged: of `output_ids`
    prefix_is_coming    from host memory: None before that was looked for, False when it has come
    num_overtaken       how often a later request whose adapter was in the pool went first
    pooled              sums of hidden states, by the first token of the chunk; `sampling.pooling` writes it
    changes_logits      the sampler writes it and `history`, see `sampling.sampler`
    ngrams              the scheduler's index of its tokens, see `scheduling.speculation`
    num_in_flight       tokens of its output that a device has drawn, or will, and that nobody has read; see `runner`
    awaits_mask         it is in no step before its next token's mask has been computed; `sampling.grammar` writes it
    ends_thought        one of its next tokens may have to close its thought; `sampling.grammar` writes it as well
    """

    spec: GenerateRequest
    arrival: int
    state: RequestState = RequestState.WAITING
    output_ids: list[int] = field(default_factory=list)
    num_scored: int = 0  # tokens of its prompt, from the second on, whose log-probabilities are known
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # those that have not been returned yet
    num_computed: int = 0
    num_prompt_counted: int = 0
    queued_at: float | None = None
    blocks: list[int] = field(default_factory=list)
    num_shared_blocks: int = 0  # the first of `blocks`, known to the prefix cache
    prefix_is_coming: bool | None = None
    num_freed_blocks: int = 0  # the first of `blocks`, behind the window of every layer: they are not its own any more
    num_cached_tokens: int | None = None  # of the prompt, found in the prefix cache at the first start
    decoding_since: float = math.inf
    start_by: float = math.inf
    token_weight: float = 0.0
    virtual_finish: float = math.inf
    charged_until: int = 0
    num_input_charged: int = 0
    num_output_charged: int = field(init=False)
    active_from: int = field(init=False)
    num_overtaken: int = 0
    changes_logits: bool = field(init=False)
    history: object | None = None
    pooled: dict[int, object] = field(default_factory=dict)
    ngrams: object | None = None
    num_in_flight: int = 0
    awaits_mask: bool = False
    ends_thought: bool = False

    def __post_init__(self) -> None:
        self.changes_logits = self.spec.params.changes_logits
        self.output_ids = [*self.spec.output_ids, *self.output_ids]
        self.num_output_charged = len(self.spec.output_ids)
        ref = self.spec.adapter
        self.active_from = 0 if ref is None else ref.active_from(self.spec.prompt_ids)

    @property
    def request_id(self) -> str:
        return self.spec.request_id

    @property
    def adapter(self) -> AdapterRef | None:
        return self.spec.adapter

    @property
    def adapter_digest(self) -> str | None:
        return None if self.spec.adapter is None else self.spec.adapter.digest

    @property
    def kv_digest(self) -> str | None:
        """The adapter that its keys and values depend on: None where that is the base, or an adapter that its prompt
        does not invoke.
        """
        return None if self.active_from == NEVER else self.adapter_digest

    @property
    def held_blocks(self) -> list[int]:
        return self.blocks[self.num_freed_blocks :]

    @property
    def needs_prompt_logits(self) -> bool:
        """The prompt's tokens are to be scored."""
        wanted = self.spec.params.prompt_logprobs is not None and not self.is_continued
        return wanted and self.num_scored < self.num_prompt_tokens - 1

    @property
    def needs_whole_prompt(self) -> bool:
        """Each token of the prompt is computed, and the prefix cache is not used."""
        return self.needs_prompt_logits or (self.spec.pooling is not None and self.spec.pooling.kind == "mean")

    @property
    def has_constraint(self) -> bool:
        """The answer must match a constraint, which is compiled before the request can run."""
        return self.spec.params.structured is not None

    @property
    def is_continued(self) -> bool:
        """The first tokens, and the prompt's log-probabilities, are another engine's."""
        return bool(self.spec.output_ids)

    @property
    def num_generated(self) -> int:
        """The number of tokens of the output that this engine has generated."""
        return len(self.output_ids) - len(self.spec.output_ids)

    @property
    def tenant(self) -> str:
        return self.spec.tenant

    @property
    def priority(self) -> int:
        return self.spec.priority

    @property
    def is_background(self) -> bool:
        """It may hardly lengthen the steps of others, see `scheduling.background`."""
        return self.spec.priority >= BACKGROUND_PRIORITY

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.spec.prompt_ids)

    @property
    def num_tokens(self) -> int:
        """The number of tokens of prompt and output, those in flight included."""
        return len(self.spec.prompt_ids) + len(self.output_ids) + self.num_in_flight

    @property
    def ends_in_flight(self) -> bool:
        """A token in flight is its last, whatever it is."""
        return self.num_in_flight > 0 and self.num_tokens >= self.max_tokens

    @property
    def num_pending(self) -> int:
        """The number of tokens not yet in the KV cache; while decoding 1, and those that a constraint has forced."""
        return self.num_tokens - self.num_computed

    @property
    def max_tokens(self) -> int:
        """The number of tokens of prompt and output at the request's limit."""
        return self.num_prompt_tokens + self.spec.params.max_tokens

    def tokens(self, start: int, stop: int) -> list[int]:
        """Give tokens [start, stop) of prompt and output, none of them in flight."""
        n = self.num_prompt_tokens
        return [*self.spec.prompt_ids[start:stop], *self.output_ids[max(start - n, 0) : max(stop - n, 0)]]


class StepWork(NamedTuple):
    """The work of a step, or of a part of it, in the quantities on which its time depends.

    num_steps    1 for a whole step: the weights are read once
    num_decoded  requests of which one token is computed
    num_keys     tokens whose keys and values are read, summed over the requests
    num_prompt   tokens of longer chunks
    num_pairs    (query, key) pairs of longer chunks
    num_scored   tokens of prompts whose log-probabilities are computed
    """

    num_steps: float = 0
    num_decoded: float = 0
    num_keys: float = 0
    num_prompt: float = 0
    num_pairs: float = 0
    num_scored: float = 0

    def plus(self, other: StepWork) -> StepWork:
        return StepWork(*(a + b for a, b in zip(self, other, strict=True)))

    @classmethod
    def of(cls, start: int, num_tokens: int, num_scored: int = 0) -> StepWork:
        """Compute the work of tokens [start, start + num_tokens) of one request."""
        if num_tokens == 1:
            return cls(num_decoded=1, num_keys=start + 1, num_scored=num_scored)
        pairs = num_tokens * start + num_tokens * (num_tokens + 1) // 2
        return cls(num_keys=start + num_tokens, num_prompt=num_tokens, num_pairs=pairs, num_scored=num_scored)


class Chunk(NamedTuple):
    """Compute tokens [start, start + num_tokens) of `request` in this step. The last of them are `guesses`: what may
    follow its newest token. Of those that are wrong, keys and values are written again.
    """

    request: Request
    start: int
    num_tokens: int
    guesses: tuple[int, ...] = ()

    @property
    def is_last(self) -> bool:
        """The chunk reaches the request's newest token, so that its logits are sampled."""
        return self.start + self.num_tokens == self.request.num_tokens + len(self.guesses)

    @property
    def parts(self) -> tuple[Chunk, ...]:
        """The chunk, cut where its request's adapter becomes active: the tokens before are the base's."""
        at, stop = self.request.active_from, self.start + self.num_tokens
        if not self.start < at < stop:
            return (self,)
        return Chunk(self.request, self.start, at - self.start), Chunk(self.request, at, stop - at, self.guesses)

    @property
    def scored(self) -> range:
        """The tokens of the chunk whose successors in the prompt are scored: after a preemption some have been
        scored already.
        """
        request = self.request
        if not request.needs_prompt_logits:
            return range(0)
        first = max(self.start, request.num_scored)
        return range(first, max(first, min(self.start + self.num_tokens, request.num_prompt_tokens - 1)))

    @property
    def pooled(self) -> range:
        """The tokens of the chunk whose hidden states the request's embedding is made of."""
        stop = self.start + self.num_tokens
        match self.request.spec.pooling:
            case PoolingParams(kind="mean"):
                return range(self.start, stop)
            case PoolingParams(kind="last") if self.is_last:
                return range(stop - 1, stop)
            case _:
                return range(0)

    @property
    def work(self) -> StepWork:
        return StepWork.of(self.start, self.num_tokens, len(self.scored))


class SchedulerOutput(NamedTuple):
    """The scheduler's decision for a step.

    failed          requests that will not run, and why
    adapters_moved  an adapter has moved, or a row that no other stands for was preempted: schedule again at once
    work            of the whole step
    """

    chunks: list[Chunk]
    failed: list[tuple[Request, Exception]]
    adapters_moved: bool
    work: StepWork
