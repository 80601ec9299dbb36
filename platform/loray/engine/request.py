"""One generation request inside the engine: its tokens, how far they are computed, and arithmetic about that alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, NamedTuple

from loray.spec import AdapterRef, SamplingParams

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """What a caller submits. `adapter` None is the base model."""

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    adapter: AdapterRef | None = None


class State(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class TokenLogprobs(NamedTuple):
    """Natural logarithms, of the distribution before temperature and penalties. `top`: (token, logprob), best first."""

    logprob: float
    top: tuple[tuple[int, float], ...]


class TokenOutput(NamedTuple):
    """One step's result for one request: a token, or the error that ended it."""

    request_id: str
    token_id: int | None
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    error: Exception | None = None


@dataclass(slots=True, eq=False)
class Request:
    """Written by the scheduler (state, blocks), the engine (output_ids, num_computed) and nobody else.

    `queued_at`: seconds of the engine's clock; None once it has been scheduled for the first time.
    """

    spec: GenerateRequest
    arrival: int
    state: State = State.WAITING
    output_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_prompt_counted: int = 0
    queued_at: float | None = None
    blocks: list[int] = field(default_factory=list)

    @property
    def request_id(self) -> str:
        return self.spec.request_id

    @property
    def adapter(self) -> AdapterRef | None:
        return self.spec.adapter

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.spec.prompt_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.spec.prompt_ids) + len(self.output_ids)

    @property
    def num_pending(self) -> int:
        """Tokens known but not yet in the KV cache; 1 while decoding."""
        return self.num_tokens - self.num_computed

    @property
    def max_tokens(self) -> int:
        """Tokens in the KV cache when the request has run to its limit."""
        return self.num_prompt_tokens + self.spec.params.max_tokens

    def tokens(self, start: int, stop: int) -> list[int]:
        """Tokens [start, stop) of prompt and output."""
        n = self.num_prompt_tokens
        return [*self.spec.prompt_ids[start:stop], *self.output_ids[max(start - n, 0) : max(stop - n, 0)]]
