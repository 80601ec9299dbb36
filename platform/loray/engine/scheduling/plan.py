"""What the scheduler decides for one step: chunks of requests, and how much work they are."""

from __future__ import annotations

from typing import NamedTuple

from loray.engine.request import Request


class Work(NamedTuple):
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

    def plus(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    @classmethod
    def of(cls, start: int, num_tokens: int, num_scored: int = 0) -> Work:
        """Of tokens [start, start + num_tokens) of one request."""
        if num_tokens == 1:
            return cls(num_decoded=1, num_keys=start + 1, num_scored=num_scored)
        pairs = num_tokens * start + num_tokens * (num_tokens + 1) // 2
        return cls(num_keys=start + num_tokens, num_prompt=num_tokens, num_pairs=pairs, num_scored=num_scored)


class Chunk(NamedTuple):
    """Compute tokens [start, start + num_tokens) of `request` in this step."""

    request: Request
    start: int
    num_tokens: int

    @property
    def is_last(self) -> bool:
        """True where the chunk reaches the request's newest token, so that its logits are sampled."""
        return self.start + self.num_tokens == self.request.num_tokens

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
    def work(self) -> Work:
        return Work.of(self.start, self.num_tokens, len(self.scored))


class Plan(NamedTuple):
    """`failed` will not run. `residency_changed`: an adapter has moved: plan again at once.
    `work`: of the whole step.
    """

    chunks: list[Chunk]
    failed: list[tuple[Request, Exception]]
    residency_changed: bool
    work: Work
