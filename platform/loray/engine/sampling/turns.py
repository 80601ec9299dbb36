"""`MaskTurns`: whose masks a step computes, so that expensive constraints hold up neither others nor each other.

A step has a budget of mask time. What a mask takes beyond it is a debt, which later steps pay before masks are computed
again: so masks take no more than the budget a step on average, however long one takes. Each tenant has a counter of the
mask time that it has used, as in `fairness`. The tenant with the smallest is next, and of its requests the one that has
waited for longest. So a request that was skipped goes before those of its tenant that came later, and each waits for a
bounded number of steps. A tenant that is far behind another has not made the debt, and does not wait for it.

Masks that take little are computed in groups, which a time is measured for; others alone.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from loray.engine.request import Request
from loray.text.grammar import MAX_MEAN_MASK_S, MIN_MASKS

_QUICK_S = 0.001  # of a mask that is computed in a group
_LEAST_S = 1e-5  # that any mask takes
_FADES = 0.9  # what is left, with each mask, of the time for which the next one is expected
# A tenant that is so far behind has not made the debt. It is more than any mask takes, so that tenants whose masks are
# all slow do not overtake each other in debt.
_BEHIND_S = 0.02
_MOST_BEHIND_S = 0.04  # a tenant is never further behind


class MaskGroup(NamedTuple):
    """Masks that are computed together. `limit_s`: they are not begun when the turn has taken so long."""

    requests: list[Request]
    limit_s: float


@dataclass(slots=True)
class _Cost:
    """The seconds of a request's masks: what the next one is expected to take, and all together."""

    expected_s: float = 0.0
    total_s: float = 0.0
    num: int = 0


class MaskTurns:
    """A turn is what a thread computes between `begin` and `end`; it may go on for several steps.

    budget_s    seconds a step
    group_size  the most masks that are computed together: any of them may take longer than expected
    """

    def __init__(self, budget_s: float, group_size: int) -> None:
        self.budget_s, self._group_size = budget_s, group_size
        self._credit_s = budget_s
        self._due: dict[str, dict[Request, None]] = {}  # by tenant, in the order in which they have come
        self._costs: dict[Request, _Cost] = {}
        self._num_requests: Counter[str] = Counter()
        self._used_s: dict[str, float] = {}  # of tenants with requests
        self._turn: list[MaskGroup] = []

    def __bool__(self) -> bool:
        """Say whether masks are due, those of the turn included."""
        return bool(self._due)

    def enter(self, request: Request) -> None:
        """Add a request, which has a mask due. Its tenant is not behind another one, so being away earns nothing."""
        self._costs[request] = _Cost()
        self._num_requests[request.tenant] += 1
        self._used_s.setdefault(request.tenant, max(self._used_s.values(), default=0.0))
        self.add(request)

    def add(self, request: Request) -> None:
        """Note that its next mask is due."""
        self._due.setdefault(request.tenant, {})[request] = None

    def leave(self, request: Request) -> None:
        """Forget a request that has ended, perhaps in the middle of a turn."""
        if self._costs.pop(request, None) is None:
            return
        self._done(request)
        self._num_requests[request.tenant] -= 1
        if not self._num_requests[request.tenant]:
            del self._num_requests[request.tenant], self._used_s[request.tenant]

    def next_step(self) -> None:
        """Add the budget of a step that has passed."""
        self._credit_s += self.budget_s

    def begin(self) -> Sequence[MaskGroup]:
        """Begin a turn; returns its groups, in order. Not while another one goes on. The first that its limit excludes
        ends it.
        """
        assert not self._turn
        self._credit_s = min(self._credit_s, self.budget_s)
        behind, places = max(self._used_s.values(), default=0.0) - _BEHIND_S, itertools.count()
        queues = {tenant: iter(queue) for tenant, queue in self._due.items()}
        order = [(self._used_s[tenant], next(places), tenant) for tenant in queues]
        heapq.heapify(order)
        is_open = False  # the last group takes more
        while order:
            used_s, _, tenant = order[0]
            limit_s = self.budget_s if used_s <= behind else self._credit_s
            if limit_s <= 0:
                break
            if (request := next(queues[tenant], None)) is None:
                heapq.heappop(order)
                continue
            expected_s = self._costs[request].expected_s
            heapq.heapreplace(order, (used_s + expected_s, next(places), tenant))
            is_quick = expected_s <= _QUICK_S
            if is_quick and is_open and limit_s == self._turn[-1].limit_s:
                self._turn[-1].requests.append(request)
            else:
                self._turn.append(MaskGroup([request], limit_s))
            is_open = is_quick and len(self._turn[-1].requests) < self._group_size
        return self._turn

    def end(self, seconds: Sequence[float]) -> list[Request]:
        """End the turn; returns its requests whose masks have been computed, also those that have left meanwhile.

        seconds  what each group took; the first ones, if the turn has ended before the others
        """
        computed: list[Request] = []
        for group, group_s in zip(self._turn, seconds, strict=False):
            self._credit_s -= group_s
            share_s = group_s / len(group.requests)
            for request in group.requests:
                self._charge(request, share_s, alone=len(group.requests) == 1)
            computed += group.requests
        self._turn = []
        least = max(self._used_s.values(), default=0.0) - _MOST_BEHIND_S
        self._used_s = {tenant: max(used_s, least) for tenant, used_s in self._used_s.items()}
        return computed

    def num_quick(self, request: Request) -> int:
        """Return how many more masks of the request may be computed beside a step: none if they are slow."""
        expected_s = self._costs[request].expected_s
        return 0 if expected_s > _QUICK_S else int(self.budget_s / max(expected_s, _LEAST_S))

    def was_slow(self, request: Request) -> None:
        """Expect its next masks to be slow."""
        if (cost := self._costs.get(request)) is not None:
            cost.expected_s = max(cost.expected_s, self.budget_s)

    def mean_s(self, request: Request) -> float:
        """The mean time that a mask of the request has taken."""
        cost = self._costs[request]
        return cost.total_s / max(1, cost.num)

    def is_too_expensive(self, request: Request) -> bool:
        return self._costs[request].num >= MIN_MASKS and self.mean_s(request) > MAX_MEAN_MASK_S

    def _charge(self, request: Request, seconds: float, *, alone: bool) -> None:
        if request.tenant in self._used_s:
            self._used_s[request.tenant] += seconds
        cost = self._costs.get(request)
        if cost is None:
            return
        self._done(request)
        cost.expected_s = max(seconds, _FADES * cost.expected_s)
        cost.total_s += seconds if alone else min(seconds, _QUICK_S)  # in a group another one may have been slow
        cost.num += 1

    def _done(self, request: Request) -> None:
        queue = self._due.get(request.tenant, {})
        queue.pop(request, None)
        if not queue:
            self._due.pop(request.tenant, None)
