"""Virtual token counters, one for each tenant, say whose prompt is next among the requests that have tokens to compute
before they decode.

Source: Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024 (VTC, algorithm 2). A tenant's counter is
the service that it has received: `INPUT_WEIGHT` for each prompt token when it is computed and `OUTPUT_WEIGHT` for each
token when it is generated, both times the weight of the adapter (`token_weight`). The queue holds requests that wait
and requests whose prompt is partly computed; the tenant in it with the smallest counter is next. When a tenant comes
back to the queue, its counter is raised to that of the tenant that is next, so being idle earns no credit.

Priority comes first, as in vLLM: a smaller number is served earlier, whatever its tenant. Counters decide between
tenants whose best requests in the queue have the same priority.

The requests of one tenant are served in the order of (priority, virtual finish, arrival), where the virtual finish is
the tenant's counter when the request came plus the units of its prompt. For a prompt that is computed alone it stays
the counter plus what is left, so the shortest remaining one is next; and while others are served the counter rises, so
it ages: a request of n units is overtaken only by shorter ones that come before its tenant has received n more units.

Requests whose adapter is in the pool are preferred within two bounds: their tenant's counter may exceed the smallest
by `lead`, and no request is overtaken for that more than `MAX_OVERTAKES` times.

The guarantee for two tenants f and g that both have requests of the best priority in the queue throughout [t1, t2)
(the paper's theorem 4.4 for prompts that are computed in parts, with the preference's lead added; U is exact for any
batch, any chunks and any preemption):

    |counter_f − counter_g| ≤ lead + U      at any moment
    |service_f − service_g| ≤ 2 (lead + U)  over [t1, t2)
    U = INPUT_WEIGHT · S + OUTPUT_WEIGHT · M

S: prompt tokens of one step, at most max_num_batched_tokens, however long a prompt is. M: the largest number of tokens
that one tenant's running requests may still generate, at most max_num_seqs · max_tokens. Both weighted. Proof: a prompt
is given tokens only while its tenant's counter is within `lead` of the smallest; then the counter grows by those tokens
and by what its running requests still generate; and the smallest counter never falls, since tenants that come back are
raised to it. Two exceptions. If the next request finds no place or no blocks, the prompts that have begun go on, since
nothing else can: S is then the tokens that one tenant's running requests have still to compute. And a refund lowers a
counter: the difference may then be larger by the refund, until its tenant, which is now first, has caught up.

If a request's tenant has the smallest counter when the request comes, and there is a place for it, its prompt is the
next to be computed, unless another tenant with that counter asks for less, or preferred ones come first. Tokens that
are computed again after a preemption are not charged. If a request fails before its first token, its charge is
refunded.

When there are many tenants, those that have nothing in the engine are forgotten if their counters do not exceed the
smallest of those in the queue. An unknown tenant starts with the largest counter that was forgotten. So coming back
gains nothing, and costs something only if the smallest counter has fallen since, by a refund.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from loray.engine.request import Request

INPUT_WEIGHT = 1
OUTPUT_WEIGHT = 2
MAX_OVERTAKES = 8
_NEAR_TENANTS = 8  # that are searched for a preferred request
_NEAR_REQUESTS = 8  # of each of these tenants
_FORGET_ABOVE = 1024
_SPARE_PLACES = 64


class _TenantTurn(NamedTuple):
    """Tenants are served in this order. If counters are equal, the tenant that asks for less is next."""

    priority: int
    counter: float
    virtual_finish: float
    arrival: int
    tenant: str


def token_weight(adapter_bytes: int, base_bytes: int) -> float:
    """Return the cost of a token relative to one of the base: the ratio of the bytes of weights that they read.

    `adapter_bytes` grows with rank and modules: a rank-64 adapter on q, k, v, o of SmolLM2-135M weighs 1.05.
    """
    return 1 + adapter_bytes / base_bytes


def rank_in_queue(request: Request) -> tuple[int, float, int]:
    """Return the rank by which a tenant's requests are ordered."""
    return request.priority, request.virtual_finish, request.arrival


def rank_in_batch(request: Request) -> tuple[int, int]:
    """Return the rank by which running requests are ordered; the last is preempted first."""
    return request.priority, request.arrival


class FairQueue:
    """Owns the counters, and the order of the requests whose prompts could be computed now. O(log tenants) for each
    operation.
    """

    def __init__(self, lead: float = 0) -> None:
        """`lead`: service by which a preferred request's tenant may be ahead of the tenant that is next."""
        self._lead = lead
        self._counters: dict[str, float] = {}
        self._queues: dict[str, list[Request]] = {}
        self._order: list[_TenantTurn] = []  # a heap; a tenant's first place in it may be too early, never too late
        self._joined_at: dict[str, float] = {}  # for tenants with a queue: the counter to which they were raised
        self._num_running: Counter[str] = Counter()
        self._last = ""  # the tenant whose queue became empty last
        self._forgotten = 0.0  # the largest counter that has been forgotten
        self._forget_at = _FORGET_ABOVE

    def counter(self, tenant: str) -> float:
        return self._counters.get(tenant, self._forgotten)

    def push(self, request: Request) -> None:
        tenant = request.tenant
        queue = self._queues.get(tenant)
        if not queue or request.priority < queue[0].priority:
            self._lift(tenant)
        if request.virtual_finish == math.inf:  # a preempted request keeps its own
            request.virtual_finish = self.counter(tenant) + INPUT_WEIGHT * request.num_pending
        first = not queue or rank_in_queue(request) < rank_in_queue(queue[0])
        if queue is None:
            queue = self._queues[tenant] = []
        queue.insert(bisect_left(queue, rank_in_queue(request), key=rank_in_queue), request)
        if first:
            self._move_up(tenant)

    def remove(self, request: Request) -> None:
        """Remove a request that has been computed up to its newest token, or does not want to be any more."""
        queue = self._queues[request.tenant]
        del queue[self._index(queue, request)]
        if not queue:
            del self._queues[request.tenant], self._joined_at[request.tenant]
            self._last = request.tenant

    def charge(self, request: Request, *, num_input: int = 0, num_output: int = 0) -> None:
        """Add the service that `request` receives, in tokens."""
        service = request.token_weight * (INPUT_WEIGHT * num_input + OUTPUT_WEIGHT * num_output)
        self._counters[request.tenant] = self.counter(request.tenant) + service

    def charge_prompt(self, request: Request, num_computed: int) -> None:
        """Charge the prompt up to `num_computed`, without what was charged before or found in the prefix cache."""
        first = max(request.charged_until, request.num_computed)
        stop = min(num_computed, request.num_prompt_tokens)
        if stop > first:
            self.charge(request, num_input=stop - first)
            request.num_input_charged += stop - first
            request.charged_until = stop

    def charge_output(self, request: Request) -> None:
        """Charge the tokens that it has generated since the last call."""
        num_output = len(request.output_ids) - request.num_output_charged
        if num_output:
            self.charge(request, num_output=num_output)
            request.num_output_charged += num_output

    def refund(self, request: Request, *, num_input: int) -> None:
        """Take back what `request` was charged, which has received nothing. If its tenant has joined the queue since,
        its counter stays at or above the value to which it was raised then, so the refund earns no credit for being
        idle.
        """
        tenant = request.tenant
        counter = self.counter(tenant) - request.token_weight * INPUT_WEIGHT * num_input
        self._counters[tenant] = max(counter, self._joined_at.get(tenant, 0.0))
        if tenant in self._queues:
            self._move_up(tenant)

    def pick(self, preferred: Callable[[Request], bool]) -> Request | None:
        """Return the next request, or a preferred one that may overtake it."""
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

    def serve(self, request: Request) -> None:
        """The request that `pick` gave is served next. It overtakes earlier ones of its tenant, and the one that was
        next.
        """
        front = self._front()
        assert front is not None
        queue = self._queues[request.tenant]
        for overtaken in queue[: self._index(queue, request)]:
            overtaken.num_overtaken += 1
        if front.tenant != request.tenant:
            self._queues[front.tenant][0].num_overtaken += 1

    def begin(self, request: Request) -> None:
        """`request` runs from now on."""
        self._num_running[request.tenant] += 1

    def leave(self, request: Request) -> None:
        """`request` does not run any more."""
        self._num_running[request.tenant] -= 1
        if not self._num_running[request.tenant]:
            del self._num_running[request.tenant]

    @property
    def best_priority(self) -> float:
        """The priority of the request that is next; infinite if there is none."""
        front = self._front()
        return math.inf if front is None else front.priority

    def requests(self) -> set[Request]:
        """Return all that are in the queue. O(n)."""
        return {request for queue in self._queues.values() for request in queue}

    def num_running(self, tenant: str) -> int:
        return self._num_running[tenant]

    def key(self, request: Request) -> tuple[int, float, float, int]:
        """Return the rank in the queue among the requests of all tenants."""
        return request.priority, self.counter(request.tenant), request.virtual_finish, request.arrival

    def lifted(self, tenant: str) -> float:
        """Return the counter of a tenant after it has been raised for a new request."""
        return max(self.counter(tenant), self._level())

    def virtual_finish(self, request: Request) -> float:
        """Return the virtual finish, also of a request that is not in the queue yet."""
        if request.virtual_finish < math.inf:
            return request.virtual_finish
        return self.lifted(request.tenant) + INPUT_WEIGHT * request.num_pending

    # -- private ------------------------------------------------------------------------------------------------------

    def _index(self, queue: list[Request], request: Request) -> int:
        index = bisect_left(queue, rank_in_queue(request), key=rank_in_queue)
        assert queue[index] is request
        return index

    def _turn(self, tenant: str) -> _TenantTurn:
        head = self._queues[tenant][0]
        return _TenantTurn(head.priority, self.counter(tenant), head.virtual_finish, head.arrival, tenant)

    def _move_up(self, tenant: str) -> None:
        """The tenant's turn is earlier now. Its old entry stays in the heap until there are too many old entries."""
        heapq.heappush(self._order, self._turn(tenant))
        if len(self._order) > 2 * len(self._queues) + _SPARE_PLACES:
            self._order = [self._turn(t) for t in self._queues]
            heapq.heapify(self._order)

    def _front(self) -> _TenantTurn | None:
        """The first turn; outdated entries before it are corrected."""
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

    def _near(self, front: _TenantTurn) -> list[str]:
        """`front`'s tenant, and the next ones in order that may be preferred to it."""
        turns: dict[str, _TenantTurn] = {}
        turn: _TenantTurn | None = front
        while turn is not None and len(turns) < _NEAR_TENANTS:
            if turn.priority != front.priority or turn.counter > front.counter + self._lead:
                break
            turns[turn.tenant] = turn
            heapq.heappop(self._order)
            turn = self._front()
        for turn in turns.values():
            heapq.heappush(self._order, turn)
        return list(turns)

    def _level(self) -> float:
        front = self._front()
        return self.counter(self._last) if front is None else front.counter

    def _lift(self, tenant: str) -> None:
        if len(self._counters) >= self._forget_at:
            self._forget()
        self._joined_at[tenant] = self._level()
        self._counters[tenant] = max(self.counter(tenant), self._joined_at[tenant])

    def _forget(self) -> None:
        """Forget tenants that have nothing in the engine and whose counters would be raised if they came back."""
        least = min(map(self.counter, self._queues), default=self.counter(self._last))
        busy = self._queues.keys() | self._num_running.keys() | {self._last}
        going = {t: c for t, c in self._counters.items() if c <= least and t not in busy}
        self._counters = {t: c for t, c in self._counters.items() if t not in going}
        self._forgotten = max(self._forgotten, *going.values(), 0.0)
        self._forget_at = 2 * len(self._counters) + _FORGET_ABOVE
