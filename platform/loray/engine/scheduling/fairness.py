"""Whose request is next: virtual token counters, one for each tenant, over queues of requests that could run.

Source: Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024 (VTC, algorithm 2). A tenant's counter is
the service that it has had: `INPUT_WEIGHT` for a prompt token that is computed, charged as the request is admitted,
and `OUTPUT_WEIGHT` for a token as it is generated, both times the weight of the adapter (`token_weight`). The waiting
tenant with the smallest counter is next. A tenant that comes back to the queue is lifted to the counter of whoever is
next, so that idleness is no credit.

Priority comes first and means what vLLM's means: a smaller number is served earlier, whoever asks. Counters decide
between tenants whose best waiting requests have the same priority. A tenant's own requests are served in order of
(priority, arrival).

Requests whose adapter is in the pool are preferred within two bounds: their tenant's counter may exceed the smallest
by `lead`, and no request is overtaken more than `MAX_OVERTAKES` times.

What this promises to two tenants f and g that both have requests of the best waiting priority throughout [t1, t2)
(the paper's theorem 4.4 with the preference's lead added; U is exact for any batch and any preemption):

    |counter_f − counter_g| ≤ lead + U      at any moment
    |service_f − service_g| ≤ 2 (lead + U)  over [t1, t2)
    U = INPUT_WEIGHT · L + OUTPUT_WEIGHT · M

L: tokens of the longest prompt. M: the largest number of tokens that one tenant's running requests may still generate,
no more than max_num_seqs · max_tokens. Both weighted. Proof: a request is admitted only while its tenant's counter is
within `lead` of the smallest; then the counter grows by the prompt and by what its running requests still generate, and
the smallest counter never falls, as those who come are lifted to it. Only a refund takes it down: the difference may
then be larger by what was given back, until its tenant, which is first now, has caught up.

A request whose tenant has the smallest counter as it comes, and nothing else in the engine, sees at most one request
of each other tenant admitted before it, and MAX_OVERTAKES more. What is computed again after a preemption is not
charged: it serves nobody. What a request was charged that fails before its first token is given back.

Of many tenants those that have nothing in the engine are forgotten, as long as their counters do not exceed the
smallest of those that wait. Whoever is not known is taken to have had what the one of them with the largest had, so
coming back wins nothing, and loses nothing but where the smallest counter has fallen since, by a refund.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

from loray.engine.request import Request

INPUT_WEIGHT = 1
OUTPUT_WEIGHT = 2
MAX_OVERTAKES = 8
_NEAR_TENANTS = 8  # how far the preference looks
_NEAR_REQUESTS = 8  # of each of them
_FORGET_ABOVE = 1024
_SPARE_PLACES = 64


class Backlog(NamedTuple):
    """What is served before a request, as a fluid: parts of requests and tokens of their prompts."""

    num_requests: float
    num_tokens: float


class _Turn(NamedTuple):
    """Tenants are served in this order; of equal counters the one whose request came first."""

    priority: int
    counter: float
    arrival: int
    tenant: str


def token_weight(adapter_bytes: int, base_bytes: int) -> float:
    """What a token costs against one of the base: both models' weights that it reads, in the dtype that they run in.

    `adapter_bytes` grows with rank and modules: a rank-64 adapter on q, k, v, o of SmolLM2-135M weighs 1.05.
    """
    return 1 + adapter_bytes / base_bytes


def rank_in_queue(request: Request) -> tuple[int, int]:
    """The order of a tenant's requests, and of running ones: the last is preempted first."""
    return request.priority, request.arrival


class FairQueue:
    """Owns the counters, and the order of those requests that could run now. O(log tenants) for each operation."""

    def __init__(self, lead: float = 0) -> None:
        """`lead`: service by which a preferred request's tenant may be ahead of the one whose turn it is."""
        self._lead = lead
        self._counters: dict[str, float] = {}
        self._queues: dict[str, list[Request]] = {}
        self._order: list[_Turn] = []  # a heap; a tenant's first place in it may be too early, never too late
        self._joined_at: dict[str, float] = {}  # what the counter of a tenant with a queue was lifted to at least
        self._num_running: Counter[str] = Counter()
        self._last = ""  # whose queue ended last
        self._forgotten = 0.0  # the largest counter that has been forgotten
        self._forget_at = _FORGET_ABOVE

    def counter(self, tenant: str) -> float:
        return self._counters.get(tenant, self._forgotten)

    def push(self, request: Request) -> None:
        tenant = request.tenant
        queue = self._queues.get(tenant)
        first = not queue or rank_in_queue(request) < rank_in_queue(queue[0])
        if not queue or request.priority < queue[0].priority:
            self._lift(tenant)
        if queue is None:
            queue = self._queues[tenant] = []
        queue.insert(bisect_left(queue, rank_in_queue(request), key=rank_in_queue), request)
        if first:
            self._move_up(tenant)

    def remove(self, request: Request) -> None:
        queue = self._queues[request.tenant]
        del queue[self._index(queue, request)]
        if not queue:
            del self._queues[request.tenant], self._joined_at[request.tenant]
            self._last = request.tenant

    def charge(self, request: Request, *, num_input: int = 0, num_output: int = 0) -> None:
        """Service that `request` gets, in tokens."""
        service = request.token_weight * (INPUT_WEIGHT * num_input + OUTPUT_WEIGHT * num_output)
        self._counters[request.tenant] = self.counter(request.tenant) + service

    def refund(self, request: Request, *, num_input: int) -> None:
        """`request` was charged and served nothing. No credit for idleness comes of it: where its tenant has come to
        the queue since, the counter falls no lower than to what it was lifted to then.
        """
        tenant = request.tenant
        counter = self.counter(tenant) - request.token_weight * INPUT_WEIGHT * num_input
        self._counters[tenant] = max(counter, self._joined_at.get(tenant, 0.0))
        if tenant in self._queues:
            self._move_up(tenant)

    def pick(self, preferred: Callable[[Request], bool]) -> Request | None:
        """Whose turn it is, or a preferred request that may overtake; it stays in the queue until `take`."""
        front = self._front()
        if front is None:
            return None
        head = self._queues[front.tenant][0]
        if preferred(head) or head.num_overtaken >= MAX_OVERTAKES:
            return head
        for tenant in self._near(front):
            for request in self._queues[tenant][:_NEAR_REQUESTS]:
                if request.priority != front.priority:
                    break
                if preferred(request):
                    return request
                if request.num_overtaken >= MAX_OVERTAKES:
                    break
        return head

    def take(self, request: Request) -> None:
        """Remove what `pick` gave, counting those that it overtakes: its own tenant's and the one whose turn it is."""
        front = self._front()
        assert front is not None
        queue = self._queues[request.tenant]
        for overtaken in queue[: self._index(queue, request)]:
            overtaken.num_overtaken += 1
        if front.tenant != request.tenant:
            self._queues[front.tenant][0].num_overtaken += 1
        self.remove(request)
        self._num_running[request.tenant] += 1

    def leave(self, request: Request) -> None:
        """It was taken and does not run any more."""
        self._num_running[request.tenant] -= 1
        if not self._num_running[request.tenant]:
            del self._num_running[request.tenant]

    def ahead_of(self, request: Request, waiting: Iterable[Request], mean_output: float) -> Backlog:
        """What of `waiting` will be served before `request`, if it comes or stays: all of better priority, the earlier
        ones of its tenant, and of every other tenant as much as its counter is behind by then. O(waiting).

        `mean_output`: how many tokens a request generates.
        """
        own = request.tenant
        num_requests = num_tokens = 0.0
        queued: dict[str, list[float]] = {own: [0, 0]}
        for other in waiting:
            if other.priority > request.priority or (other.tenant == own and other.arrival >= request.arrival):
                continue
            if other.priority < request.priority:
                num_requests += 1
                num_tokens += other.num_pending
            else:
                tenants = queued.setdefault(other.tenant, [0, 0])
                tenants[0] += 1
                tenants[1] += other.num_pending
        num, tokens = queued[own]
        finish = self._lifted(own) + _service(num, tokens, mean_output)
        for tenant, (num, tokens) in queued.items():
            behind = finish - self.counter(tenant)
            share = 1.0 if tenant == own else min(1.0, max(0.0, behind / _service(num, tokens, mean_output)))
            num_requests += share * num
            num_tokens += share * tokens
        return Backlog(num_requests, num_tokens)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _index(self, queue: list[Request], request: Request) -> int:
        index = bisect_left(queue, rank_in_queue(request), key=rank_in_queue)
        assert queue[index] is request
        return index

    def _turn(self, tenant: str) -> _Turn:
        head = self._queues[tenant][0]
        return _Turn(head.priority, self.counter(tenant), head.arrival, tenant)

    def _move_up(self, tenant: str) -> None:
        """Its turn is an earlier one now. The one that it had stays behind, until there are too many of those."""
        heapq.heappush(self._order, self._turn(tenant))
        if len(self._order) > 2 * len(self._queues) + _SPARE_PLACES:
            self._order = [self._turn(t) for t in self._queues]
            heapq.heapify(self._order)

    def _front(self) -> _Turn | None:
        """The first turn, after those above it that are out of date have been put right."""
        while self._order:
            turn = self._order[0]
            if turn.tenant not in self._queues:
                heapq.heappop(self._order)
                continue
            now = self._turn(turn.tenant)
            if now == turn:
                return turn
            heapq.heapreplace(self._order, now)
        return None

    def _near(self, front: _Turn) -> list[str]:
        """The first tenants that may be preferred to `front`, in order, itself the first of them."""
        turns: dict[str, _Turn] = {}
        turn: _Turn | None = front
        while turn is not None and len(turns) < _NEAR_TENANTS:
            if turn.priority != front.priority or turn.counter > front.counter + self._lead:
                break
            turns[turn.tenant] = turn
            heapq.heappop(self._order)
            turn = self._front()
        for turn in turns.values():
            heapq.heappush(self._order, turn)
        return list(turns)

    def _lifted(self, tenant: str) -> float:
        """A counter as it will be when its tenant, without a request of the best priority, gets one."""
        return max(self.counter(tenant), self._level())

    def _level(self) -> float:
        front = self._front()
        return self.counter(self._last) if front is None else front.counter

    def _lift(self, tenant: str) -> None:
        if len(self._counters) >= self._forget_at:
            self._forget()
        self._joined_at[tenant] = self._level()
        self._counters[tenant] = max(self.counter(tenant), self._joined_at[tenant])

    def _forget(self) -> None:
        """Tenants that have nothing in the engine and would be lifted when they come, whenever that is."""
        least = min(map(self.counter, self._queues), default=self.counter(self._last))
        busy = self._queues.keys() | self._num_running.keys() | {self._last}
        going = {t: c for t, c in self._counters.items() if c <= least and t not in busy}
        self._counters = {t: c for t, c in self._counters.items() if t not in going}
        self._forgotten = max(self._forgotten, *going.values(), 0.0)
        self._forget_at = 2 * len(self._counters) + _FORGET_ABOVE


def _service(num_requests: float, num_tokens: float, mean_output: float) -> float:
    return INPUT_WEIGHT * num_tokens + OUTPUT_WEIGHT * num_requests * mean_output
