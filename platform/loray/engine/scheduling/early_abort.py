"""Requests that cannot have their first token in time are refused (S-LoRA's early abort).

`StepTimeModel` says what a prompt costs. A throughput would not do: the tokens per second of one decoding request do
not predict those of a prompt.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

from loray.engine.request import Request, RequestState, StepWork
from loray.engine.scheduling.fairness import INPUT_WEIGHT, OUTPUT_WEIGHT, FairQueue
from loray.engine.scheduling.step_budget import StepTimeModel, room_for_prompts
from loray.errors import Overloaded

_MIN_RETRY_S = 1.0


class Backlog(NamedTuple):
    """The work served before a request: fractions of requests that wait, tokens of prompts, and seconds for them."""

    num_requests: float = 0
    num_tokens: float = 0
    seconds: float = 0

    def plus(self, other: Backlog, share: float = 1.0) -> Backlog:
        return Backlog(*(a + share * b for a, b in zip(self, other, strict=True)))


def ahead_of(
    request: Request,
    others: Iterable[Request],
    fair: FairQueue,
    seconds: Callable[[Request], float],
    mean_output: float,
) -> Backlog:
    """Return what of `others`, whose prompts are not computed, will be served before `request`: all requests of better
    priority, of its tenant those before it in the queue, and of every other tenant the share by which its counter is
    behind by then. O(others).

    seconds      to compute what is left of a request's prompt
    mean_output  tokens that a request generates, the mean
    """
    own, rank = request.tenant, (fair.virtual_finish(request), request.arrival)
    better = Backlog()
    queued = {own: [Backlog()]}
    for other in others:
        if other is request or other.priority > request.priority:
            continue
        before = Backlog(other.state is RequestState.WAITING, other.num_pending, seconds(other))
        if other.priority < request.priority:
            better = better.plus(before)
        elif other.tenant != own or (fair.virtual_finish(other), other.arrival) < rank:
            queued.setdefault(other.tenant, []).append(before)
    finish = fair.lifted(own) + _service(queued[own], mean_output)
    for tenant, backlogs in queued.items():
        share = 1.0
        if tenant != own:
            share = min(1.0, max(0.0, (finish - fair.counter(tenant)) / _service(backlogs, mean_output)))
        for backlog in backlogs:
            better = better.plus(backlog, share)
    return better


def _service(backlogs: Collection[Backlog], mean_output: float) -> float:
    return INPUT_WEIGHT * sum(b.num_tokens for b in backlogs) + OUTPUT_WEIGHT * len(backlogs) * mean_output


class TtftEstimate:
    """Estimates the seconds until the first token of a request that waits behind others. They are 0 before a step was
    measured, so that no request is refused on a guess.
    """

    def __init__(
        self, steps: StepTimeModel, *, max_num_seqs: int, max_num_batched_tokens: int, itl_slo_s: float | None = None
    ) -> None:
        self._steps, self._itl_slo_s = steps, itl_slo_s
        self._max_num_seqs, self._max_tokens = max_num_seqs, max_num_batched_tokens

    def prompt_seconds(self, request: Request) -> float:
        """Return the seconds that what is left of its prompt takes, without the fixed cost of steps."""
        scored = request.num_pending if request.needs_prompt_logits else 0
        return self._steps.predict(StepWork.of(request.num_computed, request.num_pending, scored))

    def seconds(self, ahead: Backlog, decoding: StepWork, num_running: int = 0, mean_output: float = 0) -> float:
        """Return the estimate. `ahead`: the requests before it and itself; `decoding`: a step without prompts. If the
        batch has no place for all of them, so many requests must end first; in a full batch one ends every
        mean_output ÷ max_num_seqs steps.
        """
        must_end = max(0.0, num_running + ahead.num_requests - self._max_num_seqs)
        room = room_for_prompts(self._steps, decoding, self._itl_slo_s, alone=not decoding.num_decoded)
        num_steps = max(
            1.0, ahead.num_tokens / self._max_tokens, ahead.seconds / room, must_end * mean_output / self._max_num_seqs
        )
        return num_steps * self._steps.predict(decoding) + ahead.seconds


class TtftSlo:
    """Refuses requests whose first token would come too late. A request that has been admitted is never refused."""

    def __init__(
        self,
        *,
        ttft_slo_s: float | None,
        estimate: Callable[[Request], float],
        alone: Callable[[Request], float],
        clock: Callable[[], float],
    ) -> None:
        """
        ttft_slo_s  for requests without one of their own
        estimate    seconds to the first token of a request that joins the queue now
        alone       the same, of a request that is next
        """
        self._ttft_slo_s, self._estimate, self._alone, self._clock = ttft_slo_s, estimate, alone, clock
        self.num_aborted = 0
        self._deadlines: list[tuple[float, int, Request]] = []  # a heap

    def accept(self, request: Request) -> None:
        """Raise Overloaded if its first token is expected later than its target."""
        slo = self._slo(request)
        if slo is None:
            return
        expected = self._estimate(request)
        if expected > slo:
            self.num_aborted += 1
            raise Overloaded(
                f"the first token is expected in {expected:.1f} s and was wanted within {slo:g} s",
                self.retry_after_s(request, expected),
            )
        request.start_by = self._clock() + slo - self._alone(request)
        heapq.heappush(self._deadlines, (request.start_by, request.arrival, request))

    def next_deadline(self) -> float:
        """Return when the first waiting request will be too late, in seconds of the clock; infinite if none will."""
        while self._deadlines:
            start_by, _, request = self._deadlines[0]
            if request.state is RequestState.WAITING and request.start_by == start_by:
                return start_by
            heapq.heappop(self._deadlines)
        return math.inf

    def refuse_late(self) -> list[tuple[Request, Exception]]:
        """Return the waiting requests that would be too late even if they were next, each with its error, once."""
        now = self._clock()
        late: list[Request] = []
        while self.next_deadline() <= now:
            late.append(heapq.heappop(self._deadlines)[2])
        if not late:
            return []
        self.num_aborted += len(late)
        expected = self._estimate(late[-1])  # one estimate for all: making it scans the queue
        return [
            (r, Overloaded(f"no first token within {self._slo(r):g} s", self.retry_after_s(r, expected))) for r in late
        ]

    def retry_after_s(self, request: Request, expected: float) -> float:
        """Return the seconds until the expected wait has fallen to the target of `request`."""
        return max(_MIN_RETRY_S, expected - (self._slo(request) or 0))

    def expected_retry_s(self, request: Request) -> float:
        """Return the same for a request that would join the queue now."""
        return self.retry_after_s(request, self._estimate(request))

    def _slo(self, request: Request) -> float | None:
        """None: the request has no target, or its first token is an earlier engine's."""
        if request.is_continued:
            return None
        return self._ttft_slo_s if request.spec.ttft_slo_s is None else request.spec.ttft_slo_s
